"""The verifier, tried on passes that were broken on purpose, one per invariant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from lowrank_fx.errors import PassError
from lowrank_fx.passes.base import Pass, PassManager, PassResult, RewriteBudget, clean
from lowrank_fx.passes.edit import parameter_node, set_parameter
from lowrank_fx.passes.verify import check_graph, fake_mode_of, unused_names

aten = torch.ops.aten


class Net(nn.Module):
    """A convolution, a linear layer, a view by the batch's size, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc = nn.Linear(3, 5)
        self.never = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).relu().mean((2, 3))
        a, b = self.fc(y).split([2, 3], 1)
        return torch.cat([b, a], 1).view(x.shape[0], 5, 1)


def captured() -> GraphModule:
    gm = torch.export.export(
        Net().eval(), (torch.ones(2, 2, 6, 6),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    ).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    clean(gm)
    return gm


def find(gm: GraphModule, target: object) -> Any:
    return next(node for node in gm.graph.nodes if node.target is target or node.target == target)


def test_a_captured_graph_passes() -> None:
    gm = captured()
    unused = unused_names(gm)
    assert unused == {"never.weight", "never.bias"}
    check_graph(gm)
    check_graph(gm, allowed_unused=unused)
    with pytest.raises(PassError, match=r"'never.bias' is registered but no node reads it"):
        check_graph(gm, allowed_unused=())


def test_checking_learns_nothing_about_symbolic_sizes() -> None:
    gm = captured()
    environment = fake_mode_of(gm).shape_env
    assert environment is not None
    before = (len(environment.guards), dict(environment.replacements), dict(environment.var_to_range))
    check_graph(gm)
    assert (len(environment.guards), dict(environment.replacements), dict(environment.var_to_range)) == before


def wrong_dtype(gm: Any) -> None:
    node = find(gm, aten.relu.default)
    node.meta["val"] = node.meta["val"].to(torch.float64)


def wrong_rank(gm: Any) -> None:
    node = find(gm, aten.mean.dim)
    node.meta["val"] = node.meta["val"].unsqueeze(0)


def wrong_size(gm: Any) -> None:
    node = find(gm, aten.linear.default)
    node.meta["val"] = node.meta["val"][:, :4]


def frozen_batch(gm: Any) -> None:
    node = find(gm, aten.relu.default)
    with fake_mode_of(gm):
        node.meta["val"] = torch.empty(2, 3, 4, 4)


def wrong_structure(gm: Any) -> None:
    node = find(gm, aten.split_with_sizes.default)
    node.meta["val"] = node.meta["val"][:1]


def wrong_symbol(gm: Any) -> None:
    find(gm, aten.sym_size.int).meta["val"] = 2


def missing_meta(gm: Any) -> None:
    del find(gm, aten.relu.default).meta["val"]


def missing_argument_meta(gm: Any) -> None:
    gm.add_module("watch", nn.Identity())
    relu = find(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        watched = gm.graph.call_module("watch", (relu,))
    relu.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)


def dangling(gm: Any) -> None:
    del gm.fc.weight


def not_a_tensor(gm: Any) -> None:
    gm.fc.note = "text"
    find(gm, "fc.weight").target = "fc.note"


def wrong_parameter_shape(gm: Any) -> None:
    gm.conv.weight = nn.Parameter(torch.ones(3, 2, 1, 1))


def wrong_parameter_dtype(gm: Any) -> None:
    gm.fc.bias = nn.Parameter(torch.ones(5, dtype=torch.float64))


def parameter_without_meta(gm: Any) -> None:
    del find(gm, "fc.bias").meta["val"]


def operands_that_do_not_fit(gm: Any) -> None:
    linear = find(gm, aten.linear.default)
    linear.args = (linear.args[0], find(gm, "conv.bias"), linear.args[2])


def too_many_operands(gm: Any) -> None:
    relu = find(gm, aten.relu.default)
    relu.args = (relu.args[0], relu.args[0])


def dead_node(gm: Any) -> None:
    relu = find(gm, aten.relu.default)
    with gm.graph.inserting_after(relu):
        dead = gm.graph.call_function(aten.neg.default, (relu,))
    dead.meta["val"] = relu.meta["val"]


def dead_parameter_node(gm: Any) -> None:
    parameter_node(gm, "never.weight", find(gm, aten.relu.default))


def used_before_made(gm: Any) -> None:
    find(gm, aten.relu.default).append(find(gm, aten.conv2d.default))


def late_placeholder(gm: Any) -> None:
    with gm.graph.inserting_after(find(gm, aten.relu.default)):
        gm.graph.placeholder("late")


def output_not_last(gm: Any) -> None:
    output = gm.graph.output_node()
    view = find(gm, aten.view.default)
    with gm.graph.inserting_after(output):
        gm.graph.call_function(aten.neg_.default, (view,)).meta["val"] = view.meta["val"]


def left_behind(gm: Any) -> None:
    set_parameter(gm, "fc.factor_in", torch.ones(1, 3), trainable=True)


BROKEN: dict[Callable[[GraphModule], None], str] = {
    wrong_dtype: r"'relu' \(aten.relu.default\): meta\[\"val\"\] says float64\[.*\], the operator gives float32\[",
    wrong_rank: r"'mean' .* says float32\[1, s\d+, 3\], the operator gives float32\[s\d+, 3\]",
    wrong_size: r"'linear' .* says float32\[s\d+, 4\], the operator gives float32\[s\d+, 5\]",
    frozen_batch: r"'relu' .* says float32\[2, 3, 4, 4\], the operator gives float32\[s\d+, 3, 4, 4\]",
    wrong_structure: r"'split_with_sizes' .* has the structure",
    wrong_symbol: r"'sym_size_int.*' \(aten.sym_size.int\): .* says int 2, the operator gives SymInt s\d+",
    missing_meta: r"'relu' \(aten.relu.default\) carries no meta\[\"val\"\]",
    missing_argument_meta: r"argument 'watch' \(call_module of watch\) carries no meta\[\"val\"\]",
    dangling: r"'fc_weight' dangles: 'fc.weight' does not exist in the graph module: 'weight' is missing",
    not_a_tensor: r"'fc_weight' reads 'fc.note', which is a str, not a tensor",
    wrong_parameter_shape: r"'conv_weight': .* says float32\[3, 2, 3, 3\], but 'conv.weight' is float32\[3, 2, 1, 1\]",
    wrong_parameter_dtype: r"'fc_bias': .* says float32\[5\], but 'fc.bias' is float64\[5\]",
    parameter_without_meta: r"'fc_bias' reads 'fc.bias' but carries no tensor",
    operands_that_do_not_fit: r"'linear' \(aten.linear.default\) does not run on the metas of its arguments",
    too_many_operands: r"'relu' \(aten.relu.default\) does not run on the metas of its arguments",
    dead_node: r"'neg_default' \(aten.neg.default\) is dead",
    dead_parameter_node: r"'never_weight.*' \(never.weight\) is dead",
    used_before_made: r"lint: .*'?relu'?",
    late_placeholder: r"placeholder 'late' comes after a call",
    output_not_last: r"the graph has 1 outputs and ends in 'neg__default'",
    left_behind: r"'fc.factor_in' is registered but no node reads it any more",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_every_invariant_is_held(damage: Callable[[GraphModule], None]) -> None:
    gm = captured()
    unused = unused_names(gm)
    damage(gm)
    with pytest.raises(PassError, match=BROKEN[damage]):
        check_graph(gm, allowed_unused=unused)


@pytest.mark.parametrize(
    "damage", [wrong_dtype, dangling, wrong_parameter_shape, left_behind], ids=lambda damage: damage.__name__
)
def test_a_broken_pass_is_caught_between_passes(
    damage: Callable[[GraphModule], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Pass):
        """Do damage."""

        name = "broken"

        def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
            budget.take()
            damage(gm)
            return PassResult(("damage",))

    monkeypatch.setenv("LOWRANK_FX_CHECK", "1")
    with pytest.raises(PassError, match="pass 'broken' failed"):
        PassManager([Broken()]).run(captured())


def test_many_problems_are_listed_and_counted() -> None:
    gm = captured()
    relu = find(gm, aten.relu.default)
    for _ in range(11):
        with gm.graph.inserting_after(relu):
            gm.graph.call_function(aten.neg.default, (relu,)).meta["val"] = relu.meta["val"]
    with pytest.raises(PassError) as told:
        check_graph(gm)
    assert len(str(told.value).splitlines()) == 10  # a headline, eight problems, and how many more there are
    assert str(told.value).endswith("and 3 more")


def test_an_operator_that_writes_is_checked_without_touching_its_arguments() -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            return y.unsqueeze_(0).add_(1)

    gm = torch.export.export(InPlace(), (torch.ones(3, 4),), strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    clean(gm)
    before = [str(node.meta.get("val")) for node in gm.graph.nodes]
    for _ in range(2):
        check_graph(gm)
    assert [str(node.meta.get("val")) for node in gm.graph.nodes] == before
