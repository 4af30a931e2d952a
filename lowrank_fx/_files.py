"""Files that are written whole or not at all, and the checksums that name their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import torch

from lowrank_fx.errors import StorageError

_LARGEST_JSON = 64 * 2**20

_DEEPEST_JSON = 100

_LONGEST_INTEGER = 100
"""Digits; no such number overflows where it is made a float."""


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader, or a crash, sees the old content or the new one, never a part.

    The bytes go to a temporary file in the same folder, reach the disk, and replace ``path`` in one step.

    Raises:
        StorageError: the file could not be written; ``path`` is then as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        # Created with the user's umask: tempfile's private 0600 would stay on the file after the replacement.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"{target} could not be written: {error.strerror or error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        StorageError: the file could not be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{os.fspath(path)} could not be read: {error.strerror or error}") from error


def sha256_tensor(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and values, as 64 hexadecimal digits.

    Strides and device do not count: a view and its contiguous copy have the same checksum.

    Args:
        tensor: a strided tensor of any dtype and device that holds data.

    Raises:
        StorageError: the tensor holds no plain data (meta, sparse, quantized).
    """
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise StorageError(
            f"no checksum of a tensor of {tensor.dtype}{list(tensor.shape)} ({tensor.layout}, {tensor.device}): "
            "only strided tensors that hold data have one"
        )
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file of at most 64 MiB; see :func:`parse_json`.

    Raises:
        StorageError: the file is missing, unreadable, too large, not UTF-8 or not JSON; the message has the path and
            the cause.
    """
    target = Path(path)
    try:
        # A pipe, or a device, may never end.
        if not stat.S_ISREG(target.stat().st_mode):
            raise OSError("it is no file")
        with target.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise StorageError(f"{target} could not be read: {error.strerror or error}") from error
    if len(data) > _LARGEST_JSON:
        raise StorageError(f"{target} is larger than {_LARGEST_JSON // 2**20} MiB, so it is not a file of lowrank_fx")
    try:
        return parse_json(data)
    except ValueError as error:
        raise StorageError(f"{target} is not valid JSON: {error}") from error


def parse_json(data: str | bytes) -> Any:
    """JSON data of bounded depth and integers of bounded length; no name stands twice in an object.

    Raises:
        ValueError: it is something else.
    """
    try:
        made = json.loads(data, parse_int=_integer, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEEPEST_JSON} deep") from error
    level = [made]
    for _ in range(_DEEPEST_JSON):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return made
    raise ValueError(f"it is nested more than {_DEEPEST_JSON} deep")


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:60]!r} stands twice in one object")
    return made


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    # Elsewhere than on POSIX a folder cannot be opened, and replacing a file is durable on its own.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
