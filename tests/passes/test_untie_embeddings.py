"""Heads that share their weight with an embedding, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager, Refusal, RewriteBudget
from lowrank_fx.passes.untie_embeddings import UntieEmbeddings, retie
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


class Language(nn.Module):
    """A language model of one layer, put together by ``head``."""

    def __init__(self, head: Callable[[Language, Tensor], Any] | None = None, *, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(10, 4)
        self.fc = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        source = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=source))
        if tied:
            self.lm_head.weight = self.wte.weight
        self.head = head

    def forward(self, ids: Tensor) -> Any:
        x = self.fc(self.wte(ids))
        return self.lm_head(x) if self.head is None else self.head(self, x)


def capture(model: nn.Module, *args: Tensor) -> GraphModule:
    gm = torch.export.export(model.eval(), args, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def readers(gm: GraphModule) -> dict[str, list[str]]:
    """The operators that read each name."""
    nodes = [node for node in gm.graph.nodes if node.op == "get_attr"]
    return {
        str(node.target): [str(user.target).removeprefix("aten.").removesuffix(".default") for user in node.users]
        for node in nodes
    }


def same_memory(gm: GraphModule, *names: str) -> bool:
    first, *rest = (gm.get_parameter(name) for name in names)
    return all(tensor is not first and tensor.data_ptr() == first.data_ptr() for tensor in rest)


GOLDEN = """\
%fc_weight = get[fc.weight]
%fc_bias = get[fc.bias]
%wte_weight_1 = get[wte.weight]
%lm_head_weight = get[lm_head.weight]
%ids = input
%embedding = embedding(%wte_weight_1, %ids)
%linear = linear(%embedding, %fc_weight, %fc_bias)
%linear_1 = linear(%linear, %lm_head_weight)
return (%linear_1,)"""


def test_numbers_count_graph_and_names() -> None:
    model = Language()
    gm = capture(model, IDS)
    assert readers(gm)["lm_head.weight"] == ["embedding", "linear"]
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert result.changes == ("lm_head.weight untied from wte.weight",)
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert gm.get_parameter("wte.weight") is model.wte.weight
    assert same_memory(gm, "wte.weight", "lm_head.weight")
    assert set(gm.state_dict()) == set(model.state_dict())
    assert model.lm_head.weight is model.wte.weight


def test_the_head_becomes_a_site_and_the_embedding_does_not() -> None:
    gm = capture(Language(), IDS)
    assert [site.name for site in find_sites(gm).sites] == ["fc"]
    PassManager(order.cleanup()).run(gm)
    table = find_sites(gm)
    assert [(site.name, site.weight) for site in table.sites] == [("fc", "fc.weight"), ("lm_head", "lm_head.weight")]
    assert [left.name for left in table.left_alone] == ["wte"]


def test_retie_is_the_way_back() -> None:
    model = Language()
    gm = capture(model, IDS)
    run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    retie(gm)
    assert gm.get_parameter("lm_head.weight") is gm.get_parameter("wte.weight") is model.wte.weight
    assert_equivalent(gm, model, (IDS,), rtol=0.0)


def test_retie_leaves_apart_what_is_not_the_same() -> None:
    gm = capture(Language(tied=False), IDS)
    memory = torch.zeros(40)
    wte, head = gm.get_submodule("wte"), gm.get_submodule("lm_head")
    for apart in (memory.view(4, 10).t(), memory.view(10, 4).double(), memory.view(torch.int32).view(10, 4)):
        wte.weight = nn.Parameter(memory.view(10, 4))
        head.weight = nn.Parameter(apart, requires_grad=False)
        retie(gm)
        assert head.weight is not wte.weight
    nothing = nn.Module()
    nothing.a, nothing.b = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0, 4))
    gm.nothing = nothing
    retie(gm)
    assert nothing.a is not nothing.b


def called_in_the_model(m: Language, x: Tensor) -> Any:
    return F.linear(x, m.wte.weight)


def through_a_transpose(m: Language, x: Tensor) -> Any:
    return x @ m.wte.weight.t() + x @ m.wte.weight.transpose(0, 1)


def by_rows(m: Language, x: Tensor) -> Any:
    return torch.addmm(x.new_zeros(10), x[0], m.wte.weight.t())


def back_into_the_embedding(m: Language, x: Tensor) -> Any:
    return m.lm_head(x).softmax(-1) @ m.wte.weight


def as_an_einsum(m: Language, x: Tensor) -> Any:
    return torch.einsum("bnd,vd->bnv", x, m.wte.weight)


@pytest.mark.parametrize("way", [called_in_the_model, through_a_transpose, by_rows], ids=lambda way: way.__name__)
def test_a_head_without_a_module_is_named_after_the_table(way: Callable[[Language, Tensor], Any]) -> None:
    model = Language(way, tied=False)
    gm = capture(model, IDS)
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert result.changes == ("wte_head.weight untied from wte.weight",)
    assert readers(gm)["wte.weight"] == ["embedding"]
    assert same_memory(gm, "wte.weight", "wte_head.weight")


def test_a_table_that_is_a_plain_parameter() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.eye(10, 4), requires_grad=False)

        def forward(self, ids: Tensor) -> Any:
            return F.linear(F.embedding(ids, self.table) + 1, self.table)

    gm = capture(Plain(), IDS)
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert result.changes == ("table_head untied from table",)
    assert not gm.get_parameter("table_head").requires_grad


def test_a_table_that_is_a_heads_own_weight_keeps_its_name() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 10)

        def forward(self, ids: Tensor) -> Any:
            return self.out(F.embedding(ids, self.out.weight))

    gm = capture(Reversed(), IDS)
    run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert readers(gm)["out.weight"] == ["embedding"]
    assert readers(gm)["out_head.weight"] == ["linear"]


def test_all_heads_of_one_table_share_a_parameter() -> None:
    gm = capture(Language(back_into_the_embedding), IDS)
    run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert readers(gm)["lm_head.weight"] == ["linear", "matmul"]
    assert readers(gm)["wte.weight"] == ["embedding"]


def test_several_embeddings_keep_their_names() -> None:
    class Two(Language):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Embedding(10, 4)
            self.other.weight = self.wte.weight

        def forward(self, ids: Tensor) -> Any:
            return self.lm_head(self.wte(ids) + self.other(ids + 1 - 1))

    gm = capture(Two(), IDS)
    run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    seen = {name: users for name, users in readers(gm).items() if name != "fc.weight"}
    assert seen == {"wte.weight": ["embedding"], "other.weight": ["embedding"], "lm_head.weight": ["linear"]}
    retie(gm)
    assert len({id(gm.get_parameter(name)) for name in seen}) == 1


def test_a_head_written_as_an_einsum_is_untied_after_it_is_lowered() -> None:
    model = Language(as_an_einsum, tied=False)
    gm = capture(model, IDS)
    results = dict(PassManager(order.cleanup(), verify=True).run(gm))
    assert results["untie-embeddings"].changes == ("wte_head.weight untied from wte.weight",)
    assert "wte_head" in {site.name for site in find_sites(gm).sites}
    # The same product, summed in another order: 1e-7 measured.
    assert_equivalent(gm, model, (IDS,), rtol=1e-6)


def test_max_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "0")
    gm = capture(Language(), IDS)
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert result.refusals == (Refusal("embedding", "LOWRANK_FX_MAX_REWRITES=0 is used up"),)
    assert readers(gm)["lm_head.weight"] == ["embedding", "linear"]


# Near misses ----------------------------------------------------------------------------------------------------------


def read_by_something_else(m: Language, x: Tensor) -> Any:
    return m.lm_head(x) * m.wte.weight.mean()


def a_slice_of_it(m: Language, x: Tensor) -> Any:
    return m.lm_head(x)[..., :2] + F.linear(x, m.wte.weight[:2])


def looked_up_transposed(m: Language, x: Tensor) -> Any:
    return m.lm_head(x) + F.embedding(x.argmax(-1), m.wte.weight.t())[..., :1].sum()


def as_the_left_operand(m: Language, x: Tensor) -> Any:
    return m.lm_head(x), m.wte.weight @ x.mT


def as_the_activation(m: Language, x: Tensor) -> Any:
    return m.lm_head(x), m.fc(m.wte.weight)


def written(m: Language, x: Tensor) -> Any:
    y = m.lm_head(x)
    m.wte.weight.detach().mul_(1.0)
    return y


NEAR_MISSES: dict[Callable[[Language, Tensor], Any], str] = {
    read_by_something_else: "its table {} is read by linear_1, but also by mean",
    a_slice_of_it: "its table {} is read by linear_1, but also by slice_2",
    looked_up_transposed: "its table {} is read by linear_1, but also by embedding_1",
    as_the_left_operand: "its table {} is read by linear_1, but also by matmul",
    as_the_activation: "its table {} is read by linear_1, but also by linear_2",
    written: "the graph writes to its table {}",
}


@pytest.mark.parametrize("way", NEAR_MISSES, ids=lambda way: way.__name__)
def test_near_misses_are_left_alone(way: Callable[[Language, Tensor], Any]) -> None:
    gm = capture(Language(way), IDS)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (Refusal("embedding", NEAR_MISSES[way].format("lm_head.weight")),)
    assert graph_text(gm) == text


def test_a_table_that_is_renormalised_in_place_is_left_alone() -> None:
    model = Language()
    model.wte.max_norm = 1.0
    # Run by itself: the graph writes to the model's own table each time it is called.
    result = UntieEmbeddings().run(capture(model, IDS), RewriteBudget())
    assert result.changes == ()
    (refusal,) = result.refusals
    assert refusal.reason == "the graph writes to its table wte.weight"


def test_embeddings_and_heads_that_share_nothing_are_not_looked_at() -> None:
    gm = capture(Language(tied=False), IDS)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    result = run_pass(gm, UntieEmbeddings(), (IDS,), tolerance=0.0)
    assert (result.changes, result.refusals) == ((), ())
    assert graph_text(gm) == text
