"""The operators of a site, dense and factored, as they run in the finished model: something to hold a clock to.

What is timed are the plain operators, called one by one, not functions that went through ``torch.compile``. Inductor
gives a matrix product or a convolution to the same library that eager mode calls, and a compiled function of its own
pays for its guards at every call, which a layer inside of a compiled model does not. Measured on two AVX-512 cores,
float32, one thread: of 8 rows of 384 to 384 at rank 64 the operators alone took 39 and 26 us (1.50 times as fast), each
compiled by itself 125 and 99 us (1.26 times), and as one of eight layers with GELU in one compiled graph 104 and 60 us,
GELU included (1.83 times). From 128 rows on the three agree within a tenth. Nothing is compiled, so a pair costs
hundredths of a second, where compiling it would cost up to a second for each rank.

What inductor changes is the layout: convolutions over two dimensions run channels-last. So their inputs are laid out
that way where the model is going to be compiled.

Weights are read from memory, or from a far cache, in a model that has more than one layer. So each turn goes through
copies of the weights, as many as fill ``COLD_BYTES``.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx.forms import FORMS
from lowrank_fx.forms.geometry import Geometry, divided
from lowrank_fx.gauge import Gauge
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Site

COLD_BYTES = 8 * 2**20
"""How many bytes of weights a turn goes through, where ``MOST_COPIES`` are as many."""

MOST_COPIES = 8
"""How many copies of a weight there are at most."""

Run: TypeAlias = Callable[[], object]
"""Applies a layer once."""

_CONVOLVE: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}


@dataclass(frozen=True)
class Operator:
    """One call of a site: all that its time depends on besides the machine.

    Attributes:
        site: the site without its names, so that equal layers are one operator.
        rows: how many rows meet it.
        space: for a convolution, the size in space of the input that has these rows.
        bias: whether a bias is added.
        layout: memory format of the activations: ``"contiguous"`` or ``"channels_last"``.
    """

    site: Site
    rows: int
    space: tuple[int, ...]
    bias: bool
    layout: str

    @classmethod
    def of(cls, site: Site, call: int, rows: int, space: Sequence[int], *, compiled: bool) -> Operator:
        """The operator of a site's call.

        Args:
            site: the site.
            call: which of its calls.
            rows: how many rows meet that call.
            space: for a convolution, the size in space of the input.
            compiled: whether the model is going to be compiled.
        """
        bare = replace(site, name="", weight="", calls=(), centered=False, tied=False, pair=None)
        layout = "channels_last" if compiled and site.kind == "conv2d" else "contiguous"
        return cls(bare, rows, tuple(space), site.calls[call].bias is not None, layout)

    @functools.cached_property
    def key(self) -> str:
        """All of it as one line of text, the same in every process."""
        site = self.site
        words = [site.kind, "x".join(map(str, site.shape)), site.dtype.removeprefix("torch."), f"rows {self.rows}"]
        words += ["transposed"] * site.transposed + ["bias"] * self.bias
        words += [f"groups {site.groups}"] * (site.groups > 1)
        if site.patch is not None:
            words += [str(site.patch), f"space {'x'.join(map(str, self.space))}", self.layout]
        return ", ".join(words)

    def flops(self, pair: Pair | None) -> int:
        """FLOPs of one call, factored as ``pair`` or dense."""
        site = self.site
        if pair is None:
            return 2 * self.rows * site.out_features * site.in_features
        if pair.regauged:
            return 2 * self.rows * pair.rank * (site.out_features + site.in_features - pair.rank)
        return FORMS[pair.form].flops(site, pair.rank, self.rows, self.space)


@dataclass(frozen=True)
class Pair:
    """What an operator is replaced by.

    Attributes:
        form: the form's name.
        rank: the rank.
        regauged: the pair is re-gauged.
    """

    form: str
    rank: int
    regauged: bool = False

    @property
    def kind(self) -> str:
        """The form, and how it is applied."""
        return f"{self.form} re-gauged" if self.regauged else self.form


def measure(
    operator: Operator, pair: Pair, device: torch.device, *, min_rounds: int, max_seconds: float, turn_seconds: float
) -> PairedTiming:
    """Time an operator, dense against factored, in paired turns.

    Args:
        operator: what is replaced.
        pair: by what.
        device: where both run.
        min_rounds: see :func:`~lowrank_fx.latency.paired_speedup`, as the other two.
        max_seconds: how long.
        turn_seconds: of one turn.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        dense, factored = runs(operator, pair, device)
        return paired_speedup(
            dense,
            factored,
            device=device,
            min_rounds=min_rounds,
            max_seconds=max_seconds,
            turn_seconds=turn_seconds,
            clock=_clock(device),
        )


def _clock(device: torch.device) -> Callable[[], float]:
    """What an operator is timed by.

    One thread computes without waiting for anything, so its own time is the time that it takes on a machine without
    other work; several threads wait for each other, and an accelerator is waited for.
    """
    exact = time.get_clock_info("thread_time").resolution <= 1e-6
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone and exact else time.perf_counter


def runs(operator: Operator, pair: Pair, device: torch.device) -> tuple[Run, Run]:
    """The dense and the factored operator on the same rows, on numbers drawn apart from the global random state."""
    site, drawn = operator.site, _Drawn(operator, device)
    blank = FORMS[pair.form].blank(site, drawn.weights[0], pair.rank)  # for its shapes
    shapes = [tensor.shape for tensor in blank.tensors.values()]
    factors = [[drawn(shape) for shape in shapes] for _ in drawn.weights]
    factored = _cycled(_factored(operator, pair, drawn.x, drawn.bias, factors[0]), factors)
    return _cycled(_dense(operator, drawn.x, drawn.bias), drawn.weights), factored


def dense_run(operator: Operator, device: torch.device) -> Run:
    """The dense operator alone."""
    drawn = _Drawn(operator, device)
    return _cycled(_dense(operator, drawn.x, drawn.bias), drawn.weights)


class _Drawn:
    """What an operator is applied to: rows, weights and a bias."""

    def __init__(self, operator: Operator, device: torch.device) -> None:
        site = operator.site
        self.dtype: torch.dtype = getattr(torch, site.dtype.removeprefix("torch."))
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)
        copies = min(max(COLD_BYTES // max(math.prod(site.shape) * self.dtype.itemsize, 1), 1), MOST_COPIES)
        self.weights = [self(site.shape) for _ in range(copies)]
        self.bias = self((site.out_features,)) if operator.bias else None
        x = self(_input_shape(operator))
        self.x = x.to(memory_format=torch.channels_last) if operator.layout == "channels_last" else x

    def __call__(self, shape: Sequence[int]) -> Tensor:
        made = torch.rand(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return made.sub_(0.5).div_(math.sqrt(math.prod(shape[1:]))).to(self.dtype)


def _cycled(apply: Callable[[object], object], weights: Sequence[object]) -> Run:
    """Apply the next weight at every call."""
    turning = itertools.cycle(weights)
    return lambda: apply(next(turning))


def _input_shape(operator: Operator) -> tuple[int, ...]:
    site = operator.site
    if site.patch is None:
        rows = (operator.rows, site.in_features)
        return (site.groups, *rows) if site.kind == "bmm" else rows
    batch = operator.rows // max(math.prod(site.patch.positions(*operator.space)), 1)
    return (max(batch, 1), site.shape[1] * site.groups, *operator.space)


def _dense(operator: Operator, x: Tensor, bias: Tensor | None) -> Callable[..., object]:
    site = operator.site
    if site.kind == "bmm":
        return lambda weight: torch.bmm(x, weight)
    if site.patch is not None:
        convolve, own = _CONVOLVE[site.kind], _geometry(site.patch)
        return lambda weight: convolve(x, weight, bias, own.stride, own.padding, own.dilation, site.groups)
    if not site.transposed:
        return lambda weight: F.linear(x, weight, bias)
    return (lambda weight: x @ weight) if bias is None else (lambda weight: torch.addmm(bias, x, weight))


def _factored(
    operator: Operator, pair: Pair, x: Tensor, bias: Tensor | None, example: Sequence[Tensor]
) -> Callable[..., object]:
    site = operator.site
    if site.kind == "bmm":
        return lambda factors: torch.bmm(torch.bmm(x, factors[0]), factors[1])
    if site.patch is None and pair.regauged:
        gauge = Gauge(0)
        return lambda factors: gauge.apply(x, factors[0][:, pair.rank :], factors[1], bias)
    if site.patch is None:
        return lambda factors: F.linear(F.linear(x, factors[0]), factors[1], bias)
    convolve, own = _CONVOLVE[site.kind], divided(_geometry(site.patch), example)
    steps = [(each.stride, each.padding, each.dilation, site.groups) for each in own]

    def through(factors: Sequence[Tensor]) -> Tensor:
        made = x
        for factor, step in zip(factors[:-1], steps[:-1], strict=True):
            made = convolve(made, factor, None, *step)
        return convolve(made, factors[-1], bias, *steps[-1])

    return through


def _geometry(patch: Patch) -> Geometry:
    uneven = any(before != after for before, after in patch.padding)
    # Zeros on one side more than on the other come from padding by name alone.
    padding = "same" if uneven else tuple(before for before, _ in patch.padding)
    return Geometry(patch.stride, padding, patch.dilation)
