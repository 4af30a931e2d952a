"""Finding sites and taps in a captured graph of ATen operators, through one table of operators."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from lowrank_fx import cost
from lowrank_fx._memory import memory_of
from lowrank_fx.graph_operators import (
    OPERATORS,
    attribute_behind,
    is_quantised,
    is_transpose,
    schema_name,
    why_not,
)
from lowrank_fx.sites import LeftAlone, RefusedError, Site, SiteCall, SiteTable, Skip, Tap, site_name, site_table

aten = torch.ops.aten

MASK = "attention_mask"
"""The argument that tells padding, ``[B, T]``."""

_VIEWS = frozenset(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
    )
)
"""Operators that change how rows are laid out, not their order."""


def find_sites(gm: GraphModule, skip: Sequence[str] = ()) -> SiteTable:
    """Find every site and tap of a captured graph.

    Args:
        gm: graph of ATen operators with ``meta["val"]``.
        skip: patterns of fully qualified names (``fnmatch``; ``"*.pooler.*"`` also matches ``pooler.dense``).

    Raises:
        OptionError: a pattern matches no weight.
    """
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    uses: dict[int, list[Node]] = {}
    tensors: dict[int, tuple[str, Tensor]] = {}
    for node in gm.graph.nodes:
        for leaf in node.all_input_nodes if node.op != "get_attr" else ():
            source = attribute_behind(leaf)
            if source is None or is_transpose(node):
                continue
            tensor = _fetch(gm, str(source.target))
            if not _is_weight(tensor) and not _is_held_weight(tensor, node, leaf):
                continue
            assert isinstance(tensor, Tensor)
            known = tensors.setdefault(id(tensor), (str(source.target), tensor))
            group = uses.setdefault(id(known[1]), [])
            if node not in group:
                group.append(node)

    for fqn, parameter in gm.named_parameters():
        if parameter.dim() >= 2 and parameter.dtype != torch.bool:
            tensors.setdefault(id(parameter), (fqn, parameter))

    tables = _lookup_tables(gm)
    skipped = Skip(skip)
    sites: list[Site] = []
    taps: list[Tap] = []
    left_alone: list[LeftAlone] = []
    # In graph order; what the graph never reads comes last.
    for key in sorted(tensors, key=lambda key: order[uses[key][0]] if key in uses else len(order)):
        fqn, tensor = tensors[key]
        name = site_name(fqn)
        reason = skipped.reason(fqn)
        if reason is not None:
            left_alone.append(LeftAlone(name, reason))
            continue
        try:
            site, site_taps = _make_site(gm, fqn, tensor, uses.get(key, []), tied=memory_of(tensor) in tables)
        except RefusedError as refusal:
            left_alone.append(LeftAlone(name, str(refusal)))
            continue
        sites.append(site)
        taps += site_taps
    skipped.check()
    return site_table(sites, taps, left_alone)


def _make_site(gm: GraphModule, fqn: str, weight: Tensor, nodes: list[Node], *, tied: bool) -> tuple[Site, list[Tap]]:
    if not nodes:
        raise RefusedError("the captured graph never uses it")
    if not weight.is_floating_point():
        raise RefusedError(f"its weight is quantised or complex ({weight.dtype})")
    unread = [node for node in nodes if node.target not in OPERATORS]
    if unread:
        raise RefusedError(why_not(unread[0], len(nodes) - 1))
    if not isinstance(weight, Parameter):
        raise RefusedError("its weight is a buffer, not a parameter")
    used = [OPERATORS[node.target](node) for node in nodes]
    first = used[0]
    if any(use.manner != first.manner for use in used):
        raise RefusedError("its weight is shared by calls of different kinds or geometry")
    if any(use.bias is not None and not isinstance(_fetch(gm, str(use.bias.target)), Parameter) for use in used):
        raise RefusedError("its bias is a buffer, not a parameter")
    if any(attribute_behind(use.activation) is not None for use in used):
        raise RefusedError("it is applied to another parameter, not to an activation")
    groups = first.groups
    block = weight.shape[-1] if first.transposed else weight.shape[0] // groups
    out_features = groups * block
    in_features = weight.numel() // max(out_features, 1)
    if cost.break_even_rank(out_features, in_features, groups) <= 1:
        each = f" to each of its {groups} groups" if groups > 1 else ""
        raise RefusedError(f"a weight of {block} x {in_features}{each} has no rank below break-even")

    taps, calls = [], []
    for node, use in zip(nodes, used, strict=True):
        turned = _is_sequence_first(use.activation)
        taps.append(Tap(use.tap, use.activation.name, groups * in_features, use.patch, node.name, groups, turned))
        calls.append(SiteCall(node.name, use.tap, None if use.bias is None else str(use.bias.target), turned))
    centered = all(use.bias is not None and set(use.bias.users) <= set(nodes) for use in used) and not _is_shared(
        gm, [str(use.bias.target) for use in used if use.bias is not None]
    )
    site = Site(
        name=site_name(fqn),
        kind=first.kind,
        weight=fqn,
        transposed=first.transposed,
        out_features=out_features,
        in_features=in_features,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype),
        patch=first.patch,
        calls=tuple(calls),
        centered=centered,
        groups=groups,
        tied=tied,
    )
    return site, taps


def _is_sequence_first(activation: Node) -> bool:
    """Whether rows come position by position, for a model that takes a padding mask ``[B, T]``."""
    mask = next((node for node in activation.graph.nodes if node.op == "placeholder" and node.name == MASK), None)
    while activation.target in _VIEWS and activation.meta["val"].dim() < 3:
        (activation,) = activation.all_input_nodes[:1]
    shapes = [node.meta["val"].shape for node in (mask, activation) if node is not None]
    if len(shapes) < 2 or len(shapes[0]) != 2 or len(shapes[1]) < 3:
        return False
    # Symbols are compared as such: asking whether two sizes are equal would put a guard on the graph.
    (batch, positions), (first, second) = ([str(size) for size in shape[:2]] for shape in shapes)
    return (first, second) == (positions, batch) != (batch, positions)


def _is_held_weight(value: object, node: Node, leaf: Node) -> bool:
    """Whether a tensor that is no floating parameter does the work of a weight: it meets an activation in a product."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() <= max(value.shape):
        return False
    if isinstance(value, Parameter):
        return value.dtype != torch.bool
    name = schema_name(node)
    if is_quantised(node):
        return True
    if node.target not in OPERATORS and not name.startswith("aten::conv"):
        return False
    factors = node.args[1:3] if node.target is aten.addmm.default else node.args[:2]
    others = [other for other in factors if isinstance(other, Node) and other is not leaf]
    return leaf in factors and any(attribute_behind(other) is None for other in others)


def _lookup_tables(gm: GraphModule) -> set[object]:
    """The memory of every weight that an embedding reads."""
    nodes = (node for node in gm.graph.nodes if fnmatchcase(schema_name(node), "aten::*embedding*"))
    leaves = (leaf for node in nodes for leaf in node.all_input_nodes if leaf.op == "get_attr")
    values = (_fetch(gm, str(leaf.target)) for leaf in leaves)
    return {memory_of(value) for value in values if isinstance(value, Tensor)}


def _is_weight(value: object) -> TypeGuard[Parameter]:
    return isinstance(value, Parameter) and value.is_floating_point() and value.dim() >= 2


def _fetch(gm: GraphModule, target: str) -> object:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _is_shared(gm: GraphModule, targets: Sequence[str]) -> bool:
    """Whether any of these attributes is the same tensor as an attribute of another name."""
    wanted = {id(_fetch(gm, target)): target for target in targets}
    return any(wanted.get(id(tensor), name) != name for name, tensor in gm.named_parameters(remove_duplicate=False))
