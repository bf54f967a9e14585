"""Make the cases of ``benchmarks.coverage_cases``: a model of a library by name, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.shared.models import Case, keywords

BATCH, TOKENS, VOCABULARY, PIXELS = 4, 32, 128, 32
Make = Callable[[], Case]

# What most configurations call their sizes. transformers maps the names that an older configuration has for
# them.
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS_OF_16 = {**GROUPED, "head_dim": 16}
SEQUENCES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
VISION: Mapping[str, Any] = {
    "image_size": PIXELS,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 10,
}
SPEECH = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "pad_token_id": 0,
}
EXPERTS = {**HEADS_OF_16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "output_router_logits": True}


def token_ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, tokens))


def _model(name: str, config: Any) -> Any:
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**config) if isinstance(config, Mapping) else config)


def text(name: str, config: Mapping[str, Any], *, masked: bool = True, tokens: int = TOKENS) -> Make:
    """A language model, causal or not; the first row is padded unless the model takes no mask."""

    def make() -> Case:
        ids = token_ids(tokens)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, -5:] = 0
            batch["labels"][0, -5:] = -100
        return keywords(_model(name, config), **batch)

    return make


def translation(name: str, config: Mapping[str, Any], tokens: int = TOKENS) -> Make:
    """An encoder and a decoder of text."""

    def make() -> Case:
        ids = token_ids(tokens)
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        return keywords(_model(name, config), input_ids=ids, attention_mask=mask, labels=token_ids(24))

    return make


def images(name: str, config: Mapping[str, Any], pixels: int = PIXELS, **batch: Callable[[], Any]) -> Make:
    """A model of images; labels of classes unless ``batch`` has others."""

    def make() -> Case:
        more = {key: value() for key, value in batch.items()} or {"labels": torch.randint(0, 10, (BATCH,))}
        return keywords(_model(name, config), pixel_values=torch.randn(BATCH, 3, pixels, pixels), **more)

    return make


def sound(name: str, config: Mapping[str, Any]) -> Make:
    """A model of raw sound with a CTC loss."""

    def make() -> Case:
        return keywords(
            _model(name, config),
            input_values=torch.randn(BATCH, 3200),
            attention_mask=torch.ones(BATCH, 3200, dtype=torch.long),
            labels=torch.randint(1, VOCABULARY, (BATCH, 8)),
        )

    return make


def spectrogram(
    name: str, config: Mapping[str, Any], key: str, *shape: int, labels: Callable[[], Tensor]
) -> Make:
    """A model of spectrograms."""
    return lambda: keywords(_model(name, config), **{key: torch.randn(BATCH, *shape)}, labels=labels())


def pairs(name: str, **config: Any) -> Make:
    """Images with texts, by a contrastive loss."""

    def make() -> Case:
        import transformers

        cls = getattr(transformers, name)
        text_config = {**TEXT, "num_hidden_layers": 2, "projection_dim": 32}
        vision = {**VISION, "num_hidden_layers": 2, "projection_dim": 32}
        settings = cls.config_class(text_config=text_config, vision_config=vision, **config)
        pixels = torch.randn(BATCH, 3, PIXELS, PIXELS)
        return keywords(cls(settings), input_ids=token_ids(16), pixel_values=pixels, return_loss=True)

    return make


def diffusion(name: str, config: Mapping[str, Any], **batch: Callable[[], Any]) -> Make:
    """A model of diffusers."""

    def make() -> Case:
        import diffusers

        return keywords(getattr(diffusers, name)(**config), **{key: value() for key, value in batch.items()})

    return make


def detection(name: str, config: Callable[[], Any]) -> Make:
    """A detector that matches its boxes to those of the labels, on the CPU, step by step."""

    def make() -> Case:
        labels = [
            {"class_labels": torch.randint(0, 10, (2,)), "boxes": torch.rand(2, 4) * 0.5 + 0.2}
            for _ in range(BATCH)
        ]
        pixels = torch.randn(BATCH, 3, 64, 64)
        return keywords(_model(name, config()), pixel_values=pixels, labels=labels)

    return make


def detr_config() -> Any:
    import transformers

    configs: Any = transformers  # whose dataclasses do not tell mypy all that they take
    backbone = configs.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {k: v for k, v in SEQUENCES.items() if k not in ("vocab_size", "max_position_embeddings")}
    return configs.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        num_queries=8, num_labels=10, **sizes,
    )  # fmt: skip # one table


def llava() -> Case:
    """Images as tokens of a Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(**HEADS_OF_16),
        image_token_index=3,
    )
    ids = token_ids() % (VOCABULARY - 4) + 4
    ids[:, :16] = 3
    model = LlavaForConditionalGeneration(config)
    pixels = torch.randn(BATCH, 3, PIXELS, PIXELS)
    return keywords(model, input_ids=ids, pixel_values=pixels, labels=ids.clone())


def timesteps(high: int = 1000) -> Tensor:
    return torch.randint(0, high, (BATCH,))


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, *shape)


LATENT = noise(4, 16, 16)
MAPS = lambda: torch.randint(0, 10, (BATCH, 64, 64))  # noqa: E731 # a table's entry
