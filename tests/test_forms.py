"""Forms: every rank's error, the factors and the bias against dense float64 computations on the same rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_fx.errors import OptionError
from lowrank_fx.forms import FORMS, Channel, ErrorCurve, LowRank, base, dense_flops, dense_params, forms_for, relative
from lowrank_fx.grouped_sketch import GroupedSketch
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Site, SiteCall
from lowrank_fx.sketch import FrequentDirections

# All of it is float64, and an error is the root of a difference of energies: 1e-16 of an energy is 1e-8 of a norm.
EXACT = 1e-7


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def skewed_rows(count: int, width: int, seed: int = 1) -> Tensor:
    """Rows of falling energy in a rotated basis, with a mean far from zero: what activations look like."""
    rotation: Tensor = torch.linalg.qr(randn(width, width, seed=seed + 1)).Q
    scales = torch.tensor([0.7**position for position in range(width)])
    scaled = randn(count, width, seed=seed) * scales
    return scaled @ rotation + 3 * randn(width, seed=seed + 2)


def linear_site(
    out: int, width: int, *, centered: bool = True, transposed: bool = False, dtype: str = "torch.float64"
) -> Site:
    shape = (width, out) if transposed else (out, width)
    calls = (SiteCall("linear", "x", "q.bias" if centered else None),)
    return Site("q", "linear", "q.weight", transposed, out, width, shape, dtype, None, calls, centered)


def conv_site(out: int, channels: int, patch: Patch, *, centered: bool = True) -> Site:
    width = channels * patch.kernel[0] * patch.kernel[1]
    calls = (SiteCall("conv2d", "x", "q.bias" if centered else None),)
    shape = (out, channels, *patch.kernel)
    return Site("q", "conv2d", "q.weight", False, out, width, shape, "torch.float64", patch, calls, centered)


def sketch_of(rows: Tensor, size: int | None = None) -> FrequentDirections:
    sketch = FrequentDirections(rows.shape[1], size)
    sketch.update(rows)
    return sketch


def seen(rows: Tensor, centered: bool) -> Tensor:
    """The rows as a layer with (without) a bias of its own meets them."""
    return rows - rows.mean(0) if centered else rows


def residual(matrix: Tensor, curve: ErrorCurve, rank: int) -> Tensor:
    basis = curve.basis[:, :rank].double()
    return matrix - basis @ (basis.t() @ matrix)


@pytest.fixture
def without_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula on the rows alone."""
    monkeypatch.setattr(base, "PRIOR_ROWS", 0.0)


@pytest.mark.usefixtures("without_prior")
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("count", [4, 50])
def test_the_curve_is_the_dense_error_at_every_rank(shape: tuple[int, int], centered: bool, count: int) -> None:
    weight, rows = randn(*shape), skewed_rows(count, shape[1])
    curve = LowRank().curve(linear_site(*shape, centered=centered), weight, sketch_of(rows))
    output = seen(rows, centered) @ weight.t()
    assert curve.ranks == tuple(range(1, math.ceil(shape[0] * shape[1] / sum(shape))))
    assert curve.energy == pytest.approx(output.square().sum().item(), rel=1e-9)
    singular = torch.linalg.svdvals(output).square()
    for rank in curve.ranks:
        left = seen(rows, centered) @ residual(weight, curve, rank).t()
        assert curve.error(rank) == pytest.approx((left.norm() / output.norm()).item(), abs=EXACT)
        # Eckart and Young: no rank-k matrix is nearer to the output.
        best = singular[rank:].sum() / singular.sum()
        assert curve.error(rank) == pytest.approx(best.sqrt().item(), abs=EXACT)
    gram = curve.basis.t() @ curve.basis
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("centered", [True, False])
def test_the_prior_counts_as_rows_of_white_noise(centered: bool) -> None:
    weight, rows = randn(6, 9), skewed_rows(4, 9)
    curve = LowRank().curve(linear_site(6, 9, centered=centered), weight, sketch_of(rows))
    own = seen(rows, centered)
    scale = (base.PRIOR_ROWS * own.square().sum() / (4 * 9)).sqrt()
    with_noise = torch.cat((own, scale * torch.eye(9, dtype=torch.float64)))
    for rank in curve.ranks:
        left, whole = with_noise @ residual(weight, curve, rank).t(), with_noise @ weight.t()
        assert curve.error(rank) == pytest.approx((left.norm() / whole.norm()).item(), abs=EXACT)
        assert curve.error(rank) > 0.01  # fewer rows than dimensions do not promise a perfect factor


@pytest.mark.usefixtures("without_prior")
@settings(max_examples=40, deadline=None)
@given(out=st.integers(3, 9), width=st.integers(3, 9), seed=st.integers(0, 1000), centered=st.booleans())
def test_never_worse_than_the_plain_svd(out: int, width: int, seed: int, centered: bool) -> None:
    weight, rows = randn(out, width, seed=seed), skewed_rows(30, width, seed=seed)
    curve = LowRank().curve(linear_site(out, width, centered=centered), weight, sketch_of(rows))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    own = seen(rows, centered)
    for rank in curve.ranks:
        plain = own @ (weight - left[:, :rank] * values[:rank] @ right[:rank]).t()
        assert curve.error(rank) <= (plain.norm() / (own @ weight.t()).norm()).item() + EXACT


def test_better_than_the_plain_svd_where_inputs_are_skewed() -> None:
    weight, rows = randn(40, 30), skewed_rows(400, 30)
    curve = LowRank().curve(linear_site(40, 30), weight, sketch_of(rows))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    own = seen(rows, True)
    plain = own @ (weight - left[:, :8] * values[:8] @ right[:8]).t()
    assert curve.error(8) < 0.2 * (plain.norm() / (own @ weight.t()).norm()).item()  # 0.057 and 0.506 measured


def test_errors_fall_with_rank_and_end_near_zero() -> None:
    weight = randn(20, 3) @ randn(3, 30, seed=1)  # of rank 3
    curve = LowRank().curve(linear_site(20, 30), weight, sketch_of(skewed_rows(100, 30)))
    errors = [curve.error(rank) for rank in curve.ranks]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] > 1e-3
    assert max(errors[2:]) < EXACT
    full = LowRank().curve(linear_site(20, 30), randn(20, 30), sketch_of(skewed_rows(100, 30)))
    assert full.error(20) == full.error(1000) == 0.0


def test_a_layer_without_output_has_no_error() -> None:
    curve = LowRank().curve(linear_site(6, 9), torch.zeros(6, 9, dtype=torch.float64), sketch_of(skewed_rows(20, 9)))
    assert [curve.error(rank) for rank in curve.ranks] == [0.0] * len(curve.ranks)
    assert relative(0.0, 0.0) == relative(-1e-30, 1.0) == 0.0
    assert relative(1.0, 4.0) == 0.5


# Factors --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_prior")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_have_the_curves_error_and_keep_the_mean(dtype: torch.dtype, transposed: bool) -> None:
    site = linear_site(24, 30, transposed=transposed, dtype=str(dtype))
    rows = skewed_rows(200, 30)
    weight = site.unmatrix(randn(24, 30).to(dtype))
    sketch = sketch_of(rows)
    curve = LowRank().curve(site, weight, sketch)
    matrix = site.matrix(weight).double()
    for rank in (1, 5, curve.ranks[-1]):
        factors = LowRank().factor(site, weight, curve, rank, sketch)
        assert (factors.factor_in.dtype, factors.factor_out.dtype) == (dtype, dtype)
        assert (factors.rank, factors.factor_in.shape, factors.factor_out.shape) == (rank, (rank, 30), (24, rank))
        assert factors.factor_in.is_contiguous()
        assert factors.factor_out.is_contiguous()
        assert factors.shift is not None
        assert factors.shift.dtype == torch.float64
        # The mean input gives what it gave, whatever rounding the factors went through.
        product = factors.dense_matrix()
        torch.testing.assert_close(product @ sketch.mean + factors.shift, matrix @ sketch.mean, rtol=1e-12, atol=1e-12)
        # Each factor is rounded once, to half a unit in the last place.
        rounding = 2 * torch.finfo(dtype).eps
        left = rows @ (matrix - product).t() - factors.shift
        error = (left.norm() / (seen(rows, True) @ matrix.t()).norm()).item()
        assert error == pytest.approx(curve.error(rank), abs=max(rounding, EXACT))


def test_without_a_bias_of_its_own_there_is_no_shift() -> None:
    site = linear_site(6, 9, centered=False)
    rows, weight = skewed_rows(50, 9), randn(6, 9)
    sketch = sketch_of(rows)
    curve = LowRank().curve(site, weight, sketch)
    assert LowRank().factor(site, weight, curve, 2, sketch).shift is None
    # The mean is most of such rows, so one direction already carries nearly all of the output.
    assert curve.error(1) < 0.5 < LowRank().curve(linear_site(6, 9), weight, sketch).error(1)


def test_a_float64_model_keeps_its_precision() -> None:
    weight, rows = randn(20, 4) @ randn(4, 30, seed=1), skewed_rows(100, 30)
    sketch = sketch_of(rows)
    curve = LowRank().curve(linear_site(20, 30), weight, sketch)
    factors = LowRank().factor(linear_site(20, 30), weight, curve, 4, sketch)
    assert curve.basis.dtype == torch.float64
    assert ((factors.dense_matrix() - weight).norm() / weight.norm()).item() < 1e-12
    single = LowRank().curve(linear_site(20, 30, dtype="torch.float32"), weight.float(), sketch)
    assert single.basis.dtype == torch.float32


GEOMETRIES = [
    Patch((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    Patch((3, 3), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    Patch((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    Patch((2, 3), (1, 2), ((2, 2), (1, 1)), (2, 1)),
]


@pytest.mark.parametrize("patch", GEOMETRIES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.usefixtures("without_prior")
def test_channel_is_the_composed_convolution(patch: Patch, centered: bool) -> None:
    site = conv_site(8, 5, patch, centered=centered)
    weight = randn(*site.shape)
    image = skewed_rows(3 * 7 * 8, 5).reshape(3, 7, 8, 5).permute(0, 3, 1, 2)
    height, width = patch.positions(7, 8)
    sketch = sketch_of(patch.extract(image, torch.arange(3 * height * width)))
    curve = Channel().curve(site, weight, sketch)
    padding = (patch.padding[0][0], patch.padding[1][0])

    def conv(kernel: Tensor) -> Tensor:
        return F.conv2d(image, kernel, None, patch.stride, padding, patch.dilation)

    dense = conv(weight)
    for rank in curve.ranks:
        factors = Channel().factor(site, weight, curve, rank, sketch)
        assert factors.factor_in.shape == (rank, 5, *patch.kernel)
        assert factors.factor_out.shape == (8, rank, 1, 1)
        pair = F.conv2d(conv(factors.factor_in), factors.factor_out)
        torch.testing.assert_close(pair, conv(site.unmatrix(factors.dense_matrix())), rtol=1e-10, atol=1e-10)
        shift = torch.zeros(8, dtype=torch.float64) if factors.shift is None else factors.shift
        left = dense - pair - shift[:, None, None]
        whole = dense - dense.mean((0, 2, 3), keepdim=True) if centered else dense
        assert (left.norm() / whole.norm()).item() == pytest.approx(curve.error(rank), abs=EXACT)


# Groups ---------------------------------------------------------------------------------------------------------------


def grouped_site(kind: str, groups: int, block: int, width: int, *, centered: bool, dtype: str) -> Site:
    """``groups`` matrices of ``block x width``: a batch of matrices, or a convolution with a kernel of one."""
    shape = (groups, width, block) if kind == "bmm" else (groups * block, width, *[1] * int(kind[4]))
    dims = len(shape) - 2
    patch = None if kind == "bmm" else Patch((1,) * dims, (1,) * dims, ((0, 0),) * dims, (1,) * dims)
    calls = (SiteCall("call", "x", "q.bias" if centered else None),)
    return Site(
        "q", kind, "q.weight", kind == "bmm", groups * block, width, shape, dtype, patch, calls, centered, groups=groups
    )  # fmt: skip


@pytest.mark.usefixtures("without_prior")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "centered"), [("bmm", False), ("conv1d", True), ("conv2d", False), ("conv2d", True), ("conv3d", True)]
)
@pytest.mark.parametrize("size", [None, 6])
def test_a_grouped_pair_is_the_best_one_of_every_group(
    kind: str, centered: bool, dtype: torch.dtype, size: int | None
) -> None:
    groups, block, width = 3, 8, 7
    site = grouped_site(kind, groups, block, width, centered=centered, dtype=str(dtype))
    form = LowRank() if kind == "bmm" else Channel()
    assert forms_for(site, None) == [FORMS[form.name]]  # kernels of one
    weight = randn(*site.shape).to(dtype)
    rows = torch.cat([skewed_rows(60, width, seed=seed) for seed in range(groups)], 1)
    sketch = GroupedSketch(groups * width, groups, size)
    sketch.update(rows)
    curve = form.curve(site, weight, sketch)
    assert curve.ranks == (tuple(range(1, 4)))  # break-even 56 / 15
    # Independent: each group's own rows, weight and singular values.
    blocks = weight.double().mT if kind == "bmm" else weight.double().flatten(1).reshape(groups, block, width)
    outputs = [seen(own, centered) @ each.t() for own, each in zip(rows.chunk(groups, 1), blocks, strict=True)]
    energy = sum(float(output.square().sum()) for output in outputs)
    for rank in curve.ranks:
        factors = form.factor(site, weight, curve, rank, sketch)
        assert (factors.rank, factors.groups) == (rank, groups)
        assert form.params(site, rank) == factors.factor_in.numel() + factors.factor_out.numel()
        assert form.flops(site, rank, 60) == 2 * 60 * form.params(site, rank)
        blank = form.blank(site, weight, rank)
        assert [tensor.shape for tensor in blank.matrices()] == [(groups * rank, width), (groups * block, rank)]
        assert blank.factor_in.shape == factors.factor_in.shape
        assert blank.factor_out.shape == factors.factor_out.shape
        tail = sum(float(torch.linalg.svdvals(output)[rank:].square().sum()) for output in outputs)
        if size is None:
            assert curve.error(rank) == pytest.approx(math.sqrt(tail / energy), abs=EXACT)
        products = factors.dense_matrix().reshape(groups, block, width)
        lost = 0.0
        for group, own in enumerate(rows.chunk(groups, 1)):
            left = own @ (blocks[group] - products[group]).t()
            if centered:
                assert factors.shift is not None
                left = left - factors.shift.chunk(groups)[group]
            lost += float(left.square().sum())
        # Two roundings to the dtype; a sketch of 6 of 7 directions loses next to nothing here (1.0001 measured).
        wanted = math.sqrt(tail / energy) * (1 if size is None else 1.01)
        assert math.sqrt(lost / energy) <= wanted + 2 * torch.finfo(dtype).eps + EXACT
    assert torch.equal(site.unmatrix(site.matrix(weight)), weight)


@pytest.mark.parametrize("kind", ["bmm", "conv2d"])
def test_outputs_are_scaled_one_by_one(kind: str) -> None:
    site = grouped_site(kind, 2, 4, 5, centered=False, dtype="torch.float64")
    form = LowRank() if kind == "bmm" else Channel()
    factors = form.assemble(site, randn(2 * 2, 5), randn(8, 2, seed=1), None)
    scale, shift = randn(8, seed=2), randn(8, seed=3)
    scaled = factors.scaled(scale, shift)
    assert scaled.factor_out.shape == factors.factor_out.shape
    assert scaled.shift is shift
    torch.testing.assert_close(scaled.dense_matrix(), scale[:, None] * factors.dense_matrix(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["bmm", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_stand_in_is_the_product_as_the_dtype_rounds_it(kind: str, dtype: torch.dtype) -> None:
    site = grouped_site(kind, 2, 30, 50, centered=False, dtype=str(dtype))
    form = LowRank() if kind == "bmm" else Channel()
    first, second = randn(2 * 12, 50).to(dtype), randn(60, 12, seed=1).to(dtype)
    factors = form.assemble(site, first, second, None)
    exact, found = factors.dense_matrix(), factors.stand_in()
    assert (exact.dtype, found.dtype) == (torch.float64, dtype)
    blocks = zip(second.double().abs().chunk(2), first.double().abs().chunk(2), strict=True)
    # A sum of 12 products is off by at most 12 times the rounding of the sum of their absolute values.
    steps = 12 if dtype == torch.float32 else 1
    most = steps * torch.finfo(dtype).eps * torch.cat([out @ into for out, into in blocks])
    assert bool(((found.double() - exact).abs() <= most).all())
    if dtype != torch.float32:
        assert torch.equal(found, exact.to(dtype))


def test_a_group_that_saw_only_zeros_has_factors_too() -> None:
    site = grouped_site("conv1d", 2, 6, 6, centered=True, dtype="torch.float64")
    sketch = GroupedSketch(12, 2)
    sketch.update(torch.cat([skewed_rows(40, 6), torch.zeros(40, 6, dtype=torch.float64)], 1))
    weight = randn(*site.shape)
    curve = Channel().curve(site, weight, sketch)
    factors = Channel().factor(site, weight, curve, 2, sketch)
    assert all(bool(tensor.isfinite().all()) for tensor in (factors.factor_in, factors.factor_out, curve.basis))
    assert 0 < curve.error(2) < curve.error(1) < 1


def test_a_tied_weight_costs_no_parameters_while_it_is_dense() -> None:
    site = linear_site(30, 20)
    assert (dense_params(site), dense_flops(site, 5)) == (600, 2 * 5 * 600)
    tied = replace(site, tied=True)
    assert (dense_params(tied), dense_flops(tied, 5)) == (0, 2 * 5 * 600)
    assert LowRank().params(tied, 4) == LowRank().params(site, 4) == 4 * 50


# Ranks, sketches, names -----------------------------------------------------------------------------------------------


def test_ranks_are_below_break_even_in_steps_that_the_dtype_likes() -> None:
    assert LowRank().ranks(linear_site(160, 160, dtype="torch.float32")) == tuple(range(8, 80, 8))
    for dtype in ("torch.bfloat16", "torch.float16"):
        assert LowRank().ranks(linear_site(160, 160, dtype=dtype)) == (16, 32, 48, 64)
    assert LowRank().ranks(linear_site(60, 60, dtype="torch.bfloat16")) == tuple(range(1, 30))
    assert LowRank().ranks(linear_site(2, 2)) == ()
    # 12 x (5 * 9): break-even 9.47
    assert Channel().ranks(conv_site(12, 5, GEOMETRIES[0])) == tuple(range(1, 10))


@pytest.mark.parametrize("centered", [True, False])
def test_a_frequent_directions_sketch_supports_half_its_size(centered: bool) -> None:
    site, rows, weight = linear_site(40, 60, centered=centered), skewed_rows(300, 60), randn(40, 60)
    exact = LowRank().curve(site, weight, sketch_of(rows))
    curve = LowRank().curve(site, weight, sketch_of(rows, 20))
    assert curve.ranks == tuple(range(1, 11))
    own = seen(rows, centered)
    for rank in curve.ranks:
        error = ((own @ residual(weight, curve, rank).t()).norm() / (own @ weight.t()).norm()).item()
        # Spectra that fall as 0.7^i hardly shrink: 1.0004 measured at the last rank, and the prior is not sketched.
        assert error <= 1.05 * exact.error(rank)


def test_a_sketch_smaller_than_the_first_rank_still_gives_that_rank() -> None:
    site = linear_site(160, 160, dtype="torch.float32")
    weight = randn(160, 160).float()
    for count in (3, 40):
        sketch = sketch_of(skewed_rows(count, 160), 6)
        curve = LowRank().curve(site, weight, sketch)
        assert curve.ranks == (8,)
        assert curve.basis.shape == (160, 8)
        gram = curve.basis.double().t() @ curve.basis.double()
        torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
        assert LowRank().factor(site, weight, curve, 8, sketch).rank == 8


def test_which_forms_stand_for_a_site() -> None:
    linear, conv = linear_site(6, 9), conv_site(8, 5, GEOMETRIES[0])
    convs = ["channel", "channel_in", "spatial", "spatial_t", "tucker2"]
    assert list(FORMS) == ["lowrank", *convs]
    assert [form.name for form in forms_for(linear, None)] == ["lowrank"]
    assert [form.name for form in forms_for(conv, None)] == convs
    # A kernel of one divides in no other way.
    assert [form.name for form in forms_for(conv_site(8, 5, GEOMETRIES[2]), None)] == ["channel"]
    assert forms_for(conv, ("lowrank",)) == []
    assert [form.name for form in forms_for(conv, ("spatial", "lowrank", "channel"))] == ["channel", "spatial"]
    with pytest.raises(OptionError, match=r"forms=\['cp'\]: no form is called 'cp'; there are \['lowrank', "):
        forms_for(linear, ("cp",))


def test_the_same_rows_give_the_same_curve_and_the_weight_is_unchanged() -> None:
    weight, rows = randn(20, 30).requires_grad_(), skewed_rows(100, 30)
    before = weight.detach().clone()
    sketch = sketch_of(rows)
    first, second = (LowRank().curve(linear_site(20, 30), weight, sketch) for _ in range(2))
    assert first.tail == second.tail
    assert torch.equal(first.basis, second.basis)
    assert not first.basis.requires_grad
    factors = LowRank().factor(linear_site(20, 30), weight, first, 3, sketch)
    assert not factors.factor_in.requires_grad
    assert torch.equal(weight.detach(), before)
