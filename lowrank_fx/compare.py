"""The relative L2 error between two nested outputs of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lowrank_fx._describe import describe
from lowrank_fx._leaves import tree_leaves
from lowrank_fx.errors import CalibrationError

# Elements converted to float64 at a time, because the logits of a language model would take gigabytes at once. On a CPU
# few enough to stay in its cache and below what torch splits over threads; elsewhere enough to outweigh a launch.
_CPU_CHUNK, _CHUNK = 1 << 15, 1 << 22


def floating_outputs(output: Any) -> list[torch.Tensor]:
    """The floating-point (and complex) tensors of an output, however nested, in a fixed order.

    Lists, tuples, dictionaries and every class registered with ``torch.utils._pytree`` (``ModelOutput`` among them) are
    entered, and so are other mappings and dataclasses.

    Raises:
        CalibrationError: there is none.
    """
    found = [leaf for leaf in _tensors(output) if leaf.is_floating_point() or leaf.is_complex()]
    if not found:
        raise CalibrationError(
            f"the model returns {describe(output)}, which holds no floating-point tensor to measure an error on; let "
            "forward return what it is made of (logits, scores, embeddings). forward_args= cannot help: it changes "
            "what goes in, not what comes out"
        )
    return found


def check_outputs(output: Any, mask: torch.Tensor | None = None) -> None:
    """Make sure that errors can be measured against an output of the original model.

    Infinities may stand in it (the score of what is ruled out), as long as something finite does; padding may hold
    anything.

    Args:
        output: what the model returned, however nested.
        mask: bool [B, T], false at padding.

    Raises:
        CalibrationError: it has no floating tensor, or one of them holds NaN, or nothing finite.
    """
    for position, tensor in enumerate(floating_outputs(output)):
        real = without_padding(tensor, mask)
        if _all_finite(real):
            continue
        which = f"floating output {position}, {describe(tensor)}"
        if not bool(real.isfinite().any()):
            raise CalibrationError(f"the model's output has no finite value ({which})")
        if bool(real.isnan().any()):
            raise CalibrationError(f"the model's output holds NaN ({which}), so no error can be measured against it")


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite, in one pass."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return not numbers.numel() or all(math.isfinite(end) for end in torch.stack(torch.aminmax(numbers)).tolist())


class ErrorSum:
    """The relative L2 error of outputs over many batches: sqrt(sum |y - y_ref|^2 / sum |y_ref|^2).

    The sums are in float64, over all floating outputs of all batches as if they were one vector.
    """

    def __init__(self) -> None:
        self._error_squares = 0.0
        self._reference_squares = 0.0

    def add(self, output: Any, reference: Any, mask: torch.Tensor | None = None) -> None:
        """Add one batch.

        Equal infinities (a score of minus infinity in both) count as no error. Where the reference is finite and the
        output is not, or the other way round, the error is infinite.

        Args:
            output: what the changed model returned.
            reference: what the original returned: the same number of floating tensors, with the same shapes.
            mask: bool [B, T], false at padding. It applies to tensors whose first two dimensions are (B, T); of other
                tensors with B rows, those that are padding throughout are left out.

        Raises:
            CalibrationError: the structures or shapes differ, one has no floating tensor, or the reference has NaN.
        """
        values = floating_outputs(output)
        references = floating_outputs(reference)
        if len(values) != len(references):
            raise CalibrationError(
                f"the output holds {len(values)} floating-point tensors and the reference {len(references)}; "
                "outputs can be compared only if both models return the same structure"
            )
        for position, (value, expected) in enumerate(zip(values, references, strict=True)):
            if value.shape != expected.shape:
                raise CalibrationError(
                    f"floating output {position} of {len(values)} has shape {list(value.shape)}, but the reference has "
                    f"{list(expected.shape)}; both must come from the same batch"
                )
            value, expected = without_padding(value, mask), without_padding(expected, mask)
            error, size = _squares(value.detach(), expected.detach(), position)
            self._error_squares += error
            self._reference_squares += size

    def add_trial(self, output: Any, reference: Any, mask: torch.Tensor | None = None) -> None:
        """Add one batch of a changed model whose shapes may depend on values: another shape is an infinite error.

        Args:
            output: as for :meth:`add`.
            reference: likewise.
            mask: likewise.

        Raises:
            CalibrationError: one has no floating tensor, or the reference has NaN.
        """
        shapes = [[tensor.shape for tensor in floating_outputs(each)] for each in (output, reference)]
        if shapes[0] == shapes[1]:
            self.add(output, reference, mask)
        else:
            self._error_squares = math.inf

    def add_squares(self, error: float, size: float) -> None:
        """Add one batch whose squares were measured elsewhere.

        Args:
            error: in the place of |y - y_ref|^2.
            size: in the place of |y_ref|^2.
        """
        self._error_squares += error
        self._reference_squares += size

    @property
    def relative(self) -> float:
        """The relative error so far: 0 when output and reference are both zero, infinite when only the reference is."""
        if self._error_squares == 0:
            return 0.0
        if self._reference_squares == 0 or math.isinf(self._error_squares):
            return math.inf
        return math.sqrt(self._error_squares / self._reference_squares)


def relative_error(output: Any, reference: Any, mask: torch.Tensor | None = None) -> float:
    """The relative L2 error of one output; see :meth:`ErrorSum.add` for the arguments and what is raised."""
    total = ErrorSum()
    total.add(output, reference, mask)
    return total.relative


def without_padding(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The part of an output that errors are measured on: what is not padding; see :meth:`ErrorSum.add`."""
    if mask is None or value.dim() == 0 or value.shape[0] != mask.shape[0]:
        return value
    real = mask.to(value.device)
    if value.shape[:2] == mask.shape:
        return value[real]
    rows = real.any(1)
    return value if bool(rows.all()) else value[rows]


def _squares(value: torch.Tensor, reference: torch.Tensor, position: int) -> tuple[float, float]:
    if value.is_complex() != reference.is_complex():
        raise CalibrationError(f"floating output {position} is {value.dtype}, but the reference is {reference.dtype}")
    if value.is_complex():
        value, reference = torch.view_as_real(value), torch.view_as_real(reference)
    error = torch.zeros((), dtype=torch.float64, device=value.device)
    size = torch.zeros_like(error)
    step = _CPU_CHUNK if value.device.type == "cpu" else _CHUNK
    chunks = zip(torch.split(value.reshape(-1), step), torch.split(reference.reshape(-1), step), strict=True)
    for part, expected in chunks:
        wide = expected.to(value.device).double()
        difference = part.double() - wide
        error += difference.square().sum()
        size += wide.square().sum()
    if math.isfinite(float(error)) and math.isfinite(float(size)):
        return float(error), float(size)
    return _squares_with_infinities(value, reference.to(value.device), position)


def _squares_with_infinities(value: torch.Tensor, reference: torch.Tensor, position: int) -> tuple[float, float]:
    if bool(reference.isnan().any()):
        raise CalibrationError(
            f"floating output {position} of the original model holds NaN; no error can be measured against it"
        )
    finite = reference.isfinite()
    if not bool(value[finite].isfinite().all()) or bool((value[~finite] != reference[~finite]).any()):
        return math.inf, 0.0
    wide = reference[finite].double()
    return float((value[finite].double() - wide).square().sum()), float(wide.square().sum())


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            if leaf.is_nested:  # its parts differ in shape, so they lie behind each other
                leaf = torch.cat([part.reshape(-1) for part in leaf.unbind()])
            yield leaf if leaf.layout is torch.strided else leaf.to_dense()
        elif isinstance(leaf, Mapping):
            for value in leaf.values():
                yield from _tensors(value)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name, None))
