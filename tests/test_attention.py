"""torch's own attention and transformer layers: every projection becomes a site."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture, plain_attention
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.grouped_sketch import make_sketch
from lowrank_fx.observer import Recorder, TapObserver
from lowrank_fx.pipeline import take
from lowrank_fx.refine_loss import sites_loss
from lowrank_fx.tree_program import TreeProgram

ATTENTION = ("self_attn.in_proj_weight", "self_attn.out_proj")
CROSS = ("multihead_attn.in_proj_weight_0", "multihead_attn.in_proj_weight_1", "multihead_attn.out_proj")
FEEDFORWARD = ("linear1", "linear2")


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding() -> Tensor:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:2, 3:] = True
    return mask


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """The sites of a model, after its graph gave the same outputs as the model itself."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    result = capture(model, Call(args, kwargs))
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    program = GraphProgram.from_capture(result)
    model.eval()
    with torch.no_grad(), plain_attention():
        expected = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if leaf is not None]
        actual = [leaf for leaf in program.run(Call(*result.calls.bind(args, kwargs))) if leaf is not None]
    for ours, theirs in zip(actual, expected, strict=True):
        # The same operators on the same numbers; constants that were folded may round once more.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    table = program.find_sites()
    assert all(entry.name in ("attention.bias_k", "attention.bias_v") for entry in table.left_alone)
    return [site.name for site in table.sites]


def under(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer(batch_first: bool, bias: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, bias=bias)
    assert captured(layer, rows(4, 5, 16)) == [*ATTENTION, *FEEDFORWARD]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_with_and_without_padding(masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    options = {"src_key_padding_mask": padding()} if masked else {}
    expected = [name for index in (0, 1) for name in under(f"layers.{index}", *ATTENTION, *FEEDFORWARD)]
    assert captured(model, rows(4, 5, 16), **options) == expected


def test_a_decoder_and_a_transformer() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
    names = under("layers.0", *ATTENTION, *CROSS, *FEEDFORWARD)
    assert captured(decoder, rows(4, 5, 16), rows(4, 3, 16, seed=1)) == names
    both = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    encoder_names = under("encoder.layers.0", *ATTENTION, *FEEDFORWARD)
    assert captured(both, rows(4, 5, 16), rows(4, 3, 16, seed=1)) == encoder_names + under("decoder", *names)


class Attends(nn.Module):
    """Attention with its options fixed."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **options)
        self.call = call

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Any:
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **self.call)


PACKED = under("attention", "in_proj_weight", "out_proj")
APART = under("attention", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("options", "inputs", "names"),
    [
        ({}, [(4, 5, 16)], PACKED),
        ({"bias": False}, [(4, 5, 16)], PACKED),
        ({"add_bias_kv": True, "add_zero_attn": True}, [(4, 5, 16)], PACKED),
        ({"kdim": 12, "vdim": 10}, [(4, 5, 16), (4, 3, 12), (4, 3, 10)], APART),
        (
            {}, [(4, 5, 16), (4, 3, 16)],
            under("attention", "in_proj_weight_0", "in_proj_weight_1", "out_proj"),
        ),
        (
            {}, [(4, 5, 16), (4, 3, 16), (4, 3, 16)],
            under("attention", "in_proj_weight_0", "in_proj_weight_1", "in_proj_weight_2", "out_proj"),
        ),
    ],
    ids=["self", "no bias", "extra keys", "kdim vdim", "cross", "three inputs"],
)  # fmt: skip
def test_attention(
    options: dict[str, Any], inputs: list[tuple[int, int, int]], names: list[str], batch_first: bool, need_weights: bool
) -> None:
    model = Attends({"need_weights": need_weights}, batch_first=batch_first, **options)
    tensors = [rows(*shape, seed=seed) for seed, shape in enumerate(inputs)]
    if not batch_first:
        tensors = [tensor.transpose(0, 1) for tensor in tensors]
    assert captured(model, *tensors) == names


def test_in_a_tree_no_batch_no_opening_and_the_projections_say_why_not() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    program = TreeProgram.from_model(model)
    table = program.find_sites()
    assert [site.name for site in table.sites] == [f"layers.{i}.{name}" for i in (0, 1) for name in FEEDFORWARD]
    assert [entry.name for entry in table.left_alone] == [f"layers.{i}.{name}" for i in (0, 1) for name in ATTENTION]
    assert all("inside one call" in entry.reason for entry in table.left_alone)
    call = Call((rows(4, 5, 16),), {})
    graph = GraphProgram.from_capture(capture(model, call))
    assert program.count_flops(call) == graph.count_flops(call), "the fused kernel would hide them"


class Masked(nn.Module):
    """Attention behind a padding mask; ``nn.MultiheadAttention`` turns its rows to position first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        padding = attention_mask == 0
        result: Tensor = self.last(self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        return result


@pytest.mark.parametrize("positions", [5, 4])  # as many as there are sentences: only their names tell them apart
@pytest.mark.parametrize("way", ["export", "modules"])
def test_padding_is_left_out_where_rows_come_position_first(positions: int, way: Literal["export", "modules"]) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    mask = torch.ones(4, positions, dtype=torch.long)
    mask[0, 1:], mask[2, 2:] = 0, 0
    x = rows(4, positions, 16)
    x[mask == 0] = 100.0
    call = Call((x, mask), {}, mask.bool())
    # Another number of positions for the example, so that both sizes stay symbols.
    program = take(model, Call((rows(3, 7, 16), torch.ones(3, 7, dtype=torch.long)), {}), way)
    table = program.find_sites()
    recorder = Recorder(0)
    recorder.start(0, call.mask)
    observers = {
        name: TapObserver(tap, make_sketch(tap.width, 1, None, torch.device("cpu")), 16, recorder)
        for name, tap in table.taps.items()
    }
    with torch.no_grad():
        program.observed(table, observers)(call)
    seen = {site.name: observers[site.calls[0].tap].sketch for site in table.sites}
    real = x[mask == 1].double()
    assert torch.allclose(
        seen["attention.in_proj_weight"].parts[0].gram(centered=False), real.t() @ real, rtol=1e-5, atol=1e-4
    )
    assert all(sketch.rows == int(mask.sum()) for sketch in seen.values())
    # The error of what refinement compares, and of what refitting fits, leaves out the same rows.
    turned = {call.node for site in table.sites for call in site.calls if call.sequence_first}
    node = next(site.calls[0].node for site in table.sites if site.name == "attention.in_proj_weight")
    assert (node in turned) == (way == "export")
    with torch.no_grad():
        values = program.probed([node])(call)[1]
    worse = {node: values[node] * (1.0 + (values[node].abs() > 20))}  # only what padding feeds is that large
    assert float(sites_loss(worse, values, call.mask, turned)) == 0
    assert float(sites_loss(worse, values, None)) > 0.1
