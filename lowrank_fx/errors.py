"""Every error that lowrank_fx raises on purpose.

All of them derive from :class:`LowRankError`, so ``except LowRankError`` catches what the library can say about bad
input, and nothing else. A message repeats what was given, says where, and what to do.
"""

from __future__ import annotations


class LowRankError(Exception):
    """Base of every error raised on purpose by lowrank_fx."""


class CaptureError(LowRankError):
    """The model could not be captured as an FX graph."""


class CalibrationError(LowRankError):
    """The calibration data could not be used: empty, wrongly shaped, or with non-finite activations."""


class CallError(LowRankError):
    """An optimized model was called in a way it was not captured for."""


class TargetError(LowRankError):
    """A target is malformed, or no plan can reach it."""


class PlanError(LowRankError):
    """A plan is malformed, or does not fit the model it is applied to."""


class PassError(LowRankError):
    """A pass failed, or left a graph that breaks the graph's invariants."""


class StorageError(LowRankError):
    """A saved directory is missing, damaged, of another version, or made for other weights."""


class ExportError(LowRankError):
    """A model could not be written in a format for other runtimes, or the file does not compute what the model does."""


class OptionError(LowRankError):
    """An option, or an environment variable, has a value that is not among the legal ones."""
