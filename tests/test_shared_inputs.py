"""One first factor for layers that have the same input: its mathematics, and the plans that it gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, Refine, Tolerance, optimize
from lowrank_fx import module as module_file
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.curves import SiteCurves
from lowrank_fx.double_sided import double_sided
from lowrank_fx.errors import PlanError
from lowrank_fx.folding import folded_plan
from lowrank_fx.forms import FORMS
from lowrank_fx.forms.output import OutputForm
from lowrank_fx.graph_program import count_flops
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan
from lowrank_fx.planners.problem import Option
from lowrank_fx.session import Session
from lowrank_fx.shared_groups import joined
from lowrank_fx.shared_inputs import Joint, join
from lowrank_fx.sites import SiteTable
from lowrank_fx.sketch import FrequentDirections

WIDTH, RANK = 24, 6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Query and key look at the same few directions of their input, the value at all of them; a residual network."""

    def __init__(self, *, alike: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        for place, layer in enumerate((self.q, self.k)):
            seen = rows(RANK, WIDTH, seed=7 if alike else 8 + place)
            left = rows(WIDTH, RANK, seed=20 + place)
            layer.weight.data = 0.3 * left @ seen / RANK**0.5 + 0.01 * rows(WIDTH, WIDTH, seed=30 + place)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / WIDTH**0.5
        x = x + scores.softmax(-1) @ self.v(x)
        made: Tensor = x + self.down(self.up(x).relu())
        return made


def made(**kwargs: bool) -> Attention:
    torch.manual_seed(0)
    return Attention(**kwargs).eval()


def batches(count: int = 6) -> list[Tensor]:
    return [rows(4, 10, WIDTH, seed=seed) + 0.5 for seed in range(count)]


# ---- the mathematics -------------------------------------------------------------------------------------------------


def problem_of(
    model: nn.Module,
    x: Tensor,
    ranks: dict[str, int],
    gradients: dict[str, Tensor] | None = None,
    size: int | None = None,
) -> tuple[SiteTable, dict[str, SiteCurves], dict[str, Option]]:
    """Curves of layers whose rows are ``x``, and options at the given ranks."""
    gm = capture(model, Call((x[None],), {})).graph_module
    table = find_sites(gm)
    sketch = FrequentDirections(x.shape[1], size)
    sketch.update(x)
    form = FORMS["lowrank"]
    assert isinstance(form, OutputForm)
    curves, chosen = {}, {}
    for site in table.sites:
        if site.name not in ranks:
            continue
        weight, name = gm.get_parameter(site.weight), "lowrank"
        curve = form.curve(site, weight, sketch)
        if gradients is not None:
            own = FrequentDirections(site.out_features)
            own.update(gradients[site.name])
            name, curve = "lowrank@gradient", double_sided(form, site, weight, sketch, own)
        curves[site.name] = SiteCurves(site, weight, sketch, {name: curve})
        rank = ranks[site.name]
        params = form.params(site, rank)
        chosen[site.name] = Option(name, rank, params, params, curve.error(rank), 0.1, 0)
    return table, curves, chosen


def layer_error(x: Tensor, joint: Joint, curves: dict[str, SiteCurves]) -> float:
    """The squared error of all layers' outputs, each weighed as the group weighs it, by its definition in float64."""
    total = 0.0
    centred = (x - x.mean(0)).double()
    for left, (site, factors) in zip(joint.lefts, joint.factors(curves).values(), strict=True):
        change = curves[site.name].weight.detach().double() - factors.dense_matrix()
        total += float((left.T @ change @ centred.T).square().sum())
    return total


@pytest.mark.parametrize("gradient", [False, True])
def test_the_predicted_effects_are_those_of_the_factors(gradient: bool) -> None:
    x = rows(4000, WIDTH) @ rows(WIDTH, WIDTH, seed=1) + 1
    gradients = {name: rows(500, WIDTH, seed=place) for place, name in enumerate("qkv")} if gradient else None
    table, curves, chosen = problem_of(made(), x, {"q": 3, "k": 3, "v": 3}, gradients)
    (joint,) = joined(table, curves, chosen, fast=False)
    assert {site.name for site in joint.sites} == {"q", "k"}
    assert joint.rank == 3 * 2 * (2 * WIDTH) // (3 * WIDTH)
    predicted = math.fsum(effect**2 for effect in joint.effects)
    # The prior row of every exact sketch is one in 4000.
    assert layer_error(x, joint, curves) == pytest.approx(predicted, rel=2e-3)
    assert predicted < math.fsum(chosen[site.name].effect ** 2 for site in joint.sites)


def test_no_first_factor_does_better() -> None:
    x = rows(2000, WIDTH) @ rows(WIDTH, WIDTH, seed=1)
    table, curves, chosen = problem_of(made(), x, {"q": 3, "k": 3})
    (joint,) = joined(table, curves, chosen, fast=False)
    best = layer_error(x, joint, curves)
    first = joint.first({name: own.weight for name, own in curves.items()}, curves["q"].sketch)
    torch.testing.assert_close(first @ first.T, torch.eye(joint.rank, dtype=torch.float64))
    for seed in range(5):
        other = first + 0.05 * rows(*first.shape, seed=seed).double()
        sketch, total = curves["q"].sketch, 0.0
        for left, site in zip(joint.lefts, joint.sites, strict=True):
            factors = joint.second(site, curves[site.name].weight, other, sketch)
            change = curves[site.name].weight.detach().double() - factors.dense_matrix()
            total += float((left.T @ change @ (x - x.mean(0)).double().T).square().sum())
        assert total > best


@pytest.mark.parametrize("size", [None, 16])
def test_the_second_factor_is_the_least_squares_fit(size: int | None) -> None:
    x = rows(3000, WIDTH) @ torch.diag(0.6 ** torch.arange(WIDTH)) + 2
    table, curves, chosen = problem_of(made(), x, {"q": 3, "k": 3}, size=size)
    (joint,) = joined(table, curves, chosen, fast=False)
    for site, factors in joint.factors(curves).values():
        weight = curves[site.name].weight.detach().double()
        centred = (x - x.mean(0)).double()
        fit = torch.linalg.lstsq(centred @ factors.factor_in.double().T, centred @ weight.T).solution.T
        found, best = (
            float(((weight - second @ factors.factor_in.double()) @ centred.T).norm())
            for second in (factors.factor_out.double(), fit)
        )
        assert found <= best * (1.001 if size is None else 1.02)
        assert factors.shift is not None
        mean = x.double().mean(0)
        torch.testing.assert_close(factors.shift, weight @ mean - factors.dense_matrix() @ mean, rtol=1e-4, atol=1e-4)
        assert factors.first == (None if site.name == "q" else "q.factor_in")


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 5, 3), (6, 1, 4), (4, 4, 1)])
def test_the_group_is_the_best_of_all(ranks: tuple[int, ...], size: int | None, alike: bool) -> None:
    x = rows(3000, WIDTH) @ rows(WIDTH, WIDTH, seed=1)
    gradients = {name: rows(500, WIDTH, seed=place) for place, name in enumerate("qkv")}
    names = dict(zip("qkv", ranks, strict=True))
    table, curves, chosen = problem_of(made(alike=alike), x, names, gradients, size)
    sites = [site for site in table.sites if site.name in names]
    gains: dict[tuple[str, ...], float] = {}
    for group in (group for count in (2, 3) for group in itertools.combinations(sites, count)):
        joint = join(group, curves, chosen, 1)
        if joint is not None:
            apart = math.fsum(chosen[site.name].effect ** 2 for site in group)
            gains[tuple(site.name for site in group)] = apart - math.fsum(effect**2 for effect in joint.effects)
    found = joined(table, curves, chosen, fast=False)
    best = max(gains, key=lambda group: gains[group])
    assert [tuple(site.name for site in joint.sites) for joint in found] == ([best] if gains[best] > 0 else [])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_never_vary_join_nothing(value: float) -> None:
    x = torch.full((300, WIDTH), value)
    table, curves, chosen = problem_of(made(), x, {"q": 3, "k": 3, "v": 3})
    assert joined(table, curves, chosen, fast=False) == ()


class Alike(nn.Module):
    """Two layers so wide that their ranks go in steps, and nearly the same."""

    width = 256

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(self.width, self.width), nn.Linear(self.width, self.width)
        self.k.weight.data = self.q.weight.data + 0.1 * self.k.weight.data

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.q(x) + self.k(x)
        return made


@pytest.mark.parametrize(("fast", "rank"), [(False, 56), (True, 48)])
def test_a_shared_rank_goes_in_the_steps_of_the_layers_own(fast: bool, rank: int) -> None:
    """At 45 each, 256-wide layers pay for 60 together: a step of 8 below, or the 16 that runs fast."""
    table, curves, chosen = problem_of(Alike().eval(), rows(600, Alike.width), {"q": 45, "k": 45})
    (joint,) = joined(table, curves, chosen, fast=fast)
    assert joint.rank == rank


def test_layers_that_look_at_other_directions_stay_apart() -> None:
    x = rows(2000, WIDTH)
    table, curves, chosen = problem_of(made(alike=False), x, {"q": 6, "k": 6})
    assert joined(table, curves, chosen, fast=False) == ()
    nothing = {name: replace(option, effect=0.0) for name, option in chosen.items()}
    assert joined(table, curves, nothing, fast=False) == ()


# ---- plans -----------------------------------------------------------------------------------------------------------

TARGET = Keep(params=0.45, of="sites")


def optimized(model: nn.Module | None = None, **kwargs: object) -> LowRankModule:
    options = {"target": TARGET, "compile": False, "progress": False} | kwargs
    return optimize(made() if model is None else model, batches(), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> LowRankModule:
    return optimized()


def sharing(plan: Plan) -> dict[str, str | None]:
    return {site.name: site.shares for site in plan.sites if site.basis == "shared"}


def test_the_plan_says_who_shares_and_the_model_holds_it_once(small: LowRankModule) -> None:
    plan = small.plan
    assert sharing(plan) == {"q": None, "k": "q"}
    assert "shared inputs" in plan.candidate
    assert any("q, k" in note for note in plan.notes)
    held = dict(small.named_parameters())
    assert "q.factor_in" in held
    assert "k.factor_in" not in held
    assert sum(value.numel() for value in held.values()) == plan.totals.model_params[1]
    assert count_flops(small.artifact.program.module, Call((batches()[0],), {})) == plan.totals.model_flops[1]  # type: ignore[arg-type]
    assert plan.totals.kept("params", "sites") <= 0.45
    assert sum(site.params[1] for site in plan.sites) == plan.totals.site_params[1]
    assert Plan.from_json(plan.to_json()) == plan
    assert "lowrank@shared" in str(small.report())


def test_it_wins_on_held_out_rows(small: LowRankModule) -> None:
    errors = dict(small.plan.candidates)
    (shared,) = (error for name, error in errors.items() if name.endswith("shared inputs"))
    assert shared < min(error for name, error in errors.items() if "shared" not in name)
    assert small.plan.select_error <= shared
    with torch.no_grad():
        x = rows(64, 10, WIDTH, seed=99) + 0.5
        wanted = made()(x)
        error = float((small(x) - wanted).norm() / wanted.norm())
    assert error == pytest.approx(small.plan.error, rel=0.2)


def test_the_same_seed_gives_the_same_plan(small: LowRankModule) -> None:
    assert optimized().plan.to_json() == small.plan.to_json()
    assert small.replan(TARGET).plan.to_json() == small.plan.to_json()


def test_re_gauged_pairs_are_kept_apart(small: LowRankModule) -> None:
    again = small.replan(Keep(params=0.45, of="sites", regauge=True))
    assert not sharing(again.plan)
    assert all(site.shares is None for site in again.plan.sites)


def test_a_tolerance_takes_it_where_that_is_less_error(small: LowRankModule) -> None:
    session = small.session
    assert session is not None
    target = Tolerance(0.1)
    plan = session.plan(target)[0]
    assert sharing(plan) == {"q": None, "k": "q"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "sharing", lambda *_: None)
        apart = session.plan(target)[0]
    assert not sharing(apart)
    assert plan.totals.model_flops[1] <= apart.totals.model_flops[1]
    errors = dict(plan.candidates)
    (name,) = (name for name in errors if name.endswith("shared inputs"))
    assert plan.select_error <= errors[name] < dict(apart.candidates)[apart.candidate.split(",")[0]] <= target.error


def test_layers_that_share_may_be_folded_back(small: LowRankModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half of the layers is timed by itself, with or without the one that holds the first factor."""

    def timing(session: Session, made: LowRankModule) -> PairedTiming:
        names = {name.rpartition(".")[0] for name, _ in made.named_parameters() if "factor_out" in name}
        speed = 1.2 if len(names) <= 2 else 0.9
        return PairedTiming(speed, 1.0, 1 / speed, 0.0, 7)

    monkeypatch.setattr(module_file, "measure", timing)
    made = small.replan(Tolerance(0.1))
    assert 0 < len(made.plan.factored) <= 2
    assert not sharing(made.plan)
    assert made.plan.select_error <= 0.1
    assert sum(value.numel() for value in made.parameters()) == made.plan.totals.model_params[1]
    assert any("the model measured 0.90x with it" in site.reason for site in made.plan.sites)


def test_a_layer_without_bias_shares_too() -> None:
    model = made(bias=False)
    small = optimized(model)
    assert sharing(small.plan) == {"q": None, "k": "q"}
    x = batches()[0]
    with torch.no_grad():
        assert float((small(x) - model(x)).norm() / model(x).norm()) < 0.2


# ---- what comes after ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(small: LowRankModule, tmp_path: Path) -> None:
    small.save(tmp_path)
    loaded = lowrank_fx.load(made(), tmp_path, compile=False)
    x = batches()[0]
    torch.testing.assert_close(loaded(x), small(x))
    assert loaded.plan == small.plan
    assert set(dict(loaded.named_parameters())) == set(dict(small.named_parameters()))
    # Other weights: the second factors follow, the first one stays.
    other = made()
    with torch.no_grad():
        for layer in (other.q, other.k):
            layer.weight += 0.05 * rows(WIDTH, WIDTH, seed=50)
    moved = lowrank_fx.load(other, tmp_path, compile=False, strict=False)
    torch.testing.assert_close(moved.get_parameter("q.factor_in"), small.get_parameter("q.factor_in"))
    with torch.no_grad():
        wanted = other(x)
        assert float((moved(x) - wanted).norm()) < float((small(x) - wanted).norm())
        same = lowrank_fx.load(made(), tmp_path, compile=False, strict=False)
        torch.testing.assert_close(same(x), small(x))


class Wide(nn.Module):
    """Many inputs, few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x)
        return made


class Grouped(nn.Module):
    """Fewer keys than queries, as in grouped-query attention; the same directions matter to both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH // 4)
        seen = 0.7 ** torch.arange(WIDTH // 2)[:, None] * rows(WIDTH // 2, WIDTH, seed=7)
        for place, layer in enumerate((self.q, self.k)):
            layer.weight.data = rows(layer.out_features, len(seen), seed=20 + place) @ seen

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x)), -1)


def test_a_first_factor_may_have_more_rows_than_a_layer_has_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Grouped().eval()
    small = lowrank_fx.optimize(model, batches(), target=Keep(params=0.4, of="sites"), compile=False, progress=False)
    (key,) = [site for site in small.plan.factored if site.name == "k"]
    assert key.rank is not None
    assert key.shares == "q"
    assert key.rank > key.out_features
    small.save(tmp_path)
    loaded = lowrank_fx.load(model, tmp_path, compile=False)
    x = batches()[0]
    torch.testing.assert_close(loaded(x), small(x))
    assert Plan.from_json(small.plan.to_json()) == small.plan
    with torch.no_grad():
        assert float((small(x) - model(x)).norm() / model(x).norm()) < 0.15


@pytest.mark.parametrize("names", [["q"], ["k"], ["q", "k"], None])
def test_folded_layers_pay_for_themselves(small: LowRankModule, names: list[str] | None, tmp_path: Path) -> None:
    folded = small.fold(names)
    x = batches()[0]
    torch.testing.assert_close(folded(x), small(x), rtol=1e-4, atol=1e-5)
    assert sum(value.numel() for value in folded.parameters()) == folded.plan.totals.model_params[1]
    assert count_flops(folded.artifact.program.module, Call((x,), {})) == folded.plan.totals.model_flops[1]  # type: ignore[arg-type]
    folded.save(tmp_path)
    torch.testing.assert_close(lowrank_fx.load(made(), tmp_path, compile=False)(x), folded(x))
    rest = folded.fold(None)
    assert sum(value.numel() for value in rest.parameters()) == rest.plan.totals.model_params[1]
    assert rest.plan.totals.kept("params", "sites") == 1


def test_a_layer_at_break_even_is_not_taken_for_a_folded_one(small: LowRankModule) -> None:
    """A first factor and a second of rank 12 are as many numbers as a dense layer of 24 x 24."""
    costs = {"q": WIDTH * WIDTH, "k": WIDTH * WIDTH // 2}
    sites = tuple(
        replace(site, rank=12, params=(WIDTH * WIDTH, costs[site.name])) if site.name in costs else site
        for site in small.plan.sites
    )
    plan = replace(small.plan, sites=sites)
    other = next(site.name for site in plan.factored if site.name not in costs)
    after = {site.name: site.params[1] for site in folded_plan(plan, [other], {}).sites}
    assert {name: after[name] for name in costs} == costs
    after = {site.name: site.params[1] for site in folded_plan(plan, [other], {}, ["q"]).sites}
    assert after["k"] == WIDTH * WIDTH  # q was folded before, so k holds the first factor now


def test_refined_it_learns_one_first_factor(tmp_path: Path) -> None:
    small = optimized(refine=Refine(steps=8, lr=1e-3))
    assert sharing(small.plan) == {"q": None, "k": "q"}
    assert small.plan.refinement is not None
    assert small.plan.refinement.after <= small.plan.refinement.before
    assert "k.factor_in" not in dict(small.named_parameters())
    small.save(tmp_path)
    torch.testing.assert_close(lowrank_fx.load(made(), tmp_path, compile=False)(batches()[0]), small(batches()[0]))


def test_exported_it_multiplies_once(small: LowRankModule, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the ONNX extra is not installed")
    pytest.importorskip("onnxruntime", reason="the ONNX extra is not installed")
    path = tmp_path / "small.onnx"
    small.export_onnx(path, fold=False)
    graph = onnx.load(path).graph
    firsts = [name for node in graph.node if node.op_type == "MatMul" for name in node.input if "factor_in" in name]
    assert len(firsts) == sum(site.factored and site.shares is None for site in small.plan.sites)


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
def test_the_backend_takes_such_a_plan(small: LowRankModule, tmp_path: Path) -> None:
    small.save(tmp_path)
    model = made()
    fast = torch.compile(model, backend="lowrank_fx", options={"plan": str(tmp_path), "inner": "eager"})
    x = batches()[0]
    with torch.no_grad():
        fast(x)
        torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)


class Broken(Attention):
    """Dynamo takes query and key in graphs of their own."""

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x)
        torch._dynamo.graph_break()
        x = x + (query @ self.k(x).mT / WIDTH**0.5).softmax(-1) @ self.v(x)
        made: Tensor = x + self.down(self.up(x).relu())
        return made


@torch.no_grad()
@pytest.mark.usefixtures("_fresh")
def test_across_a_graph_break_each_graph_holds_the_first_factor(small: LowRankModule, tmp_path: Path) -> None:
    small.save(tmp_path)
    model = Broken().eval()
    model.load_state_dict(made().state_dict())
    fast = torch.compile(model, backend="lowrank_fx", options={"plan": str(tmp_path), "inner": "eager"})
    x = batches()[0]
    fast(x)
    torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-5)
    assert lowrank_fx.status(fast).phase == "factored"


def test_a_plan_whose_sharing_makes_no_sense_is_refused(small: LowRankModule) -> None:
    def changed(**fields: object) -> str:
        sites = tuple(replace(site, **fields) if site.name == "k" else site for site in small.plan.sites)  # type: ignore[arg-type]
        return replace(small.plan, sites=sites).to_json()

    with pytest.raises(PlanError, match=r"site 'k': it uses the first factor of 'x', which has none of its own"):
        Plan.from_json(changed(shares="x"))
    with pytest.raises(PlanError, match=r"site 'k': it cannot use the first factor of 'q', which is another"):
        Plan.from_json(changed(rank=1))
    with pytest.raises(PlanError, match=r"site 'k': layers with the form 'dense' cannot have one first factor"):
        Plan.from_json(changed(form="dense"))


def test_a_first_factor_of_more_rows_than_its_layers_have_outputs_is_refused() -> None:
    """Otherwise a file could ask for a matrix of the input's width squared."""
    plan = optimized(Wide().eval(), target=Keep(params=0.5, of="sites")).plan
    (site,) = plan.factored
    hostile = replace(plan, sites=(replace(site, basis="shared", rank=WIDTH),))
    with pytest.raises(PlanError, match=r"rank 24 is not between 1 and 4"):
        Plan.from_json(hostile.to_json())
