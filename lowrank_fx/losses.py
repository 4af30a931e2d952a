"""What a user may measure errors by in the place of the L2 distance of outputs: a loss.

Of a loss L of the outputs, averaged over a batch's rows, the error of outputs z against the original's y is the Bregman
divergence (L. M. Bregman 1967, section 1)

    D(z) = L(z) - L(y) - <grad L(y), z - y>

It is zero at y, never negative where L is convex in the outputs, and blind to the first order, which averages out over
the data a model was trained on and is noise on few rows. For the mean squared error it is the squared L2 distance of z
and y, whatever the targets are; for the cross entropy of logits it is KL(p_y || p_z), whatever the labels are. Of
several batches with n_b rows each, the relative error is

    sqrt(sum n_b D_b(z) / sum n_b D_b(0))

with 0 for outputs that are all zero: 0 for the original, 1 for zeros, and for the mean squared error the relative L2
error itself, so that targets and planners need not know what is measured. A D below zero, of a loss that is not convex,
counts as zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lowrank_fx._ambient import recording, seeded
from lowrank_fx._describe import describe
from lowrank_fx._leaves import map_leaves
from lowrank_fx.batches import Call
from lowrank_fx.compare import without_padding
from lowrank_fx.errors import CalibrationError, OptionError
from lowrank_fx.judges import Judge, Measure, answer_of, open_leaves
from lowrank_fx.kl import KLMeasure
from lowrank_fx.loader_batch import map_tensors
from lowrank_fx.program import Outputs, Program

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""From what the model returned and the loader's batch to a scalar, the mean over the batch's rows."""

NOISE = 64
"""A divergence below this many roundings of what it is the difference of is none."""


def measure_of(loss_fn: LossFn | Literal["kl"] | None) -> Measure | None:
    """What ``loss_fn=`` measures by; None for the L2 distance.

    Raises:
        OptionError: it is neither a function nor a known name.
    """
    if loss_fn is None:
        return None
    if callable(loss_fn):
        return LossMeasure(loss_fn)
    if isinstance(loss_fn, str) and loss_fn == "kl":
        return KLMeasure()
    raise OptionError(
        f"loss_fn={loss_fn!r}: give a function of what the model returns and the loader's batch, which returns the "
        "mean loss of the batch's rows as a scalar tensor, or 'kl' for logits without labels, or None"
    )


def measure_note(measure: Measure | None) -> tuple[str, ...]:
    """What a plan says about how its errors were measured; nothing of the L2 distance."""
    if measure is None:
        return ()
    return (
        f"errors of the whole model, and effects, are by {measure.name}: the root of its Bregman divergence from the "
        "original's outputs over that of outputs of zero",
    )


class LossMeasure(Measure):
    """A loss of the user's.

    Args:
        fn: a function of (outputs, batch). The outputs come in the model's own classes and, so that small differences
            are not lost, in float64; where the function refuses that, in float32 or at last in their own dtype. The
            batch comes as the loader gave it, on the model's device, with those of its rows that the model has seen.
    """

    needs_batch = True

    def __init__(self, fn: LossFn) -> None:
        self.fn = fn
        self.name = f"the loss {getattr(fn, '__name__', type(fn).__name__)!r}"

    def judge(self, program: Program, call: Call, what: str) -> Judge:
        """The gradient at the original's outputs, taken once."""
        if call.batch is None:
            raise CalibrationError(
                f"{what} was calibrated without the loader's batches, which {self.name} needs; pass the same loss_fn= "
                "to calibrate (loss_fn='kl' needs none)"
            )
        answer = answer_of(program, call)
        for leaf in open_leaves(answer):
            if _is_floating(leaf) and (leaf.layout is not torch.strided or leaf.is_nested):
                raise CalibrationError(
                    f"{what}: the model returns {describe(leaf)}, of which {self.name} has no gradient; let forward "
                    "return dense tensors"
                )
        tried: list[tuple[torch.dtype, ...]] = []
        failure: _FailedError | None = None
        for wide in (torch.float64, torch.float32, None):
            dtypes = tuple(_widened(leaf.dtype, wide) for leaf in open_leaves(answer) if _is_floating(leaf))
            if dtypes in tried:
                continue
            tried.append(dtypes)
            try:
                return _LossJudge(self, program.device, call, what, answer, dtypes)
            except _FailedError as error:
                failure = error
        assert failure is not None
        raise failure


class _FailedError(CalibrationError):
    """The user's function raised something."""


class _LossJudge(Judge):
    def __init__(
        self,
        measure: LossMeasure,
        device: torch.device,
        call: Call,
        what: str,
        answer: Any,
        dtypes: Sequence[torch.dtype],
    ) -> None:
        self.measure, self.what, self._fn = measure, what, measure.fn
        self._device, self._call, self._answer, self._dtypes = device, call, answer, dtypes
        self.reference = tuple(leaf for leaf in open_leaves(answer) if _is_floating(leaf))
        self._at, self._gradients = self._expand()
        self.size = self._zero_size()

    def error(self, outputs: Outputs) -> float:
        """See :meth:`Judge.error`."""
        leaves = open_leaves(outputs)
        values = [leaf for leaf in leaves if _is_floating(leaf)]
        alike = [(value.shape, value.is_complex()) for value in values]
        if len(leaves) != len(open_leaves(self._answer)) or alike != [
            (wanted.shape, wanted.is_complex()) for wanted in self.reference
        ]:
            return math.inf
        filled = [
            _filled(value.detach(), wanted, self._call.mask)
            for value, wanted in zip(values, self.reference, strict=True)
        ]
        if any(value is None for value in filled):
            return math.inf
        found = self._divergence([value for value in filled if value is not None], leaves)[0]
        return self._call.batch_size * max(found, 0.0) if math.isfinite(found) else math.inf

    def _zero_size(self) -> float:
        zeros = [torch.where(wanted.isfinite(), torch.zeros_like(wanted), wanted) for wanted in self.reference]
        found, noise = self._divergence(zeros, open_leaves(self._answer))
        if not math.isfinite(found):
            raise CalibrationError(
                f"{self.measure.name} is not finite for outputs of zero on {self.what}, so errors would be relative "
                "to nothing; let it take logits or other plain numbers, and be finite for all of them"
            )
        return self._call.batch_size * found if found > noise else 0.0

    def _expand(self) -> tuple[float, list[Tensor]]:
        """The loss at the original's outputs, and its gradient there: zero where they are not finite."""
        leaves = [
            wanted.to(dtype, copy=True).requires_grad_()
            for wanted, dtype in zip(self.reference, self._dtypes, strict=True)
        ]
        value = self._loss(leaves, open_leaves(self._answer), recorded=True)
        at = float(value.detach())
        if not math.isfinite(at):
            raise CalibrationError(f"{self.measure.name} is {at} for the original's own outputs on {self.what}")
        found: Sequence[Tensor | None] = [None]
        if value.requires_grad:
            with self._failing():
                found = torch.autograd.grad(value, leaves, allow_unused=True)
        if all(own is None for own in found):
            raise CalibrationError(
                f"{self.measure.name} does not depend on the model's outputs in a way that has a gradient; on "
                f"{self.what} it returned {describe(value)} from {describe(self._answer)}"
            )
        gradients = []
        for own, leaf in zip(found, leaves, strict=True):
            gradient = torch.zeros_like(leaf) if own is None else own
            if not bool(gradient[leaf.isfinite()].isfinite().all()):
                raise CalibrationError(
                    f"the gradient of {self.measure.name} is not finite at the original's outputs on {self.what}"
                )
            gradients.append(torch.where(leaf.isfinite(), gradient, torch.zeros_like(gradient)).detach())
        return at, gradients

    def _divergence(self, values: Sequence[Tensor], leaves: Sequence[Any]) -> tuple[float, float]:
        """D, and what rounding may have added to it."""
        wide = [value.to(dtype, copy=True) for value, dtype in zip(values, self._dtypes, strict=True)]
        linear = 0.0
        for value, wanted, gradient in zip(wide, self.reference, self._gradients, strict=True):
            step = torch.where(wanted.isfinite(), value - wanted.to(value.dtype), torch.zeros_like(value))
            linear += float((_real(gradient) * _real(step)).sum(dtype=torch.float64))
        loss = float(self._loss(wide, leaves, recorded=False).detach())
        eps = max(torch.finfo(dtype).eps for dtype in self._dtypes)
        return loss - self._at - linear, NOISE * eps * (abs(loss) + abs(self._at) + abs(linear))

    def _loss(self, floating: Sequence[Tensor], leaves: Sequence[Any], *, recorded: bool) -> Tensor:
        wide = iter(floating)
        given = iter([next(wide) if _is_floating(leaf) else leaf for leaf in leaves])
        with self._failing(), recording() if recorded else contextlib.nullcontext(), seeded(self._device):
            # New containers each time: a loss may well pop the labels out of its batch.
            batch = map_tensors(self._call.batch, lambda tensor: tensor)
            value = self._fn(map_leaves(self._answer, lambda _: next(given)), batch)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise CalibrationError(
                f"{self.measure.name} returned {describe(value)} for {self.what}; return the mean loss of the batch's "
                "rows, a floating-point tensor without dimensions"
            )
        return value

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the user's function raises
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise _FailedError(
                f"{self.measure.name} failed on {self.what}: {type(error).__name__}: {said}; it was given what the "
                f"model returns, {describe(self._answer)}, and the loader's batch, {describe(self._call.batch)}"
            ) from error


def _filled(value: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor | None:
    """A value with the original's where one of them is not finite; None where they differ there and it counts."""
    finite = value.isfinite() & wanted.isfinite()
    if bool(finite.all()):
        return value
    if bool(without_padding(~finite & (value != wanted), mask).any()):
        return None
    return torch.where(finite, value, wanted)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _widened(dtype: torch.dtype, wide: torch.dtype | None) -> torch.dtype:
    return dtype if wide is None else torch.promote_types(dtype, wide)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
