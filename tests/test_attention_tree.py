"""``nn.MultiheadAttention`` in the module tree: opened, it computes the same, and its projections are sites."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.attention import OpenAttention
from lowrank_fx.attention_parts import APART, PAIRED, WHOLE, Parts, close_attentions, open_attentions, watched
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture, plain_attention
from lowrank_fx.fingerprint import base_weights
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.modules import is_stand_in
from lowrank_fx.program import Program
from lowrank_fx.sites import Site
from lowrank_fx.tree_program import TreeProgram

ROUNDING = 1e-12
"""Of float64 outputs of size 1: the same products in another order (measured: 2e-15)."""


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(make: Any) -> Any:
    """A model in eval mode with random weights, biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def opened(module: nn.MultiheadAttention, parts: Parts) -> OpenAttention:
    made = copy.deepcopy(module)
    open_attentions(made, {"": parts})
    assert isinstance(made, OpenAttention)
    return made


def close(actual: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# What it computes -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "extra rows": {"add_bias_kv": True},
    "zeros": {"add_zero_attn": True, "bias": False},
    "separate": {"kdim": 12, "vdim": 10},
    "separate, no bias": {"kdim": 12, "vdim": 10, "bias": False, "add_bias_kv": True},
}


def masks(batch: int, target: int, source: int) -> dict[str, dict[str, Any]]:
    blocked = rows(target, source, seed=5) > 0.8
    each = rows(batch * 2, target, source, seed=6) > 0.8
    blocked[..., 0] = each[..., 0] = False  # a query without any key has no weights
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[0, 2:] = True
    causal = torch.triu(torch.full((target, source), float("-inf"), dtype=torch.float64), 1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": rows(batch, source, seed=7)},
        "2-D": {"attn_mask": blocked},
        "3-D": {"attn_mask": each},
        "float": {"attn_mask": rows(target, source, seed=8)},
        "both": {"attn_mask": blocked, "key_padding_mask": padding},
        "both, 3-D": {"attn_mask": each, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, padded": {
            "attn_mask": causal, "is_causal": True, "key_padding_mask": rows(batch, source, seed=7),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_computes_what_torch_does(name: str, batch_first: bool) -> None:
    options = OPTIONS[name]
    module = seeded(lambda: nn.MultiheadAttention(16, 2, batch_first=batch_first, dtype=torch.float64, **options))
    made = opened(module, APART if "kdim" in options else PAIRED)
    query, key, value = rows(3, 4, 16), rows(3, 5, options.get("kdim", 16), seed=1), rows(3, 5, 16, seed=2)
    if not batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    value = value[..., : options["vdim"]] if "vdim" in options else key
    for mask, averaged in itertools.product(masks(3, 4, 5), (None, True, False)):
        call = {**masks(3, 4, 5)[mask], "need_weights": averaged is not None, "average_attn_weights": bool(averaged)}
        expected, weights = module(query, key, value, **call)
        output, actual = made(query, key, value, **call)
        close(output, expected)
        close(actual, weights)


@pytest.mark.parametrize("parts", [WHOLE, PAIRED, APART])
@pytest.mark.parametrize("bias", [True, False])
def test_any_division_serves_any_call(parts: Parts, bias: bool) -> None:
    module = seeded(lambda: nn.MultiheadAttention(16, 4, bias=bias, dtype=torch.float64, batch_first=True))
    made = opened(module, parts)
    x, y, z = rows(2, 5, 16), rows(2, 5, 16, seed=1), rows(2, 5, 16, seed=2)
    for inputs in ((x, x, x), (x, y, y), (x, y, z), (x, x, z), (x, y, x)):
        close(made(*inputs)[0], module(*inputs)[0])
    close(made(x[0], y[0], z[0])[0], module(x[0], y[0], z[0])[0])  # without a batch
    close(made(x[0], x[0], x[0], torch.arange(5) > 2)[1], module(x[0], x[0], x[0], torch.arange(5) > 2)[1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_is_torch_s(need_weights: bool) -> None:
    module = seeded(lambda: nn.MultiheadAttention(16, 2, dropout=0.5, dtype=torch.float64)).train()
    made = opened(module, WHOLE)
    assert made.training
    x = rows(5, 3, 16)
    found = []
    for each in (module, made):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            found.append(each(x, x, x, need_weights=need_weights)[0])
    close(found[1], found[0])
    close(made.eval()(x, x, x)[0], module.eval()(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module = seeded(lambda: nn.MultiheadAttention(16, 2, dtype=dtype, batch_first=True))
    made = opened(module, WHOLE)
    x = rows(3, 4, 16, dtype=torch.float32).to(dtype)
    padding = torch.arange(4)[None] >= torch.tensor([[2], [4], [3]])
    with plain_attention(), torch.no_grad():
        expected = module.double()(x.double(), x.double(), x.double(), padding, need_weights=False)[0]
        actual = made(x, x, x, padding, need_weights=False)[0]
    assert actual.dtype == dtype
    close(actual.double(), expected, 16 * torch.finfo(dtype).eps)  # four products of numbers of size 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_sequences_of_differing_lengths() -> None:
    module = seeded(lambda: nn.MultiheadAttention(16, 2, dtype=torch.float64, batch_first=True))
    made = opened(module, WHOLE)
    nested = torch.nested.nested_tensor([rows(3, 16), rows(5, 16, seed=1)])
    with torch.no_grad():
        expected, actual = (each(nested, nested, nested, need_weights=False)[0] for each in (module, made))
    for ours, theirs in zip(actual.unbind(), expected.unbind(), strict=True):
        close(ours, theirs)


def test_wrong_calls_are_refused() -> None:
    made = opened(nn.MultiheadAttention(16, 2), WHOLE)
    x = rows(4, 3, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no attn_mask"):
        made(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask is \(1, 4\), and should be \(4, 4\)"):
        made(x, x, x, attn_mask=torch.zeros(1, 4))
    with pytest.raises(AssertionError, match="2-D"):
        made(x, x, x, attn_mask=torch.zeros(4))


# Opening and closing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("parts", [WHOLE, PAIRED, APART])
def test_closed_again_it_is_what_it_was(name: str, parts: Parts) -> None:
    class Own(nn.MultiheadAttention):
        """A class of the user's own that leaves forward alone."""

    module = seeded(lambda: Own(16, 2, **OPTIONS[name])).requires_grad_(False)
    made = opened(module, parts)
    assert type(made).__name__ == "OpenOwn"
    assert isinstance(made, Own)
    for leaf in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
        ours, theirs = getattr(made, leaf), getattr(module, leaf)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), "readers get what was divided"
    made = copy.deepcopy(made)
    close_attentions(made)
    assert type(made) is Own
    assert type(made.out_proj) is type(module.out_proj)
    assert vars(made).keys() == vars(module).keys()
    assert list(made._modules) == list(module._modules)
    assert list(made.state_dict()) == list(module.state_dict())
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in made.state_dict().items())
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_what_is_divided_shares_the_user_s_memory() -> None:
    module = nn.MultiheadAttention(16, 2)
    tree = nn.ModuleDict({"one": module})
    program = TreeProgram.from_model(tree, known={"one.in_proj_weight_1"})
    part = program.module.get_parameter("one.in_proj_weight_1")
    assert part.data_ptr() == module.in_proj_weight[16:].data_ptr()
    assert program.cleanup == tuple(
        f"one.in_proj_{leaf}_{index} computed from one.in_proj_{leaf}"
        for leaf in ("weight", "bias")
        for index in (0, 1)
    )
    assert program.params() == sum(parameter.numel() for parameter in module.parameters())


class Twice(nn.Module):
    """Attention that is called in two ways, and one that is called never."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.never = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.attn(x, x, x)[0] + self.attn(query=x, key=y, value=y)[0]
        return result


def test_one_called_in_two_ways_gets_the_finer_parts_and_one_never_called_stays_closed() -> None:
    model = Twice().eval()
    x, y = rows(4, 3, 16, dtype=torch.float32), rows(5, 3, 16, seed=1, dtype=torch.float32)
    with watched(model) as parts:
        model(x, y)
    assert parts == {"attn": PAIRED}
    assert not any(module._forward_pre_hooks for module in model.modules())
    program = TreeProgram.from_model(model, example=Call((x, y), {}))
    table = program.find_sites()
    assert [site.name for site in table.sites] == ["attn.in_proj_weight_0", "attn.in_proj_weight_1", "attn.out_proj"]
    reasons = {entry.name: entry.reason for entry in table.left_alone}
    assert list(reasons) == ["never.in_proj_weight", "never.out_proj"]
    assert all("the first batch" in reason for reason in reasons.values())
    (output,) = program.run(Call((x, y), {}))
    close(output, model(x, y), 1e-6)  # float32


def test_what_cannot_be_opened_says_why() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    computed, other, exchanged = (nn.MultiheadAttention(16, 2) for _ in range(3))
    nn.utils.parametrizations.weight_norm(computed, "in_proj_weight")
    other.out_proj = nn.Bilinear(16, 16, 16)  # type: ignore[assignment]
    exchanged.forward = exchanged.forward  # type: ignore[method-assign]
    tree = nn.ModuleDict({"own": Own(16, 2), "computed": computed, "other": other, "exchanged": exchanged})
    known = {f"{name}.in_proj_weight" for name in tree}
    reasons = {entry.name: entry.reason for entry in TreeProgram.from_model(tree, known=known).find_sites().left_alone}
    assert "Own computes attention in a way of its own" in reasons["own.in_proj_weight"]
    assert "out_proj of this nn.MultiheadAttention is a Bilinear" in reasons["other.in_proj_weight"]
    assert "a way of its own" in reasons["exchanged.in_proj_weight"]
    assert "whose weights are computed" in reasons["computed.out_proj"]


def test_ties_between_attentions() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
            self.two.in_proj_weight = self.one.in_proj_weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.two(self.one(x, y, y)[0], y, y)[0]
            return result

    model = seeded(Tied)
    call = Call((rows(4, 3, 16, dtype=torch.float32), rows(5, 3, 16, seed=1, dtype=torch.float32)), {})
    program = TreeProgram.from_model(model, example=call)
    first, *_ = program.find_sites().sites
    assert [call.node for call in first.calls] == ["one.in_proj_0", "two.in_proj_0"]
    chosen = {first.name: (first, factors_for(program, first))}
    made = program.factorize(chosen, clone=True)
    close(made.run(call)[0], program.exchanged(chosen)(call)[0], 0.0)
    folded = made.fold({first.name: first})
    assert folded.module.get_parameter("one.in_proj_weight") is folded.module.get_parameter("two.in_proj_weight")
    close(folded.run(call)[0], made.run(call)[0], 1e-5)  # float32


# Both ways of capture -------------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)


def transformer() -> nn.Module:
    return nn.Transformer(16, 2, 1, 1, 32, batch_first=True, dropout=0.0)


MODELS = {"encoder": (encoder, 1), "transformer": (transformer, 2)}


def batches(count: int, inputs: int) -> list[tuple[Tensor, ...]]:
    """Rows with a spectrum that falls off, so that ranks differ in what they cost."""
    scale = torch.linspace(1.5, 0.1, 16)
    shapes = [(8, 6, 16), (8, 5, 16)][:inputs]
    return [
        tuple(rows(*shape, seed=10 * index + place, dtype=torch.float32) * scale for place, shape in enumerate(shapes))
        for index in range(count)
    ]


def factors_for(program: Program, site: Site, rank: int = 4) -> Factors:
    matrix = site.matrix(program.weight(site)).double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    shift = torch.linspace(-0.1, 0.1, site.out_features, dtype=torch.float64) if site.centered else None
    return Factors((s[:rank, None] * vh[:rank]).float(), u[:, :rank].float(), shift)


def both(name: str) -> tuple[nn.Module, Call, GraphProgram, TreeProgram]:
    make, inputs = MODELS[name]
    model = seeded(make)
    call = Call(batches(1, inputs)[0], {})
    return model, call, GraphProgram.from_capture(capture(model, call)), TreeProgram.from_model(model, example=call)


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_find_the_same_sites(name: str) -> None:
    model, call, graph, tree = both(name)
    before = base_weights(model)
    tables = graph.find_sites(), tree.find_sites()
    found = [
        [(s.name, s.weight, s.kind, s.shape, s.out_features, s.in_features, s.biases, s.centered) for s in table.sites]
        for table in tables
    ]
    assert found[1] == found[0]
    assert tables[1].left_alone == tables[0].left_alone == ()
    assert dict(graph.module.named_parameters()).keys() == dict(tree.module.named_parameters()).keys()
    assert graph.params() == tree.params()
    assert graph.count_flops(call) == tree.count_flops(call)
    assert base_weights(model) == before
    assert not any(isinstance(module, OpenAttention) for module in model.modules())


class Collector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gram = torch.zeros(0)
        self.count = 0

    def forward(self, activation: Tensor) -> None:
        flat = activation.detach().reshape(-1, activation.shape[-1]).double()
        self.gram, self.count = flat.mT @ flat, len(flat)


@pytest.mark.parametrize("name", MODELS)
def test_observers_see_the_same_rows(name: str) -> None:
    _, call, graph, tree = both(name)
    seen = []
    for program in (graph, tree):
        table = program.find_sites()
        observers = {tap: Collector() for tap in table.taps}
        with torch.no_grad():
            program.observed(table, observers)(call)
        seen.append({site.name: observers[site.calls[0].tap] for site in table.sites})
    for site in seen[0]:
        assert seen[0][site].count == seen[1][site].count
        close(seen[1][site].gram, seen[0][site].gram, 1e-4)  # sums of 48 float32 products


@pytest.mark.parametrize("name", MODELS)
def test_factored_and_folded_outputs_are_equal_across_ways(name: str) -> None:
    _, call, graph, tree = both(name)
    outputs, states = [], []
    for program in (graph, tree):
        sites = program.find_sites().sites
        chosen = {site.name: (site, factors_for(program, site)) for site in sites if "linear2" not in site.name}
        made = program.factorize(chosen, clone=True)
        folded = made.fold({key: site for key, (site, _) in chosen.items()})
        with torch.no_grad():
            nodes = [site.calls[0].node for site in sites]
            whole, values = made.probed(nodes)(call)
            outputs.append((made.run(call)[0], program.exchanged(chosen)(call)[0], folded.run(call)[0], whole[0]))
        assert values.keys() == set(nodes)
        states.append({key: tuple(value.shape) for key, value in made.module.state_dict().items()})
    for each in outputs:
        for output in each:
            close(output, outputs[0][0], 1e-5)  # float32
    assert states[1] == states[0]
    attentions = [module for module in folded.module.modules() if isinstance(module, nn.MultiheadAttention)]
    assert attentions
    assert all(type(module) is nn.MultiheadAttention for module in attentions)
    assert folded.module.state_dict().keys() == seeded(MODELS[name][0]).state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_give_the_same_plan(name: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model = seeded(make)
    before = base_weights(model)
    loader = batches(6, inputs)
    options: dict[str, Any] = {"target": Keep(params=0.6), "compile": False, "progress": False}
    made = {way: lowrank_fx.optimize(model, loader, capture=way, **options) for way in ("export", "modules")}
    assert base_weights(model) == before
    plans = {way: each.plan for way, each in made.items()}
    ranks = {
        way: [(s.name, s.weight, s.form, s.rank, s.params, s.flops) for s in plan.sites] for way, plan in plans.items()
    }
    assert ranks["modules"] == ranks["export"]
    assert any("in_proj" in site.name for site in plans["modules"].factored)
    assert plans["modules"].totals == plans["export"].totals
    assert plans["modules"].left_alone == plans["export"].left_alone == ()
    inside = made["modules"]
    with torch.no_grad():
        wanted = inside(*loader[0])
        close(wanted, made["export"](*loader[0]), 2e-2)  # only graphs are refitted, so the factors differ a little
        assert is_stand_in(inside.artifact.program.module.get_submodule(_first_projection(inside)))
        inside.save(tmp_path)
        close(lowrank_fx.load(model, tmp_path, compile=False)(*loader[0]), wanted, 0.0)
        folded = inside.fold()
        close(folded(*loader[0]), wanted, 1e-5)  # float32
        folded.save(tmp_path / "folded")
        close(lowrank_fx.load(model, tmp_path / "folded", compile=False)(*loader[0]), folded(*loader[0]), 0.0)
        close(copy.deepcopy(inside)(*loader[0]), wanted, 0.0)
    assert base_weights(model) == before


def _first_projection(made: lowrank_fx.LowRankModule) -> str:
    name = next(site.name for site in made.plan.factored if "in_proj" in site.name)
    return name.replace("_weight", "")


def test_the_original_that_comes_back_is_closed() -> None:
    model = seeded(transformer)
    call = Call(batches(1, 2)[0], {})
    back = TreeProgram.from_model(model, example=call).factorize({}, clone=True)
    assert back.module.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.module.state_dict().items())
    with torch.no_grad(), plain_attention():
        assert torch.equal(back.run(call)[0], model(*call.args))


def test_hooks_fire_and_readers_get_the_product() -> None:
    model = seeded(encoder)
    attention = model.layers[0].self_attn
    fired: list[str] = []
    attention.register_forward_hook(lambda module, args, output: fired.append(type(module).__name__))
    call = Call(batches(1, 1)[0], {})
    program = TreeProgram.from_model(model, example=call)
    assert fired == [], "capture and its rehearsal do not call the user's hooks"
    site = program.find_sites().sites[0]
    factors = factors_for(program, site)
    made = program.factorize({site.name: (site, factors)}, clone=True)
    made.run(call)
    assert fired == ["OpenAttention"]
    inner = made.module.get_submodule("layers.0.self_attn")
    assert isinstance(inner, OpenAttention)
    close(inner.in_proj_weight.detach().double(), factors.dense_matrix(), 1e-6)  # float32
    expected = attention.in_proj_bias.double() + factors.shift
    close(inner.in_proj_bias.detach().double(), expected.detach(), 1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "only", ["layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj", "layers.0.linear1"]
)
def test_torch_s_fast_path_does_not_pass_factors_by(only: str) -> None:
    model = seeded(encoder).requires_grad_(False)
    x = batches(1, 1)[0][0]
    padding = torch.arange(6)[None].expand(8, 6) >= torch.arange(1, 9)[:, None].clamp(max=6)
    program = TreeProgram.from_model(model, example=Call((x,), {}))
    chosen = {site.name: (site, factors_for(program, site)) for site in program.find_sites().sites if site.name == only}
    made = program.factorize(chosen, clone=True)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            fast = made.module(x, **options)
            with plain_attention():
                plain = made.module(x, **options)
            real = ~padding if options else torch.ones_like(padding)
            close(fast[real], plain[real], 1e-5)  # float32
            assert not torch.allclose(plain[real], model(x, **options)[real], atol=1e-2)


def test_it_compiles_in_one_piece() -> None:
    model = seeded(encoder)
    call = Call(batches(1, 1)[0], {})
    program = TreeProgram.from_model(model, example=call)
    made = program.factorize({s.name: (s, factors_for(program, s)) for s in program.find_sites().sites}, clone=True)
    with torch.no_grad():
        compiled = torch.compile(made.module, backend="eager", fullgraph=True)
        close(compiled(*call.args), made.run(call)[0], 1e-5)  # float32
