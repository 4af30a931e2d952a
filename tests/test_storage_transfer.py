"""``load(..., strict=False)``: stored factors follow other weights, and stay what they are for the same ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import batches, given, original
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, storage
from lowrank_fx.errors import StorageError
from lowrank_fx.forms import FORMS, Factors
from lowrank_fx.latency import PairedTiming
from lowrank_fx.manifest import PLAN_FILE
from lowrank_fx.plan import SitePlan
from lowrank_fx.sites import Site, SiteCall
from lowrank_fx.sketch import FrequentDirections
from lowrank_fx.transfer import transferred
from lowrank_fx.tree_sites import find_sites

GOLDEN = Path(__file__).parent / "golden"


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entry_of(site: Site, form: str) -> SitePlan:
    """What a plan says of a site; only form and basis count here."""
    sizes = (site.out_features, site.in_features)
    return SitePlan(site.name, site.weight, form, 3, *sizes, (0, 0), (0, 0), 0.0, 0.0, 0.0, "")


# ---- one layer -------------------------------------------------------------------------------------------------------

LAYERS = {
    "lowrank": nn.Linear(20, 12),
    "channel": nn.Conv2d(6, 12, 3),
    "channel grouped": nn.Conv2d(8, 12, 3, groups=2),
    "channel_in": nn.Conv2d(12, 8, 3),
    "spatial": nn.Conv2d(6, 12, 3),
    "spatial grouped": nn.Conv2d(8, 12, (3, 5), groups=2),
    "spatial_t": nn.Conv2d(6, 12, (3, 2)),
    "tucker2": nn.Conv2d(12, 12, 3),
    "tucker2 grouped": nn.Conv1d(12, 12, 5, groups=2),
}


def layer(kind: str) -> tuple[Site, Tensor, Factors]:
    """A site, its weight, and random factors that are the nearest to it behind the last ones."""
    site = find_sites(nn.ModuleDict({"layer": LAYERS[kind].double()})).sites[0]
    form = FORMS[kind.split()[0]]
    blank = form.blank(site, torch.zeros(site.shape, dtype=torch.float64), 3)
    values: dict[str, Any] = {
        name: rows(*tensor.shape, seed=place) for place, (name, tensor) in enumerate(blank.tensors.items())
    }
    factors = replace(blank, **values)
    weight = rows(*site.shape, seed=9)
    return site, weight, replace(factors, factor_in=nearest(site, weight, factors))


def nearest(site: Site, weight: Tensor, factors: Factors) -> Tensor:
    """The first factor for which the product is nearest to the weight: least squares over all of its entries."""
    columns = []
    for place in range(factors.factor_in.numel()):
        unit = torch.zeros(factors.factor_in.numel(), dtype=torch.float64)
        unit[place] = 1.0
        columns.append(replace(factors, factor_in=unit.view_as(factors.factor_in)).dense_matrix().flatten())
    goal = site.matrix(weight).flatten()[:, None]
    made: Tensor = torch.linalg.lstsq(torch.stack(columns, 1), goal, driver="gelsd").solution
    return made.view_as(factors.factor_in)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_plain_projection_follows_the_weight_all_the_way(kind: str) -> None:
    site, weight, factors = layer(kind)
    other = weight + 0.1 * rows(*site.shape, seed=10)
    made = transferred(site, entry_of(site, kind.split()[0]), other, factors, 0.0)
    expected = nearest(site, other, factors)
    # Both are least squares in float64 with condition numbers below 100.
    torch.testing.assert_close(made.factor_in, expected, rtol=1e-9, atol=1e-9)
    assert made.tensors.keys() == factors.tensors.keys()
    assert all(torch.equal(made.tensors[name], factors.tensors[name]) for name in list(made.tensors)[1:])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fitted_factor_goes_a_part_of_the_way(kind: str) -> None:
    """The share of the formula, with the distances taken from the dense matrices."""
    site, weight, plain = layer(kind)
    fitted = replace(plain, factor_in=plain.factor_in + 0.1 * rows(*plain.factor_in.shape, seed=11))
    gap = float((plain.dense_matrix() - fitted.dense_matrix()).norm())
    # The weight that it was: the same objects come back.
    assert transferred(site, entry_of(site, kind.split()[0]), weight, fitted, gap) is fitted
    other = weight + rows(*site.shape, seed=12)
    there = replace(fitted, factor_in=nearest(site, other, fitted))
    share = 1 - (gap / float((there.dense_matrix() - fitted.dense_matrix()).norm())) ** 2
    assert 0.05 < share < 1
    made = transferred(site, entry_of(site, kind.split()[0]), other, fitted, gap)
    expected = fitted.factor_in + share * (there.factor_in - fitted.factor_in)
    torch.testing.assert_close(made.factor_in, expected, rtol=1e-8, atol=1e-8)


def test_a_batch_of_matrices_and_a_transposed_weight() -> None:
    call = (SiteCall("node", "tap", None),)
    for kind, shape, groups, transposed in (("bmm", (3, 8, 5), 3, True), ("linear", (8, 5), 1, True)):
        out = shape[-1] * groups
        site = Site("a", kind, "a.weight", transposed, out, 8, shape, "torch.float64", None, call, False, groups)
        weight = rows(*shape)
        blank = FORMS["lowrank"].blank(site, weight, 2)
        factors = replace(
            blank, factor_in=torch.zeros_like(blank.factor_in), factor_out=rows(*blank.factor_out.shape, seed=2)
        )
        made = transferred(site, entry_of(site, "lowrank"), weight, factors, 0.0)
        torch.testing.assert_close(made.factor_in, nearest(site, weight, factors), rtol=1e-9, atol=1e-9)


def test_what_the_outputs_directions_chose_is_the_nearest_already() -> None:
    """Factors as planning makes them from activations: with the weight that they were made of nothing moves."""
    site = find_sites(nn.ModuleDict({"layer": nn.Linear(20, 12)})).sites[0]
    weight = rows(12, 20, dtype=torch.float32)
    sketch = FrequentDirections(20)
    sketch.update(rows(200, 20, seed=3, dtype=torch.float32) * torch.linspace(3, 0.1, 20))
    form = FORMS["lowrank"]
    factors = form.factor(site, weight, form.curve(site, weight, sketch), 4, sketch)
    again = transferred(site, entry_of(site, "lowrank"), weight, factors, 0.0)
    # Rounded to float32 once more.
    torch.testing.assert_close(again.dense_matrix(), factors.dense_matrix(), rtol=1e-5, atol=1e-6)
    # For any other weight, and any inputs, what comes of it is no further away than the stored pair is.
    for seed in range(5):
        other = weight + 0.03 * rows(12, 20, seed=seed, dtype=torch.float32)
        moved = transferred(site, entry_of(site, "lowrank"), other, factors, 0.0)
        x = rows(50, 20, seed=100 + seed) * torch.logspace(0, -seed, 20, dtype=torch.float64)
        errors = [float((x @ (other.double() - each.dense_matrix()).T).norm()) for each in (moved, factors)]
        assert errors[0] < errors[1]


def test_a_regauged_pair_is_regauged_again() -> None:
    site = find_sites(nn.ModuleDict({"layer": nn.Linear(20, 12).double()})).sites[0]
    weight, second = rows(12, 20), rows(12, 4, seed=1)
    pair = Factors(torch.linalg.pinv(second) @ weight, second, None).regauged()
    assert pair.factor_in.shape == (4, 16)
    kept = transferred(site, entry_of(site, "lowrank"), weight, pair, 1e-9)
    assert kept is pair
    other = weight + 0.1 * rows(12, 20, seed=2)
    moved = transferred(site, entry_of(site, "lowrank"), other, pair, 1e-9)
    assert moved.gauge is not None
    assert moved.factor_in.shape == (4, 16)
    projection = second @ torch.linalg.pinv(second) @ other
    torch.testing.assert_close(moved.dense_matrix(), projection, rtol=1e-8, atol=1e-8)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _no_stopwatch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank_fx.module, "measure", lambda *_: PairedTiming(1.25, 0.5, 0.4, 0.01, 7))
        yield


def changed(model: nn.Module, share: float, only: str = "") -> nn.Module:
    """The model with Gaussian changes, relative to each parameter's own size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith(only):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(share * parameter.square().mean().sqrt() * noise)
    return other


def load(model: nn.Module, folder: Path, **options: bool) -> LowRankModule:
    return lowrank_fx.load(model, folder, compile=False, **options)


def error(made: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((made(inputs) - model(inputs)).norm() / model(inputs).norm())


@pytest.mark.parametrize("kind", ["regauged", "tree", "conv", "tucker"])
def test_the_same_weights_give_the_same_function(kind: str) -> None:
    """Through the way of other weights, which a change too small to matter leads to."""
    folder = GOLDEN / "v2" / kind
    model, inputs, outputs = given(folder)
    same = load(model, folder / "saved", strict=False)
    assert same.plan == load(model, folder / "saved").plan
    other = changed(model, 1e-7)
    made = load(other, folder / "saved", strict=False)
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), outputs, rtol=1e-5, atol=3e-6)
    assert any("strict=False" in note for note in made.plan.notes)
    with pytest.raises(StorageError, match=r"has other values than the weights .* or pass strict=False"):
        load(other, folder / "saved")


class Residual(nn.Module):
    """Layers whose outputs and inputs have few strong directions, as those of trained models have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        falling = torch.logspace(0, -1, 48)[:, None]
        with torch.no_grad():
            for place, layer in enumerate(self.layers):
                layer.get_parameter("weight").copy_(0.4 * falling * rows(48, 48, seed=place, dtype=torch.float32))
                layer.get_parameter("bias").zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return torch.sub(x, 0)


def inputs_of(count: int, seed: int) -> Tensor:
    mix = rows(48, 48, seed=77, dtype=torch.float32) * torch.logspace(0, -1.5, 48)
    return rows(count, 48, seed=seed, dtype=torch.float32) @ mix.T + 0.5


@pytest.mark.parametrize("regauge", [False, True])
def test_other_weights_are_followed(regauge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is lower than with the stored factors in the new model, and never higher for a small change."""
    model = Residual().eval()
    loader = [inputs_of(128, seed) for seed in range(5)]
    target = Keep(params=0.5, of="sites", regauge=regauge)
    fast = lowrank_fx.optimize(model, loader, target=target, compile=False, progress=False, capture="modules")
    assert len(fast.plan.factored) == 3
    fast.save(tmp_path / "first")
    inputs = inputs_of(300, 99)
    for share, gain in ((0.01, 1.001), (0.1, 0.999), (0.3, 0.97)):
        other = changed(model, share)
        made = load(other, tmp_path / "first", strict=False)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "transferred", lambda site, entry, weight, factors, gap: factors)
            stale = error(load(other, tmp_path / "first", strict=False), other, inputs)
        # Measured: 1.000, .996 and .941 of the error with the stored factors; re-gauged 1.000, .990 and .902.
        assert error(made, other, inputs) < gain * stale
        assert error(made, other, inputs) < gain * error(fast, other, inputs)
    # What came of it can be saved, and is then the model of these weights.
    made.save(tmp_path / "second")
    again = load(other, tmp_path / "second")
    with torch.no_grad():
        assert torch.equal(again(inputs), made(inputs))
    assert again.plan == made.plan
    assert len([note for note in again.plan.notes if "strict=False" in note]) == 1


def test_what_is_not_factored_is_the_new_model_s_own() -> None:
    folder = GOLDEN / "v2" / "tree"
    model, inputs, _ = given(folder)
    before, other = load(model, folder / "saved"), changed(model, 0.5, only="norm")
    made = load(other, folder / "saved", strict=False)
    own, old = made.state_dict(), before.state_dict()
    assert torch.equal(own["norm.weight"], other.get_parameter("norm.weight"))
    assert torch.equal(own["norm.bias"], other.get_parameter("norm.bias"))
    # No factored layer's weight changed: their factors are the stored ones, and so is their bias.
    for name in ("first.factor_in", "first.factor_out", "first.bias", "second.factor_in", "second.factor_out"):
        assert torch.equal(own[name], old[name])
    assert "0 of 2 factored layers followed them" in made.plan.notes[-1]
    assert error(made, other, inputs) < error(before, other, inputs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert float(other.get_parameter("norm.weight").detach().abs().sum()) > 0  # nothing is shared


def test_a_bias_keeps_the_shift_that_it_took() -> None:
    folder = GOLDEN / "v2" / "tree"
    model, _, _ = given(folder)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("first.bias").add_(2.0)
    shift = load(model, folder / "saved").state_dict()["first.bias"] - model.get_parameter("first.bias")
    assert float(shift.detach().abs().max()) > 1e-3
    moved = load(other, folder / "saved", strict=False).state_dict()["first.bias"] - other.get_parameter("first.bias")
    # The bias is near 2: so many roundings of float32.
    torch.testing.assert_close(moved, shift, rtol=0, atol=4 * 2**-22)


def test_a_folded_model_and_one_of_format_1_are_refused_with_what_to_do() -> None:
    for folder, told in (
        (GOLDEN / "v2" / "folded", "layers of the saved model are folded; strict=False needs it unfolded"),
        (GOLDEN / "v1" / "linear", "of format 1, .* load it with those weights and save it again"),
    ):
        model = given(folder)[0]
        with pytest.raises(StorageError, match=told):
            load(changed(model, 0.1), folder / "saved", strict=False)


def test_a_folder_of_format_1_that_was_saved_again_follows(tmp_path: Path) -> None:
    folder = GOLDEN / "v1" / "linear"
    model, inputs, outputs = given(folder)
    load(model, folder / "saved").save(tmp_path)
    made = load(changed(model, 1e-7), tmp_path, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), outputs, rtol=1e-5, atol=3e-6)


def test_other_shapes_are_refused_as_ever() -> None:
    folder = GOLDEN / "v2" / "tree"
    model = given(folder)[0]
    model.second = nn.Linear(24, 15, bias=False)
    with pytest.raises(StorageError, match=r"'second\.weight' is \(15, 24\)"):
        load(model, folder / "saved", strict=False)


def test_refined_norms_move_with_the_model(tmp_path: Path) -> None:
    """What refinement changed besides the factors is stored with what it was, and added to the new values."""
    model, loader = original("tree"), batches("tree")
    fast = lowrank_fx.optimize(
        model,
        loader,
        target=Keep(params=0.5, of="sites"),
        compile=False,
        progress=False,
        capture="modules",
        refine=lowrank_fx.Refine(steps=20, lr=0.02),
    )
    assert fast.plan.refinement is not None
    assert fast.plan.refinement.best_step > 0
    before, after = model.get_parameter("norm.weight"), fast.state_dict()["norm.weight"]
    assert not torch.equal(before, after)
    fast.save(tmp_path)
    moved = json.loads((tmp_path / PLAN_FILE).read_text())["captured"]["moved"]
    assert {"norm.weight", "first.bias"} <= set(moved)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("norm.weight").add_(0.25)
    made = load(other, tmp_path, strict=False)
    torch.testing.assert_close(made.state_dict()["norm.weight"], after + 0.25, rtol=0, atol=1e-6)
