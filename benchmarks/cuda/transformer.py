"""A GPT in plain PyTorch, which most checks train: transformers takes seconds to import."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cuda.machine import Machine
from tests.shared.models import Case

__all__ = ["Gpt", "gpt"]

HEAD = 64  # width of a head on a GPU


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm, with dropout in and after both."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))
        result: Tensor = x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))
        return result


class Gpt(nn.Module):
    """An embedding, blocks and a head; gives the loss of guessing each token's own id."""

    def __init__(self, layers: int, width: int, heads: int, dropout: float, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, tokens) to a scalar."""
        logits = self.head(self.blocks(self.embedding(ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def gpt(
    machine: Machine,
    dropout: float = 0.0,
    *,
    layers: int = 4,
    width: int = 256,
    batch: int = 4,
    tokens: int = 128,
    vocabulary: int = 512,
) -> Case:
    """A GPT of that size on a GPU; in the dry run of 2 layers of 32 on 2 x 32 tokens."""
    torch.manual_seed(0)
    if not machine.cuda:
        layers, width, batch, tokens, vocabulary = 2, 32, 2, min(tokens, 32), 64
    model = Gpt(layers, width, machine.pick(width // HEAD, 2), dropout, vocabulary)
    ids = torch.randint(0, vocabulary, (batch, tokens))
    return Case(model.train(), ids, (ids,))
