"""Copies of a graph own what they should; factoring and folding leave the captured graph as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Channel, Factors, LowRank
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.rewrite import copy_graph_module, factorize, fold
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent

IMAGE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Tied weights, a stored transpose, a buffer under two names, a frozen layer and a buffer that is not saved."""

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding="same", dilation=2)
        self.turned = nn.Parameter(torch.randn(12, 16))
        self.one = nn.Linear(16, 16)
        self.two = nn.Linear(16, 16, bias=False)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(16, 8).requires_grad_(False)
        self.register_buffer("scale", torch.rand(16))
        self.one.register_buffer("scale", self.scale)
        self.register_buffer("offset", torch.rand(16), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu_(self.conv(image)).mean((2, 3)) @ self.turned
        hidden = self.one(hidden) * self.scale + self.offset
        return torch.tanh(self.frozen(self.two(hidden) * self.one.get_buffer("scale")))


class Setup:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = Net().eval().to(dtype)
        captured = capture(self.model, Call((IMAGE.to(dtype),), {}))
        self.gm: GraphModule = captured.graph_module
        PassManager(order.cleanup()).run(self.gm)
        self.factored = {site.name: (site, self.factors(site)) for site in find_sites(self.gm).sites}
        self.sites = {name: site for name, (site, _) in self.factored.items()}

    def factors(self, site: Site, rank: int = 3) -> Factors:
        generator = torch.Generator().manual_seed(rank)
        weight = self.gm.get_parameter(site.weight)
        pair = [
            torch.randn(*shape, generator=generator).to(weight.dtype) / 4
            for shape in ((rank, site.in_features), (site.out_features, rank))
        ]
        shift = torch.randn(site.out_features, generator=generator).double() if site.centered else None
        form = Channel() if site.kind == "conv2d" else LowRank()
        return Factors(*form.shaped(site, pair[0], pair[1]), shift)

    def by_hand(self) -> nn.Module:
        """The model with the products of the pairs put into it by hand."""
        made = Net().eval().to(self.gm.get_parameter("turned").dtype)
        made.load_state_dict(self.model.state_dict())
        made.offset.copy_(self.model.get_buffer("offset"))
        with torch.no_grad():
            for site, factors in self.factored.values():
                made.get_parameter(site.weight).copy_(site.unmatrix(factors.dense_matrix()))
                if factors.shift is not None:
                    bias = made.get_parameter(f"{site.name}.bias")
                    bias.copy_(bias.double() + factors.shift)
        return made


@pytest.fixture(scope="module")
def net() -> Setup:
    return Setup()


def tensors(gm: nn.Module) -> dict[str, Tensor]:
    found = dict(gm.named_parameters(remove_duplicate=False))
    return found | dict(gm.named_buffers(remove_duplicate=False))


def snapshot(gm: GraphModule) -> tuple[str, dict[str, tuple[int, Tensor]]]:
    return str(gm.graph), {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors(gm).items()}


def unchanged(gm: GraphModule, before: tuple[str, dict[str, tuple[int, Tensor]]]) -> bool:
    now = snapshot(gm)
    return now[0] == before[0] and all(
        now[1][name][0] == identity and torch.equal(now[1][name][1], value)
        for name, (identity, value) in before[1].items()
    )


def storages(gm: GraphModule) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(gm).values()}


@pytest.mark.parametrize("clone", [True, False])
def test_a_copy_computes_the_same_and_shares_what_it_should(net: Setup, clone: bool) -> None:
    before = snapshot(net.gm)
    copied = copy_graph_module(net.gm, clone=clone)
    assert_equivalent(copied, net.gm, (IMAGE,), rtol=0)
    assert [node.name for node in copied.graph.nodes] == [node.name for node in net.gm.graph.nodes]
    assert all("val" in node.meta for node in copied.graph.nodes if node.op == "call_function")
    assert storages(copied).isdisjoint(storages(net.gm)) if clone else storages(copied) <= storages(net.gm)
    read = {str(node.target) for node in net.gm.graph.nodes if node.op == "get_attr"}
    assert tensors(copied).keys() == read
    # Its own graph and modules: what is done to it stays in it.
    copied.get_submodule("conv").register_parameter("weight", nn.Parameter(torch.zeros(12, 3, 3, 3)))
    copied.graph.erase_node(next(iter(reversed(copied.graph.nodes))))
    assert unchanged(net.gm, before)


def test_gradient_flags_and_buffers_survive_a_clone(net: Setup) -> None:
    original = tensors(net.gm)
    for name, tensor in tensors(copy_graph_module(net.gm, clone=True)).items():
        assert torch.equal(tensor, original[name])
        assert tensor.requires_grad == original[name].requires_grad == (name in grad_names(net.model)), name
        assert isinstance(tensor, nn.Parameter) == isinstance(original[name], nn.Parameter)


def grad_names(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.requires_grad}


def test_a_tensor_with_two_names_stays_one_tensor() -> None:
    root = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    root["b"].weight = root["a"].weight
    for name in "ab":
        root[name].register_buffer("scale", root["a"]._buffers.get("scale", torch.ones(4)))
    graph = Graph()
    value = graph.placeholder("x")
    for name in "ab":
        value = graph.call_function(torch.ops.aten.linear.default, (value, graph.get_attr(f"{name}.weight")))
        value = graph.call_function(torch.ops.aten.mul.Tensor, (value, graph.get_attr(f"{name}.scale")))
    graph.output(value)
    gm = GraphModule(root, graph)
    copied = tensors(copy_graph_module(gm, clone=True))
    assert copied["a.weight"] is copied["b.weight"] is not gm.get_parameter("a.weight")
    assert copied["a.scale"] is copied["b.scale"] is not gm.get_buffer("a.scale")


@pytest.mark.parametrize("clone", [True, False])
def test_factoring_puts_the_products_in_place_and_leaves_the_captured_graph(net: Setup, clone: bool) -> None:
    # Export reads the tied weight under its last name.
    assert set(net.factored) == {"conv", "turned", "two", "frozen"}
    before = snapshot(net.gm)
    factored = factorize(net.gm, net.factored, clone=clone)
    assert unchanged(net.gm, before)
    # Float32: two products of 16 terms instead of one with a rounded weight (measured: 2e-7).
    assert_equivalent(factored, net.by_hand(), (IMAGE,), rtol=1e-5)
    left = storages(factored) & storages(net.gm)
    assert not left if clone else net.gm.get_buffer("offset").untyped_storage().data_ptr() in left
    names = dict(factored.named_parameters())
    assert {"conv.factor_in", "two.factor_out", "turned_factor_in", "frozen.factor_out"} <= names.keys()
    assert not {"conv.weight", "one.weight", "two.weight", "turned", "frozen.weight"} & names.keys()
    assert names["conv.factor_in"].requires_grad
    assert not names["frozen.factor_in"].requires_grad


def test_nothing_to_factor_is_a_plain_copy(net: Setup) -> None:
    assert_equivalent(factorize(net.gm, {}, clone=True), net.gm, (IMAGE,), rtol=0)


def test_another_batch_size_and_gradients(net: Setup) -> None:
    factored = factorize(net.gm, net.factored, clone=True)
    assert_equivalent(factored, net.by_hand(), (torch.randn(7, 3, 6, 6),), rtol=1e-5)
    factored(IMAGE).sum().backward()
    gradients = {name for name, parameter in factored.named_parameters() if parameter.grad is not None}
    assert {"conv.factor_in", "conv.factor_out", "two.factor_in", "turned_factor_out"} <= gradients
    assert not any(name.startswith("frozen") for name in gradients)
    assert all(parameter.grad is None for parameter in net.gm.parameters())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_folding_gives_one_dense_operator_per_site(dtype: torch.dtype, rtol: float) -> None:
    setup = Setup(dtype)
    factored = factorize(setup.gm, setup.factored, clone=True)
    before = snapshot(factored)
    folded = fold(factored, setup.sites)
    assert unchanged(factored, before)
    assert storages(folded).isdisjoint(storages(factored) | storages(setup.gm))
    # The rounding of the product, a few units of the dtype (bfloat16: 2^-9 each; measured .01).
    assert_equivalent(folded, factored, (IMAGE.to(dtype),), rtol=rtol)
    assert not any("factor" in name for name in folded.state_dict())
    weights = {name: tensor.shape for name, tensor in tensors(copy_graph_module(setup.gm, clone=False)).items()}
    assert {name: tensor.shape for name, tensor in tensors(folded).items()} == weights
    original = [node.target for node in setup.gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in folded.graph.nodes if node.op == "call_function"] == original
    for site, factors in setup.factored.values():
        expected = site.unmatrix(factors.dense_matrix()).to(dtype)
        assert torch.equal(folded.get_parameter(site.weight).detach(), expected), site.name


class Spare(nn.Module):
    """Two layers with one weight, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.spare = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of four numbers."""
        product: Tensor = self.again(self.first(x)) * self.scale
        return product


def test_a_program_counts_the_parameters_that_its_graph_reads_once() -> None:
    call = Call((torch.ones(3, 4),), {})
    program = GraphProgram.from_capture(capture(Spare(), call))
    before = str(program.module.graph)
    assert program.params() == 4 * 4 + 4
    assert program.count_flops(call) == 2 * 2 * 3 * 4 * 4
    assert str(program.module.graph) == before
