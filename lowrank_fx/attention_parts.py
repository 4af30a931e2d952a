"""Opening the attentions of a module tree, by the way they are called, and closing them again.

Torch computes query, key and value of one tensor by one product, a key and a value of one tensor by one, and three
tensors by three. A captured graph shows that; a tree shows it in a run. What one product computes is one site, in a
tree as in a graph, and has the same name: ``in_proj_weight``, or ``in_proj_weight_0``, ``_1`` and ``_2``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank_fx.attention import SEPARATE, OpenAttention, OutProjection, Projection, parts_of, projections
from lowrank_fx.modules import FACTORS, is_computed, is_stand_in

Parts: TypeAlias = tuple[tuple[int, ...], ...]
"""Which of query (0), key (1) and value (2) one product of a packed in-projection computes, for every product."""

WHOLE: Parts = ((0, 1, 2),)
PAIRED: Parts = ((0,), (1, 2))
APART: Parts = ((0,), (1,), (2,))


def closed_because(module: nn.Module) -> str | None:
    """Why an attention cannot be opened; None if it can be, or is none."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    plain = type(module)
    if "forward" in vars(module) or any(
        getattr(plain, name) is not getattr(nn.MultiheadAttention, name) for name in ("forward", "__call__")
    ):
        return f"{plain.__name__} computes attention in a way of its own"
    if is_computed(module) or is_computed(module.out_proj):
        return "an nn.MultiheadAttention whose weights are computed is opened in a graph only"
    out = type(module.out_proj)
    if out not in (nn.Linear, NonDynamicallyQuantizableLinear) or "forward" in vars(module.out_proj):
        return f"the out_proj of this nn.MultiheadAttention is a {out.__name__}"
    return None


@contextlib.contextmanager
def watched(tree: nn.Module) -> Iterator[dict[str, Parts]]:
    """Learn from a run how attentions are called; yields what is known so far, by module name.

    One that is called in several ways gets the finest parts. (``is`` is what torch itself goes by.)
    """
    found: dict[str, Parts] = {}

    def watching(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given.get(each) for each in ("query", "key", "value"))
            parts = WHOLE if query is key is value else PAIRED if key is value else APART
            found[name] = max(found.get(name, WHOLE), parts, key=len)

        return watch

    with contextlib.ExitStack() as stack:
        for name, module in tree.named_modules():
            if isinstance(module, nn.MultiheadAttention) and closed_because(module) is None:
                stack.callback(module.register_forward_pre_hook(watching(name), with_kwargs=True).remove)
        yield found


def named_parts(tree: nn.Module, names: Collection[str]) -> dict[str, Parts]:
    """How attentions were opened when weights of these names were found, by module name."""
    found: dict[str, Parts] = {}
    for name, module in tree.named_modules():
        if isinstance(module, nn.MultiheadAttention) and closed_because(module) is None:
            whole = _joined(name, "in_proj_weight")
            known = {f"{whole}_2": APART, f"{whole}_1": PAIRED, f"{whole}_0": PAIRED, whole: WHOLE}
            known |= {_joined(name, separate): APART for separate in SEPARATE}
            parts = next((parts for weight, parts in known.items() if weight in names), None)
            if parts is not None:
                found[name] = parts
    return found


def open_attentions(tree: nn.Module, parts: Mapping[str, Parts]) -> list[str]:
    """Open attentions of a tree, in place.

    What is divided shares the memory of the packed parameter; a packed parameter that something else owns, or that is
    divided otherwise there, stays closed.

    Args:
        tree: a tree that may be changed.
        parts: by module name, how each is divided; the others stay closed.

    Returns:
        A line for each parameter that was divided.
    """
    attentions = {name: module for name, module in tree.named_modules() if name in parts}
    owners = Counter(id(value) for module in tree.modules() for value in module._parameters.values())
    divided: Counter[tuple[int, Parts]] = Counter()
    for name, module in attentions.items():
        divided.update({(id(value), parts[name]) for value in module._parameters.values()})
    made: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
    changes: list[str] = []
    for name, module in attentions.items():
        assert isinstance(module, nn.MultiheadAttention)
        packed = {leaf: module._parameters[leaf] for leaf in ("in_proj_weight", "in_proj_bias")}
        own = APART if packed["in_proj_weight"] is None else parts[name]
        present = [value for value in packed.values() if value is not None]
        if own != WHOLE and any(owners[id(value)] > divided[id(value), parts[name]] for value in present):
            continue
        changes += _open(name, module, own, made)
    return changes


def _open(
    name: str,
    module: nn.MultiheadAttention,
    parts: Parts,
    made: dict[tuple[int, tuple[int, ...]], nn.Parameter],
) -> list[str]:
    plain, order = type(module), tuple(module._parameters)
    changes: list[str] = []
    children: dict[str, nn.Module] = {}
    separate = module._parameters["in_proj_weight"] is None
    whole = {leaf: module._parameters[leaf] for leaf in ("in_proj_weight", "in_proj_bias")}
    for index, part in enumerate(parts):
        packed = {"weight": SEPARATE[index] if separate else "in_proj_weight", "bias": "in_proj_bias"}
        names: dict[str, str] = {}
        for leaf, source in packed.items():
            if source in SEPARATE or parts == WHOLE:
                names[leaf] = source
                continue
            names[leaf] = f"{source}_{index}"
            value = whole[source]
            if value is not None:
                value = made.setdefault((id(value), part), _rows(value, part, module.embed_dim))
                changes.append(f"{_joined(name, names[leaf])} computed from {_joined(name, source)}")
            module._parameters[names[leaf]] = value
        child = Projection.__new__(Projection)
        nn.Module.__init__(child)
        child.in_features = (module.kdim, module.vdim)[index - 1] if separate and index else module.embed_dim
        child.out_features = len(part) * module.embed_dim
        child.training = module.training
        # Not through nn.Module's __setattr__, to which the attention would be a submodule of its own submodule.
        child.__dict__.update(owner=module, part=part, packed=packed, names=names)
        short = SEPARATE[index].removesuffix("_weight") if separate else names["weight"].replace("_weight", "")
        children[short] = child
    if parts != WHOLE:
        for source in ("in_proj_bias",) if separate else ("in_proj_weight", "in_proj_bias"):
            del module._parameters[source]
    out = module.out_proj
    module.__dict__.update(plain=plain, out_plain=type(out), order=order)
    module._modules = {**children, **module._modules}  # in the order in which they are applied
    own_class = (
        OpenAttention if plain is nn.MultiheadAttention else type(f"Open{plain.__name__}", (OpenAttention, plain), {})
    )
    module.__class__ = own_class
    out.__class__ = OutProjection
    return sorted(changes, key=lambda line: "bias" in line)


def adopt(tree: nn.Module) -> None:
    """Give opened attentions the parameters that their projections got from outside."""
    for attention in tree.modules():
        if not isinstance(attention, OpenAttention):
            continue
        for projection in projections(attention):
            for leaf, value in projection._parameters.items():
                attention._parameters[projection.parameter(leaf)] = value
            projection._parameters.clear()
            dense = projection.names["weight"]
            stale = [dense] if is_stand_in(projection) else [f"{dense}_{leaf}" for leaf in FACTORS]
            for name in stale:
                attention._parameters.pop(name, None)


def close_attentions(tree: nn.Module) -> None:
    """Make opened attentions plain ones again, in place, where all of their projections are dense."""
    joined: dict[tuple[int, ...], nn.Parameter] = {}
    for attention in tree.modules():
        if not isinstance(attention, OpenAttention) or any(map(is_stand_in, attention.modules())):
            continue
        values: dict[str, Any] = {}
        for name in attention.order:
            values[name] = attention._parameters.get(name)
            parts = parts_of(attention, name)
            if parts:
                trained = any(part.requires_grad for part in parts)
                key = tuple(map(id, parts))
                if key not in joined:
                    whole = parts[0] if len(parts) == 1 else nn.Parameter(torch.cat(parts).detach(), trained)
                    joined[key] = whole
                values[name] = joined[key]
        for projection in projections(attention):
            del attention._modules[_name_in(attention, projection)]
        attention._parameters.clear()
        attention._parameters.update(values)
        attention.out_proj.__class__ = attention.out_plain  # type: ignore[assignment]
        plain = attention.plain
        for key_ in ("plain", "out_plain", "order"):
            del attention.__dict__[key_]
        attention.__class__ = plain  # type: ignore[assignment]


def parameter_name(name: str, module: nn.Module, leaf: str) -> str:
    """The fully qualified name of a layer's parameter.

    Args:
        name: of the module.
        module: the layer; a projection's parameters are those of its attention.
        leaf: ``"weight"`` or ``"bias"``.
    """
    if isinstance(module, Projection):
        return _joined(name.rpartition(".")[0], module.parameter(leaf))
    return _joined(name, leaf)


def other_weights(attention: OpenAttention) -> list[str]:
    """The names of an opened attention's parameters of two and more dimensions that no projection applies."""
    return [leaf for leaf in ("bias_k", "bias_v") if attention._parameters.get(leaf) is not None]


def _name_in(attention: OpenAttention, projection: Projection) -> str:
    return next(name for name, child in attention._modules.items() if child is projection)


def _rows(packed: nn.Parameter, part: tuple[int, ...], size: int) -> nn.Parameter:
    rows = packed.detach()[part[0] * size : (part[-1] + 1) * size]
    return nn.Parameter(rows, requires_grad=packed.requires_grad)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
