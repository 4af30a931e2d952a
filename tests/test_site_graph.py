"""The structure of what reads what: pure names."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fx.site_graph import applied, chains, shared_taps, site_graph, sole_user, users


def attention() -> nx.DiGraph:
    """q, k and v of one value, and an adapter of two layers beside q."""
    values = [
        ("x", []), ("q", ["x"]), ("a", ["x"]), ("b", ["a"]), ("sum", ["q", "b"]), ("k", ["x"]), ("v", ["x"]),
        ("attend", ["sum", "k", "v"]), ("out", ["attend"]), ("output", ["out"]),
    ]  # fmt: skip
    return site_graph(values, {"q": "x", "a": "x", "b": "a", "k": "x", "v": "x", "out": "attend"})


def test_who_reads_what() -> None:
    graph = attention()
    assert applied(graph) == ["q", "a", "b", "k", "v", "out"]
    assert users(graph, "x") == ["q", "a", "k", "v"]
    assert [sole_user(graph, name) for name in ("x", "a", "b", "output")] == [None, "b", "sum", None]
    assert shared_taps(graph) == {"x": ("q", "a", "k", "v")}
    assert chains(graph) == [("a", "b")]


@pytest.mark.parametrize(
    ("values", "taps", "found"),
    [
        ([("x", []), ("a", ["x"]), ("b", ["a"])], {"a": "x", "b": "a"}, [("a", "b")]),
        ([("x", []), ("a", ["x"]), ("b", ["a"]), ("c", ["a"])], {"a": "x", "b": "a"}, []),  # a second user
        ([("x", []), ("a", ["x"]), ("f", ["a"]), ("b", ["f"])], {"a": "x", "b": "f"}, []),  # something in between
        # b reads a, but applies its weight to something else.
        ([("x", []), ("y", []), ("a", ["x"]), ("b", ["y", "a"])], {"a": "x", "b": "y"}, []),
        ([("x", [])], {}, []),
    ],
)
def test_chains(values: list[tuple[str, list[str]]], taps: dict[str, str], found: list[tuple[str, ...]]) -> None:
    assert chains(site_graph(values, taps)) == found


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=14))
def test_chains_of_any_tree_are_runs_that_cannot_be_longer(entries: list[tuple[int, bool]]) -> None:
    """Value i reads an earlier one; the independent reference walks from every value."""
    parents = {i + 1: entry[0] % (i + 1) for i, entry in enumerate(entries)}
    applies = {i + 1 for i, entry in enumerate(entries) if entry[1]}
    values: list[tuple[str, list[str]]] = [("0", [])]
    values += [(str(i), [str(parent)]) for i, parent in parents.items()]
    found = chains(site_graph(values, {str(i): str(parents[i]) for i in applies}))
    children: dict[int, list[int]] = {i: [] for i in range(len(entries) + 1)}
    for child, parent in parents.items():
        children[parent].append(child)
    links = {(i, children[i][0]) for i in applies if len(children[i]) == 1 and children[i][0] in applies}
    made = [(int(one), int(other)) for chain in found for one, other in pairwise(chain)]
    assert sorted(made) == sorted(links)
    assert len({name for chain in found for name in chain}) == sum(map(len, found))
    ends = {chain[-1] for chain in found}
    assert not any(str(one) in ends for one, _ in links)
