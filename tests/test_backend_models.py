"""``torch.compile(model, backend="lowrank_fx")`` on models with attention, convolutions and caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo_checks import little_measured

import lowrank_fx
from lowrank_fx.backend.attention import encoder_layer, self_attention
from lowrank_fx.backend.family import families
from lowrank_fx.backend.planning import Planned
from lowrank_fx.backend.regions import local
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.effort import EFFORTS
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.plan import Plan, SitePlan, Totals

OPTIONS: dict[str, Any] = {"calibration_steps": 4, "keep_params": 0.7, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with little_measured():
        yield
    torch.compiler.reset()


def seeded(make: Any) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).double().norm() / other.detach().double().norm())


def site_names(compiled: Any) -> set[str]:
    plan = lowrank_fx.status(compiled).plan
    assert plan is not None
    return {site.name for site in plan.sites}


def encoder(**options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


@pytest.mark.parametrize("gradients", [False, True], ids=["fused kernel", "plain attention"])
def test_transformer_encoder(gradients: bool) -> None:
    """In inference, torch's layers run one fused kernel; where gradients are recorded, they do not."""
    model = seeded(encoder).requires_grad_(False)
    fast: Any = torch.compile(model, backend="lowrank_fx", options=OPTIONS)
    counters.clear()
    with torch.set_grad_enabled(gradients):
        for seed in range(4):
            call = normal(3, 5, 16, seed=seed)
            torch.testing.assert_close(fast(call), model(call))
        assert 0 < apart(fast(call), model(call)) < 0.8
    assert lowrank_fx.status(fast).phase == "factored"
    assert sum(counters["recompiles"].values()) == 0
    names = site_names(fast)
    assert {"layers.0.linear1", "layers.0.linear2", "layers.0.self_attn.out_proj"} <= names
    assert any("in_proj" in name for name in names)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", ["none", "padding", "square"])
def test_the_fused_layer_written_out(norm_first: bool, activation: str, mask: str) -> None:
    layer = seeded(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first, activation=activation)
    )
    call = normal(3, 5, 8)
    masks: tuple[Tensor | None, int | None] = (None, None)
    if mask == "padding":
        masks = (torch.arange(5) >= torch.tensor([5, 3, 4])[:, None], 1)
    elif mask == "square":
        masks = (torch.ones(5, 5, dtype=torch.bool).triu(1), 0)
    attention = layer.self_attn
    given = (
        *(8, 2, attention.in_proj_weight, attention.in_proj_bias),
        *(attention.out_proj.weight, attention.out_proj.bias, activation == "gelu", norm_first, layer.norm1.eps),
        *(layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias),
        *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias),
        *masks,
    )
    with torch.no_grad():
        wanted = torch._transformer_encoder_layer_fwd(call, *given)
        torch.testing.assert_close(encoder_layer(call, *given), wanted)


@pytest.mark.parametrize("average", [False, True])
def test_the_fused_attention_written_out(average: bool) -> None:
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    call, other = normal(3, 5, 8), normal(3, 5, 8, seed=1)
    given = (*(8, 2, attention.in_proj_weight, attention.in_proj_bias), attention.out_proj.weight)
    with torch.no_grad():
        wanted = torch._native_multi_head_attention(
            call, call, call, *given, attention.out_proj.bias, None, True, average
        )
        found = self_attention(call, call, call, *given, attention.out_proj.bias, None, True, average)
        torch.testing.assert_close(found, wanted)
        mixed, _ = self_attention(call, other, other, *given, attention.out_proj.bias, need_weights=False)
        torch.testing.assert_close(mixed, attention(call, other, other, need_weights=False)[0])


def test_multihead_attention_between_sequences() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 2, batch_first=True)

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            result: Tensor = self.attention(query, memory, memory, need_weights=False)[0]
            return result

    model = seeded(Cross)
    fast: Any = torch.compile(model, backend="lowrank_fx", options=OPTIONS)
    with torch.no_grad():
        for seed in range(4):
            calls = normal(3, 5, 24, seed=seed), normal(3, 7, 24, seed=seed + 10)
            torch.testing.assert_close(fast(*calls), model(*calls))
        assert 0 < apart(fast(*calls), model(*calls)) < 0.8
    assert "attention.out_proj" in site_names(fast)
    assert len(site_names(fast)) >= 3  # q apart from k and v, or each for itself


def test_convolutions_with_batch_norm() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 4)),
        )

    model = seeded(make)
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"calibration_steps": 4, "keep_flops": 0.6, "inner": "eager"}
    fast: Any = torch.compile(model, backend="lowrank_fx", options=options)
    with torch.no_grad():
        for seed in range(4):
            call = normal(4, 3, 8, 8, seed=seed)
            torch.testing.assert_close(fast(call), model(call))
        assert 0 < apart(fast(call), model(call)) < 0.8
    found = lowrank_fx.status(fast)
    assert found.phase == "factored"
    assert found.plan is not None
    assert {site.name for site in found.plan.sites} == {"0", "3", "6"}
    assert any("1" in line for line in found.plan.cleanup)  # the batch norm was folded
    # In training mode its statistics move, so that graph stays dense.
    before = model[1].running_mean.clone()
    model.train()
    with torch.no_grad():
        fast(call)
    assert not torch.equal(model[1].running_mean, before)


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=1, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.slow
def test_generate_of_hugging_face() -> None:
    model, dense = seeded(gpt2), seeded(gpt2)
    model.compile(backend="lowrank_fx", options={**OPTIONS, "calibration_steps": 6})
    prompt = torch.arange(2, 10).reshape(2, 4)

    def generate(own: Any) -> Tensor:
        tokens: Tensor = own.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=1
        )
        return tokens

    assert torch.equal(generate(model), generate(dense))
    assert lowrank_fx.status(model).phase == "calibrating"
    generate(model)
    found = lowrank_fx.status(model)
    assert found.phase == "factored"
    assert {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"} <= site_names(model)
    tokens = generate(model)
    assert tokens.shape == generate(dense).shape
    with torch.no_grad():
        logits = model(prompt).logits
        assert 0 < apart(logits, dense(prompt).logits) < 0.8
    assert lowrank_fx.status(model).phase == "factored"


def minilm() -> Any:
    """The encoder of all-MiniLM-L6-v2, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=500
    )
    return transformers.BertModel(config)


def deit() -> Any:
    return pytest.importorskip("timm").create_model("deit3_small_patch16_224", img_size=32)


def sentences(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(8) < torch.randint(5, 9, (2, 1), generator=generator)).long()
    return {"input_ids": torch.randint(0, 500, (2, 8), generator=generator), "attention_mask": mask}


def pictures(seed: int) -> dict[str, Tensor]:
    return {"x": normal(2, 3, 32, 32, seed=seed)}


def quarter_ranks(program: GraphProgram) -> Plan:
    """Every linear layer at a quarter of its full rank: to make a plan of a large model takes minutes."""
    sites = tuple(
        SitePlan(
            name=site.name,
            weight=site.weight,
            form="lowrank",
            rank=min(site.out_features, site.in_features) // 4,
            out_features=site.out_features,
            in_features=site.in_features,
            params=(1, 1),
            flops=(1, 1),
            error=0.0,
            bound=0.0,
            effect=0.0,
            reason="",
        )
        for site in program.find_sites().sites
        if site.kind == "linear"
    )
    totals = Totals((1, 1), (1, 1), (1, 1), (1, 1))
    return Plan(lowrank_fx.Keep(params=0.7), "uniform", "", 0, sites, (), (), (), totals, 0.0, 0.0, 0.0, (), ())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batch", "layers"), [(minilm, sentences, 36), (deit, pictures, 48)])
def test_large_encoders(make: Any, batch: Any, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each correction takes longer than all else here.
    monkeypatch.setitem(EFFORTS, "high", replace(EFFORTS["high"], corrections=()))
    model = seeded(make)
    program = GraphProgram.from_capture(capture(model, Call((), batch(0))))
    plan = quarter_ranks(program)
    options: dict[str, Any] = {"calibration_steps": 2, "plan": plan, "inner": "eager"}
    fast: Any = torch.compile(model, backend="lowrank_fx", options=options)

    def output(run: Any, call: dict[str, Tensor]) -> Tensor:
        found = run(**call)
        result: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
        return result

    counters.clear()
    with torch.no_grad():
        for seed in range(2):
            torch.testing.assert_close(output(fast, batch(seed)), output(model, batch(seed)), rtol=1e-4, atol=1e-4)
        found = lowrank_fx.status(fast)
        assert (found.phase, found.graphs) == ("factored", 1)
        assert found.plan == plan
        assert len(plan.factored) >= layers
        # The same factors in the graph that optimize captures.
        (family,) = families()
        assert isinstance(family.planned, Planned)
        sites = {site.name: site for site in program.find_sites().sites}
        same = program.factorize(local(sites, family.planned.made.factored), clone=True)
        # float32: every layer adds a few units in the last place.
        torch.testing.assert_close(output(fast, batch(7)), output(same.module, batch(7)), rtol=1e-4, atol=1e-4)
    assert sum(counters["recompiles"].values()) == 0
