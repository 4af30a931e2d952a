"""Hooks on modules: which are part of what a model computes, and which its user has put there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

ATTRIBUTES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps its hooks, and what it knows of them by their keys."""


class UserHooks(NamedTuple):
    """One dictionary of hooks that holds some of the user's.

    Attributes:
        name: of the module.
        module: that has them.
        attribute: one of ``ATTRIBUTES``.
        hooks: all of them.
        own: those that belong to the model.
    """

    name: str
    module: nn.Module
    attribute: str
    hooks: dict[int, Any]
    own: OrderedDict[int, Any]


def user_hooks(model: nn.Module) -> Iterator[UserHooks]:
    """Every dictionary of hooks in a model that holds some of the user's.

    The model's own are those of ``torch.nn.utils`` that compute a weight, and methods of its own modules: a model that
    listens to its layers cannot do without.
    """
    modules = set(model.modules())
    for name, module in model.named_modules():
        found = {attribute: getattr(module, attribute, None) or {} for attribute in ATTRIBUTES}
        kept = {
            key
            for hooks in found.values()
            for key, hook in hooks.items()
            if is_weight_hook(hook) or owner_of(hook) in modules
        }
        for attribute, hooks in found.items():
            own = OrderedDict((key, hook) for key, hook in hooks.items() if key in kept)
            if len(own) < len(hooks):
                yield UserHooks(name, module, attribute, hooks, own)


def is_weight_hook(hook: object) -> bool:
    """Whether a hook of ``torch.nn.utils`` computes a weight (``weight_norm``, ``spectral_norm``)."""
    return getattr(type(hook), "__module__", "").startswith("torch.nn.utils")


def owner_of(hook: object) -> nn.Module | None:
    """The module that a hook is a method of."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
