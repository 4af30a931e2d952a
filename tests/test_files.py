from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch

from lowrank_fx import _files
from lowrank_fx._files import read_json, sha256_file, sha256_tensor, write_atomic
from lowrank_fx.errors import StorageError


def test_write_then_replace(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, b"first")
    write_atomic(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_failed_write_keeps_the_old_content_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=r"plan\.json could not be written: No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_interrupted_write_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "plan.json", b"new")
    assert os.listdir(tmp_path) == []


def test_data_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "data")
        real_fsync(descriptor)

    def replace(source: str, target: str) -> None:
        steps.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "plan.json", b"x")
    assert steps == (["data", "replace", "folder"] if os.name == "posix" else ["data", "replace"])


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_mode_follows_the_umask(tmp_path: Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"")
    write_atomic(atomic, b"")
    assert stat.S_IMODE(atomic.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing.plan\.json could not be written: No such file"):
        write_atomic(tmp_path / "missing" / "plan.json", b"")


def test_file_checksum(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(StorageError, match="other could not be read"):
        sha256_file(tmp_path / "other")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ],
)
def test_tensor_checksum_sees_every_value(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    other = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)
    assert sha256_tensor(tensor) == sha256_tensor(tensor.clone())
    assert sha256_tensor(tensor) != sha256_tensor(other)


def test_tensor_checksum_sees_dtype_and_shape() -> None:
    zeros = torch.zeros(4, dtype=torch.int32)
    different = [zeros, zeros.float(), zeros.reshape(2, 2), zeros[:2], zeros[0], zeros[:0], torch.zeros(0, 3)]
    assert len({sha256_tensor(tensor) for tensor in different}) == len(different)


def test_tensor_checksum_ignores_strides_and_gradients() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert sha256_tensor(tensor.t()) == sha256_tensor(tensor.t().contiguous())
    assert sha256_tensor(tensor[:, ::2]) == sha256_tensor(tensor[:, ::2].clone())
    assert sha256_tensor(torch.nn.Parameter(tensor)) == sha256_tensor(tensor)
    complex_tensor = torch.tensor([1 + 2j])
    assert sha256_tensor(complex_tensor.conj()) == sha256_tensor(torch.tensor([1 - 2j]))


def test_tensor_checksum_is_the_documented_one() -> None:
    tensor = torch.tensor([1.0, 2.0])
    expected = hashlib.sha256(b"torch.float32[2]" + tensor.numpy().tobytes()).hexdigest()
    assert sha256_tensor(tensor) == expected


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensor_without_plain_data_has_no_checksum(tensor: torch.Tensor) -> None:
    with pytest.raises(StorageError, match="no checksum"):
        sha256_tensor(tensor)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, '{"sites": ["é"], "rank": 8}'.encode())
    assert read_json(path) == {"sites": ["é"], "rank": 8}


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 200_000])
def test_damaged_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"plan\.json is not valid JSON: "):
        read_json(path)


def test_missing_and_oversized_json_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"plan\.json could not be read: No such file"):
        read_json(tmp_path / "plan.json")
    with pytest.raises(StorageError, match="could not be read"):
        read_json(tmp_path)
    monkeypatch.setattr(_files, "_LARGEST_JSON", 2**20)
    (tmp_path / "big.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(StorageError, match=r"big\.json is larger than 1 MiB"):
        read_json(tmp_path / "big.json")
