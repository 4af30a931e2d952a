"""Sites and taps: where a trained weight meets an activation. The vocabulary of everything that follows.

A *site* is one weight with all the places that apply it (a module called twice is one site with two calls: one weight,
pooled statistics); a *tap* is an activation that feeds one or more sites, with its patch geometry, so that q, k and v
share one sketch. Everything else that holds a weight is listed with the reason why it is left alone.

:class:`Site` and :class:`Tap` hold names and numbers only, no graph, so sketches, forms and planners work the same
wherever a site was found: in a captured graph (``graph_sites.py``) or in a module tree (``modules.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import networkx as nx
from torch import Tensor

from lowrank_fx.errors import OptionError
from lowrank_fx.patches import Patch


@dataclass(frozen=True)
class Tap:
    """An activation that feeds sites.

    Attributes:
        name: unique; the graph node's name, followed by the geometry for a convolution.
        node: name of the graph node whose value is observed.
        width: length of a row (for a convolution channels x kernel positions; all groups together).
        patch: im2col geometry, or None for rows along the last dimension.
        groups: how many equal parts of a row meet weights of their own; each is sketched by itself.
        reader: name of the first graph node that applies a weight to it; in front of that the activation is final.
        sequence_first: its rows come position by position (``[T, B, width]``, or that flattened), not batch first.
    """

    name: str
    node: str
    width: int
    patch: Patch | None = None
    reader: str = field(default="", compare=False)
    groups: int = 1
    sequence_first: bool = False


@dataclass(frozen=True)
class SiteCall:
    """One graph node that applies a site's weight; its rows come in the order of its tap's."""

    node: str
    tap: str
    bias: str | None
    sequence_first: bool = False


@dataclass(frozen=True)
class Site:
    """One weight that can be factored, with every call of it.

    Attributes:
        name: fully qualified name of the owning module (of the parameter, where it is not called ``weight``).
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"``, ``"conv3d"``, or ``"bmm"`` (a matrix per group, ``[groups, in,
            out]``).
        weight: fully qualified name of the weight.
        transposed: the weight is stored ``[in, out]`` (Hugging Face ``Conv1D``, ``x @ w``, each matrix of ``"bmm"``).
        out_features: rows of the weight as a matrix, m (those of all groups).
        in_features: columns of the weight as a matrix, d (for a convolution in one patch; of one group).
        shape: the weight's own shape.
        dtype: the weight's dtype, as in ``str(tensor.dtype)``.
        patch: geometry of a convolution.
        calls: every node that applies the weight.
        centered: the bias may take up the mean's share of the error: every call has a bias that only this site uses.
        groups: into how many blocks of rows the matrix divides, each applied to its own part of the input.
        tied: something that cannot be factored (an embedding) reads the same weight, so the dense weight stays in use:
            factoring saves FLOPs and adds parameters.
        pair: form and rank of the pair that it came as, whose product the weight is: what ``dense`` then means.
    """

    name: str
    kind: str
    weight: str
    transposed: bool
    out_features: int
    in_features: int
    shape: tuple[int, ...]
    dtype: str
    patch: Patch | None
    calls: tuple[SiteCall, ...]
    centered: bool
    groups: int = 1
    tied: bool = False
    pair: tuple[str, int] | None = None

    @property
    def biases(self) -> tuple[str, ...]:
        """Fully qualified names of the biases of all calls, each once."""
        return tuple(dict.fromkeys(call.bias for call in self.calls if call.bias is not None))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix ``[out_features, in_features]``; group j owns the j-th block of its rows."""
        if self.kind == "bmm":
            return weight.mT.reshape(self.out_features, self.in_features)
        return weight.t() if self.transposed else weight.flatten(1)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """A matrix ``[out_features, in_features]`` in the weight's own shape, contiguous."""
        if self.kind == "bmm":
            return matrix.reshape(self.groups, -1, self.in_features).mT.contiguous()
        return matrix.t().contiguous() if self.transposed else matrix.reshape(self.shape)

    def attribute(self, leaf: str) -> str:
        """The fully qualified name of a new parameter of this site, such as ``layer.0.q.factor_in``."""
        owner, _, own = self.weight.rpartition(".")
        prefix = f"{owner}." if owner else ""
        return prefix + leaf if own == "weight" else f"{prefix}{own}_{leaf}"


@dataclass(frozen=True)
class LeftAlone:
    """A weight that stays as it is, and why."""

    name: str
    reason: str


@dataclass
class SiteTable:
    """Everything :func:`find_sites` found, in graph order.

    Attributes:
        sites: the sites that may be factored.
        taps: by name.
        left_alone: weights that stay as they are.
        graph: networkx graph; an edge from a tap to a site says that the tap feeds the site.
    """

    sites: tuple[Site, ...]
    taps: dict[str, Tap]
    left_alone: tuple[LeftAlone, ...]
    graph: nx.DiGraph = field(repr=False)

    def taps_of(self, site: Site) -> list[Tap]:
        """The taps that feed ``site``, in graph order, each once."""
        return [self.taps[name] for name in dict.fromkeys(call.tap for call in site.calls)]


class RefusedError(Exception):
    """A node applies a weight in a way that no form covers; the message is the reason."""


def site_table(sites: Sequence[Site], taps: Iterable[Tap], left_alone: Iterable[LeftAlone]) -> SiteTable:
    """A table, with the graph of which tap feeds which site."""
    graph: nx.DiGraph = nx.DiGraph()
    for site in sites:
        graph.add_node(site.name, kind="site")
        for call in site.calls:
            graph.add_node(call.tap, kind="tap")
            graph.add_edge(call.tap, site.name)
    by_name: dict[str, Tap] = {}
    for tap in taps:
        by_name.setdefault(tap.name, tap)
    return SiteTable(tuple(sites), by_name, tuple(left_alone), graph)


def tap_name(activation: str, patch: Patch | None, groups: int) -> str:
    """The name of an activation as it meets a weight: what else a sketch of it depends on stands behind its own.

    >>> tap_name("relu", None, 2)
    'relu[g2]'
    """
    marks = [str(patch)] * (patch is not None) + [f"g{groups}"] * (groups > 1)
    return activation + (f"[{' '.join(marks)}]" if marks else "")


def site_name(fqn: str) -> str:
    """The name of the layer that a weight makes: its module, or the parameter where it is not called ``weight``.

    >>> site_name("layer.0.q.weight"), site_name("attn.in_proj_weight")
    ('layer.0.q', 'attn.in_proj_weight')
    """
    owner, _, own = fqn.rpartition(".")
    return owner if own == "weight" and owner else fqn


def matches(pattern: str, fqn: str) -> bool:
    """Whether a pattern (``fnmatch``) means the layer that the weight ``fqn`` makes.

    >>> matches("*.pooler.*", "pooler.dense.weight"), matches("pooler", "pooler.dense.weight")
    (True, False)
    """
    name = site_name(fqn)
    return any(fnmatchcase(text, pattern) for text in (name, fqn, "." + name, "." + fqn))


class Skip:
    """The layers that the user wants left alone.

    Args:
        patterns: of fully qualified names (``fnmatch``; ``"*.pooler.*"`` also matches ``pooler.dense``).
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._unmatched = dict.fromkeys(patterns)
        self._seen: list[str] = []

    def reason(self, fqn: str) -> str | None:
        """Why the weight ``fqn`` is skipped; None if it is not."""
        self._seen.append(site_name(fqn))
        matched = [pattern for pattern in self.patterns if matches(pattern, fqn)]
        for pattern in matched:
            self._unmatched.pop(pattern, None)
        return f"skipped by the pattern {matched[0]!r}" if matched else None

    def check(self) -> None:
        """After every weight was asked for: each pattern must have matched one.

        Raises:
            OptionError: a pattern matches no weight.
        """
        for pattern in self._unmatched:
            shown = ", ".join(self._seen[:8]) + (", ..." if len(self._seen) > 8 else "")
            raise OptionError(f"skip={pattern!r} matches no weight of this model; its layers are {shown}")
