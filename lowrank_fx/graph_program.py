"""A model captured by ``torch.export``: a graph of ATen operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lowrank_fx import rewrite
from lowrank_fx._memory import distinct_numbers
from lowrank_fx.batches import Call
from lowrank_fx.capture import Captured
from lowrank_fx.forms import Factors, forms_for
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.passes.restore_pairs import MergedPair
from lowrank_fx.passes.verify import used_tensors
from lowrank_fx.program import Factored, Outputs, Program, Trials
from lowrank_fx.signature import CallSignature
from lowrank_fx.sites import LeftAlone, Site, SiteTable, site_table
from lowrank_fx.walk import Walk


class GraphProgram(Program):
    """A captured graph.

    Args:
        module: the graph.
        calls: how it is called.
        cleanup: what was folded before sites were found.
        notes: what the user should know.
        pairs: that the model came with and the graph has as one layer each, by the name of the product. What the
            program costs is what it costs with them; they come back where they are not factored anew.
    """

    way = "export"
    module: GraphModule

    def __init__(
        self,
        module: GraphModule,
        calls: CallSignature,
        cleanup: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        pairs: Mapping[str, MergedPair] | None = None,
    ) -> None:
        self.module = module
        self.calls = calls
        self.cleanup = cleanup
        self.notes = notes
        self.pairs = dict(pairs or {})

    @classmethod
    def from_capture(cls, captured: Captured) -> GraphProgram:
        """Clean a captured graph up, in place."""
        pairs: dict[str, MergedPair] = {}
        results = PassManager((*order.cleanup(), *order.pairing(pairs))).run(captured.graph_module)
        changes = tuple(change for _, result in results for change in result.changes)
        return cls(captured.graph_module, captured.calls, changes, captured.notes, pairs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call in the captured form; see :meth:`CallSignature.bind`."""
        return self.calls.bind(args, kwargs)

    def run(self, call: Call) -> Outputs:
        """Run the graph."""
        return run_flat(self.module, call)

    def returned(self, call: Call) -> Any:
        """Run the graph."""
        call = call.map(torch.clone)
        return self.module(*call.args, **call.kwargs)

    def find_sites(self, skip: Sequence[str] = ()) -> SiteTable:
        """Sites by the table of operators; a pair that the model came with is one site."""
        table = find_sites(self.module, skip)
        if not self.pairs:
            return table
        sites = [replace(site, pair=self._pair_of(site)) for site in table.sites]
        strange = [site.name for site in sites if site.weight in self.pairs and site.pair is None]
        reason = "it came as factors that no form makes"
        left_alone = [*table.left_alone, *(LeftAlone(name, reason) for name in strange)]
        kept = [site for site in sites if site.name not in strange]
        return site_table(kept, (tap for site in kept for tap in table.taps_of(site)), left_alone)

    def _pair_of(self, site: Site) -> tuple[str, int] | None:
        """Form and rank of the pair that a site came as; None where it came as none, or as one that no form makes."""
        if site.weight not in self.pairs:
            return None
        shapes = self.pairs[site.weight].shapes
        rank = shapes[-1][1]
        for form in forms_for(site, None):
            blank = form.blank(site, self.weight(site), rank)
            if tuple(tuple(tensor.shape) for tensor in blank.tensors.values()) == shapes:
                return form.name, rank
        return None

    def weight(self, site: Site) -> Tensor:
        """The parameter of a site."""
        return self.module.get_parameter(site.weight)

    def params(self) -> int:
        """Numbers in the parameters that the graph reads."""
        return self._params

    @cached_property
    def _params(self) -> int:
        read = used_tensors(self._as_it_came()).values()
        return distinct_numbers(tensor for tensor in read if isinstance(tensor, nn.Parameter))

    def observed(self, table: SiteTable, observers: Mapping[str, nn.Module]) -> Callable[[Call], Outputs]:
        """A copy of the graph with the observers in it."""
        graph = rewrite.copy_graph_module(self.module, clone=False)
        # Observers change no value, so bisecting rewrites must not leave any out.
        PassManager(order.observation(table.taps, observers), bisect=False).run(graph)
        return lambda call: run_flat(graph, call)

    def count_flops(self, call: Call) -> int:
        """FLOPs of the graph on ``call``; nothing is computed."""
        return count_flops(self._as_it_came(), call)

    def trials(self, call: Call, sites: Sequence[Site], base: Factored | None = None) -> Trials:
        """Walk the graph once; at a site's first call the walk forks, so only the part behind the site runs again."""
        walk = Walk(self.module)
        run = walk.run(call)
        for site, factors in (base or {}).values():
            run.exchange(substitutes(self.module, site, factors, exact=False))
        starts = [(min(walk.position[use.node] for use in site.calls), site) for site in sites]
        for position, site in sorted(starts, key=lambda start: start[0]):
            while run.position < position:
                run.compute()
                run.move()

            def trial(factors: Factors | None, site: Site = site) -> Outputs:
                fork = run.fork()
                if factors is not None:
                    fork.exchange(substitutes(self.module, site, factors, exact=False))
                else:
                    fork.exchange({name: self.module.get_parameter(name) for name in (site.weight, *site.biases)})
                return fork.finish()

            yield site, trial

    def exchanged(self, factored: Factored) -> Callable[[Call], Outputs]:
        """The graph with the dense products of the factors in the place of weights."""
        values: dict[str, Tensor] = {}
        for site, factors in factored.values():
            values.update(substitutes(self.module, site, factors, exact=False))

        def run(call: Call) -> Outputs:
            call = call.map(torch.clone)  # a graph may write to its inputs
            return tuple(pytree.tree_leaves(functional_call(self.module, values, call.args, call.kwargs)))

        return run

    def probed(self, nodes: Sequence[str]) -> Callable[[Call], tuple[Outputs, dict[str, Tensor]]]:
        """A walk through the graph that keeps the values of some nodes."""
        walk = Walk(self.module)
        wanted = frozenset(nodes)

        def run(call: Call) -> tuple[Outputs, dict[str, Tensor]]:
            values: dict[str, Tensor] = {}
            return walk.run(call).finish(wanted, values), values

        return run

    def factorize(self, factored: Factored, *, clone: bool) -> GraphProgram:
        """A rewritten copy of the graph."""
        return self._with(rewrite.factorize(self.module, factored, tuple(self.pairs.values()), clone=clone))

    def unfoldable(self, sites: Mapping[str, Site]) -> dict[str, str]:
        """Sites whose pairs are not in the graph, or whose middle value has another user."""
        return rewrite.unfoldable(self.module, sites)

    def fold(self, sites: Mapping[str, Site]) -> GraphProgram:
        """A copy of the graph with the pairs multiplied out."""
        return self._with(rewrite.fold(self.module, sites))

    def copy(self) -> GraphProgram:
        """A copy that owns its tensors."""
        return self._with(rewrite.copy_graph_module(self.module, clone=True), self.pairs)

    def train(self, mode: bool) -> None:
        """Set the flag of the graph's modules; what the graph computes stays that of eval mode."""
        for module in self.module.children():  # the graph itself refuses train() and eval()
            module.train(mode)

    def moved(self, before: torch.device, after: torch.device) -> None:
        """Devices that capture wrote into the graph (of ``arange``, ``full``, ...) follow the parameters."""

        def follow(value: Any) -> Any:
            return after if isinstance(value, torch.device) and value.type == before.type else value

        for node in self.module.graph.nodes:
            node.args = torch.fx.node.map_aggregate(node.args, follow)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, follow)
        self.module.recompile()

    def _as_it_came(self) -> GraphModule:
        """The graph, or where it came with pairs a copy with them in place that shares its tensors; only to be read."""
        if not self.pairs:
            return self.module
        return rewrite.factorize(self.module, {}, tuple(self.pairs.values()), clone=False)

    def _with(self, module: GraphModule, pairs: Mapping[str, MergedPair] | None = None) -> GraphProgram:
        return GraphProgram(module, self.calls, self.cleanup, self.notes, pairs)


def run_flat(gm: GraphModule, call: Call) -> Outputs:
    """Run a graph and return its outputs as flat leaves; ``call`` stays as it is, even if the graph writes to it."""
    call = call.map(torch.clone)
    return tuple(pytree.tree_leaves(gm(*call.args, **call.kwargs)))


def substitutes(gm: GraphModule, site: Site, factors: Factors, *, exact: bool = True) -> dict[str, Tensor]:
    """Stand-ins for a site's weight and biases, by fully qualified name: the dense product of its factors.

    Args:
        gm: the graph.
        site: the site.
        factors: its factors.
        exact: whether they are multiplied in float64, as fits to what follows from them need it; errors do not.
    """
    dense = factors.dense_matrix().to(factors.factor_in.dtype) if exact else factors.stand_in()
    values = {site.weight: site.unmatrix(dense)}
    if factors.shift is not None:
        for name in site.biases:
            bias = gm.get_parameter(name).detach()
            values[name] = (bias.double() + factors.shift.to(bias.device)).to(bias.dtype)
    return values


def count_flops(gm: GraphModule, call: Call) -> int:
    """FLOPs of a graph on ``call`` by torch's flop counter (2 x MACs, attention included); nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (call.args, call.kwargs))
    counter = flop_counter()
    with mode, counter, torch.no_grad():
        gm(*args, **kwargs)
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Torch's flop counter, which also counts the kernel that ``scaled_dot_product_attention`` takes on CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    counter = FlopCounterMode(display=False, custom_mapping={attention: attention_flops})
    counter.mod_tracker = _WholeModel()  # type: ignore[assignment]
    return counter


class _WholeModel:
    """Counts for the model as a whole. Torch's tracker of modules takes apart all they return, which not all stand."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing is tracked."""

    def __exit__(self, *raised: object) -> None:
        """Nothing was tracked."""
