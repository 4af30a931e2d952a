"""EXPORT: readable names for the inputs and outputs of a model, and inputs to check an exported file with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowrank_fx.errors import CallError
from lowrank_fx.signature import CallSignature

Sizes: TypeAlias = Mapping[Any, int]
"""A size for every symbol of a dimension that may change."""

Shapes: TypeAlias = Sequence[tuple[Any, ...]]
"""Per input tensor its sizes: numbers, and symbols (or expressions of them) where they may change."""

_MOST_ROWS = 4

_PLAIN = (dict, list, tuple)

# What changes neither the values of indices nor which of them there are.
_KEEPS_VALUES = frozenset(
    {
        *("view", "reshape", "flatten", "slice", "unsqueeze", "squeeze", "expand"),
        *("to", "_to_copy", "contiguous", "clone", "detach", "alias"),
    }
)


# ---- names -----------------------------------------------------------------------------------------------------------


def named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every leaf of a nested value with a name: the keys on the way to it, joined by dots.

    Leaves come in the order of ``torch.utils._pytree``; an entry of a list is named by its position.
    """
    children = _children(value)
    if children is None:
        yield name, value
        return
    for key, child in children:
        yield from named_leaves(child, f"{name}.{key}" if name else key)


def plain(value: Any) -> Any:
    """A nested value without classes of its own: dictionaries, lists and tuples around the same leaves.

    An output class of transformers becomes a dictionary, so that a reader needs no package besides torch.
    """
    children = _children(value)
    if children is None:
        return value
    if type(value) is dict:
        return {key: plain(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(child) for _, child in children)
    if all(key.isdecimal() for key, _ in children):
        return tuple(plain(child) for _, child in children)
    return {key: plain(child) for key, child in children}


def is_plain(value: Any) -> bool:
    """Whether a nested value has no class besides dictionaries, lists and tuples."""
    children = _children(value)
    return children is None or (type(value) in _PLAIN and all(is_plain(child) for _, child in children))


def _children(value: Any) -> list[tuple[str, Any]] | None:
    node = pytree.SUPPORTED_NODES.get(pytree._get_node_type(value))
    if node is None:
        return None
    if node.flatten_with_keys_fn is None:
        return [(str(place), child) for place, child in enumerate(node.flatten_fn(value)[0])]
    return [(_text(key), child) for key, child in node.flatten_with_keys_fn(value)[0]]


def _text(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(key.key if isinstance(key, pytree.MappingKey) else getattr(key, "name", key))


def argument_names(calls: CallSignature) -> list[str]:
    """The name of every leaf of a captured call, by the parameters of the model's own ``forward``."""
    parameters = list(calls.signature.parameters.values())
    names = []
    for position, value in enumerate(calls.example.args):
        parameter = parameters[min(position, len(parameters) - 1)]
        own = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            own = f"{own}_{position - len(parameters) + 1 + sum(p.kind.value > 2 for p in parameters)}"
        names += [name for name, _ in named_leaves(value, own)]
    for key, value in calls.example.kwargs.items():
        names += [name for name, _ in named_leaves(value, key)]
    return distinct(names)


def output_names(output: Any) -> list[str]:
    """The name of every leaf of a model's output: its keys, ``output`` for the only one, or ``output_0``, ..."""
    children = _children(output)
    if children is None:
        return ["output"]
    names = []
    for key, child in children:
        own = f"output_{key}" if key.isdecimal() else key
        names += [name for name, _ in named_leaves(child, own)]
    return distinct(names)


def distinct(names: Sequence[str], taken: Sequence[str] = (), suffix: str = "") -> list[str]:
    """The names with nothing but letters, digits, ``_`` and ``.`` in them, each one once.

    Args:
        names: as they come.
        taken: names that none of them may have.
        suffix: what a taken name gets before it is numbered.
    """
    made: list[str] = []
    used = set(taken)
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_.]", "_", name) or "value"
        own = base + suffix if base in taken else base
        number = 1
        while own in used:
            number += 1
            own = f"{base}{suffix if base in taken else ''}_{number}"
        used.add(own)
        made.append(own)
    return made


# ---- inputs ----------------------------------------------------------------------------------------------------------


def filled(module: GraphModule, calls: CallSignature, seed: int = 0) -> list[Any]:
    """The leaves of the captured call with values in them: the shapes are those of the call, the values are random.

    Floating inputs are standard normal. An integer input that indexes an embedding is drawn from what that has; other
    integers and booleans (masks, mostly) are 1 and true.

    Args:
        module: the captured graph.
        calls: how it is called.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, leaf in zip(placeholders, calls._leaves, strict=True):
        made.append(_random(leaf, _indexed(module, node), generator) if isinstance(leaf, Tensor) else leaf)
    return made


def _random(like: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)
    if rows is None:
        return torch.ones(like.shape, dtype=like.dtype)
    return torch.randint(0, rows, like.shape, generator=generator).to(like.dtype)


def _indexed(module: GraphModule, placeholder: Node) -> int | None:
    """How many rows the smallest embedding has that an input indexes; None if it indexes none."""
    found: list[int] = []
    waiting, seen = [placeholder], {placeholder}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            name = getattr(getattr(user.target, "_schema", None), "name", "").removeprefix("aten::")
            if name in ("embedding", "embedding_bag") and user.args[1] is node:
                table = user.args[0]
                assert isinstance(table, Node)
                found.append(int(table.meta["val"].shape[0]))
            elif name in _KEEPS_VALUES and user.args[0] is node and user not in seen:
                seen.add(user)
                waiting.append(user)
    return min(found, default=None)


def resized(tensors: Sequence[Tensor], shapes: Shapes, sizes: Sizes) -> list[Tensor]:
    """Tensors with other sizes where these may change: cut, or repeated from the start.

    Args:
        tensors: the inputs.
        shapes: which of their sizes may change.
        sizes: the new ones.
    """
    made = []
    for tensor, shape in zip(tensors, shapes, strict=True):
        for dim, size in enumerate(shape):
            wanted = _evaluated(size, sizes)
            if wanted is not None and wanted != tensor.shape[dim]:
                tensor = tensor.index_select(dim, torch.arange(wanted, device=tensor.device) % tensor.shape[dim])
        made.append(tensor.contiguous())
    return made


def _evaluated(size: Any, sizes: Sizes) -> int | None:
    if isinstance(size, int):
        return None
    if not size.free_symbols <= set(sizes):
        return None
    return int(size.subs(dict(sizes)))


def symbols_of(shapes: Shapes) -> dict[Any, tuple[int, int]]:
    """The symbols that are a size by themselves, each with the input and the dimension where it occurs first."""
    found: dict[Any, tuple[int, int]] = {}
    for position, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if getattr(size, "is_symbol", False):
                found.setdefault(size, (position, dim))
    return found


def dimension_names(shapes: Shapes, inputs: Sequence[str]) -> dict[str, str]:
    """A readable name for every symbol, by the symbol's own.

    The first dimension of an input is ``batch``, the second ``sequence``, others ``dim_2`` and so on; a second symbol
    in the same place carries the input's name too.

    Args:
        shapes: per input tensor.
        inputs: their names.
    """
    made: dict[str, str] = {}
    for symbol, (position, dim) in symbols_of(shapes).items():
        name = ("batch", "sequence")[dim] if dim < 2 else f"dim_{dim}"
        if name in made.values():
            name = f"{inputs[position]}_{name}"
        made[str(symbol)] = name
    return made


def trials(
    tensors: Sequence[Tensor], shapes: Shapes, calls: CallSignature, leaves: Sequence[Any]
) -> list[list[Tensor]]:
    """Inputs of two batch sizes where the batch may change, the second with shorter sequences where these may.

    Args:
        tensors: held-out or random inputs.
        shapes: which of their sizes may change.
        calls: what its guards refuse is not tried.
        leaves: the captured call's leaves, with the constants between the tensors.

    Returns:
        One or two lists of tensors.

    Raises:
        CallError: the model takes no inputs of these sizes.
    """
    symbols = symbols_of(shapes)
    first = {symbol: max(2, tensors[position].shape[dim]) for symbol, (position, dim) in symbols.items()}
    rows = [symbol for symbol, (_, dim) in symbols.items() if dim == 0]
    others = {size for symbol, size in first.items() if symbol not in rows}
    few = next(count for count in (_MOST_ROWS, 3, 5, 7) if count not in others or count == 7)
    small = {symbol: min(size, few) if symbol in rows else size for symbol, size in first.items()}
    found = _taken([small, first], tensors, shapes, calls, leaves)
    if found is None:
        calls.bind(*_call(calls, leaves, resized(tensors, shapes, first)))
        raise AssertionError("a call that was refused before is taken now")  # pragma: no cover
    sizes, made = found
    more = {symbol: sizes[symbol] + 1 for symbol in rows}
    shorter = {symbol: max(2, size - (size + 2) // 3) for symbol, size in sizes.items() if symbol not in rows}
    attempts = [{**sizes, **more, **shorter}, {**sizes, **more}, {**sizes, **shorter}]
    second = _taken([each for each in attempts if each != sizes], tensors, shapes, calls, leaves)
    return [made] if second is None else [made, second[1]]


def _taken(
    attempts: Sequence[Sizes], tensors: Sequence[Tensor], shapes: Shapes, calls: CallSignature, leaves: Sequence[Any]
) -> tuple[Sizes, list[Tensor]] | None:
    for sizes in attempts:
        made = resized(tensors, shapes, sizes)
        try:
            calls.bind(*_call(calls, leaves, made))
        except CallError:
            continue
        return sizes, made
    return None


def _call(calls: CallSignature, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    return pytree.tree_unflatten(merged(leaves, tensors), calls._spec)


def merged(leaves: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    """Leaves with other tensors in the places of theirs."""
    given = iter(tensors)
    return [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
