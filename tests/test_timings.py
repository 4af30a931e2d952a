"""The measured cost model: what it measures, what it keeps, and how it reads the ranks in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fx import timing_cache, timings
from lowrank_fx._progress import Progress
from lowrank_fx.latency import PairedTiming
from lowrank_fx.sites import Site, SiteCall
from lowrank_fx.timed_operators import Operator, Pair
from lowrank_fx.timing_cache import Entry, TimingCache, environment
from lowrank_fx.timings import (
    DOUBT_SECONDS,
    SURVEY_SECONDS,
    USUAL_SECONDS,
    SiteSpeed,
    Timings,
    interpolated,
    survey_ranks,
)

CPU = torch.device("cpu")
SITE = Site(
    name="layer.0.q",
    kind="linear",
    weight="layer.0.q.weight",
    transposed=False,
    out_features=96,
    in_features=64,
    shape=(96, 64),
    dtype="torch.float32",
    patch=None,
    calls=(SiteCall("linear", "x", "layer.0.q.bias"),),
    centered=True,
)


def operator(rows: int = 32) -> Operator:
    return Operator.of(SITE, 0, rows, (), compiled=True)


def timing(speedup: float, *, error: float = 0.001, dense: float = 1e-3) -> PairedTiming:
    """A timing with a given standard error: that is .929 times the spread over the root of the rounds."""
    return PairedTiming(speedup, dense, dense / speedup, error * 4.0 / 0.92906, 16)


class Machine:
    """Measures what it is told, and keeps a list of what it was asked for."""

    def __init__(self, speed: Callable[[int], PairedTiming]) -> None:
        self.speed = speed
        self.asked: list[tuple[int, int, float]] = []
        self.now = 0.0

    def measure(self, operator: Operator, pair: Pair, device: torch.device, **options: float) -> PairedTiming:
        assert device == CPU
        self.asked.append((operator.rows, pair.rank, options["max_seconds"]))
        self.now += 1.0
        return self.speed(pair.rank)

    def timings(self, folder: Path) -> Timings:
        return Timings(CPU, TimingCache(folder), measure=self.measure, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_fx.latency.MAX_SECONDS", 10.0)


def pairs(*ranks: int, rows: int = 32) -> list[tuple[Operator, Pair]]:
    return [(operator(rows), Pair("lowrank", rank)) for rank in ranks]


# ---- between the ranks ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 4.0), min_size=1, max_size=8), st.integers(1, 200), st.integers(0, 50))
def test_a_larger_rank_never_costs_less(costs: list[float], rank: int, more: int) -> None:
    points = [(8 * place + 8, cost) for place, cost in enumerate(costs)]
    low, high = interpolated(points, rank), interpolated(points, rank + more)
    assert low <= high * (1 + 1e-12)  # a few roundings of the mean
    # Between ranks that were measured, nothing lies outside what was measured.
    assert min(costs) * (1 - 1e-12) <= interpolated(points, min(rank, points[-1][0])) <= max(costs) * (1 + 1e-12)


def test_what_rises_is_met_exactly_and_what_falls_is_pooled() -> None:
    points = [(8, 0.25), (16, 0.5), (32, 1.0)]
    assert [interpolated(points, rank) for rank in (8, 12, 16, 24, 32)] == [0.25, 0.375, 0.5, 0.75, 1.0]
    assert interpolated(points, 4) == 0.25  # no rank below the smallest is known to cost less
    assert interpolated(points, 48) == 1.5
    # The least-squares fit that never falls: .5 and .3 become their mean.
    assert [interpolated([(8, 0.5), (16, 0.25), (24, 0.75)], rank) for rank in (8, 16, 20)] == [0.375, 0.375, 0.5625]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_surveyed_ranks_span_those_on_offer(count: int) -> None:
    ranks = tuple(range(8, 80, 8))
    chosen = survey_ranks(ranks, count)
    assert len(chosen) == count
    assert set(chosen) <= set(ranks)
    assert chosen == tuple(sorted(chosen))
    if count > 1:
        assert (chosen[0], chosen[-1]) == (8, 72)
    assert survey_ranks((), count) == ()
    assert survey_ranks((5,), count) == (5,)


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_a_survey_measures_each_pair_once_and_estimates_the_ranks_between(tmp_path: Path) -> None:
    machine = Machine(lambda rank: timing(64 / rank))
    table = machine.timings(tmp_path)
    table.survey([*pairs(16, 32), *pairs(16)])
    assert machine.asked == [(32, 16, USUAL_SECONDS), (32, 32, USUAL_SECONDS)]
    assert table.estimate(*pairs(16)[0]) == 4.0
    assert table.estimate(*pairs(24)[0]) == pytest.approx(64 / 24)  # costs are 16/64 and 32/64, so 24/64 between
    assert table.is_measured(*pairs(32)[0])
    assert not table.is_measured(*pairs(24)[0])
    assert table.dense_seconds(operator()) == 1e-3
    assert len(machine.asked) == 2


def test_a_survey_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, bool, str]] = []

    class Bar(Progress):
        def __init__(self, label: str, total: int, enabled: bool) -> None:
            super().__init__(label, total, enabled)
            self.shown = total, enabled

        def advance(self, steps: int = 1, note: str = "") -> None:
            told.append((*self.shown, note))

    monkeypatch.setattr(timings, "Progress", Bar)
    Machine(lambda rank: timing(64 / rank)).timings(tmp_path).survey(pairs(16, 32, 48), progress=True)
    assert told == [(3, True, operator().key)] * 3


def test_a_rank_that_was_chosen_is_measured_itself(tmp_path: Path) -> None:
    machine = Machine(lambda rank: timing(0.9 if rank == 24 else 64 / rank))
    table = machine.timings(tmp_path)
    table.survey(pairs(16, 32))
    found = table.timing(*pairs(24)[0], sure=True)
    assert found is not None
    assert found.speedup == 0.9
    assert machine.asked[-1] == (32, 24, USUAL_SECONDS)
    # What is known now counts for its neighbours too: 16/64, then 1/.9 and 32/64 pooled.
    assert 1 / table.estimate(*pairs(28)[0]) == pytest.approx((1 / 0.9 + 0.5) / 2)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (timing(1.02, error=0.01), True),  # two errors from 1
        (timing(0.98, error=0.01), True),
        (timing(1.04, error=0.01), False),
        (timing(3.0, error=0.2), True),  # clear, and yet more than a twentieth uncertain
    ],
)
def test_what_is_in_doubt_is_measured_again_with_more_rounds(tmp_path: Path, first: PairedTiming, again: bool) -> None:
    answers = iter([first, timing(1.5)])
    machine = Machine(lambda rank: next(answers))
    table = machine.timings(tmp_path)
    found = table.timing(*pairs(16)[0], sure=True)
    assert found == (timing(1.5) if again else first)
    assert [asked[2] for asked in machine.asked] == [USUAL_SECONDS, DOUBT_SECONDS][: 1 + again]
    assert table.timing(*pairs(16)[0], sure=True) == found  # and never again
    assert len(machine.asked) == 1 + again


def test_a_survey_stops_at_its_limit_and_says_so(tmp_path: Path) -> None:
    machine = Machine(lambda rank: timing(2.0))
    table = machine.timings(tmp_path)
    table.survey([*pairs(8), *(pair for rows in range(1, 80) for pair in pairs(16, rows=rows))])
    assert len(machine.asked) == SURVEY_SECONDS
    (note,) = table.notes
    assert note.startswith("20 ranks were not timed within 60 s")
    # What was not timed is taken to follow its FLOPs: 96 x 64 over 16 x (96 + 64), and the others' rate.
    left = operator(79)
    assert table.estimate(left, Pair("lowrank", 16)) == pytest.approx(96 * 64 / (16 * 160))
    # Those were of 1 to 59 rows at the same time each, so the middle one is that of 30.
    assert table.dense_seconds(left) == pytest.approx(1e-3 * 79 / 30)


def test_what_cannot_be_timed_is_told_and_not_tried_again(tmp_path: Path) -> None:
    def fail(rank: int) -> PairedTiming:
        raise RuntimeError("out of memory\nand more")

    machine = Machine(fail)
    table = machine.timings(tmp_path)
    table.survey(pairs(8, 16))
    assert table.timing(*pairs(24)[0], sure=True) is None
    assert len(machine.asked) == 1
    (note,) = table.notes
    assert note == "lowrank of linear, 96x64, float32, rows 32, bias could not be timed: out of memory"


def test_a_speed_counts_only_beyond_its_noise() -> None:
    assert SiteSpeed(1.05, 0.02, 2.1, 2.0, 1.5).faster
    assert not SiteSpeed(1.05, 0.03, 2.1, 2.0, 1.5).faster
    assert not SiteSpeed(1.004, 0.0, 2.008, 2.0, 1.5).faster  # a small effect is none, however sure
    assert SiteSpeed(1.5, 0.0, 3.0, 2.0, 2.0).of_ideal == 0.75


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(tmp_path: Path) -> None:
    first = Machine(lambda rank: timing(64 / rank))
    table = first.timings(tmp_path)
    table.survey(pairs(16, 32))
    table.timing(*pairs(24)[0], sure=True)
    table.flush()
    second = Machine(lambda rank: timing(9.0))
    again = second.timings(tmp_path)
    again.survey(pairs(16, 24, 32))
    assert again.timing(*pairs(24)[0], sure=True) == table.timing(*pairs(24)[0], sure=True)
    assert second.asked == []
    assert again.notes == ()


def test_what_is_mostly_noise_is_not_kept(tmp_path: Path) -> None:
    machine = Machine(lambda rank: timing(2.0, error=0.2 if rank == 16 else 0.01))
    machine.timings(tmp_path).survey(pairs(16, 32))
    again = Machine(lambda rank: timing(2.0))
    again.timings(tmp_path).survey(pairs(16, 32))
    assert [rank for _, rank, _ in again.asked] == [16]


def test_runs_side_by_side_keep_what_the_others_measured(tmp_path: Path) -> None:
    one, other = TimingCache(tmp_path), TimingCache(tmp_path)
    mine, theirs = Entry(timing(2.0)), Entry(timing(3.0), sure=True)
    assert one.load("here") == other.load("here") == {}
    one.store("here", {"a": {"lowrank 8": mine}})
    other.store("here", {"a": {"lowrank 16": theirs}, "b": {"lowrank 8": theirs}})
    one.store("elsewhere", {"a": {"lowrank 8": theirs}})
    one.store("here", {})
    assert one.load("here") == {"a": {"lowrank 8": mine, "lowrank 16": theirs}, "b": {"lowrank 8": theirs}}
    assert other.load("elsewhere") == {"a": {"lowrank 8": theirs}}
    other.store("here", {"a": {"lowrank 8": theirs}})
    assert one.load("here")["a"]["lowrank 8"] == theirs
    assert [path.name for path in tmp_path.iterdir()] == [timing_cache.FILE]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "no JSON",
        "[]",
        '{"format": 1}',
        '{"format": 1, "environments": []}',
        '{"format": 1, "environments": {"here": []}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank 8": [1, 2]}}}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank 8": [-1, 1, 1, 0, 9, false]}}}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank 8": [1e999, 1, 1, 0, 9, false]}}}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank 8": ["x", 1, 1, 0, 9, false]}}}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank x": [2, 1, 1, 0, 9, false]}}}}',
        '{"format": 1, "environments": {"here": {"a": {"lowrank 0": [2, 1, 1, 0, 9, false]}}}}',
    ],
)
def test_a_damaged_file_is_passed_over_and_written_anew(tmp_path: Path, damage: str) -> None:
    (tmp_path / timing_cache.FILE).write_text(damage)
    cache = TimingCache(tmp_path)
    assert cache.load("here") == {}
    if damage != "[]":
        (note,) = cache.notes
        assert "is damaged, so times are measured anew" in note
    cache.store("here", {"a": {"lowrank 8": Entry(timing(2.0))}})
    assert TimingCache(tmp_path).load("here")["a"] == {"lowrank 8": Entry(timing(2.0))}


def test_a_bad_number_of_another_environment_does_not_stop_writing(tmp_path: Path) -> None:
    bad = '{"lowrank 8": [NaN, 1, 1, 0, 9, false], "lowrank 16": [2, 1, 0.5, 0, 9, false]}'
    (tmp_path / timing_cache.FILE).write_text(f'{{"format": 1, "environments": {{"there": {{"a": {bad}}}}}}}')
    cache = TimingCache(tmp_path)
    cache.store("here", {"a": {"lowrank 8": Entry(timing(2.0))}})
    assert cache.notes == []
    assert TimingCache(tmp_path).load("here")["a"] == {"lowrank 8": Entry(timing(2.0))}
    assert list(TimingCache(tmp_path).load("there")["a"]) == ["lowrank 16"]


def test_a_folder_that_cannot_be_looked_into_is_no_error(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path / ("x" * 300))  # too long a name for any file system
    assert cache.load("here") == {}
    cache.store("here", {"a": {"lowrank 8": Entry(timing(2.0))}})
    read, written = cache.notes
    assert "cannot be read, so times are measured anew" in read
    assert "cannot be written, so times are measured again the next time" in written


def test_a_file_of_another_version_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"a": {"lowrank 8": Entry(timing(2.0))}}
    TimingCache(tmp_path).store("here", entries)
    monkeypatch.setattr(timing_cache, "FORMAT", 2)
    cache = TimingCache(tmp_path)
    assert cache.load("here") == {}
    assert cache.notes == []
    cache.store("there", entries)
    data = json.loads((tmp_path / timing_cache.FILE).read_text())
    assert (data["format"], list(data["environments"])) == (2, ["there"])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TimingCache(tmp_path / "file")
    assert cache.load("here") == {}
    cache.store("here", {"a": {"lowrank 8": Entry(timing(2.0))}})
    (note,) = cache.notes
    assert "cannot be written, so times are measured again the next time" in note


def test_the_folder_is_that_of_the_user_or_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_CACHE", str(tmp_path))
    assert TimingCache().path == tmp_path / "timings.json"
    monkeypatch.setenv("LOWRANK_FX_CACHE", " ")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: tmp_path / "user" / name)
    assert TimingCache().path == tmp_path / "user" / "lowrank_fx" / "timings.json"


def test_a_time_holds_for_one_machine_and_one_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment(CPU)
    assert torch.__version__ in here
    assert f"{torch.get_num_threads()} threads" in here
    assert "\n" not in here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert environment(CPU) != here
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert environment(CPU).startswith("torch 9.9, ")
