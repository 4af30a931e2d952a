"""Tensors in safetensors files that are named by their content, written whole and read with distrust. Never pickle.

More than one file's worth is divided as in Hugging Face's checkpoints: ``model-<hash>-00001-of-00003.safetensors``.
What the files hold is written down beside them (:class:`WeightFile`), so that each is checked before any of it is used:
its size, its checksum, and every number of its header against its size.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_fx._files import parse_json, sha256_file, sync_file, sync_folder
from lowrank_fx.errors import StorageError

_HASH = "[0-9a-f]" * 16

WEIGHTS_PATTERNS = (f"model-{_HASH}.safetensors", f"model-{_HASH}-?????-of-?????.safetensors")
"""Names of our own weight files; a sharded checkpoint's ``model-00001-of-00002.safetensors`` is the user's."""

TEMPORARY_PATTERNS = (".model-*.tmp", ".plan.json.*.tmp", ".tmp??????")
"""Names of what a save that was killed may leave behind; safetensors gives a file that it is writing the last one."""

NAME = re.compile(r"model-[0-9a-f]{16}(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
"""What a file may be called that is read."""

MAX_SHARD_SIZE = "5GB"

_LARGEST_HEADER = 100 * 10**6
"""As the safetensors library."""

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class WeightFile:
    """A file of tensors, as it was written.

    Attributes:
        file: its name.
        sha256: checksum of its bytes.
        bytes: its size; None where that was not written down (format 1).
        tensors: names of the tensors in it; None where they were not written down (format 1).
    """

    file: str
    sha256: str
    bytes: int | None
    tensors: tuple[str, ...] | None


@dataclass(frozen=True)
class Stored:
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write_weight_files(root: Path, tensors: Mapping[str, Tensor], max_shard_size: int) -> tuple[WeightFile, ...]:
    """Write tensors to files; when this returns they and their names are on the disk.

    Args:
        root: the folder.
        tensors: on any device, strided.
        max_shard_size: bytes of tensors in one file at most; a larger tensor has a file of its own.

    Raises:
        OSError: the folder cannot be written.
        SafetensorError: likewise, or a tensor is of a dtype that the format does not know.
    """
    shards = _shards(tensors, max_shard_size)
    written = []
    for number, names in enumerate(shards, start=1):
        temporary = root / f".model-{os.getpid()}.tmp"
        place = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        try:
            # One shard at a time, so that a model on a device needs room for no more than that.
            plain = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in names}
            save_file(plain, temporary, metadata={"format": "pt"})
            sync_file(temporary)
            checksum = sha256_file(temporary)
            final = root / f"model-{checksum[:16]}{place}.safetensors"
            written.append(WeightFile(final.name, checksum, temporary.stat().st_size, tuple(names)))
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(root)
    return tuple(written)


def check_weight_files(root: Path, files: Sequence[WeightFile], largest: int) -> dict[str, Stored]:
    """Check everything about some files but the values in them; the tensors they hold, by name.

    Args:
        root: the folder.
        files: as they were written.
        largest: bytes that they may have together; checksums of more are not computed.

    Raises:
        StorageError: a file is missing, damaged, too large, or no safetensors file.
    """
    found: dict[str, Stored] = {}
    for entry in files:
        path = root / entry.file
        if not path.is_file():
            raise StorageError(f"{path}: the file that plan.json names is missing")
        with _told(path):
            size = path.stat().st_size
            largest -= size
            if entry.bytes not in (None, size):
                raise StorageError(f"{path}: the file is damaged: it has {size} bytes, plan.json says {entry.bytes}")
            if largest < 0:
                raise StorageError(f"{path}: the file has {size} bytes, far more than this model can need")
            if sha256_file(path) != entry.sha256:
                raise StorageError(f"{path}: the file is damaged: its checksum is not the one in plan.json")
            header = read_header(path)
        if entry.tensors is not None and set(entry.tensors) != header.keys():
            odd = sorted(set(entry.tensors) ^ header.keys())[0]
            where = "missing in the file" if odd in entry.tensors else "not among those that plan.json lists"
            raise StorageError(f"{path}: tensor {odd[:200]!r} is {where}")
        twice = sorted(header.keys() & found.keys())
        if twice:
            raise StorageError(f"{path}: tensor {twice[0][:200]!r} is in two files")
        found |= header
    return found


def load_weight_files(root: Path, files: Sequence[WeightFile]) -> dict[str, Tensor]:
    """The tensors in files that :func:`check_weight_files` found to be whole.

    Raises:
        StorageError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for entry in files:
        with _told(root / entry.file):
            tensors |= load_file(root / entry.file)
    return tensors


def read_header(path: Path) -> dict[str, Stored]:
    """Names, shapes and dtypes in a safetensors file; every number is checked against the file's size.

    The file has the header's length (8 bytes, little-endian), the header (JSON), and the tensors without gaps.

    Raises:
        StorageError: it is no safetensors file; the message says what is wrong.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes does not fit a file of {size}")
            header = parse_json(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        spans = [(*_span(name, entry), name) for name, entry in header.items()]
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise ValueError(f"{name[:200]!r} starts at {start}, what lies before it ends at {end}")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"its tensors have {end} bytes, the file {size - 8 - length}")
    except ValueError as error:
        raise StorageError(f"{path}: not a safetensors file: {error}") from error
    return {name: Stored(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in header.items()}


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor lies."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:200]!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name[:200]!r} is of the dtype {dtype!r:.60}, which is not known")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise ValueError(f"{name[:200]!r} has a shape or offsets that are no numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{name[:200]!r} has {offsets[1] - offsets[0]} bytes, which its shape {shape!r:.60} has not")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names of tensors in their order, as many together as the limit allows; one empty list for no tensor."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: not a safetensors file: {error}") from error
