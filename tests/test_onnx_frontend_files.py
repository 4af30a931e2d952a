"""Where ONNX files are written, what stands beside them, and how a batch fills those that fix its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_models import batches, mlp, model_of, values
from torch import Tensor, nn

from lowrank_fx import Keep, onnx_compress
from lowrank_fx.batches import Call
from lowrank_fx.errors import CalibrationError, StorageError
from lowrank_fx.grouped_sketch import make_sketch
from lowrank_fx.observer import Recorder, TapObserver
from lowrank_fx.onnx_frontend import compress
from lowrank_fx.onnx_frontend import model as model_module
from lowrank_fx.onnx_frontend.inputs import binder
from lowrank_fx.onnx_frontend.model import OnnxModel, read_model, written
from lowrank_fx.onnx_frontend.program import OnnxProgram
from lowrank_fx.onnx_frontend.runtime import Filled, cut_activation

# ---- a batch that the file fixes -------------------------------------------------------------------------------------


def masked(rows: int | str, *, flat: bool = False) -> OnnxProgram:
    """A layer over tokens ``[rows, 5, 48]``, or over all of them ``[rows * 5, 48]``, and one over tokens again."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat" if flat else "tokens"], ["r"]),
        helper.make_node("MatMul", ["r", "W"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "V"], ["q"]),
        helper.make_node("Reshape", ["q", "tokens"], ["z"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["u"]),
        helper.make_node("Mul", ["z", "u"], ["y"]),
    ]
    batch = rows if isinstance(rows, int) else -1
    constants = {
        "W": values(48, 64, seed=1, scale=0.1),
        "V": values(64, 48, seed=2, scale=0.1),
        "flat": np.array([-1 if batch == -1 else batch * 5, 48]),
        "tokens": np.array([batch, 5, 48]),
        "last": np.array([2]),
    }
    return OnnxProgram(OnnxModel(model_of(nodes, constants, {"x": [rows, 5, 48], "attention_mask": [rows, 5]})))


def padded(program: OnnxProgram) -> Call:
    """Three rows of three tokens and two places of padding."""
    mask = np.array([[1, 1, 1, 0, 0]] * 3, np.float32)
    return binder(program.model)({"x": values(3, 5, 48), "attention_mask": mask}, 0)


def sampled(program: OnnxProgram) -> dict[str, Tensor]:
    """The rows that the sketch of each tap is given."""
    table, recorder = program.find_sites(), Recorder(0)
    call = padded(program)
    recorder.start(0, call.mask)
    found: dict[str, Tensor] = {}

    class Seen(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            sketch = make_sketch(table.taps[name].width, 1, None, "cpu")
            self.observer, self.tap = TapObserver(table.taps[name], sketch, 64, recorder, min_rows=1024), name

        def forward(self, activation: Tensor) -> None:
            found[self.tap] = self.observer.sampled(activation)[0]

    program.observed(table, {name: Seen(name) for name in table.taps})(call)
    return found


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_fill_up_a_batch_are_not_calibrated_on(flat: bool) -> None:
    fixed, free = sampled(masked(4, flat=flat)), sampled(masked("n", flat=flat))
    assert [rows.shape for rows in fixed.values()] == [(9, 48), (9, 64)]
    for name, rows in free.items():
        torch.testing.assert_close(fixed[name], rows)


@pytest.mark.parametrize("flat", [False, True])
def test_a_batch_that_is_filled_up_has_its_gradients(flat: bool) -> None:
    found: list[list[Tensor]] = []
    for rows in (4, "n"):
        program = masked(rows, flat=flat)
        with torch.enable_grad():
            (output,), starts = program.probed(["h", "q"])(padded(program))
            assert output.shape == (3, 5, 48)
            gradients = torch.autograd.grad(output.square().sum(), list(starts.values()))
        apart = [own.reshape(-1, own.shape[-1]) for own in gradients]
        found.append([own[own.any(1)] for own in apart])
    for own, expected in zip(*found, strict=True):
        assert own.shape[0] == 9
        # Sums of 48 products of float32 numbers.
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_what_is_a_multiple_of_the_batch_by_chance_stays() -> None:
    rows = Filled(3, 4)
    other = torch.from_numpy(values(8, 5))
    assert cut_activation(other, rows) is other
    repeated = torch.cat([other[:6], other[:2]])
    torch.testing.assert_close(cut_activation(repeated, rows), other[:6])
    experts = torch.ones(4, 5, 6)
    assert cut_activation(experts, rows, groups=4) is experts
    assert cut_activation(experts, rows).shape == (3, 5, 6)
    assert cut_activation(experts, None) is experts


def test_flops_where_the_batch_is_as_long_as_a_list_of_sizes() -> None:
    program = masked(3)
    call = padded(program)
    short = call.rows(0, 2)
    assert program.count_flops(short) == program.count_flops(call) == 2 * 2 * 3 * 5 * 48 * 64


def test_more_rows_than_the_file_takes() -> None:
    bind = binder(masked(1).model)
    with pytest.raises(CalibrationError, match=r"batch 3.*\[1, 5, 48\].*\[4, 5, 48\]; the .* of at most 1 row$"):
        bind({"x": values(4, 5, 48), "attention_mask": values(4, 5)}, 3)
    with pytest.raises(CalibrationError, match=r"was given float32\[4, 6, 48\]$"):
        bind({"x": values(4, 6, 48), "attention_mask": values(4, 6)}, 3)


# ---- files -----------------------------------------------------------------------------------------------------------


def outside(seed: int = 0) -> OnnxModel:
    """A model whose large tensors go into a file of their own."""
    return OnnxModel(mlp(seed), frozenset(("up.weight", "down.weight")))


def tensor_files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix == ".data"}


def test_tensors_of_earlier_results_are_deleted(tmp_path: Path) -> None:
    goal = tmp_path / "a[b].onnx"
    others = {f"{goal.name}.weights.data", f"other.onnx.{'0' * 12}.data", f"ab.onnx.{'0' * 12}.data"}
    for name in others:
        (tmp_path / name).write_bytes(b"")
    for seed in (0, 10, 10):
        with written(outside(seed), goal):
            pass
        (own,) = tensor_files(tmp_path) - others
    assert others < tensor_files(tmp_path)
    # Another file that refers to it was given, such as the old one by a new name.
    source = tmp_path / "kept.onnx"
    goal.rename(source)
    with written(outside(20), goal, source):
        pass
    assert len(tensor_files(tmp_path) - others) == 2
    assert read_model(source).external == read_model(goal).external
    with written(outside(20), goal, goal):
        pass
    assert own not in tensor_files(tmp_path)
    assert len(tensor_files(tmp_path) - others) == 1
    compress._copy(OnnxModel(mlp()), source, goal)
    assert not tensor_files(tmp_path) - others


def test_all_files_are_readable_alike_and_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal = tmp_path / "out.onnx"
    synced: list[str] = []

    def note(path: Path) -> None:
        assert not goal.exists() or path == tmp_path
        synced.append(path.name)

    monkeypatch.setattr(model_module, "sync_file", note)
    monkeypatch.setattr(model_module, "sync_folder", note)
    with written(outside(), goal):
        pass
    (data,) = tensor_files(tmp_path)
    assert synced == [data, goal.name, tmp_path.name]
    assert (tmp_path / data).stat().st_mode == goal.stat().st_mode


@pytest.mark.parametrize(
    ("goal", "told"),
    [
        ("", "'' could not be written: it is a folder"),
        ("none/out.onnx", "'none/out.onnx' could not be written: there is no folder 'none'"),
        ("folder", "'folder' could not be written: it is a folder; name a file"),
        ("in.onnx/out.onnx", "there is no folder 'in.onnx'"),
    ],
)
def test_a_goal_that_cannot_be_written_is_told_first(
    goal: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader() -> Any:
        raise AssertionError("the loader is read")
        yield batches()

    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    onnx.save_model(mlp(), "in.onnx")
    with pytest.raises(StorageError, match=told):
        onnx_compress("in.onnx", goal, loader(), Keep(params=0.6), progress=False)
