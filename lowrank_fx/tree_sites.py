"""Which modules of a tree are sites: their class says what they compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from lowrank_fx.attention import OpenAttention
from lowrank_fx.attention_parts import closed_because, other_weights, parameter_name
from lowrank_fx.modules import Layer, read_layer
from lowrank_fx.sites import LeftAlone, Site, SiteCall, SiteTable, Skip, Tap, site_name, site_table


def find_sites(tree: nn.Module, skip: Sequence[str] = ()) -> SiteTable:
    """Every layer of a module tree that may be factored, in the order of the tree; the other weights with reasons.

    Layers that share a weight are one site. A tap is the input of one module: two layers that read the same activation
    have two, since nothing says so before the model runs.

    Args:
        tree: the tree; its weights are parameters (not computed).
        skip: patterns of fully qualified names.

    Raises:
        OptionError: a pattern matches no weight.
    """
    owners: Counter[int] = Counter()
    for module in tree.modules():
        owners.update({id(value) for value in module._parameters.values() if value is not None})
    groups: dict[int, list[tuple[str, nn.Module, Layer]]] = {}
    left_alone: list[LeftAlone] = []
    skipped = Skip(skip)
    tables: Counter[int] = Counter()
    closed: dict[int, str] = {}
    for name, module in tree.named_modules():
        layer = read_layer(module)
        if isinstance(module, nn.MultiheadAttention) and (reason := closed_because(module)) is not None:
            closed[id(module.out_proj)] = reason
        if isinstance(layer, Layer):
            groups.setdefault(id(module.weight), []).append((name, module, layer))
        elif isinstance(module, OpenAttention):
            for own in other_weights(module):
                fqn = parameter_name(name, module, own)
                left_alone.append(
                    LeftAlone(fqn, skipped.reason(fqn) or "a row that attention adds to its keys or values")
                )
        elif isinstance(layer, str):
            weights = [own for own, value in module.named_parameters(recurse=False) if value.dim() >= 2] or [""]
            layer = closed.get(id(module)) or closed_because(module) or layer
            for own in weights:
                fqn = ".".join(part for part in (name, own) if part)
                left_alone.append(LeftAlone(site_name(fqn), skipped.reason(fqn) or layer))
                if own and not isinstance(module, nn.Linear):
                    tables[id(module._parameters[own])] += 1
    sites: list[Site] = []
    taps: list[Tap] = []
    for key, members in groups.items():
        name, module, layer = members[0]
        fqn = parameter_name(name, module, "weight")
        refusal = skipped.reason(fqn) or _refusal(members, key, tables, owners)
        if refusal is not None:
            left_alone.append(LeftAlone(site_name(fqn), refusal))
            continue
        site = _make_site(fqn, members, owners, tied=key in tables)
        sites.append(site)
        width = site.in_features * site.groups
        taps += [Tap(call.tap, call.node, width, site.patch, groups=site.groups) for call in site.calls]
    skipped.check()
    return site_table(sites, taps, left_alone)


def _make_site(fqn: str, members: list[tuple[str, nn.Module, Layer]], owners: Counter[int], *, tied: bool) -> Site:
    _, module, layer = members[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    out_features = weight.shape[1] if layer.transposed else weight.shape[0]
    biases = [getattr(member, "bias", None) for _, member, _ in members]
    calls = tuple(
        SiteCall(name, f"{name} input", None if bias is None else parameter_name(name, member, "bias"))
        for (name, member, _), bias in zip(members, biases, strict=True)
    )
    return Site(
        name=site_name(fqn),
        kind=layer.kind,
        weight=fqn,
        transposed=layer.transposed,
        out_features=out_features,
        in_features=weight.numel() // max(out_features, 1),
        shape=tuple(weight.shape),
        dtype=str(weight.dtype),
        patch=layer.patch,
        calls=calls,
        centered=all(bias is not None and owners[id(bias)] == 1 for bias in biases),
        groups=layer.groups,
        tied=tied,
    )


def _refusal(
    members: list[tuple[str, nn.Module, Layer]], key: int, tables: Counter[int], owners: Counter[int]
) -> str | None:
    _, module, layer = members[0]
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if any(other != layer for _, _, other in members):
        return "its weight is shared by layers of different kinds or geometry"
    if owners[key] > len(members) + tables[key]:
        return "its weight is shared by a module of another kind"
    out_features = weight.shape[1] if layer.transposed else weight.shape[0]
    in_features = weight.numel() // max(out_features, 1)
    if layer.groups > 1 and weight.shape[1] == 1:
        return f"a depthwise convolution ({layer.groups} groups) mixes no channels, so it has no rank to reduce"
    if min(out_features // layer.groups, in_features) < 2:
        return f"a weight of {out_features} x {in_features} has no rank below break-even"
    return None
