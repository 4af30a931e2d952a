"""Running an ONNX model in onnxruntime, with some of its constants replaced and some of its inner values watched.

An initializer that is an input too can be given at run time (since IR version 4), so one session serves every trial of
other weights; onnxruntime then neither folds nor packs them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, ValueInfoProto, helper
from torch import Tensor

from lowrank_fx.errors import CaptureError
from lowrank_fx.onnx_frontend.model import OnnxModel, constant_of, serialized

MIN_IR = 4
"""The first version in which an initializer may be an input or not."""

REPEATED = 1e-2
"""How far, relative to the largest number, rows that were filled up may be from those that they repeat."""


class Filled(NamedTuple):
    """How many rows were given, and to how many of them the batch was filled up."""

    given: int
    fixed: int


class Runner:
    """A session of a model.

    It runs on the CPU, on as many threads as torch takes.

    Args:
        model: the model.
        replaceable: constants that may be given at run time.
        watched: values that can be asked for besides the outputs; inputs may be among them.

    Raises:
        CaptureError: onnxruntime refuses the model.
    """

    def __init__(self, model: OnnxModel, replaceable: Sequence[str] = (), watched: Sequence[str] = ()) -> None:
        self.model = model
        made = model.proto
        if replaceable or watched:
            made = ModelProto()
            made.CopyFrom(model.proto)
            _open(made, model, replaceable)
            shown = {*model.outputs, *model.inputs}
            made.graph.output.extend(ValueInfoProto(name=name) for name in watched if name not in shown)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of every initializer that is an input
        options.intra_op_num_threads = torch.get_num_threads()
        # Between its runs torch works; threads that wait in a loop would take its time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            source = serialized(made, lambda: folder)
            try:
                self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own classes have no common base
                line = str(error).strip().splitlines()[0]
                raise CaptureError(f"onnxruntime cannot load the model: {type(error).__name__}: {line}") from error

    def run(self, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Run the model; the inputs stay as they are.

        Where the model fixes the number of rows and an input has fewer, its rows are repeated to fill them up, and
        outputs are cut to the rows that were given.

        Args:
            inputs: by name.
            values: of replaceable constants, by name.

        Returns:
            The outputs by name, as tensors where they are tensors of numbers.
        """
        outputs, _, rows = self.run_filled(inputs, values)
        return {name: cut_output(value, rows) for name, value in outputs.items()}

    def run_filled(
        self, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None, watched: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, Any], Filled | None]:
        """Run the model as :meth:`run` does, and cut nothing.

        Args:
            inputs: by name.
            values: of replaceable constants, by name.
            watched: values that are wanted besides the outputs.

        Returns:
            The outputs and the watched values, by name, as tensors where they are tensors of numbers, and how the rows
            were filled up; None where they were not.
        """
        feeds, rows = self._filled(inputs)
        feeds.update((name, _array(tensor)) for name, tensor in (values or {}).items())
        computed = [name for name in watched if name not in self.model.inputs]
        names = list(dict.fromkeys((*self.model.outputs, *computed)))
        found = dict(zip(names, map(_tensor, self.session.run(names, feeds)), strict=True))
        outputs = {name: found[name] for name in self.model.outputs}
        own = {name: torch.from_numpy(feeds[name].copy()) for name in watched if name in self.model.inputs}
        return outputs, {name: own[name] if name in own else found[name] for name in watched}, rows

    def bound(self, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs as the session itself takes them."""
        return self._filled(inputs)[0]

    def _filled(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray[Any, Any]], Filled | None]:
        feeds = {name: _array(tensor) for name, tensor in inputs.items()}
        rows: Filled | None = None
        for name, array in feeds.items():
            dims = self.model.inputs[name].type.tensor_type.shape.dim
            fixed = dims[0].dim_value if len(dims) else 0
            if array.ndim and 0 < array.shape[0] < fixed:
                rows = Filled(array.shape[0], fixed)
                feeds[name] = array[np.arange(fixed) % array.shape[0]]
        return feeds, rows


def cut_output(value: Any, rows: Filled | None) -> Any:
    """What a model returned, without the rows that filled up the batch."""
    if rows is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] != rows.fixed:
        return value
    return value[: rows.given]


def cut_activation(value: Tensor, rows: Filled | None, groups: int = 1) -> Tensor:
    """What a layer reads, without the rows that filled up the batch.

    Its first dimension may have more in it than the batch, such as the tokens ``[B * T]``. Any dimension may be a
    multiple of the batch by chance, so such rows are dropped only where they repeat those that were given.

    Args:
        value: the activation, ``[groups, n, d]`` or ``[..., groups, n, d]`` where there are groups.
        rows: how the batch was filled up.
        groups: of the tap.
    """
    if rows is None or not value.dim() or value.shape[0] % rows.fixed or (groups > 1 and value.dim() == 3):
        return value
    each = value.shape[0] // rows.fixed
    if each > 1:
        samples = value.reshape(rows.fixed, -1)
        repeated = samples[torch.arange(rows.given, rows.fixed, device="cpu") % rows.given]
        distance = (samples[rows.given :].double() - repeated.double()).abs()
        if not bool((distance <= REPEATED * repeated.double().abs().max()).all()):
            return value
    return value[: rows.given * each]


def _open(made: ModelProto, model: OnnxModel, names: Sequence[str]) -> None:
    """Make constants replaceable: initializers that are inputs too."""
    made.ir_version = max(made.ir_version, MIN_IR)
    wanted = set(names)
    listed = {each.name for each in made.graph.input}
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for node in nodes:
        tensor = constant_of(node) if node.output and node.output[0] in wanted else None
        if tensor is None:
            made.graph.node.append(node)
        else:
            made.graph.initializer.append(tensor)
            made.graph.initializer[-1].name = node.output[0]
    for name in dict.fromkeys(names):
        tensor = model.constants[name]
        if name not in listed:
            made.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _tensor(value: Any) -> Any:
    """An array of numbers as a tensor; text, sequences and maps as they are."""
    if isinstance(value, np.ndarray) and value.dtype != object and value.dtype.kind in "biufc":
        return torch.from_numpy(value)
    return [_tensor(item) for item in value] if isinstance(value, list) else value
