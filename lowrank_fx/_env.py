"""The environment variables of lowrank_fx, all of them, read in one place.

======================== ============================= ==========================================================
variable                 legal values                  meaning
======================== ============================= ==========================================================
LOWRANK_FX_CHECK         ``0`` (default), ``1``        verify the graph's invariants after every pass
LOWRANK_FX_MAX_REWRITES  empty (default), integer >= 0  each run of a pass manager applies only its first N rewrites
LOWRANK_FX_DUMP          empty (default), a folder     write the graph after every pass as readable text
LOWRANK_FX_CACHE         empty (default), a folder     keep measured times there, not in the user's cache folder
======================== ============================= ==========================================================

They are read when they are used, not at import, so a test or a bisection script can change them between runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from lowrank_fx.errors import OptionError


def check_enabled() -> bool:
    """Whether ``LOWRANK_FX_CHECK`` asks for the verifier between passes.

    Raises:
        OptionError: the variable is neither ``0`` nor ``1``.
    """
    value = os.environ.get("LOWRANK_FX_CHECK", "").strip() or "0"
    if value not in {"0", "1"}:
        raise OptionError(f"LOWRANK_FX_CHECK={value!r} is not legal; use 0 (off) or 1 (verify after every pass)")
    return value == "1"


def max_rewrites() -> int | None:
    """The number of rewrites ``LOWRANK_FX_MAX_REWRITES`` allows, or None for no limit.

    Raises:
        OptionError: the variable is not an integer of at least zero.
    """
    value = os.environ.get("LOWRANK_FX_MAX_REWRITES", "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise OptionError(
            f"LOWRANK_FX_MAX_REWRITES={value!r} is not legal; use an integer of at least 0, or leave it empty"
        )
    return int(value)


def dump_folder() -> Path | None:
    """The folder ``LOWRANK_FX_DUMP`` names, or None."""
    value = os.environ.get("LOWRANK_FX_DUMP", "").strip()
    return Path(value) if value else None


def cache_folder() -> Path:
    """The folder ``LOWRANK_FX_CACHE`` names, or that for this library in the user's cache folder; it need not exist."""
    value = os.environ.get("LOWRANK_FX_CACHE", "").strip()
    return Path(value) if value else platformdirs.user_cache_path("lowrank_fx", appauthor=False)
