"""What refinement minimises: relative squared errors of outputs and of sites, padding left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lowrank_fx.compare import floating_outputs
from lowrank_fx.errors import CalibrationError
from lowrank_fx.program import Outputs


def outputs_loss(given: Outputs, wanted: Outputs, mask: Tensor | None) -> Tensor:
    """The square of the relative error of all floating outputs, as :class:`ErrorSum` has it."""
    sums = [_squares(*pair, mask) for pair in paired(given, wanted)]
    errors = torch.stack([error for error, _ in sums]).sum()
    return ratio(errors, torch.stack([size for _, size in sums]).sum())


def paired(given: Outputs, wanted: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The floating outputs of two models side by side.

    Raises:
        CalibrationError: their shapes differ.
    """
    values, references = floating_outputs(given), floating_outputs(wanted)
    if [value.shape for value in values] != [reference.shape for reference in references]:
        raise CalibrationError(
            "the factored model returns other shapes than the original, so it cannot learn from it; models whose "
            "shapes depend on values cannot be refined"
        )
    return list(zip(values, references, strict=True))


def sites_loss(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], mask: Tensor | None, turned: Collection[str] = ()
) -> Tensor:
    """The mean over sites of the squares of their relative errors; 0 where no site was reached.

    Args:
        given: values by name.
        wanted: likewise.
        mask: bool ``[B, T]``, false at padding.
        turned: names of those whose rows come position by position.
    """
    losses = [
        ratio(*_squares(value, wanted[name], mask.t() if mask is not None and name in turned else mask))
        for name, value in given.items()
        if name in wanted and value.shape == wanted[name].shape
    ]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def _squares(value: Tensor, reference: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The squared error and the squared size, at least float32; padding and what is infinite count for nothing."""
    counts = reference.isfinite()
    real = _real(reference.shape, mask)
    if real is not None:
        counts &= real.to(counts.device)
    wide = torch.promote_types(value.dtype, torch.float32)
    value, reference = (torch.where(counts, tensor.to(wide), 0.0) for tensor in (value, reference))
    return (value - reference).abs().square().sum(), reference.abs().square().sum()


def _real(shape: torch.Size, mask: Tensor | None) -> Tensor | None:
    """Which positions of a value are no padding, in a shape that broadcasts to the value's; None for all of them."""
    if mask is None or not shape:
        return None
    if shape[:2] == mask.shape:
        return mask.reshape(*mask.shape, *(1 for _ in shape[2:]))
    if len(shape) == 2 and shape[0] == mask.numel():  # a layer may see its positions as rows
        return mask.reshape(-1, 1)
    if shape[0] == mask.shape[0]:
        return mask.any(1).reshape(-1, *(1 for _ in shape[1:]))
    return None


def ratio(error: Tensor, size: Tensor) -> Tensor:
    """A squared error relative to a squared size."""
    # What is zero in the original has no relative error; its own square keeps a meaning and a gradient.
    return error / torch.where(size > 0, size, 1.0)
