"""Files that are written whole or not at all, and the checksums that name their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from lowrank_fx.errors import StorageError

_LARGEST_JSON = 256 * 2**20


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
        _sync_folder(target.parent)
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
    """The content of a JSON file of at most 256 MiB.

    Raises:
        StorageError: the file is missing, unreadable, too large, not UTF-8 or not JSON; the message has the path and
            the cause.
    """
    target = Path(path)
    try:
        with target.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise StorageError(f"{target} could not be read: {error.strerror or error}") from error
    if len(data) > _LARGEST_JSON:
        raise StorageError(f"{target} is larger than {_LARGEST_JSON // 2**20} MiB, so it is not a file of lowrank_fx")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{target} is not valid JSON: {error}") from error


def _sync_folder(folder: Path) -> None:
    # Elsewhere than on POSIX a folder cannot be opened, and replacing a file is durable on its own.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
