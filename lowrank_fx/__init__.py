"""lowrank_fx: a ``torch.fx`` compiler pass that makes trained models smaller and faster by factoring their layers.

>>> import torch, lowrank_fx
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
>>> batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]
>>> small = lowrank_fx.optimize(model, batches, target=lowrank_fx.Keep(params=0.5), compile=False)
>>> small(batches[0]).shape
torch.Size([16, 8])
"""

from __future__ import annotations

from lowrank_fx.errors import (
    CalibrationError,
    CallError,
    CaptureError,
    LowRankError,
    OptionError,
    PassError,
    PlanError,
    StorageError,
    TargetError,
)
from lowrank_fx.module import LowRankModule
from lowrank_fx.pipeline import load, optimize
from lowrank_fx.plan import Plan, SitePlan
from lowrank_fx.report import Report
from lowrank_fx.targets import Keep, Tolerance

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CallError",
    "CaptureError",
    "Keep",
    "LowRankError",
    "LowRankModule",
    "OptionError",
    "PassError",
    "Plan",
    "PlanError",
    "Report",
    "SitePlan",
    "StorageError",
    "TargetError",
    "Tolerance",
    "load",
    "optimize",
]
