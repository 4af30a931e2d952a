"""How much of a trained model's accuracy is left when layers are factored, without labels and without training?

Two real models, each calibrated on unlabelled training data and measured on data that calibration never saw:

- all-MiniLM-L6-v2 (sentence encoder, mean pooling): cosine of the embeddings to the original's, and rank correlation
  with human scores;
- ResNet-20 on CIFAR-10: points of accuracy lost.

Nothing is compiled: compiling changes the speed, not the accuracy. The page goes to results/accuracy.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Batch
from torch import Tensor, nn

from lowrank_fx import Keep, LowRankModule, optimize
from lowrank_fx._render import number, percent, speed
from lowrank_fx.demo import load_encoder

COSINES = ((0.8, 0.95), (0.67, 0.90), (0.5, 0.82))
"""Share of the layers' parameters kept, and the least cosine asked for."""

POINTS = ((0.8, 0.8), (0.7, 1.8), (0.6, 4.5))
"""Share of all parameters kept, and the most points of accuracy that may be lost."""

TEST_SENTENCES = 600
TRAINING_IMAGES = 1024
IMAGE_BATCH = 128

PLAN_COLUMNS = ("of all parameters", "held-out error", "predicted", "won", "speed, eager")


def main() -> None:
    """Measure what there is data for, and write the page."""
    parser = common.option_parser(__doc__)
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        print("skipped: there is no data folder (--data-dir), so nothing was measured and no page written")
        return
    facts = common.machine(options.date)
    lines = ["# Accuracy that is left without labels and without training", "", *facts, ""]
    lines += [*sentence_encoder(data), "", *image_classifier(data), "", *common.paragraph(LEGEND)]
    common.publish(options.out, "accuracy.md", lines)


LEGEND = (
    "*Held-out error*: relative L2 error of the model's outputs on calibration data that chose nothing; *predicted*: "
    "the same from the layers' measured effects, added in squares. *Won*: the allocation that did best on other "
    "held-out data. *Speed, eager*: against the original on one calibration batch, uncompiled, in paired turns."
)


def models(model: nn.Module, loader: Sequence[Any], targets: Sequence[Keep]) -> Iterator[LowRankModule]:
    """The model for each target, all from one calibration."""
    made: LowRankModule | None = None
    for target in targets:
        made = optimize(model, loader, target=target, compile=False) if made is None else made.replan(target)
        yield made


def plan_cells(made: LowRankModule) -> tuple[str, ...]:
    """The cells of ``PLAN_COLUMNS``."""
    plan, timing = made.plan, made.timing
    return (
        percent(plan.totals.kept("params", "model")),
        number(plan.error),
        number(plan.predicted_error),
        plan.candidate,
        "-" if timing is None else speed(timing.speedup),
    )


# ---- the sentence encoder --------------------------------------------------------------------------------------------


def sentence_encoder(data: Path) -> list[str]:
    """The section on all-MiniLM-L6-v2."""
    model, tokenizer = load_encoder()
    scores, first, second = pairs = common.sentence_pairs(data, "dev")
    sentences = common.unique_sentences(pairs)
    known = set(common.unique_sentences(common.sentence_pairs(data, "train")))
    test = [place for place, sentence in enumerate(sentences) if sentence not in known][:TEST_SENTENCES]
    batches = common.token_batches(tokenizer, sentences)
    places = {sentence: place for place, sentence in enumerate(sentences)}
    left, right = ([places[sentence] for sentence in side] for side in (first, second))

    def agreement(vectors: Tensor) -> float:
        return rank_correlation(scores, nn.functional.cosine_similarity(vectors[left], vectors[right]).numpy())

    original = embeddings(model, batches)
    before = agreement(original)
    loader = common.calibration_batches(data, tokenizer)
    targets = [Keep(params=share, of="sites") for share, _ in COSINES]
    rows = []
    for (_, asked), made in zip(COSINES, models(model, loader, targets), strict=True):
        vectors = embeddings(made, batches)
        cosine = float(nn.functional.cosine_similarity(vectors[test], original[test]).mean())
        rows.append(
            (
                percent(made.plan.totals.kept("params", "sites")),
                f"{cosine:.4f}",
                f"{asked:.2f}",
                common.met(cosine >= asked),
                f"{agreement(vectors):.4f}",
                *plan_cells(made),
            )
        )
    header = ("layers' parameters kept", "cosine", "asked, at least", "met", "Spearman", *PLAN_COLUMNS)
    return [
        "## all-MiniLM-L6-v2, mean pooling",
        "",
        *common.paragraph(
            f"Calibrated on {common.CALIBRATION_SENTENCES:,} unlabelled sentences of STS-B train. *Cosine*: mean over "
            f"{len(test)} dev sentences that are not in train, to the original's embeddings. *Spearman*: of the cosine "
            f"of a pair's embeddings with the human score, over all {len(scores):,} dev pairs; {before:.4f} for the "
            "original."
        ),
        "",
        *common.table(header, rows),
    ]


def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Embeddings, float64 ``[sentences, width]``."""
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in batches]).double()


def rank_correlation(first: Any, second: Any) -> float:
    """Spearman's correlation of two arrays: Pearson's of their ranks, where ties share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Any) -> Any:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


# ---- the image classifier --------------------------------------------------------------------------------------------


def image_classifier(data: Path) -> list[str]:
    """The section on ResNet-20."""
    networks, reader = (common.data_module(data, name) for name in ("models_cifar", "data_io"))
    folder = data / "cifar10"
    model = networks.load_cifar_resnet(folder / "resnet20.safetensors", 20)
    training = networks.preprocess(reader.load_cifar10(folder / "cifar10_train2k.npz", TRAINING_IMAGES)[0])
    images, labels, _ = reader.load_cifar10(folder / "cifar10_test4k.npz")
    test, truth = networks.preprocess(images), torch.as_tensor(labels)

    before = right_answers(model, test, truth)
    loader = torch.split(training, IMAGE_BATCH)
    rows = []
    for (_, asked), made in zip(
        POINTS, models(model, loader, [Keep(params=share) for share, _ in POINTS]), strict=True
    ):
        after = right_answers(made, test, truth)
        broken, mended = int((before & ~after).sum()), int((after & ~before).sum())
        lost, error = points_lost(broken, mended, len(truth))
        rows.append(
            (
                percent(made.plan.totals.kept("params", "model")),
                f"{lost:.2f} ± {error:.2f}",
                f"{asked:.1f}",
                common.met(lost <= asked),
                str(broken),
                str(mended),
                *plan_cells(made)[1:],
            )
        )
    header = ("parameters kept", "points lost", "asked, at most", "met", "broken", "mended", *PLAN_COLUMNS[1:])
    return [
        "## ResNet-20, CIFAR-10",
        "",
        *common.paragraph(
            f"Calibrated on {TRAINING_IMAGES:,} unlabelled training images; measured on {len(truth):,} test images, of "
            f"which the original gets {100 * float(before.double().mean()):.2f} % right. *Broken*: images that only "
            "the original gets right; *mended*: those that only the factored model gets right. ± is the standard "
            "error of the difference, from these two counts."
        ),
        "",
        *common.table(header, rows),
    ]


def right_answers(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a model gets right: bool ``[images]``."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(images, 250)]) == labels


def points_lost(broken: int, mended: int, images: int) -> tuple[float, float]:
    """Points of accuracy lost and their standard error, both models having seen the same images.

    An image's difference is 1, -1 or 0, so its variance is (broken + mended) / images less the squared mean.

    >>> points_lost(30, 10, 4000)[0]
    0.5
    """
    mean = (broken - mended) / images
    variance = (broken + mended) / images - mean**2
    return 100 * mean, 100 * math.sqrt(variance / images)


if __name__ == "__main__":
    main()
