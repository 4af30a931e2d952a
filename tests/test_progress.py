from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from lowrank_fx._progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(seconds: float, steps: int, *, terminal: bool, **options: Any) -> str:
    """What is printed by ``steps`` steps that take ``seconds`` in all."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, force_interactive=terminal, width=100, color_system=None)
    clock = Clock()
    with Progress("calibrate [1]", console=console, clock=clock, **options) as bar:
        for step in range(steps):
            clock.now += seconds / steps
            bar.advance(1, note=f"batch [{step}]")
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_short_work_prints_nothing(terminal: bool) -> None:
    assert run(1.9, 10, terminal=terminal, total=10) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_disabled_prints_nothing(terminal: bool) -> None:
    assert run(60.0, 10, terminal=terminal, total=10, enabled=False) == ""


def test_elsewhere_than_on_a_terminal_one_line_closes_long_work() -> None:
    assert run(12.5, 10, terminal=False, total=10) == "calibrate [1]: 10 of 10 in 12.5 s\n"
    assert run(12.5, 10, terminal=False) == "calibrate [1]: 10 in 12.5 s\n"


def test_terminal_shows_label_count_note_and_the_whole_time() -> None:
    printed = run(12.0, 10, terminal=True, total=10)
    assert "calibrate [1]" in printed
    assert "batch [3]" in printed
    # The bar appears at the second step, after 2.4 s.
    assert "batch [0]" not in printed
    assert "2/10" in printed
    last = printed.split("calibrate [1]")[-1]
    assert "10/10" in last
    assert "0:00:12" in last


def test_unknown_total_on_a_terminal() -> None:
    assert "10/?" in run(12.0, 10, terminal=True)


def test_bar_is_not_redrawn_more_than_ten_times_a_second() -> None:
    # 3 s in 3000 steps, shown for the last second: at most 10 frames, the first and the last one.
    assert run(3.0, 3000, terminal=True, total=3000).count("calibrate [1]") <= 2 * 12


def test_failing_work_leaves_the_message_to_the_error() -> None:
    screen = io.StringIO()
    clock = Clock()

    def work() -> None:
        with Progress("plan", console=Console(file=screen, force_terminal=False), clock=clock):
            clock.now += 60
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert screen.getvalue() == ""


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("plan", clock=clock) as bar:
        clock.now += 5
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "plan: 1 in 5.0 s\n"
