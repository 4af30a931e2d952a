"""Every kind of layer through the whole of ``optimize``: plan, rewrite, replan, fold, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.module import LowRankModule
from lowrank_fx.testing import assert_equivalent

# Two orders of summation of some hundred float32 products: below 2e-6 measured.
ROUNDING = 1e-5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Layers(nn.Module):
    """A site of each kind: conv1d, conv3d, grouped convolutions in one and two dimensions, bmm, matmul, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Conv1d(4, 16, 3, padding="same")
        self.waves = nn.Conv1d(16, 16, 3, stride=2, groups=2)
        self.volume = nn.Conv3d(2, 12, 2, padding=1, bias=False)
        self.groups = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.point = nn.Conv2d(24, 16, 1)
        self.experts = nn.Parameter(torch.empty(4, 16, 12))
        self.heads = nn.Parameter(torch.empty(2, 6, 8))
        self.last = nn.Linear(16, 8)

    def forward(self, wave: Tensor, volume: Tensor) -> Tensor:
        wave = self.waves(self.wave(wave).tanh()).tanh().transpose(1, 2)
        image = self.groups(self.volume(volume).tanh().mean(2)).tanh()
        tokens = self.point(self.depth(image)).flatten(2).transpose(1, 2).tanh()
        rows = torch.cat([wave, tokens], 1)
        mixed = torch.bmm(rows.reshape(-1, 4, 16).transpose(0, 1), self.experts).tanh()
        mixed = mixed.transpose(0, 1).reshape(-1, 32, 2, 6).transpose(1, 2)
        output: Tensor = self.last((mixed @ self.heads).transpose(1, 2).flatten(2))
        return output


def layers() -> Layers:
    model = Layers()
    chosen = generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=chosen) / max(fan_in, 1) ** 0.5)
    return model.eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    chosen = generator(1)
    return [
        (torch.randn(8, 4, 17, generator=chosen), torch.randn(8, 2, 3, 3, 5, generator=chosen)) for _ in range(6)
    ]  # fmt: skip


KINDS = {
    "wave": "conv1d", "waves": "conv1d", "volume": "conv3d", "groups": "conv2d", "point": "conv2d", "experts": "bmm",
    "heads": "bmm", "last": "linear",
}  # fmt: skip
GROUPS = {"waves": 2, "groups": 3, "experts": 4, "heads": 2}


@pytest.fixture(scope="module")
def model() -> Layers:
    return layers()


@pytest.fixture(scope="module")
def fast(model: Layers) -> LowRankModule:
    return lowrank_fx.optimize(model, batches(), target=Keep(params=0.6), compile=False, progress=False)


def test_every_kind_is_a_site_and_the_depthwise_one_says_why_not(fast: LowRankModule) -> None:
    assert fast.session is not None
    sites = {site.name: site for site in fast.session.table.sites}
    assert {name: site.kind for name, site in sites.items()} == KINDS
    assert {name: site.groups for name, site in sites.items() if site.groups > 1} == GROUPS
    assert [(left.name, left.reason) for left in fast.plan.left_alone] == [
        ("depth", "a depthwise convolution (24 groups) applies one channel to each group")
    ]


@pytest.fixture(scope="module")
def small(fast: LowRankModule) -> LowRankModule:
    """So small that nearly every layer is factored."""
    return fast.replan(Keep(params=0.28, of="sites"))


def test_a_plan_costs_what_the_factored_model_costs(fast: LowRankModule, small: LowRankModule, model: Layers) -> None:
    for made in (fast, small):
        target, totals = made.plan.target, made.plan.totals
        assert isinstance(target, Keep)
        assert totals.kept(target.quantity, target.of) <= target.share
        assert totals.model_params == tuple(sum(p.numel() for p in each.parameters()) for each in (model, made))
        assert made.session is not None
        call = made.session.calibration.effect_batches[0].call
        assert totals.model_flops[1] == made.artifact.program.count_flops(call)


def test_fold_save_and_load_give_the_same_outputs(small: LowRankModule, model: Layers, tmp_path: Path) -> None:
    assert {KINDS[site.name] for site in small.plan.factored} >= set(KINDS.values()) - {"linear"}
    inputs = batches()[5]
    dense = small.fold()
    assert_equivalent(dense, small, inputs, rtol=ROUNDING)
    assert {name: tensor.shape for name, tensor in dense.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    for number, each in enumerate((small, dense)):
        each.save(tmp_path / str(number))
        loaded = lowrank_fx.load(model, tmp_path / str(number), compile=False)
        assert_equivalent(loaded, each, inputs, rtol=0.0)


def arguments_of(gm: GraphModule, nodes: set[str], inputs: tuple[Tensor, ...]) -> dict[str, tuple[Any, ...]]:
    """The arguments of some nodes of a graph, in float64."""
    seen: dict[str, tuple[Any, ...]] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            if node.name in nodes:
                args = self.fetch_args_kwargs_from_env(node)[0]
                seen[node.name] = tuple(arg.double() if isinstance(arg, Tensor) else arg for arg in args)
            return super().run_node(node)

    with torch.no_grad():
        Keeping(gm).run(*inputs, enable_io_processing=False)
    return seen


def test_the_errors_of_the_plan_are_those_of_the_layers_on_the_calibration_rows(small: LowRankModule) -> None:
    """Every layer's own operator in float64, with the folded weight and bias in place of the original ones."""
    assert small.session is not None
    gm, sites = small.session.program.module, small.session.table.sites
    assert isinstance(gm, GraphModule)
    folded = dict(small.fold().artifact.program.module.named_parameters())
    nodes = {site.calls[0].node: node for site in sites for node in gm.graph.nodes if node.name == site.calls[0].node}
    # Every fifth batch is held out.
    seen = [arguments_of(gm, set(nodes), inputs) for index, inputs in enumerate(batches()) if index % 5 != 4]
    for site in sites:
        entry = next(entry for entry in small.plan.sites if entry.name == site.name)
        (call,) = site.calls
        operator, outputs, errors = nodes[call.node].target, [], []
        for arguments in (batch[call.node] for batch in seen):
            args = list(arguments)
            if not site.centered and len(args) > 2:
                args[2] = None
            wanted = operator(*args)
            args[1] = folded[site.weight].detach().double()
            if site.centered:
                args[2] = folded[str(call.bias)].detach().double()
            outputs.append(wanted)
            errors.append(wanted - operator(*args))
        whole, lost = torch.cat(outputs), torch.cat(errors)
        if site.centered:
            features = tuple(axis for axis in range(whole.dim()) if axis != (1 if site.patch is not None else 2))
            whole = whole - whole.mean(features, keepdim=True)
        measured = float(lost.norm() / whole.norm())
        # The sketch sums in float32, the fold rounds to float32.
        assert entry.error - 1e-4 <= measured <= entry.bound + 1e-4, site.name
