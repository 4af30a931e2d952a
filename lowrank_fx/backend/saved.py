"""A saved model gives its factors to the graphs of ``torch.compile``: no call is calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx import storage
from lowrank_fx.backend.regions import RegionGraph
from lowrank_fx.errors import StorageError
from lowrank_fx.forms import FORMS, Factors
from lowrank_fx.plan import Plan
from lowrank_fx.sites import Site


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Attributes:
        folder: where it was read from.
        plan: its plan.
        tensors: its tensors by name; a first factor that several layers use under the name that each would give it.
    """

    folder: Path
    plan: Plan
    tensors: Mapping[str, Tensor]

    def rewritten(self, graph: RegionGraph) -> GraphModule | None:
        """A region with the stored factors in it; None if the plan factors none of its layers.

        Raises:
            StorageError: what is stored does not fit the region.
        """
        entries = {entry.name: entry for entry in self.plan.factored}
        sites = {site.name: site for site in graph.find_sites().sites if site.name in entries}
        if not sites:
            return None
        self._check_folded(graph)
        own = {id(tensor) for tensor in (*graph.module.parameters(), *graph.module.buffers())}
        empty = {name: (site, self._blank(graph, site, sites)) for name, site in sites.items()}
        made = graph.factorize(empty, clone=False).module
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            stored = self.tensors.get(name)
            if stored is None and id(tensor) in own:
                continue  # as the model has it: a name of its own that the saved graph did not need
            if stored is None or stored.shape != tensor.shape:
                raise StorageError(
                    f"{self.folder}: the stored model has no {name!r} of the shape {tuple(tensor.shape)}"
                )
            _put(made, name, stored.to(tensor.device, tensor.dtype))
        return made

    def _check_folded(self, graph: RegionGraph) -> None:
        """Make sure that what was folded into stored tensors is folded in the region too, and is not applied again."""
        names = {name for name, _ in (*graph.module.named_parameters(), *graph.module.named_buffers())}
        owners = names | {name.rpartition(".")[0] for name in names}
        for line in sorted(set(self.plan.cleanup) ^ set(graph.cleanup)):
            _, folded, into = line.partition(" folded into ")
            if folded and into in owners:
                where = "stored model and not in this graph" if line in self.plan.cleanup else "graph and not as stored"
                raise StorageError(
                    f"{self.folder}: {line} in the {where}, which ends or begins at a graph break between the two; "
                    "call lowrank_fx.load instead"
                )

    def _blank(self, graph: RegionGraph, site: Site, sites: Mapping[str, Site]) -> Factors:
        entry = next(entry for entry in self.plan.factored if entry.name == site.name)
        if (entry.out_features, entry.in_features) != (site.out_features, site.in_features) or entry.rank is None:
            raise StorageError(
                f"{self.folder}: {site.name!r} is {site.out_features} x {site.in_features}, "
                f"the plan says {entry.out_features} x {entry.in_features}"
            )
        if entry.pivots is not None:
            raise StorageError(
                f"{self.folder}: {site.name!r} is re-gauged, which plan= does not take; call lowrank_fx.load instead"
            )
        blank = FORMS[entry.form].blank(site, graph.weight(site), entry.rank)
        if entry.shares is None or entry.shares not in sites:
            return blank
        return replace(blank, first=sites[entry.shares].attribute("factor_in"))


def read_saved(root: nn.Module | None, folder: str) -> Saved:
    """Read a saved model for ``root``.

    Args:
        root: the model that runs.
        folder: what :meth:`LowRankModule.save` wrote, or the ``plan.json`` in it.

    Raises:
        StorageError: there is none, it is damaged, or it is of another model.
    """
    path = Path(folder)
    path = path.parent if path.is_file() else path
    if root is None:
        raise StorageError(f"{path}: plan= needs a compiled module, and a function was compiled")
    with torch.inference_mode(False):
        artifact = storage.load(root, path)
    module = artifact.program.module
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    # A layer whose region has not the one that it shares with holds a first factor of its own there.
    for entry in artifact.plan.factored:
        if entry.shares is not None:
            own, shared = (artifact.sites[name].attribute("factor_in") for name in (entry.name, entry.shares))
            if shared in tensors:  # it is not where all of them were folded
                tensors.setdefault(own, tensors[shared])
    return Saved(path, artifact.plan, tensors)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._parameters:
        part._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
    else:
        part._buffers[leaf] = value.detach()
