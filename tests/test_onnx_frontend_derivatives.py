"""Derivatives of ONNX models: every operator against onnxruntime, gradients against PyTorch's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import batches, mlp, model_of, values

from lowrank_fx import Keep, onnx_compress
from lowrank_fx.batches import Call
from lowrank_fx.onnx_frontend.derivatives import Derivatives
from lowrank_fx.onnx_frontend.model import OnnxModel
from lowrank_fx.onnx_frontend.program import OnnxProgram
from lowrank_fx.onnx_frontend.runtime import Runner

# Sums of a few hundred float32 terms at most, and onnxruntime's own approximations of erf and tanh.
CLOSE = 1e-5


def ints(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


# Operator, the other inputs, attributes, opset; the first input is [2, 6, 8, 8] unless a shape is given.
CASES: list[tuple[str, Sequence[Any], dict[str, Any], int]] = [
    ("Add", [values(8)], {}, 17),
    ("Sub", [values(8, 8)], {}, 17),
    ("Mul", [values(8)], {}, 17),
    ("Div", [np.abs(values(8)) + 1], {}, 17),
    ("Pow", [np.float32(2)], {}, 17),
    ("Max", [values(8), np.float32(0)], {}, 17),
    ("Min", [values(8)], {}, 17),
    ("Sum", [values(8), values(8, seed=2)], {}, 17),
    ("MatMul", [values(8, 5)], {}, 17),
    ("Conv", [values(4, 3, 3, 3), values(4)], {"group": 2, "pads": [1, 0, 1, 2], "strides": [2, 1]}, 17),
    ("Conv", [values(4, 6, 3, 3)], {"auto_pad": "SAME_UPPER"}, 17),
    ("Relu", [], {}, 17),
    ("LeakyRelu", [], {"alpha": 0.2}, 17),
    ("Elu", [], {"alpha": 0.7}, 17),
    ("PRelu", [values(6, 1, 1)], {}, 17),
    ("Sigmoid", [], {}, 17),
    ("HardSigmoid", [], {"alpha": 0.3}, 17),
    ("HardSwish", [], {}, 17),
    ("Softplus", [], {}, 17),
    ("Tanh", [], {}, 17),
    ("Erf", [], {}, 17),
    ("Exp", [], {}, 17),
    ("Neg", [], {}, 17),
    ("Abs", [], {}, 17),
    ("Sin", [], {}, 17),
    ("Cos", [], {}, 17),
    ("Gelu", [], {"approximate": "tanh"}, 20),
    ("Gelu", [], {}, 20),
    ("Softmax", [], {"axis": 1}, 17),
    ("Softmax", [], {"axis": 2}, 11),
    ("LogSoftmax", [], {}, 17),
    ("LayerNormalization", [values(8, 8), values(8, 8)], {"axis": 2, "epsilon": 1e-3}, 17),
    ("BatchNormalization", [values(6), values(6), values(6), np.abs(values(6)) + 1], {}, 17),
    ("ReduceMean", [], {"axes": [1, 3], "keepdims": 0}, 17),
    ("ReduceMean", [], {}, 17),
    ("ReduceMean", [ints(-1)], {}, 18),
    ("ReduceSum", [ints(2)], {"keepdims": 0}, 17),
    ("ReduceSum", [], {"noop_with_empty_axes": 1}, 17),
    ("ReduceMax", [], {"axes": [3]}, 17),
    ("ReduceMin", [], {"axes": [3]}, 17),
    ("ReduceL2", [], {"axes": [3]}, 17),
    ("MaxPool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, 17),
    ("AveragePool", [], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 2]}, 17),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 17),
    ("GlobalAveragePool", [], {}, 17),
    ("Clip", [np.float32(-0.5), np.float32(0.5)], {}, 17),
    ("Clip", [], {"max": 0.3}, 7),
    ("Reshape", [ints(0, -1, 16)], {}, 17),
    ("Flatten", [], {"axis": -2}, 17),
    ("Squeeze", [], {}, 17),
    ("Unsqueeze", [ints(1, -1)], {}, 17),
    ("Unsqueeze", [], {"axes": [0]}, 11),
    ("Transpose", [], {"perm": [2, 0, 3, 1]}, 17),
    ("Transpose", [], {}, 17),
    ("Split", [ints(2, 4)], {"axis": 1}, 17),
    ("Split", [], {"axis": 1, "split": [2, 4]}, 11),
    ("Slice", [ints(1, -1), ints(100, -(2**62)), ints(1, 3), ints(2, -3)], {}, 17),
    ("Slice", [], {"starts": [1], "ends": [-1], "axes": [2]}, 9),
    ("Gather", [np.array([[0, -1], [2, 2]])], {"axis": 1}, 17),
    ("Gather", [np.array(3)], {"axis": -1}, 17),
    ("Expand", [ints(3, 1, 1, 1, 1)], {}, 17),
    ("Einsum", [values(8, 5)], {"equation": "nchw,wk->nckh"}, 17),
    ("InstanceNormalization", [values(6), values(6)], {"epsilon": 1e-3}, 17),
    ("Pad", [ints(0, 1, 0, 2, 0, 0, 3, 1), np.array(0.5, np.float32)], {}, 17),
    ("Pad", [], {"pads": [0, 0, 1, 1, 0, 0, 0, 2]}, 10),
    ("Identity", [], {}, 17),
    ("Dropout", [], {}, 17),
    ("Cast", [], {"to": TensorProto.FLOAT}, 17),
]


@pytest.mark.parametrize(("operator", "others", "attributes", "opset"), CASES, ids=[case[0] for case in CASES])
def test_every_operator(operator: str, others: Sequence[Any], attributes: dict[str, Any], opset: int) -> None:
    count = 2 if operator == "Split" else 1
    names = [f"y{place}" for place in range(count)]
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["start"]),
        helper.make_node(operator, ["start", *(f"c{place}" for place in range(len(others)))], names, **attributes),
    ]
    constants = {"one": np.float32(1), **{f"c{place}": array for place, array in enumerate(others)}}
    model = OnnxModel(model_of(nodes, constants, {"x": [2, 6, 8, 8]}, names, opset=opset, ir=8))
    x = torch.from_numpy(values(2, 6, 8, 8, seed=4))
    behind = Derivatives(model, ["start"])
    assert behind.missing == ()
    outputs, known, _ = Runner(model, watched=behind.watched).run_filled({"x": x}, watched=behind.watched)
    with torch.enable_grad():
        found, starts = behind.evaluate(known, outputs)
    assert set(found) == set(names)
    for name in names:
        assert found[name].shape == outputs[name].shape
        torch.testing.assert_close(found[name].detach(), outputs[name].float(), rtol=CLOSE, atol=CLOSE)
        assert found[name].requires_grad
    (gradient,) = torch.autograd.grad(sum(value.sum() for value in found.values()), [starts["start"]])
    assert bool(gradient.isfinite().all())


def test_what_depends_on_the_data_keeps_its_value() -> None:
    """Shapes, comparisons and indices come from onnxruntime."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Shape", ["h"], ["shape"]),
        helper.make_node("Reshape", ["h", "shape"], ["r"]),
        helper.make_node("Greater", ["r", "zero"], ["positive"]),
        helper.make_node("Where", ["positive", "r", "zero"], ["kept"]),
        helper.make_node("Concat", ["kept", "h"], ["y"], axis=1),
    ]
    model = model_of(nodes, {"w": values(32, 24), "zero": np.array(0, np.float32)}, {"x": ["n", 32]})
    program = OnnxProgram(OnnxModel(model))
    assert program.without_derivative(program.find_sites().sites) == ()
    x = torch.from_numpy(batches(1)[0])
    with torch.enable_grad():
        (output,), found = program.probed(["h"])(Call((), {"x": x}))
        (gradient,) = torch.autograd.grad(output.sum(), [found["h"]])
    torch.testing.assert_close(gradient, 1 + (found["h"].detach() > 0).float())


def test_gradients_are_those_of_the_model() -> None:
    """The hand-made model of three layers, written in PyTorch in float64."""
    model = OnnxModel(mlp())
    constant = {name: model.tensor(name).double() for name in model.constants}
    x = torch.from_numpy(batches(1)[0])
    with torch.enable_grad():
        h0 = (x.double() @ constant["up.weight"]).requires_grad_()
        h3 = torch.relu(h0 + constant["up.bias"]) @ constant["down.weight"]
        expected = (h3 + constant["down.bias"] + x) @ constant["head.weight"].T + constant["head.bias"]
        wanted = torch.autograd.grad(expected.square().sum(), [h0, h3])
        (output,), found = OnnxProgram(model).probed(["h0", "h3"])(Call((), {"x": x}))
        got = torch.autograd.grad(output.square().sum(), [found["h0"], found["h3"]])
    for own, reference in zip(got, wanted, strict=True):
        # Entries are sums of 20 and 48 products of numbers that float32 keeps to 6e-8.
        torch.testing.assert_close(own.double(), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_an_operator_without_a_derivative_is_told(tmp_path: Path) -> None:
    model = mlp()
    model.graph.node[2].op_type = "Softsign"
    with open(tmp_path / "in.onnx", "wb") as file:
        file.write(model.SerializeToString())
    program = OnnxProgram(OnnxModel(model))
    table = program.find_sites()
    assert program.without_derivative(table.sites) == ("Softsign",)
    assert program.without_derivative(table.sites[1:]) == ()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no derivative of Softsign"):
        program.probed(["h0"])(Call((), {"x": torch.from_numpy(batches(1)[0])}))
    made = onnx_compress(tmp_path / "in.onnx", tmp_path / "out.onnx", batches(), Keep(params=0.7), progress=False)
    assert any("of Softsign there is no derivative here" in note for note in made.plan.notes)
    assert {site.basis for site in made.plan.factored} == {"activation"}


def test_outputs_that_are_read_wrongly_give_no_derivative() -> None:
    model = OnnxModel(mlp())
    behind = Derivatives(model, ["h0"])
    outputs, known, _ = Runner(model, watched=behind.watched).run_filled(
        {"x": torch.from_numpy(batches(1)[0])}, watched=behind.watched
    )
    behind.evaluate(known, outputs)
    with pytest.raises(RuntimeError, match="'y' is not that of onnxruntime"):
        behind.evaluate(known, {"y": outputs["y"] * 1.5})
