"""The trained models that accuracy is measured on: what calibrates them, what measures them, what is asked of them.

Calibration data is unlabelled and never measures; test data measures and chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Batch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fx import Keep
from lowrank_fx.demo import load_encoder

TEST_SENTENCES = 600
IMAGE_BATCH = 128
WINDOW = 128
LANGUAGE_WINDOWS = 512


@dataclass(frozen=True)
class Aim:
    """One target, and what is asked of it.

    Attributes:
        target: what is kept.
        plain: the figure asked for without refinement; None where none is.
        refined: the figure asked for with refinement.
        steps: of refinement; None for as many as the model's hardest target takes.
        regauged: the same target with re-gauged pairs, where it is measured too.
    """

    target: Keep
    plain: float | None
    refined: float | None
    steps: int | None = None
    regauged: Keep | None = None


@dataclass(frozen=True)
class Measured:
    """A figure, its standard error where it has one, and what else is worth a column."""

    value: float
    error: float | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A trained model with its data.

    Attributes:
        title: of its section.
        about: what is measured on what, in sentences.
        model: trained, in eval mode.
        loader: calibration batches.
        measure: the figure of a model that stands for it.
        figure: what the figure is called.
        rising: whether a higher figure is better.
        extra: headers of :attr:`Measured.extra`.
        language: whether it is a language model, whose errors are measured by KL.
        aims: the targets.
    """

    title: str
    about: str
    model: nn.Module
    loader: Sequence[Any]
    measure: Callable[[nn.Module], Measured]
    figure: str
    rising: bool
    aims: tuple[Aim, ...]
    extra: tuple[str, ...] = ()
    language: bool = False


# ---- the sentence encoder --------------------------------------------------------------------------------------------


def minilm(data: Path) -> Subject:
    """all-MiniLM-L6-v2 with mean pooling: cosine of its embeddings to the original's."""
    model, tokenizer = load_encoder()
    scores, first, second = pairs = common.sentence_pairs(data, "dev")
    sentences = common.unique_sentences(pairs)
    known = set(common.unique_sentences(common.sentence_pairs(data, "train")))
    test = [place for place, sentence in enumerate(sentences) if sentence not in known][:TEST_SENTENCES]
    batches = common.token_batches(tokenizer, sentences)
    places = {sentence: place for place, sentence in enumerate(sentences)}
    left, right = ([places[sentence] for sentence in side] for side in (first, second))

    def agreement(vectors: Tensor) -> float:
        return rank_correlation(scores, F.cosine_similarity(vectors[left], vectors[right]).numpy())

    original = embeddings(model, batches)

    def measure(made: nn.Module) -> Measured:
        vectors = embeddings(made, batches)
        cosines = F.cosine_similarity(vectors[test], original[test])
        error = float(cosines.std()) / math.sqrt(len(test))
        return Measured(float(cosines.mean()), error, (f"{agreement(vectors):.4f}",))

    asked = ((0.8, 0.965, 0.985, 100), (0.67, 0.93, 0.97, 100), (0.5, 0.86, 0.94, None))
    return Subject(
        title="all-MiniLM-L6-v2, mean pooling",
        about=(
            f"Calibrated on {common.CALIBRATION_SENTENCES:,} unlabelled sentences of STS-B train. *Cosine*: mean over "
            f"{len(test)} dev sentences that are not in train, to the original's embeddings. *Spearman*: of the cosine "
            f"of a pair's embeddings with the human score, over all {len(scores):,} dev pairs; "
            f"{agreement(original):.4f} for the original. Shares are of the encoder's linear weights."
        ),
        model=model,
        loader=common.calibration_batches(data, tokenizer),
        measure=measure,
        figure="cosine",
        rising=True,
        aims=tuple(
            Aim(Keep(params=share, of="sites"), plain, refined, steps, Keep(params=share, of="sites", regauge=True))
            for share, plain, refined, steps in asked
        ),
        extra=("Spearman",),
    )


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


# ---- image classifiers -----------------------------------------------------------------------------------------------


def resnet20(data: Path) -> Subject:
    """ResNet-20 on CIFAR-10: points of accuracy lost at a share of all parameters."""
    aims = tuple(
        Aim(Keep(params=share), plain, refined)
        for share, plain, refined in ((0.6, 1.0, 0.5), (0.5, 2.5, 1.2), (0.4, 6.0, 3.0))
    )
    return _classifier(data, "ResNet-20, CIFAR-10", _resnet(data, 20), aims, "all parameters", 1024)


def resnet56(data: Path) -> Subject:
    """ResNet-56 on CIFAR-10: points of accuracy lost at a share of all FLOPs."""
    return _classifier(
        data, "ResNet-56, CIFAR-10", _resnet(data, 56), (Aim(Keep(flops=0.6), 0.8, 0.4),), "all FLOPs", 1024
    )


def vit(data: Path) -> Subject:
    """A small ViT on CIFAR-10: points of accuracy lost at a share of its linear weights."""
    networks = common.data_module(data, "models_vit")
    model = networks.load_vit(data / "cifar10" / "vit_cifar10_d4.safetensors")
    aims = (Aim(Keep(params=0.6, of="sites"), 1.0, 0.5),)
    return _classifier(data, "ViT, CIFAR-10", (model, model.preprocess), aims, "the linear weights", 1024)


def _resnet(data: Path, depth: int) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    networks = common.data_module(data, "models_cifar")
    return networks.load_cifar_resnet(data / "cifar10" / f"resnet{depth}.safetensors", depth), networks.preprocess


def _classifier(
    data: Path,
    title: str,
    taken: tuple[nn.Module, Callable[[Any], Tensor]],
    aims: tuple[Aim, ...],
    shares: str,
    images: int,
) -> Subject:
    model, preprocess = taken
    reader = common.data_module(data, "data_io")
    training = preprocess(reader.load_cifar10(data / "cifar10" / "cifar10_train2k.npz", images)[0])
    pictures, labels, _ = reader.load_cifar10(data / "cifar10" / "cifar10_test4k.npz")
    test, truth = preprocess(pictures), torch.as_tensor(labels)
    before = right_answers(model, test, truth)

    def measure(made: nn.Module) -> Measured:
        after = right_answers(made, test, truth)
        broken, mended = int((before & ~after).sum()), int((after & ~before).sum())
        return Measured(*points_lost(broken, mended, len(truth)), (str(broken), str(mended)))

    return Subject(
        title=title,
        about=(
            f"Calibrated on {images:,} unlabelled training images; measured on {len(truth):,} test images, of which "
            f"the original gets {100 * float(before.double().mean()):.2f} % right. *Broken*: images that only the "
            "original gets right; *mended*: those that only the factored model gets right. ± is the standard error of "
            f"the difference, from these two counts. Shares are of {shares}."
        ),
        model=model,
        loader=torch.split(training, IMAGE_BATCH),
        measure=measure,
        figure="points lost",
        rising=False,
        aims=aims,
        extra=("broken", "mended"),
    )


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


# ---- the language model ----------------------------------------------------------------------------------------------


def language_model(data: Path) -> Subject:
    """A small Llama on stories: by how much its perplexity rises at a share of its linear weights."""
    networks = common.data_module(data, "models_lm")
    model = networks.load_tiny_llama(data / "lm" / "stories260K.safetensors", tie=False)
    with np.load(data / "lm" / "tinystories_ids.npz") as stored:
        ids = torch.as_tensor(stored["tok512"].astype(np.int64))
    cut = len(ids) * 4 // 5
    training, test = (_windows(part) for part in (ids[:cut], ids[cut:]))
    training = training[:: max(1, len(training) // LANGUAGE_WINDOWS)][:LANGUAGE_WINDOWS]
    test = test[:: max(1, len(test) // LANGUAGE_WINDOWS)][:LANGUAGE_WINDOWS]
    before = math.exp(networks.nll_per_token(model, test))

    def measure(made: nn.Module) -> Measured:
        return Measured(math.exp(networks.nll_per_token(made, test)) - before)

    return Subject(
        title="A Llama of 260 k parameters, stories",
        about=(
            f"Calibrated on {len(training)} windows of {WINDOW} tokens from the first 80 % of the stories; measured on "
            f"{len(test)} windows of the rest, where the original's perplexity is {before:.3f}. *Perplexity rise*: by "
            "how much it grows. Shares are of the linear weights, the head's included (it is held apart from the "
            "embedding). What is asked: half of what uniform output PCA loses."
        ),
        model=model,
        loader=[part[:, :-1].contiguous() for part in torch.split(training, 32)],
        measure=measure,
        figure="perplexity rise",
        rising=False,
        aims=tuple(Aim(Keep(params=share, of="sites"), None, None) for share in (0.8, 0.6)),
        language=True,
    )


def _windows(ids: Tensor) -> Tensor:
    return ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "minilm": minilm,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vit": vit,
    "lm": language_model,
}
