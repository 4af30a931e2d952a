"""``lowrank-fx onnx-compress``."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx_models import computed, mlp, values

from lowrank_fx.cli import main

LOADER = """
import numpy as np

def make_loader():
    rng = np.random.default_rng(0)
    for _ in range(6):
        yield {"x": rng.standard_normal((16, 32)).astype(np.float32)}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first arguments of a command in a folder that holds what they name."""
    module = f"onnx_loader_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(LOADER)
    onnx.save_model(mlp(), tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    return ["onnx-compress", "in.onnx", "out.onnx", "--data", f"{module}:make_loader", "--no-progress"]


def test_a_file_becomes_a_smaller_one(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--keep-params", "0.6", "--skip", "head", "--html", "report.html"]) == 0
    said = capsys.readouterr().out
    assert "Keep(params=0.6)" in said
    assert "skipped by the pattern 'head'" in said
    assert "out.onnx was written; its error on held-out rows in onnxruntime is 0." in said
    assert "<html" in Path("report.html").read_text("utf-8")
    made = onnx.load_model("out.onnx")
    assert len(made.graph.node) > len(mlp().graph.node)
    assert computed(made, {"x": values(5, 32)})[0].shape == (5, 20)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--keep-params", "0.6", "--tolerance", "0.1"], "--tolerance 0.1 and --keep-params 0.6: give one target"),
        (["--keep-flops", "7"], "the share that may remain"),
        (["--keep-params", "0.001"], "cannot be reached"),
        (["--data", "nowhere:make"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    files: list[str], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not Path("out.onnx").exists()
