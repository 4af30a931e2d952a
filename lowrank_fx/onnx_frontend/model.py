"""An ONNX model in memory: its constants, who reads them, how it is read from a file and written to one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper, numpy_helper

from lowrank_fx._files import sync_file, sync_folder
from lowrank_fx.errors import CaptureError, LowRankError, StorageError

INLINE_BYTES = 2**31 - 2**26
"""Tensors of more bytes in all go into a file of their own: protobuf ends at 2 GiB, and the nodes need room."""

FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
}
"""The element types that are factored. NumPy, which feeds onnxruntime, has no bfloat16."""

DOMAINS = ("", "ai.onnx")
"""The names of the standard's own operators."""


@dataclass(frozen=True)
class OnnxModel:
    """A model and what is asked of it again and again; the message stays as it is.

    Attributes:
        proto: the model with all tensors in memory.
        external: names of the initializers that its file keeps outside of itself.
    """

    proto: ModelProto
    external: frozenset[str] = field(default=frozenset())

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.proto.graph

    @cached_property
    def nodes(self) -> list[NodeProto]:
        """The main graph's nodes, the same objects every time: those of a message live while someone holds them."""
        return list(self.graph.node)

    @cached_property
    def initializers(self) -> dict[str, TensorProto]:
        """The main graph's initializers by name."""
        return {tensor.name: tensor for tensor in self.graph.initializer}

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers, and the tensors of Constant nodes, by the name of the value."""
        made = dict(self.initializers)
        for node in self.nodes:
            tensor = constant_of(node)
            if tensor is not None:
                made[node.output[0]] = tensor
        return made

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """The main graph's nodes that read each value, in order; a node that reads it twice stands there once."""
        made: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                made.setdefault(name, []).append(node)
        return made

    @cached_property
    def read_inside(self) -> frozenset[str]:
        """Every value that is read in a branch, a loop or a scan of the main graph."""
        return frozenset(
            name
            for inner in self.inner_graphs
            for name in (*(name for node in inner.node for name in node.input), *(each.name for each in inner.output))
        )

    @cached_property
    def inner_graphs(self) -> list[GraphProto]:
        """The bodies of branches, loops and scans, those inside of others too."""
        return [inner for node in self.nodes for inner in _bodies(node)]

    @cached_property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [output.name for output in self.graph.output]

    @cached_property
    def inputs(self) -> dict[str, onnx.ValueInfoProto]:
        """The inputs that a caller has to give, by name."""
        return {each.name: each for each in self.graph.input if each.name not in self.initializers}

    @cached_property
    def replaceable(self) -> frozenset[str]:
        """Initializers that a caller may replace; before IR version 4 all of them were listed among the inputs."""
        if self.proto.ir_version < 4:
            return frozenset()
        return frozenset(each.name for each in self.graph.input if each.name in self.initializers)

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The main graph's node that gives each value."""
        return {name: node for node in self.nodes for name in node.output if name}

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a constant; may not be written to."""
        return numpy_helper.to_array(self.constants[name])

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a constant, a copy."""
        return torch.from_numpy(self.array(name).copy())

    def count_params(self) -> int:
        """Numbers in all floating constants, those of bodies of branches and loops included."""
        inner = (each for body in self.inner_graphs for each in body.initializer)
        tensors = (*self.constants.values(), *inner)
        return sum(size_of(tensor) for tensor in tensors if tensor.data_type in (*FLOATS, TensorProto.BFLOAT16))


def constant_of(node: NodeProto) -> TensorProto | None:
    """The tensor that a Constant node gives; None for other nodes, and for constants that are no dense tensors."""
    if node.op_type != "Constant" or node.domain not in DOMAINS:
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name, strings as text."""
    made = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in made.items()}


def size_of(tensor: TensorProto) -> int:
    """How many numbers a tensor holds."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def describe_node(node: NodeProto) -> str:
    """A node for a message: its operator, and its name or else that of its output."""
    return f"{node.op_type} node {node.name!r}" if node.name else f"{node.op_type} node of {node.output[0]!r}"


# ---- files -----------------------------------------------------------------------------------------------------------


def read_model(path: str | os.PathLike[str]) -> OnnxModel:
    """Read a file, with the files that hold its tensors.

    Raises:
        StorageError: the file, or one that it refers to, is missing or cannot be read.
        CaptureError: it is not a valid ONNX model.
    """
    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StorageError(f"{source} could not be read: {error.strerror or error}") from error
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, of a package without types
        raise CaptureError(f"{source} is not an ONNX model: {error}") from error
    outside = [each.name for each in proto.graph.initializer if external_data_helper.uses_external_data(each)]
    try:
        external_data_helper.load_external_data_for_model(proto, str(source.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise StorageError(f"{source}: a file with its tensors could not be read: {_first_line(error)}") from error
    try:
        onnx.checker.check_model(str(source))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CaptureError(f"{source} is not a valid ONNX model: {_first_line(error)}") from error
    return OnnxModel(proto, frozenset(outside))


@contextlib.contextmanager
def written(model: OnnxModel, path: str | os.PathLike[str], source: Path | None = None) -> Iterator[Path]:
    """Write a model beside ``path``, checked, and put it in its place when the body is done without an error.

    Initializers that the original kept outside of its file go into ``NAME.DIGEST.data`` beside the new one, and so do
    all large ones where the whole would not fit a protobuf message. A reader sees the old file or the new one.
    Such files of what stood at ``path`` before are deleted.

    Args:
        model: what is written.
        path: where it goes.
        source: an ONNX file that keeps the files that it refers to.

    Yields:
        Where the file is until then.

    Raises:
        StorageError: the folder cannot be written.
        LowRankError: what was made is not a valid ONNX model.
    """
    target = Path(path)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        folder.mkdir()
        try:
            made = ModelProto()
            made.CopyFrom(model.proto)
            _move_out(made, model.external, target.name)
            draft = folder / target.name
            onnx.save_model(made, str(draft))
            try:
                onnx.checker.check_model(str(draft))
            except onnx.checker.ValidationError as error:
                raise LowRankError(f"the model made for {target} is not valid ONNX: {_first_line(error)}") from error
            yield draft
            mode = stat.S_IMODE(draft.stat().st_mode)
            files = sorted(folder.iterdir(), key=lambda file: file.name == target.name)  # what refers comes last
            for file in files:
                file.chmod(mode)  # what onnx puts outside is for its owner alone
                sync_file(file)
            for file in files:
                os.replace(file, target.with_name(file.name))
            sync_folder(target.parent)
            drop_tensor_files(target, {file.name for file in files}, source)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{target} could not be written: {error.strerror or error}") from error


def drop_tensor_files(target: Path, kept: Collection[str] = (), source: Path | None = None) -> None:
    """Delete the files of tensors that :func:`written` put beside what stood at ``target`` before.

    Args:
        target: the ONNX file.
        kept: names of files that stay.
        source: an ONNX file that keeps the files that it refers to.
    """
    named = re.compile(re.escape(target.name) + r"\.[0-9a-f]{12}\.data")
    # The file is in its place: what cannot be deleted, or may still be needed, stays.
    with contextlib.suppress(OSError):
        old = [file for file in target.parent.iterdir() if named.fullmatch(file.name) and file.name not in kept]
        # Names stand in a message as they are, those in branches and attributes too.
        told = source.read_bytes() if old and source is not None else b""
        for file in old:
            if file.name.encode() not in told:
                file.unlink()


def serialized(model: ModelProto, folder: Callable[[], str]) -> bytes | str:
    """A model as bytes, or where those are too many, the path of a file of it.

    Args:
        model: with all tensors in memory; it stays as it is.
        folder: gives a folder to write to.
    """
    if _bytes_of(model) < INLINE_BYTES:
        data: bytes = model.SerializeToString()
        return data
    path = os.path.join(folder(), "model.onnx")
    copied = ModelProto()
    copied.CopyFrom(model)
    _move_out(copied, frozenset(), "model.onnx")
    onnx.save_model(copied, path)
    return path


def _move_out(proto: ModelProto, external: frozenset[str], name: str) -> None:
    """Mark tensors to be written to a file of their own, named by their content."""
    everything = _bytes_of(proto) >= INLINE_BYTES
    chosen = [each for each in proto.graph.initializer if each.name in external or (everything and size_of(each) > 256)]
    digest = hashlib.sha256()
    for tensor in chosen:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        digest.update(tensor.raw_data)
    for tensor in chosen:
        external_data_helper.set_external_data(tensor, f"{name}.{digest.hexdigest()[:12]}.data")


def _bytes_of(proto: ModelProto) -> int:
    return sum(len(each.raw_data) or 8 * size_of(each) for each in proto.graph.initializer)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        own = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
        for body in own:
            yield body
            for inner in body.node:
                yield from _bodies(inner)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
