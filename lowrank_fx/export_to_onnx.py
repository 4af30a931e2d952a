"""EXPORT: an exported program as an ONNX file with readable names, and what onnxruntime computes with it."""

from __future__ import annotations

import hashlib
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lowrank_fx.errors import ExportError
from lowrank_fx.export_program import first_line
from lowrank_fx.refusal import quiet
from lowrank_fx.sites import Site

EXTERNAL_BYTES = 2**31 - 2**24
"""Weights of more bytes do not fit into the file itself: protobuf ends at 2 GiB, and the nodes need room."""

PLAN_KEY = "lowrank_fx.plan"
"""The plan's key in the file's metadata."""

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Einsum", "ConvTranspose", "MatMulInteger"})

# What may lie between a weight and the node that multiplies by it.
_VIEWS = frozenset({"Transpose", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Expand", "Split"})

_SYMBOL = re.compile(r"\b[su]\d+\b")


def package(name: str) -> Any:
    """A package of the extra ``onnx``.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"ONNX files need the package {name!r}: pip install 'lowrank_fx[onnx]'") from error


def require_packages() -> None:
    """Make sure that everything is installed before work begins.

    Raises:
        ExportError: a package is not installed.
    """
    for name in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
        package(name)


def converted(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int | None) -> Any:
    """An exported program as ``onnx_ir.Model``, optimized by onnxscript.

    Raises:
        ExportError: torch or onnxscript cannot convert it, or not to this opset.
    """
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # an operator without a translation, and whatever else the exporter may raise
        cause = error.__cause__ or error
        raise ExportError(f"torch.onnx.export cannot convert the model: {first_line(cause)}") from error
    assert made is not None
    model: Any = made.model
    have = model.opset_imports.get("")
    if opset is not None and have != opset:
        raise ExportError(f"opset={opset}: the model can only be written in opset {have}; leave opset out")
    return model


# ---- what is changed in the model ------------------------------------------------------------------------------------


def tidy(model: Any, dimensions: Mapping[str, str], module: nn.Module, metadata: Mapping[str, str]) -> None:
    """Readable names, every weight once, and no trace of the machine that the model was made on.

    Args:
        model: an ``onnx_ir.Model``; changed in place.
        dimensions: names of the dimensions that may change, by torch's symbol.
        module: the module that was exported; its tensors give weights their names.
        metadata: what the file says about itself.
    """
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    ir = package("onnx_ir")
    ends = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in values:
        value.metadata_props.clear()
        if ends.get(value.name, value) is not value:
            value.name = f"{value.name}_inner"  # an output may be called what the exporter calls another value
        if value.shape is not None and not all(isinstance(size, int) for size in value.shape):
            value.shape = ir.Shape([_renamed(size, dimensions) for size in value.shape])
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    _restore_weights(model, module)


def _renamed(size: Any, dimensions: Mapping[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    return _SYMBOL.sub(lambda match: dimensions.get(match.group(), match.group()), str(size.value))


def _restore_weights(model: Any, module: nn.Module) -> None:
    """Give weights that the optimizer transposed their names back, ``layer.weight.T``, and have none of them twice.

    A head that is tied to an embedding is read once as it is and once transposed; the optimizer writes both.
    """
    ir, graph = package("onnx_ir"), model.graph
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    unnamed = [value for name, value in graph.initializers.items() if name not in tensors and len(value.shape) > 1]
    wanted = {tuple(value.shape) for value in unnamed}
    # Layers that were copied from one another have equal weights: as many initializers as names.
    known: dict[str, list[tuple[str, bool]]] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tuple(tensor.shape[::-1]) in wanted:
            known.setdefault(_checksum(tensor.t()), []).append((name, True))
        if tuple(tensor.shape) in wanted:
            known.setdefault(_checksum(tensor), []).append((name, False))
    for value in unnamed:
        names = known.get(_tensor_checksum(value.const_value), [])
        names = [(name, turned) for name, turned in names if _named(name, turned) not in graph.initializers]
        if not names:
            continue
        name, turned = min(names, key=lambda each: each[0] in graph.initializers)
        own = _named(name, turned)
        original = graph.initializers.get(name)
        if original is not None and turned:
            node = ir.node("Transpose", [original], {"perm": [1, 0]}, name=f"{name}.turn")
            graph.insert_before(graph[0], node)
            node.outputs[0].name, node.outputs[0].shape = own, value.shape
            node.outputs[0].dtype = value.dtype
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            del graph.initializers[value.name]
        elif original is not None:
            ir.convenience.replace_all_uses_with(value, original)
            del graph.initializers[value.name]
        else:
            del graph.initializers[value.name]
            value.name = own
            value.const_value.name = own
            graph.register_initializer(value)


def _named(name: str, turned: bool) -> str:
    return f"{name}.T" if turned else name


def _checksum(tensor: Tensor) -> str:
    plain = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(f"{list(tensor.shape)}".encode() + plain.view(torch.uint8).numpy().tobytes()).hexdigest()


def _tensor_checksum(tensor: Any) -> str:
    return hashlib.sha256(f"{list(tensor.shape)}".encode() + tensor.tobytes()).hexdigest()


# ---- the file --------------------------------------------------------------------------------------------------------


def write(model: Any, path: Path, external_data: bool | str) -> None:
    """Write a model, and check that it is one.

    Args:
        model: an ``onnx_ir.Model``.
        path: where.
        external_data: whether weights go to a file of their own, ``path.name + ".data"``; ``"auto"``: where they do not
            fit into one.

    Raises:
        ExportError: they do not fit and may not be apart, or ``onnx.checker`` refuses the file.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external_data is False and size > EXTERNAL_BYTES:
        raise ExportError(
            f"external_data=False: the weights are {size / 2**30:.1f} GiB, and an ONNX file holds less than 2; leave "
            "external_data at 'auto'"
        )
    apart = size > EXTERNAL_BYTES if external_data == "auto" else bool(external_data)
    package("onnx_ir").save(model, path, external_data=f"{path.name}.data" if apart else None)
    checker = package("onnx").checker
    try:
        checker.check_model(str(path), full_check=size <= EXTERNAL_BYTES)
    except Exception as error:  # its own classes, which differ between its parts
        raise ExportError(f"onnx.checker refuses the file that was written: {first_line(error)}") from error


def read(path: Path) -> Any:
    """A file as ``onnx_ir.Model``; weights in a file of their own are not read."""
    return package("onnx_ir").load(path)


def count_products(
    model: Any, sites: Iterable[Site], module: nn.Module, folded: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """How many nodes multiply by each weight of a site: ``(1, 1)`` for a pair that is applied once.

    The optimizer keeps one of several equal weights, as untrained copies of a layer have; their nodes count together.

    Args:
        model: an ``onnx_ir.Model`` as it was read from a file.
        sites: the factored sites.
        module: what was exported.
        folded: names of those that are dense again.

    Raises:
        ExportError: a weight is missing, or no node or more nodes multiply by it than the model applies the site.
    """
    have = dict(module.named_parameters(remove_duplicate=False))
    weights = {site: _weights(site, have, is_pair=site.name not in folded) for site in sites}
    keys = {name: _checksum(have[name]) for names in weights.values() for name in names}
    equal: dict[str, list[str]] = {}
    calls: Counter[str] = Counter()
    for site, names in weights.items():
        for name in names:
            equal.setdefault(keys[name], []).append(name)
            calls[keys[name]] += len(site.calls)
    made: dict[str, tuple[int, ...]] = {}
    for site, names in weights.items():
        counts = tuple(_products_with(model, equal[keys[name]]) for name in names)
        if any(not 1 <= count <= calls[keys[name]] for count, name in zip(counts, names, strict=True)):
            raise ExportError(
                f"{site.name} is applied {len(site.calls)} times, but the file multiplies {counts} times by "
                f"{', '.join(names)}: the ONNX optimizer has changed it"
            )
        if counts:
            made[site.name] = tuple(min(count, len(site.calls)) for count in counts)
    return made


def _weights(site: Site, have: Mapping[str, Tensor], *, is_pair: bool) -> list[str]:
    """The names of the weights that a site's nodes multiply by."""
    leaves = [site.attribute(leaf) for leaf in ("factor_in", "factor_mid", "factor_out")]
    names = [name for name in (leaves if is_pair else [site.weight]) if name in have]
    # A re-gauged factor is applied in parts, which are constants of their own.
    is_cut = is_pair and site.kind == "linear" and names and have[names[0]].shape[1] < site.in_features
    return names[1:] if is_cut else names


def _products_with(model: Any, names: Iterable[str]) -> int:
    initializers = model.graph.initializers
    every = [own for name in names for own in (name, _named(name, True))]
    waiting = [initializers[own] for own in every if own in initializers]
    seen, found = set(), set()
    while waiting:
        for node, place in waiting.pop().uses():
            if node.op_type in _PRODUCTS and place < 2:
                found.add(id(node))
            elif node.op_type in _VIEWS and id(node) not in seen:
                seen.add(id(node))
                waiting += node.outputs
    return len(found)


# ---- running it ------------------------------------------------------------------------------------------------------


def run(path: Path, inputs: Sequence[str], calls: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
    """What onnxruntime computes on the CPU.

    Args:
        path: the file.
        inputs: names of the inputs.
        calls: their values, a list per run.
        dtype: the model's, for messages.

    Raises:
        ExportError: the runtime does not take the model, or fails on it.
    """
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it warns of is its own affair; what it refuses it raises
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [
            [
                torch.from_numpy(value)
                for value in session.run(
                    None, {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
                )
            ]
            for tensors in calls
        ]
    except Exception as error:  # its classes have no base of their own
        advice = ""
        if dtype is not torch.float32:
            advice = (
                f"; its kernels for the CPU do not all take {str(dtype).removeprefix('torch.')}: optimize the model in "
                "float32 (model.float()), or write it with export_pt2"
            )
        raise ExportError(
            f"onnxruntime {runtime.__version__} does not run the file on a CPU: {first_line(error)}{advice}"
        ) from error
