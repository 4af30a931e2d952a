"""ONNX in, ONNX out: calibrated, planned, rewritten, written and measured."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_models import Array, batches, computed, mlp, model_of, node_of, values
from torch import nn

import lowrank_fx
from lowrank_fx import Keep, Metric, OnnxResult, Tolerance, onnx_compress, onnx_frontend
from lowrank_fx.errors import CalibrationError, CaptureError, LowRankError, OptionError, StorageError, TargetError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.onnx_frontend import compress
from lowrank_fx.onnx_frontend import model as model_module
from lowrank_fx.onnx_frontend.inputs import binder
from lowrank_fx.onnx_frontend.model import OnnxModel


def timing(speedup: float) -> PairedTiming:
    return PairedTiming(speedup, 1.0, 1 / speedup, 0.0, 7)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock decides anything here."""
    monkeypatch.setattr(compress, "paired_speedup", lambda *calls, **options: timing(1.5))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save_model(mlp(), path)
    return path


def relative(found: Array, expected: Array) -> float:
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def compressed(source: Path, target: Any = None, **options: Any) -> OnnxResult:
    target = Keep(params=0.6) if target is None else target
    return onnx_compress(source, source.with_name("out.onnx"), batches(), target, progress=False, **options)


class Block(nn.Module):
    """What exporters meet: linear layers over sequences, a norm, a residual, a head over what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return cast(torch.Tensor, self.head(x.mean(1)))


class Pictures(nn.Module):
    """Convolutions with a stride, groups, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.head = nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return cast(torch.Tensor, self.head(torch.relu(self.second(x)).mean((2, 3))))


def exported(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    assert program is not None
    program.save(str(path))


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("kind", ["block", pytest.param("pictures", marks=pytest.mark.slow)])
def test_it_does_what_optimize_does_to_the_same_model(kind: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = Block().eval() if kind == "block" else Pictures().eval()
    if kind == "block":
        data = [torch.from_numpy(batch).reshape(8, 3, 32) for batch in batches(10)]
    else:
        data = [torch.from_numpy(values(8, 3, 10, 10, seed=number)).cumsum(-1) / 3 for number in range(10)]
    target = Keep(params=0.6)
    reference = lowrank_fx.optimize(model, data, target=target, compile=False, progress=False).plan
    exported(model, data[0], tmp_path / "in.onnx")
    arrays = [batch.numpy() for batch in data]
    made = onnx_compress(tmp_path / "in.onnx", tmp_path / "out.onnx", arrays, target, progress=False)

    assert {site.name for site in made.plan.sites} == {site.name for site in reference.sites}
    assert made.plan.totals.kept("params", "model") <= 0.6
    assert made.plan.totals.model_flops[0] == pytest.approx(reference.totals.model_flops[0])
    plain = {name: error for name, error in reference.candidates if "," not in name}
    # The same sketches, forms and planner: candidates differ by rounding, and by how batch norms are folded. What
    # corrects factors afterwards is PyTorch's alone.
    assert min(error for _, error in made.plan.candidates) == pytest.approx(min(plain.values()), rel=0.1)
    assert made.error == pytest.approx(made.plan.error, rel=1e-3)


def test_the_reported_error_is_that_of_the_file(source: Path) -> None:
    made = compressed(source)
    held_out = batches()[4][12:]  # the second half of the fifth of six batches
    after = computed(onnx.load_model(made.path), {"x": held_out})[0]
    expected = relative(after, computed(mlp(), {"x": held_out})[0])
    assert made.error == pytest.approx(expected, rel=1e-3)
    assert made.plan.error == pytest.approx(expected, rel=1e-3)
    assert 0.01 < made.error < 0.5
    assert made.timing == timing(1.5)
    assert "1.50x" in str(made.report())
    numbers = sum(math.prod(each.dims) for each in onnx.load_model(made.path).graph.initializer)
    assert numbers == made.plan.totals.model_params[1] <= 0.6 * made.plan.totals.model_params[0]


def test_what_is_not_factored_stays(source: Path) -> None:
    made = compressed(source, skip=["down"])
    before, after = mlp(), onnx.load_model(made.path)
    onnx.checker.check_model(after, full_check=True)
    factored = {site.name for site in made.plan.factored}
    assert "down" not in factored
    assert factored
    reached = {"up": "h0", "head": "y"}
    touched = {reached[name] for name in factored}
    for node in before.graph.node:
        if node.output[0] not in touched:
            assert node_of(after, node.output[0]).SerializeToString() == node.SerializeToString()
    assert len(after.graph.node) == len(before.graph.node) + len(factored)
    assert [after.graph.input, after.graph.output] == [before.graph.input, before.graph.output]
    assert "skipped by the pattern 'down'" in str(made.report())


def test_the_same_seed_gives_the_same_bytes(source: Path) -> None:
    first = compressed(source)
    data = first.path.read_bytes()
    second = compressed(source)
    assert second.path.read_bytes() == data
    assert second.plan.to_json() == first.plan.to_json()


def test_a_tolerance_is_kept(source: Path) -> None:
    made = compressed(source, Tolerance(0.2))
    assert made.plan.factored
    assert made.plan.select_error <= 0.2
    assert made.plan.totals.kept("flops", "model") < 1


def test_a_slower_file_is_not_returned(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "paired_speedup", lambda *calls, **options: timing(0.9))
    made = compressed(source, Tolerance(0.2))
    assert made.path.read_bytes() == source.read_bytes()
    assert made.timing is None
    assert not made.plan.factored
    assert "measured slower than the original, so the original came back" in str(made.report())
    kept = compressed(source, Keep(flops=0.6))
    assert kept.plan.factored
    assert "slower than the original" in kept.report().headline


def test_nothing_to_factor(source: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    onnx.save_model(model_of(nodes, {"w": values(24, 32)}, {"x": [24, 32]}), source)
    made = compressed(source, Tolerance(0.2))
    assert made.path.read_bytes() == source.read_bytes()
    assert "used by Mul" in str(made.report())
    with pytest.raises(TargetError, match=r"Keep\(params=0.6\) cannot be reached.*0 of 1 weights"):
        compressed(source)


def test_a_metric_is_given_something_to_call(source: Path) -> None:
    probe = torch.from_numpy(batches(9)[8])
    wanted = torch.from_numpy(computed(mlp(), {"x": probe.numpy()})[0])

    def closeness(model: nn.Module) -> float:
        return -float((model(probe) - wanted).norm() / wanted.norm())

    made = compressed(source, Metric(closeness, max_drop=0.15, evaluations=5))
    assert made.plan.factored
    assert made.plan.metric is not None
    assert made.plan.metric.before == pytest.approx(0, abs=1e-5)
    assert made.plan.metric.after >= -0.15


def test_a_batch_that_the_file_fixes(source: Path) -> None:
    model = mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 24
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 24
    onnx.save_model(model, source)
    made = compressed(source)
    assert made.error == pytest.approx(made.plan.error, rel=1e-3)
    source.unlink()
    onnx.save_model(mlp(), source)
    # Held-out halves are filled up and cut, so that nothing else differs.
    assert compressed(source).plan.error == pytest.approx(made.plan.error, rel=1e-3)


def test_a_directory_of_its_own_tensors(source: Path) -> None:
    source.unlink()
    onnx.save_model(mlp(), source, save_as_external_data=True, location="weights.bin", size_threshold=2000)
    before = (source.with_name("weights.bin")).read_bytes()
    made = compressed(source)
    assert source.with_name("weights.bin").read_bytes() == before
    x = batches(1)[0]
    assert relative(computed(onnx.load_model(made.path), {"x": x})[0], computed(mlp(), {"x": x})[0]) < 0.5
    onnx_compress(source, made.path, batches(), Tolerance(1e-9), progress=False)
    np.testing.assert_array_equal(computed(onnx.load_model(made.path), {"x": x})[0], computed(mlp(), {"x": x})[0])


def test_more_than_a_message_holds(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compressed(source)
    monkeypatch.setattr(model_module, "INLINE_BYTES", 1000)
    made = compressed(source)
    assert made.plan == expected.plan
    files = sorted(file.name for file in source.parent.iterdir())
    assert [name.split(".")[-1] for name in files] == ["onnx", "onnx", "data"]
    x = {"x": batches(1)[0]}
    again = onnx.load_model(made.path)
    assert computed(again, x)[0].shape == (24, 20)
    assert made.error == expected.error


# ---- what goes in ----------------------------------------------------------------------------------------------------


def two_inputs() -> OnnxModel:
    nodes = [helper.make_node("Mul", ["x", "attention_mask"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    return OnnxModel(model_of(nodes, {"w": values(4, 8)}, {"x": ["n", 4], "attention_mask": ["n", 4]}))


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "tensors"])
def test_batches_of_every_kind(kind: str) -> None:
    x, mask = values(3, 4), np.array([[1, 1, 0, 0]] * 3, np.float32)
    given: Any = {"labels": [1, 2, 3], "attention_mask": mask, "x": x} if kind == "dict" else (x, mask, "label")
    if kind == "list":
        given = list(given)
    if kind == "tensors":
        given = (torch.from_numpy(x), torch.from_numpy(mask))
    call = binder(two_inputs())(given, 0)
    assert list(call.kwargs) == ["x", "attention_mask"]
    np.testing.assert_array_equal(call.kwargs["x"].numpy(), x)
    assert call.batch_size == 3
    assert call.mask is not None or kind != "dict"
    if call.mask is not None:
        assert call.mask.tolist() == [[True, True, False, False]] * 3


def test_a_mask_beside_the_inputs_counts_too() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = OnnxModel(model_of(nodes, {"w": values(4, 8)}, {"x": ["n", 2, 4]}))
    call = binder(model)({"x": values(1, 2, 4), "attention_mask": np.array([[1, 0]])}, 0)
    assert list(call.kwargs) == ["x"]
    assert call.mask is not None
    assert call.mask.tolist() == [[True, False]]
    assert binder(model)(values(1, 2, 4), 0).mask is None


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"input": values(3, 4)}, " is dict.* and has no 'x'; the model takes 'x' .n, 4., 'attention_mask'"),
        ((values(3, 4),), "which are 1 inputs; the model takes"),
        (values(3, 4), "which is one input; the model takes .*yield a dictionary"),
        ((values(3, 4).astype(np.float64), values(3, 4)), "'x' takes float32, and was given float64.3, 4.; convert it"),
        ((values(3, 5), values(3, 4)), r"'x' takes \[n, 4\], and was given float32\[3, 5\]"),
        ((values(3), values(3, 4)), r"'x' takes \[n, 4\], and was given float32\[3\]"),
        ({"x": "text", "attention_mask": values(3, 4)}, "is no array of numbers"),
    ],
)
def test_batches_that_do_not_fit(batch: Any, told: str) -> None:
    with pytest.raises(CalibrationError, match=f"batch 2.*{told}"):
        binder(two_inputs())(batch, 2)


@pytest.mark.parametrize(
    ("loader", "told"),
    [
        ([], "gave no batch"),
        (values(24, 32), "one batch and not an iterable"),
        ([values(24, 32).astype(np.float64)], "takes float32"),
        ([values(1, 32)], "too few rows"),
    ],
)
def test_loaders_that_do_not_fit(source: Path, loader: Any, told: str) -> None:
    with pytest.raises(CalibrationError, match=told):
        onnx_compress(source, source.with_name("out.onnx"), loader)
    assert not source.with_name("out.onnx").exists()


def test_a_nan_is_told_with_its_batch_and_node(source: Path) -> None:
    nodes = [
        helper.make_node("Log", ["x"], ["logs"]),
        helper.make_node("MatMul", ["logs", "w"], ["y"], name="broken"),
    ]
    onnx.save_model(model_of(nodes, {"w": values(32, 24)}, {"x": ["n", 32]}), source)
    data = [np.abs(batch) + 1 for batch in batches()]
    data[2][1, 3] = -1
    with pytest.raises(CalibrationError, match=r"batch 2.*'?w.*MatMul node 'broken' reads it as 'logs'"):
        onnx_compress(source, source.with_name("out.onnx"), data, progress=False)


def test_files_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(StorageError, match=r"missing\.onnx could not be read: No such file"):
        onnx_compress(tmp_path / "missing.onnx", out, batches())
    for data in (b"not a model at all", b""):
        source.write_bytes(data)
        with pytest.raises(CaptureError, match=r"in\.onnx is not a"):
            onnx_compress(source, out, batches())
    onnx.save_model(mlp(), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    source.with_name("weights.bin").unlink()
    with pytest.raises(StorageError, match="a file with its tensors could not be read"):
        onnx_compress(source, out, batches())
    onnx.save_model(mlp(), source)
    with pytest.raises(StorageError, match="could not be written"):
        onnx_compress(source, tmp_path / "none" / "out.onnx", batches(), Keep(params=0.6), progress=False)
    model = mlp()
    node_of(model, "h2").op_type = "Unheard"
    node_of(model, "h2").domain = "my.own"
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    onnx.save_model(model, source)
    with pytest.raises(CaptureError, match="onnxruntime cannot load the model"):
        onnx_compress(source, out, batches(), progress=False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"target": Keep(params=0.5, regauge=True)}, TargetError, "not re-gauged"),
        ({"target": Keep(latency=0.5)}, TargetError, "no table of times"),
        ({"target": Metric(lambda model: 0.0, 0.5, of="latency")}, TargetError, "no table of times"),
        ({"target": 0.5}, TargetError, "not a target"),
        ({"forms": ["banana"]}, OptionError, "no form is called 'banana'"),
        ({"planner": "banana"}, OptionError, "banana"),
        ({"skip": "up"}, OptionError, "list or tuple"),
        ({"skip": ["banana"]}, OptionError, "matches no weight"),
        ({"holdout": 2.0}, OptionError, "holdout"),
        ({"sketch_memory": "much"}, OptionError, "not a size"),
        ({"target": Keep(params=0.001)}, TargetError, "cannot be reached"),
    ],
)
def test_options_that_do_not_fit(
    source: Path, options: Mapping[str, Any], error: type[LowRankError], told: str
) -> None:
    with pytest.raises(error, match=told):
        onnx_compress(source, source.with_name("out.onnx"), batches(), **{"progress": False, **options})


def test_a_file_that_does_not_do_what_was_planned_is_not_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "held_out_error", lambda program, batches: math.nan)
    with pytest.raises(LowRankError, match=r"has an error of .* nothing was written"):
        compressed(source)
    assert not source.with_name("out.onnx").exists()


def test_without_the_extra(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LowRankError, match=r"needs onnxruntime.*pip install lowrank_fx\[onnx\]"):
        compressed(source)
    # What is imported for asking has to do without.
    for file in (compress.__file__, onnx_frontend.__file__):
        assert not [name for name in imported(Path(file)) if name.startswith("onnx")]


def imported(file: Path) -> list[str]:
    """The packages that a module imports as soon as it is imported itself."""
    body = ast.parse(file.read_text("utf-8")).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    return names
