"""Importing this makes torchvision importable where its compiled library does not load; timm needs that."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _stand_in() -> torch.library.Library | None:
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


_KEPT = _stand_in()
