"""Draw random module graphs, and build their models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.shared.module_blocks import BATCH, KINDS, TOKENS, WIDTH


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        glue: what the model itself does with its output.
        state: "train", "frozen", or "eval" (frozen too).
    """

    kind: str
    variant: int
    glue: str
    state: str


@dataclass(frozen=True)
class Recipe:
    """A model, how it is planned for, and how it is trained.

    Attributes:
        shares: what two blocks share: nothing, a parameter, or everything.
        share: of the way from the smallest budget to keeping all.
    """

    seed: int
    blocks: tuple[Block, ...]
    layout: str
    output: str
    shares: str
    stem: str
    mask: str
    embedded: bool
    input_grad: bool
    autocast: str
    capture: str
    costs: str
    share: float
    procedure: str


class Threaded(nn.Module):
    """A block within a tuple or dict of values that all blocks pass on: rows, a float, integers, None."""

    def __init__(self, inner: nn.Module, kind: type) -> None:
        super().__init__()
        self.inner = inner
        self.kind = kind

    def forward(self, state: Any) -> Any:
        x, level, _, nothing = state.values() if self.kind is dict else state
        x = self.inner(x)
        passed = (x, level + x.float().square().mean((1, 2)), x.detach().argmax(-1), nothing)
        return dict(zip("xlin", passed, strict=True)) if self.kind is dict else passed


class Crossed(nn.Module):
    """A block of a decoder: it reads what the encoder gave, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, y: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.query(y) @ memory.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
        mixed: Tensor = self.inner(y + scores.softmax(-1) @ memory)
        return mixed


class Masked(nn.Module):
    """A block that is given more than it may need: a mask, a number, a note."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.masks = hasattr(inner, "all")

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, note: str | None = None
    ) -> Tensor:
        if self.masks:
            return self.inner(x, mask, 0.5 * scale)
        if mask is not None and note:
            gate = mask[:, :1].to(x.dtype) if mask.dtype == torch.bool else mask[:, :1].sigmoid()
            return self.inner(x) * (1 + scale * gate.unsqueeze(0)).transpose(1, 2)
        return self.inner(x) * scale


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "tuple": lambda inner: Threaded(inner, tuple),
    "dict": lambda inner: Threaded(inner, dict),
    "external": Masked,
    "keywords": Masked,
}


class Graph(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(9, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.1)
        self.mask = nn.Parameter(torch.randn(TOKENS, TOKENS) * 0.1)
        blocks = [KINDS[block.kind](block.variant) for block in recipe.blocks]
        for spec, block in zip(recipe.blocks, blocks, strict=True):
            if spec.state != "train":
                block.requires_grad_(False)
            if spec.state == "eval":
                block.eval()
        self.evaluating = [
            block for spec, block in zip(recipe.blocks, blocks, strict=True) if spec.state == "eval"
        ]
        self._share(blocks)
        wrapper = WRAPPERS.get(recipe.layout, lambda inner: inner)
        half = len(blocks) // 2
        wrapped = [
            wrapper(b) if i < half or recipe.layout != "encoder" else Crossed(b) for i, b in enumerate(blocks)
        ]
        first = wrapped[:half] if recipe.layout in ("encoder", "branches", "nested") else wrapped
        self.blocks = (
            nn.Sequential if recipe.layout in ("sequential", "tuple", "nested") else nn.ModuleList
        )(*(first if recipe.layout in ("sequential", "tuple", "nested") else [first]))
        self.more = nn.ModuleList(wrapped[len(first) :])
        self.head = nn.Linear(WIDTH, 5)
        if recipe.stem == "frozen":
            self.stem.requires_grad_(False)

    def _share(self, blocks: list[nn.Module]) -> None:
        """Let the last block be the first one, or have a parameter of it."""
        if self.recipe.shares == "module":
            blocks[-1] = blocks[0]
        if self.recipe.shares == "parameter":
            for (name, ours), (other, theirs) in itertools.product(
                blocks[0].named_parameters(), blocks[-1].named_parameters()
            ):
                if ours.shape == theirs.shape and "parametrizations" not in name + other:
                    path, _, leaf = other.rpartition(".")
                    setattr(blocks[-1].get_submodule(path), leaf, ours)
                    return

    def train(self, mode: bool = True) -> Graph:
        super().train(mode)
        for block in self.evaluating:
            block.eval()
        return self

    def forward(
        self, x: Tensor, mask: Tensor | None = None, ids: Tensor | None = None, note: str | None = "n"
    ) -> Any:
        with torch.autocast("cpu", torch.bfloat16) if self.recipe.autocast == "inside" else nullcontext():
            mask = self.mask if self.recipe.mask == "learned" else mask
            x = x if self.recipe.stem == "none" else self.stem(x)
            if ids is not None:
                x = x + self.table(ids)
            self.first = x
            hidden: list[Tensor] = []
            x = getattr(self, f"_{self.recipe.layout}")(x, mask, note, hidden)
            del self.first
            return self._output(x, hidden)

    def _output(self, x: Tensor, hidden: list[Tensor]) -> Any:
        rows = self.head(x)
        loss = F.cross_entropy(rows.flatten(0, 1).float(), torch.arange(BATCH * TOKENS) % 5)
        return {
            "loss": lambda: loss,
            "rows": lambda: rows,
            "tuple": lambda: (loss, rows, [x, None], x.detach().argmax(-1)),
            "dict": lambda: {"loss": loss, "nothing": None, "note": "a note", "number": 3, "last": x},
            "hidden": lambda: (loss, hidden or [x]),
        }[self.recipe.output]()

    def _glue(self, number: int, x: Tensor) -> Tensor:
        kind = self.recipe.blocks[number].glue
        if kind == "stem":
            return torch.cat([x[..., : WIDTH // 2], self.first[..., WIDTH // 2 :].to(x.dtype)], dim=-1)
        return {
            "none": lambda: x,
            "gelu": lambda: F.gelu(x),
            "relu_": lambda: F.relu_(x + 0.1),
            "mul_": lambda: x.mul_(0.9),
            "parameter": lambda: x + self.position,
            "view": lambda: x.reshape(-1, WIDTH).view(BATCH, TOKENS, WIDTH),
            "dropout": lambda: F.dropout(x, 0.1, self.training),
        }[kind]()

    def _sequential(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        out: Tensor = self.blocks(x)
        return out

    def _loop(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = self._glue(number, block(x))
            hidden.append(x)
        return x

    def _external(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = self._glue(number, block(x, mask, 1.0 - 0.1 * number, note))
        return x

    def _keywords(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = self._glue(number, block(x=x, note=note, mask=mask))
        return x

    def _tuple(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        x, level, chosen, _ = self.blocks((x, x.new_zeros(()), None, None))
        hidden += [level, chosen]
        return x * level.mean()

    def _dict(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        passed: dict[str, Any] = {"x": x, "l": x.new_zeros(()), "i": None, "n": None}
        for number, block in enumerate(self.blocks):
            passed = block(passed)
            passed["x"] = self._glue(number, passed["x"])
        hidden.append(passed["l"])
        out: Tensor = passed["x"]
        return out

    def _skips(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        count, skips = len(self.blocks), list[Tensor]()
        for number, block in enumerate(self.blocks):
            if number >= (count + 1) // 2 and skips:
                x = x + skips.pop()
            x = self._glue(number, block(x))
            if number < count // 2:
                skips.append(x)
        return x

    def _history(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        for number, block in enumerate(self.blocks):
            hidden.append(x)
            x = self._glue(number, block(torch.stack(hidden).mean(0) if number % 2 else x))
        return x

    def _encoder(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x)
        hidden.append(x)
        y = self.first.flip(1) + self.position
        for number, block in enumerate(self.more):
            y = self._glue(number, block(y, x, mask))
        return y

    def _twice(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        for _ in range(2):
            for number, block in enumerate(self.blocks):
                x = self._glue(number, block(x))
        return x

    def _branches(self, x: Tensor, mask: Any, note: Any, hidden: Any) -> Tensor:
        one, other = x, x
        for number, (left, right) in enumerate(itertools.zip_longest(self.blocks, self.more)):
            one = self._glue(number, left(one)) if left is not None else one
            other = right(other) if right is not None else other
        return one + other

    def _nested(self, x: Tensor, mask: Any, note: Any, hidden: list[Tensor]) -> Tensor:
        x = self.blocks(x)
        hidden.append(x)
        for number, block in enumerate(self.more):
            x = self._glue(number, block(x))
        return x
