"""Binding a batch of the user's loader to the inputs of an ONNX model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from lowrank_fx._describe import describe, is_mapping
from lowrank_fx.batches import Call, bind_batch
from lowrank_fx.errors import CalibrationError, CallError
from lowrank_fx.onnx_frontend.model import OnnxModel

MASK = "attention_mask"
"""What tells padding, ``[B, T]``, among the inputs or beside them."""

_ANY_NAMES = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_KEYWORD)])


def binder(model: OnnxModel) -> Callable[[Any, int], Call]:
    """A function from a batch and its index to a call of ``model``, as :func:`~lowrank_fx.batches.bound_calls` takes.

    A mapping gives inputs by name, and names that the model does not have are dropped; a tuple or list gives them in
    their order, and is cut to their number; anything else is the one input. Arrays become tensors.
    """

    def bind(batch: Any, index: int) -> Call:
        taken = _by_name(model, batch, index)
        given = {name: tensor for name, tensor in taken.items() if name in model.inputs}
        for name, tensor in given.items():
            complaint = _mismatch(model.inputs[name], tensor)
            if complaint is not None:
                raise CalibrationError(f"batch {index}: {complaint}")
        # Names of inputs are any text, which no signature of Python holds, so all of them come as keyword arguments.
        call = bind_batch(taken, _ANY_NAMES, None, index)
        return replace(call, kwargs=given)

    return bind


def named(model: OnnxModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of a call, by name.

    Raises:
        CallError: there are too many, too few or others than the model takes.
    """
    names = list(model.inputs)
    made = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) > len(names) or made.keys() != set(names) or len(made) != len(args) + len(kwargs):
        given = [*(f"input {place}" for place in range(len(args))), *kwargs]
        raise CallError(f"the model takes {_listed(model)}, and was given {', '.join(given) or 'nothing'}")
    tensors = {name: _as_tensor(value) for name, value in made.items()}
    for name, tensor in tensors.items():
        complaint = _mismatch(model.inputs[name], tensor)
        if complaint is not None:
            raise CallError(complaint)
    return {name: tensors[name] for name in names}


def _by_name(model: OnnxModel, batch: Any, index: int) -> dict[str, Tensor]:
    names = list(model.inputs)
    if is_mapping(batch):
        missing = [name for name in names if name not in batch.keys()]  # noqa: SIM118 (not every mapping iterates)
        if missing:
            raise CalibrationError(
                f"batch {index} is {describe(batch)} and has no {missing[0]!r}; the model takes {_listed(model)}"
            )
        found = {name: batch[name] for name in (*names, MASK) if name in batch.keys()}  # noqa: SIM118
    elif isinstance(batch, tuple | list):
        if len(batch) < len(names):
            raise CalibrationError(
                f"batch {index} is {describe(batch)}, which are {len(batch)} inputs; the model takes {_listed(model)}"
            )
        found = dict(zip(names, batch, strict=False))
    elif len(names) == 1:
        found = {names[0]: batch}
    else:
        raise CalibrationError(
            f"batch {index} is {describe(batch)}, which is one input; the model takes {_listed(model)}: yield a "
            "dictionary by name, or a tuple in that order"
        )
    try:
        return {name: _as_tensor(value) for name, value in found.items()}
    except CallError as error:
        raise CalibrationError(f"batch {index} is {describe(batch)}: {error}") from error


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        # A copy: tensors of arrays that may not be written to are not safe.
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise CallError(f"{describe(value)} is no array of numbers ({error}); give NumPy arrays or tensors") from error


def _mismatch(info: ValueInfoProto, tensor: Tensor) -> str | None:
    """What is wrong with a tensor for an input, in words; None where nothing is."""
    own = info.type.tensor_type
    has = str(tensor.dtype).removeprefix("torch.")
    if own.elem_type != TensorProto.UNDEFINED:
        wants = helper.tensor_dtype_to_np_dtype(own.elem_type).name
        if has != wants:
            return f"input {info.name!r} takes {wants}, and was given {describe(tensor)}; convert it to {wants}"
    if own.HasField("shape"):
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in own.shape.dim]
        # Fewer rows than a fixed batch are filled up.
        fits = len(dims) == tensor.dim() and all(
            wanted is None or size == wanted or (place == 0 and 0 < size < wanted)
            for place, (wanted, size) in enumerate(zip(dims, tensor.shape, strict=False))
        )
        if not fits:
            told = f"input {info.name!r} takes {_shape(info)}, and was given {describe(tensor)}"
            return told + _too_many_rows(dims, tensor)
    return None


def _too_many_rows(dims: list[int | None], tensor: Tensor) -> str:
    """The remedy where nothing but the number of rows is too large; nothing where that is not so."""
    rows = dims[0] if len(dims) == tensor.dim() > 1 else None
    rest = zip(dims[1:], tensor.shape[1:], strict=False)
    if not rows or tensor.shape[0] < rows or not all(wanted is None or size == wanted for wanted, size in rest):
        return ""
    return f"; the file fixes its batch: give batches of at most {rows} row{'' if rows == 1 else 's'}"


def _shape(info: ValueInfoProto) -> str:
    dims = info.type.tensor_type.shape.dim
    return f"[{', '.join(str(dim.dim_value) if dim.HasField('dim_value') else dim.dim_param or '?' for dim in dims)}]"


def _listed(model: OnnxModel) -> str:
    return ", ".join(f"{name!r} {_shape(info)}" for name, info in model.inputs.items()) or "no input"
