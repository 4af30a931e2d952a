"""FOLD: factors become dense operators again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from lowrank_fx.forms import Factors
from lowrank_fx.forms.geometry import joined, owners
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import call_node, free_name, get_parameter, parameter_node, set_parameter, users_of_attr
from lowrank_fx.passes.factorize_conv import geometry_call, geometry_of
from lowrank_fx.passes.factorize_regauged import RegaugedCall, read_calls
from lowrank_fx.sites import Site

aten = torch.ops.aten

_LEAVES = ("factor_in", "factor_mid", "factor_out")

_APART = "its factors are not applied one right after the other"

_Dense: TypeAlias = tuple[OpOverload, tuple[Argument, ...], dict[str, Argument]]


class FoldFactors(Pass):
    """Multiply a factored pair back into one dense operator, under the weight's own name.

    Where something else took that name in the meantime (the weight was tied to an embedding), under the next free one.

    Before::

        %inner  = linear(%x, %factor_in)                # or conv2d(%x, %factor_in, None, stride, padding, dilation, g)
        %linear = linear(%inner, %factor_out, %bias)    # or conv2d(%inner, %factor_out, %bias, groups=g); or bmm twice

    After::

        %linear = linear(%x, %weight, %bias)            # or addmm, matmul where the weight is stored [in, out],
                                                        # or conv2d(%x, %weight, %bias, stride, padding, dilation, g)

    Re-gauged pairs (:class:`~lowrank_fx.passes.factorize_regauged.FactorizeRegauged`) likewise. A product that several
    pairs share (:class:`~lowrank_fx.passes.pack_shared_input.PackSharedInput`) stays for those that are not folded.

    Formula: ``weight = factor_out @ factor_in`` within each group, multiplied in float64 and rounded once to the
    factors' dtype. Of convolutions it is their kernels' composition; with two or three kernels that span different
    dimensions, the dense one takes each dimension's stride, padding and dilation from the factor that spans it.

    Left alone when the factors are not in the graph, a middle value has another user, or something happens to that
    value in between.

    Args:
        sites: the sites whose pairs are folded, by name.
    """

    name = "fold-factors"

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Fold the factors of every site."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        for site in self.sites.values():
            pair = _read_pair(gm, site)
            if isinstance(pair, str):
                refusals.append(Refusal(site.name, pair))
            elif not budget.take():
                refusals.append(budget.refusal(site.name))
            else:
                self._fold(gm, site, pair)
                changes.append(f"{site.name} folded to {site.out_features} x {site.in_features}")
        return PassResult(tuple(changes), tuple(refusals))

    def _fold(self, gm: GraphModule, site: Site, pair: _Pair) -> None:
        names, chains, regauged = pair.names, pair.chains, pair.regauged
        tensors = [get_parameter(gm, name).detach() for name in names]
        mid = tensors[1] if len(tensors) == 3 else None
        factors = Factors(
            tensors[0],
            tensors[-1],
            None,
            site.groups,
            stacked=site.kind == "bmm",
            factor_mid=mid,
            gauge=regauged[0].gauge if regauged else None,
        )
        weight, trainable = free_name(gm, site.weight), get_parameter(gm, names[0]).requires_grad
        set_parameter(gm, weight, site.unmatrix(factors.dense_matrix()).to(tensors[0].dtype), trainable)
        for number, chain in enumerate(chains):
            outer = chain[-1]
            dense = parameter_node(gm, weight, outer)
            if regauged:
                operator, arguments, options = _linear_call(gm, site, dense, *regauged[number].operands, outer)
            else:
                operator, arguments, options = _dense_call(gm, site, dense, chain, tensors)
            folded = call_node(gm, operator, arguments, options, like=outer, before=outer)
            name = outer.name
            outer.replace_all_uses_with(folded)
            for node in reversed(chain):
                if not node.users:  # the product of a first factor may be another pair's too
                    gm.graph.erase_node(node)
            folded.name = name


def why_not(gm: GraphModule, site: Site) -> str | None:
    """Why a site's factors cannot be folded; None where they can be."""
    found = _read_pair(gm, site)
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class _Pair:
    """A site's factors in a graph.

    Attributes:
        names: of the factors, in the order of their application.
        chains: for each call of the site, the nodes that apply them; of a re-gauged pair the last one.
        regauged: the calls of a re-gauged pair; None for any other.
    """

    names: Sequence[str]
    chains: Sequence[Sequence[Node]]
    regauged: Sequence[RegaugedCall] | None = None


def _read_pair(gm: GraphModule, site: Site) -> _Pair | str:
    """The factors of a site, or why they cannot be folded."""
    shared = _read_shared(gm, site)
    if shared is not None:
        return shared
    readers = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    names = [site.attribute(leaf) for leaf in _LEAVES if site.attribute(leaf) in readers]
    if not {site.attribute("factor_in"), site.attribute("factor_out")} <= set(names):
        return "the graph has no pair of this name"
    if site.kind == "linear" and get_parameter(gm, names[0]).shape[1] < site.in_features:
        calls = read_calls(gm, site)
        return _APART if calls is None else _Pair(names, [[call.last] for call in calls], calls)
    chains = [[node] for node in users_of_attr(gm, names[0])]
    refusal = next(filter(None, (_extend(gm, chains, name) for name in names[1:])), None)
    return refusal or _Pair(names, chains)


def _read_shared(gm: GraphModule, site: Site) -> _Pair | None:
    """The pair of a linear site whose first factor is another's, or others' too; None where it has none such."""
    last = site.attribute("factor_out")
    if site.kind != "linear" or not any(node.target == last for node in gm.graph.find_nodes(op="get_attr")):
        return None
    chains = [[node.args[0], node] for node in users_of_attr(gm, last)]
    pairs = [[inner, outer] for inner, outer in chains if isinstance(inner, Node) and isinstance(outer, Node)]
    if len(pairs) < len(chains) or not all(_is_first_product(inner) for inner, _ in pairs):
        return None
    firsts = {str(inner.args[1].target) for inner, _ in pairs if isinstance(inner.args[1], Node)}
    if firsts == {site.attribute("factor_in")} and all(len(inner.users) == 1 for inner, _ in pairs):
        return None
    return _Pair((*firsts, last), pairs)


def _is_first_product(product: Node) -> bool:
    """Whether a node is a product that only pairs read, whichever they are."""
    if product.target is not aten.linear.default or len(product.args) != 2:
        return False
    seconds = [user.args[1] for user in product.users if user.target is aten.linear.default]
    named = [str(node.target) for node in seconds if isinstance(node, Node) and node.op == "get_attr"]
    return len(named) == len(product.users) and all(name.endswith("factor_out") for name in named)


def _extend(gm: GraphModule, chains: Sequence[list[Node]], name: str) -> str | None:
    """Add to each chain the node that applies the factor ``name`` to its last value; why not, if there is none."""
    shared = [chain[-1].name for chain in chains if len(chain[-1].users) != 1]
    if shared:
        return f"the middle value {shared[0]!r} has another user"
    if {next(iter(chain[-1].users)) for chain in chains} != set(users_of_attr(gm, name)):
        return _APART
    for chain in chains:
        chain.append(next(iter(chain[-1].users)))
    return None


def _dense_call(gm: GraphModule, site: Site, weight: Node, chain: Sequence[Node], factors: Sequence[Tensor]) -> _Dense:
    inner, outer = chain[0], chain[-1]
    activation = inner.args[0]
    assert isinstance(activation, Node)
    bias = outer.args[2] if len(outer.args) > 2 else None
    if site.kind == "linear":
        return _linear_call(gm, site, weight, activation, bias, outer)
    assert isinstance(inner.target, OpOverload)
    if site.patch is not None and any(owners(factors)):
        geometries, groups = zip(*map(geometry_of, chain, factors), strict=True)
        operator, geometry = geometry_call(inner, joined(geometries, factors), groups[0])
        options: dict[str, Argument] = {}
    else:
        operator, geometry = inner.target, inner.args[3:]
        options = {key: value for key, value in inner.kwargs.items() if key != "bias"}
    if bias is None and not geometry:
        return operator, (activation, weight), options
    return operator, (activation, weight, bias, *geometry), options


def _linear_call(gm: GraphModule, site: Site, weight: Node, activation: Node, bias: Argument, like: Node) -> _Dense:
    if not site.transposed:
        return aten.linear.default, (activation, weight) if bias is None else (activation, weight, bias), {}
    # The weight keeps its own layout, [in, out], so that its values fit the model it came from.
    if bias is None:
        return aten.matmul.default, (activation, weight), {}
    if activation.meta["val"].dim() == 2:
        return aten.addmm.default, (bias, activation, weight), {}
    turned = call_node(gm, aten.t.default, (weight,), like=like, before=like)
    return aten.linear.default, (activation, turned, bias), {}
