"""Torch's own formats: what a file computes without lowrank_fx, what lies in it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule
from lowrank_fx.errors import ExportError

WITHOUT = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lowrank_fx", "passes"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import warnings
warnings.simplefilter("ignore")
import torch

folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
extra = {"plan.json": ""}
program = torch.export.load(f"{folder}/m.pt2", extra_files=extra).module()
scripted = torch.jit.load(f"{folder}/m.pt")
results = {"plan": json.loads(extra["plan.json"])["target"]}
given = {"pt2": [], "torchscript": []}
for x, gain, left in inputs:
    output = program(x, gain=gain, pair={"left": left})
    assert type(output) is dict and type(output["parts"]) is list, output
    given["pt2"].append([output["sum"], *output["parts"]])
    flat = scripted(x, gain, left)
    assert list(flat) == ["sum", "parts.0", "parts.1"], flat
    given["torchscript"].append(list(flat.values()))
torch.save(given, f"{folder}/outputs.pt")
print(json.dumps(results))
"""


@dataclass
class Result:
    """What a model returns, as a class that torch is told of."""

    sum: Tensor
    parts: list[Tensor]


torch.export.register_dataclass(Result, serialized_type_name="tests.Result")


class Classed(nn.Module):
    """Nested keyword arguments in another order than the signature's, and a class of its own as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))

    def forward(self, x: Tensor, *, pair: Mapping[str, Tensor], gain: Tensor, twice: bool = True) -> Result:
        y = self.body(x) * gain
        rows = torch.arange(x.shape[0]).reshape(-1, 1) + 0.5
        return Result(y + pair["left"], [y * 2 if twice else y, y * rows])


def batch(seed: int, rows: int = 8) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x, left = (torch.randn(rows, 32, generator=generator) for _ in range(2))
    return (x,), {"gain": torch.rand(1, 32, generator=generator), "pair": {"left": left}}


@pytest.fixture(scope="module")
def classed() -> LowRankModule:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Classed().eval()
    return lowrank_fx.optimize(
        model,
        [batch(seed) for seed in range(6)],
        target=Keep(params=0.7, of="sites"),
        forward_args=lambda given: given,
        compile=False,
        progress=False,
    )


def test_files_need_torch_alone(classed: LowRankModule, tmp_path: Path) -> None:
    made = classed.export_pt2(tmp_path / "m.pt2")
    with pytest.warns(DeprecationWarning, match="torch has deprecated TorchScript"):
        scripted = classed.export_torchscript(tmp_path / "m.pt", fold=False)
    for each in (made, scripted):
        assert (each.inputs, each.outputs) == (("x", "gain", "pair.left"), ("sum", "parts.0", "parts.1"))
        assert each.dynamic[0] == "batch"
        assert each.source == "held-out batches"
        assert each.error == 0  # the same operators
        assert len(set(each.batch_sizes)) == 2
        assert each.bytes == each.path.stat().st_size
    calls = [batch(20, 3), batch(21, 13)]
    flat = [(args[0], kwargs["gain"], kwargs["pair"]["left"]) for args, kwargs in calls]
    torch.save(flat, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"] == json.loads(classed.plan.to_json())["target"]
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for place, (args, kwargs) in enumerate(calls):
        expected = classed(*args, **kwargs)
        for kind in ("pt2", "torchscript"):
            for given, value in zip(outputs[kind][place], (expected.sum, *expected.parts), strict=True):
                assert torch.allclose(given, value, rtol=1e-6, atol=1e-6), kind


def test_a_program_holds_neither_the_inputs_nor_where_the_sources_lie(classed: LowRankModule, tmp_path: Path) -> None:
    example = batch(77)
    made = classed.export_pt2(tmp_path / "m.pt2", fold=True, example=example)
    assert (made.source, made.folded) == ("the given example", ("body.0", "body.2"))
    data = made.path.read_bytes()
    assert torch.export.load(made.path).example_inputs is None
    assert example[0][0][:4].numpy().tobytes() not in data
    assert [text for text in (str(Path(__file__).parent), "site-packages") if text.encode() in data] == []


def test_a_folded_program_has_dense_operators(classed: LowRankModule, tmp_path: Path) -> None:
    shapes = {}
    for fold in (False, True):
        made = classed.export_pt2(tmp_path / "m.pt2", fold=fold)
        program = torch.export.load(made.path)
        shapes[fold] = sorted(tuple(tensor.shape) for tensor in program.state_dict.values() if tensor.dim() == 2)
    ranks = {entry.name: entry.rank for entry in classed.plan.factored}
    first, second = ranks["body.0"], ranks["body.2"]
    assert shapes[True] == [(32, 48), (48, 32)]
    assert shapes[False] == sorted([(first, 32), (48, first), (second, 48), (32, second)])


@pytest.mark.parametrize("kind", ["pt2", "torchscript"])
def test_a_file_that_computes_something_else_is_not_left(
    classed: LowRankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from lowrank_fx import export_to_torch

    real = getattr(export_to_torch, f"run_{kind}")

    def run(*args: Any) -> Any:
        return [[first, second + 0.1, third] for first, second, third in real(*args)]

    monkeypatch.setattr(export_to_torch, f"run_{kind}", run)
    monkeypatch.setattr("lowrank_fx.exporting.warnings.warn", lambda *_, **__: None)
    with pytest.raises(
        ExportError, match=r"on inputs of shape \[4, 32\].* gives output 'parts.0' 0\.\d+ away from the"
    ):
        getattr(classed, f"export_{kind}")(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_there_is_no_package(
    classed: LowRankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nin torch._inductor.config")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile)
    with pytest.raises(
        ExportError,
        match=r"AOTInductor cannot compile .*: RuntimeError: No working C\+\+ compiler found; .* export_pt2",
    ):
        classed.export_aoti(tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_torchscript_does_not_take_is_said(
    classed: LowRankModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("attribute lookup is not defined")

    monkeypatch.setattr(torch.jit, "script", refuse)
    monkeypatch.setattr("lowrank_fx.exporting.warnings.warn", lambda *_, **__: None)
    with pytest.raises(ExportError, match="TorchScript does not take the model: RuntimeError: attribute lookup"):
        classed.export_torchscript(tmp_path / "m.pt")
    monkeypatch.delattr(torch.jit, "script")
    with pytest.raises(ExportError, match="has no TorchScript any more; export_pt2"):
        classed.export_torchscript(tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_machine_code_runs_without_lowrank_fx(classed: LowRankModule, tmp_path: Path) -> None:
    made = classed.export_aoti(tmp_path / "m.package")
    assert (made.kind, made.path.name) == ("aoti", "m.package")
    assert made.error < 1e-6
    code = textwrap.dedent(
        """
        import sys, warnings
        sys.modules["lowrank_fx"] = None
        warnings.simplefilter("ignore")
        import torch
        package = torch._inductor.aoti_load_package("m.package")
        assert "target" in package.get_metadata()["plan.json"]
        x = torch.ones(7, 32)
        print(package(x, gain=torch.ones(1, 32), pair={"left": x})["sum"].sum().item())
        """
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = torch.ones(7, 32)
    expected = classed(x, gain=torch.ones(1, 32), pair={"left": x}).sum.sum()
    assert float(done.stdout) == pytest.approx(float(expected.detach()), rel=1e-5)
