"""Hostile folders: whatever stands in ``plan.json`` and the weight files, the answer is a model or a LowRankError."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import batches, given, original
from torch import nn

import lowrank_fx
from lowrank_fx import storage
from lowrank_fx._files import parse_json
from lowrank_fx.errors import LowRankError
from lowrank_fx.manifest import PLAN_FILE, read_manifest
from lowrank_fx.plan import Plan
from lowrank_fx.weight_files import check_weight_files, load_weight_files, read_header

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("linear", "regauged", "tree", "conv", "tucker", "folded", "sharded")

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**99),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("inf"), float("nan"), "", "x", "\x00", "\ud800", "é" * 300),
    *("../x", "/dev/zero", "model-0000000000000000.safetensors", "load", "dense", "lowrank", "tucker2", "float32"),
    *([], {}, [[]], [None], {"": {}}, {"tensor": ["float32", [2**40]]}, {"tensor": ["load", [2]]}, {"value": 1}),
    *([2**40], [2**20, 2**20], [0, 2**62], ["a"] * 50, {"tuple": [{"list": []}, {"dict": {}}]}),
)
"""What a mutated place may become."""

SCRAPS = (b"[" * 3000, b"{" * 3000, b'{"a":' * 1200, b"9" * 5000, b"1e999", b"NaN", b"\xff\xfe", b"\x00" * 9, b'"' * 3)
"""What mutated bytes may gain."""


def choose(rng: random.Random, data: Any) -> tuple[Any, Any]:
    """A random container in a JSON value, and a key of it."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = rng.choice(keys)
        inner = data[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            return data, key
        data = inner


def mutated(rng: random.Random, data: Any) -> Any:
    """JSON data with one to three of its places changed."""
    made = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        owner, key = choose(rng, made)
        act = rng.randrange(8)
        if act < 4:
            owner[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif act == 4 and len(owner) > 1:
            del owner[key]
        elif act == 5 and isinstance(owner, dict):
            owner[rng.choice(("unknown", "", "tensor", "x" * 5000))] = copy.deepcopy(rng.choice(HOSTILE))
        elif act == 6:
            other, place = choose(rng, made)
            owner[key] = copy.deepcopy(other[place])
        elif isinstance(owner[key], int | float):
            owner[key] = owner[key] + rng.choice((-1, 1, 8, -owner[key], 10**6))
        elif isinstance(owner, list):
            owner.extend(owner[:1] * rng.choice((1, 40)))
    return made


def scrambled(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes anywhere."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(made) + 1)
        act = rng.randrange(6)
        if act == 0 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif act == 1:
            made[place : place + rng.choice((1, 2, 8, 400))] = b""
        elif act == 2:
            made[place:place] = rng.choice(SCRAPS)
        elif act == 3:
            start = rng.randrange(len(made) + 1)
            made[place:place] = made[start : start + rng.choice((1, 16, 300))]
        elif act == 4:
            made[place : place + 1] = bytes([rng.randrange(256)])
        else:
            made = made[: max(place, 1)]
    return bytes(made)


def hostile_weights(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another length, header or body."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    act = rng.randrange(5)
    if act == 0:
        size = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", size) + header + body
    if act == 1:
        made = json.dumps(mutated(rng, json.loads(header))).encode()
        return struct.pack("<Q", len(made)) + made + body
    if act == 2:
        made = scrambled(rng, header)
        return struct.pack("<Q", len(made)) + made + body
    return data[:8] + header + scrambled(rng, body) if act == 3 else scrambled(rng, data)


def vouched(folder: Path) -> None:
    """Let ``plan.json`` say of its files what they are now."""
    data = json.loads((folder / PLAN_FILE).read_text())
    for entry in data["weights"]["files"]:
        content = (folder / entry["file"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        try:
            (length,) = struct.unpack("<Q", content[:8])
            entry["tensors"] = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
        except (ValueError, TypeError, struct.error, RecursionError):
            pass
    (folder / PLAN_FILE).write_text(json.dumps(data))


def survives(call: Callable[[], object], seed: int) -> bool:
    """Whether it gave something; anything but a LowRankError fails the test, with the case that reproduces it."""
    try:
        call()
    except LowRankError:
        return False
    except BaseException as error:
        pytest.fail(f"case {seed}: {type(error).__name__}: {error!s:.300}")
    return True


def plans(cases: range) -> int:
    """Mutated plans through ``Plan.from_json``; how many were read."""
    texts = {kind: (GOLDEN / "v2" / kind / "saved" / PLAN_FILE).read_text() for kind in KINDS}
    bodies = {kind: json.loads(text)["plan"] for kind, text in texts.items()}
    read = 0
    for seed in cases:
        rng = random.Random(seed)
        body = bodies[rng.choice(KINDS)]
        if rng.random() < 0.7:
            text = json.dumps(mutated(rng, body))
        else:
            text = scrambled(rng, json.dumps(body).encode()).decode("utf-8", "replace")
        read += survives(lambda text=text: Plan.from_json(text).to_json(), seed)  # type: ignore[misc]
    return read


def folders(cases: range, root: Path) -> int:
    """Mutated folders through what ``load`` checks before it looks at the model; how many were whole."""
    whole = 0
    for seed in cases:
        rng = random.Random(seed)
        source = GOLDEN / rng.choice(("v1", "v2", "v2")) / rng.choice(KINDS[:-1]) / "saved"
        _hostile_copy(rng, source, root)
        whole += survives(lambda: _files_checked(root), seed)
        shutil.rmtree(root)
    return whole


def loads(cases: range, root: Path) -> int:
    """Mutated folders through ``load`` itself; how many were loaded and run."""
    kind = "tree"  # which is taken without an export, so a case takes milliseconds
    model, inputs, _ = given(GOLDEN / "v2" / kind)
    loaded = 0
    for seed in cases:
        rng = random.Random(seed)
        _hostile_copy(rng, GOLDEN / rng.choice(("v1", "v2", "v2")) / kind / "saved", root)
        strict = rng.random() < 0.5
        loaded += survives(lambda strict=strict: _run(model, inputs, root, strict), seed)  # type: ignore[misc]
        shutil.rmtree(root)
    return loaded


def calls(cases: range, root: Path) -> int:
    """Folders whose example call was mutated, through ``load``, which captures the model with it."""
    model, inputs, _ = given(GOLDEN / "v2" / "linear")
    loaded = 0
    for seed in cases:
        rng = random.Random(seed)
        shutil.copytree(GOLDEN / "v2" / "linear" / "saved", root)
        data = json.loads((root / PLAN_FILE).read_text())
        data["call"] = mutated(rng, data["call"])
        (root / PLAN_FILE).write_text(json.dumps(data))
        loaded += survives(lambda: _run(model, inputs, root, True), seed)
        shutil.rmtree(root)
    return loaded


def _hostile_copy(rng: random.Random, source: Path, root: Path) -> None:
    shutil.copytree(source, root)
    plan, act = root / PLAN_FILE, rng.randrange(4)
    if act == 0:
        plan.write_bytes(scrambled(rng, plan.read_bytes()))
    elif act == 1:
        plan.write_text(json.dumps(mutated(rng, json.loads(plan.read_text()))))
    else:
        weights = rng.choice(sorted(root.glob("*.safetensors")))
        weights.write_bytes(hostile_weights(rng, weights.read_bytes()))
        if act == 2 and source.parent.parent.name == "v2":
            vouched(root)


def _files_checked(root: Path) -> None:
    manifest = read_manifest(root)
    check_weight_files(root, manifest.files, 2**30)
    load_weight_files(root, manifest.files)


def _run(model: nn.Module, inputs: torch.Tensor, root: Path, strict: bool) -> None:
    artifact = storage.load(model, root, strict=strict)
    with torch.no_grad():
        artifact.program.module(inputs)


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_thousand_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    before = peak()
    read, whole, loaded = plans(range(700)), folders(range(200), tmp_path / "a"), loads(range(150), tmp_path / "b")
    # Some mutations leave a legal file: the fuzzer is not refused at the door.
    assert 20 < read < 350
    assert 5 < whole < 150
    assert 2 < loaded < 100
    assert peak() - before < 400 * 2**20


@pytest.mark.slow
def test_ten_thousand_hostile_files_are_refused_or_read(tmp_path: Path) -> None:
    before = peak()
    plans(range(1_000, 6_000))
    folders(range(10_000, 13_000), tmp_path / "a")
    loads(range(20_000, 21_960), tmp_path / "b")
    calls(range(30_000, 30_040), tmp_path / "c")
    assert peak() - before < 400 * 2**20


def test_hostile_calibrations_are_refused_or_read(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "hostile"
    lowrank_fx.calibrate(original("tree"), batches("tree"), capture="modules", progress=False).save(source)
    read = 0
    for seed in range(200):
        rng = random.Random(seed)
        shutil.copytree(source, root)
        path = root / "calibration.json"
        data = json.loads(path.read_text())
        act = rng.randrange(3)
        if act == 0:
            path.write_bytes(scrambled(rng, path.read_bytes()))
        elif act == 1:
            path.write_text(json.dumps(mutated(rng, data)))
        else:
            content = hostile_weights(rng, (root / data["tensors"]["file"]).read_bytes())
            (root / data["tensors"]["file"]).write_bytes(content)
            data["tensors"]["sha256"] = hashlib.sha256(content).hexdigest()
            path.write_text(json.dumps(data))
        read += survives(lambda: lowrank_fx.Calibration.load(root), seed)
        shutil.rmtree(root)
    assert 5 < read < 100


# ---- cases by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 101 + "]" * 101,
        "[" * 100_000,
        "9" * 101,
        "9" * 5000,
        "-" + "9" * 101,
        '{"a":' * 50_000,
        b"\xff",
        "",
    ],
)
def test_json_that_is_ambiguous_or_without_bounds_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_json_within_the_bounds_is_read() -> None:
    deep = "[" * 100 + "]" * 100
    assert json.dumps(parse_json(deep)) == deep
    assert parse_json("9" * 100) == 10**100 - 1
    assert parse_json(b'{"a": [1, -2.5e3, null, {"b": "\\u00e9"}]}') == {"a": [1, -2500.0, None, {"b": "é"}]}


def header(path: Path, entries: dict[str, Any] | bytes, body: bytes, length: int | None = None) -> Path:
    """A safetensors file by hand."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "body", "length", "told"),
    [
        ({"a": entry()}, b"\0" * 8, 2**63, "a header of 9223372036854775808 bytes does not fit a file of"),
        ({"a": entry()}, b"\0" * 8, 2**64 - 1, "does not fit"),
        ({"a": entry()}, b"", None, "its tensors have 8 bytes, the file 0"),
        ({"a": entry()}, b"\0" * 9, None, "its tensors have 8 bytes, the file 9"),
        ({"a": entry(shape=[2**62, 2**62], offsets=[0, 8])}, b"\0" * 8, None, "which its shape .* has not"),
        ({"a": entry(shape=[2**31, 0], offsets=[0, 8])}, b"\0" * 8, None, "which its shape .* has not"),
        ({"a": entry(shape=[-2], offsets=[8, 0])}, b"\0" * 8, None, "shape or offsets that are no numbers"),
        ({"a": entry(shape=[2.0])}, b"\0" * 8, None, "shape or offsets that are no numbers"),
        ({"a": entry(offsets=[0, 8, 16])}, b"\0" * 8, None, "shape or offsets that are no numbers"),
        ({"a": entry(dtype="F128")}, b"\0" * 8, None, "of the dtype 'F128', which is not known"),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8, None, "which is not known"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, None, "'b' starts at 0, what lies before it ends at 8"),
        ({"a": entry(offsets=[8, 16])}, b"\0" * 16, None, "'a' starts at 8"),
        ({"a": 3}, b"", None, "has no dtype, shape and data_offsets"),
        (b"[]", b"", None, "its header is no object"),
        (b'{"a": {}, "a": {}}', b"", None, "'a' stands twice in one object"),
        (b"{" * 5000, b"", None, "not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(
    entries: Any, body: bytes, length: int | None, told: str, tmp_path: Path
) -> None:
    with pytest.raises(LowRankError, match=told):
        read_header(header(tmp_path / "x.safetensors", entries, body, length))


def test_a_header_that_does_not_lie_is_read(tmp_path: Path) -> None:
    entries = {"b": entry("BF16", [2, 2], [8, 16]), "a": entry(), "none": entry(shape=[0, 3], offsets=[16, 16])}
    found = read_header(header(tmp_path / "x.safetensors", {**entries, "__metadata__": {"format": "pt"}}, b"\0" * 16))
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        "a": ((2,), torch.float32),
        "b": ((2, 2), torch.bfloat16),
        "none": ((0, 3), torch.float32),
    }
