"""``python -m lowrank_fx`` is the command ``lowrank-fx``."""

from __future__ import annotations

import sys

from lowrank_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
