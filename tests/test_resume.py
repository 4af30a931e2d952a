"""A calibration that was saved, interrupted or divided gives the plan of one that was not."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Calibration, CalibrationError, Keep, OptionError, StorageError
from lowrank_fx import cache as cache_room
from lowrank_fx import calibration_run as room
from lowrank_fx._files import sha256_file
from lowrank_fx.batches import Call
from lowrank_fx.cache import EFFECT_BATCHES, Cache
from lowrank_fx.calibration_run import Checkpoint
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule

BATCHES = 12
"""Of which numbers 4 and 9 are held out."""


class Net(nn.Module):
    """Convolutions, one of them grouped, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, image: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        hidden = self.grouped(torch.relu(self.conv(image))).mean((2, 3))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return {"logits": self.head(hidden) * gain, "choice": self.head(hidden).argmax(1)}


def images(count: int = BATCHES) -> list[Tensor]:
    """Channels-last batches, no two of which have a row in common."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(6, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        * torch.tensor([2.0, 0.5, 0.1]).view(3, 1, 1)
        for _ in range(count)
    ]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def failing_at(batches: Iterable[Tensor], position: int) -> Iterator[Tensor]:
    for index, batch in enumerate(batches):
        if index == position:
            raise OSError("the disk went away")
        yield batch


@pytest.fixture(scope="module", autouse=True)
def _no_stopwatch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank_fx.module, "measure", lambda *_: PairedTiming(1.25, 0.5, 0.4, 0.01, 7))
        yield


@pytest.fixture(scope="module")
def model() -> Net:
    return net()


OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "sketched": {"sketch_size": 8},
    "modules": {"capture": "modules", "seed": 3},
}


@pytest.fixture(scope="module")
def whole(model: Net) -> dict[str, Calibration]:
    """The calibrations of uninterrupted runs."""
    return {name: calibrate(model, images(), **options) for name, options in OPTIONS.items()}


def calibrate(model: nn.Module, loader: Iterable[Any], **options: Any) -> Calibration:
    return lowrank_fx.calibrate(model, loader, progress=False, **options)


def optimize(model: nn.Module, loader: Any, **options: Any) -> LowRankModule:
    target = Keep(params=0.6, of="sites")
    return lowrank_fx.optimize(model, loader, target=target, compile=False, progress=False, **options)


QUICK: dict[str, Any] = {"capture": "modules"}
"""Where the way of capture does not matter: exporting takes a second each time."""


def plan_of(model: nn.Module, calibration: Calibration) -> str:
    return optimize(model, calibration, capture=calibration.source.way).plan.to_json()


def same_state(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations hold the same, bit by bit, memory formats included."""
    plain = [
        (each.source, each.shards, each.first_rows, each.counted, each.pieces, each.complete) for each in (one, other)
    ]
    tensors = []
    for each in (one, other):
        found = [tensor for sketch in each.sketches.values() for tensor in sketch.state_dict().values()]
        for batch in (*each.effect_batches, *each.select_batches, *each.report_batches):
            found += [*batch.call.tensors(), *batch.reference]
        tensors.append(found)
    return plain[0] == plain[1] and all(
        torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(*tensors, strict=True)
    )


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_calibration_gives_the_plan_of_an_unsaved_one(
    model: Net, whole: dict[str, Calibration], kind: str, tmp_path: Path
) -> None:
    whole[kind].save(tmp_path)
    again = Calibration.load(tmp_path)
    assert same_state(again, whole[kind])
    assert again.notes == whole[kind].notes
    # The example is the first batch, so what is captured with it is the same.
    direct = optimize(model, images(), **OPTIONS[kind])
    assert any(site.factored for site in direct.plan.sites)
    assert plan_of(model, again) == direct.plan.to_json()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_channels_last_batches_stay_channels_last(whole: dict[str, Calibration], tmp_path: Path) -> None:
    whole["exact"].save(tmp_path)
    (batch, _) = Calibration.load(tmp_path).effect_batches
    (image,) = batch.call.tensors()
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not image.is_contiguous()


def test_a_second_save_replaces_the_first_and_what_a_killed_one_left(
    whole: dict[str, Calibration], tmp_path: Path
) -> None:
    whole["exact"].save(tmp_path)
    (tmp_path / ".calibration-123.tmp").write_bytes(b"half a file")
    whole["sketched"].save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same_state(Calibration.load(tmp_path), whole["sketched"])


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "calibration.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_missing_a_foreign_and_an_older_file_are_refused(whole: dict[str, Calibration], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"calibration\.json could not be read: No such file"):
        Calibration.load(tmp_path)
    whole["exact"].save(tmp_path)
    edit(tmp_path, lambda data: data.update(format=99))
    with pytest.raises(StorageError, match=r"calibration\.json: format 6 is expected, the file says 99"):
        Calibration.load(tmp_path)
    edit(tmp_path, lambda data: data.update(kind="plan"))
    with pytest.raises(StorageError, match=r"calibration\.json: this is not a calibration of lowrank_fx"):
        Calibration.load(tmp_path)


def test_a_flipped_bit_and_a_missing_tensor_file_are_told(whole: dict[str, Calibration], tmp_path: Path) -> None:
    whole["exact"].save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=rf"{path.name}: the file is damaged: its checksum is not the one in"):
        Calibration.load(tmp_path)
    path.unlink()
    with pytest.raises(StorageError, match=rf"{path.name}: the file that calibration\.json names is missing"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("source"),
        lambda data: data["source"].update(capture="import os"),
        lambda data: data["source"]["taps"][0].__setitem__(1, 10**12),
        lambda data: data["source"]["taps"][0].__setitem__(2, 10**12),
        lambda data: data["source"]["taps"].append(["more", 4, 1, None]),
        lambda data: data.update(shards=[7]),
        lambda data: data.update(pieces=[[0, "train", "x"]]),
        lambda data: data["tensors"].update(file="../secret.safetensors"),
        lambda data: data["tensors"].update(file=7),
        lambda data: data["caches"].pop("select"),
        lambda data: data["caches"]["effect"]["batches"][0].update(reference=[]),
        lambda data: data["caches"]["effect"]["batches"][0]["call"].update(args={"object": "os.system"}),
        lambda data: data["caches"]["effect"]["batches"][0]["call"].update(args={"tensor": ["nothing", []]}),
        lambda data: data["caches"]["effect"]["batches"][0]["call"].update(args={"tensor": ["value.0", [0, 0, 7, 1]]}),
        lambda data: data.update(first_rows={"x": "many"}),
        lambda data: data.update(counted=[1]),
    ],
)  # fmt: skip
def test_malformed_data_is_refused_with_the_file_s_name(
    whole: dict[str, Calibration], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    whole["exact"].save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(StorageError, match=r"calibration\.json: damaged: "):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("depth", [450, 100_000])
def test_data_nested_too_deeply_is_refused(whole: dict[str, Calibration], tmp_path: Path, depth: int) -> None:
    """Too deep for Python's recursion on the way through the parsed data, or for the parser."""
    whole["exact"].save(tmp_path)
    edit(tmp_path, lambda data: data["example"].update(kwargs="here"))
    path = tmp_path / "calibration.json"
    path.write_text(path.read_text().replace('"here"', '{"tuple":[' * depth + '{"value":1}' + "]}" * depth))
    with pytest.raises(StorageError, match=r"calibration\.json"):
        Calibration.load(tmp_path)


def test_a_sketch_that_speaks_of_another_size_is_refused_before_it_is_made(
    whole: dict[str, Calibration], tmp_path: Path
) -> None:
    whole["exact"].save(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    tensors["sketch.0.geometry"] = torch.tensor([10**9, 0, 5])
    save_file(tensors, path)
    edit(tmp_path, lambda data: data["tensors"].update(sha256=sha256_file(path)))
    with pytest.raises(StorageError, match=r"the sketch of .* is not of rows of 27 numbers in 1 groups"):
        Calibration.load(tmp_path)


class Odd:
    """Something that no plain file can hold."""


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, how: object = None) -> Tensor:
        return torch.relu(self.layer(x))


def test_a_batch_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(4, 8), "how": Odd()} for _ in range(5)]
    calibration = calibrate(Choosing().eval(), batches, capture="modules")
    with pytest.raises(StorageError, match=r"batch 0 \(effect\) holds a Odd, which cannot be stored without pickle"):
        calibration.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- interruption ----------------------------------------------------------------------------------------------------


def pieces_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The pieces that are run from now on."""
    seen: list[tuple[int, str]] = []
    original = room._run

    def counting(program: Any, observed: Any, recorder: Any, assigned: Any, state: Any) -> None:
        seen.append((assigned.index, assigned.role))
        original(program, observed, recorder, assigned, state)

    monkeypatch.setattr(room, "_run", counting)
    return seen


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_run_that_fails_at_random_batches_gives_the_plan_of_one_that_did_not(
    model: Net, whole: dict[str, Calibration], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pieces_run(monkeypatch)
    positions = sorted(random.Random(kind).sample(range(5, BATCHES), 3))
    for position in positions:
        with pytest.raises(
            CalibrationError, match=rf"failed at batch {position}: OSError.*the same checkpoint= goes on"
        ):
            calibrate(model, failing_at(images(), position), checkpoint=tmp_path, **OPTIONS[kind])
        assert max(index for index, _ in seen) == position - 1
        assert not Calibration.load(tmp_path).complete
    made = optimize(model, images(), checkpoint=tmp_path, **OPTIONS[kind])
    # Every piece ran once, over all four runs together.
    assert sorted(seen) == sorted(whole[kind].pieces)
    assert same_state(Calibration.load(tmp_path), whole[kind])
    assert made.plan.to_json() == plan_of(model, whole[kind])


def test_a_loader_that_fails_before_anything_ran_says_nothing_of_a_checkpoint(model: Net, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"failed at batch 3: OSError: the disk went away$"):
        calibrate(model, failing_at(images(), 3), checkpoint=tmp_path)
    assert not (tmp_path / "calibration.json").exists()


def test_the_first_piece_and_the_last_are_kept_and_not_every_one(
    model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    original = Checkpoint.write

    def counting(self: Checkpoint, state: Calibration) -> None:
        kept.append(len(state.pieces))
        original(self, state)

    monkeypatch.setattr(Checkpoint, "write", counting)
    done = calibrate(model, images(), checkpoint=tmp_path)
    assert kept == [1, len(done.pieces)]


def test_a_finished_checkpoint_runs_nothing(
    model: Net, whole: dict[str, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(model, images(), checkpoint=tmp_path)
    seen = pieces_run(monkeypatch)
    # Not even the loader's second batch is asked for.
    again = calibrate(model, failing_at(images(), 1), checkpoint=tmp_path)
    assert seen == []
    assert same_state(again, whole["exact"])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import lowrank_fx
from lowrank_fx import calibration_run as room
from test_resume import images, net
room.CHECKPOINT_SECONDS, room.CHECKPOINT_SHARE = 0.0, float("inf")

def loader():
    for index, batch in enumerate(images()):
        if index == {batch}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

replaced, original = 0, os.replace
def replace(*names):
    global replaced
    replaced += 1
    if replaced == {replacement}:
        os.kill(os.getpid(), signal.SIGKILL)
    original(*names)
os.replace = replace

lowrank_fx.calibrate(net(), loader(), sketch_size=8, capture="modules", checkpoint={folder!r}, progress=False)
"""


@pytest.mark.parametrize(("batch", "replacement"), [(8, 0), (99, 7), (99, 8)])
def test_a_killed_process_is_resumed(
    model: Net, whole: dict[str, Calibration], tmp_path: Path, batch: int, replacement: int
) -> None:
    """Killed while it reads a batch; before its tensors have their name; and between the tensors and the JSON file."""
    code = KILLED.format(tests=str(Path(__file__).parent), batch=batch, replacement=replacement, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Calibration.load(tmp_path)
    assert not left.complete
    # Pieces 0 to 3 and both halves of 4, and with a kill in the fourth save three of them.
    assert len(left.pieces) == (9 if batch == 8 else 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = calibrate(model, images(), sketch_size=8, **QUICK)
        resumed = calibrate(model, images(), sketch_size=8, checkpoint=tmp_path, **QUICK)
    finally:
        torch.set_num_threads(threads)
    assert same_state(resumed, single)
    assert plan_of(model, resumed) == plan_of(model, single)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def half_done(model: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(CalibrationError):
        calibrate(model, failing_at(images(), 7), checkpoint=folder)
    return folder


def other_model() -> Net:
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": other_model()}, "its 'head.weight' has other values"),
        ({"seed": 5}, "its seed is 0, not 5"),
        ({"holdout": 0.25}, r"its holdout is 0\.2, not 0\.25"),
        ({"capture": "modules"}, "its capture is 'export', not 'modules'"),
        ({"shard": (0, 2)}, "its number of shards is 1, not 2"),
        ({"skip": ["head"]}, r"it has a sketch of '.*' \(skip= may differ\)"),
        ({"sketch_size": 8}, r"its sketch of '.*' has all their second moments .*, not 8 rows"),
        ({"loader": images()[1:]}, "its first batch is another one"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    model: Net, half_done: Path, options: dict[str, Any], told: str
) -> None:
    options = {"model": model, "loader": images(), **options}
    before = sorted((path.name, sha256_file(path)) for path in half_done.iterdir())
    with pytest.raises(StorageError, match=f"the checkpoint is of another run: {told}"):
        calibrate(options.pop("model"), options.pop("loader"), checkpoint=half_done, **options)
    assert sorted((path.name, sha256_file(path)) for path in half_done.iterdir()) == before


def test_other_batches_than_before_are_refused(model: Net, half_done: Path) -> None:
    swapped = images()
    swapped[2], swapped[3] = swapped[3], swapped[2]
    with pytest.raises(CalibrationError, match="batch 2 is not the one of the interrupted run"):
        calibrate(model, swapped, checkpoint=half_done)
    with pytest.raises(CalibrationError, match=r"the loader ended, and batch 6 never came with the role \(calibrate\)"):
        calibrate(model, images(6), checkpoint=half_done)


# ---- shards ----------------------------------------------------------------------------------------------------------


def shards(model: nn.Module, loader: Iterable[Any], count: int, **options: Any) -> list[Calibration]:
    return [calibrate(model, loader, shard=(index, count), **options) for index in range(count)]


@pytest.mark.parametrize(("kind", "count"), [("exact", 2), ("modules", 3), ("modules", 5)])
def test_merged_shards_are_a_single_run_up_to_rounding(
    model: Net, whole: dict[str, Calibration], kind: str, count: int, tmp_path: Path
) -> None:
    parts = shards(model, images(), count, **OPTIONS[kind])
    # In another order than that of the loader, and through files.
    for part in parts:
        part.save(tmp_path / str(min(part.shards)))
    last, *others = [Calibration.load(tmp_path / str(index)) for index in reversed(range(count))]
    merged, single = last.merge(*others), whole[kind]
    for name, sketch in merged.sketches.items():
        for own, wanted in zip(sketch.parts, single.sketches[name].parts, strict=True):
            assert own.rows == wanted.rows
            assert torch.allclose(own.mean, wanted.mean, rtol=0, atol=1e-13)
            # Few rows wait for others, so those of a shard meet other rows in a float32 product than in a single run:
            # measured 8e-8, about its unit roundoff of 6e-8; the probes say so too.
            trace = float(wanted.gram().trace())
            assert float((own.gram() - wanted.gram()).norm()) < min(1e-6 * trace, own.rho + wanted.rho)
            assert own.rho < 2 * wanted.rho
    assert merged.first_rows == single.first_rows
    assert merged.counted == single.counted
    assert merged.pieces == single.pieces
    assert merged.notes == single.notes == ()
    # Everything else is bit by bit that of the single run.
    alike = replace(merged, sketches=single.sketches, source=single.source, shards=single.shards)
    assert same_state(alike, single)
    plan, expected = json.loads(plan_of(model, merged)), json.loads(plan_of(model, single))
    assert [(site["form"], site["rank"]) for site in plan["sites"]] == [
        (site["form"], site["rank"]) for site in expected["sites"]
    ]
    # The shards themselves are as they were.
    assert all(same_state(part, Calibration.load(tmp_path / str(min(part.shards)))) for part in parts)


def test_merged_sketches_keep_their_certificate_and_plan_as_well() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 40)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(40, 8)).eval()
    generator = torch.Generator().manual_seed(2)
    mixing = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q * 0.85 ** torch.arange(48)[:, None]
    batches = [torch.randn(64, 48, generator=generator) @ mixing + 0.3 for _ in range(15)]
    single = calibrate(model, batches, sketch_size=24, **QUICK)
    first, *others = shards(model, batches, 4, sketch_size=24, **QUICK)
    merged = first.merge(*others)
    rows = torch.cat([batch for index, batch in enumerate(batches) if (index + 1) % 5]).double()
    centred = rows - rows.mean(0)
    weight = layer.weight.detach().double()
    name = next(name for name, sketch in single.sketches.items() if sketch.dim == 48)
    losses = []
    for calibration in (single, merged):
        (sketch,) = calibration.sketches[name].parts
        assert sketch.rows == rows.shape[0]
        assert sketch.size == 24
        basis = torch.linalg.svd(weight @ sketch.gram() @ weight.T).U[:, :12]
        change = weight - basis @ basis.T @ weight
        loss = float((centred @ change.T).square().sum())
        least, most = sketch.certificate(change)
        assert least <= loss <= most
        losses.append(math.sqrt(loss))
    assert losses[1] <= 1.01 * losses[0]  # what merging may cost a plan; measured: 1.0003
    assert merged.sketches[name].parts[0].delta > 0


def test_shards_of_different_runs_and_a_shard_twice_are_refused(model: Net) -> None:
    first, second = shards(model, images(), 2, **QUICK)
    with pytest.raises(CalibrationError, match="shard 1 of 2 is in both calibrations"):
        first.merge(second, second)
    with pytest.raises(CalibrationError, match=r"not shards of one run\. Of the second: its seed is 4, not 0"):
        first.merge(calibrate(model, images(), shard=(1, 2), seed=4, **QUICK))
    with pytest.raises(CalibrationError, match=r"its 'head\.weight' has other values"):
        first.merge(calibrate(other_model(), images(), shard=(1, 2), **QUICK))
    with pytest.raises(CalibrationError, match="its first batch is another one"):
        first.merge(calibrate(model, images()[::-1], shard=(1, 2), **QUICK))
    with pytest.raises(CalibrationError, match="its number of shards is 3, not 2"):
        first.merge(calibrate(model, images(), shard=(1, 3), **QUICK))
    with pytest.raises(CalibrationError, match=r"shard 1 of 2 was interrupted; resume it"):
        first.merge(replace(second, complete=False))


def test_a_lone_shard_says_what_it_lacks(model: Net) -> None:
    # Of ten shards the fifth has both held-out batches and nothing else, the sixth one calibration batch, the last two.
    held_out, sixth = (calibrate(model, images(10), shard=(index, 10), **QUICK) for index in (4, 5))
    assert held_out.notes == ("calibrated on shard 4 of 10 alone",)
    with pytest.raises(
        CalibrationError, match=r"holds no calibration batch \(shard 4 of 10\).* merge it with the other"
    ):
        optimize(model, held_out, **QUICK)
    with pytest.raises(CalibrationError, match=r"holds no held-out batch \(shard 5 of 10\)"):
        optimize(model, sixth, **QUICK)
    both = optimize(model, held_out.merge(sixth), **QUICK).plan
    assert "calibrated on shards 4, 5 of 10 alone" in both.notes
    # A shard behind the last batch is as good as any other.
    empty = calibrate(model, images(10), shard=(29, 30), **QUICK)
    assert empty.pieces == {}
    assert empty.counted is None


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (0,), "ab", 3, (0.0, 2), (True, 2)])
def test_a_shard_that_does_not_exist_is_refused(model: Net, shard: Any) -> None:
    with pytest.raises(OptionError, match=r"shard=.*: give \(i, n\) with 0 <= i < n"):
        calibrate(model, images(), shard=shard, **QUICK)


def test_an_interrupted_shard_is_resumed(model: Net, tmp_path: Path) -> None:
    first, second = shards(model, images(), 2, **QUICK)
    with pytest.raises(CalibrationError, match="failed at batch 8"):
        calibrate(model, failing_at(images(), 8), shard=(1, 2), checkpoint=tmp_path, **QUICK)
    with pytest.raises(StorageError, match="it holds shard 1 of 2, not 0"):
        calibrate(model, images(), shard=(0, 2), checkpoint=tmp_path, **QUICK)
    resumed = calibrate(model, images(), shard=(1, 2), checkpoint=tmp_path, **QUICK)
    assert same_state(resumed, second)
    assert same_state(first.merge(resumed), first.merge(second))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 40), max_size=14),
    st.integers(1, 4),
    st.sampled_from([None, EFFECT_BATCHES]),
    st.randoms(use_true_random=False),
)
def test_a_cache_does_not_depend_on_how_the_batches_are_divided(
    sizes: list[int], count: int, most: int | None, chance: random.Random
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_room, "HOLDOUT_BYTES", 8 * 60)
        single = Cache(most)
        parts = [Cache(most) for _ in range(count)]
        for index, size in enumerate(sizes):
            call = Call((torch.full((size,), float(index)),), {})
            single.add(index, call, call.args)
            parts[index % count].add(index, call, call.args)
        chance.shuffle(parts)
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merged(part)
    assert list(merged.batches) == list(single.batches)
    assert (merged.offered, merged.closed) == (single.offered, single.closed)


# ---- planning from a calibration -------------------------------------------------------------------------------------


def test_a_calibration_of_another_model_is_refused(model: Net, whole: dict[str, Calibration]) -> None:
    with pytest.raises(CalibrationError, match=r"does not belong to this model: its 'head\.weight' has other values"):
        optimize(other_model(), whole["exact"])
    with pytest.raises(
        CalibrationError, match=r"made for a model with a tensor 'conv\.weight', which this one does not"
    ):
        optimize(nn.Linear(3, 3), whole["exact"])
    with pytest.raises(CalibrationError, match="captured by 'export', and this one was captured by 'modules'"):
        optimize(model, whole["exact"], capture="modules")


def test_planning_may_skip_more_layers_and_not_fewer(model: Net, whole: dict[str, Calibration]) -> None:
    made = optimize(model, whole["exact"], skip=["head"])
    assert "head" in {entry.name for entry in made.plan.left_alone}
    without = calibrate(model, images(), skip=["head"])
    assert plan_of_skipping(model, without) == made.plan.to_json()
    with pytest.raises(
        CalibrationError, match=r"rows of 16 numbers in 1 groups, and the calibration has no sketch of it"
    ):
        optimize(model, without)


def plan_of_skipping(model: Net, calibration: Calibration) -> str:
    return optimize(model, calibration, skip=["head"]).plan.to_json()


@pytest.mark.parametrize("option", [{"seed": 4}, {"holdout": 0.5}, {"sketch_size": 8}, {"checkpoint": "folder"}])
def test_options_of_calibration_are_refused_beside_one(
    model: Net, whole: dict[str, Calibration], option: dict[str, Any]
) -> None:
    (name,) = option
    with pytest.raises(OptionError, match=f"{name}=.* has no effect on a calibration that is done"):
        optimize(model, whole["exact"], **option)


def test_an_interrupted_calibration_can_be_planned_and_says_so(model: Net, half_done: Path) -> None:
    made = optimize(model, Calibration.load(half_done))
    assert any("calibration was interrupted after 8 pieces of batches" in note for note in made.plan.notes)
