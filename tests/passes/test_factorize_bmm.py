"""Products with a matrix per group replaced by pairs, and folded back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Channel, Factors, LowRank
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.factorize_bmm import FactorizeBmm
from lowrank_fx.passes.fold_factors import FoldFactors
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

# A pair of full rank is the layer itself, but for two roundings to float32 and sums of at most 6 products: 3e-7
# measured.
ROUNDING = 2e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, *args: Tensor) -> GraphModule:
    return capture(model, Call(args, {})).graph_module


def factors_of(site: Site, weight: Tensor, rank: int | None = None, shift: Tensor | None = None) -> Factors:
    """A pair by plain SVD of each group's matrix; of full rank it is the weight itself."""
    first, second = [], []
    for block in site.matrix(weight.detach()).double().chunk(site.groups):
        left, values, right = torch.linalg.svd(block, full_matrices=False)
        first.append((values[:, None] * right)[:rank])
        second.append(left[:, :rank])
    form = Channel() if site.patch is not None else LowRank()
    return form.assemble(site, torch.cat(first).to(weight.dtype), torch.cat(second).to(weight.dtype), shift)


def full(gm: GraphModule, rank: int | None = None) -> dict[str, tuple[Site, Factors]]:
    return {site.name: (site, factors_of(site, gm.get_parameter(site.weight), rank)) for site in find_sites(gm).sites}


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(rows(*shape, seed=1))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.w)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.up = nn.Parameter(rows(3, 4, 6))
        self.head = nn.Module()
        self.head.weight = nn.Parameter(rows(3, 6, 5))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.bmm(x, self.mlp.up).relu()  # type: ignore[arg-type]
        return hidden[None] @ self.head.weight  # type: ignore[operator]


GOLDEN = """\
%x = input
%mlp_up_factor_in = get[mlp.up_factor_in]
%mlp_up_factor_out = get[mlp.up_factor_out]
%bmm_1 = bmm(%x, %mlp_up_factor_in)
%bmm = bmm(%bmm_1, %mlp_up_factor_out)
%relu = relu(%bmm)
%unsqueeze = unsqueeze(%relu, 0)
%head_factor_in = get[head.factor_in]
%head_factor_out = get[head.factor_out]
%matmul_1 = matmul(%unsqueeze, %head_factor_in)
%matmul = matmul(%matmul_1, %head_factor_out)
return (%matmul,)"""


def test_numbers_count_graph_and_names() -> None:
    model, x = Experts(), rows(3, 7, 4)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeBmm(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "mlp.up 18 x 4 factored at rank 4 in each of 3 groups", "head 15 x 6 factored at rank 5 in each of 3 groups",
    )  # fmt: skip
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert {name: tuple(tensor.shape) for name, tensor in gm.state_dict().items()} == {
        "mlp.up_factor_in": (3, 4, 4), "mlp.up_factor_out": (3, 4, 6),
        "head.factor_in": (3, 6, 5), "head.factor_out": (3, 5, 5),
    }  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in gm.state_dict().values())
    assert_equivalent(gm, model, (x,), rtol=ROUNDING)


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 6)),
    "no rows": (lambda x, w: torch.bmm(x[:, 0:0], w), (2, 3, 4), (2, 4, 6)),
    "matmul in 4-D": (torch.matmul, (5, 2, 3, 4), (2, 4, 6)),
    "matmul in 5-D": (torch.matmul, (2, 5, 2, 3, 4), (2, 4, 6)),
    "rows for all groups": (torch.matmul, (3, 4), (2, 4, 6)),
    "rows for all groups, in 4-D": (torch.matmul, (5, 1, 3, 4), (2, 4, 6)),
    "one matrix": (torch.matmul, (5, 3, 4), (1, 4, 6)),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_pair_and_its_fold_compute_the_product_of_each_group(name: str) -> None:
    function, shape, weight = WAYS[name]
    model, x = Apply(function, weight).double(), rows(*shape).double()
    gm = graph_of(model, x)
    factored = full(gm, 2)
    original = graph_text(gm)
    run_pass(gm, FactorizeBmm(full(gm)), (x,), tolerance=1e-14)
    gm = graph_of(model, x)
    site, factors = factored["w"]
    # What the pair is to be, group by group, from the factors as the operators take them.
    product = torch.stack([a @ b for a, b in zip(factors.factor_in, factors.factor_out, strict=True)])
    torch.testing.assert_close(site.unmatrix(factors.dense_matrix()), product, rtol=1e-13, atol=1e-13)
    gm = graph_of(model, x)
    PassManager([FactorizeBmm(factored)], verify=True).run(gm)
    torch.testing.assert_close(gm(x), function(x, product), rtol=1e-12, atol=1e-12)
    result = run_pass(gm, FoldFactors({"w": site}), (x,), tolerance=1e-14)
    assert result.changes == (f"w folded to {6 * weight[0]} x 4",)
    torch.testing.assert_close(gm.get_parameter("w"), product, rtol=1e-13, atol=1e-13)
    assert graph_text(gm).replace("%w_1", "%w").splitlines()[-2:] == original.splitlines()[-2:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_short_dtypes(dtype: torch.dtype) -> None:
    model, x = Experts().to(dtype), rows(3, 7, 4).to(dtype)
    gm = graph_of(model, x)
    # Each of two layers rounds two factors, a middle value and an output to the dtype.
    run_pass(gm, FactorizeBmm(full(gm)), (x,), tolerance=6 * torch.finfo(dtype).eps)
    assert {parameter.dtype for parameter in gm.parameters()} == {dtype}


def test_other_kinds_and_missing_nodes_are_left_alone() -> None:
    x = rows(3, 7, 4)
    factored = full(graph_of(Experts(), x))
    gm = graph_of(nn.Sequential(nn.Linear(4, 6)), x)
    text = graph_text(gm)
    result = run_pass(gm, FactorizeBmm(factored | full(gm)), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (
        Refusal("mlp.up", "the graph has no node 'bmm'"), Refusal("head", "the graph has no node 'matmul'"),
    )  # fmt: skip
    assert graph_text(gm) == text
