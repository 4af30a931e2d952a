"""The whole way on each device there is: factors, refinement, fold, save and load stay where the model is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, Refine, optimize

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, 24, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).mT)
        made: Tensor = x + self.down(torch.relu(self.up(x)))
        return made


def data(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = 0.8 ** torch.arange(12)
    return [(torch.randn(8, 10, 12, generator=generator) * scales).mT.contiguous().to(device) for _ in range(8)]


def optimized(device: str) -> tuple[nn.Module, LowRankModule]:
    torch.manual_seed(0)
    model = Tagger().eval().to(device)
    target = Keep(params=0.5, of="sites")
    return model, optimize(model, data(device), target=target, compile=False, progress=False)


@pytest.mark.parametrize("device", DEVICES)
def test_all_of_it_stays_on_the_device(device: str, tmp_path: Path) -> None:
    model, small = optimized(device)
    x = data(device)[0]
    assert {parameter.device.type for parameter in small.parameters()} == {device}
    with torch.no_grad():
        error = float((small(x) - model(x)).norm() / model(x).norm())
        assert error == pytest.approx(small.plan.error, rel=0.5)
        torch.testing.assert_close(small.fold()(x), small(x), rtol=1e-3, atol=1e-4)
        small.save(tmp_path)
        torch.testing.assert_close(lowrank_fx.load(model, tmp_path, compile=False)(x), small(x))
        refined = small.replan(Keep(params=0.5, of="sites"), refine=Refine(steps=8))
        assert refined(x).device.type == device
    assert refined.plan.refinement is not None
    assert refined.plan.select_error <= small.plan.select_error


@pytest.mark.parametrize("device", DEVICES)
def test_it_loses_what_it_loses_on_the_cpu(device: str) -> None:
    _, here = optimized("cpu")
    _, there = optimized(device)
    assert [site.rank for site in there.plan.sites if site.factored]
    assert there.plan.select_error == pytest.approx(here.plan.select_error, rel=0.02)
    assert there.plan.totals.kept("params", "sites") <= 0.5
