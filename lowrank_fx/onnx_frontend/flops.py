"""FLOPs of an ONNX model (2 x MACs): the matrix products, convolutions and attentions of its main graph.

The shapes are those of a real run: the output of a Shape node stands for each value, so that no value itself is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto, ValueInfoProto, helper
from torch import Tensor

from lowrank_fx.onnx_frontend.model import DOMAINS, OnnxModel, attributes_of
from lowrank_fx.onnx_frontend.runtime import Runner

_COUNTED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
_MARK = "lowrank_fx.shape."


def count_flops(model: OnnxModel, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one run, counted as torch's flop counter does.

    Args:
        model: the model.
        inputs: by name.
    """
    counted = [node for node in model.graph.node if node.op_type in _COUNTED and node.domain in DOMAINS]
    values = dict.fromkeys(name for node in counted for name in (*node.input[:3], node.output[0]) if name)
    made = ModelProto()
    made.CopyFrom(model.proto)
    del made.graph.output[:]
    for name in values:
        made.graph.node.append(helper.make_node("Shape", [name], [_MARK + name]))
        made.graph.output.append(ValueInfoProto(name=_MARK + name))
    if not values:
        return 0
    # Nothing is cut: a list of sizes may be as long as a fixed batch.
    outputs, _, _ = Runner(OnnxModel(made)).run_filled(inputs)
    shapes = {name: [int(size) for size in outputs[_MARK + name]] for name in values}
    return sum(_flops(node, [shapes[name] for name in (*node.input[:3], node.output[0]) if name]) for node in counted)


def _flops(node: NodeProto, shapes: Sequence[Sequence[int]]) -> int:
    first, second, output = shapes[0], shapes[1], shapes[-1]
    if node.op_type == "Conv":
        return 2 * math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(first) * math.prod(second[1:])
    if node.op_type == "Attention":  # query, key; rank 3 or 4, heads in either
        return 2 * second[-2] * (math.prod(first) + math.prod(output))
    return 2 * math.prod(output) * first[0 if attributes_of(node).get("transA", 0) else -1]
