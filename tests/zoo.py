"""The zoo: architectures that people use, small, with random weights, and batches for each.

Layers keep their true kinds; pictures are small, sequences short, and what a language model repeats dozens of times
comes twice. :func:`make` gives what a trained model would have and a fresh one has not: scales that are not one, biases
that are not zero, branches that are not switched off, running statistics of real activations. Without that a parity
check would compare zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_modules import (
    VOCABULARY,
    Encoder,
    Experts,
    LSTMClassifier,
    Router,
    TemporalNet,
    Translator,
    UNet,
    VideoNet,
)

Batch = Any
BATCHES, ROWS, TOKENS = 5, 8, 24


@dataclass(frozen=True)
class Entry:
    """One architecture: its family, the model, and one batch from a generator."""

    family: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]


def make(name: str) -> tuple[nn.Module, list[Batch]]:
    """A model of the zoo in eval mode and its five batches, the same on every call."""
    entry = ZOO[name]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = entry.model()
    batches = [entry.batch(torch.Generator().manual_seed(seed)) for seed in range(BATCHES)]
    enliven(model, batches[0])
    return model.eval(), batches


def call(model: nn.Module, batch: Batch) -> Any:
    """The output of a model for one batch of the zoo."""
    with torch.no_grad():
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with every tensor changed."""
    if isinstance(batch, dict):
        return {key: change(value) for key, value in batch.items()}
    return tuple(map(change, batch)) if isinstance(batch, tuple) else change(batch)


def enliven(model: nn.Module, batch: Batch) -> None:
    """Give every constant parameter random values, and batch norms the statistics of a batch."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            value = float(parameter.flatten()[0])
            constant = bool((parameter == value).all())
            if parameter.numel() > max(parameter.shape):
                usual = parameter[0].numel() ** -0.5
                if float(parameter.std()) < 0.1 * usual:  # a head that starts near zero, a table of position biases
                    parameter.copy_(noise(parameter) * usual)
            elif not constant:
                continue
            elif abs(value) >= 0.5:  # the scale of a norm
                parameter.mul_(1 + 0.2 * noise(parameter))
            elif value == 0 and not name.endswith("weight"):  # a bias
                parameter.copy_(0.1 * noise(parameter))
            else:  # a scale that starts near zero, so that its branch does nothing
                parameter.copy_(0.5 + 0.1 * noise(parameter))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        model.eval()
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        call(model, batch)
        model.train()  # forgets what the call may have cached


# ---- batches ---------------------------------------------------------------------------------------------------------


def pictures(size: int, channels: int = 3) -> Callable[[torch.Generator], Batch]:
    return lambda generator: torch.randn(ROWS, channels, size, size, generator=generator)


def values(*shape: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: torch.randn(ROWS, *shape, generator=generator)


def ids(generator: torch.Generator, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, tokens), generator=generator)


def padded(generator: torch.Generator) -> Batch:
    """Token ids and the mask of right-padded rows of different lengths."""
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1), generator=generator)
    return {"input_ids": ids(generator), "attention_mask": (torch.arange(TOKENS) < lengths).long()}


def only_ids(generator: torch.Generator) -> Batch:
    return {"input_ids": ids(generator)}


def sequence_pairs(generator: torch.Generator) -> Batch:
    return {**padded(generator), "decoder_input_ids": ids(generator, 12)}


def captioned(generator: torch.Generator) -> Batch:
    return {**padded(generator), "pixel_values": torch.randn(ROWS, 3, 64, 64, generator=generator)}


def speech(generator: torch.Generator) -> Batch:
    return {
        "input_features": torch.randn(ROWS, 80, 64, generator=generator),
        "decoder_input_ids": ids(generator, 12),
    }


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm_entry(name: str, size: int = 64, **options: Any) -> Entry:
    def model() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, num_classes=64, **options)
        return made

    return Entry("timm", model, pictures(size))


# ---- transformers ----------------------------------------------------------------------------------------------------

_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_DECODER: dict[str, Any] = {
    **_ENCODER,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def hf_entry(
    model: str,
    config: str,
    batch: Callable[[torch.Generator], Batch],
    nested: dict[str, Any] | None = None,
    **options: Any,
) -> Entry:
    """A model class of transformers with a configuration; ``nested`` holds configurations inside of it."""

    def build() -> nn.Module:
        import transformers

        # At a width of 64 the usual 0.02 would make every layer's output next to nothing beside its residual.
        spread = {} if nested else {"initializer_range": 0.1}
        chosen = getattr(transformers, config)(**spread, **(nested or {}), **options)
        made: nn.Module = getattr(transformers, model)(chosen)
        return made

    return Entry("transformers", build, batch)


# ---- plain torch -----------------------------------------------------------------------------------------------------


def token_pairs(generator: torch.Generator) -> Batch:
    return ids(generator), ids(generator, 12)


def plain(model: Callable[[], nn.Module], batch: Callable[[torch.Generator], Batch]) -> Entry:
    return Entry("torch", model, batch)


# ---- the list --------------------------------------------------------------------------------------------------------

_CLIP: dict[str, Any] = {
    "text_config": {**_ENCODER, "num_hidden_layers": 2, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 2},
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 64,
        "patch_size": 16,
        "initializer_range": 0.1,
    },
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_source_positions": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "init_std": 0.1,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
}

ZOO: dict[str, Entry] = {
    "resnet18": timm_entry("resnet18", zero_init_last=False),
    "resnet50": timm_entry("resnet50", zero_init_last=False),
    "resnext26ts": timm_entry("resnext26ts"),
    "convnext_femto": timm_entry("convnext_femto"),
    "convnextv2_nano": timm_entry("convnextv2_nano"),
    "deit3_small": timm_entry("deit3_small_patch16_224", img_size=64),
    "vit_tiny": timm_entry("vit_tiny_patch16_224", img_size=64),
    "swinv2_cr_tiny": timm_entry("swinv2_cr_tiny_ns_224", img_size=64, window_size=2),
    "swin_tiny": timm_entry("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
    "mobilevitv2_200": timm_entry("mobilevitv2_200"),
    "efficientformerv2_s2": timm_entry("efficientformerv2_s2", img_size=64),
    "rexnetr_200": timm_entry("rexnetr_200"),
    "mobilenetv3": timm_entry("mobilenetv3_large_100"),
    "efficientnet_b0": timm_entry("efficientnet_b0"),
    "regnety_004": timm_entry("regnety_004"),
    "mixer_s16": timm_entry("mixer_s16_224", img_size=64),
    "beit": timm_entry("beit_base_patch16_224", img_size=64, depth=3, embed_dim=192, num_heads=3),
    "eva02_tiny": timm_entry("eva02_tiny_patch14_224", size=56, img_size=56),
    "vgg16": timm_entry("vgg16", mlp_ratio=1 / 16),
    "densenet121": timm_entry("densenet121"),
    "inception_v3": timm_entry("inception_v3", size=96),
    "bert": hf_entry("BertModel", "BertConfig", padded, num_hidden_layers=2, **_ENCODER),
    "distilbert": hf_entry(
        "DistilBertModel",
        "DistilBertConfig",
        padded,
        vocab_size=VOCABULARY,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
    ),
    "roberta": hf_entry("RobertaForSequenceClassification", "RobertaConfig", padded, num_hidden_layers=2, **_ENCODER),
    "albert": hf_entry("AlbertModel", "AlbertConfig", padded, embedding_size=32, num_hidden_layers=3, **_ENCODER),
    "gpt2": hf_entry(
        *("GPT2LMHeadModel", "GPT2Config", padded),
        n_layer=2,
        n_embd=64,
        n_head=4,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": hf_entry("LlamaForCausalLM", "LlamaConfig", padded, **_DECODER),
    "mistral": hf_entry("MistralForCausalLM", "MistralConfig", padded, sliding_window=8, **_DECODER),
    "qwen2_tied": hf_entry("Qwen2ForCausalLM", "Qwen2Config", padded, tie_word_embeddings=True, **_DECODER),
    "t5": hf_entry("T5ForConditionalGeneration", "T5Config", sequence_pairs, decoder_start_token_id=0, **_T5),
    "vit_hf": hf_entry(
        *("ViTForImageClassification", "ViTConfig", pictures(64)),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=16,
    ),
    "clip": hf_entry("CLIPModel", "CLIPConfig", captioned, nested=_CLIP),
    "whisper": hf_entry("WhisperForConditionalGeneration", "WhisperConfig", speech, **_WHISPER),
    "mamba": hf_entry(
        *("MambaForCausalLM", "MambaConfig", only_ids),
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
    ),
    "unet": plain(UNet, pictures(32)),
    "lstm_classifier": plain(LSTMClassifier, only_ids),
    "transformer": plain(Translator, token_pairs),
    "transformer_encoder": plain(Encoder, values(TOKENS, 64)),
    "weight_norm_tcn": plain(TemporalNet, values(64, 48)),
    "video_3d": plain(VideoNet, values(3, 4, 16, 16)),
    "experts": plain(Experts, values(TOKENS, 32)),
    "router": plain(Router, values(32)),
}

SAMPLE = (
    *("mobilenetv3", "distilbert", "albert", "gpt2", "qwen2_tied"),
    *("t5", "unet", "transformer", "video_3d", "router"),
)
"""Ten for every run of the slow tests: batch norms, depthwise, grouped and 3-D convolutions, a layer called several
times, ``Conv1D``, tied heads, an encoder with a decoder, packed projections, transposed convolutions, and no graph."""


def weights(model: nn.Module) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every floating parameter of two or more dimensions once, with all the names it has."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2 and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
            found[id(parameter)] = parameter
    yield from ((tuple(names[key]), tensor) for key, tensor in found.items())
