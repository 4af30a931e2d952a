"""ONNX operators in torch, for their derivatives; they follow the ONNX standard, from version 7 of its own domain on.

Each takes its inputs (None for one that is left out) and its attributes, to which ``opset`` and ``outputs``, the number
of outputs, are added. What it does not cover raises an error; what is read wrongly shows in the values
(``derivatives.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx.onnx_frontend.sites import patch_of

Inputs: TypeAlias = Sequence[Any]
Options: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[[Inputs, Options], Any]


def _one(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda inputs, options: function(inputs[0])


def _all(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(inputs: Inputs, options: Options) -> Tensor:
        made: Tensor = inputs[0]
        for other in inputs[1:]:
            made = function(made, other)
        return made

    return operator


def _listed(inputs: Inputs, options: Options, place: int, name: str) -> list[int] | None:
    """Whole numbers that are an input in new versions of an operator and an attribute in old ones."""
    if len(inputs) > place and inputs[place] is not None:
        return [int(number) for number in inputs[place].reshape(-1).tolist()]
    return list(options[name]) if name in options else None


def _gemm(inputs: Inputs, options: Options) -> Tensor:
    first = inputs[0].t() if options.get("transA", 0) else inputs[0]
    second = inputs[1].t() if options.get("transB", 0) else inputs[1]
    made: Tensor = options.get("alpha", 1.0) * (first @ second)
    return made + options.get("beta", 1.0) * inputs[2] if len(inputs) > 2 and inputs[2] is not None else made


def _conv(inputs: Inputs, options: Options) -> Tensor:
    weight: Tensor = inputs[1]
    patch = patch_of(dict(options), tuple(weight.shape[2:]))
    if patch is None:
        raise RuntimeError("its padding depends on its input")
    padded = F.pad(inputs[0], [amount for side in reversed(patch.padding) for amount in side])
    bias = inputs[2] if len(inputs) > 2 else None
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[len(patch.kernel) - 1]
    made: Tensor = function(
        padded, weight, bias, stride=patch.stride, dilation=patch.dilation, groups=options.get("group", 1)
    )
    return made


def _pool(inputs: Inputs, options: Options, *, largest: bool) -> Tensor:
    if options["outputs"] > 1 or options.get("ceil_mode", 0):
        raise RuntimeError("a pooling with indices or rounded up")
    kernel = tuple(options["kernel_shape"])
    patch = patch_of(dict(options), kernel)
    if patch is None or (max(patch.dilation) > 1 and not largest):
        raise RuntimeError("its padding depends on its input, or its window has holes")
    sides = [amount for side in reversed(patch.padding) for amount in side]
    which = len(kernel) - 1
    if largest:
        function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[which]
        made: Tensor = function(
            F.pad(inputs[0], sides, value=-math.inf), kernel, stride=patch.stride, dilation=patch.dilation
        )
        return made
    mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[which]
    made = mean(F.pad(inputs[0], sides), kernel, stride=patch.stride)
    if any(sides) and not options.get("count_include_pad", 0):
        made = made / mean(F.pad(torch.ones_like(inputs[0]), sides), kernel, stride=patch.stride)
    return made


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def operator(inputs: Inputs, options: Options) -> Tensor:
        axes = _listed(inputs, options, 1, "axes")
        if not axes:
            if options.get("noop_with_empty_axes", 0):
                made: Tensor = inputs[0]
                return made
            axes = list(range(inputs[0].dim()))
        return function(inputs[0], axes, bool(options.get("keepdims", 1)))

    return operator


def _softmax(function: Callable[..., Tensor]) -> Operator:
    def operator(inputs: Inputs, options: Options) -> Tensor:
        if options["opset"] >= 13:
            return function(inputs[0], options.get("axis", -1))
        axis = options.get("axis", 1) % max(inputs[0].dim(), 1)
        return function(inputs[0].flatten(axis), -1).view(inputs[0].shape)

    return operator


def _layer_norm(inputs: Inputs, options: Options) -> Tensor:
    if options["outputs"] > 1:
        raise RuntimeError("a normalisation that gives its statistics")
    axis = options.get("axis", -1) % inputs[0].dim()
    bias = inputs[2] if len(inputs) > 2 else None
    return F.layer_norm(inputs[0], inputs[0].shape[axis:], inputs[1], bias, options.get("epsilon", 1e-5))


def _batch_norm(inputs: Inputs, options: Options) -> Tensor:
    if options.get("training_mode", 0):
        raise RuntimeError("a batch norm that trains")
    value, scale, bias, mean, variance = inputs
    return F.batch_norm(value, mean, variance, scale, bias, False, 0.0, options.get("epsilon", 1e-5))


def _gelu(inputs: Inputs, options: Options) -> Tensor:
    return F.gelu(inputs[0], approximate=options.get("approximate", "none"))


def _clip(inputs: Inputs, options: Options) -> Tensor:
    bounds = [inputs[place] if len(inputs) > place else options.get(name) for place, name in ((1, "min"), (2, "max"))]
    low, high = (float(bound) if bound is not None else None for bound in bounds)
    return inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)


def _reshape(inputs: Inputs, options: Options) -> Tensor:
    shape = [int(size) for size in inputs[1].tolist()]
    if not options.get("allowzero", 0):
        shape = [inputs[0].shape[place] if size == 0 else size for place, size in enumerate(shape)]
    made: Tensor = inputs[0].reshape(shape)
    return made


def _flatten(inputs: Inputs, options: Options) -> Tensor:
    axis = options.get("axis", 1)
    axis = axis + inputs[0].dim() if axis < 0 else axis
    made: Tensor = inputs[0].reshape(math.prod(inputs[0].shape[:axis]), -1)
    return made


def _squeeze(inputs: Inputs, options: Options) -> Tensor:
    axes = _listed(inputs, options, 1, "axes")
    made: Tensor = inputs[0].squeeze() if axes is None else inputs[0].squeeze(tuple(axes))
    return made


def _unsqueeze(inputs: Inputs, options: Options) -> Tensor:
    axes = _listed(inputs, options, 1, "axes") or []
    made: Tensor = inputs[0]
    rank = made.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        made = made.unsqueeze(axis)
    return made


def _transpose(inputs: Inputs, options: Options) -> Tensor:
    made: Tensor = inputs[0].permute(*options.get("perm", range(inputs[0].dim() - 1, -1, -1)))
    return made


def _split(inputs: Inputs, options: Options) -> tuple[Tensor, ...]:
    axis = options.get("axis", 0)
    sizes = _listed(inputs, options, 1, "split")
    if sizes is None:
        sizes = [-(-inputs[0].shape[axis] // options["outputs"])] * options["outputs"]
        sizes[-1] = inputs[0].shape[axis] - sum(sizes[:-1])
    return tuple(torch.split(inputs[0], sizes, axis))


def _slice(inputs: Inputs, options: Options) -> Tensor:
    made: Tensor = inputs[0]
    starts, ends = _listed(inputs, options, 1, "starts") or [], _listed(inputs, options, 2, "ends") or []
    axes = _listed(inputs, options, 3, "axes") or list(range(len(starts)))
    steps = _listed(inputs, {}, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = (
            range(made.shape[axis])[start:end:step] if step > 0 else range(made.shape[axis])[start : _end(end) : step]
        )
        made = made.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return made


def _end(end: int) -> int | None:
    return None if end < -(1 << 30) else end  # how exporters write: to the very first


def _gather(inputs: Inputs, options: Options) -> Tensor:
    axis = options.get("axis", 0) % inputs[0].dim()
    index: Tensor = inputs[1].long() % inputs[0].shape[axis]
    made: Tensor = inputs[0].index_select(axis, index.reshape(-1))
    return made.reshape(*inputs[0].shape[:axis], *index.shape, *inputs[0].shape[axis + 1 :])


def _expand(inputs: Inputs, options: Options) -> Tensor:
    shape = np.broadcast_shapes(tuple(inputs[0].shape), tuple(int(size) for size in inputs[1].tolist()))
    made: Tensor = inputs[0].expand(shape)
    return made


def _concat(inputs: Inputs, options: Options) -> Tensor:
    return torch.cat(list(inputs), options["axis"])


def _pad(inputs: Inputs, options: Options) -> Tensor:
    if options.get("mode", "constant") != "constant" or len(inputs) > 3:
        raise RuntimeError("a padding by what is there, or of chosen axes")
    pads = _listed(inputs, options, 1, "pads") or []
    dims = len(pads) // 2
    sides = [amount for axis in reversed(range(dims)) for amount in (pads[axis], pads[axis + dims])]
    value = inputs[2] if len(inputs) > 2 and inputs[2] is not None else options.get("value", 0.0)
    return F.pad(inputs[0], sides, value=float(value))


def _global_mean(inputs: Inputs, options: Options) -> Tensor:
    made: Tensor = inputs[0].mean(tuple(range(2, inputs[0].dim())), keepdim=True)
    return made


OPERATORS: dict[str, Operator] = {
    "Add": _all(torch.add),
    "Sub": _all(torch.sub),
    "Mul": _all(torch.mul),
    "Div": _all(torch.div),
    "Pow": _all(torch.pow),
    "Min": _all(torch.minimum),
    "Max": _all(torch.maximum),
    "Sum": _all(torch.add),
    "MatMul": _all(torch.matmul),
    "Gemm": _gemm,
    "Conv": _conv,
    "Relu": _one(F.relu),
    "LeakyRelu": lambda inputs, options: F.leaky_relu(inputs[0], options.get("alpha", 0.01)),
    "Elu": lambda inputs, options: F.elu(inputs[0], options.get("alpha", 1.0)),
    "PRelu": lambda inputs, options: torch.where(inputs[0] < 0, inputs[0] * inputs[1], inputs[0]),
    "Sigmoid": _one(torch.sigmoid),
    "HardSigmoid": lambda inputs, options: torch.clamp(
        inputs[0] * options.get("alpha", 0.2) + options.get("beta", 0.5), 0, 1
    ),
    "HardSwish": _one(F.hardswish),
    "Softplus": _one(F.softplus),
    "Tanh": _one(torch.tanh),
    "Erf": _one(torch.erf),
    "Exp": _one(torch.exp),
    "Log": _one(torch.log),
    "Sqrt": _one(torch.sqrt),
    "Reciprocal": _one(torch.reciprocal),
    "Neg": _one(torch.neg),
    "Abs": _one(torch.abs),
    "Sin": _one(torch.sin),
    "Cos": _one(torch.cos),
    "Gelu": _gelu,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceL2": _reduce(lambda value, axes, keep: torch.linalg.vector_norm(value, dim=axes, keepdim=keep)),
    "MaxPool": lambda inputs, options: _pool(inputs, options, largest=True),
    "AveragePool": lambda inputs, options: _pool(inputs, options, largest=False),
    "GlobalAveragePool": _global_mean,
    "Clip": _clip,
    "Where": lambda inputs, options: torch.where(*inputs),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": _expand,
    "Concat": _concat,
    "Einsum": lambda inputs, options: torch.einsum(options["equation"], *inputs),
    "InstanceNormalization": lambda inputs, options: F.instance_norm(
        inputs[0], weight=inputs[1], bias=inputs[2], eps=options.get("epsilon", 1e-5)
    ),
    "Pad": _pad,
    "Identity": _one(lambda value: value),
    "Dropout": _one(lambda value: value),
    "Cast": _one(lambda value: value.float()),
}
