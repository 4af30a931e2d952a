"""How much is measured for a plan: less where a low effort is asked for, and nothing promised changes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, OptionError
from lowrank_fx.effort import EFFORTS, EffortName, effort_of
from lowrank_fx.graph_program import GraphProgram

TARGET = Keep(flops=0.6)


class Net(nn.Module):
    """Convolutions and layers that can be factored in several forms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1)
        self.hidden = nn.Linear(24, 64)
        self.head = nn.Linear(64, 40)

    def forward(self, image: Tensor) -> Tensor:
        """``[n, 40]`` of ``[n, 3, h, w]``."""
        value = torch.relu(self.second(torch.relu(self.first(image)))).mean((2, 3))
        logits: Tensor = self.head(torch.tanh(self.hidden(value)))
        return logits


def batches() -> Iterator[Tensor]:
    return (torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(10))


@functools.cache
def planned(effort: EffortName) -> tuple[LowRankModule, int]:
    """A model planned with one effort, and how often something was measured behind a site."""
    forks = 0
    whole = GraphProgram.trials

    def counted(self: GraphProgram, *arguments: object) -> object:
        for site, trial in whole(self, *arguments):  # type: ignore[arg-type]

            def tried(factors: object, trial: object = trial) -> object:
                nonlocal forks
                forks += 1
                return trial(factors)  # type: ignore[operator]

            yield site, tried

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphProgram, "trials", counted)
        made = lowrank_fx.optimize(
            Net().eval(), batches(), target=TARGET, effort=effort, compile=False, capture="export", progress=False
        )
    return made, forks


def test_a_low_effort_measures_a_fraction_and_meets_the_same_target() -> None:
    (low, few), (high, many) = planned("low"), planned("high")
    assert 0 < few <= many / 3
    for made in (low, high):
        assert made.plan.totals.kept("flops", "model") <= TARGET.share
    # Both are chosen and reported by held-out data; the plan is close to that of all the work.
    assert 0 < low.plan.select_error <= 1.5 * high.plan.select_error
    lead = low.plan.candidate.partition(",")[0]
    corrected = [f"{lead}, alternated", f"{lead}, refitted"]
    assert [name for name, _ in low.plan.candidates] == ["effect", "energy", "uniform", *corrected]
    assert not any("closed loop" in name or "marginal" in name for name, _ in low.plan.candidates)
    assert any("closed loop" in name for name, _ in high.plan.candidates)


def test_at_a_low_effort_the_basis_of_gradients_stands_for_both() -> None:
    (low, _), (high, _) = planned("low"), planned("high")
    assert low.session is not None
    assert high.session is not None
    assert "lowrank" in high.session.curves["hidden"].forms
    assert list(low.session.curves["hidden"].forms) == ["lowrank@gradient"]
    for (name, variant), effect in low.session.effects.items():
        assert len(effect.points) <= len(EFFORTS["low"].shares) + 1, (name, variant)


def test_the_same_effort_gives_the_same_plan() -> None:
    first, _ = planned("low")
    torch.manual_seed(0)
    again = lowrank_fx.optimize(
        Net().eval(), batches(), target=TARGET, effort="low", compile=False, capture="export", progress=False
    )
    assert again.plan.to_json() == first.plan.to_json()


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(OptionError, match="effort='medium' does not exist; there are 'low', 'high'"):
        effort_of("medium")
    with pytest.raises(OptionError, match="effort=3 does not exist"):
        lowrank_fx.optimize(Net(), batches(), effort=3)  # type: ignore[arg-type]
    model = torch.compile(Net().eval(), backend="lowrank_fx", options={"effort": "none"})
    with pytest.raises(Exception, match="effort='none' does not exist"), torch.no_grad():
        model(next(batches()))
