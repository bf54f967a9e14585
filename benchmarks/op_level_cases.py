"""The models of ``op_level.py``, at sizes whose plain step takes one to four seconds on two cores.

All methods on all of them then take about half an hour. Vocabularies are cut to 2048, so that the blocks matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tests import models
from tests.models import Case

__all__ = ["CASES", "DEVICE"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 16 if DEVICE == "cuda" else 1  # how many times the batch of the CPU


def _gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_positions=256, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 2048, (2 * SCALE, 256))
    return models._keywords(GPT2LMHeadModel(config), input_ids=ids, labels=ids)


def _llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    ids = torch.randint(0, 2048, (2 * SCALE, 256))
    return models._keywords(LlamaForCausalLM(config), input_ids=ids, labels=ids)


def _resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    images, labels = torch.randn(8 * SCALE, 3, 160, 160), torch.randint(0, 2, (8 * SCALE,))
    return models._keywords(ResNetForImageClassification(ResNetConfig()), pixel_values=images, labels=labels)


def _vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    images, labels = torch.randn(4 * SCALE, 3, 224, 224), torch.randint(0, 2, (4 * SCALE,))
    return models._keywords(ViTForImageClassification(config), pixel_values=images, labels=labels)


def _unet() -> Case:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=24,
        block_out_channels=(64, 128, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
    )
    return models._keywords(
        model,
        sample=torch.randn(4 * SCALE, 4, 24, 24),
        timestep=torch.full((4 * SCALE,), 3),
        encoder_hidden_states=torch.randn(4 * SCALE, 77, 256),
    )


CASES: Mapping[str, Callable[[], Case]] = {
    "GPT-2, 12 layers, 768": _gpt2,
    "Llama, 8 layers, 1024, GQA": _llama,
    "ResNet-50": _resnet,
    "ViT, 12 layers, 384": _vit,
    "U-Net": _unet,
}
