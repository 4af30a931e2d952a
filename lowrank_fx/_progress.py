"""Progress of long work, on stderr, without getting in the way of short work."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PATIENCE = 2.0
_REFRESH_EVERY = 0.1


class Progress:
    """A progress bar that appears once the work has lasted two seconds.

    On a terminal (or in a notebook) it is a bar; elsewhere one line at the end says how long the work took. Work of
    less than two seconds, work that fails, and ``enabled=False`` print nothing of their own.

    Example::

        with Progress("calibrate", total=32, enabled=True) as bar:
            for batch in batches:
                ...
                bar.advance(1, note="batch 3")

    Args:
        label: what is being done, in a word or two.
        total: the number of steps, or None where it is not known.
        enabled: False prints nothing at all.
        console: where to print; stderr by default.
        clock: seconds that never go back; replaced in tests.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        enabled: bool = True,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._enabled = enabled
        self._console = console
        self._clock = clock
        self._done = 0
        self._note = ""
        self._started = 0.0
        self._next_look = 0.0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._clock()
        self._next_look = self._started + _PATIENCE
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count ``steps`` more steps; ``note`` is shown beside the bar until the next call."""
        self._done += steps
        self._note = note
        if not self._enabled:
            return
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + _REFRESH_EVERY
        self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds = self._clock() - self._started
        if self._bar is not None:
            self._note = ""
            self._show()
            self._bar.stop()
        elif self._enabled and error is None and seconds >= _PATIENCE:
            of_total = "" if self._total is None else f" of {self._total}"
            self._stderr().print(
                f"{self._label}: {self._done}{of_total} in {seconds:.1f} s", markup=False, highlight=False
            )

    def _show(self) -> None:
        console = self._stderr()
        if not (console.is_interactive or console.is_jupyter):
            return
        if self._bar is None:
            self._bar, self._task = self._start_bar(console)
        assert self._task is not None
        self._bar.update(self._task, completed=self._done, note=self._note)
        self._bar.refresh()

    def _start_bar(self, console: Console) -> tuple[RichProgress, TaskID]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        # The bar is redrawn by advance(), not by a thread: loaders that fork do so while it is shown.
        bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            auto_refresh=False,
            get_time=self._clock,
        )
        task = bar.add_task(self._label, total=self._total, note="")
        # rich would count from now, two seconds late.
        bar.tasks[0].start_time = self._started
        bar.start()
        return bar, task

    def _stderr(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console
