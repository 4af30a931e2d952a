"""Weights in several files: divided, listed, and each of them checked."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import given
from safetensors.torch import load_file

import lowrank_fx
from lowrank_fx._files import sha256_file
from lowrank_fx._sizes import parse_size
from lowrank_fx.errors import OptionError, StorageError
from lowrank_fx.manifest import PLAN_FILE
from lowrank_fx.module import LowRankModule
from lowrank_fx.weight_files import check_weight_files, write_weight_files

GOLDEN = Path(__file__).parent / "golden" / "v2" / "tree"


@pytest.fixture(scope="module")
def fast() -> LowRankModule:
    return lowrank_fx.load(given(GOLDEN)[0], GOLDEN / "saved", compile=False)


@pytest.fixture
def saved(fast: LowRankModule, tmp_path: Path) -> Path:
    fast.save(tmp_path / "out", max_shard_size=700)
    return tmp_path / "out"


def listed(folder: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads((folder / PLAN_FILE).read_text())["weights"]["files"]
    return made


def load(folder: Path) -> LowRankModule:
    return lowrank_fx.load(given(GOLDEN)[0], folder, compile=False)


@pytest.mark.parametrize("limit", [1, 100, 384, 700, 10**6, "1KB", "5GB"])
def test_weights_are_divided_and_come_back(fast: LowRankModule, tmp_path: Path, limit: int | str) -> None:
    fast.save(tmp_path, max_shard_size=limit)
    files = listed(tmp_path)
    names = [entry["file"] for entry in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, PLAN_FILE])
    bound = parse_size("max_shard_size", limit, "5GB", whole=True)
    seen: list[str] = []
    for number, entry in enumerate(files, start=1):
        path = tmp_path / entry["file"]
        place = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        assert path.name == f"model-{sha256_file(path)[:16]}{place}.safetensors"
        assert (entry["sha256"], entry["bytes"]) == (sha256_file(path), path.stat().st_size)
        tensors = load_file(path)
        assert sorted(tensors) == sorted(entry["tensors"])
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        assert sum(sizes) <= bound or len(sizes) == 1
        seen += tensors
    assert (len(files) > 1) == (bound < 1200)
    assert len(set(seen)) == len(seen)
    again, inputs = load(tmp_path), given(GOLDEN)[1]
    with torch.no_grad():
        assert torch.equal(again(inputs), fast(inputs))


def test_other_shards_replace_those_before(fast: LowRankModule, saved: Path) -> None:
    assert len(listed(saved)) > 2
    users = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in users:
        (saved / name).write_bytes(b"mine")
    for limit, count in ((384, None), ("5GB", 1)):
        fast.save(saved, max_shard_size=limit)
        names = [entry["file"] for entry in listed(saved)]
        assert count is None or len(names) == count
        assert sorted(path.name for path in saved.iterdir()) == sorted([*names, *users, PLAN_FILE])


def test_every_file_is_checked(saved: Path) -> None:
    for entry in listed(saved):
        path = saved / entry["file"]
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StorageError, match=rf"{path.name}: the file is damaged: its checksum"):
            load(saved)
        path.write_bytes(whole + b"\0")
        with pytest.raises(StorageError, match=rf"it has {len(whole) + 1} bytes, plan\.json says {len(whole)}"):
            load(saved)
        path.unlink()
        with pytest.raises(StorageError, match=rf"{path.name}: the file that plan\.json names is missing"):
            load(saved)
        path.write_bytes(whole)
    load(saved)


def edited(folder: Path, change: Any) -> None:
    data = json.loads((folder / PLAN_FILE).read_text())
    change(data["weights"]["files"])
    (folder / PLAN_FILE).write_text(json.dumps(data))


def test_the_list_of_tensors_is_held(saved: Path) -> None:
    before = (saved / PLAN_FILE).read_text()
    name = listed(saved)[0]["tensors"][0]
    for change, told in (
        (lambda files: files[0]["tensors"].remove(name), f"{name!r} is not among those that plan.json lists"),
        (lambda files: files[0]["tensors"].append("spare"), "'spare' is missing in the file"),
        (lambda files: files.append(files[0]), "weights.files names no file, or one twice"),
        (lambda files: files.pop(), "'captured:first.bias' is missing in the file"),
        (lambda files: files.pop(0), "is missing in the file"),
        (lambda files: files[0].update(file="../" + files[0]["file"]), "is not a plain file name"),
        (lambda files: files[0].update(bytes=-1), r"weights.files\[0\].bytes is -1"),
    ):
        edited(saved, change)
        with pytest.raises(StorageError, match=told):
            load(saved)
        (saved / PLAN_FILE).write_text(before)


def test_a_tensor_in_two_files_is_refused(saved: Path) -> None:
    first, second = (saved / listed(saved)[place]["file"] for place in (0, 1))
    second.write_bytes(first.read_bytes())
    edited(saved, lambda files: files[1].update({key: files[0][key] for key in ("sha256", "bytes", "tensors")}))
    with pytest.raises(StorageError, match="is in two files"):
        load(saved)


def test_far_more_bytes_than_the_model_has_are_not_even_read(saved: Path) -> None:
    path = saved / listed(saved)[0]["file"]
    os.truncate(path, 2**40)  # a file with a hole: it takes no room, and an hour to hash
    edited(saved, lambda files: files[0].update(bytes=2**40))
    with pytest.raises(StorageError, match="far more than this model can need"):
        load(saved)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_what_is_no_file_is_not_waited_for(saved: Path) -> None:
    path = saved / listed(saved)[0]["file"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="is missing"):
        load(saved)
    (saved / PLAN_FILE).unlink()
    os.mkfifo(saved / PLAN_FILE)
    with pytest.raises(StorageError, match=r"plan\.json could not be read: it is no file"):
        load(saved)


@pytest.mark.parametrize(
    ("size", "number"),
    [(7, 7), ("7B", 7), ("5GB", 5 * 10**9), ("2 MB", 2 * 10**6), ("3KiB", 3072), ("1TiB", 2**40), (" 1GiB ", 2**30)],
)
def test_sizes(size: int | str, number: int) -> None:
    assert parse_size("max_shard_size", size, "5GB", whole=True) == number


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "", "5", "GB", "-1GB", "0GB", "5 XB", "1.5GB", "9" * 40])
def test_what_is_no_size_is_refused(fast: LowRankModule, tmp_path: Path, size: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"max_shard_size={size!r} is not a size")):
        fast.save(tmp_path / "none", max_shard_size=size)
    assert not (tmp_path / "none").exists()


def test_a_model_without_tensors_has_a_file(tmp_path: Path) -> None:
    files = write_weight_files(tmp_path, {}, 100)
    assert [entry.tensors for entry in files] == [()]
    assert check_weight_files(tmp_path, files, 1000) == {}
