"""Binding a batch to ``forward``, its padding mask, and the split of a loader into three roles.

A loader yields whatever its author found natural: a mapping, a tensor, an (image, label) pair. :func:`bind_batch` turns
one batch into a :class:`Call`, and :func:`assign_calls` says which rows calibrate, which choose between candidate plans
and which give the error that is reported. No row ever has two roles. The first dimension of a tensor counts its rows.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from lowrank_fx._describe import describe, describe_forward, is_dataclass, is_mapping
from lowrank_fx.errors import CalibrationError, LowRankError, OptionError
from lowrank_fx.loader_batch import Change, cut_batch, cut_tensor, map_tensors

Role = Literal["calibrate", "select", "report"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of ``forward``.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        mask: bool tensor [B, T], true where a position is real and false where it is padding; None without padding.
        batch: as the loader gave it, where a loss of the user's needs it; tensors that are arguments too are shared.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: torch.Tensor | None = None
    batch: Any = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, however nested, in the order of ``torch.utils._pytree``."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    @property
    def batch_size(self) -> int:
        """The number of rows: the most common first dimension among the tensors that have one (ties: the first seen).

        Raises:
            CalibrationError: no argument is a tensor with a first dimension.
        """
        sizes = Counter(tensor.shape[0] for tensor in self.tensors() if tensor.dim() >= 1)
        if not sizes:
            raise CalibrationError(
                f"no tensor with a first dimension among the arguments {describe(self.args)}, {describe(self.kwargs)}"
            )
        return int(sizes.most_common(1)[0][0])

    def rows(self, start: int, stop: int) -> Call:
        """The call on the rows ``start`` to ``stop`` (exclusive), as views.

        Only tensors whose first dimension is :attr:`batch_size` are cut; the others (a scalar, a shared table) are
        passed as they are.
        """
        size = self.batch_size
        return self._changed(
            lambda tensor: cut_tensor(tensor, size, start, stop),
            lambda batch, done: cut_batch(batch, size, start, stop, done),
        )

    def to(self, device: torch.device | str) -> Call:
        """The call with every tensor, and the mask, on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Change) -> Call:
        """The call with ``change`` applied to every tensor and to the mask."""
        return self._changed(change, lambda batch, done: map_tensors(batch, change, done))

    def _changed(self, change: Change, follow: Callable[[Any, Mapping[int, torch.Tensor]], Any]) -> Call:
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, self.kwargs))
        made = Call(args, kwargs, None if self.mask is None else change(self.mask))
        if self.batch is None:
            return made
        done = {id(old): new for old, new in zip(self.tensors(), made.tensors(), strict=True)}
        return replace(made, batch=follow(self.batch, done))


@dataclass(frozen=True)
class Assigned:
    """Rows of one batch with their role.

    Attributes:
        index: the batch's position in the loader; the pieces of a batch that was split share it.
        role: ``"calibrate"`` (sketches and effects), ``"select"`` (candidate plans are compared on it) or ``"report"``
            (the reported error comes from it).
        call: the rows, bound to ``forward``.
    """

    index: int
    role: Role
    call: Call


def bind_batch(
    batch: Any,
    forward_signature: inspect.Signature,
    forward_args: Callable[[Any], Any] | None = None,
    index: int = 0,
) -> Call:
    """Bind one batch to the arguments of ``forward``.

    A mapping (``BatchEncoding`` included) gives keyword arguments; keys that ``forward`` does not take are dropped. A
    tensor is the one positional argument. A tuple or list is positional, cut to the parameters that ``forward``
    requires (at least one; a ``*args`` takes all), so loaders of (image, label) work as they are. A dataclass or named
    tuple whose fields name every argument that ``forward`` requires is taken as a mapping; another named tuple is
    positional, and another dataclass is the one argument, which torch has to know as a pytree.
    The mask is the ``attention_mask`` among the arguments or in the mapping, when it is 2-D: true, positive, or, in a
    mask that is added to scores, zero where a position is real.

    Args:
        batch: what the loader yielded.
        forward_signature: ``inspect.signature(model.forward)``, without ``self``.
        forward_args: given by the user; what it returns is used uncut: a tuple or list (positional), a mapping
            (keyword), a tensor, or ``(tuple, mapping)`` (both).
        index: the batch's position in the loader, for messages.

    Raises:
        CalibrationError: the batch does not fit ``forward``, or holds no tensor, or ``forward_args`` failed.
    """
    if forward_args is None:
        args, kwargs = _natural_arguments(batch, forward_signature, index)
    else:
        args, kwargs = _given_arguments(batch, forward_args, index)
    try:
        bound = forward_signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationError(
            f"batch {index} is {describe(batch)}, but the model takes {describe_forward(forward_signature)}: {error}"
            "; pass forward_args=, a function from a batch to the arguments of forward"
        ) from error
    call = Call(args, kwargs)
    _check_leaves(call, index)
    if not any(tensor.dim() >= 1 for tensor in call.tensors()):
        raise CalibrationError(
            f"batch {index} is {describe(batch)} and gives {describe_forward(forward_signature)} no tensor with a "
            "first dimension; convert arrays and lists with torch.as_tensor, or pass forward_args="
        )
    mask = _padding_mask(bound.arguments, batch)
    # forward_args may have picked some of the rows; the batch's own mask then says nothing about them.
    if mask is not None and mask.shape[0] != call.batch_size:
        mask = None
    return Call(args, kwargs, mask)


def bound_calls(loader: Iterable[Any], bind: Callable[[Any, int], Call]) -> Iterator[tuple[int, Call]]:
    """Read a loader once, binding each batch as it comes.

    Args:
        loader: an iterable of batches.
        bind: from a batch and its index to a :class:`Call`, as :func:`bind_batch` does.

    Returns:
        The batches' indices and calls, in the order of the loader.

    Raises:
        CalibrationError: the loader is not an iterable of batches (raised at once), fails half-way, or yields a batch
            without rows (raised while it is read).
    """
    if isinstance(loader, torch.Tensor | Mapping):
        raise CalibrationError(
            f"the loader is {describe(loader)}, which is one batch and not an iterable of batches; pass [batch]"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise CalibrationError(
            f"the loader is a {type(loader).__name__}, which is not iterable; pass a list of batches"
        )
    return _read(loader, bind)


def assign_calls(calls: Iterable[tuple[int, Call]], holdout: float = 0.2) -> Iterator[Assigned]:
    """Say what each row is for, while the batches come.

    With p = round(1 / holdout), every p-th batch (index p-1, 2p-1, ...) is held out: the first half of its rows
    selects, the second half reports; held-out batches of one row alternate. A loader that ends before both roles
    have rows is split by rows instead: the last ``holdout`` share of every batch, at least one row for each role.
    Batches are held back only until that is known: at most p of them, 2p when held-out ones have a single row.

    Args:
        calls: the batches' indices, counted from 0, and calls, as :func:`bound_calls` gives them.
        holdout: the share that is held out, in (0, 0.5].

    Returns:
        The pieces in the order of the batches.

    Raises:
        OptionError: ``holdout`` is outside (0, 0.5] (raised at once).
        CalibrationError: there are no batches, or fewer than three rows in all (raised while they are read).
    """
    if not 0 < holdout <= 0.5:
        raise OptionError(f"holdout={holdout!r} is not legal; use a share above 0 and at most 0.5, such as 0.2")
    return _assign(iter(calls), holdout)


def _assign(calls: Iterator[tuple[int, Call]], holdout: float) -> Iterator[Assigned]:
    period = round(1 / holdout)
    waiting: list[tuple[int, Call]] = []
    # Nothing is given away as calibration data before the first held-out batches have given rows to both other roles.
    held_rows = 0
    for index, call in calls:
        waiting.append((index, call))
        if (index + 1) % period == 0:
            held_rows += call.batch_size
            if held_rows >= 2:
                break
    else:
        yield from _assign_by_rows(waiting, holdout)
        return

    lone_role: Role = "select"
    for index, call in _chain(waiting, calls):
        size = call.batch_size
        if (index + 1) % period:
            yield Assigned(index, "calibrate", call)
        elif size == 1:
            yield Assigned(index, lone_role, call)
            lone_role = "report" if lone_role == "select" else "select"
        else:
            yield Assigned(index, "select", call.rows(0, size // 2))
            yield Assigned(index, "report", call.rows(size // 2, size))


def _assign_by_rows(calls: list[tuple[int, Call]], holdout: float) -> Iterator[Assigned]:
    if not calls:
        raise CalibrationError(
            "the loader gave no batch; pass an iterable of batches that has not been read to its end"
        )
    sizes = [call.batch_size for _, call in calls]
    total = sum(sizes)
    if total < 3:
        raise CalibrationError(
            f"the loader gave too few rows ({total}, in batches of {', '.join(map(str, sizes))}); "
            "at least 3 are needed: one to calibrate, one to choose a plan, one to report its error"
        )
    if max(sizes) >= 3:
        held = [min(max(2, round(size * holdout)), size - 1) if size >= 3 else 0 for size in sizes]
        cuts = [(size - hold, size - hold + hold // 2) for size, hold in zip(sizes, held, strict=True)]
    else:
        # No batch can serve all three roles, so the loader's rows are cut as one sequence.
        hold = min(max(2, round(total * holdout)), total - 1)
        starts = [sum(sizes[:position]) for position in range(len(sizes))]
        cuts = [
            (min(max(total - hold - start, 0), size), min(max(total - hold + hold // 2 - start, 0), size))
            for start, size in zip(starts, sizes, strict=True)
        ]
    for (index, call), size, (first, second) in zip(calls, sizes, cuts, strict=True):
        pieces: tuple[tuple[Role, int, int], ...] = (
            ("calibrate", 0, first),
            ("select", first, second),
            ("report", second, size),
        )
        for role, start, stop in pieces:
            if start < stop:
                yield Assigned(index, role, call.rows(start, stop))


def _read(loader: Iterable[Any], bind: Callable[[Any, int], Call]) -> Iterator[tuple[int, Call]]:
    index = 0
    try:
        batches = iter(loader)
    except Exception as error:
        raise CalibrationError(f"the loader could not be started: {type(error).__name__}: {error}") from error
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except LowRankError:
            raise
        except Exception as error:
            raise CalibrationError(f"the loader failed at batch {index}: {type(error).__name__}: {error}") from error
        call = bind(batch, index)
        if call.batch_size == 0:
            raise CalibrationError(f"batch {index} is {describe(batch)}: it has no rows; leave empty batches out")
        yield index, call
        index += 1


def _chain(first: list[tuple[int, Call]], rest: Iterator[tuple[int, Call]]) -> Iterator[tuple[int, Call]]:
    # Unlike itertools.chain this lets go of each batch once it has been given away.
    while first:
        yield first.pop(0)
    yield from rest


def _natural_arguments(batch: Any, signature: inspect.Signature, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameters = signature.parameters.values()
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    fields = _fields_for(batch, signature)
    if fields is not None:
        batch = fields
    elif is_dataclass(batch):
        return (batch,), {}
    if is_mapping(batch):
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters if parameter.kind in _BY_NAME}
        return (), {key: batch[key] for key in batch.keys() if takes_any or key in names}  # noqa: SIM118 (not all iterate)
    if isinstance(batch, tuple | list):
        if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
            return tuple(batch), {}
        required = sum(
            parameter.kind in _POSITIONAL and parameter.default is inspect.Parameter.empty for parameter in parameters
        )
        return tuple(batch[: max(required, 1)]), {}
    is_array = hasattr(batch, "__array__")
    raise CalibrationError(
        f"batch {index} is {describe(batch)}, but the model takes {describe_forward(signature)}; "
        + ("convert with torch.as_tensor" if is_array else "yield a tensor, a mapping, a tuple or a list of tensors")
        + ", or pass forward_args=, a function from a batch to the arguments of forward"
    )


def _given_arguments(
    batch: Any, forward_args: Callable[[Any], Any], index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        given = forward_args(batch)
    except Exception as error:
        raise CalibrationError(
            f"forward_args failed on batch {index}, which is {describe(batch)}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(given, torch.Tensor):
        return (given,), {}
    if is_mapping(given):
        return (), {key: given[key] for key in given.keys()}  # noqa: SIM118 (not every mapping iterates over its keys)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) and is_mapping(given[1]):
        return given[0], {key: given[1][key] for key in given[1].keys()}  # noqa: SIM118
    if isinstance(given, tuple | list):
        return tuple(given), {}
    raise CalibrationError(
        f"forward_args returned {describe(given)} for batch {index}; return a tuple (positional arguments), a mapping "
        "(keyword arguments), a tensor, or a tuple and a mapping"
    )


def _fields_for(batch: Any, signature: inspect.Signature) -> dict[str, Any] | None:
    """The fields of a dataclass or named tuple, if they name what ``forward`` requires; nothing but a name says so."""
    if is_mapping(batch):
        return None
    if is_dataclass(batch):
        names = [field.name for field in dataclasses.fields(batch)]
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        names = list(batch._fields)
    else:
        return None
    parameters = [entry for entry in signature.parameters.values() if entry.kind in _BY_NAME]
    required = {entry.name for entry in parameters if entry.default is inspect.Parameter.empty}
    if required <= set(names) and any(entry.name in names for entry in parameters):
        return {name: getattr(batch, name) for name in names}
    return None


def _check_leaves(call: Call, index: int) -> None:
    """Refuse what neither rows can be cut from nor sketches can be taken of.

    Raises:
        CalibrationError: a nested tensor, or a container that hides its tensors from torch.
    """
    for leaf in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_nested:
            raise CalibrationError(
                f"batch {index} holds a nested tensor, whose rows differ in length; pad it (torch.nested."
                "to_padded_tensor) and pass an attention_mask, or do so in forward_args="
            )
        if not isinstance(leaf, torch.Tensor) and (is_dataclass(leaf) or is_mapping(leaf)):
            name = type(leaf).__name__
            cure = f"turn the {name} into a dict"
            if is_dataclass(leaf):
                cure = f"register it with torch.export.register_dataclass({name})"
            raise CalibrationError(
                f"batch {index} passes {describe(leaf)} as one argument, and torch cannot see the tensors in it; "
                f"{cure}, or pass forward_args=, a function from a batch to the arguments of forward"
            )


def _padding_mask(arguments: Mapping[str, Any], batch: Any) -> torch.Tensor | None:
    mask = arguments.get("attention_mask")
    if mask is None and is_mapping(batch) and "attention_mask" in batch.keys():  # noqa: SIM118
        mask = batch["attention_mask"]
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    if mask.is_floating_point() and not bool((mask > 0).any()):
        return mask == 0  # one that is added to scores: zero, and minus infinity at padding
    return mask > 0
