"""What holds for every test: the verifier is on, few threads, and torchvision can be imported."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
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


def _stand_in_for_torchvision_operators() -> torch.library.Library | None:
    """Declare the operators that importing torchvision asks for, where its compiled library does not load.

    timm needs torchvision, and transformers imports it when it is installed; but a torchvision built for CUDA does not
    load beside a torch built without, and then its import fails for two operators that no test calls.

    Returns:
        The library that holds the declarations, which last as long as it does; None where torchvision is not
        installed or brings its own operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for compiled in sorted(Path(spec.origin).parent.glob("_C.*")):
        try:
            torch.ops.load_library(compiled)  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


_TORCHVISION = _stand_in_for_torchvision_operators()
