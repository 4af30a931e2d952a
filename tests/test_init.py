"""The package's public names, and that asking for help does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lowrank_fx


def test_every_public_name_has_a_home() -> None:
    for name in lowrank_fx.__all__:
        assert getattr(lowrank_fx, name).__module__.startswith("lowrank_fx."), name
    assert set(lowrank_fx.__all__) <= set(dir(lowrank_fx))
    assert sorted(name for names in lowrank_fx._HOMES.values() for name in names) == sorted(lowrank_fx.__all__)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lowrank_fx' has no attribute 'optimise'"):
        lowrank_fx.optimise  # noqa: B018


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, lowrank_fx.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
