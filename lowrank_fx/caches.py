"""Letting ``torch.export`` see into the key-value caches that Hugging Face models return.

A class that pytree does not know cannot be an output of a graph. transformers can register its ``DynamicCache``; the
pair of them that encoder-decoder models return is registered here.
"""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


def register_caches() -> bool:
    """Register the caches of transformers, if it is installed; whether anything is known now that was not before."""
    try:
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:
        return False
    before = len(pytree.SUPPORTED_NODES)
    register_dynamic_cache_export_support()  # type: ignore[no-untyped-call,unused-ignore]
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            _flatten,
            lambda children, context: EncoderDecoderCache(*children),  # type: ignore[no-untyped-call,unused-ignore]
            serialized_type_name=f"{EncoderDecoderCache.__module__}.{EncoderDecoderCache.__name__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )
    return len(pytree.SUPPORTED_NODES) > before


def _flatten(cache: Any) -> tuple[list[Any], None]:
    return [cache.self_attention_cache, cache.cross_attention_cache], None


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    names = ("self_attention_cache", "cross_attention_cache")
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in names], None
