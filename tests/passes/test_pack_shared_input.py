"""Pairs that have one first factor compute its product once."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Factors
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes.base import PassManager
from lowrank_fx.passes.factorize_linear import FactorizeLinear
from lowrank_fx.passes.pack_shared_input import PackSharedInput
from lowrank_fx.rewrite import factorize, fold
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

RANK = 2
ROUNDING = 2e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Heads(nn.Module):
    """q and k read x; v reads something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x.relu())], -1)


GOLDEN = """\
%q_bias = get[q.bias]
%k_bias = get[k.bias]
%v_bias = get[v.bias]
%x = input
%q_factor_in = get[q.factor_in]
%q_factor_out = get[q.factor_out]
%linear_3 = linear(%x, %q_factor_in)
%linear = linear(%linear_3, %q_factor_out, %q_bias)
%k_factor_out = get[k.factor_out]
%linear_1 = linear(%linear_3, %k_factor_out, %k_bias)
%relu = relu(%x)
%v_factor_in = get[v.factor_in]
%v_factor_out = get[v.factor_out]
%linear_7 = linear(%relu, %v_factor_in)
%linear_2 = linear(%linear_7, %v_factor_out, %v_bias)
%cat = cat([%linear, %linear_1, %linear_2], -1)
return (%cat,)"""


def graph_of(model: nn.Module, *args: Tensor) -> GraphModule:
    return capture(model, Call(args, {})).graph_module


def shared(gm: GraphModule, *sharing: str) -> dict[str, tuple[Site, Factors]]:
    """Pairs with one first factor, that of q; those not named have the same values and do not say so."""
    first = rows(RANK, 6)
    return {
        site.name: (
            site,
            Factors(
                first.clone(),
                rows(site.out_features, RANK, seed=1),
                None,
                first="q.factor_in" if site.name in sharing else None,
            ),
        )
        for site in find_sites(gm).sites
    }


def expected(model: Heads, factored: dict[str, tuple[Site, Factors]], x: Tensor) -> Tensor:
    parts = [(model.q, x), (model.k, x), (model.v, x.relu())]
    products = [factors.dense_matrix().float() for _, factors in factored.values()]
    return torch.cat([F.linear(own, w, layer.bias) for w, (layer, own) in zip(products, parts, strict=True)], -1)


def test_the_rewrite() -> None:
    model = Heads()
    gm = graph_of(model, rows(3, 6))
    factored = shared(gm, "k")
    PassManager([FactorizeLinear(factored)]).run(gm)
    result = run_pass(gm, PackSharedInput(factored), (rows(3, 6),), tolerance=ROUNDING)
    assert result.changes == ("k reads the product with q.factor_in",)
    assert not result.refusals
    assert graph_text(gm) == GOLDEN
    assert not any(name == "k.factor_in" for name, _ in gm.named_parameters())
    x = rows(5, 6, seed=3)
    torch.testing.assert_close(gm(x), expected(model, factored, x))


def test_what_reads_something_else_or_has_other_values_stays() -> None:
    model = Heads()
    gm = graph_of(model, rows(3, 6))
    factored = shared(gm, "k", "v")
    site, factors = factored["k"]
    factored["k"] = site, replace(factors, factor_in=factors.factor_in + 1)
    PassManager([FactorizeLinear(factored)]).run(gm)
    result = run_pass(gm, PackSharedInput(factored), (rows(3, 6),), tolerance=ROUNDING)
    assert not result.changes
    assert [(each.node, each.reason) for each in result.refusals] == [
        ("k", "its first factor is not equal to 'q.factor_in'"),
        ("v", "'q.factor_in' is not applied to its input before"),
    ]
    x = rows(5, 6, seed=3)
    torch.testing.assert_close(gm(x), expected(model, factored, x))


def test_without_its_owner_a_pair_has_a_first_factor_of_its_own() -> None:
    model = Heads()
    gm = graph_of(model, rows(3, 6))
    factored = shared(gm, "k")
    del factored["q"]
    made = factorize(gm, factored, clone=True)
    assert "k.factor_in" in dict(made.named_parameters())
    assert_equivalent(made, factorize(gm, shared_apart(factored), clone=True), (rows(4, 6),), rtol=ROUNDING)


def shared_apart(factored: dict[str, tuple[Site, Factors]]) -> dict[str, tuple[Site, Factors]]:
    return {name: (site, replace(factors, first=None)) for name, (site, factors) in factored.items()}


def test_each_folds_by_itself_and_leaves_the_others_their_product() -> None:
    model = Heads()
    gm = graph_of(model, rows(3, 6))
    factored = shared(gm, "k")
    made = factorize(gm, factored, clone=True)
    x = rows(5, 6, seed=3)
    for names in (["q"], ["k"], ["q", "k"], ["q", "k", "v"]):
        folded = fold(made, {name: factored[name][0] for name in names})
        torch.testing.assert_close(folded(x), made(x))
        held = dict(folded.named_parameters())
        assert all((f"{name}.weight" in held) == (name in names) for name in factored)
        assert ("q.factor_in" in held) == (not {"q", "k"} <= set(names))
    # One after the other, it is the same.
    one_by_one = fold(fold(made, {"q": factored["q"][0]}), {"k": factored["k"][0]})
    torch.testing.assert_close(one_by_one(x), made(x))
    assert "q.factor_in" not in dict(one_by_one.named_parameters())
