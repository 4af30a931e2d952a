"""Which values of a model are read by what: the structure that tells which layers belong together.

A graph of names and nothing else. Its nodes are the values of a captured graph in their order, its edges lead from a
value to what reads it. A value that applies a weight to another value names that one, its *tap*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import networkx as nx


def site_graph(values: Iterable[tuple[str, Sequence[str]]], taps: Mapping[str, str]) -> nx.DiGraph:
    """The graph of what reads what.

    Args:
        values: every value in the order of their computation, with the values that it is computed from.
        taps: of each value that applies a weight, what it applies it to.
    """
    graph: nx.DiGraph = nx.DiGraph()
    for name, sources in values:
        graph.add_node(name, tap=taps.get(name))
        graph.add_edges_from((source, name) for source in sources)
    return graph


def applied(graph: nx.DiGraph) -> list[str]:
    """The values that apply a weight, in order."""
    return [name for name, tap in graph.nodes(data="tap") if tap is not None]


def users(graph: nx.DiGraph, value: str) -> list[str]:
    """What reads a value, in the order of its edges."""
    return list(graph.successors(value))


def sole_user(graph: nx.DiGraph, value: str) -> str | None:
    """The one value that reads ``value``; None where there are several, or none."""
    readers = users(graph, value)
    return readers[0] if len(readers) == 1 else None


def chains(graph: nx.DiGraph) -> list[tuple[str, ...]]:
    """The longest runs of two and more values that each apply a weight to the one before, which nothing else reads.

    >>> chains(site_graph([("x", []), ("a", ["x"]), ("b", ["a"]), ("c", ["b"])], {"a": "x", "b": "a", "c": "b"}))
    [('a', 'b', 'c')]
    """
    following = {}
    for name in applied(graph):
        user = sole_user(graph, name)
        if user is not None and graph.nodes[user]["tap"] == name:
            following[name] = user
    found = []
    for first in following:
        if graph.nodes[first]["tap"] in following:  # the run began before it
            continue
        run = [first]
        while run[-1] in following:
            run.append(following[run[-1]])
        found.append(tuple(run))
    return found


def shared_taps(graph: nx.DiGraph) -> dict[str, tuple[str, ...]]:
    """The values that several weights are applied to, each with the values that this gives, in order.

    >>> shared_taps(site_graph([("x", []), ("q", ["x"]), ("k", ["x"])], {"q": "x", "k": "x"}))
    {'x': ('q', 'k')}
    """
    found: dict[str, list[str]] = {}
    for name in applied(graph):
        found.setdefault(graph.nodes[name]["tap"], []).append(name)
    return {tap: tuple(readers) for tap, readers in found.items() if len(readers) > 1}
