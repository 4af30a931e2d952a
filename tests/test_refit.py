"""After refitting, every factored layer is the least-squares fit of the original's output, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Assigned, Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.calibration import blank
from lowrank_fx.calibration_run import run_calibration
from lowrank_fx.capture import capture
from lowrank_fx.curves import SiteCurves, error_curves
from lowrank_fx.effects import joint_error
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram, substitutes
from lowrank_fx.refit import refit
from lowrank_fx.rewrite import factorize
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.walk import Walk

Factored = dict[str, tuple[Site, Factors]]


class Net(nn.Module):
    """Convolution, in-place relu, layers with a bias, without one, with a shared one, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.free = nn.Linear(12, 20, bias=False)
        self.biased = nn.Linear(20, 16)
        self.twice = nn.Linear(16, 16)
        self.one = nn.Linear(16, 12)
        self.two = nn.Linear(12, 12)
        self.two.bias = self.one.bias
        with torch.no_grad():  # large enough that the output says something about the input
            for parameter in self.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu_(self.conv(image)).mean((2, 3))
        hidden = torch.tanh(self.biased(torch.relu_(self.free(hidden))))
        hidden = self.twice(torch.tanh(self.twice(hidden)))
        return torch.add(self.two(torch.tanh(self.one(hidden))), 0)


class Setup:
    def __init__(self, model: nn.Module, calls: Sequence[Call], rank: int) -> None:
        self.program = GraphProgram.from_capture(capture(model.eval(), calls[0]))
        self.gm: GraphModule = self.program.module
        self.table: SiteTable = self.program.find_sites()
        pieces = [Assigned(index, "calibrate", call) for index, call in enumerate(calls)]
        start = blank(self.program, self.table, model, calls[0])
        calibration = run_calibration(self.program, self.table, pieces, start, progress=False)
        self.batches: list[CachedBatch] = calibration.effect_batches
        self.curves: dict[str, SiteCurves] = error_curves(self.program, self.table, calibration, progress=False)
        self.before: Factored = {
            name: (entry.site, entry.factors(next(iter(entry.forms)), rank)) for name, entry in self.curves.items()
        }
        self.after: Factored = refit(self.gm, self.before, self.batches)

    @torch.no_grad()
    def outputs(self, factored: Factored, name: str, node: int = 0) -> Tensor:
        """What comes out of a layer, as float64 rows, when the given sites are factored."""
        rows = []
        values: dict[str, Tensor] = {}
        for site, factors in factored.values():
            values.update(substitutes(self.gm, site, factors))
        wanted = self.curves[name].site.calls[node].node
        for batch in self.batches:
            run = Walk(self.gm).run(batch.call)
            run.exchange(values)
            while run.next.name != wanted:
                run.compute()
                run.move()
            value = run.compute()
            if self.curves[name].site.kind == "conv2d":
                value = value.movedim(1, -1)
            rows.append(value.reshape(-1, value.shape[-1]).double())
        return torch.cat(rows)

    def closed_loop(self, name: str) -> tuple[Factored, Factored]:
        """The model as a layer's refit met it (what comes before refitted, the layer itself not), and after it."""
        position = Walk(self.gm).position
        start = position[self.curves[name].site.calls[0].node]
        met = {
            other: (self.after if position[site.calls[0].node] < start else self.before)[other]
            for other, (site, _) in self.before.items()
        }
        return met, met | {name: self.after[name]}


@pytest.fixture(scope="module")
def net() -> Setup:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    calls = [Call((torch.randn(48, 3, 5, 5, generator=generator),), {}) for _ in range(2)]
    return Setup(Net(), calls, rank=2)


@pytest.mark.parametrize("name", ["conv", "biased"])
def test_with_a_bias_the_regression_on_the_refitted_output_is_the_identity(net: Setup, name: str) -> None:
    met, refitted = net.closed_loop(name)
    wanted, actual = net.outputs({}, name), net.outputs(refitted, name)
    centred = actual - actual.mean(0)
    slope = (centred * (wanted - wanted.mean(0))).mean(0) / centred.square().mean(0)
    intercept = wanted.mean(0) - slope * actual.mean(0)
    # Factors and bias are float32 again: some 2^-24 of the values, over the spread of a channel, which in one of them
    # is a 120th of the values (measured: 2 to 20 of these roundings, as kernels sum in one order or another).
    roundings = actual.abs().amax(0) / centred.square().mean(0).sqrt() * 2.0**-24
    assert bool(((slope - 1).abs() <= 128 * roundings).all())
    assert torch.allclose(intercept, torch.zeros_like(intercept), atol=2e-5)
    # It was not so before, and every single channel is closer now.
    before = net.outputs(met, name) - wanted
    assert not torch.allclose(before.mean(0), torch.zeros_like(intercept), atol=1e-4)
    assert bool(((actual - wanted).square().mean(0) <= before.square().mean(0) * (1 + 1e-5)).all())


def test_without_a_bias_only_the_slope_is_fitted(net: Setup) -> None:
    met, refitted = net.closed_loop("free")
    wanted, actual = net.outputs({}, "free"), net.outputs(refitted, "free")
    slope = (actual * wanted).mean(0) / actual.square().mean(0)
    assert torch.allclose(slope, torch.ones_like(slope), atol=2e-5)
    before = net.outputs(met, "free") - wanted
    assert bool(((actual - wanted).square().mean(0) <= before.square().mean(0) * (1 + 1e-5)).all())
    assert net.after["free"][1].shift is None
    assert not torch.equal(net.after["free"][1].factor_out, net.before["free"][1].factor_out)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_bias_that_is_shared_takes_no_part_in_the_fit(net: Setup, name: str) -> None:
    site, factors = net.after[name]
    assert site.biases
    assert not site.centered
    assert factors.shift is None
    met, refitted = net.closed_loop(name)
    bias = net.gm.get_parameter("one.bias").detach().double()
    wanted, actual = net.outputs({}, name) - bias, net.outputs(refitted, name) - bias
    slope = (actual * wanted).mean(0) / actual.square().mean(0)
    assert torch.allclose(slope, torch.ones_like(slope), atol=2e-5)
    before = net.outputs(met, name) - bias - wanted
    assert bool(((actual - wanted).square().mean(0) <= before.square().mean(0) * (1 + 1e-5)).all())


def test_a_layer_called_twice_keeps_its_factors(net: Setup) -> None:
    assert net.after["twice"] is net.before["twice"]
    assert set(net.after) == set(net.before)


def test_nothing_grows_and_the_input_factors_stay(net: Setup) -> None:
    for name, (site, factors) in net.after.items():
        before = net.before[name][1]
        assert site is net.before[name][0]
        assert factors.factor_in is before.factor_in
        assert factors.factor_out.shape == before.factor_out.shape
        assert factors.factor_out.dtype == before.factor_out.dtype
        assert (factors.shift is None) == (before.shift is None)


def test_the_model_s_error_falls_and_the_rewritten_model_agrees(net: Setup) -> None:
    before, after = (joint_error(net.program, factored, net.batches) for factored in (net.before, net.after))
    # Each layer's own error cannot rise; the whole model's falls here (measured: .249 to .237).
    assert after < before
    gm = factorize(net.gm, net.after, clone=True)
    with torch.no_grad():
        errors = [(gm(*batch.call.args) - batch.reference[0]).square().sum() for batch in net.batches]
        sizes = [batch.reference[0].square().sum() for batch in net.batches]
    assert float((sum(errors) / sum(sizes)) ** 0.5) == pytest.approx(after, rel=1e-4)


def test_a_single_site_at_the_end_never_gets_worse(net: Setup) -> None:
    for rank in (1, 3, 5):
        entry = net.curves["two"]
        alone: Factored = {"two": (entry.site, entry.factors("lowrank", rank))}
        fitted = refit(net.gm, alone, net.batches)
        before, after = (joint_error(net.program, factored, net.batches) for factored in (alone, fitted))
        assert after <= before * (1 + 1e-6)


class Dead(nn.Module):
    """The first layer's channels 3 and 4 do not depend on the input; its factored output there is constant too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.second = nn.Linear(12, 12)
        with torch.no_grad():
            self.first.weight[3:5] = 0
            self.first.weight[6:] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.second(torch.tanh(self.first(x))), 1)


def test_a_dead_channel_is_not_scaled() -> None:
    torch.manual_seed(0)
    setup = Setup(Dead(), [Call((torch.randn(64, 16),), {})], rank=3)
    (_, before), (site, after) = setup.before["first"], setup.after["first"]
    # Rows of W that are zero have rows of zeros in the basis, up to rounding; scaled, they would blow up.
    assert float(before.factor_out[3:5].abs().max()) < 1e-6
    assert torch.equal(after.factor_out[3:5], before.factor_out[3:5])
    assert not torch.equal(after.factor_out[:3], before.factor_out[:3])
    assert after.shift is not None
    assert bool(after.factor_out.isfinite().all())
    wanted, actual = setup.outputs({}, "first"), setup.outputs({"first": (site, after)}, "first")
    assert torch.allclose(wanted[:, 3:5], actual[:, 3:5], atol=1e-6)


class Flat(nn.Module):
    """A layer on [B, T, d] and one on flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(12, 12)
        self.flat = nn.Linear(12, 12)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.whole(x) * attention_mask[:, :, None]).reshape(-1, 12)
        return torch.reshape(self.flat(hidden), x.shape)


@pytest.mark.parametrize("name", ["whole", "flat"])
def test_padding_takes_no_part_in_the_fit(name: str) -> None:
    torch.manual_seed(0)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 3, 4] * 5)[:, None]
    calls = []
    for fill in (0.0, 1e3):
        x = torch.randn(20, 6, 12, generator=torch.Generator().manual_seed(3))
        x[~mask] = fill
        calls.append([Call((), {"x": x, "attention_mask": mask.long()}, mask)])
    torch.manual_seed(1)
    model = Flat()
    clean, padded = (Setup(model, batches, rank=2).after[name][1] for batches in calls)
    assert torch.allclose(clean.factor_out, padded.factor_out, atol=1e-6)
    assert clean.shift is not None
    assert padded.shift is not None
    assert torch.allclose(clean.shift, padded.shift, atol=1e-6)
    # The same layer, alone, against a regression on its real rows.
    setup = Setup(model, calls[1], rank=2)
    alone: Factored = {name: setup.before[name]}
    fitted = refit(setup.gm, alone, setup.batches)
    keep = mask.reshape(-1)
    wanted, actual = setup.outputs({}, name)[keep], setup.outputs(fitted, name)[keep]
    centred = actual - actual.mean(0)
    slope = (centred * (wanted - wanted.mean(0))).mean(0) / centred.square().mean(0)
    assert torch.allclose(slope, torch.ones_like(slope), atol=2e-5)
    assert torch.allclose(wanted.mean(0), actual.mean(0), atol=2e-5)
