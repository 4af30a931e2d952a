"""The original against the optimized model: every number against a plain computation, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import lowrank_fx
from lowrank_fx.comparison import Comparison, OutputDifference, compare_models, named_outputs
from lowrank_fx.errors import CalibrationError
from lowrank_fx.latency import PairedTiming


class Returns(nn.Module):
    """A linear layer whose scores are passed on as ``shape`` says."""

    def __init__(self, shape: Callable[[Tensor], Any], seed: int = 0, width: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.shape = shape

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.shape(self.linear(x))


def batches(count: int = 3, *size: int, seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(size or (8, 6)), generator=generator) for _ in range(count)]


def compared(first: nn.Module, second: nn.Module, data: list[Any], **options: Any) -> Comparison:
    return compare_models(first, second, data, compile=False, measure_speed=False, **options)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_a_plain_computation() -> None:
    first, second = Returns(lambda y: y), Returns(lambda y: y, seed=1)
    data = batches()
    made = compared(first, second, data)
    with torch.no_grad():
        theirs, ours = (torch.cat([model(batch) for batch in data]).double() for model in (first, second))
    (entry,) = made.outputs
    assert (entry.name, entry.shape, entry.dtype, entry.equal) == ("output", (8, 5), "float32", None)
    # Both are float64 sums over the same float32 outputs, in another order.
    assert made.error == entry.error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-12)
    products = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1))
    assert entry.cosine == pytest.approx(float(products.mean()), rel=1e-12)
    same = float((ours.argmax(1) == theirs.argmax(1)).double().mean())
    assert 0 < same < 1
    assert entry.same_largest == pytest.approx(same, rel=1e-12)
    assert (made.batches, made.rows, made.timed_rows, made.timing) == (3, 24, 8, None)


def test_a_model_is_the_same_as_itself() -> None:
    model = Returns(lambda y: y)
    made = compared(model, model, batches())
    assert made.error == 0
    assert made.outputs[0].cosine == pytest.approx(1, rel=1e-15)
    assert made.outputs[0].same_largest == 1


def test_padding_does_not_count() -> None:
    first, second = Returns(lambda y: y), Returns(lambda y: y, seed=1)
    (x,) = batches(1, 2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    made = compared(first, second, [{"x": x, "attention_mask": mask}])
    plain = compared(first, second, [x[mask.bool()]])
    assert made.error == pytest.approx(plain.error, rel=1e-6)  # float32 products in another order
    assert made.outputs[0].same_largest == plain.outputs[0].same_largest
    assert made.outputs[0].cosine == pytest.approx(plain.outputs[0].cosine, rel=1e-6)


class Pair(NamedTuple):
    scores: Tensor
    state: Tensor


@dataclasses.dataclass
class Held:
    logits: Tensor
    nothing: None = None


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, [y, y]), ["[0]", "[1][0]", "[1][1]"]),
        (lambda y: {"a": y, "b": {"c": y}}, ["a", "b.c"]),
        (lambda y: Pair(y, y), ["scores", "state"]),
        (lambda y: Held(y), ["logits"]),
        (lambda y: SequenceClassifierOutput(logits=y, hidden_states=(y, y)), ["logits", "hidden_states[0]"]),
        (lambda y: (None, 3, y), ["[2]"]),
    ],
)
def test_outputs_have_the_names_of_their_places(shape: Callable[[Tensor], Any], names: list[str]) -> None:
    found = [name for name, _ in named_outputs(shape(torch.ones(2, 3)))]
    assert found[: len(names)] == names
    assert len(found) == len(names) + ("hidden_states[0]" in names)


def test_what_looks_like_scores_of_classes_is_compared_by_its_largest_entry() -> None:
    def shape(y: Tensor) -> Any:
        return {"logits": y, "hidden": y, "picture": y[:, None, None], "flat": y[:, 0], "one_logits": y[:, :1]}

    made = compared(Returns(shape), Returns(shape, seed=1), batches())
    assert [entry.name for entry in made.outputs if entry.same_largest is not None] == ["logits"]
    assert [entry.name for entry in made.outputs if entry.cosine is None] == ["flat"]

    def nameless(y: Tensor) -> Any:
        return y[:, None], y[:, 0], y[:, :1]

    unnamed = compared(Returns(nameless), Returns(nameless, seed=1), batches())
    assert [entry.same_largest is not None for entry in unnamed.outputs] == [True, False, False]


def test_whole_numbers_are_compared_by_equality() -> None:
    def shape(y: Tensor) -> Any:
        return y, y > 0, y.argmax(1)

    first, second = Returns(shape), Returns(shape, seed=1)
    made = compared(first, second, batches(1))
    (x,) = batches(1)
    with torch.no_grad():
        expected = [float((a == b).double().mean()) for a, b in zip(first(x)[1:], second(x)[1:], strict=True)]
    assert [entry.equal for entry in made.outputs] == [None, *expected]
    assert [entry.error for entry in made.outputs[1:]] == [None, None]
    assert made.error == made.outputs[0].error


def test_rows_of_zeros_and_infinities() -> None:
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, -math.inf], [3.0, 4.0]])
    changed = torch.tensor([[2.0, 4.0], [0.0, 0.0], [2.0, -math.inf], [0.0, 0.0]])
    first, second = Returns(lambda _: rows), Returns(lambda _: changed)
    (entry,) = compared(first, second, batches(1, 4, 6)).outputs
    assert entry.cosine == pytest.approx((1 + 1 + 0) / 3, rel=1e-15)


def test_other_structures_are_refused() -> None:
    one = Returns(lambda y: y)
    with pytest.raises(CalibrationError, match="the output holds 2 floating-point tensors and the reference 1"):
        compared(one, Returns(lambda y: (y, y)), batches())
    with pytest.raises(CalibrationError, match=r"shape \[8, 4\], but the reference has \[8, 5\]"):
        compared(one, Returns(lambda y: y[:, :4]), batches())
    with pytest.raises(CalibrationError, match=r"batch 0: output '\[1\]': the original gives \[8\] and the optimized"):
        compared(Returns(lambda y: (y, y.argmax(1))), Returns(lambda y: (y,)), batches())


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ([], "there is no batch to compare on"),
        ([torch.zeros(0, 6)], "batch 0 is float32[0, 6]: it has no rows"),
        (torch.zeros(2, 6), "which is one batch and not an iterable of batches"),
        ([{"y": torch.zeros(2, 6)}], "batch 0 is dict(y: float32[2, 6]), but the model takes forward(x"),
    ],
)
def test_batches_that_cannot_be_used(data: Any, cause: str) -> None:
    model = Returns(lambda y: y)
    with pytest.raises(CalibrationError) as caught:
        compared(model, model, data)
    assert cause in str(caught.value)


def test_forward_args_picks_from_a_batch() -> None:
    model = Returns(lambda y: y)
    made = compared(model, model, [{"other": batches(1)[0]}], forward_args=lambda batch: batch["other"])
    assert made.rows == 8


# ---- size, FLOPs, speed ----------------------------------------------------------------------------------------------


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 16))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 5


def test_an_optimized_model_against_its_original() -> None:
    model = Classifier().eval()
    data = batches(10, 16, 32)
    small = lowrank_fx.optimize(model, data, target=lowrank_fx.Keep(params=0.6), compile=False, progress=False)
    made = compare_models(model, small, data[:2], compile=False)
    totals = small.plan.totals
    assert made.parameters == totals.model_params
    assert made.flops == totals.model_flops  # both counted on 16 rows
    assert made.bytes == tuple(4 * amount for amount in made.parameters)
    with torch.no_grad():
        theirs, ours = (torch.cat([each(batch) for batch in data[:2]]).double() for each in (model, small))
    assert made.error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-12)
    assert made.timing is not None
    assert made.timing.rounds >= 7


def test_the_original_is_handed_back_as_it_was() -> None:
    model = Classifier().train()
    model[1].eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    x = batches(1, 4, 32)
    kept = x[0].clone()
    made = compared(model, model, x)
    assert made.error == 0  # with the dropout of training mode the two runs would differ
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert calls == []
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(kept, x[0])


def test_attention_counts_and_a_fused_encoder_is_looked_into() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    made = compared(layer, layer, batches(1, 3, 5, 16))
    # Per token 2 MACs-to-FLOPs times (16 x 48 in, 16 x 16 out, 2 x 16 x 32 feed-forward) and twice 5 keys of width 16.
    assert made.flops[0] == made.flops[1] == 3 * 5 * 2 * (16 * 48 + 16 * 16 + 2 * 16 * 32 + 2 * 5 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    made = compared(model, model, batches())
    assert made.parameters == (36, 36)
    assert made.bytes == (144, 144)


def test_a_compiled_original_is_unwrapped() -> None:
    model = Returns(lambda y: y)
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert compared(compiled, model, batches()).error == 0


@pytest.mark.slow
def test_compiled_models_are_timed_compiled() -> None:
    model = Classifier().eval()
    data = batches(10, 16, 32)
    small = lowrank_fx.optimize(model, data, target=lowrank_fx.Keep(params=0.6), progress=False)
    torch._dynamo.utils.counters.clear()
    made = compare_models(model, small, data[:2])
    assert made.compiled
    # The original's frame; the optimized model's was compiled before it came here.
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1


# ---- what is shown ---------------------------------------------------------------------------------------------------

MADE = Comparison(
    error=0.1234,
    outputs=(
        OutputDifference("<b>", (8, 10), "float32", 0.1234, 0.9876, 0.999999, None),
        OutputDifference("ids", (8,), "int64", None, None, None, 0.5),
    ),
    batches=1,
    rows=1234,
    parameters=(2000, 500),
    bytes=(8000, 2000),
    flops=(4_000_000, 3_000_000),
    timing=PairedTiming(1.5, 0.003, 0.002, 0.01, 9),
    timed_rows=8,
    compiled=True,
)

TEXT = """\
lowrank_fx: the original against the optimized model
With 25.0 % of the parameters and 75.0 % of the FLOPs, measured 1.50x as fast, the outputs have a relative
error of 0.1234 over 1,234 rows in 1 batch.

Outputs
  output  first batch      error  cosine  same largest   equal
  <b>     float32 8 x 10  0.1234  0.9876       >99.9 %
  ids     int64 8                                       50.0 %

Size and cost
                original  optimized    kept
  parameters       2,000        500  25.0 %
  size on disk      8 kB       2 kB  25.0 %
  FLOPs              4 M        3 M  75.0 %
  1.50x as fast on 8 rows: 3 ms to 2 ms, both compiled, interquartile range 0.01 over 9 rounds."""


def test_the_text() -> None:
    assert str(MADE) == TEXT


def test_what_was_not_measured_is_not_shown() -> None:
    made = dataclasses.replace(MADE, outputs=MADE.outputs[1:], timing=None)
    text = str(made)
    assert "as fast" not in text
    assert "cosine" not in text
    assert "not measured" in made.to_html()


def test_the_page_says_the_same_and_escapes_names() -> None:
    page = MADE.to_html()
    for piece in ("0.1234", "0.9876", "&gt;99.9 %", "&lt;b&gt;", "int64 8", "1.50x", "2,000 to 500", "1,234 rows"):
        assert piece in page
    assert "<b>" not in page.replace("<b>0.1234</b>", "").split('<section class="card">')[1]
    assert "http" not in page
    assert "<script" not in page
