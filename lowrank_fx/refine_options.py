"""What a user says about refinement: :class:`Refine`, a frozen value with a JSON form."""

from __future__ import annotations

import enum
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import CodeType, FunctionType
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lowrank_fx._describe import is_dataclass
from lowrank_fx._files import sha256_tensor
from lowrank_fx.batches import Call
from lowrank_fx.errors import OptionError

Schedule: TypeAlias = Literal["one_cycle", "cosine"]
Augment: TypeAlias = Callable[[Call, torch.Generator], Call]


@dataclass(frozen=True)
class Refine:
    """How a factored model is refined.

    Args:
        steps: batches that are trained on, at most.
        lr: the largest step size of AdamW, for parameters of any size: it is a share of their root mean square.
        batch: rows per step; None for as many as the first calibration batch has.
        schedule: ``"one_cycle"`` rises to ``lr`` and falls to nearly nothing; ``"cosine"`` falls from the start.
        blocks: weight of the sites' own errors beside the error of the outputs; 0 leaves them out.
        weight_decay: as in AdamW.
        every: steps from one look at the held-out batches to the next; None for a twentieth of ``steps``.
        patience: it ends after so many looks without a new best. None for 8, but with ``"one_cycle"`` for none before
            its end: while its step size is large the held-out error rises, and the best comes last.
        seed: of the order of rows, and of the numbers that ``augment`` draws.
        augment: changes each batch before both models see it: a function of the batch and a generator, such as
            :func:`~lowrank_fx.training_batches.flip_and_shift`.

    Raises:
        OptionError: a value is not legal; the message says which.
    """

    steps: int = 500
    lr: float = 0.005
    batch: int | None = None
    schedule: Schedule = "one_cycle"
    blocks: float = 1.0
    weight_decay: float = 0.0
    every: int | None = None
    patience: int | None = None
    seed: int = 0
    augment: Augment | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every", "patience"):
            value = getattr(self, name)
            if value is None and name != "steps":
                continue
            if type(value) is not int or value < 1:
                raise OptionError(f"Refine({name}={value!r}): give a whole number of at least 1")
        if type(self.seed) is not int:
            raise OptionError(f"Refine(seed={self.seed!r}): give a whole number")
        for name in ("lr", "blocks", "weight_decay"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "lr" and value == 0):
                least = "above 0, such as 0.005" if name == "lr" else "of at least 0"
                raise OptionError(f"Refine({name}={value!r}): give a finite number {least}")
        if self.schedule not in get_args(Schedule):
            legal = ", ".join(map(repr, get_args(Schedule)))
            raise OptionError(f"Refine(schedule={self.schedule!r}): the legal values are {legal}")
        if self.augment is not None and not callable(self.augment):
            raise OptionError(f"Refine(augment={self.augment!r}): give a function of a batch and a torch.Generator")

    @property
    def most_looks(self) -> float:
        """How many looks without a new best it may take; infinite for no end before the last step."""
        if self.patience is not None:
            return self.patience
        return math.inf if self.schedule == "one_cycle" else 8

    def to_json(self) -> dict[str, Any]:
        """The options as JSON data; ``augment`` by its name, see :func:`callable_name`."""
        names = ("steps", "lr", "batch", "schedule", "blocks", "weight_decay", "every", "patience", "seed")
        return {
            "type": "refine",
            **{name: getattr(self, name) for name in names},
            "augment": callable_name(self.augment),
        }


def refine_from_json(data: Any, augment: Augment | None = None) -> Refine:
    """Read options back from :meth:`Refine.to_json`.

    Args:
        data: the JSON data.
        augment: the function that it names; functions are not stored.

    Raises:
        OptionError: the data is not of that form, or names another function.
    """
    try:
        values = dict(data)
        kind, named = values.pop("type"), values.pop("augment")
        if kind == "refine" and named == callable_name(augment):
            return Refine(**values, augment=augment)
    except (TypeError, KeyError, ValueError) as error:
        raise OptionError(f"not options of refinement: {data!r} ({error})") from error
    if kind == "refine":
        raise OptionError(
            f"these options of refinement were made with augment={named}, not {callable_name(augment)}; pass it"
        )
    raise OptionError(f"not options of refinement: {data!r}")


def callable_name(augment: Callable[..., Any] | None) -> str | None:
    """Where a function is defined, as ``module:name``; None for None.

    A ``functools.partial``, and an object of a dataclass, also tell what they hold. Lambdas, and what is defined inside
    of a function, share their names with others, so a checksum of the code and of what it captured stands behind.
    Values without a short text of their own count by their class.
    """
    return None if augment is None else _named(augment, ())


def _named(value: Any, within: tuple[int, ...]) -> str:
    """The name of a callable; ``within`` are the objects that led to it, which may lead back."""
    if id(value) in within:
        return "..."
    within = (*within, id(value))
    if isinstance(value, functools.partial):
        given = [_told(entry, within) for entry in value.args]
        given += [f"{name}={_told(entry, within)}" for name, entry in sorted(value.keywords.items())]
        return f"functools.partial({', '.join([_named(value.func, within), *given])})"
    owner = value if hasattr(value, "__qualname__") else type(value)
    name = f"{getattr(owner, '__module__', '')}:{owner.__qualname__}"
    if isinstance(value, FunctionType) and "<" in value.__qualname__:
        cells = [_content(cell) for cell in value.__closure__ or ()]
        held = [value.__defaults__, value.__kwdefaults__, *cells]
        parts = [_told(value.__code__, within), *(_told(entry, within) for entry in held)]
        return f"{name}#{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
    if is_dataclass(value):
        entries = (f"{each.name}={_told(getattr(value, each.name, None), within)}" for each in fields(value))
        return f"{name}({', '.join(entries)})"
    return name


_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum, torch.dtype, torch.device)


def _told(value: Any, within: tuple[int, ...]) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, CodeType):
        return repr((value.co_code, value.co_names, [_told(each, within) for each in value.co_consts]))
    if isinstance(value, Tensor):
        return f"Tensor#{sha256_tensor(value)[:8]}" if value.layout is torch.strided else type(value).__qualname__
    if callable(value) or is_dataclass(value) or id(value) in within:
        return _named(value, within)
    within = (*within, id(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_told(key, within)}: {_told(entry, within)}' for key, entry in value.items())}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_told(entry, within) for entry in value))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_told(entry, within) for entry in value)}]"
    return type(value).__qualname__


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned to it yet
        return None
