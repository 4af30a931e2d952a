"""Contractions with a weight become linear layers, or batched products with a weight per group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.lower_einsum import LowerEinsum
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

# The same products, summed in another order: up to 30 float32 terms here, 2e-7 measured. In float64: 5e-16 measured.
ROUNDING = 1e-6
EXACT = 1e-14


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def capture(model: nn.Module, *args: Tensor, dims: int = 1) -> GraphModule:
    dynamic = tuple(dict.fromkeys(range(dims), Dim.AUTO) for _ in args)
    gm = torch.export.export(model, args, dynamic_shapes=dynamic, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def seeded(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, tensor in enumerate(model.parameters(), start=1):
            tensor.copy_(randn(*tensor.shape, seed=seed))
    return model.eval()


class Attention(nn.Module):
    """Attention written with einsum, as models ported from other frameworks are, with a product per head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.empty(8, 2, 3))
        self.wk = nn.Parameter(torch.empty(2, 8, 3))
        self.mix = nn.Parameter(torch.empty(2, 3, 3))
        self.wo = nn.Parameter(torch.empty(2, 3, 8))
        self.last = nn.Parameter(torch.empty(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("bnd,dhk->bhnk", x, self.wq)
        k = torch.einsum("bnd,hdk->bhnk", x, self.wk)
        scores = torch.einsum("bhnk,bhmk->bhnm", q, k).softmax(-1)
        mixed = torch.einsum("bhnm,bhmk->bnhk", scores, q)
        mixed = torch.einsum("b n h k, h k l -> b n h l", mixed, self.mix)
        return torch.einsum("...d,de", torch.einsum("bnhk,hkd->bnd", mixed, self.wo), self.last)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Any:
        return self.attention(x)


GOLDEN = """\
%attention_wq = get[attention.wq]
%attention_wk = get[attention.wk]
%attention_mix = get[attention.mix]
%attention_wo = get[attention.wo]
%attention_last = get[attention.last]
%x = input
%matmul = matmul(%x, %attention_wq)
%unflatten = unflatten.int(%matmul, 2, [2, 3])
%permute = permute(%unflatten, [0, 2, 1, 3])
%linear = linear(%x, %attention_wk)
%unflatten_1 = unflatten.int(%linear, 2, [2, 3])
%permute_1 = permute(%unflatten_1, [0, 2, 1, 3])
%einsum_2 = einsum('bhnk,bhmk->bhnm', [%permute, %permute_1])
%softmax = softmax.int(%einsum_2, -1)
%einsum_3 = einsum('bhnm,bhmk->bnhk', [%softmax, %permute])
%permute_2 = permute(%einsum_3, [2, 0, 1, 3])
%flatten = flatten.using_ints(%permute_2, 1, 2)
%matmul_1 = matmul(%flatten, %attention_mix)
%sym_size = sym_size.int(%einsum_3, 0)
%sym_size_1 = sym_size.int(%einsum_3, 1)
%unflatten_2 = unflatten.int(%matmul_1, 1, [%sym_size, %sym_size_1])
%permute_3 = permute(%unflatten_2, [1, 2, 0, 3])
%flatten_1 = flatten.using_ints(%permute_3, 2, 3)
%matmul_2 = matmul(%flatten_1, %attention_wo)
%matmul_3 = matmul(%matmul_2, %attention_last)
return (%matmul_3,)"""


def test_numbers_count_graph_and_names() -> None:
    model = seeded(Model())
    x = randn(2, 5, 8)
    gm = capture(model, x, dims=2)
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "attention.wq [8, 6] (was [8, 2, 3]) applied by a matrix product in place of einsum",
        "attention.wk [6, 8] (was [2, 8, 3]) applied by a matrix product in place of einsum_1",
        "attention.mix [2, 3, 3] applied by a matrix product in place of einsum_4",
        "attention.wo [6, 8] (was [2, 3, 8]) applied by a matrix product in place of einsum_5",
        "attention.last [8, 5] applied by a matrix product in place of einsum_6",
    )
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert set(gm.state_dict()) == set(model.state_dict())
    # What is a matrix already, or one per head, is the model's own parameter.
    for name in ("attention.mix", "attention.last"):
        assert gm.get_parameter(name) is model.get_parameter(name)
    for size in ((3, 7, 8), (1, 1, 8), (0, 5, 8)):
        y = randn(*size, seed=9)
        if 0 in size:
            assert gm(y).shape == model(y).shape
        else:
            assert_equivalent(gm, model, (y,), rtol=ROUNDING)


def test_the_search_for_sites_sees_linear_layers() -> None:
    gm = capture(seeded(Model()), randn(2, 5, 8), dims=2)
    PassManager(order.cleanup()).run(gm)
    sites = {site.name: (site.out_features, site.in_features) for site in find_sites(gm).sites if site.kind == "linear"}
    assert sites == {
        "attention.wq": (6, 8), "attention.wk": (6, 8), "attention.wo": (8, 6), "attention.last": (5, 8),
    }  # fmt: skip
    wq, wk = (next(site for site in find_sites(gm).sites if site.name == f"attention.w{name}") for name in "qk")
    assert wq.calls[0].tap == wk.calls[0].tap  # one sketch for both


# Equation, shape of the activation, shape of the weight, shape of the parameter afterwards, operators of the graph.
# Sizes of the activation are dynamic under the labels a, b, n.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]] = {
    "bnd,de->bne": ((2, 3, 4), (4, 6), (4, 6), "matmul"),
    "bnd,ed->bne": ((2, 3, 4), (6, 4), (6, 4), "linear"),
    "bnd,ed": ((2, 3, 4), (6, 4), (6, 4), "linear permute"),  # the output's labels in alphabetical order
    "bnd,dE": ((2, 3, 4), (4, 6), (4, 6), "matmul permute"),
    "...d,de->...e": ((2, 3, 4), (4, 6), (4, 6), "matmul"),
    "...nd,...dk->...nk": ((2, 3, 4), (2, 4, 5), (2, 4, 5), "matmul"),
    "bnd,...dk->bn...k": ((2, 3, 4), (2, 4, 5), (10, 4), "linear unflatten.int"),
    "d,de->e": ((4,), (4, 6), (4, 6), "matmul"),
    "nd,de->en": ((3, 4), (4, 6), (4, 6), "matmul permute"),
    "dn,de->ne": ((4, 3), (4, 6), (4, 6), "permute matmul"),
    "abd,de->bae": ((2, 3, 4), (4, 6), (4, 6), "permute matmul"),
    "bnd,dhk->bnhk": ((2, 3, 4), (4, 2, 5), (4, 10), "matmul unflatten.int"),
    "bnd,dhk->bnkh": ((2, 3, 4), (4, 2, 5), (10, 4), "linear unflatten.int"),
    "bnhk,hkd->bnd": ((2, 3, 2, 5), (2, 5, 4), (10, 4), "flatten.using_ints matmul"),
    "bnkh,hkd->bnd": ((2, 3, 5, 2), (2, 5, 4), (4, 10), "flatten.using_ints linear"),
    "bnd,dafc->bcnaf": ((2, 3, 4), (4, 2, 3, 5), (30, 4), "linear unflatten.int permute"),
    "gnd,gdk->gnk": ((2, 3, 4), (2, 4, 5), (2, 4, 5), "matmul"),
    "gd,gdk->gk": ((3, 4), (3, 4, 5), (3, 4, 5), "unsqueeze matmul squeeze.dim"),
    "ngd,gkd->ngk": ((3, 2, 4), (2, 5, 4), (2, 4, 5), "permute matmul permute"),
    "nghd,ghdk->nghk": (
        (3, 2, 3, 4), (2, 3, 4, 5), (6, 4, 5), "permute flatten.using_ints matmul unflatten.int permute",
    ),
    "bnhd,hdkl->lbkhn": (
        (2, 3, 2, 4), (2, 4, 5, 3), (2, 4, 15),
        "permute flatten.using_ints matmul unflatten.int sym_size.int sym_size.int unflatten.int permute",
    ),
}  # fmt: skip


class One(nn.Module):
    """One einsum; ``flipped`` puts the weight first."""

    def __init__(self, equation: str, weight: Tensor, *, flipped: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.equation, self.flipped = equation, flipped

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, x) if self.flipped else (x, self.weight)
        return torch.einsum(self.equation, *operands)


def operators(gm: GraphModule) -> str:
    calls = [line.partition(" = ")[2] for line in graph_text(gm).splitlines()]
    return " ".join(call.partition("(")[0] for call in calls if "(" in call)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("equation", CASES)
def test_every_arrangement(equation: str, flipped: bool) -> None:
    size, weight, after, expected = CASES[equation]
    if flipped:
        left, arrow, right = equation.partition("->")
        equation = ",".join(reversed(left.split(","))) + arrow + right
    labels = equation.split("->")[0].split(",")[1 if flipped else 0]
    free = [place for place, label in enumerate(labels.ljust(len(size), ".")) if label in "abn"]
    # The leading dimensions are dynamic; export gives those that the weight fixes their numbers back.
    model = One(equation, randn(*weight, seed=1, dtype=torch.float64), flipped=flipped)
    x = randn(*size, dtype=torch.float64)
    gm = capture(model, x, dims=len(size))
    before = gm.get_parameter("weight")
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=EXACT)
    assert (result.rewrites, result.refusals) == (1, ())
    assert tuple(gm.get_parameter("weight").shape) == after
    assert gm.get_parameter("weight").is_contiguous()
    assert (gm.get_parameter("weight") is before) == (after == weight)
    assert operators(gm) == expected
    for longer in (2, -1):
        other = [
            number + longer if place in free and "." not in labels else number for place, number in enumerate(size)
        ]
        y = randn(*other, seed=5, dtype=torch.float64)
        assert_equivalent(gm, model, (y,), rtol=EXACT)
    if free and "." not in labels:
        empty = randn(*[0 if place == free[0] else number for place, number in enumerate(size)], dtype=torch.float64)
        assert gm(empty).shape == model(empty).shape


def test_the_sublist_format() -> None:
    class Sublist(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(randn(4, 2, 6))

        def forward(self, x: Tensor) -> Any:
            return torch.einsum(x, [..., 0], self.w, [0, 2, 1], [..., 1, 2])

    x = randn(2, 3, 4, seed=3)
    gm = capture(Sublist(), x)
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING)
    assert result.changes == ("w [12, 4] (was [4, 2, 6]) applied by a matrix product in place of einsum",)


class Apply(nn.Module):
    """A few tensors, put together by ``way``."""

    def __init__(self, way: Callable[[Apply, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.a = nn.Parameter(torch.empty(4, 4))
        self.heads = nn.Parameter(torch.empty(2, 4, 3))
        self.packed = nn.Parameter(torch.empty(3, 4, 2, 5))
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def lowered(way: Callable[[Apply, Tensor], Any]) -> tuple[Apply, GraphModule, tuple[str, ...]]:
    """The model of ``way``, its graph after the pass with its numbers checked, and what was changed."""
    model = Apply(way)
    seeded(model)
    x = randn(3, 2, 4)
    gm = capture(model, x, dims=2)
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING)
    assert result.refusals == ()
    assert_equivalent(gm, model, (randn(2, 5, 4, seed=8),), rtol=ROUNDING)
    return model, gm, result.changes


def test_a_weight_that_is_read_elsewhere_keeps_its_tie() -> None:
    model, gm, changes = lowered(lambda m, x: torch.einsum("bnd,de->bne", m.fc(x), m.fc.weight))
    assert changes == ("fc.weight [4, 4] applied by a matrix product in place of einsum",)
    assert gm.get_parameter("fc.weight") is model.fc.weight
    assert operators(gm) == "linear matmul"


def test_the_transpose_of_a_matrix_is_read_through() -> None:
    model, gm, _ = lowered(lambda m, x: torch.einsum("bnd,de->bne", x, m.fc.weight.t()))
    assert gm.get_parameter("fc.weight") is model.fc.weight
    assert graph_text(gm).splitlines()[-2:] == ["%linear = linear(%x, %fc_weight)", "return (%linear,)"]


def test_one_weight_applied_twice_in_the_same_way_stays_one() -> None:
    def twice(m: Apply, x: Tensor) -> Any:
        y = torch.einsum("bnd,hdk->bnhk", x, m.heads).sum((2, 3), keepdim=True).squeeze(-1)
        return torch.einsum("xyz,uzv->xyuv", x + y, m.heads)

    _, gm, changes = lowered(twice)
    assert changes == ("heads [6, 4] (was [2, 4, 3]) applied by a matrix product in place of einsum, einsum_1",)
    assert graph_text(gm).count("get[heads]") == 1


def test_a_weight_with_two_names_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (One("bnd,hdk->bnhk", randn(2, 4, 3)) for _ in range(2))
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Any:
            return self.first(x) + self.second(x.relu())

    x = randn(2, 3, 4)
    gm = capture(Tied(), x)
    assert run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING).rewrites == 1
    assert {name: tuple(tensor.shape) for name, tensor in gm.named_parameters()} == {"second.weight": (6, 4)}


def test_one_einsum_right_behind_another() -> None:
    _, gm, changes = lowered(lambda m, x: torch.einsum("bnd,de->bne", torch.einsum("bnd,de->bne", x, m.a), m.fc.weight))
    assert len(changes) == 2
    assert graph_text(gm).splitlines()[-3:-1] == ["%matmul = matmul(%x, %a)", "%matmul_1 = matmul(%matmul, %fc_weight)"]


def test_views_of_a_result_that_lies_differently_now() -> None:
    """einsum computes this one transposed, so that its result has no gaps; views of it rely on that."""
    _, gm, _ = lowered(lambda m, x: torch.einsum("nd,de->en", x.flatten(0, 1), m.a).unsqueeze(0).view(-1))
    assert operators(gm) == "flatten.using_ints matmul permute unsqueeze reshape"
    # Elsewhere the result lies as before, and a view stays a view.
    _, gm, _ = lowered(lambda m, x: torch.einsum("bnd,hdk->bnhk", x, m.heads).view(-1, 6))
    assert operators(gm) == "linear unflatten.int view"


def test_the_parts_of_a_packed_weight() -> None:
    def packed(m: Apply, x: Tensor) -> Any:
        q, k, v = m.packed
        return sum(torch.einsum("bnd,dhk->bnhk", x, part) for part in (q, k, v))

    model = Apply(packed)
    seeded(model)
    x = randn(3, 2, 4)
    gm = capture(model, x, dims=2)
    PassManager(order.cleanup(), verify=True).run(gm)
    assert_equivalent(gm, model, (x,), rtol=ROUNDING)
    assert [tuple(gm.get_parameter(f"packed_{part}").shape) for part in range(3)] == [(4, 10)] * 3
    assert "packed" not in dict(gm.named_parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_are_asked_for_where_they_were(trainable: bool) -> None:
    model = One("bnd,hdk->bhnk", randn(2, 4, 3)).requires_grad_(trainable)
    x = randn(2, 3, 4)
    gm = capture(model, x)
    run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING)
    assert gm.get_parameter("weight").requires_grad == trainable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = randn(2, 3, 4, dtype=dtype)
    gm = capture(One("bnd,hdk->bhnk", randn(2, 4, 3, dtype=dtype)), x)
    # Both round their float32 sums of four products once.
    run_pass(gm, LowerEinsum(), (x,), tolerance=2 * torch.finfo(dtype).eps)


def test_max_rewrites_stops_between_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "1")
    x = randn(2, 5, 8)
    gm = capture(seeded(Model()), x, dims=2)
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert result.refusals == tuple(
        Refusal(f"einsum_{call}", "LOWRANK_FX_MAX_REWRITES=1 is used up") for call in (1, 4, 5, 6)
    )


# Near misses ----------------------------------------------------------------------------------------------------------


def read_elsewhere(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,hdk->bnhk", x, m.heads) * m.heads.mean()


def read_in_two_ways(m: Apply, x: Tensor) -> Any:
    y = torch.einsum("bnd,hdk->bnhk", x, m.heads)
    return torch.einsum("bnhk,hdk->bnd", y, m.heads)


def written(m: Apply, x: Tensor) -> Any:
    y = torch.einsum("bnd,de->bne", x, m.a)
    m.a.detach().mul_(1.0)
    return y


NEAR_MISSES: dict[Callable[[Apply, Tensor], Any], tuple[Refusal, ...]] = {
    read_elsewhere: (Refusal("einsum", "heads is also read by mean, and its matrix would be a copy"),),
    read_in_two_ways: (
        Refusal("einsum", "heads is also read by einsum_1, and its matrix would be a copy"),
        Refusal("einsum_1", "heads is also read by einsum, and its matrix would be a copy"),
    ),
    written: (Refusal("einsum", "the graph writes to a"),),
}


@pytest.mark.parametrize("way", NEAR_MISSES, ids=lambda way: way.__name__)
def test_near_misses_are_left_alone(way: Callable[[Apply, Tensor], Any]) -> None:
    x = randn(3, 2, 4)
    gm = capture(seeded(Apply(way)), x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    result = run_pass(gm, LowerEinsum(), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == NEAR_MISSES[way]
    assert graph_text(gm) == text
