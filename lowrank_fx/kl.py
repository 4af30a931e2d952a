"""Errors of logits without labels: the Kullback-Leibler divergence from the original's distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_fx._describe import describe, is_dataclass, is_mapping
from lowrank_fx.batches import Call
from lowrank_fx.compare import floating_outputs, without_padding
from lowrank_fx.errors import CalibrationError
from lowrank_fx.judges import Judge, Measure, answer_of, open_leaves
from lowrank_fx.program import Outputs, Program
from lowrank_fx.refine_loss import paired, ratio

# Logits turned to float64 at a time: on a CPU few enough to stay in its cache, elsewhere enough to outweigh a launch.
_CPU_CHUNK, _CHUNK = 1 << 17, 1 << 22

# The divergence of equal logits is none below this share of their number: rounding of float64 in its sums.
_NOISE = 1e-14


class KLMeasure(Measure):
    """The Kullback-Leibler divergence of the distributions that logits stand for, along their last dimension.

    It is what :class:`~lowrank_fx.losses.LossMeasure` makes of the cross entropy, with all rows that are no padding
    counting alike. Where the model names some of its outputs ``logits`` or ``..._logits``, these are measured; else all
    that are floating.
    """

    name = "the Kullback-Leibler divergence of its logits"
    needs_batch = False

    def judge(self, program: Program, call: Call, what: str) -> Judge:
        """The original's logits."""
        return _KLJudge(self, answer_of(program, call), call.mask, what)


class _KLJudge(Judge):
    def __init__(self, measure: KLMeasure, answer: Any, mask: Tensor | None, what: str) -> None:
        self.measure, self.what, self._mask = measure, what, mask
        self.reference = tuple(floating_outputs(answer))
        names = {id(leaf) for leaf in open_leaves(_named_logits(answer))}
        self._shapes = [tensor.shape for tensor in self.reference]
        self._logits = {
            place: _Logits(without_padding(tensor, mask))
            for place, tensor in enumerate(self.reference)
            if tensor.dim() and not tensor.is_complex() and (id(tensor) in names or not names)
        }
        if not self._logits:
            raise CalibrationError(
                f"{what}: the model returns {describe(answer)}, which holds no logits for loss_fn='kl'; give a "
                "function of your own"
            )
        self.size = sum(logits.size for logits in self._logits.values())

    def error(self, outputs: Outputs) -> float:
        """See :meth:`Judge.error`."""
        values = floating_outputs(outputs)
        if [value.shape for value in values] != self._shapes:
            return math.inf
        errors = [
            logits.divergence(without_padding(values[place].detach(), self._mask))
            for place, logits in self._logits.items()
        ]
        return sum(max(error, 0.0) if math.isfinite(error) else math.inf for error in errors)

    def loss(self, given: Outputs, wanted: Outputs, mask: Tensor | None) -> Tensor:
        """See :meth:`Judge.loss`."""
        pairs = paired(given, wanted)
        sums = [_divergence(*(without_padding(tensor, mask) for tensor in pairs[place])) for place in self._logits]
        return ratio(torch.stack([error for error, _ in sums]).sum(), torch.stack([size for _, size in sums]).sum())


class _Logits:
    """The original's logits, ``[rows, classes]``, of which those that are not finite are ruled out.

    With p their softmax and S(z) = log sum exp z, a row's KL(p || softmax z) is S(z) - <p, z> + sum p log p. All sums
    are in float64.

    Attributes:
        size: the divergence of equal logits, summed over rows.
    """

    def __init__(self, wanted: Tensor) -> None:
        wanted = wanted.reshape(-1, wanted.shape[-1])
        there = wanted.isfinite()
        self._there = None if bool(there.all()) else there
        self._wanted = wanted
        self._step = max(1, (_CPU_CHUNK if wanted.device.type == "cpu" else _CHUNK) // max(wanted.shape[-1], 1))
        parts = [self._part(wanted, start, -math.inf) for start in self._starts]
        # Of a row in which nothing is finite all weights have to be zero.
        sums = [part.logsumexp(-1, keepdim=True) for part in parts]
        self._sums = [torch.where(own.isfinite(), own, math.inf) for own in sums]
        self._constant = torch.zeros((), dtype=torch.float64, device=wanted.device)
        for start, own in zip(self._starts, self._sums, strict=True):
            logs = self._part(wanted, start, 0.0) - own
            self._constant += torch.where(own.isfinite(), self._weights(start, own) * logs, 0.0).sum()
        counts = there.sum(-1).clamp(min=1).double()
        self.size = max(float(self._constant + counts.log().sum()), 0.0)
        if self.size <= _NOISE * float(counts.sum()):
            self.size = 0.0

    def divergence(self, value: Tensor) -> float:
        """KL from these logits to others of the same shape, summed over rows; not finite where those are not."""
        value = value.to(self._wanted.device).reshape(self._wanted.shape)
        there = self._there
        if there is not None and bool(((value.isfinite() != there) | (~there & (value != self._wanted))).any()):
            return math.inf
        total = self._constant.clone()
        for start, own in zip(self._starts, self._sums, strict=True):
            sums = self._part(value, start, -math.inf).logsumexp(-1, keepdim=True)
            if there is not None:
                sums = torch.where(own.isfinite(), sums, 0.0)
            total += sums.sum() - (self._weights(start, own) * self._part(value, start, 0.0)).sum()
        return float(total)

    @property
    def _starts(self) -> range:
        return range(0, self._wanted.shape[0], self._step)

    def _part(self, logits: Tensor, start: int, instead: float) -> Tensor:
        """Some rows in float64, with ``instead`` of what is ruled out."""
        part = logits[start : start + self._step].double()
        return part if self._there is None else torch.where(self._there[start : start + self._step], part, instead)

    def _weights(self, start: int, sums: Tensor) -> Tensor:
        return (self._part(self._wanted, start, -math.inf) - sums).exp()


def _divergence(value: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence from ``wanted`` to ``value`` and that to equal logits, summed over rows, at least in float32."""
    there = wanted.isfinite()
    wide = torch.promote_types(value.dtype, torch.float32)
    ruled_out = torch.finfo(wide).min / 2  # its exponential is zero, and it has a difference to others
    logs, own = (
        torch.where(there, tensor.to(wide), ruled_out).log_softmax(-1) for tensor in (value, wanted.to(value.device))
    )
    weights = torch.where(there, own.exp(), 0.0)
    size = (weights * own).sum() + there.sum(-1).clamp(min=1).to(wide).log().sum()
    return (weights * (own - logs)).sum(), size


def _named_logits(answer: Any) -> list[Any]:
    if is_mapping(answer):
        names = [name for name in answer.keys() if isinstance(name, str)]  # noqa: SIM118 (not every mapping iterates)
        return [answer[name] for name in names if name.endswith("logits")]
    names = list(getattr(answer, "_fields", ())) or (list(vars(answer)) if is_dataclass(answer) else [])
    return [getattr(answer, name) for name in names if name.endswith("logits")]
