"""Some layers of an optimized model are folded and the others stay factored, in a graph and in a module tree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.module import LowRankModule
from lowrank_fx.passes.edit import call_node
from lowrank_fx.testing import assert_equivalent

# float32: a product of at most 96 terms, rounded once, in another order of summation; measured 3e-7.
ROUNDING = 3e-6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, padding=1)
        self.grouped = nn.Conv2d(24, 24, 3, stride=2, groups=2)
        self.up = nn.Linear(24, 96)
        self.down = nn.Linear(96, 24)
        self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).relu()).relu().mean((2, 3))
        result: Tensor = self.head(self.down(self.up(x).relu()))
        return result


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def batches() -> list[Tensor]:
    return [torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


NAMES = ("conv", "grouped", "up", "down", "head")


def optimized(way: Any, **options: Any) -> LowRankModule:
    chosen: dict[str, Any] = {"target": Keep(params=0.4, of="sites"), "planner": "uniform", **options}
    made = lowrank_fx.optimize(model(), batches(), capture=way, compile=False, progress=False, **chosen)
    assert tuple(site.name for site in made.plan.factored) == NAMES
    return made


@pytest.fixture(scope="module", params=["export", "modules"])
def fast(request: pytest.FixtureRequest) -> LowRankModule:
    return optimized(request.param)


def factored_names(module: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name in module.state_dict() if name.endswith("factor_in")}


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("patterns", "folded"),
    [
        (["conv"], {"conv"}),
        (["*o*"], {"conv", "grouped", "down"}),
        (["up.weight", "head"], {"up", "head"}),
        ([], set()),
    ],
)
def test_patterns_choose_and_the_numbers_stay(fast: LowRankModule, patterns: list[str], folded: set[str]) -> None:
    made = fast.fold(sites=patterns)
    assert factored_names(made) == set(NAMES) - folded
    assert set(made.artifact.folded) == folded
    assert_equivalent(made, fast, (batches()[0],), rtol=ROUNDING)
    assert all(one.data_ptr() != other.data_ptr() for one in made.parameters() for other in fast.parameters())


def test_the_plan_tells_what_the_model_is_now(fast: LowRankModule) -> None:
    made = fast.fold(["up", "down"])
    assert fast.plan.totals.model_params[1] == params(fast)
    assert (
        made.plan.totals.model_params[1]
        == params(made)
        == params(fast)
        + sum(
            before - after for site in fast.plan.sites if site.name in ("up", "down") for before, after in [site.params]
        )
    )
    for site, own in zip(fast.plan.sites, made.plan.sites, strict=True):
        back = site.name in ("up", "down")
        assert own.params == (site.params[0], site.params[0 if back else 1])
        assert own.flops == (site.flops[0], site.flops[0 if back else 1])
        assert (own.form, own.rank, own.error) == (site.form, site.rank, site.error)
    saved = sum(site.flops[0] - site.flops[1] for site in fast.plan.sites if site.name in ("up", "down"))
    for of in ("model_flops", "site_flops"):
        assert getattr(made.plan.totals, of)[1] == getattr(fast.plan.totals, of)[1] + saved
    assert made.plan.notes == (*fast.plan.notes, "folded back to dense operators: up, down")
    assert "folded back to dense operators: up, down" in str(made.report())
    assert "5 of 5 layers factored, 2 folded back" in repr(made)


def test_a_plan_chooses_what_it_leaves_dense(fast: LowRankModule) -> None:
    sites = [site for site in fast.plan.sites if site.name != "down"]  # one it does not hold
    sites[-1] = replace(sites[-1], form="dense", rank=None)  # and one that it leaves dense
    made = fast.fold(sites=replace(fast.plan, sites=tuple(sites)))
    assert factored_names(made) == {"conv", "grouped", "up"}
    assert_equivalent(made, fast, (batches()[0],), rtol=ROUNDING)


def test_folding_again_folds_the_rest(fast: LowRankModule) -> None:
    once = fast.fold(["conv"])
    twice = once.fold(["*o*"])
    assert twice.artifact.folded == ("conv", "grouped", "down")
    whole = twice.fold()
    assert set(whole.state_dict()) == set(model().state_dict())
    assert whole.plan.totals == fast.fold().plan.totals
    assert whole.plan.totals.kept("params", "model") == 1.0
    assert whole.fold().plan == whole.plan
    assert_equivalent(whole, fast, (batches()[0],), rtol=ROUNDING)
    for name, tensor in fast.fold().state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor)


def test_a_partly_folded_model_is_saved_and_loaded(fast: LowRankModule, tmp_path: Path) -> None:
    made = fast.fold(["conv", "up"])
    made.save(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text("utf-8"))["folded"] == ["conv", "up"]
    again = lowrank_fx.load(model(), tmp_path, compile=False)
    assert torch.equal(again(batches()[1]), made(batches()[1]))
    assert again.artifact.folded == ("conv", "up")
    assert again.plan == made.plan
    assert factored_names(again.fold(["head"])) == {"grouped", "down"}


def test_folded_names_that_are_not_in_the_plan_are_damage(fast: LowRankModule, tmp_path: Path) -> None:
    fast.fold(["conv"]).save(tmp_path)
    path = tmp_path / "plan.json"
    data = json.loads(path.read_text("utf-8"))
    for wrong in (["stem"], "conv", 1, [["conv"]]):
        path.write_text(json.dumps({**data, "folded": wrong}), "utf-8")
        with pytest.raises(lowrank_fx.StorageError, match=r"plan\.json"):
            lowrank_fx.load(model(), tmp_path, compile=False)


def test_what_matches_nothing_is_an_error_that_names_the_layers(fast: LowRankModule) -> None:
    with pytest.raises(lowrank_fx.OptionError, match=r"sites='stem' matches no .* conv, grouped, up, down, head"):
        fast.fold(["conv", "stem"])
    for wrong in ("conv", 3, [3]):
        with pytest.raises(lowrank_fx.OptionError, match="give a list of patterns"):
            fast.fold(wrong)  # type: ignore[arg-type]


def test_a_pair_whose_middle_value_is_read_stays_and_the_plan_says_so() -> None:
    fast = optimized("export")
    gm = fast.artifact.program.module
    assert isinstance(gm, GraphModule)
    inner = next(node for node in gm.graph.nodes if "up.factor_in" in {each.target for each in node.all_input_nodes})
    (output,) = gm.graph.find_nodes(op="output")
    (result,) = output.args[0]
    total = call_node(gm, torch.ops.aten.sum.dim_IntList, (inner, [1], True), like=inner, before=output)
    output.args = ((call_node(gm, torch.ops.aten.add.Tensor, (result, total), like=inner, before=output),),)
    gm.recompile()
    made = fast.fold(["up", "down"])
    assert factored_names(made) == {"conv", "grouped", "up", "head"}
    assert made.artifact.folded == ("down",)
    assert made.plan.notes[-1] == f"up stays factored: the middle value {inner.name!r} has another user"
    assert_equivalent(made, fast, (batches()[0],), rtol=ROUNDING)


@pytest.mark.parametrize("way", ["export", "modules"])
def test_re_gauged_pairs_are_folded_one_by_one(way: str) -> None:
    fast = optimized(way, target=Keep(params=0.5, of="sites", regauge=True))
    pairs = [site.name for site in fast.plan.factored if site.pivots is not None]
    assert len(pairs) == 3
    made = fast.fold([pairs[1]])
    assert factored_names(made) == set(NAMES) - {pairs[1]}
    assert_equivalent(made, fast, (batches()[0],), rtol=ROUNDING)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.attention(x, x[:, :3], x[:, 1:4])[0])
        return result


@pytest.mark.parametrize("way", ["export", "modules"])
def test_parts_of_an_attention_are_folded_one_by_one(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attending().eval()
    loader = [torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    options: dict[str, Any] = {"target": Keep(params=0.5, of="sites"), "planner": "uniform", "capture": way}
    fast = lowrank_fx.optimize(model, loader, compile=False, progress=False, **options)
    names = [site.name for site in fast.plan.factored]
    assert len(names) == 5
    for chosen in (["attention.in_proj_weight_1"], ["attention.in_proj*"], ["attention.out_proj"], ["*attention.*"]):
        made = fast.fold(chosen)
        assert_equivalent(made, fast, (loader[0],), rtol=ROUNDING)
        left = len(names) - len(made.artifact.folded)
        assert sum(name.endswith("factor_in") for name in made.state_dict()) == left
        made.save(tmp_path)
        again = lowrank_fx.load(model, tmp_path, compile=False)
        assert again.state_dict().keys() == made.state_dict().keys()
        assert torch.equal(again(loader[1]), made(loader[1]))
