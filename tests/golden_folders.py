"""The models behind ``tests/golden``, and the way the folders there were made.

A folder ``tests/golden/v<N>`` holds models that were saved by a version of lowrank_fx that wrote format N. They are
never made again: every later version has to read them. For a new format::

    python tests/golden_folders.py tests/golden/v<N>
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule

GIVEN = "given.safetensors"
"""Beside each saved folder: the original's weights, inputs, and what the saved model returned for them."""


class Mlp(nn.Module):
    """Two linear layers, one without a bias, around a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.second = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(self.second(torch.tanh(self.norm(self.first(x)))), 0)


class Convs(nn.Module):
    """Convolutions with a batch norm, with groups and steps, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.groups = nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=2)
        self.wide = nn.Conv2d(12, 16, 3)
        self.head = nn.Linear(16, 6)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.groups(torch.relu(self.norm(self.stem(image)))))
        return torch.sub(self.head(torch.relu(self.wide(hidden)).mean((2, 3))), 0)


class Branching(Mlp):
    """Looks at values, so it is taken as its module tree."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return torch.sub(self.second(torch.tanh(hidden) if float(x.detach().sum()) < 1e9 else hidden), 0)


class Siblings(nn.Module):
    """Two layers that look at the same few directions of one input, and a third that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        seen = torch.randn(5, 16)
        for layer in (self.query, self.key):
            layer.weight.data = 0.2 * torch.randn(16, 5) @ seen + 0.01 * torch.randn(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(torch.tanh(self.query(x) + 1) * torch.tanh(self.key(x)) + self.value(x), 0)


def _plain(model: nn.Module, batches: list[Tensor], **options: object) -> LowRankModule:
    share, regauge = options.pop("share", 0.5), bool(options.pop("regauge", False))
    target = Keep(params=share, of="sites", regauge=regauge)  # type: ignore[arg-type]
    return lowrank_fx.optimize(model, batches, target=target, compile=False, progress=False, **options)  # type: ignore[arg-type]


def _folded(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches).fold()


def _regauged(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches, regauge=True)


def _shared(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    made = _plain(model, batches, share=0.6)
    assert any(site.shares for site in made.plan.sites)
    return made


def _tree(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches, capture="modules")


def _tucker(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches, forms=("tucker2",))


def _split(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches, forms=("spatial_t", "channel_in"))


def _channel(model: nn.Module, batches: list[Tensor]) -> LowRankModule:
    return _plain(model, batches, forms=("channel", "lowrank"))


Make = Callable[[nn.Module, list[Tensor]], LowRankModule]

KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...], Make]] = {
    "linear": (Mlp, (32, 16), _plain),
    "regauged": (Mlp, (32, 16), _regauged),
    "tree": (Branching, (32, 16), _tree),
    "conv": (Convs, (4, 3, 8, 8), _channel),
    "split": (Convs, (4, 3, 8, 8), _split),
    "tucker": (Convs, (4, 3, 8, 8), _tucker),
    "folded": (Convs, (4, 3, 8, 8), _folded),
    "sharded": (Mlp, (32, 16), _plain),
    "shared": (Siblings, (32, 16), _shared),
}
"""By the folder's name: the model, the shape of a batch, and how it is made."""


def original(kind: str) -> nn.Module:
    """A model of that kind with the weights of a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = KINDS[kind][0]().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.linspace(0.5, 1.5, buffer.numel()))
    return model


def batches(kind: str) -> list[Tensor]:
    """Calibration batches of that kind, of a fixed seed."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(KINDS[kind][1], generator=generator) for _ in range(5)]


def make(kind: str) -> LowRankModule:
    """The optimized model of that kind; nothing is timed."""
    timed = lowrank_fx.module.measure
    lowrank_fx.module.measure = lambda *_: PairedTiming(1.25, 0.5, 0.4, 0.01, 7)
    try:
        return KINDS[kind][2](original(kind), batches(kind))
    finally:
        lowrank_fx.module.measure = timed


def given(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """What lies beside a golden folder: the original, inputs, and the outputs that were saved.

    Args:
        folder: such as ``tests/golden/v1/linear``.
    """
    tensors = load_file(folder / GIVEN)
    model = KINDS[folder.name][0]().eval()
    model.load_state_dict({name.removeprefix("model."): each for name, each in tensors.items() if "." in name})
    return model, tensors["inputs"], tensors["outputs"]


def write(root: Path) -> None:
    """Save every kind below ``root``, with what :func:`given` reads beside it."""
    for kind in KINDS:
        folder = root / kind
        fast = make(kind)
        fast.save(folder / "saved", max_shard_size=1000 if kind == "sharded" else "5GB")
        inputs = batches(kind)[0][:3].contiguous()
        with torch.no_grad():
            outputs = fast(inputs)
        weights = {f"model.{name}": tensor.clone() for name, tensor in original(kind).state_dict().items()}
        save_file({**weights, "inputs": inputs, "outputs": outputs.contiguous()}, folder / GIVEN)
        forms = sorted({site.form for site in fast.plan.factored})
        print(f"{folder}: {forms}, pivots {[site.pivots for site in fast.plan.factored]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]))
