"""A save that is killed, at any point, leaves the old model or the new one, and no litter that grows."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import given
from torch import Tensor

from lowrank_fx import _files, storage, weight_files
from lowrank_fx.manifest import FORMAT, PLAN_FILE
from lowrank_fx.storage import Artifact
from lowrank_fx.weight_files import TEMPORARY_PATTERNS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks, which start in milliseconds"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]

LIMIT = 1400
"""Bytes of tensors in a file; the models have two such files."""

SAVED = Path(__file__).parent / "golden" / "v2" / "tree" / "saved"
MODEL, INPUTS, OUTPUTS = given(SAVED.parent)


def artifacts() -> tuple[Artifact, Artifact]:
    """Two models of the same original that tell apart: one returns half of what the other does."""
    first, second = storage.load(MODEL, SAVED), storage.load(MODEL, SAVED)
    with torch.no_grad():
        second.program.module.get_parameter("second.factor_out").mul_(0.5)
    return first, second


def outputs(folder: Path) -> Tensor:
    """What the model in a folder returns."""
    with torch.no_grad():
        made: Tensor = storage.load(MODEL, folder).program.module(INPUTS)
    return made


def killed(work: Callable[[], object], wait: Callable[[], object] | None = None) -> None:
    """Run ``work`` in a child, and kill it after ``wait``, or wait until it has killed itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    if wait is not None:
        try:
            wait()
        finally:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    assert os.WTERMSIG(status) == signal.SIGKILL


def check(folder: Path) -> bool:
    """That a folder holds one of the two models, whole, and at most one unfinished file; whether it is the second."""
    litter = [path for pattern in TEMPORARY_PATTERNS for path in folder.glob(pattern)]
    assert len(litter) <= 1
    weights = list(folder.glob("*.safetensors"))
    assert len(weights) <= 4  # two of each model
    assert len(list(folder.iterdir())) == 1 + len(weights) + len(litter)
    made = outputs(folder)
    for half, expected in ((False, OUTPUTS), (True, 0.5 * OUTPUTS)):
        if torch.allclose(made, expected, rtol=1e-5, atol=1e-6):
            return half
    pytest.fail("the folder holds neither model")


def test_fifty_saves_killed_at_random_points(tmp_path: Path) -> None:
    both = artifacts()
    started = time.perf_counter()
    for artifact in (*both, *both):
        storage.save(artifact, tmp_path, LIMIT)
    each = (time.perf_counter() - started) / 4
    rng = random.Random(0)
    found: set[bool] = set()

    for kill in range(50):
        reader, writer = os.pipe()

        def work(writer: int = writer) -> None:
            for artifact in itertools.cycle(both):
                storage.save(artifact, tmp_path, LIMIT)
                os.write(writer, b"1")

        def wait(saves: int = kill % 4, reader: int = reader, writer: int = writer) -> None:
            """Until the child has done ``saves`` saves, however slow the machine is, and is within a later one."""
            os.close(writer)  # the child's end alone is left: where the child ends, reading does
            for _ in range(saves):
                assert select.select([reader], [], [], 60)[0], "the child saved nothing for a minute"
                assert os.read(reader, 1), "the child ended by itself"
            time.sleep(each * rng.random())

        killed(work, wait)
        os.close(reader)
        found.add(check(tmp_path))
    assert found == {False, True}


def test_a_save_killed_before_each_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write, sync, replacement and removal in turn is the one that is not reached."""
    old, new = artifacts()
    steps = 0
    last = False

    def counted(real: Any, limit: int) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal steps
            if steps == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return real(*args, **options)

        return step

    def watch(patch: pytest.MonkeyPatch, limit: int) -> None:
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (weight_files, "save_file")):
            patch.setattr(owner, name, counted(getattr(owner, name), limit))

    storage.save(old, tmp_path / "count", LIMIT)
    with monkeypatch.context() as patch:
        watch(patch, -1)
        storage.save(new, tmp_path / "count", LIMIT)
    total = steps
    assert total > 12
    for limit in range(total):
        folder = tmp_path / str(limit)
        storage.save(old, folder, LIMIT)
        steps = 0

        def work(limit: int = limit, folder: Path = folder) -> None:
            watch(monkeypatch, limit)  # in the child alone
            storage.save(new, folder, LIMIT)

        killed(work)
        is_new = check(folder)
        assert is_new >= last  # once replaced, the new model stays
        last = is_new
    assert last
    # The next save leaves nothing of the killed one.
    folder = tmp_path / "2"
    storage.save(old, folder, LIMIT)
    assert not check(folder)
    assert len(list(folder.iterdir())) == 3


def test_temporaries_of_killed_saves_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = artifacts()
    storage.save(first, tmp_path)
    for number in range(3):
        (tmp_path / f".model-{number}.tmp").write_bytes(b"half")
        (tmp_path / f".{PLAN_FILE}.{number}.tmp").write_bytes(b"half")

    def killed_here(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "save_file", killed_here)
        with pytest.raises(KeyboardInterrupt):
            storage.save(first, tmp_path)
    assert not check(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_weights_are_on_the_disk_before_the_plan_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        steps.append("plan" if Path(target).name == PLAN_FILE else "weights")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    storage.save(artifacts()[0], tmp_path, LIMIT)
    assert steps == [*(["sync file", "weights"] * 2), "sync folder", "sync file", "plan", "sync folder"]
    assert _files.read_json(tmp_path / PLAN_FILE)["format"] == FORMAT
