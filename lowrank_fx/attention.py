"""The module tree's way into ``nn.MultiheadAttention``: its projections become layers that hooks and stand-ins reach.

torch's attention hands its weights to one function; no module's ``forward`` applies them. An opened attention computes
the same from the same parameters, but through a :class:`Projection` per product of its in-projection and through its
``out_proj``. The parameters stay those of the attention, under the names that a captured graph gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The weights of an attention whose query, key and value have different widths."""


class Projection(nn.Linear):
    """One product of an attention's in-projection: a linear layer whose parameters are the attention's.

    Attributes:
        owner: the attention; no submodule of this one.
        part: which of query, key and value it computes.
        packed: the attention's names of its weight and of its bias, of which this may be a part only.
        names: the names under which the attention keeps ``weight`` and ``bias``.
    """

    owner: OpenAttention
    part: tuple[int, ...]
    packed: Mapping[str, str]
    names: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """A parameter of its own (a trial's), or the attention's."""
        if name in ("weight", "bias") or name.startswith("factor_"):
            return self._parameters[name] if name in self._parameters else getattr(self.owner, self.parameter(name))
        return super().__getattr__(name)

    def parameter(self, leaf: str) -> str:
        """The attention's name for a parameter, such as ``in_proj_weight_factor_in``."""
        return self.names[leaf] if leaf in self.names else f"{self.names['weight']}_{leaf}"

    def extra_repr(self) -> str:
        """What it computes."""
        return f"{' and '.join(('query', 'key', 'value')[one] for one in self.part)}"


class OutProjection(NonDynamicallyQuantizableLinear):
    """An opened attention's ``out_proj``: it is called."""


class OpenAttention(nn.MultiheadAttention):
    """Computes what ``nn.MultiheadAttention`` does, each product by a submodule.

    Attributes:
        plain: the class of the attention that was opened.
        out_plain: that of its ``out_proj``.
        order: the names of its parameters.
    """

    plain: type[nn.MultiheadAttention]
    out_plain: type[nn.Module]
    order: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        """What was divided or factored, put together for code that reads it."""
        if name in ("in_proj_weight", "in_proj_bias", *SEPARATE) and name not in self._parameters:
            return _together(self, name)
        return super().__getattr__(name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, with the arguments, results and errors of ``nn.MultiheadAttention.forward``.

        Args:
            query: ``[batch, target, embed_dim]`` (``batch_first``), ``[target, batch, embed_dim]`` or ``[target,
                embed_dim]``.
            key: the same with ``source`` places and ``kdim`` numbers.
            value: the same with ``vdim`` numbers.
            key_padding_mask: ``[batch, source]``, true at padding, or numbers that are added to the scores.
            need_weights: whether the weights are returned.
            attn_mask: ``[target, source]`` or ``[batch * heads, target, source]``, true where attention is not allowed,
                or numbers that are added to the scores.
            average_attn_weights: over the heads.
            is_causal: ``attn_mask`` is the causal one.

        Returns:
            The output, laid out as ``query`` is, and the weights ``[batch, target, source]`` (with ``heads`` in second
            place where they are not averaged), or None.
        """
        if query.is_nested and query is key is value and key_padding_mask is None and attn_mask is None:
            return self._nested(query, need_weights, average_attn_weights)
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask)  # which says why not
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says that attn_mask is the causal one, and there is no attn_mask")
        padding = _added(key_padding_mask, "key_padding_mask", query, attn_mask)
        # As in torch, the hint replaces the mask where nothing else has to be merged into it.
        hinted = is_causal and padding is None and not need_weights
        mask = None if hinted else _added(attn_mask, "attn_mask", query)

        def laid_out(projected: Tensor) -> Tensor:  # [batch, places, embed_dim]
            if not batched:
                return projected.unsqueeze(0)
            return projected if self.batch_first else projected.transpose(0, 1)

        q, k, v = (laid_out(projected) for projected in self._project(query, key, value))
        batch, target, source = q.shape[0], q.shape[1], k.shape[1]
        scores: Tensor | None = None
        if mask is not None:
            wanted = (target, source) if mask.dim() == 2 else (batch * self.num_heads, target, source)
            if tuple(mask.shape) != wanted:
                raise RuntimeError(f"attn_mask is {tuple(mask.shape)}, and should be {wanted}")
            scores = mask if mask.dim() == 2 else mask.view(batch, self.num_heads, target, source)
        if padding is not None:
            by_key = padding.view(batch, 1, 1, source)
            scores = by_key if scores is None else scores + by_key
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if scores is not None and k.shape[1] > source:
            scores = F.pad(scores, (0, k.shape[1] - source))
        q, k, v = (each.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for each in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            products = (q * self.head_dim**-0.5) @ k.mT
            weights = F.softmax(products if scores is None else products + scores, dim=-1)
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, scores, dropout, hinted)
        attended = attended.transpose(1, 2).flatten(2)
        if not batched:
            attended = attended.squeeze(0)
        elif not self.batch_first:
            attended = attended.transpose(0, 1)
        return self.out_proj(attended), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value, each ``[..., embed_dim]``."""
        inputs = (query, key, value)
        found: dict[int, Tensor] = {}
        for projection in projections(self):
            products: dict[int, tuple[Tensor, ...]] = {}
            for place, one in enumerate(projection.part):
                # Called otherwise than with the first batch, a product may meet several inputs.
                if id(inputs[one]) not in products:
                    product = projection(inputs[one])
                    products[id(inputs[one])] = product.chunk(len(projection.part), -1)
                found[one] = products[id(inputs[one])][place]
        return [found[one] for one in range(3)]

    def _nested(self, rows: Tensor, need_weights: bool, average_attn_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Self-attention of sequences of differing lengths, which ``nn.TransformerEncoder`` makes of padded ones."""
        lengths = torch.tensor([sequence.shape[0] for sequence in rows.unbind()], device=rows.device)
        padded = rows.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=rows.device) >= lengths[:, None]
        output, weights = self.forward(
            padded, padded, padded, padding, need_weights, average_attn_weights=average_attn_weights
        )
        sequences = [sequence[:length] for sequence, length in zip(output, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(sequences), weights


def projections(attention: OpenAttention) -> list[Projection]:
    """The products of an opened attention's in-projection."""
    return [child for child in attention._modules.values() if isinstance(child, Projection)]


def parts_of(attention: OpenAttention, name: str) -> list[Any]:
    """The values of an attention's projections that make up its parameter ``name``."""
    found: list[Any] = []
    for projection in projections(attention):
        found += [getattr(projection, leaf) for leaf, packed in projection.packed.items() if packed == name]
    return [value for value in found if value is not None]


def _together(attention: OpenAttention, name: str) -> Tensor | None:
    parts = parts_of(attention, name)
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _added(mask: Tensor | None, name: str, query: Tensor, other: Tensor | None = None) -> Tensor | None:
    """A mask as numbers that are added to scores."""
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other),
        other_name="attn_mask",
        target_type=query.dtype,
        check_other=other is not None,
    )
