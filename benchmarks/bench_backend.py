"""What does ``torch.compile(model, backend="lowrank_fx")`` cost the caller?

Two ratios of paired turns, per model: a call that is calibrated over a plain eager call (asked: at most 2), and a call
after the switch over one of the module that ``optimize`` returns for the same factors, both compiled by inductor
(asked: at most 1.03). Weights and inputs are random: what is measured does not depend on values.

The page goes to results/backend.md and says whether both were met; with ``--check`` the exit status says so too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx.latency import PairedTiming, paired_speedup

CALIBRATING, SETTLED = 2.0, 1.03
"""What is asked: the time of a call over that of its rival."""


@dataclass(frozen=True)
class Subject:
    """A model and the shape of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def encoder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def convolutions() -> nn.Module:
    parts: list[nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 128), (128, 256)):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256))


SUBJECTS = (
    Subject("encoder, 6 layers of 384, 8 x 128 tokens", lambda: encoder(384, 6), (8, 128, 384)),
    Subject("encoder, 6 layers of 384, 1 x 16 tokens", lambda: encoder(384, 6), (1, 16, 384)),
    Subject("convolutions, 4 images of 32 x 32", convolutions, (4, 3, 32, 32)),
    Subject("MLP of 1024, 256 rows", mlp, (256, 256)),
)


def batches(subject: Subject, count: int) -> list[Tensor]:
    return [torch.randn(*subject.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def calibrating(model: nn.Module, call: Tensor) -> PairedTiming:
    """A plain eager call against one that is calibrated; every fifth of these is held out, as in use."""
    torch.compiler.reset()
    fast = torch.compile(model, backend="lowrank_fx", options={"calibration_steps": 1 << 30, "inner": "eager"})
    return paired_speedup(lambda: model(call), lambda: fast(call), device="cpu", warmup=3, turn_seconds=0.2)


def settled(model: nn.Module, calls: list[Tensor]) -> PairedTiming:
    """The module that ``optimize`` returns against the compiled model with the same factors."""
    torch.compiler.reset()
    target = lowrank_fx.Keep(flops=0.5)
    small = lowrank_fx.optimize(model, calls, target=target, effort="low", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        small.save(folder)
        fast = torch.compile(model, backend="lowrank_fx", options={"plan": folder})
        fast(calls[0])
    return paired_speedup(lambda: small(calls[0]), lambda: fast(calls[0]), device="cpu", warmup=5, turn_seconds=0.2)


def main() -> int:
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", type=int, help="number of the one subject to measure; no page is written")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is not what is asked")
    given = parser.parse_args()
    rows, reached = [], True
    chosen = SUBJECTS if given.only is None else SUBJECTS[given.only : given.only + 1]
    for subject in chosen:
        torch.manual_seed(0)
        model = subject.make().eval()
        with torch.no_grad():
            first, second = calibrating(model, batches(subject, 1)[0]), settled(model, batches(subject, 6))
        ratios = [1 / first.speedup, 1 / second.speedup]
        reached = reached and ratios[0] <= CALIBRATING and ratios[1] <= SETTLED
        rows.append(
            [
                subject.name,
                f"{1e3 * first.baseline_seconds:.2f}",
                f"{ratios[0]:.2f}",
                f"{1e3 * second.baseline_seconds:.2f}",
                f"{ratios[1]:.3f}",
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    if given.only is None:
        header = ["model", "eager, ms", "calibrating", "optimize, ms", "settled"]
        asked = f"Asked: calibrating at most {CALIBRATING:g}, settled at most {SETTLED:g}. {common.met(reached)}"
        lines = [
            "# What the torch.compile backend costs the caller",
            "",
            *common.machine(given.date),
            "",
            *common.table(header, rows),
            "",
            *common.paragraph(asked),
        ]
        common.publish(given.out, "backend.md", lines)
    return 1 if given.check and not reached else 0


if __name__ == "__main__":
    sys.exit(main())
