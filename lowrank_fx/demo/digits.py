"""A small convolutional network on scikit-learn's handwritten digits, trained in seconds; accuracy before and after.

The data are 1,797 images of 8 x 8 pixels (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998), as scikit-learn carries them: 1,000 train the network, 397 calibrate without their
labels, 400 test.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_fx._render import percent
from lowrank_fx.demo.show import Job, Score
from lowrank_fx.errors import LowRankError
from lowrank_fx.origin import Origin
from lowrank_fx.targets import Keep, Target, Tolerance

TARGETS: tuple[Target, ...] = (Tolerance(0.1), Keep(flops=0.25), Keep(flops=0.1), Keep(params=0.05))

SHOWN: Target = TARGETS[1]
"""The target whose layers the page shows, and whose model is saved."""

TRAIN, CALIBRATION, TEST = 1000, 397, 400
BATCH = 50
EPOCHS = 8
LEARNING_RATE = 4e-3


class DigitsNet(nn.Sequential):
    """Three 3 x 3 convolutions with batch norms and two linear layers, 749,514 parameters.

    Called with float32 ``[batch, 1, 8, 8]`` in [0, 1] it gives the scores of ten digits, float32 ``[batch, 10]``.
    """

    def __init__(self) -> None:
        super().__init__(
            *self._convolution(1, 64),
            *self._convolution(64, 128),
            nn.MaxPool2d(2),
            *self._convolution(128, 128),
            nn.Flatten(),
            nn.Linear(128 * 4 * 4, 256),
            nn.ReLU(),
            nn.Linear(256, 10),
        )

    @staticmethod
    def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(frozen=True)
class Digits:
    """Images, float32 ``[n, 1, 8, 8]`` in [0, 1], in three parts without a common image; labels for two of them."""

    train: Tensor
    train_labels: Tensor
    calibration: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The digits in three parts, the same on every call.

    Raises:
        LowRankError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise LowRankError('the demo needs scikit-learn: run pip install "lowrank_fx[demo]"') from error
    found = datasets.load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, calibration, test = torch.split(order, [TRAIN, CALIBRATION, TEST])
    return Digits(images[train], labels[train], images[calibration], images[test], labels[test])


def train_digits(data: Digits, *, epochs: int = EPOCHS, seed: int = 0) -> DigitsNet:
    """Train the network by AdamW with a one-cycle schedule; global random state is not touched.

    Args:
        data: its training part is used.
        epochs: passes over that part, at least 1.
        seed: of the initial weights and of the order of the images.

    Returns:
        The network in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    shuffled = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(data.train), generator=shuffled), BATCH):
                scores = model(data.train[rows])
                loss = nn.functional.cross_entropy(scores, data.train_labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval()


def fresh_batches() -> list[Tensor]:
    """The test images in batches, for ``lowrank-fx compare``."""
    return list(torch.split(load_digits().test, BATCH))


def job() -> Job:
    """The demo; trains the network.

    Raises:
        LowRankError: scikit-learn is not installed.
    """
    data = load_digits()
    model = train_digits(data)
    original = predict(model, data.test)

    def measure(candidate: nn.Module) -> tuple[float, ...]:
        found = predict(candidate, data.test)
        return _share(found == data.test_labels), _share(found == original)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Job(
        title="A digit classifier, made smaller",
        about=(
            f"A convolutional network of {parameters:,} parameters, trained on {TRAIN:,} of scikit-learn's handwritten "
            f"digits, calibrated on {CALIBRATION} others without labels, tested on {TEST} others."
        ),
        model=model,
        calibration=torch.split(data.calibration, BATCH),
        targets=TARGETS,
        shown=SHOWN,
        scores=(Score("accuracy", "accuracy", percent), Score("same digit as the original", "same", percent)),
        measure=measure,
        legend="the accuracy and the share of images that get the same digit as by the original",
        explained=(
            "Held-out error is the relative L2 error of the scores on calibration images that were held out. Accuracy, "
            "and the share of images that get the same digit as by the original, are of the test images."
        ),
        origin=Origin(f"{__name__}:DigitsNet", f"{__name__}:fresh_batches", fresh=True, weights="original.safetensors"),
    )


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The digit of the highest score for every image: ``[n, 1, 8, 8]`` gives int64 ``[n]``."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return torch.cat([model(batch).argmax(1) for batch in torch.split(images, BATCH)])


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
