"""The demos: real models, made smaller for several targets, and what that costs.

``encoder`` is the main job, a sentence encoder; ``digits`` trains a small classifier in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_fx.demo import digits, encoder
from lowrank_fx.demo.encoder import load_encoder
from lowrank_fx.demo.show import Job, Measured, run_job
from lowrank_fx.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JOBS", "load_encoder", "run_demo"]

JOBS: Mapping[str, Callable[[], Job]] = {"encoder": encoder.job, "digits": digits.job}


def run_demo(
    name: str, out: Path, *, compile: bool = True, progress: bool = True, console: Console | None = None
) -> list[Measured]:
    """Run a demo: print what came of it, and write a page and the optimized model into ``out``.

    Args:
        name: ``"encoder"`` or ``"digits"``.
        out: the folder, which is made if it does not exist.
        compile: compile the models with inductor; False is faster, and its speeds say less.
        progress: say what is being done, and show bars for work over two seconds.
        console: where to print; stdout by default.

    Returns:
        A measurement per target, in their order.

    Raises:
        OptionError: there is no such demo.
        LowRankError: the extra ``demo`` is not installed, or data are missing.
    """
    if name not in JOBS:
        raise OptionError(f"there is no demo {name!r}; there are {list(JOBS)}")
    return run_job(JOBS[name](), out, compile=compile, progress=progress, console=console)
