"""The caches that Hugging Face decoders return come out of a captured model as they went in."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from lowrank_fx.batches import Call
from lowrank_fx.caches import register_caches
from lowrank_fx.capture import capture


def test_a_pair_of_caches_is_taken_apart_and_put_together() -> None:
    register_caches()
    assert not register_caches()  # everything is known by now
    keys = torch.arange(24.0).view(1, 2, 3, 4)
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())  # type: ignore[no-untyped-call,unused-ignore]
    pair.self_attention_cache.update(keys, keys + 1, 0)
    pair.cross_attention_cache.update(keys + 2, keys + 3, 0)
    leaves, spec = pytree.tree_flatten(pair)
    assert [float(leaf[0, 0, 0, 0]) for leaf in leaves] == [0, 1, 2, 3]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, EncoderDecoderCache)
    values: Any = again.cross_attention_cache.layers[0]
    assert torch.equal(values.values, keys + 3)


def test_an_encoder_decoder_is_captured_with_its_cache() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, use_cache=True)
    model: Any = T5ForConditionalGeneration(config)
    model.eval()
    ids = torch.arange(12).view(2, 6)
    captured = capture(model, Call((), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}))
    args, kwargs = captured.calls.bind((), {"input_ids": ids, "decoder_input_ids": ids[:, :4]})
    output = captured.graph_module(*args, **kwargs)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :4])
    assert isinstance(output.past_key_values, EncoderDecoderCache)
    kept, wanted = (pytree.tree_leaves(each.past_key_values) for each in (output, expected))
    assert len(kept) == len(wanted) == 4
    # The same operators on the same weights; products of other shapes may round differently, measured 1e-7.
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)
