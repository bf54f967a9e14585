"""Small real models in train mode, each with a batch whose activations outweigh the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.shared.runs import CountsRuns


@dataclass(frozen=True)
class Case:
    """A model and a batch for it.

    Attributes:
        model: in train mode.
        sample: as ``solve`` takes it.
        args, kwargs: the same batch, as the model is called.
    """

    model: nn.Module
    sample: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Any:
        """The output of ``model``, plain or planned, on the batch."""
        return model(*self.args, **self.kwargs)


class Residual(nn.Module):
    """conv, BatchNorm, in-place ReLU, Dropout, conv, BatchNorm, and the skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop(self.act(self.norm1(self.first(x))))
        out = self.norm2(self.second(out))
        out += x
        result: Tensor = self.act(out)
        return result


class ResidualNet(nn.Module):
    """A stem, residual blocks and a classifier; returns the loss, or logits without labels."""

    def __init__(self, channels: int = 8, blocks: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.blocks = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


class Block(CountsRuns):
    """Linear, BatchNorm, GELU, Dropout, and the skip. Counts how often its code runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        result: Tensor = x + self.drop(self.act(self.norm(self.linear(x))))
        return result


def tiny() -> Case:
    """What the tests of single features use: six blocks that take no time."""
    torch.manual_seed(0)
    batch = torch.randn(64, 16)
    return Case(nn.Sequential(*(Block(16) for _ in range(6)), nn.Linear(16, 4)).train(), batch, (batch,))


def mlp() -> Case:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(64)]
    batch = torch.randn(1024, 64)
    return Case(nn.Sequential(*layers, nn.Linear(64, 16)).train(), batch, (batch,))


def residual() -> Case:
    torch.manual_seed(2)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    return Case(ResidualNet().train(), (images, labels), (images, labels))


class FeedForward(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return out


class Stack(nn.Module):
    """Blocks and a head."""

    def __init__(self, width: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x).square().mean()
        return loss


def stack(seed: int = 0) -> Case:
    torch.manual_seed(seed)
    batch = torch.randn(64, 16)
    return Case(Stack().train(), batch, (batch,))


# Models of transformers and diffusers, in any size, with random weights and a random batch.


def keywords(model: Any, **batch: Any) -> Case:
    """A model that is called with keywords."""
    return Case(model.train(), batch, (), batch)


def _language(model: nn.Module, batch: int, tokens: int, vocabulary: int) -> Case:
    ids = torch.randint(0, vocabulary, (batch, tokens))
    return keywords(model, input_ids=ids, labels=ids)


def _images(model: nn.Module, batch: int, pixels: int, labels: int = 2) -> Case:
    return keywords(
        model, pixel_values=torch.randn(batch, 3, pixels, pixels), labels=torch.randint(0, labels, (batch,))
    )


def make_gpt2(batch: int, tokens: int, vocabulary: int, **config: Any) -> Case:
    """A GPT-2, 12 layers of 768 unless told, dropout included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(vocab_size=vocabulary, n_positions=tokens, bos_token_id=0, eos_token_id=0, **config)
    return _language(GPT2LMHeadModel(settings), batch, tokens, vocabulary)


def make_llama(batch: int, tokens: int, vocabulary: int, **config: Any) -> Case:
    """A Llama; ``config`` gives at least its widths, layers and heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _language(
        LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **config)), batch, tokens, vocabulary
    )


def make_resnet(batch: int, pixels: int, **config: Any) -> Case:
    """A ResNet, ResNet-50 unless told."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return _images(
        ResNetForImageClassification(ResNetConfig(**config)), batch, pixels, config.get("num_labels", 2)
    )


def make_vit(batch: int, pixels: int, **config: Any) -> Case:
    """A vision transformer with dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    settings = ViTConfig(
        image_size=pixels, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, **config
    )
    return _images(ViTForImageClassification(settings), batch, pixels, config.get("num_labels", 2))


def make_unet(batch: int, pixels: int, context: int, channels: tuple[int, ...], **config: Any) -> Case:
    """A diffusion U-Net with cross-attention to ``context`` tokens on all levels but the last."""
    from diffusers import UNet2DConditionModel

    inner = len(channels) - 1
    width = config.setdefault("cross_attention_dim", channels[-1])
    model = UNet2DConditionModel(
        sample_size=pixels,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
        **config,
    )
    return keywords(
        model,
        sample=torch.randn(batch, 4, pixels, pixels),
        timestep=torch.randint(0, 1000, (batch,)),
        encoder_hidden_states=torch.randn(batch, context, width),
    )


# The same, small.


def gpt2(layers: int = 4) -> Case:
    torch.manual_seed(3)
    return make_gpt2(8, 64, 128, n_layer=layers, n_embd=64, n_head=4)


def llama(layers: int = 4) -> Case:
    torch.manual_seed(4)
    return make_llama(
        8,
        64,
        128,
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )


def resnet(batch: int = 24) -> Case:
    torch.manual_seed(5)
    return make_resnet(
        batch,
        64,
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )


def vit(layers: int = 4) -> Case:
    torch.manual_seed(6)
    return make_vit(
        8,
        64,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        patch_size=8,
        num_labels=10,
    )


def unet(layers: int = 2) -> Case:
    """Layers are those of each block of the way down; each of the way up has one more."""
    torch.manual_seed(7)
    return make_unet(
        4,
        16,
        8,
        (16, 32),
        layers_per_block=layers,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        dropout=0.1,
    )


SEVEN: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "residual": residual,
    "gpt2": gpt2,
    "llama": llama,
    "resnet": resnet,
    "vit": vit,
    "unet": unet,
}
# What the tests share. A U-Net with one layer a block has every kind of stage and skip, and two thirds of the
# stages; transformers of two layers have the first block, the last one, and the skips between.
BUILDERS: dict[str, Callable[[], Case]] = {
    "tiny": tiny,
    **SEVEN,
    "gpt2": functools.partial(gpt2, 2),
    "llama": functools.partial(llama, 2),
    "vit": functools.partial(vit, 2),
    "unet": functools.partial(unet, 1),
}
