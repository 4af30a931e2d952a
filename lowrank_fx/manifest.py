"""``plan.json``: what a saved model's folder says of itself, written in one format and read in every one there was.

``schemas/plan.schema.json`` describes the format that is written. The readers below are as strict without it: each
value is of its type and finite, a name is a plain file name, sizes are bounded before anything is made of them.

A change of the format raises :data:`FORMAT`, keeps the reader of the format before (``READERS``), and adds folders to
``tests/golden``. A plan inside has a version of its own (``plan.py``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lowrank_fx._files import read_json
from lowrank_fx.errors import LowRankError, StorageError
from lowrank_fx.example_calls import decode_call
from lowrank_fx.fingerprint import BaseWeight
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan
from lowrank_fx.program import Way
from lowrank_fx.timings import SiteSpeed
from lowrank_fx.weight_files import NAME, WeightFile

FORMAT = 3
PLAN_FILE = "plan.json"

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Captured:
    """What the captured model was, where the optimized one differs from it without being factored there.

    Attributes:
        gaps: of every factored layer, by its name, how far its factors are from the nearest ones (``transfer.py``).
        moved: names of tensors (biases, norms) whose captured values are stored besides their own.
    """

    gaps: Mapping[str, float]
    moved: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``plan.json``.

    Attributes:
        plan: the plan.
        capture: how the model was captured.
        call: an example call as JSON data, see ``example_calls.py``; None where JSON does not know all of it.
        ignored: names of inputs that the model takes and does not read.
        files: where the tensors are.
        base: the tensors of the user's model when the plan was made.
        captured: what ``load(..., strict=False)`` needs besides; None in folders of format 1.
        timing: measured against the original, or None.
        folded: names of the factored layers that are dense again.
        speeds: measured of the factored layers, by name; folders of format 1 have none.
    """

    plan: Plan
    capture: Way
    call: Any
    ignored: tuple[str, ...]
    files: tuple[WeightFile, ...]
    base: Mapping[str, BaseWeight]
    captured: Captured | None
    timing: PairedTiming | None
    folded: tuple[str, ...]
    speeds: Mapping[str, SiteSpeed] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The bytes of ``plan.json``.

        Raises:
            ValueError: a number is not finite.
        """
        data = {
            "format": FORMAT,
            "plan": json.loads(self.plan.to_json()),
            "capture": self.capture,
            "call": self.call,
            "ignored": list(self.ignored),
            "weights": {"files": [asdict(entry) for entry in self.files]},
            "base": {name: asdict(entry) for name, entry in self.base.items()},
            "captured": None if self.captured is None else asdict(self.captured),
            "timing": None if self.timing is None else asdict(self.timing),
            "folded": list(self.folded),
            "speeds": {name: asdict(speed) for name, speed in self.speeds.items()},
        }
        # Keys stay in their order: that of a dictionary among the inputs is part of how the graph is called.
        return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Read ``plan.json``, of this format or an older one.

    Raises:
        StorageError: it is missing, damaged, or of a format that is not known.
    """
    path = folder / PLAN_FILE
    data = read_json(path)
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if type(found) is int and found > FORMAT:
        raise StorageError(
            f"{path}: the folder is of format {found}, which is newer than format {FORMAT}, the last that this "
            "lowrank_fx knows; upgrade lowrank_fx to read it"
        )
    if type(found) is not int or found not in READERS:
        raise StorageError(f"{path}: a format from {min(READERS)} to {FORMAT} is expected, the file says {found!r:.60}")
    try:
        return READERS[found]({name: value for name, value in data.items() if name != "format"})
    except (LowRankError, ValueError) as error:
        raise StorageError(f"{path}: damaged: {error}") from error


def _read_2(data: dict[str, Any]) -> Manifest:
    _known(data, {each.name for each in fields(Manifest)} - {"files"} | {"weights"}, PLAN_FILE)
    _known(data["weights"], {"files"}, "weights")
    listed = _list(data["weights"]["files"], "weights.files")
    files = tuple(_file(entry, f"weights.files[{number}]") for number, entry in enumerate(listed))
    if not files or len({entry.file for entry in files}) != len(files):
        raise ValueError("weights.files names no file, or one twice")
    plan = Plan.from_data(data["plan"])
    folded = _texts(data["folded"], "folded")
    captured = _captured(data["captured"], {entry.name for entry in plan.factored})
    return _read(data, plan, files, captured, folded)


def _read_1(data: dict[str, Any]) -> Manifest:
    """One file of weights, all or no layers folded, nothing about the captured model."""
    _known(data, {each.name for each in fields(Manifest)} - {"files", "captured", "speeds"} | {"weights"}, PLAN_FILE)
    weights = data["weights"]
    _known(weights, {"file", "sha256"}, "weights")
    files = (WeightFile(_file_name(weights["file"]), _checksum(weights["sha256"], "weights.sha256"), None, None),)
    plan = Plan.from_data(data["plan"])
    if not isinstance(data["folded"], bool):
        raise ValueError(f"folded is {data['folded']!r:.60}, not true or false")
    return _read(data, plan, files, None, tuple(entry.name for entry in plan.factored) if data["folded"] else ())


READERS: dict[int, Callable[[dict[str, Any]], Manifest]] = {1: _read_1, 2: _read_2, 3: _read_2}
"""By format; every one that was ever released stays. Format 3 holds plans in which layers share a first factor."""


def _read(
    data: dict[str, Any], plan: Plan, files: tuple[WeightFile, ...], captured: Captured | None, folded: tuple[str, ...]
) -> Manifest:
    """What has not changed since format 1."""
    if data["capture"] not in get_args(Way):
        raise ValueError(f"capture is {data['capture']!r:.60}")
    call = data["call"]
    if call is not None:
        decode_call(call, "meta")
    names = {entry.name for entry in plan.factored}
    if len(names) != len(plan.factored):
        raise ValueError("the plan factors a layer twice")
    if len(set(folded)) != len(folded) or not set(folded) <= names:
        raise ValueError(f"folded is {folded!r:.60}, which are not names of factored layers")
    return Manifest(
        plan=plan,
        capture=data["capture"],
        call=call,
        ignored=_texts(data["ignored"], "ignored"),
        files=files,
        base={name: _base_weight(entry, f"base.{name[:60]}") for name, entry in _object(data["base"], "base").items()},
        captured=captured,
        timing=None if data["timing"] is None else _timing(data["timing"]),
        folded=folded,
        speeds={name: _speed(entry, f"speeds.{name[:60]}") for name, entry in _speeds(data, names).items()},
    )


def _file(entry: Any, where: str) -> WeightFile:
    _known(entry, {each.name for each in fields(WeightFile)}, where)
    if type(entry["bytes"]) is not int or entry["bytes"] < 0:
        raise ValueError(f"{where}.bytes is {entry['bytes']!r:.60}")
    name, checksum = _file_name(entry["file"]), _checksum(entry["sha256"], f"{where}.sha256")
    return WeightFile(name, checksum, entry["bytes"], _texts(entry["tensors"], f"{where}.tensors"))


def _captured(data: Any, layers: Collection[str]) -> Captured | None:
    if data is None:
        return None
    _known(data, {each.name for each in fields(Captured)}, "captured")
    gaps = _object(data["gaps"], "captured.gaps")
    _known(gaps, layers, "captured.gaps")
    for name, value in gaps.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"captured.gaps.{name[:60]} is {value!r:.60}")
    moved = _texts(data["moved"], "captured.moved")
    if len(set(moved)) != len(moved):
        raise ValueError("captured.moved names a tensor twice")
    return Captured(gaps, moved)


def _base_weight(entry: Any, where: str) -> BaseWeight:
    _known(entry, {each.name for each in fields(BaseWeight)}, where)
    shape, dtype = _list(entry["shape"], where), entry["dtype"]
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape) or not isinstance(dtype, str):
        raise ValueError(f"{where} has no shape and dtype")
    return BaseWeight(tuple(shape), dtype, _checksum(entry["sha256"], where))


def _timing(data: Any) -> PairedTiming:
    return PairedTiming(**_times(data, PairedTiming, "timing"))


def _speeds(data: dict[str, Any], names: set[str]) -> dict[str, Any]:
    speeds = _object(data.get("speeds", {}), "speeds")
    if not speeds.keys() <= names:
        raise ValueError("speeds names a layer that is not factored")
    return speeds


def _speed(data: Any, where: str) -> SiteSpeed:
    return SiteSpeed(**_times(data, SiteSpeed, where))


def _times(data: Any, of: type, where: str) -> dict[str, Any]:
    """The fields of a class that holds measured numbers: above zero, or errors."""
    kinds = get_type_hints(of)
    _known(data, kinds, where)
    for name, kind in kinds.items():
        value = data[name]
        number = type(value) in ((int,) if kind is int else (int, float)) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and name not in ("spread", "error")):
            raise ValueError(f"{where}.{name} is {value!r:.60}")
    return dict(data)


def _known(data: Any, names: Collection[str], where: str) -> None:
    wrong = sorted(_object(data, where).keys() ^ set(names))
    if wrong:
        raise ValueError(f"{where} {'lacks' if wrong[0] in names else 'has an unknown'} {wrong[0][:60]!r}")


def _object(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r:.60}, not an object")
    return data


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError(f"{where} is {data!r:.60}, not a list")
    return data


def _texts(data: Any, where: str) -> tuple[str, ...]:
    if not all(isinstance(each, str) for each in _list(data, where)):
        raise ValueError(f"{where} is {data!r:.60}, not a list of texts")
    return tuple(data)


def _checksum(data: Any, where: str) -> str:
    if not isinstance(data, str) or not _SHA256.fullmatch(data):
        raise ValueError(f"{where} is {data!r:.60}, not a checksum")
    return data


def _file_name(data: Any) -> str:
    if not isinstance(data, str) or not NAME.fullmatch(data):
        raise ValueError(f"{data!r:.60} is not a plain file name of a file of weights")
    return data
