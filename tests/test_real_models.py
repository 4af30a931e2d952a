"""Architectures that people use, with random weights: optimize, fold, save, load, at rounding level. Slow.

GPT-2 is in the sample of the zoo, which checks more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo_checks import little_measured

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.compare import relative_error

pytestmark = pytest.mark.slow

# float32: every layer adds a few units in the last place; measured 4e-7 at most over these models.
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Parity is asked for here, not the best plan."""
    with little_measured():
        yield


def pictures(size: int) -> list[torch.Tensor]:
    return [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


def tokens(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed in range(5):
        ids = torch.randint(0, vocabulary, (8, 24), generator=torch.Generator().manual_seed(seed))
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "deit3_small": (lambda: timm.create_model("deit3_small_patch16_224", img_size=64), lambda: pictures(64)),
    "llama": (llama, lambda: tokens(512)),
}


def call(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


@pytest.mark.parametrize("name", MODELS)
def test_optimize_fold_save_load(name: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    model, loader = make().eval(), data()
    with little_measured():  # how good a plan is, is not asked here
        fast = lowrank_fx.optimize(model, loader, target=Keep(flops=0.7), compile=False, progress=False)
    kept = fast.plan.totals.kept("flops", "model")
    assert 0.7 - 0.005 <= kept <= 0.7
    expected = call(fast, loader[0])
    assert type(expected) is type(call(model, loader[0]))

    # The eager graph is an independent reference for the factors: float64 products of them, put back into the model.
    folded = fast.fold()
    assert relative_error(call(folded, loader[0]), expected) < ROUNDING
    fast.save(tmp_path / "factored")
    folded.save(tmp_path / "folded")
    assert relative_error(call(lowrank_fx.load(model, tmp_path / "factored", compile=False), loader[0]), expected) == 0
    assert (
        relative_error(call(lowrank_fx.load(model, tmp_path / "folded", compile=False), loader[0]), expected) < ROUNDING
    )

    # With every layer dense the graph is the original, batch norms folded.
    dense = fast.replan(Keep(flops=1.0))
    assert relative_error(call(dense, loader[0]), call(model, loader[0])) < ROUNDING
    single = {key: value[:1] for key, value in loader[0].items()} if isinstance(loader[0], dict) else loader[0][:1]
    assert relative_error(call(dense, single), call(model, single)) < ROUNDING
