"""The pass manager, the rewrite budget, and the tools that passes rewrite graphs with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from lowrank_fx.errors import OptionError, PassError
from lowrank_fx.passes.base import Pass, PassManager, PassResult, Refusal, RewriteBudget, clean
from lowrank_fx.passes.edit import (
    call_node,
    delete_attr,
    free_name,
    get_parameter,
    names_of_tensor,
    parameter_node,
    replace_parameter,
    set_buffer,
    set_parameter,
    users_of_attr,
)
from lowrank_fx.passes.verify import attr_tensor, check_graph, unused_names
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

aten = torch.ops.aten


class Tied(nn.Module):
    """Two layers share a weight; a third layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.never = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x).relu()).relu() * self.scale


def capture(model: nn.Module, *args: torch.Tensor) -> Any:
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    program = torch.export.export(model.eval(), args, dynamic_shapes=batch, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def tied() -> Any:
    return capture(Tied(), torch.ones(3, 4))


class ReluToSigmoid(Pass):
    """Replace every relu by a sigmoid (not a rewrite anyone wants, but an easy one to see)."""

    name = "relu-to-sigmoid"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        changes, refusals = [], []
        for node in list(gm.graph.nodes):
            if node.target is not aten.relu.default:
                continue
            if not budget.take():
                refusals.append(budget.refusal(node))
                continue
            new = call_node(gm, aten.sigmoid.default, node.args, like=node, before=node)
            node.replace_all_uses_with(new)
            changes.append(f"{node.name} is a sigmoid")
        return PassResult(tuple(changes), tuple(refusals))


class DropScale(Pass):
    """Forget the multiplication at the end, which takes the last user from its buffer."""

    name = "drop-scale"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        (mul,) = (node for node in gm.graph.nodes if node.target is aten.mul.Tensor)
        if not budget.take():
            return PassResult(refusals=(budget.refusal(mul),))
        mul.replace_all_uses_with(mul.args[0])
        return PassResult(("mul dropped",))


class Failing(Pass):
    """Raise."""

    name = "failing"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        raise KeyError("no such thing")


def targets(gm: GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_passes_run_in_order_and_report() -> None:
    gm = tied()
    done = PassManager([ReluToSigmoid(), DropScale()], verify=True).run(gm)
    assert done == (
        ("relu-to-sigmoid", PassResult(("relu is a sigmoid", "relu_1 is a sigmoid"))),
        ("drop-scale", PassResult(("mul dropped",))),
    )
    assert done[0][1].rewrites == 2
    assert targets(gm) == [aten.linear.default, aten.sigmoid.default, aten.linear.default, aten.sigmoid.default]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    weight, bias = gm.first.weight, gm.first.bias
    torch.testing.assert_close(gm(x), ((x @ weight.T + bias).sigmoid() @ weight.T).sigmoid())


def test_what_loses_its_last_user_is_deleted_and_nothing_else() -> None:
    gm = tied()
    PassManager([DropScale()], verify=True).run(gm)
    assert sorted(gm.state_dict()) == ["first.bias", "first.weight", "never.bias", "never.weight", "second.weight"]


def test_all_names_of_a_tensor_go_with_its_last_user() -> None:
    class DropLayers(Pass):
        """Return the input."""

        name = "drop-layers"

        def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
            budget.take()
            (x,) = gm.graph.find_nodes(op="placeholder")
            gm.graph.output_node().args = ((x,),)
            return PassResult(("all dropped",))

    gm = tied()
    PassManager([DropLayers()], verify=True).run(gm)
    assert sorted(gm.state_dict()) == ["never.bias", "never.weight"]
    assert not hasattr(gm, "first")  # an empty container has nothing to say
    assert torch.equal(gm(torch.ones(2, 4)), torch.ones(2, 4))


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_max_rewrites_keeps_the_first_ones(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", str(limit))
    gm = tied()
    (_, first), (_, second) = PassManager([ReluToSigmoid(), DropScale()], verify=True).run(gm)
    lines = ("relu is a sigmoid", "relu_1 is a sigmoid", "mul dropped")
    assert first.changes + second.changes == lines[:limit]
    refused = first.refusals + second.refusals
    assert [refusal.node for refusal in refused] == ["relu", "relu_1", "mul"][limit:]
    assert {refusal.reason for refusal in refused} <= {f"LOWRANK_FX_MAX_REWRITES={limit} is used up"}


def test_bad_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "many")
    with pytest.raises(OptionError, match="LOWRANK_FX_MAX_REWRITES='many'"):
        PassManager([]).run(tied())


def test_dump_writes_a_file_per_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "graphs"
    monkeypatch.setenv("LOWRANK_FX_DUMP", str(folder))
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "2")
    PassManager([ReluToSigmoid(), DropScale()]).run(tied())
    assert sorted(path.name for path in folder.iterdir()) == ["01_relu-to-sigmoid.txt", "02_drop-scale.txt"]
    first = (folder / "01_relu-to-sigmoid.txt").read_text("utf-8")
    assert first.startswith("pass 1: relu-to-sigmoid\nrewrites: 2\n  relu is a sigmoid\n")
    assert "%sigmoid : [num_users=1] = call_function[target=torch.ops.aten.sigmoid.default]" in first
    assert "torch.ops.aten.sigmoid.default(linear)" in first
    second = (folder / "02_drop-scale.txt").read_text("utf-8")
    assert "refusals: 1\n  mul: LOWRANK_FX_MAX_REWRITES=2 is used up\n" in second


def test_without_dump_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWRANK_FX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    PassManager([ReluToSigmoid()]).run(tied())
    assert list(tmp_path.iterdir()) == []


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    with pytest.raises(PassError) as told:
        PassManager([ReluToSigmoid(), DropScale(), Failing()]).run(tied())
    assert str(told.value) == (
        "pass 'failing' failed (passes that ran before it: relu-to-sigmoid, drop-scale): KeyError: 'no such thing'"
    )
    assert isinstance(told.value.__cause__, KeyError)
    with pytest.raises(PassError, match=r"passes that ran before it: none\)"):
        PassManager([Failing()]).run(tied())


class WrongMeta(Pass):
    """Say that a relu has another dtype."""

    name = "wrong-meta"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        budget.take()
        node = next(node for node in gm.graph.nodes if node.target is aten.relu.default)
        node.meta["val"] = node.meta["val"].to(torch.float16)
        return PassResult(("one lie",))


def test_check_decides_whether_the_verifier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_CHECK", "0")
    assert PassManager([WrongMeta()]).run(tied())[0][1].rewrites == 1
    monkeypatch.setenv("LOWRANK_FX_CHECK", "1")
    with pytest.raises(PassError, match=r"(?s)pass 'wrong-meta' failed .* 'relu' .* says float16.* gives float32"):
        PassManager([WrongMeta()]).run(tied())
    assert PassManager([WrongMeta()], verify=False).run(tied())[0][1].rewrites == 1


def test_a_pass_must_ask_the_budget_for_each_change() -> None:
    class Greedy(Pass):
        """Change without asking."""

        name = "greedy"

        def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
            return PassResult(("something",))

    with pytest.raises(PassError, match="took 0 rewrites from the budget and reports 1"):
        PassManager([Greedy()]).run(tied())


@pytest.mark.parametrize("what", ["node", "parameter"])
def test_a_pass_must_report_what_it_changed(what: str) -> None:
    class Silent(Pass):
        """Change and say nothing."""

        name = "silent"

        def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
            if what == "node":
                for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
                    node.target = aten.sigmoid.default
            else:
                replace_parameter(gm, "first.bias", torch.zeros(4), trainable=True)
            return PassResult()

    with pytest.raises(PassError, match="reports no change, but the graph is another one"):
        PassManager([Silent()], verify=True).run(tied())


def test_the_manager_removes_dead_code_but_keeps_modules_that_were_put_in() -> None:
    gm = tied()
    assert "never_weight" in graph_text(gm)
    gm.add_module("watch", nn.Identity())
    relu = next(node for node in gm.graph.nodes if node.target is aten.relu.default)
    with gm.graph.inserting_after(relu):
        gm.graph.call_module("watch", (relu,))
    clean(gm)
    assert "never_weight" not in graph_text(gm)
    assert "%watch = module[watch](%relu)" in graph_text(gm)
    assert unused_names(gm) == {"never.weight", "never.bias"}


def test_parameters_are_registered_with_their_modules() -> None:
    gm = tied()
    made = set_parameter(gm, "first.pair.factor_in", torch.ones(2, 4), trainable=True)
    assert get_parameter(gm, "first.pair.factor_in") is made
    assert made.requires_grad
    assert not set_parameter(gm, "first.pair.factor_out", torch.ones(4, 2), trainable=False).requires_grad
    buffer = set_buffer(gm, "first.pair.index", torch.arange(3))
    assert dict(gm.named_buffers())["first.pair.index"] is buffer
    assert torch.equal(gm.state_dict()["first.pair.index"], torch.arange(3))
    with pytest.raises(PassError, match=r"'first.weight' cannot be registered: the name is taken"):
        set_parameter(gm, "first.weight", torch.ones(1), trainable=False)
    with pytest.raises(PassError, match=r"'first.weight.deeper' cannot be registered: 'first.weight' is a Parameter"):
        set_parameter(gm, "first.weight.deeper", torch.ones(1), trainable=False)
    with pytest.raises(PassError, match=r"'first.nothing' does not exist .* 'nothing' is missing"):
        get_parameter(gm, "first.nothing")
    with pytest.raises(PassError, match=r"'first' is a Module, not a parameter or buffer"):
        get_parameter(gm, "first")


def test_deleting_takes_the_containers_it_empties() -> None:
    gm = tied()
    set_parameter(gm, "a.b.c", torch.ones(1), trainable=False)
    set_parameter(gm, "a.d", torch.ones(1), trainable=False)
    delete_attr(gm, "a.b.c")
    assert not hasattr(gm.a, "b")
    assert hasattr(gm.a, "d")
    with pytest.raises(PassError, match=r"'a.b' does not exist"):
        delete_attr(gm, "a.b.c")


def test_free_names() -> None:
    gm = tied()
    assert free_name(gm, "first.bias_folded") == "first.bias_folded"
    assert free_name(gm, "second.bias") == "second.bias"
    assert free_name(gm, "first.bias") == "first.bias_1"
    set_parameter(gm, "first.bias_1", torch.ones(1), trainable=False)
    assert free_name(gm, "first.bias") == "first.bias_2"
    assert free_name(gm, "first") == "first_1"


def test_identity_sees_through_names() -> None:
    gm = tied()
    clean(gm)
    assert names_of_tensor(gm, gm.first.weight) == ("first.weight", "second.weight")
    assert [node.name for node in users_of_attr(gm, "first.weight")] == ["linear", "linear_1"]
    assert users_of_attr(gm, "second.weight") == users_of_attr(gm, "first.weight")
    assert users_of_attr(gm, "never.weight") == ()
    (reader,) = (node for node in gm.graph.find_nodes(op="get_attr") if "weight" in node.name)
    assert attr_tensor(gm, reader) is gm.first.weight
    with pytest.raises(PassError, match="'relu' is a call_function, not a get_attr"):
        attr_tensor(gm, next(node for node in gm.graph.nodes if node.name == "relu"))


def test_replacing_a_parameter_leaves_the_users_model_alone() -> None:
    model = Tied()
    before = model.first.bias.detach().clone()
    gm = capture(model, torch.ones(3, 4))
    assert gm.first.bias is model.first.bias
    replace_parameter(gm, "first.bias", torch.zeros(4, dtype=torch.float64), trainable=False)
    assert torch.equal(model.first.bias, before)
    assert gm.first.bias.dtype == torch.float64
    (reader,) = (node for node in gm.graph.nodes if node.target == "first.bias")
    assert reader.meta["val"].dtype == torch.float64


def test_new_nodes_carry_true_metas_and_their_origin() -> None:
    gm = tied()
    clean(gm)
    linear = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
    set_parameter(gm, "first.factor", torch.ones(7, 4), trainable=True)
    factor = parameter_node(gm, "first.factor", linear)
    new = call_node(gm, aten.linear.default, (linear.args[0], factor), like=linear, before=linear)
    assert tuple(factor.meta["val"].shape) == (7, 4)
    assert isinstance(new.meta["val"].shape[0], torch.SymInt)
    assert new.meta["val"].shape[1] == 7
    assert str(new.meta["val"].shape[0]) == str(linear.meta["val"].shape[0])
    assert [path for path, _ in new.meta["nn_module_stack"].values()][-1] == "first"
    output = gm.graph.output_node()
    old_user = next(iter(linear.users))
    with gm.graph.inserting_before(output):
        output.args = ((new,),)
    assert old_user is not output
    clean(gm)
    check_graph(gm)
    assert gm(torch.ones(5, 4)).shape == (5, 7)
    with pytest.raises(PassError, match=r"aten.linear.default does not run on the metas of its arguments"):
        call_node(gm, aten.linear.default, (factor, factor, factor, factor), like=new, before=new)


def test_results_are_values() -> None:
    assert PassResult() == PassResult((), ())
    assert Refusal("conv1", "shared") == Refusal("conv1", "shared")
    budget = RewriteBudget(1)
    assert [budget.take(), budget.take(), budget.taken] == [True, False, 1]
    assert all(RewriteBudget().take() for _ in range(3))


# The public helpers for authors of passes -----------------------------------------------------------------------------


class Sabotage(Pass):
    """Do one thing that a pass must not do."""

    name = "sabotage"

    def __init__(self, what: str) -> None:
        self.what = what

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        budget.take()
        mul = next(node for node in gm.graph.nodes if node.target is aten.mul.Tensor)
        if self.what == "numbers":
            mul.args = (mul.args[0], 2.0)
        elif self.what == "write":
            with torch.no_grad():
                gm.get_parameter("never.bias").add_(1.0)
        elif self.what == "input":
            (x,) = gm.graph.find_nodes(op="placeholder")
            x.name = "renamed"
        elif self.what == "dtype":
            new = call_node(gm, aten.to.dtype, (mul, torch.float64), like=mul, before=gm.graph.output_node())
            mul.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        elif self.what == "shape":
            new = call_node(gm, aten.unsqueeze.default, (mul, 0), like=mul, before=gm.graph.output_node())
            mul.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return PassResult((self.what,))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("numbers", r"output differs by \d.* \(relative L2\), more than 1e-06"),
        ("write", r"sabotage wrote into never\.bias, which belongs to the model"),
        ("input", r"changed the inputs from \['x'\] to \['renamed'\]"),
        ("dtype", r"output is torch\.float64 \[3, 4\], not torch\.float32 \[3, 4\]"),
        ("shape", r"output is torch\.float32 \[1, 3, 4\], not torch\.float32 \[3, 4\]"),
    ],
)
def test_run_pass_catches(what: str, message: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match=message):
        run_pass(tied(), Sabotage(what), (x,), tolerance=1e-6)


def test_run_pass_returns_what_the_pass_said() -> None:
    said = PassResult(("nothing",))
    assert run_pass(tied(), Sabotage("nothing"), (torch.ones(3, 4),), tolerance=0.0) == said
    program = torch.export.export(Tied().eval(), (), {"x": torch.ones(3, 4)}, strict=False)
    by_name = program.module(check_guards=False)
    assert isinstance(by_name, GraphModule)
    assert run_pass(by_name, Sabotage("nothing"), {"x": torch.ones(3, 4)}, tolerance=0.0) == said


def test_assert_equivalent_looks_into_nested_outputs() -> None:
    def model(first: float, second: float, number: int = 3) -> Any:
        return lambda x: {"a": x * first, "b": [x > second, number, x.new_full((2,), float("inf"))]}

    x = torch.tensor([1.0, 2.0, 3.0])
    assert_equivalent(model(1, 2), model(1, 2), (x,), rtol=0.0)
    assert_equivalent(model(1 + 1e-6, 2), model(1, 2), (x,), rtol=1e-5)
    with pytest.raises(AssertionError, match=r"output\['a'\] differs by 0\.5 "):
        assert_equivalent(model(1.5, 2), model(1, 2), (x,))
    with pytest.raises(AssertionError, match=r"output\['b'\]\[0\] is not equal: 1 entries differ"):
        assert_equivalent(model(1, 1), model(1, 2), (x,))
    with pytest.raises(AssertionError, match=r"output\['b'\]\[1\] is 4, not 3"):
        assert_equivalent(model(1, 2, 4), model(1, 2), (x,))
    with pytest.raises(AssertionError, match="has the structure"):
        assert_equivalent(lambda x: [x], lambda x: (x,), (x,))
    with pytest.raises(AssertionError, match=r"output differs by (nan|inf)"):
        assert_equivalent(lambda x: x * float("nan"), lambda x: x, (x,))


def test_graph_text() -> None:
    gm = tied()
    clean(gm)
    assert graph_text(gm).splitlines()[-6:] == [
        "%linear = linear(%x, %second_weight, %first_bias)",
        "%relu = relu(%linear)",
        "%linear_1 = linear(%relu, %second_weight)",
        "%relu_1 = relu(%linear_1)",
        "%mul = mul.Tensor(%relu_1, %scale)",
        "return (%mul,)",
    ]
