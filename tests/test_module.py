"""The module that ``optimize`` returns is an ``nn.Module`` like any other, and calls like the original."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

import lowrank_fx
from lowrank_fx import Keep
from lowrank_fx.compare import relative_error
from lowrank_fx.module import LowRankModule


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Dropout(0.5), nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 5))


def batches() -> list[Tensor]:
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(99)) / 7
    return [torch.randn(32, 48, generator=torch.Generator().manual_seed(seed)) @ mixing for seed in range(6)]


def make(model: nn.Module, **options: object) -> LowRankModule:
    chosen = {"target": Keep(params=0.6), "compile": False, "progress": False, **options}
    return lowrank_fx.optimize(model, batches(), **chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return perceptron().eval()


@pytest.fixture(scope="module")
def fast(model: nn.Sequential) -> LowRankModule:
    return make(model)


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    model: BertModel = BertModel(config)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def fast_bert(bert: BertModel) -> LowRankModule:
    generator = torch.Generator().manual_seed(0)
    loader = []
    for length in (9, 12, 7, 12, 10):
        mask = torch.ones(4, length, dtype=torch.long)
        mask[1, length - 3 :] = 0
        ids = torch.randint(0, 60, (4, length), generator=generator)
        loader.append({"input_ids": ids, "attention_mask": mask, "label": torch.zeros(4)})
    return lowrank_fx.optimize(bert, loader, target=Keep(params=0.7, of="sites"), compile=False, progress=False)


def test_a_hugging_face_model_keeps_its_signature_and_output_class(fast_bert: LowRankModule, bert: BertModel) -> None:
    ids, mask = torch.arange(30).reshape(3, 10), torch.ones(3, 10, dtype=torch.long)
    with torch.no_grad():
        by_name = fast_bert(input_ids=ids, attention_mask=mask)
        by_place = fast_bert(ids, mask)
        original = bert(input_ids=ids, attention_mask=mask)
    assert type(by_name) is type(original) is BaseModelOutputWithPoolingAndCrossAttentions
    assert list(by_name.keys()) == list(original.keys())
    assert relative_error(by_place, by_name) == 0
    assert 0 < relative_error(by_name, original) < 1
    # Another batch and another sequence length than any that calibration saw, down to one of each.
    assert fast_bert(input_ids=ids[:1, :1], attention_mask=mask[:1, :1]).last_hidden_state.shape == (1, 1, 32)


def test_padding_stays_out_of_the_statistics(fast_bert: LowRankModule) -> None:
    assert fast_bert.session is not None
    calibration = fast_bert.session.calibration
    query = next(site for site in fast_bert.session.table.sites if site.name.endswith("0.attention.self.query"))
    sketch = calibration.sketch_of(fast_bert.session.table, query)
    assert sketch is not None
    # Batches 0 to 3 calibrate (batch 4 is held out); each has three padded positions.
    assert sketch.rows == 4 * (9 + 12 + 7 + 12) - 4 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "argument input_ids is missing"),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.long)}, "argument attention_mask is missing"),
        (
            {
                "input_ids": torch.zeros(2, 5, dtype=torch.long),
                "attention_mask": torch.ones(2, 5, dtype=torch.long),
                "output_hidden_states": True,
            },
            "argument output_hidden_states=True was not given when the model was captured",
        ),
    ],
)
def test_other_calls_are_refused_by_name(fast_bert: LowRankModule, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(lowrank_fx.CallError, match=message):
        fast_bert(**arguments)


def test_fold_gives_one_dense_operator_per_site_and_the_same_numbers(fast: LowRankModule, model: nn.Module) -> None:
    folded = fast.fold()
    assert set(folded.state_dict()) == set(model.state_dict())
    graph = folded.artifact.program.module.graph
    assert isinstance(graph, Graph)
    linear = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(linear) == 3
    # float32: two products of depth <= 96 against one; measured 1e-7.
    assert relative_error(folded(batches()[0]), fast(batches()[0])) < 1e-6
    for mine in folded.parameters():
        assert all(mine.data_ptr() != other.data_ptr() for other in fast.parameters())
    with pytest.raises(lowrank_fx.LowRankError, match="replan needs the calibration"):
        folded.replan(Keep(params=0.5))


def test_the_folded_weights_fit_the_original_model(fast: LowRankModule) -> None:
    other = perceptron().eval()
    other.load_state_dict(fast.fold().state_dict())
    assert relative_error(other(batches()[0]), fast(batches()[0])) < 1e-6


def test_gradients_flow_through_the_factors(fast: LowRankModule) -> None:
    trained = copy.deepcopy(fast)
    trained(batches()[0]).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
    assert any(name.endswith("factor_in") for name in gradients)
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients.values())
    assert all(parameter.grad is None for parameter in fast.parameters())


def test_loading_a_state_dict_is_never_stale(fast: LowRankModule) -> None:
    changed = copy.deepcopy(fast)
    state = {name: torch.zeros_like(tensor) for name, tensor in changed.state_dict().items()}
    changed.load_state_dict(state)
    assert bool((changed(batches()[0]) == 0).all())
    assert bool((fast(batches()[0]) != 0).any())


def test_compiled_it_follows_its_weights_too(model: nn.Sequential) -> None:
    compiled = make(model, compile=True)
    assert compiled.timing is not None
    assert compiled.timing.speedup > 0
    rows = batches()[0]
    eager = compiled.artifact.program.module(rows)
    assert relative_error(compiled(rows), eager) < 1e-5  # inductor's GELU and tanh, float32; measured 2e-7
    compiled.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in compiled.state_dict().items()})
    assert bool((compiled(rows) == 0).all())
    assert [name for name, _ in compiled.named_children()] == [name for name, _ in make(model).named_children()]


def test_casting_moves_the_graph_with_the_module(fast: LowRankModule) -> None:
    double = copy.deepcopy(fast).double()
    assert double(batches()[0].double()).dtype == torch.float64
    assert relative_error(double(batches()[0].double()), fast(batches()[0]).double()) < 1e-5


def test_constants_follow_the_parameters_to_another_device() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(48, 48)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.table(x) + torch.arange(x.shape[0], device=x.device)[:, None]
            return out

    made = make(Positions().eval())
    graph = made.artifact.program.module
    made.artifact.program.moved(torch.device("cpu"), torch.device("meta"))
    assert isinstance(graph, GraphModule)
    devices = {node.kwargs["device"] for node in graph.graph.nodes if "device" in node.kwargs}
    assert devices == {torch.device("meta")}


def test_copy_decides_whether_storage_is_shared(model: nn.Sequential) -> None:
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in make(model).parameters()}
    assert theirs & {parameter.data_ptr() for parameter in make(model, copy=False).parameters()}


def test_train_sets_the_flag_and_dropout_stays_off(fast: LowRankModule) -> None:
    training = copy.deepcopy(fast).train()
    assert training.training
    assert torch.equal(training(batches()[0]), training(batches()[0]))


def test_pickle_is_refused_with_what_to_do(fast: LowRankModule) -> None:
    with pytest.raises(lowrank_fx.LowRankError, match=r"use save\(folder\) and lowrank_fx.load"):
        pickle.dumps(fast)


def test_save_and_load_round_trip(fast: LowRankModule, model: nn.Sequential, tmp_path: Path) -> None:
    fast.save(tmp_path)
    loaded = lowrank_fx.load(model, tmp_path, compile=False)
    assert torch.equal(loaded(batches()[0]), fast(batches()[0]))
    assert loaded.plan == fast.plan
    assert loaded.timing == fast.timing
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_the_report_and_the_repr_say_what_was_done(fast: LowRankModule) -> None:
    assert "Keep(params=0.6)" in str(fast.report())
    assert repr(fast).startswith("LowRankModule(Keep(params=0.6): ")
    assert "\n" not in repr(fast)
