"""The models of ``op_level.py``, at sizes whose plain step takes one to four seconds on two cores.

All methods on all of them then take about half an hour. Vocabularies are cut to 2048, so that the blocks
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tests.shared import models
from tests.shared.models import Case

__all__ = ["CASES", "DEVICE"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 16 if DEVICE == "cuda" else 1  # how many times the batch of the CPU


LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
VIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
CASES: Mapping[str, Callable[[], Case]] = {
    "GPT-2, 12 layers, 768": lambda: models.make_gpt2(2 * SCALE, 256, 2048),
    "Llama, 8 layers, 1024, GQA": lambda: models.make_llama(2 * SCALE, 256, 2048, **LLAMA),
    "ResNet-50": lambda: models.make_resnet(8 * SCALE, 160),
    "ViT, 12 layers, 384": lambda: models.make_vit(4 * SCALE, 224, **VIT),
    "U-Net": lambda: models.make_unet(4 * SCALE, 24, 77, (64, 128, 256)),
}
