"""lowrank_fx: a ``torch.fx`` compiler pass that makes trained models smaller and faster by factoring their layers.

>>> import torch, lowrank_fx
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
>>> batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]
>>> small = lowrank_fx.optimize(model, batches, target=lowrank_fx.Keep(params=0.5), compile=False)
>>> small(batches[0]).shape
torch.Size([16, 8])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowrank_fx.backend import Status, finish_calibration, refresh, status
    from lowrank_fx.calibration import Calibration
    from lowrank_fx.comparison import Comparison, compare_models
    from lowrank_fx.errors import (
        CalibrationError,
        CallError,
        CaptureError,
        ExportError,
        LowRankError,
        OptionError,
        PassError,
        PlanError,
        StorageError,
        TargetError,
    )
    from lowrank_fx.export import Exported
    from lowrank_fx.module import LowRankModule
    from lowrank_fx.onnx_frontend import OnnxResult, onnx_compress
    from lowrank_fx.pairs import fold_pairs
    from lowrank_fx.pipeline import calibrate, load, optimize
    from lowrank_fx.plan import Plan, SitePlan
    from lowrank_fx.refine_options import Refine
    from lowrank_fx.report import Report
    from lowrank_fx.targets import Keep, Metric, Tolerance

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationError",
    "CallError",
    "CaptureError",
    "Comparison",
    "ExportError",
    "Exported",
    "Keep",
    "LowRankError",
    "LowRankModule",
    "Metric",
    "OnnxResult",
    "OptionError",
    "PassError",
    "Plan",
    "PlanError",
    "Refine",
    "Report",
    "SitePlan",
    "Status",
    "StorageError",
    "TargetError",
    "Tolerance",
    "calibrate",
    "compare_models",
    "finish_calibration",
    "fold_pairs",
    "load",
    "onnx_compress",
    "optimize",
    "refresh",
    "status",
]

# Imported on first use: the command line answers --help and completes words without waiting for torch.
_HOMES = {
    "backend": ("Status", "finish_calibration", "refresh", "status"),
    "calibration": ("Calibration",),
    "comparison": ("Comparison", "compare_models"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "export": ("Exported",),
    "module": ("LowRankModule",),
    "onnx_frontend": ("OnnxResult", "onnx_compress"),
    "pairs": ("fold_pairs",),
    "pipeline": ("calibrate", "load", "optimize"),
    "plan": ("Plan", "SitePlan"),
    "refine_options": ("Refine",),
    "report": ("Report",),
    "targets": ("Keep", "Metric", "Tolerance"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"lowrank_fx.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
