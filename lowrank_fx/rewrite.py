"""REWRITE and FOLD: a plan's factors go into a graph, and come out again.

The captured graph itself is never changed: a copy is. The copy owns its modules; with ``clone=True`` it also owns its
tensors, so that nothing it does can reach the user's model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from lowrank_fx._env import max_rewrites
from lowrank_fx._memory import memory_of
from lowrank_fx.errors import PassError
from lowrank_fx.forms import Factors
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.passes.fold_factors import why_not
from lowrank_fx.passes.restore_pairs import MergedPair
from lowrank_fx.passes.untie_embeddings import retie
from lowrank_fx.sites import Site


def copy_graph_module(gm: GraphModule, *, clone: bool) -> GraphModule:
    """A graph module with its own graph and modules; its tensors are cloned or shared.

    A tensor that has several names is one tensor in the copy too.
    """
    copied = GraphModule(gm, _copy_graph(gm.graph), class_name=type(gm).__name__)
    if not clone:
        return copied
    own_tensors(copied)
    return copied


def own_tensors(module: nn.Module) -> None:
    """Give a module tensors of its own; what shares its memory under several names is one tensor after."""
    clones: dict[object, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                new = clones.get(memory_of(parameter))
                if new is None:
                    new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    clones[memory_of(parameter)] = new
                part._parameters[name] = new  # type: ignore[assignment]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = clones.setdefault(id(buffer), buffer.detach().clone())


def _copy_graph(graph: Graph) -> Graph:
    """The graph with the same node names, metadata and calling convention."""
    copied = Graph()
    output = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    value, old = output
    copied.output(value).meta = dict(old.meta)
    for source, target in zip(graph.nodes, copied.nodes, strict=True):
        target.name = source.name  # sites and taps refer to nodes by name
    copied.set_codegen(graph._codegen)
    return copied


def factorize(
    gm: GraphModule, factored: Mapping[str, tuple[Site, Factors]], pairs: Sequence[MergedPair] = (), *, clone: bool
) -> GraphModule:
    """A copy of the clean captured graph with the given sites factored.

    Args:
        gm: the clean captured graph; unchanged.
        factored: the site and its factors, by site name.
        pairs: that the model came with; those that are not factored anew come back.
        clone: whether tensors that are not factored are cloned.
    """
    # Weights that are about to be replaced are not cloned first: the passes delete them.
    rewritten = copy_graph_module(gm, clone=False)
    anew = {site.weight for site, _ in factored.values()}
    PassManager(order.rewriting(factored, [pair for pair in pairs if pair.weight not in anew])).run(rewritten)
    if clone:
        return copy_graph_module(rewritten, clone=True)
    retie(rewritten)  # a head that stayed dense is its embedding again
    return rewritten


def unfoldable(gm: GraphModule, sites: Mapping[str, Site]) -> dict[str, str]:
    """The sites whose factors cannot be folded, with the reasons."""
    reasons = {name: why_not(gm, site) for name, site in sites.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def fold(gm: GraphModule, sites: Mapping[str, Site]) -> GraphModule:
    """A copy of a factored graph, sharing no tensor with it, with one dense operator for each of the given sites.

    Args:
        gm: the factored graph; unchanged.
        sites: by name; others stay factored.

    Raises:
        PassError: one of them cannot be folded; :func:`unfoldable` tells which.
    """
    folded = copy_graph_module(gm, clone=False)
    ((_, result),) = PassManager(order.folding(sites)).run(folded)
    if result.refusals and max_rewrites() is None:
        refusal = result.refusals[0]
        raise PassError(f"{refusal.node} cannot be folded: {refusal.reason}")
    return copy_graph_module(folded, clone=True)
