"""The plan: byte-equal through JSON, and a clear error for everything that is not a plan."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_fx.errors import PlanError
from lowrank_fx.forms import FORMS
from lowrank_fx.plan import PLAN_VERSION, MetricPoint, MetricSearch, Plan, SitePlan, Totals, TradeOff
from lowrank_fx.sites import LeftAlone
from lowrank_fx.targets import Keep, Metric, Target, Tolerance
from lowrank_fx.tree_sites import find_sites


def accuracy(model: object) -> float:
    return 0.917


PLAN = Plan(
    target=Keep(flops=0.6),
    planner="budget",
    candidate="effect",
    seed=3,
    sites=(
        SitePlan("a.q", "a.q.weight", "lowrank", 24, 96, 128, (12288, 5376), (1000, 400), 0.25, 0.26, 0.01, ""),
        SitePlan("a.k", "a.k.weight", "dense", None, 96, 128, (12288, 12288), (1000, 1000), 0.0, 0.0, 0.0, "no gain"),
        SitePlan("stem", "stem.weight", "channel", 4, 16, 27, (432, 172), (900, 400), 1e-300, 0.1, 0.3, ""),
    ),
    left_alone=(LeftAlone("embedding", "its weight is used by aten.embedding.default"),),
    cleanup=("bn folded into stem",),
    notes=("hooks on a were détached", "nothing else"),
    totals=Totals((30000, 20000), (5000, 3000), (25008, 17836), (2900, 1800)),
    predicted_error=0.1,
    select_error=0.11,
    error=0.12,
    candidates=(("effect", 0.11), ("uniform", 0.2)),
    curve=(TradeOff(0.3, 0.2, 0.5), TradeOff(1.0, 1.0, 0.0)),
    metric=MetricSearch(
        0.925, 0.917, (MetricPoint(0.5, 0.2, 0.85), MetricPoint(0.6, 0.15, None), MetricPoint(0.7, 0.1, 0.917))
    ),
)
TEXT = PLAN.to_json()

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 10**15)
PAIRS = st.tuples(COUNTS, COUNTS)
SITES = st.builds(
    SitePlan, name=st.text(), weight=st.text(), form=st.sampled_from(["lowrank", "channel"]), rank=st.integers(1, 64),
    out_features=st.integers(64, 4096), in_features=st.integers(64, 4096), params=PAIRS, flops=PAIRS, error=NUMBERS,
    bound=NUMBERS, effect=NUMBERS, reason=st.text(),
)  # fmt: skip
PLANS = st.builds(
    Plan,
    target=st.one_of(st.just(Tolerance(0.3)), st.just(Keep(params=0.5, of="sites"))),
    planner=st.text(), candidate=st.text(), seed=st.integers(), sites=st.lists(SITES, max_size=3).map(tuple),
    left_alone=st.lists(st.builds(LeftAlone, st.text(), st.text()), max_size=3).map(tuple),
    cleanup=st.lists(st.text(), max_size=3).map(tuple), notes=st.lists(st.text(), max_size=3).map(tuple),
    totals=st.builds(Totals, PAIRS, PAIRS, PAIRS, PAIRS), predicted_error=NUMBERS, select_error=NUMBERS, error=NUMBERS,
    candidates=st.lists(st.tuples(st.text(), NUMBERS), max_size=3).map(tuple),
    curve=st.lists(st.builds(TradeOff, NUMBERS, NUMBERS, NUMBERS), max_size=3).map(tuple),
    metric=st.none() | st.builds(MetricSearch, NUMBERS, NUMBERS, st.lists(
        st.builds(MetricPoint, NUMBERS, NUMBERS, st.none() | st.floats()), max_size=3).map(tuple)),
)  # fmt: skip


@given(PLANS)
def test_any_plan_is_byte_equal_through_json(plan: Plan) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "target", [Tolerance(0.05), Keep(flops=0.6), Keep(params=1, of="sites"), Metric(accuracy, 0.1)]
)
def test_a_plan_is_byte_equal_through_json(target: Target) -> None:
    plan = replace(PLAN, target=target)
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert hash(Plan.from_json(text)) == hash(plan)
    # The order and the spacing of a file do not matter, only the plan does.
    shuffled = json.dumps(dict(reversed(json.loads(text).items())))
    assert Plan.from_json(shuffled).to_json() == text


def test_what_a_plan_says() -> None:
    assert [site.name for site in PLAN.factored] == ["a.q", "stem"]
    assert [site.factored for site in PLAN.sites] == [True, False, True]
    totals = PLAN.totals
    assert totals.kept("params", "model") == 20000 / 30000
    assert totals.kept("flops", "model") == 3000 / 5000
    assert totals.kept("params", "sites") == 17836 / 25008
    assert totals.kept("flops", "sites") == 1800 / 2900
    assert Totals((0, 0), (0, 0), (0, 0), (0, 0)).kept("params", "sites") == 1.0
    assert PLAN.metric is not None
    assert PLAN.metric.evaluations == 4
    assert MetricPoint(0.5, 0.2, float("inf")) == MetricPoint(0.5, 0.2, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_no_json(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace(PLAN, error=value).to_json()
    with pytest.raises(PlanError, match="error"):
        Plan.from_json(TEXT.replace('"error": 0.12', f'"error": {json.dumps(value)}'))


@pytest.mark.parametrize("form", ["channel", "channel_in", "spatial", "spatial_t", "tucker2"])
def test_every_rank_on_offer_can_be_read_back(form: str) -> None:
    """Between the two convolutions of a split kernel there may be more channels than the layer has outputs."""
    (site,) = find_sites(nn.ModuleDict({"layer": nn.Conv2d(64, 16, 3)})).sites
    most = FORMS[form].ranks(site)[-1]
    assert (most > site.out_features) == (form in ("channel_in", "spatial", "spatial_t"))
    plan = replace(PLAN, sites=(replace(PLAN.sites[0], form=form, rank=most, out_features=16, in_features=576),))
    assert Plan.from_json(plan.to_json()).sites[0].rank == most


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a plan is not JSON"),
        ("{", "a plan is not JSON"),
        ("[" * 100_000, "a plan is not JSON"),
        ("null", f"a plan of version {PLAN_VERSION} is expected, this one says 'NoneType'"),
        ("[]", "this one says 'list'"),
        ("{}", "this one says None"),
        (TEXT.replace(f'"version": {PLAN_VERSION}', '"version": 99'), "this one says 99"),
        (TEXT.replace('"lowrank"', '"cp"'), r"site 'a.q': no form is called 'cp'; there are \['dense', 'lowrank', "),
        (TEXT.replace('"rank": 24', '"rank": 97'), "site 'a.q': rank 97 is not between 1 and 96"),
        (TEXT.replace('"rank": 24', '"rank": 0'), "site 'a.q': rank 0 is not between 1 and 96"),
        (TEXT.replace('"rank": 24', '"rank": null'), "site 'a.q': rank None is not between 1 and 96"),
        (TEXT.replace('"rank": null', '"rank": 3'), "site 'a.k': .*dense.*rank"),
        (TEXT.replace('"share": 0.6', '"share": 6'), r"Keep\(flops=6\)"),
    ],
)
def test_what_is_not_a_plan_says_where(text: str, message: str) -> None:
    assert text != TEXT
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value, itself apart."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(data[key], (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


PLACES = [path for path in places(json.loads(TEXT)) if path[0] != "version"]
LISTS = ("sites", "left_alone", "cleanup", "notes", "candidates", "curve")
OF_ANY_LENGTH: list[tuple[str, ...]] = [*((field,) for field in LISTS), ("metric", "points")]


def is_legal(path: tuple[Any, ...], old: Any, new: Any) -> bool:
    if isinstance(new, list):
        return new == [] and path in OF_ANY_LENGTH
    if isinstance(new, dict):
        return False
    if path == ("metric",):
        return new is None
    if path[:2] == ("metric", "points") and path[-1] == "value" and (old is None or new is None):
        return new is None or type(new) in (int, float)
    return type(old) is type(new) or (isinstance(old, float) and type(new) is int)


@pytest.mark.parametrize("wrong", [None, {}, [], "text", 0.5, -3, True, [1, 2, 3]], ids=repr)
def test_a_value_of_another_type_is_refused_wherever_it_stands(wrong: Any) -> None:
    for path in PLACES:
        data = json.loads(TEXT)
        old = at(data, path)
        if is_legal(path, old, wrong):
            continue
        at(data, path[:-1])[path[-1]] = copy.deepcopy(wrong)
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps(data))


def test_a_missing_or_an_unknown_field_is_refused_wherever_it_stands() -> None:
    for path in PLACES:
        data = json.loads(TEXT)
        owner = at(data, path[:-1])
        if isinstance(owner, dict):
            del owner[path[-1]]
            with pytest.raises(PlanError):
                Plan.from_json(json.dumps(data))
            if path[0] != "target":
                owner[path[-1]], owner["unknown"] = at(json.loads(TEXT), path), 1
                with pytest.raises(PlanError):
                    Plan.from_json(json.dumps(data))


GARBAGE = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(GARBAGE, st.sampled_from(sorted(json.loads(TEXT))))
def test_garbage_is_a_plan_error(garbage: Any, field: str) -> None:
    data = json.loads(TEXT)
    data[field] = garbage
    try:
        plan = Plan.from_json(json.dumps(data))
    except PlanError:
        return
    assert plan.to_json() == json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
