"""How much do Frequent Directions give away against exact second moments, and how tight is their certificate?

On the taps of all-MiniLM-L6-v2 over 1,500 sentences, with sketches of l = 2 k rows for factors of rank k. Both kinds of
factors are measured on the exact Gram. *Loss*: the error of the factors planned from the sketch over that of the
factors planned from the exact Gram. *Bound*: what the sketch certifies for its own factors, over their error. And the
rows per second that each mode takes in. The page goes to results/sketch.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import common
import torch

from lowrank_fx import calibrate
from lowrank_fx.calibration import Calibration
from lowrank_fx.demo import load_encoder
from lowrank_fx.forms import FORMS
from lowrank_fx.latency import paired_speedup
from lowrank_fx.pipeline import take
from lowrank_fx.sketch import FrequentDirections

RANKS = (32, 64, 96)
MOST_LOSS, MOST_BOUND = 1.01, 1.5
"""What is asked at most of the median layer, as ratios of errors (not squared)."""

SPEEDS = ((384, 192), (1536, 192), (4096, 512))
ROWS = 8192


def main() -> None:
    """Measure, and write the page."""
    parser = common.option_parser(__doc__)
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    lines = ["# Frequent Directions against exact second moments", "", *common.machine(options.date), ""]
    lines += [*common.paragraph(LEGEND), "", *quality(data), "", "## Speed", "", *common.paragraph(SPEED), "", *speed()]
    common.publish(options.out, "sketch.md", lines)


LEGEND = (
    "all-MiniLM-L6-v2, the taps of its 36 linear layers over 1,500 sentences; sketches of l = 2 k rows. *Loss*: the "
    "error of the rank-k factors planned from the sketch over that of those planned from the exact Gram, both on the "
    "exact Gram. *Bound*: what the sketch certifies of its factors' error over that error."
)

SPEED = f"Seconds for {ROWS:,} float32 rows of standard normal numbers in blocks of 1,024, in paired turns."


def quality(data: Path) -> list[str]:
    """A row per rank."""
    model, tokenizer = load_encoder()
    batches = common.calibration_batches(data, tokenizer)
    exact = calibrate(model, batches)
    rows = []
    for rank in RANKS:
        losses, bounds = measured(model, exact, calibrate(model, batches, sketch_size=2 * rank), rank)
        met = statistics.median(losses) <= MOST_LOSS and statistics.median(bounds) <= MOST_BOUND
        rows.append((str(rank), str(2 * rank), *spread(losses), *spread(bounds), common.met(met)))
    header = ("k", "l", "loss, median", "worst", "bound, median", "worst", f"median within {MOST_LOSS}, {MOST_BOUND}")
    return common.table(header, rows, left=0)


def measured(
    model: torch.nn.Module, exact: Calibration, sketched: Calibration, rank: int
) -> tuple[list[float], list[float]]:
    """Loss and bound of every linear layer."""
    program = take(model, exact.example)
    table = program.find_sites()
    losses, bounds = [], []
    for site in table.sites:
        truth, sketch = exact.sketch_of(table, site), sketched.sketch_of(table, site)
        form = FORMS["lowrank"]
        if truth is None or sketch is None or not form.applies(site) or rank not in form.ranks(site):
            continue
        weight = program.weight(site)
        errors = {}
        for name, own in (("exact", truth), ("sketched", sketch)):
            curve = form.curve(site, weight, own)
            residual = site.matrix(weight).double() - form.factor(site, weight, curve, rank, own).dense_matrix()
            errors[name] = math.sqrt(truth.certificate(residual, centered=site.centered)[0])
        most = math.sqrt(sketch.certificate(residual, centered=site.centered)[1])
        losses.append(errors["sketched"] / errors["exact"])
        bounds.append(most / errors["sketched"])
    return losses, bounds


def spread(values: Sequence[float]) -> tuple[str, str]:
    """Median and worst."""
    return f"{statistics.median(values):.4f}", f"{max(values):.4f}"


def speed() -> list[str]:
    """A row per width."""
    rows = []
    for width, size in SPEEDS:
        blocks = torch.split(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)), 1024)

        def feed(mode: int | None, width: int = width, blocks: Sequence[torch.Tensor] = blocks) -> None:
            sketch = FrequentDirections(width, mode)
            for block in blocks:
                sketch.update(block)

        timing = paired_speedup(
            lambda feed=feed: feed(None),  # type: ignore[misc]
            lambda feed=feed, size=size: feed(size),  # type: ignore[misc]
            device="cpu",
            max_seconds=20.0,
        )
        rows.append(
            (
                str(width),
                str(size),
                f"{timing.baseline_seconds:.2f} s",
                f"{timing.candidate_seconds:.2f} s",
                f"{1 / timing.speedup:.2f}",
            )
        )
    return common.table(("d", "l", "exact", "Frequent Directions", "ratio"), rows, left=0)


if __name__ == "__main__":
    main()
