"""Several graphs of one model as one captured model.

Dynamo cuts a model into regions, and makes several of one piece (for other sizes, in training and in evaluation, before
and behind a branch). A region is a :class:`RegionGraph`; all regions of a model together are a
:class:`RegionsProgram`, so that effects, planners and rewriting see one program. A call of it is a call of one region,
and what the model returns is, for its purposes, what that region returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowrank_fx._memory import distinct_numbers
from lowrank_fx.batches import Call
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.loader_batch import Change
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.program import Factored, Outputs, Program, Trials
from lowrank_fx.rewrite import copy_graph_module
from lowrank_fx.signature import CallSignature
from lowrank_fx.sites import LeftAlone, Site, SiteCall, SiteTable, Skip, Tap, site_table


@dataclass(frozen=True)
class RegionCall(Call):
    """The arguments of one call of a region, which counts as one row: no rows can be cut from it.

    A region's inputs are activations, sizes and tables; which dimension of each is the batch, nothing says.

    Attributes:
        region: which region it is a call of.
    """

    region: int = 0

    @property
    def batch_size(self) -> int:
        """One."""
        return 1

    def rows(self, start: int, stop: int) -> RegionCall:
        """The call itself."""
        return self

    def _changed(self, change: Change, follow: Callable[[Any, Mapping[int, Tensor]], Any]) -> RegionCall:
        args = pytree.tree_map_only(Tensor, change, self.args)
        return replace(self, args=args, mask=None if self.mask is None else change(self.mask))


class RegionGraph(GraphProgram):
    """A region of a model: a clean graph that is called with its inputs in order.

    Args:
        module: the graph, cleaned up in place.
    """

    def __init__(self, module: GraphModule) -> None:
        results = PassManager(order.cleanup()).run(module)
        changes = tuple(change for _, result in results for change in result.changes)
        super().__init__(module, CallSignature(inspect.Signature(), Call((), {}), None), changes)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call as it is."""
        return args, kwargs


def local(table: Mapping[str, Site], factored: Factored) -> dict[str, tuple[Site, Factors]]:
    """Factors for the sites of one region, in the dtypes that they have there (autocast rounds weights).

    Args:
        table: the region's sites by name.
        factored: sites of the whole model with their factors.
    """
    made = {}
    for name, (site, factors) in factored.items():
        own = table.get(name)
        if own is not None and _alike(own, site):
            made[name] = own, _as_dtype(factors, own)
    return made


class RegionsProgram(Program):
    """Several regions of one model.

    Args:
        regions: by the number that their calls carry.
    """

    way = "export"

    def __init__(self, regions: Mapping[int, GraphProgram]) -> None:
        self.regions = dict(regions)
        self.module = nn.ModuleDict({str(number): region.module for number, region in self.regions.items()})
        self.cleanup = tuple(dict.fromkeys(line for region in self.regions.values() for line in region.cleanup))
        self.notes = ()
        self._tables: dict[int, dict[str, Site]] = {}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call as it is."""
        return args, kwargs

    def run(self, call: Call) -> Outputs:
        """Run the call's region."""
        return self.regions[_number(call)].run(call)

    def returned(self, call: Call) -> Any:
        """What the call's region returns."""
        return self.regions[_number(call)].returned(call)

    def find_sites(self, skip: Sequence[str] = ()) -> SiteTable:
        """The sites of all regions; a weight that several use is one site with all their calls."""
        return merged_table({number: region.find_sites() for number, region in self.regions.items()}, skip)

    def weight(self, site: Site) -> Tensor:
        """The parameter of a site."""
        number, _, _ = site.calls[0].node.partition("/")
        return self.regions[int(number)].module.get_parameter(site.weight)

    def params(self) -> int:
        """Numbers in the parameters that any region reads."""
        copies = [copy_graph_module(region.module, clone=False) for region in self.regions.values()]
        return distinct_numbers(parameter for copied in copies for parameter in copied.parameters())

    def observed(self, table: SiteTable, observers: Mapping[str, nn.Module]) -> Callable[[Call], Outputs]:
        """Copies of the graphs with the observers in them."""
        runs = {}
        for number, region in self.regions.items():
            own_names = [name for name in table.taps if _belongs(name, number)]
            taps = [
                replace(table.taps[name], name=_apart(name), node=_apart(table.taps[name].node)) for name in own_names
            ]
            part = site_table((), taps, ())
            runs[number] = region.observed(part, {_apart(name): observers[name] for name in own_names})
        return lambda call: runs[_number(call)](call)

    def count_flops(self, call: Call) -> int:
        """FLOPs of the call's region."""
        return self.regions[_number(call)].count_flops(call)

    def trials(self, call: Call, sites: Sequence[Site], base: Factored | None = None) -> Trials:
        """Sites that the call's region has, changed in that region."""
        number = _number(call)
        table = self._sites(number)
        whole = {site.name: site for site in sites}
        own = [table[name] for name, site in whole.items() if name in table and _alike(table[name], site)]
        for site, trial in self.regions[number].trials(call, own, local(table, base or {})):

            def changed(factors: Factors | None, site: Site = site, trial: Any = trial) -> Outputs:
                outputs: Outputs = trial(None if factors is None else _as_dtype(factors, site))
                return outputs

            yield whole[site.name], changed

    def exchanged(self, factored: Factored) -> Callable[[Call], Outputs]:
        """Every region with the factors of its own sites."""
        runs = {
            number: region.exchanged(local(self._sites(number), factored)) for number, region in self.regions.items()
        }
        return lambda call: runs[_number(call)](call)

    def probed(self, nodes: Sequence[str]) -> Callable[[Call], tuple[Outputs, dict[str, Tensor]]]:
        """The call's region, walked through."""
        runs = {
            number: region.probed([_apart(node) for node in nodes if _belongs(node, number)])
            for number, region in self.regions.items()
        }

        def run(call: Call) -> tuple[Outputs, dict[str, Tensor]]:
            number = _number(call)
            outputs, values = runs[number](call)
            return outputs, {f"{number}/{node}": value for node, value in values.items()}

        return run

    def factorize(self, factored: Factored, *, clone: bool) -> RegionsProgram:
        """Every region with its own sites factored."""
        return RegionsProgram(
            {
                number: region.factorize(local(self._sites(number), factored), clone=clone)
                for number, region in self.regions.items()
            }
        )

    def unfoldable(self, sites: Mapping[str, Site]) -> dict[str, str]:
        """Sites that cannot be multiplied out in one of the regions."""
        found: dict[str, str] = {}
        for number, region in self.regions.items():
            found.update(region.unfoldable(self._own(number, sites)))
        return found

    def fold(self, sites: Mapping[str, Site]) -> RegionsProgram:
        """Every region with its own pairs multiplied out."""
        return RegionsProgram(
            {number: region.fold(self._own(number, sites)) for number, region in self.regions.items()}
        )

    def copy(self) -> RegionsProgram:
        """Copies of the regions; what they share is copied for each."""
        return RegionsProgram({number: region.copy() for number, region in self.regions.items()})

    def train(self, mode: bool) -> None:
        """Set the flag of every region."""
        for region in self.regions.values():
            region.train(mode)

    def moved(self, before: torch.device, after: torch.device) -> None:
        """Every region follows."""
        for region in self.regions.values():
            region.moved(before, after)

    def _sites(self, number: int) -> dict[str, Site]:
        if number not in self._tables:
            self._tables[number] = {site.name: site for site in self.regions[number].find_sites().sites}
        return self._tables[number]

    def _own(self, number: int, sites: Mapping[str, Site]) -> dict[str, Site]:
        calls = {
            name: tuple(_apart_call(call) for call in site.calls if _belongs(call.node, number))
            for name, site in sites.items()
        }
        return {name: replace(site, calls=calls[name]) for name, site in sites.items() if calls[name]}


def merged_table(tables: Mapping[int, SiteTable], skip: Sequence[str] = ()) -> SiteTable:
    """The sites of several regions as one table; nodes and taps are called ``<region>/<name>`` (of one: as they are).

    A weight that one region uses in a way that no form covers, or that two use in different ways, is left alone.

    Args:
        tables: by region.
        skip: patterns of layers to leave alone. One that matches nothing is no error: regions come one by one.
    """

    def joined(number: int, name: str) -> str:
        return f"{number}/{name}" if len(tables) > 1 else name

    skipped = Skip(skip)
    found: dict[str, Site] = {}
    taps: list[Tap] = []
    alone: dict[str, str] = {}
    for number, table in tables.items():
        for tap in table.taps.values():
            taps.append(replace(tap, name=joined(number, tap.name), node=joined(number, tap.node)))
        for refused in table.left_alone:
            alone.setdefault(refused.name, refused.reason)
        for site in table.sites:
            calls = tuple(
                replace(call, node=joined(number, call.node), tap=joined(number, call.tap)) for call in site.calls
            )
            other = found.get(site.name)
            if other is None:
                found[site.name] = replace(site, calls=calls)
            elif _alike(site, other):
                found[site.name] = replace(
                    other,
                    calls=(*other.calls, *calls),
                    centered=other.centered and site.centered,
                    tied=other.tied or site.tied,
                )
            else:
                alone.setdefault(site.name, "its weight is used in different ways by two graphs of the model")
    sites = []
    for name, site in found.items():
        reason = skipped.reason(site.weight) or alone.get(name)
        if reason is None:
            sites.append(site)
        else:
            alone[name] = reason
    left_alone = [LeftAlone(name, reason) for name, reason in alone.items()]
    used = {call.tap for site in sites for call in site.calls}
    return site_table(sites, [tap for tap in taps if tap.name in used], left_alone)


def _alike(one: Site, other: Site) -> bool:
    return (one.kind, one.transposed, one.shape, one.patch, one.groups) == (
        other.kind,
        other.transposed,
        other.shape,
        other.patch,
        other.groups,
    )


def _as_dtype(factors: Factors, site: Site) -> Factors:
    dtype = getattr(torch, site.dtype.removeprefix("torch."))
    if factors.factor_in.dtype == dtype:
        return factors
    mid = None if factors.factor_mid is None else factors.factor_mid.to(dtype)
    return replace(
        factors, factor_in=factors.factor_in.to(dtype), factor_out=factors.factor_out.to(dtype), factor_mid=mid
    )


def _number(call: Call) -> int:
    assert isinstance(call, RegionCall)
    return call.region


def _apart(name: str) -> str:
    return name.partition("/")[2]


def _belongs(name: str, number: int) -> bool:
    return name.startswith(f"{number}/")


def _apart_call(call: SiteCall) -> SiteCall:
    return replace(call, node=_apart(call.node), tap=_apart(call.tap))
