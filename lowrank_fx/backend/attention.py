"""Attention calls that hide their weights in one kernel, written out in plain operators.

In inference, torch's transformer layers hand all their weights to one fused kernel, and ``torch.compile`` captures that
call as it is. While a region is lowered it is taken apart here, so that its projections are linear layers, which are
sites. ``multi_head_attention_forward`` needs nothing of that kind: it is Python, and lowering walks through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``aten._transformer_encoder_layer_fwd``: ``[B, L, embed_dim]`` to the same."""

    def attend(rows: Tensor) -> Tensor:
        out, _ = self_attention(
            *(rows,) * 3,
            embed_dim,
            num_heads,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            mask,
            need_weights=False,
            mask_type=mask_type,
        )
        return out

    def feed_forward(rows: Tensor) -> Tensor:
        hidden = torch.nn.functional.linear(rows, ffn_weight_1, ffn_bias_1)
        hidden = torch.nn.functional.gelu(hidden) if use_gelu else torch.relu(hidden)
        return torch.nn.functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.layer_norm(rows, [embed_dim], weight, bias, eps)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``aten._native_multi_head_attention``: ``[B, L, embed_dim]`` three times to the output and the weights."""
    if query is key and key is value:
        parts = torch.nn.functional.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        triples = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        parts = tuple(torch.nn.functional.linear(*each) for each in triples)
    heads = [torch.unflatten(part, -1, (num_head, embed_dim // num_head)).transpose(1, 2) for part in parts]
    allowed = None if mask is None else _allowed(mask, mask_type)
    weights: Tensor | None = None
    if need_weights:
        scores = heads[0] @ heads[1].transpose(-2, -1) / math.sqrt(embed_dim // num_head)
        scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
        weights = scores.softmax(-1)
        mixed = weights @ heads[2]
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], allowed)
    return torch.nn.functional.linear(mixed.transpose(1, 2).flatten(-2), proj_weight, proj_bias), weights


def _allowed(mask: Tensor, mask_type: int | None) -> Tensor:
    """Which keys a query may see, for ``[B, heads, L, L]``: the kernel takes any number but zero for masked."""
    seen = mask.to(torch.bool).logical_not()
    return seen[:, None, None, :] if mask_type == 1 else seen


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten._native_multi_head_attention.default: self_attention,
}
