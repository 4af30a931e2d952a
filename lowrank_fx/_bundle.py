"""A JSON file and the tensors that it speaks of, together in a folder. Never pickle.

The tensors are written first, into a safetensors file whose name contains its hash; the JSON file is replaced last,
atomically. A writer that is killed leaves the old or the new content readable, never a mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_fx._files import read_json, sha256_file, write_atomic
from lowrank_fx.errors import LowRankError, StorageError
from lowrank_fx.weight_files import read_header

T = TypeVar("T")


def write_bundle(
    folder: str | os.PathLike[str], name: str, version: int, data: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``<name>.json`` and its tensors into ``folder``, which is made if it does not exist.

    Args:
        folder: where; what an earlier call wrote there under this name is replaced.
        name: of the JSON file, and of the kind of its content.
        version: of the content's format.
        data: JSON data.
        tensors: strided tensors on any device; no two of them share memory.

    Raises:
        StorageError: the folder cannot be written, or a tensor is of a dtype that safetensors does not know.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # What a killed writer left behind, too.
        old = {*root.glob(f"{name}-{'[0-9a-f]' * 16}.safetensors"), *root.glob(f".{name}*.tmp")}
        path, checksum = _write_tensors(root, name, tensors)
        header = {"kind": name, "format": version, "tensors": {"file": path.name, "sha256": checksum}}
        write_atomic(root / f"{name}.json", (json.dumps({**header, **data}, indent=1) + "\n").encode())
        for stale in old - {path}:
            stale.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{root}: the {name} could not be saved: {error}") from error


def read_bundle(
    folder: str | os.PathLike[str], name: str, version: int, read: Callable[[dict[str, Any], dict[str, Tensor]], T]
) -> T:
    """Read back what :func:`write_bundle` wrote.

    Args:
        folder: where.
        name: as it was given then.
        version: the format that is understood.
        read: makes something of the data and the tensors; what it raises for malformed ones becomes a StorageError.

    Raises:
        StorageError: a file is missing, damaged, of another kind or of another version; the message has its path.
    """
    path = Path(folder) / f"{name}.json"
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != name:
        raise StorageError(f"{path}: this is not a {name} of lowrank_fx")
    if data.get("format") != version:
        raise StorageError(f"{path}: format {version} is expected, the file says {data.get('format')!r}")
    try:
        file, checksum = data["tensors"]["file"], data["tensors"]["sha256"]
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{file!r} is not a plain file name")
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path}: damaged: {error!r}") from error
    stored = path.with_name(file)
    if not stored.is_file():
        raise StorageError(f"{stored}: the file that {path.name} names is missing")
    if sha256_file(stored) != checksum:
        raise StorageError(f"{stored}: the file is damaged: its checksum is not the one in {path.name}")
    try:
        read_header(stored)
        tensors = load_file(stored)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{stored}: not a safetensors file: {error}") from error
    try:
        return read(data, tensors)
    except LowRankError as error:
        raise StorageError(f"{path}: damaged: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise StorageError(f"{path}: damaged: {error!r}") from error


def pack(value: Any, tensors: dict[str, Tensor], what: str) -> Any:
    """Nested lists, tuples, dictionaries, scalars and tensors as JSON data.

    Args:
        value: what is packed.
        tensors: takes in the tensors, each under a new name.
        what: what is packed, in words, for the message.

    Raises:
        StorageError: something else occurs.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            raise StorageError(
                f"{what} holds a {value.layout} {value.dtype} tensor, which cannot be stored as plain data"
            )
        # Channels-last data stays channels-last: kernels differ in the last bit.
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        key = f"value.{len(tensors)}"
        tensors[key] = value.permute(order)
        return {"tensor": [key, order]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [pack(item, tensors, what) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: pack(item, tensors, what) for key, item in value.items()}}
    raise StorageError(
        f"{what} holds a {type(value).__name__}, which cannot be stored without pickle; lists, tuples, dictionaries "
        "with text keys, numbers, text and tensors can (forward_args= chooses what a batch passes)"
    )


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`pack` was given; tensors are copies.

    Raises:
        ValueError: the data is not what :func:`pack` makes (or another error of malformed data).
    """
    ((kind, value),) = data.items()
    if kind == "tensor":
        key, order = value
        inverse = [order.index(axis) for axis in range(len(order))]
        # A copy, because results may depend on how the memory is aligned, and in the file it is not.
        return tensors[key].clone().permute(inverse)
    if kind == "value" and (value is None or isinstance(value, bool | int | float | str)):
        return value
    if kind == "dict":
        return {str(key): unpack(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown kind {kind!r}")


def _write_tensors(root: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[Path, str]:
    """Write tensors to a file that is named by its checksum; both are returned."""
    temporary = root / f".{name}-{os.getpid()}.tmp"
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        save_file(plain, temporary, metadata={"format": "pt"})
        checksum = sha256_file(temporary)
        final = root / f"{name}-{checksum[:16]}.safetensors"
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    return final, checksum
