"""ONNX models made by hand, for the tests of the ONNX way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

Array = np.ndarray[Any, Any]


def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Normal numbers, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def model_of(
    nodes: Iterable[NodeProto],
    constants: Mapping[str, Array],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str] = ("y",),
    *,
    opset: int = 17,
    ir: int = 9,
    element: int = TensorProto.FLOAT,
) -> ModelProto:
    """A model of some nodes."""
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    listed = [helper.make_tensor_value_info(name, element, list(shape)) for name, shape in inputs.items()]
    if ir < 4:
        listed += [helper.make_tensor_value_info(each.name, each.data_type, list(each.dims)) for each in initializers]
    graph = helper.make_graph(
        list(nodes),
        "handmade",
        listed,
        [helper.make_tensor_value_info(name, element, None) for name in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    # Outputs of a valid model have shapes.
    inferred = shape_inference.infer_shapes(model)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return model


def mlp(seed: int = 0, *, width: int = 48) -> ModelProto:
    """Two MatMuls with Adds and a Gemm, with a layer norm's worth of other nodes between them."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["h0"], name="up"),
        helper.make_node("Add", ["h0", "up.bias"], ["h1"], name="up_bias"),
        helper.make_node("Relu", ["h1"], ["h2"], name="relu", doc_string="stays"),
        helper.make_node("MatMul", ["h2", "down.weight"], ["h3"], name="down"),
        helper.make_node("Add", ["down.bias", "h3"], ["h4"], name="down_bias"),
        helper.make_node("Add", ["h4", "x"], ["h5"], name="residual"),
        helper.make_node("Gemm", ["h5", "head.weight", "head.bias"], ["y"], name="head", transB=1),
    ]
    constants = {
        "up.weight": values(32, width, seed=seed + 1, scale=0.2),
        "up.bias": values(width, seed=seed + 2),
        "down.weight": values(width, 32, seed=seed + 3, scale=0.2),
        "down.bias": values(1, 32, seed=seed + 4),
        "head.weight": values(20, 32, seed=seed + 5, scale=0.2),
        "head.bias": values(20, seed=seed + 6),
    }
    return model_of(nodes, constants, {"x": ["rows", 32]})


def batches(count: int = 6, rows: int = 24, width: int = 32) -> list[Array]:
    """Rows with a falling spectrum about a mean that is not zero."""
    mix = values(width, width, seed=99) * np.logspace(0, -2, width, dtype=np.float32)
    return [values(rows, width, seed=100 + number) @ mix.T + 0.5 for number in range(count)]


def computed(model: ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    """The outputs of a model in onnxruntime, as it comes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def node_of(model: ModelProto, output: str) -> NodeProto:
    """The node that gives a value."""
    nodes: list[NodeProto] = list(model.graph.node)
    return next(node for node in nodes if output in node.output)
