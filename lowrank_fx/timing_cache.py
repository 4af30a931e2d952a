"""Measured times on disk: one JSON file in the user's cache folder, shared by all runs and processes of a machine.

A time holds for one machine and one version of the software; :func:`environment` names both, and entries of another
environment are kept beside. The file is a cache and nothing more: where it is damaged, of another version or cannot be
written, times are measured again, and a note says so.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowrank_fx._env import cache_folder
from lowrank_fx._files import read_json, write_atomic
from lowrank_fx.errors import StorageError
from lowrank_fx.latency import PairedTiming

FORMAT = 1
"""Of the file, and of what is timed: another way of timing an operator is another format."""

FILE = "timings.json"


@dataclass(frozen=True)
class Entry:
    """What was measured.

    Attributes:
        timing: dense against factored.
        sure: it was given the time that is given where a first measurement leaves in doubt which is faster.
    """

    timing: PairedTiming
    sure: bool = False


Entries: TypeAlias = dict[str, dict[str, Entry]]
"""Operator -> form and rank -> what was measured."""


class TimingCache:
    """The file.

    Args:
        folder: where it lies; it need not exist. None: ``LOWRANK_FX_CACHE``, or the user's cache folder.

    Attributes:
        path: of the file.
        notes: what the user should know of it.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (cache_folder() if folder is None else folder) / FILE
        self.notes: list[str] = []

    def load(self, environment: str) -> Entries:
        """What was measured in an environment; empty where there is no file that can be read."""
        try:
            if not self.path.is_file():
                return {}
            data = read_json(self.path)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                return {}
            return {
                str(operator): {_pair(pair): _entry(values) for pair, values in pairs.items()}
                for operator, pairs in data["environments"].get(environment, {}).items()
            }
        except OSError as error:  # the folder cannot be looked into, or its name is too long
            self._note(f"{self.path} cannot be read, so times are measured anew ({error})")
            return {}
        except (StorageError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            self._note(f"{self.path} is damaged, so times are measured anew ({error})")
            return {}

    def store(self, environment: str, entries: Mapping[str, Mapping[str, Entry]]) -> None:
        """Add entries to the file; what others have written there stays, and entries of the same key are replaced.

        Two processes that write at the same moment leave the file of one of them, whole; the other measures again.
        """
        if not entries:
            return
        try:
            environments = self._others()
            own = environments.setdefault(environment, {})
            for operator, pairs in entries.items():
                packed = {pair: [*astuple(entry.timing), entry.sure] for pair, entry in pairs.items()}
                own.setdefault(operator, {}).update(packed)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = {"format": FORMAT, "environments": environments}
            write_atomic(self.path, (json.dumps(data, indent=0, sort_keys=True, allow_nan=False) + "\n").encode())
        except (StorageError, OSError, ValueError) as error:
            self._note(f"{self.path} cannot be written, so times are measured again the next time ({error})")

    def _others(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The file as it is now; empty where it cannot be built on."""
        try:
            data = read_json(self.path)
            environments = data["environments"] if data.get("format") == FORMAT else {}
            return {
                name: {operator: _sound(pairs) for operator, pairs in own.items()} for name, own in environments.items()
            }
        except (StorageError, KeyError, TypeError, AttributeError):
            pass
        return {}

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def environment(device: torch.device) -> str:
    """The machine and the software that a time holds for, as one line of text."""
    words = [f"torch {torch.__version__}", _processor()]
    if device.type == "cpu":
        words += [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    else:
        words += [device.type, _accelerator(device)]
        if device.type == "cuda":
            words += [f"{_precision(torch.backends.cuda.matmul)}, {_precision(torch.backends.cudnn)}"]
    words += [f"matmul {torch.get_float32_matmul_precision()}"]
    words += [f"deterministic {torch.are_deterministic_algorithms_enabled()}"]
    return ", ".join(words)


def _precision(backend: Any) -> str:
    """How a backend multiplies float32; torch refuses to tell by the old name what was set by the new one."""
    new = getattr(backend, "fp32_precision", None)
    return f"precision {new}" if new is not None else f"TF32 {backend.allow_tf32}"


def _accelerator(device: torch.device) -> str:
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named is not None else ""


@functools.cache
def _processor() -> str:
    """The processor's name: Linux tells it in a file of its own, and nowhere else."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _sound(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that can be read back: one that cannot would make the file damaged for good."""
    kept = {}
    for pair, values in pairs.items():
        try:
            _entry(values)
            kept[_pair(pair)] = values
        except (TypeError, ValueError, OverflowError):
            continue
    return kept


def _pair(key: str) -> str:
    rank = key.rpartition(" ")[2]
    if not (rank.isascii() and rank.isdigit() and int(rank) > 0):
        raise ValueError(f"{key!r} is no form and rank")
    return key


def _entry(values: Any) -> Entry:
    *numbers, rounds, sure = values
    speedup, baseline, candidate, spread = (float(number) for number in numbers)
    timing = PairedTiming(speedup, baseline, candidate, spread, int(rounds))
    if not (min(speedup, baseline, candidate) > 0 and math.isfinite(speedup + baseline + candidate)):
        raise ValueError(f"{values!r} are no times")
    if not (0 <= spread < math.inf and timing.rounds >= 1):
        raise ValueError(f"{values!r} are no times")
    return Entry(timing, bool(sure))
