"""The forms of convolutions in a model: graph and module tree, costs, folded back, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_fx import Keep, load, optimize
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import FORMS, Factors, forms_for
from lowrank_fx.forms.geometry import Geometry, divided, joined
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.modules import StandIn, dense, stand_in
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.passes.factorize_conv import FactorizeConv
from lowrank_fx.passes.fold_factors import FoldFactors
from lowrank_fx.sites import Site
from lowrank_fx.testing import graph_text, run_pass
from lowrank_fx.tree_sites import find_sites as tree_find_sites

# Up to three convolutions in float32 after another, against one with their composed kernel: 1e-6 measured.
ROUNDING = 5e-6

NEW = ("channel_in", "spatial", "spatial_t", "tucker2")

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(6, 8, 3), (2, 6, 9, 8)),
    "strided": (nn.Conv2d(6, 8, 3, stride=(2, 3), padding=(1, 2)), (2, 6, 9, 8)),
    "uneven": (nn.Conv2d(6, 8, (3, 5), stride=(3, 1), padding=(0, 2), dilation=(2, 1)), (2, 6, 11, 8)),
    "same": (nn.Conv2d(6, 8, (3, 4), padding="same", dilation=(1, 2), bias=False), (2, 6, 9, 8)),
    "valid": (nn.Conv2d(6, 8, 3, padding="valid", stride=2), (2, 6, 9, 8)),
    "flat": (nn.Conv2d(6, 8, (1, 5), stride=(2, 1), padding=(1, 2)), (2, 6, 9, 8)),
    "grouped": (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), (2, 8, 9, 8)),
    "wave": (nn.Conv1d(6, 8, 5, stride=2, padding=2, dilation=2), (2, 6, 30)),
    "wave same": (nn.Conv1d(6, 8, 5, padding="same", groups=2), (2, 6, 30)),
    "volume": (nn.Conv3d(5, 8, (2, 3, 3), stride=(1, 2, 2), padding=(1, 1, 0)), (2, 5, 4, 7, 6)),
}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cases() -> Iterator[tuple[str, str]]:
    for name, (layer, _) in LAYERS.items():
        site = tree_site(layer)
        yield from ((name, form.name) for form in forms_for(site, NEW) if form.ranks(site))


def tree_site(layer: nn.Module) -> Site:
    (site,) = tree_find_sites(nn.ModuleDict({"layer": layer})).sites
    return site


def random_factors(site: Site, form: str, weight: Tensor) -> Factors:
    blank = FORMS[form].blank(site, weight, max(1, FORMS[form].ranks(site)[-1] - 1))
    made: dict[str, Any] = {
        leaf: rows(*part.shape, seed=seed).to(weight.dtype) / part[0].numel() ** 0.5
        for seed, (leaf, part) in enumerate(blank.tensors.items())
    }
    return Factors(shift=None, groups=site.groups, **made)


CASES = list(cases())


def test_every_form_meets_every_kind_of_geometry() -> None:
    assert {form for _, form in CASES} == set(NEW)
    assert {name for name, _ in CASES} == set(LAYERS)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_graph_computes_with_the_composed_kernel_and_folds_back(name: str, form: str) -> None:
    layer, shape = LAYERS[name]
    x = rows(*shape, seed=7)
    gm = capture(nn.Sequential(layer).eval(), Call((x,), {})).graph_module
    gm.graph.eliminate_dead_code()
    (site,) = find_sites(gm).sites
    weight = gm.get_parameter(site.weight)
    factors = random_factors(site, form, weight)
    kernel = site.unmatrix(factors.dense_matrix())
    expected = by_hand(layer, kernel, x)
    (before,) = [node for node in gm.graph.nodes if node.name == site.calls[0].node]
    options = geometry_facts(before)
    result = PassManager((FactorizeConv({site.name: (site, factors)}),), verify=True).run(gm)
    assert result[0][1].rewrites == 1
    assert relative(gm(x), expected) < ROUNDING
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function")
    # Its cost is what torch counts, at the shape of this batch.
    with FlopCounterMode(display=False) as counter:
        gm(x)
    assert site.patch is not None
    positions = site.patch.rows(x)
    assert FORMS[form].flops(site, factors.rank, positions, x.shape[2:]) == counter.get_total_flops()
    folded = run_pass(gm, FoldFactors({site.name: site}), (x,), tolerance=ROUNDING)
    assert folded.rewrites == 1
    (back,) = [node for node in gm.graph.nodes if node.name == site.calls[0].node]
    assert geometry_facts(back) == options
    torch.testing.assert_close(gm.get_parameter(site.weight).detach(), kernel.float(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_stand_in_computes_with_the_composed_kernel(name: str, form: str) -> None:
    layer, shape = LAYERS[name]
    x = rows(*shape, seed=7)
    site = tree_site(layer)
    factors = random_factors(site, form, layer.get_parameter("weight"))
    parameters: dict[str, Any] = {leaf: nn.Parameter(part) for leaf, part in factors.tensors.items()}
    own = Factors(shift=None, groups=site.groups, **parameters)
    made = stand_in(layer, site, own, layer._parameters["bias"])
    assert isinstance(made, StandIn)
    kernel = site.unmatrix(factors.dense_matrix())
    assert relative(made(x), by_hand(layer, kernel, x)) < ROUNDING
    torch.testing.assert_close(made.weight.detach(), kernel.float(), rtol=1e-6, atol=1e-12)
    wanted = {*factors.tensors} | ({"bias"} if layer._parameters["bias"] is not None else set())
    assert set(made.state_dict()) == wanted
    back = dense(made)
    assert type(back) is type(layer)
    assert relative(back(x), by_hand(layer, kernel, x)) < ROUNDING


def by_hand(layer: nn.Module, kernel: Tensor, x: Tensor) -> Tensor:
    bias = layer._parameters["bias"]
    convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[x.dim()]
    facts: Any = layer
    shift = None if bias is None else bias.detach().double()
    return convolve(x.double(), kernel, shift, facts.stride, facts.padding, facts.dilation, facts.groups)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected).norm() / expected.norm())


def geometry_facts(node: Any) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a convolution's node, however they are written."""
    schema = list(node.target._schema.arguments)[3:]
    dims = node.args[1].meta["val"].dim() - 2
    given = dict(zip([argument.name for argument in schema], node.args[3:], strict=False)) | dict(node.kwargs)
    found = []
    for argument in schema:
        value = given.get(argument.name, argument.default_value)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = list(value) * dims
        value = [value] * dims if isinstance(value, int) and argument.name != "groups" else value
        found.append([0] * dims if value == "valid" else list(value) if isinstance(value, list | tuple) else value)
    return tuple(found)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2))
        self.last = nn.Conv2d(8, 8, 3, padding="same", bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(x).relu())


@pytest.mark.parametrize("form", ["spatial", "tucker2"])
def test_the_rewritten_graph(form: str) -> None:
    gm = capture(Two().eval(), Call((rows(2, 6, 12, 14),), {})).graph_module
    sites = find_sites(gm).sites
    factored = {site.name: (site, random_factors(site, form, gm.get_parameter(site.weight).detach())) for site in sites}
    run = PassManager(order.rewriting(factored), verify=True).run(gm)
    assert sum(result.rewrites for _, result in run) == 2
    assert graph_text(gm) == GOLDEN[form]


GOLDEN = {
    "spatial": """\
%conv_bias = get[conv.bias]
%x = input
%conv_factor_in = get[conv.factor_in]
%conv2d_2 = conv2d(%x, %conv_factor_in, None, [2, 1], [1, 0], [1, 1])
%conv_factor_out = get[conv.factor_out]
%conv2d = conv2d(%conv2d_2, %conv_factor_out, %conv_bias, [1, 2], [0, 2], [1, 2])
%relu = relu(%conv2d)
%last_factor_in = get[last.factor_in]
%conv2d_4 = conv2d.padding(%relu, %last_factor_in, None, [1, 1], 'same', [1, 1])
%last_factor_out = get[last.factor_out]
%conv2d_1 = conv2d.padding(%conv2d_4, %last_factor_out, None, [1, 1], 'same', [1, 1])
return (%conv2d_1,)""",
    "tucker2": """\
%conv_bias = get[conv.bias]
%x = input
%conv_factor_in = get[conv.factor_in]
%conv2d_2 = conv2d(%x, %conv_factor_in)
%conv_factor_mid = get[conv.factor_mid]
%conv2d_3 = conv2d(%conv2d_2, %conv_factor_mid, None, [2, 2], [1, 2], [1, 2])
%conv_factor_out = get[conv.factor_out]
%conv2d = conv2d(%conv2d_3, %conv_factor_out, %conv_bias)
%relu = relu(%conv2d)
%last_factor_in = get[last.factor_in]
%conv2d_5 = conv2d(%relu, %last_factor_in)
%last_factor_mid = get[last.factor_mid]
%conv2d_6 = conv2d.padding(%conv2d_5, %last_factor_mid, None, [1, 1], 'same', [1, 1])
%last_factor_out = get[last.factor_out]
%conv2d_1 = conv2d(%conv2d_6, %last_factor_out)
return (%conv2d_1,)""",
}


def test_geometry_divides_and_comes_together() -> None:
    geometry = Geometry((2, 3), (1, 2), (1, 4))
    tall, wide, point = torch.zeros(4, 3, 3, 1), torch.zeros(5, 4, 1, 3), torch.zeros(4, 4, 1, 1)
    assert divided(geometry, [tall, wide]) == [Geometry((2, 1), (1, 0), (1, 1)), Geometry((1, 3), (0, 2), (1, 4))]
    assert divided(geometry, [tall, point]) == [geometry, Geometry((1, 1), (0, 0), (1, 1))]
    for factors in ([tall, wide], [wide, tall], [point, wide, point], [point, torch.zeros(4, 4, 3, 3), point]):
        assert joined(divided(geometry, factors), factors) == geometry
    same = Geometry((1, 1), "same", (1, 2))
    assert [each.padding for each in divided(same, [point, wide])] == [(0, 0), "same"]
    assert joined(divided(same, [point, wide]), [point, wide]) == same


class Small(nn.Module):
    """A classifier whose convolutions are worth dividing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 12, 3, padding=1)
        self.two = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.three = nn.Conv2d(16, 16, 3, padding="same", groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.three(self.two(self.one(x).relu()).relu()).relu().mean((2, 3)))
        return result


@pytest.mark.parametrize("capturing", ["export", "modules"])
@pytest.mark.parametrize("form", [*NEW, None])
def test_from_optimize_to_a_loaded_and_folded_model(form: str | None, capturing: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().eval()
    loader = [rows(16, 3, 12, 12, seed=seed) for seed in range(6)]
    made = optimize(
        model, loader, target=Keep(params=0.7), forms=None if form is None else (form,), compile=False, progress=False,
        capture=capturing,
    )  # fmt: skip
    used = {site.form for site in made.plan.sites if site.factored}
    assert used == {form} if form is not None else used
    x = loader[0]
    total = sum(parameter.numel() for parameter in made.parameters())
    assert total <= 0.7 * sum(parameter.numel() for parameter in model.parameters())
    assert made.plan.totals.kept("params", "model") == pytest.approx(
        total / sum(parameter.numel() for parameter in model.parameters())
    )
    made.save(tmp_path)
    again = load(model, tmp_path, compile=False)
    assert torch.equal(again(x), made(x))
    assert list(again.state_dict()) == list(made.state_dict())
