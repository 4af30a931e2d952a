"""Capturing a model: what the graph keeps, what the model keeps, which calls are refused."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_fx.batches import Call
from lowrank_fx.capture import Captured, capture, unwrap
from lowrank_fx.errors import CallError, CaptureError
from lowrank_fx.testing import assert_equivalent, graph_text

# Graph and model run the same ATen operators on the same numbers; only fused attention may sum in another order.
ROUNDING = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    return capture(model, Call(args, kwargs))


def run(result: Captured, *args: Any, **kwargs: Any) -> Any:
    """Call a captured model the way the user calls the original."""
    args, kwargs = result.calls.bind(args, kwargs)
    with torch.no_grad():
        return result.graph_module(*args, **kwargs)


class Function(nn.Module):
    """A module around a function of ``(module, input)``, with a layer to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# A transformers model, called by keywords -----------------------------------------------------------------------------


def sentences(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (batch, length), generator=generator(seed))
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )  # fmt: skip
        model = BertModel(config)
        model.train(False)
    return model


@pytest.fixture(scope="module")
def bert_graph(bert: nn.Module) -> Captured:
    """Captured in train mode, one module apart; the check of modes is here because every test shares the capture."""
    bert.train()
    bert.get_submodule("encoder.layer.1").eval()
    modes = {name: module.training for name, module in bert.named_modules()}
    result = captured(bert, **sentences(4, 4))
    assert {name: module.training for name, module in bert.named_modules()} == modes
    bert.eval()
    return result


@pytest.mark.parametrize("size", [(1, 5), (2, 2), (3, 9), (5, 32), (4, 1)])
def test_output_class_and_numbers_at_other_sizes(bert: nn.Module, bert_graph: Captured, size: tuple[int, int]) -> None:
    batch = sentences(*size, seed=1)
    assert_equivalent(lambda **kwargs: run(bert_graph, **kwargs), bert, batch, rtol=ROUNDING)
    assert type(run(bert_graph, **batch)) is type(bert(**batch))
    assert run(bert_graph, **batch).last_hidden_state.shape == (*size, 16)


def test_names_and_parameters_are_the_models_own(bert: nn.Module, bert_graph: Captured) -> None:
    own = dict(bert.named_parameters())
    graph = dict(bert_graph.graph_module.named_parameters())
    assert set(graph) == set(own)
    assert all(graph[name] is own[name] for name in own)
    assert not any(module in set(bert.modules()) for module in bert_graph.graph_module.modules())
    assert bert_graph.notes == ()


def test_the_signature_is_the_models_own(bert: nn.Module, bert_graph: Captured) -> None:
    assert bert_graph.calls.signature == inspect.signature(bert.forward)


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda ids, mask: ((ids, mask), {}),
        lambda ids, mask: ((ids,), {"attention_mask": mask}),
        lambda ids, mask: ((), {"attention_mask": mask, "input_ids": ids}),
        lambda ids, mask: ((ids, mask, None), {"inputs_embeds": None}),
    ],
)
def test_the_same_call_in_another_form(bert: nn.Module, bert_graph: Captured, rearranged: Callable[..., Any]) -> None:
    batch = sentences(3, 6, seed=2)
    args, kwargs = rearranged(batch["input_ids"], batch["attention_mask"])
    actual = run(bert_graph, *args, **kwargs)
    torch.testing.assert_close(actual.pooler_output, bert(**batch).pooler_output, rtol=0, atol=ROUNDING)


def test_missing_and_extra_arguments_are_named(bert_graph: Captured) -> None:
    batch = sentences(3, 6)
    with pytest.raises(
        CallError, match="attention_mask is missing; the model was captured with input_ids, attention_mask"
    ):
        run(bert_graph, input_ids=batch["input_ids"])
    with pytest.raises(CallError, match=r"token_type_ids=a tensor of shape \(3, 6\) was not given when .* captured"):
        run(bert_graph, **batch, token_type_ids=torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(CallError, match="input_ids"):
        run(bert_graph)


def test_another_dtype_of_the_mask_is_refused(bert_graph: Captured) -> None:
    # transformers branches on it in Python, so the graph holds for one kind only.
    batch = sentences(3, 6)
    with pytest.raises(CallError, match=r"is torch\.bool, captured with torch\.int64"):
        run(bert_graph, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].bool())


# What the graph keeps -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and the head that shares its weight, under the head's name and the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.embedding(ids)))
        return out


def test_ties_are_kept() -> None:
    model = Tied()
    result = captured(model, torch.arange(6).reshape(2, 3))
    readers = [node for node in result.graph_module.graph.nodes if node.op == "get_attr"]
    read = [result.graph_module.get_parameter(str(node.target)) for node in readers]
    assert sum(parameter is model.embedding.weight for parameter in read) >= 1
    assert {id(parameter) for parameter in read} == {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    ids = torch.arange(8).reshape(1, 8)
    assert_equivalent(lambda x: run(result, x), model, (ids,), rtol=ROUNDING)


def test_a_model_in_train_mode_is_captured_as_in_eval() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    assert model[2].running_mean is not None
    before = copy.deepcopy(model.state_dict())
    result = captured(model, rows(6, 4))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_equivalent(lambda x: run(result, x), copy.deepcopy(model).eval(), (rows(3, 4),), rtol=ROUNDING)


def test_numbers_of_the_captured_model_follow_its_parameters() -> None:
    model = nn.Linear(4, 4)
    result = captured(model, rows(2, 4))
    with torch.no_grad():
        model.weight.zero_()
    assert model.bias is not None
    assert torch.equal(run(result, rows(5, 4)), model.bias.expand(5, 4))


def test_gradients_reach_the_parameters() -> None:
    model = nn.Linear(4, 4)
    result = captured(model, rows(2, 4))
    result.graph_module(rows(3, 4)).sum().backward()
    assert model.bias is not None
    torch.testing.assert_close(model.bias.grad, torch.full((4,), 3.0), rtol=0, atol=0)


# What the model keeps -------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer and in a plain attribute, and keeps a running mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.average.lerp_(x.mean(0), 0.1)
        out: Tensor = self.layer(x) * self.count + self.average
        return out

    count: Tensor
    average: Tensor


def test_buffers_are_unchanged_by_capture_and_by_the_graph() -> None:
    model = Counting()
    result = captured(model, rows(6, 4))
    assert model.calls == 0
    expected = copy.deepcopy(model)
    for seed in range(3):
        assert_equivalent(lambda x: run(result, x), expected, (rows(3, 4, seed=seed),), rtol=ROUNDING)
    assert model.count.item() == 0
    assert not model.average.any()


def test_flags_and_grads_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    result = captured(model, rows(6, 4))
    wanted = {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert {name: p.requires_grad for name, p in result.graph_module.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_global_random_state_is_untouched() -> None:
    def noisy(module: Function, x: Tensor) -> Tensor:
        torch.manual_seed(7)  # what some models do
        out: Tensor = F.dropout(module.layer(x), 0.5, training=True) + torch.rand_like(x)
        return out

    model = Function(noisy).train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"]
    captured(model, rows(6, 4))
    torch.testing.assert_close(torch.get_rng_state(), before[0], rtol=0, atol=0)
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[2])


def with_hooks(model: nn.Module, fired: list[str]) -> nn.Module:
    """Every kind of hook a module can have."""
    layer = model.get_submodule("0")
    layer.register_forward_hook(lambda *_: fired.append("forward"))
    layer.register_forward_pre_hook(lambda *_: fired.append("pre"))
    layer.register_forward_hook(lambda *_: fired.append("with kwargs"), with_kwargs=True)
    layer.register_forward_pre_hook(lambda *_: fired.append("pre with kwargs"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: fired.append("always"), always_call=True)
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    model.register_forward_hook(lambda *_: fired.append("root"))
    return model


KINDS = {"forward", "pre", "with kwargs", "pre with kwargs", "always", "backward", "backward pre", "root"}


def hooks_of(module: nn.Module | Tensor) -> dict[str, list[Any]]:
    return {name: list(value.items()) for name, value in vars(module).items() if "hooks" in name}


def test_user_hooks_are_detached_restored_and_named() -> None:
    fired: list[str] = []
    model = with_hooks(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), fired)
    before = {name: hooks_of(module) for name, module in model.named_modules()}
    result = captured(model, rows(6, 4))
    assert fired == []
    assert result.notes == ("hooks on Sequential, 0 were detached for capture and are not part of the optimized model",)
    assert {name: hooks_of(module) for name, module in model.named_modules()} == before
    run(result, rows(3, 4))
    assert fired == []
    model(rows(3, 4).requires_grad_()).sum().backward()
    assert set(fired) == KINDS


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_hooks_of_torch_are_mathematics_and_stay(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many checkpoints
        model = nn.Sequential(getattr(nn.utils, kind)(nn.Linear(4, 5))).eval()
    expected = model(rows(3, 4))
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("user's"))
    before = model[0].weight, hooks_of(model[0])
    result = captured(model, rows(6, 4))
    assert fired == []
    assert model[0].weight is before[0]
    assert hooks_of(model[0]) == before[1]
    assert "hooks on 0 were detached" in result.notes[0]
    torch.testing.assert_close(run(result, rows(3, 4)), expected, rtol=0, atol=ROUNDING)
    stored = {name for name, _ in result.graph_module.named_parameters()}
    assert stored == {name for name, _ in model.named_parameters()}


def test_parametrizations_are_captured() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)))
    result = captured(model, rows(6, 4))
    assert_equivalent(lambda x: run(result, x), model, (rows(3, 4),), rtol=ROUNDING)


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured_batch", [1, 2, 5])
def test_any_batch_from_any_batch(captured_batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    result = captured(model, rows(captured_batch, 3, 5, 5))
    for batch in (1, 2, 3, 8):
        assert_equivalent(lambda x: run(result, x), model, (rows(batch, 3, 5, 5),), rtol=ROUNDING)


def test_equal_sizes_at_capture_stay_independent() -> None:
    def times(module: Function, x: Tensor) -> Tensor:
        out: Tensor = module.layer(x).transpose(0, 1)
        return out

    model = Function(times)
    result = captured(model, rows(4, 4, 4))
    for batch, length in ((2, 4), (4, 2), (1, 7), (7, 1)):
        assert_equivalent(lambda x: run(result, x), model, (rows(batch, length, 4),), rtol=ROUNDING)


def test_the_size_of_an_image_is_static() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    result = captured(model, rows(2, 3, 8, 8))
    with pytest.raises(CallError, match=r"inputs of shape \(2, 3, 9, 8\) break .*size\(\)\[2\] == 8"):
        run(result, rows(2, 3, 9, 8))
    with pytest.raises(CallError, match=r"input 0 has shape \(3, 8, 8\), captured with 4 dimensions"):
        run(result, rows(3, 8, 8))


def at_least_four(module: Function, x: Tensor) -> Any:
    return module.layer(x) * 2 if x.shape[0] >= 4 else module.layer(x)


def even(module: Function, x: Tensor) -> Any:
    return module.layer(x) * 2 if x.shape[0] % 2 == 0 else module.layer(x)


def fixed_batch(module: Function, x: Tensor) -> Any:
    return module.layer(x).reshape(6, 4)


def loop_over_rows(module: Function, x: Tensor) -> Any:
    return torch.stack([module.layer(x[row]) * row for row in range(x.shape[0])])


BRANCHES: dict[Callable[[Function, Tensor], Any], tuple[tuple[int, ...], tuple[int, ...]]] = {
    at_least_four: ((4, 5, 9), (1, 2, 3)),
    even: ((2, 4, 8), (1, 3, 7)),
    fixed_batch: ((6,), (1, 3, 7)),
    loop_over_rows: ((6,), (1, 3, 7)),
}


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_a_branch_on_shape_is_guarded_never_wrong(branch: Callable[[Function, Tensor], Any]) -> None:
    model = Function(branch)
    result = captured(model, rows(6, 4))
    right, wrong = BRANCHES[branch]
    for batch in right:
        assert_equivalent(lambda x: run(result, x), model, (rows(batch, 4),), rtol=ROUNDING)
    for batch in wrong:
        with pytest.raises(CallError, match=rf"inputs of shape \({batch}, 4\) break .*x\.size\(\)\[0\].*optimize"):
            run(result, rows(batch, 4))


def test_a_branch_on_dtype_is_never_wrong() -> None:
    def doubled(_: Function, x: Tensor) -> Tensor:
        return x * 2 if x.is_floating_point() else x + 1

    result = captured(Function(doubled), rows(6, 4))
    with pytest.raises(CallError, match=r"input 0 is torch\.int64, captured with torch\.float32"):
        run(result, torch.ones(6, 4, dtype=torch.int64))


# Constants and structure ----------------------------------------------------------------------------------------------


class Flags(nn.Module):
    """Arguments that become part of the graph."""

    def forward(self, x: Tensor, scale: float | None = 0.5, *, mode: str = "plus one", flag: bool = False) -> Tensor:
        out = x if scale is None else x * scale
        out = out + 1 if mode == "plus one" else out - 1
        return -out if flag else out


@pytest.fixture(scope="module")
def defaults() -> Captured:
    return captured(Flags(), rows(3, 4))


@pytest.fixture(scope="module")
def given() -> Captured:
    return captured(Flags(), rows(3, 4), 2.0, flag=True)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        # Built at run time, so that equality decides and not the identity of interned constants.
        ((), {}), ((float("0.5"),), {}), ((), {"scale": float("0.5")}), ((), {"mode": " ".join(("plus", "one"))}),
        ((), {"flag": False, "scale": float("0.5")}),
    ],
)  # fmt: skip
def test_a_default_given_explicitly_is_that_default(
    defaults: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = rows(5, 4)
    torch.testing.assert_close(run(defaults, x, *args, **kwargs), Flags()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": 2.0}, "argument scale=2.0 was not given"),
        ({"scale": None}, "argument scale=None was not given"),
        ({"scale": torch.tensor(0.5)}, r"argument scale=a tensor of shape \(\) was not given"),
        ({"mode": "minus"}, "argument mode='minus' was not given"),
        ({"flag": True}, "argument flag=True was not given"),
        ({"flags": True}, r"does not fit forward\(x.*'flags'"),
    ],
)
def test_another_value_than_the_default_is_refused(defaults: Captured, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        run(defaults, rows(5, 4), **kwargs)


def test_a_constant_that_was_given_must_be_given_again(given: Captured) -> None:
    x = rows(5, 4)
    expected = Flags()(x, 2.0, flag=True)
    torch.testing.assert_close(run(given, x, 2.0, flag=True), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(given, flag=True, scale=float("2"), x=x), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(given, x, 2.0, flag=True, mode="plus one"), expected, rtol=0, atol=0)
    with pytest.raises(CallError, match=r"is 3\.0, but the model was captured with 2\.0, which became part of"):
        run(given, x, 3.0, flag=True)
    with pytest.raises(CallError, match="is False, but the model was captured with True"):
        run(given, x, 2.0)
    with pytest.raises(CallError, match=r"is a tensor of shape \(\), but the model was captured with 2\.0"):
        run(given, x, torch.tensor(2.0), flag=True)
    with pytest.raises(CallError, match=r"input 0 was a tensor when the model was captured, now it is 1\.0"):
        run(given, 1.0, 2.0, flag=True)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: dict[str, list[Tensor]], *more: Tensor, extra: Tensor) -> dict[str, Any]:
            a, b = pair["both"]
            return {"sum": (a + b + more[0], [extra * 2]), "constant": 3}

    x, y = rows(4, 3), rows(4, 3, seed=1)
    result = captured(Nested(), {"both": [x, y]}, x, extra=y)
    batch = rows(7, 3)
    out = run(result, {"both": [batch, batch]}, batch, extra=batch)
    assert set(out) == {"sum", "constant"}
    assert out["constant"] == 3
    torch.testing.assert_close(out["sum"][0], 3 * batch)
    torch.testing.assert_close(out["sum"][1][0], 2 * batch)
    with pytest.raises(CallError, match="nested differently"):
        run(result, {"both": (batch, batch)}, batch, extra=batch)
    with pytest.raises(CallError, match=r"does not fit forward\(pair.*'other'"):
        run(result, {"both": [batch, batch]}, batch, extra=batch, other=batch)
    with pytest.raises(CallError, match=r"\*more\[1\]="):
        run(result, {"both": [batch, batch]}, batch, batch, extra=batch)


def test_arguments_that_only_kwargs_takes_are_dynamic_and_unread_ones_are_ignored() -> None:
    class Keywords(nn.Module):
        def forward(self, x: Tensor, **named: Tensor) -> Tensor:
            return x - named["extra"]

    model = Keywords()
    x, y = rows(4, 3), rows(4, 3, seed=1)
    result = captured(model, x, extra=y, label=torch.zeros(4))
    assert result.notes == ()
    assert result.calls.ignored == {"label"}
    assert "forward" not in model.__dict__
    x, y = rows(7, 3), rows(7, 3, seed=1)
    assert torch.equal(run(result, x, extra=y), x - y)
    assert torch.equal(run(result, x, extra=y, label=torch.ones(7)), x - y)
    with pytest.raises(CallError, match="argument other="):
        run(result, x, extra=y, other=y)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 - b

    x, y = rows(4, 3), rows(4, 3, seed=1)
    result = captured(Difference(), x, x)
    torch.testing.assert_close(run(result, x, y), x * 2 - y, rtol=0, atol=0)


# Models that cannot be captured ---------------------------------------------------------------------------------------


def branch_on_values(module: Function, x: Tensor) -> Any:
    return module.layer(x) if x.sum() > 0 else -x  # the line that the error names


def python_number(module: Function, x: Tensor) -> Any:
    return module.layer(x)[: int(x.sum().item())]  # the line that the error names


@pytest.mark.parametrize("function", [branch_on_values, python_number], ids=lambda function: function.__name__)
def test_control_flow_on_values_is_named_and_the_model_unharmed(function: Callable[..., Any]) -> None:
    model = Function(function).train()
    fired: list[str] = []
    model.layer.register_forward_hook(lambda *_: fired.append("user's"))
    before, state = hooks_of(model.layer), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    line = inspect.getsourcelines(function)[1] + 1
    with pytest.raises(CaptureError) as caught:
        captured(model, rows(6, 4))
    message = str(caught.value)
    assert f"could not capture Function at {Path(__file__)}:{line} (" in message
    assert "# the line that the error names" in message
    assert "move it out of forward, use torch.where or torch.cond" in message
    assert fired == []
    assert hooks_of(model.layer) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(type(p) is nn.Parameter and torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_a_mistake_in_the_model_is_named() -> None:
    def broken(module: Function, x: Tensor) -> Any:
        return module.layer(x).view(3, -1, 100)

    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ \(return module\.layer\(x\)\.view\(3, -1, 100\)\)"):
        captured(Function(broken), rows(6, 4))


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"model is function, not a torch\.nn\.Module"):
        captured(rows)  # type: ignore[arg-type]


def test_a_compiled_model_is_captured_inside() -> None:
    model = nn.Linear(4, 4)
    assert unwrap(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]
    result = captured(torch.compile(model, backend="eager"), rows(3, 4))  # type: ignore[arg-type]
    assert result.graph_module.get_parameter("weight") is model.weight
    assert graph_text(result.graph_module).splitlines()[-2:] == [
        "%linear = linear(%input_1, %weight, %bias)", "return (%linear,)",
    ]  # fmt: skip


class KeepsWhatItComputed(nn.Module):
    """Like timm's attention biases: computed once in eval mode and kept in a dictionary, per device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.ones(4, 6))
        self.bias_cache: dict[str, Tensor] = {}
        self.seen: list[list[int]] = [[]]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0].append(1)
        if "cpu" not in self.bias_cache:
            self.bias_cache["cpu"] = self.bias[[0, 2]].sum(0)
        return torch.relu(self.layer(x) + self.bias_cache["cpu"])


def test_what_forward_keeps_in_containers_is_not_left_in_the_model() -> None:
    model = KeepsWhatItComputed().eval()
    kept, seen = model.bias_cache, model.seen[0]
    captured = capture(model, Call((torch.ones(3, 6),), {}))
    assert model.bias_cache is kept
    assert kept == {}
    assert model.seen[0] is seen
    assert seen == []
    assert torch.equal(captured.graph_module(torch.ones(2, 6)), model(torch.ones(2, 6)))


def test_a_cache_that_is_filled_already_is_computed_in_the_graph() -> None:
    model = KeepsWhatItComputed().eval()
    expected = model(torch.ones(2, 6))
    before = model.bias_cache["cpu"]
    captured = capture(model, Call((torch.ones(3, 6),), {}))
    assert model.bias_cache["cpu"] is before
    assert "bias" in {str(node.target) for node in captured.graph_module.graph.find_nodes(op="get_attr")}
    assert torch.equal(captured.graph_module(torch.ones(2, 6)), expected)
