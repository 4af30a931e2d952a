"""Running statistics in a factored model follow the activations: against a direct computation in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_fx import closed_loop
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.norms import reestimate
from lowrank_fx.sites import Site


class PreActivation(nn.Module):
    """Norms in front of their layers, one ahead of everything, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = nn.BatchNorm1d(12)
        self.first = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 16)
        self.last = nn.BatchNorm1d(16)
        self.twice = nn.BatchNorm1d(16)
        generator = torch.Generator().manual_seed(0)
        for norm in (self.ahead, self.norm, self.last, self.twice):
            for buffer in (norm.running_mean, norm.running_var):
                assert buffer is not None
                buffer.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.norm(self.first(self.ahead(x)))))
        x = torch.tanh(self.twice(torch.relu(self.last(x))))
        return torch.mul(self.twice(x), 1)


def halved(program: GraphProgram) -> dict[str, tuple[Site, Factors]]:
    """Every layer at rank 4, by its plain singular value decomposition."""
    factored = {}
    for site in program.find_sites().sites:
        left, values, right = torch.linalg.svd(program.weight(site).detach())
        factors = Factors((values[:4, None] * right[:4]).contiguous(), left[:, :4].contiguous(), None)
        factored[site.name] = (site, factors)
    return factored


def rows_of(*seeds: int) -> list[Call]:
    return [Call((torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)),), {}) for seed in seeds]


def test_statistics_follow_the_factored_activations_in_graph_order() -> None:
    torch.manual_seed(0)
    model = PreActivation().eval()
    calls = rows_of(1, 2)
    program = GraphProgram.from_capture(capture(model, calls[0]))
    factored = halved(program)
    found = reestimate(program.module, factored, calls)

    rows = torch.cat([call.args[0] for call in calls]).double()
    wide = PreActivation().eval().double()
    wide.load_state_dict(model.state_dict())

    def normed(norm: nn.Module, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        assert isinstance(norm, nn.BatchNorm1d)
        return nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

    with torch.no_grad():
        original, changed = wide.ahead(rows), wide.ahead(rows)
        for layer, name in (("first", "norm"), ("second", "last")):
            linear, norm = wide.get_submodule(layer), wide.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            original = linear(original)
            changed = nn.functional.linear(changed, factored[layer][1].dense_matrix(), linear.bias)
            mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            new_mean = mean + changed.mean(0) - original.mean(0)
            new_var = var * changed.var(0, unbiased=False) / original.var(0, unbiased=False)
            # Both models run in float32 (measured: 6e-8 and, relative, 2e-7).
            assert torch.allclose(found[f"{name}.running_mean"].double(), new_mean, atol=1e-6)
            assert torch.allclose(found[f"{name}.running_var"].double(), new_var, rtol=3e-6)
            original = torch.relu(normed(norm, original, mean, var))
            changed = torch.relu(normed(norm, changed, new_mean, new_var))
    # What factoring does not reach stays, and so does what is read in two places.
    assert set(found) == {f"{name}.running_{what}" for name in ("norm", "last") for what in ("mean", "var")}


def test_as_many_batches_are_held_as_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = PreActivation().eval()
    calls = rows_of(1, 2, 3, 4)
    program = GraphProgram.from_capture(capture(model, calls[0]))
    factored = halved(program)
    # Between two norms one activation of at most 40 x 16 float32 is alive, in each of two models.
    held = 2 * 40 * 16 * 4
    for memory, count in ((1, 1), (2 * held, 2), (3 * held + 1, 3), (1 << 30, 4)):
        expected = reestimate(program.module, factored, calls[:count])
        monkeypatch.setattr(closed_loop, "MEMORY", memory)
        found = reestimate(program.module, factored, calls)
        monkeypatch.undo()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), count
    assert not torch.equal(
        reestimate(program.module, factored, calls[:1])["norm.running_mean"], expected["norm.running_mean"]
    )


def test_a_channel_that_does_not_vary_keeps_its_variance() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.first(x)))

    torch.manual_seed(0)
    model = Constant().eval()
    with torch.no_grad():
        model.first.weight[:3] = 0
    call = Call((torch.randn(32, 8),), {})
    program = GraphProgram.from_capture(capture(model, call))
    (site,) = program.find_sites().sites
    factors = Factors(torch.eye(8), program.weight(site).detach() * 2, torch.full((8,), 0.5).double())
    found = reestimate(program.module, {site.name: (site, factors)}, [call])
    assert torch.equal(found["norm.running_var"][:3], torch.ones(3))
    # Twice the output is four times the variance; the shift moves the mean where nothing else does.
    assert torch.allclose(found["norm.running_var"][3:], torch.full((5,), 4.0), rtol=1e-5)
    assert torch.allclose(found["norm.running_mean"][:3], torch.full((3,), 0.5), atol=1e-6)
