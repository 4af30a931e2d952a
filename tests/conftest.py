"""What holds for every test: the verifier is on, few threads, and torchvision can be imported."""

from __future__ import annotations

import os
import tempfile

import torch
import torchvision_operators  # noqa: F401 - timm and transformers can be imported
from hypothesis import settings

from lowrank_fx import latency, timed_operators
from lowrank_fx.latency import PairedTiming

# Set before any test imports lowrank_fx, and only where the caller did not choose: `LOWRANK_FX_CHECK=0 pytest` works.
os.environ.setdefault("LOWRANK_FX_CHECK", "1")

# How long an example takes is the machine's affair.
settings.register_profile("lowrank_fx", deadline=None)
settings.load_profile("lowrank_fx")

# What a timing says is not tested, only that there is one.
latency.MAX_SECONDS = 0.5

# Measured times of no test stay on the machine, and those of the machine decide no test.
_CACHE = tempfile.TemporaryDirectory(prefix="lowrank_fx_test_cache_")
os.environ["LOWRANK_FX_CACHE"] = _CACHE.name


def _as_flops(operator: timed_operators.Operator, pair: timed_operators.Pair, *_: object, **__: object) -> PairedTiming:
    """The timing of an operator if time followed FLOPs, at one GFLOP a second: plans hang on no clock."""
    dense, factored = (operator.flops(each) * 1e-9 for each in (None, pair))
    return PairedTiming(dense / factored, dense, factored, 0.0, 9)


timed_operators.measure = _as_flops

# Sums depend on how they are split over threads; a fixed small number makes tolerances mean the same everywhere. Where
# tests run side by side, each process keeps to a core, and so do the processes that it starts.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
