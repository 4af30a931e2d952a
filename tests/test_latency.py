from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from lowrank_fx.errors import OptionError
from lowrank_fx.latency import paired_speedup


class Machine:
    """A clock that moves only when one of its callables runs."""

    def __init__(self) -> None:
        self.now = 50.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: Iterator[float]) -> Callable[[], object]:
        def run() -> object:
            self.calls.append(name)
            self.now += next(seconds)
            return object()

        return run


def always(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def in_turn(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


def test_speedup_is_baseline_over_candidate() -> None:
    machine = Machine()
    timing = paired_speedup(
        machine.work("A", always(0.06)), machine.work("B", always(0.02)), device="cpu", clock=machine.clock
    )
    # Sums of a few times near 50: 50 eps against 0.02.
    assert timing.speedup == pytest.approx(3.0, rel=1e-11)
    assert timing.baseline_seconds == pytest.approx(0.06, rel=1e-11)
    assert timing.candidate_seconds == pytest.approx(0.02, rel=1e-11)
    assert timing.spread == pytest.approx(0.0, abs=1e-11)
    assert timing.rounds == 7


def test_turns_alternate_after_the_warm_up() -> None:
    machine = Machine()
    paired_speedup(
        machine.work("A", always(0.02)),
        machine.work("B", always(0.02)),
        device="cpu",
        min_rounds=4,
        warmup=3,
        clock=machine.clock,
    )
    # Three calls each to warm up, one each to find the repeats, then the rounds.
    assert "".join(machine.calls) == "AAABBB" + "AB" + "ABBAABBA"


def test_short_calls_are_repeated_to_ten_milliseconds() -> None:
    machine = Machine()
    # Powers of two, so that the fake clock does not round.
    timing = paired_speedup(
        machine.work("A", always(2.0**-10)),
        machine.work("B", always(2.0**-13)),
        device="cpu",
        min_rounds=1,
        max_seconds=0.0,
        warmup=0,
        clock=machine.clock,
    )
    # Each callable has its own number of repeats, yet times are per call.
    assert timing.rounds == 1
    assert timing.baseline_seconds == 2.0**-10
    assert timing.candidate_seconds == 2.0**-13
    assert timing.speedup == 8.0
    # 10 ms are 10.24 and 81.92 calls; the search takes steps of at most eight times more.
    assert machine.calls.count("A") == (1 + 8 + 11) + 11
    assert machine.calls.count("B") == (1 + 8 + 64 + 82) + 82


def test_the_median_ignores_a_burst() -> None:
    machine = Machine()
    baseline = iter([0.02, *[0.02] * 3, 0.5, *[0.02] * 1000])
    timing = paired_speedup(
        machine.work("A", baseline),
        machine.work("B", always(0.01)),
        device="cpu",
        max_seconds=10.0,
        warmup=0,
        clock=machine.clock,
    )
    assert timing.speedup == pytest.approx(2.0, rel=1e-9)
    assert timing.baseline_seconds == pytest.approx(0.02, rel=1e-9)


def test_ratios_are_taken_within_a_round() -> None:
    machine = Machine()
    # The machine slows down threefold half-way: the medians of the times move, the ratios do not.
    slow = [0.02] * 4 + [0.06] * 100
    timing = paired_speedup(
        machine.work("A", iter(slow)),
        machine.work("B", iter([seconds / 2 for seconds in slow])),
        device="cpu",
        max_seconds=10.0,
        warmup=0,
        clock=machine.clock,
    )
    assert timing.speedup == pytest.approx(2.0, rel=1e-9)
    assert timing.spread == pytest.approx(0.0, abs=1e-9)


def test_noisy_ratios_get_more_rounds_until_the_time_is_over() -> None:
    machine = Machine()
    noisy = in_turn(0.02, 0.04, 0.03)
    timing = paired_speedup(
        machine.work("A", noisy), machine.work("B", always(0.02)), device="cpu", max_seconds=2.0, clock=machine.clock
    )
    # A round takes 0.05 s on average.
    assert 36 <= timing.rounds <= 42
    assert timing.speedup == pytest.approx(1.5, rel=1e-9)
    # Ratios 1, 1.5 and 2 in equal shares: the quartiles are 1 and 2.
    assert timing.spread == pytest.approx(1.0, rel=1e-9)


def test_rounds_stop_once_the_ratio_is_precise() -> None:
    machine = Machine()
    timing = paired_speedup(
        machine.work("A", in_turn(0.02, 0.0206)),
        machine.work("B", always(0.02)),
        device="cpu",
        max_seconds=1e9,
        clock=machine.clock,
    )
    # Ratios 1 and 1.03: 1.2533 * .03 / 1.349 / sqrt(n) <= .005 * 1.015 from n = 31 on.
    assert 28 <= timing.rounds <= 36


def test_min_rounds_are_run_however_long_they_take() -> None:
    machine = Machine()
    timing = paired_speedup(
        machine.work("A", always(100.0)), machine.work("B", always(100.0)), device="cpu", clock=machine.clock
    )
    assert timing.rounds == 7


def test_garbage_collection_is_off_while_timing_and_on_again_after_a_failure() -> None:
    seen: list[bool] = []

    def fail() -> object:
        seen.append(gc.isenabled())
        raise RuntimeError("no kernel")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="no kernel"):
        paired_speedup(fail, fail, device="cpu", warmup=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(("min_rounds", "warmup"), [(0, 2), (7, -1)])
def test_illegal_options(min_rounds: int, warmup: int) -> None:
    with pytest.raises(OptionError, match=f"min_rounds={min_rounds}, warmup={warmup} is not legal"):
        paired_speedup(object, object, device="cpu", min_rounds=min_rounds, warmup=warmup)
