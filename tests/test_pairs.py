"""Models that come with factored pairs or adapters: folded, optimized, saved and loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, Tolerance
from lowrank_fx.batches import Call
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.module import LowRankModule
from lowrank_fx.testing import assert_equivalent

# float32: other orders of summation of products of depth <= 96, rounded once; measured 4e-7.
ROUNDING = 3e-6


class Net(nn.Module):
    """What Greenformer makes: a CED and a LED, beside a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ced = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False), nn.Conv2d(8, 48, 1))
        self.led = nn.Sequential(nn.Linear(48, 12, bias=False), nn.Linear(12, 96))
        self.head = nn.Linear(96, 24)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        x = self.led(self.ced(x).relu().mean((2, 3))).relu()
        return {"out": self.head(x if shift is None else x + shift)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def batches() -> list[Tensor]:
    return [torch.randn(6, 6, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def optimized(model: nn.Module, target: Any, **options: Any) -> LowRankModule:
    return lowrank_fx.optimize(model, batches(), target=target, compile=False, progress=False, **options)


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flops(made: LowRankModule) -> int:
    return made.artifact.program.count_flops(Call((batches()[0],), {}))


# ---- folding ---------------------------------------------------------------------------------------------------------


def test_pairs_of_any_model_are_folded() -> None:
    model, x = net(), batches()[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = lowrank_fx.fold_pairs(model, x)
    assert made.changes == (
        "ced.0 and ced.1, a pair of rank 8, taken as one layer ced, 48 x 54",
        "led.0 and led.1, a pair of rank 12, taken as one layer led, 96 x 48",
    )
    assert made.left_alone == ()
    assert {name: tuple(tensor.shape) for name, tensor in made.named_parameters() if tensor.dim() > 1} == {
        "ced.weight": (48, 6, 3, 3), "led.weight": (96, 48), "head.weight": (24, 96),
    }  # fmt: skip
    assert_equivalent(made, model, (batches()[1][:2],), rtol=ROUNDING)
    assert_equivalent(made, model, {"x": x}, rtol=ROUNDING)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in made.parameters()}


def test_the_folded_module_is_a_module_like_any_other() -> None:
    made, x = lowrank_fx.fold_pairs(net(), batches()[0]), batches()[0]
    with pytest.raises(lowrank_fx.CallError, match="shift"):
        made(x, shift=torch.zeros(6, 96))
    made(x)["out"].square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert made.train().training
    assert not made.eval().training
    double = made.double()
    assert double(x.double())["out"].dtype == torch.float64
    made.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in made.state_dict().items()})
    assert bool((made(x.double())["out"] == 0).all())


def test_what_is_no_pair_is_said_and_what_export_refuses_is_an_error() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lines(x)
            return out

    class Branching(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    made = lowrank_fx.fold_pairs(Wide().eval(), torch.randn(3, 8))
    assert made.changes == ()
    assert made.left_alone == (
        "linear_1: its middle width 6 is at or above break-even: 96 weights, and 64 in the product",
    )
    with pytest.raises(lowrank_fx.CaptureError, match="Branching"):
        lowrank_fx.fold_pairs(Branching().eval(), torch.randn(3, 8))


def test_our_own_factored_models_are_folded_too() -> None:
    fast = optimized(net(), Keep(params=0.5), planner="uniform")
    made = lowrank_fx.fold_pairs(fast, batches()[0])
    assert len(made.changes) == 3
    assert made.state_dict().keys() == fast.fold().state_dict().keys()
    assert_equivalent(made, fast.fold(), (batches()[1],), rtol=ROUNDING)


# ---- optimizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "factored"),
    [
        (Keep(params=0.6), {"planner": "uniform"}, {"ced", "led", "head"}),
        (Keep(params=0.95), {}, {"head"}),
        (Tolerance(1e-6), {}, set()),
    ],
)
def test_sizes_are_those_of_the_model_as_it_came(
    target: Any, options: dict[str, Any], factored: set[str], tmp_path: Path
) -> None:
    model, x = net(), batches()[1]
    fast = optimized(model, target, **options)
    totals = fast.plan.totals
    assert {site.name for site in fast.plan.factored} == factored
    assert totals.model_params == (params(model), params(fast))
    own = fast.artifact.program
    assert isinstance(own, GraphProgram)
    assert totals.model_flops == (2 * 6 * 25 * (54 * 8 + 8 * 48) + 2 * 6 * (48 * 12 + 12 * 96 + 96 * 24), flops(fast))
    assert totals.kept("params", "model") <= 1
    assert totals.kept("flops", "model") <= 1
    before = {site.name: site.params[0] for site in fast.plan.sites}
    assert before == {"ced": 8 * (54 + 48), "led": 12 * (48 + 96), "head": 96 * 24}
    for site in fast.plan.sites:
        assert site.params[1] <= site.params[0]
        assert site.factored or site.params[0] == site.params[1]
        if not site.factored and site.name != "head":  # the pair is what it was, name by name
            for leaf in ("0.weight", "1.weight"):
                name = f"{site.name}.{leaf}"
                assert torch.equal(fast.get_parameter(name), model.get_parameter(name))
    fast.save(tmp_path)
    again = lowrank_fx.load(model, tmp_path, compile=False)
    assert again.state_dict().keys() == fast.state_dict().keys()
    assert torch.equal(again(x)["out"], fast(x)["out"])
    folded = fast.fold()
    assert_equivalent(folded, fast, (x,), rtol=ROUNDING)
    assert folded.plan.totals.model_params[1] == params(folded)
    assert folded.plan.totals.model_flops[1] == flops(folded)


def test_the_cleanup_names_the_pairs_and_a_dense_one_says_what_it_is() -> None:
    fast = optimized(net(), Tolerance(1e-6))
    assert "led.0 and led.1, a pair of rank 12, taken as one layer led, 96 x 48" in fast.plan.cleanup
    assert fast.session is not None
    assert {site.name: site.pair for site in fast.session.table.sites} == {
        "ced": ("channel", 8), "led": ("lowrank", 12), "head": None,
    }  # fmt: skip
    options = fast.session.problem.options["led"]
    assert max(option.rank for option in options if option.rank is not None) == 11
    assert_equivalent(fast, net(), (batches()[1],), rtol=0.0)


def test_a_model_is_optimized_again() -> None:
    once = optimized(net(), Keep(params=0.6), planner="uniform")
    twice = optimized(once, Keep(params=0.6), planner="uniform")
    assert {site.name for site in twice.plan.sites} == {"ced", "led", "head"}
    ranks = {site.name: site.rank for site in once.plan.sites}
    for site in twice.plan.factored:
        assert site.rank is not None
        assert site.rank < (ranks[site.name] or 0)
    assert twice.plan.totals.model_params == (params(once), params(twice))
    assert params(twice) <= 0.6 * params(once)


def test_factors_that_no_form_makes_are_left_alone_and_come_back() -> None:
    class Wider(nn.Module):
        """Three factors of ranks that Tucker-2 would not choose."""

        def __init__(self) -> None:
            super().__init__()
            self.three = nn.Sequential(
                nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(5, 8, 3, bias=False), nn.Conv2d(8, 48, 1)
            )
            self.head = nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.three(x).relu().mean((2, 3)))
            return out

    torch.manual_seed(0)
    model = Wider().eval()
    fast = optimized(model, Keep(params=0.8))
    assert [(each.name, each.reason) for each in fast.plan.left_alone] == [
        ("three", "it came as factors that no form makes")
    ]
    assert {"three.0.weight", "three.1.weight", "three.2.weight"} <= set(fast.state_dict())
    assert fast.plan.totals.model_params == (params(model), params(fast))


# ---- adapters of peft ------------------------------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 24, 3, padding=1)
        self.query = nn.Linear(24, 48)
        self.value = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.value(self.query(self.conv(x).relu().mean((2, 3))).relu())
        return out


def adapted(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "init_lora_weights": False, **options}
        return get_peft_model(Base(), LoraConfig(target_modules=["conv", "query"], **chosen)).eval()


def test_adapters_of_peft_are_folded() -> None:
    model, x = adapted(), batches()[0]
    made = lowrank_fx.fold_pairs(model, x)
    prefix = "base_model.model"
    assert made.changes == tuple(
        f"{prefix}.{name}.lora_A.default and {prefix}.{name}.lora_B.default, an adapter of rank 4, merged into "
        f"{prefix}.{name}.base_layer"
        for name in ("conv", "query")
    )
    assert not any("lora" in name for name in made.state_dict())
    assert_equivalent(made, model, (batches()[1],), rtol=ROUNDING)
    merged = model.merge_and_unload()  # peft's own merge is the reference for the weights
    for name in ("conv", "query"):
        weight = made.get_parameter(f"{prefix}.{name}.base_layer.weight")
        torch.testing.assert_close(weight, merged.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


def test_adapters_that_peft_merged_leave_nothing_to_fold() -> None:
    model = adapted()
    model.merge_adapter()
    made = lowrank_fx.fold_pairs(model, batches()[0])
    assert (made.changes, made.left_alone) == ((), ())
    assert_equivalent(made, model, (batches()[1],), rtol=0.0)
    assert not any("lora" in name for name in made.state_dict())


def test_an_adapter_that_scales_the_layer_too_is_no_part_of_its_weight() -> None:
    model = adapted(use_dora=True)
    made = lowrank_fx.fold_pairs(model, batches()[0])
    # What runs beside the layer is a pair all the same.
    assert len(made.changes) == 2
    assert all("a pair of rank 4" in line for line in made.changes)
    assert_equivalent(made, model, (batches()[1],), rtol=ROUNDING)


def test_an_adapted_model_is_optimized_as_what_it_computes(tmp_path: Path) -> None:
    model, x = adapted(), batches()[1]
    fast = optimized(model, Keep(params=0.7), planner="uniform")
    sites = [site.name.removeprefix("base_model.model.") for site in fast.plan.sites]
    assert sites == ["conv.base_layer", "query.base_layer", "value"]
    assert sum("an adapter of rank 4, merged into" in line for line in fast.plan.cleanup) == 2
    assert fast.plan.totals.model_params == (params(model), params(fast))
    assert params(fast) <= 0.7 * params(model)
    dense = optimized(model, Tolerance(1e-9))
    assert_equivalent(dense, model, (x,), rtol=ROUNDING)
    assert params(dense) < params(model)
    assert dense.plan.totals.model_flops[0] == flops(dense)
    fast.save(tmp_path)
    assert torch.equal(lowrank_fx.load(model, tmp_path, compile=False)(x), fast(x))
