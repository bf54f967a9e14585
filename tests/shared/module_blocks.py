"""Blocks of unlike kinds for random module graphs, from and to rows of (batch, tokens, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # everyone's name for it
from torch.utils.checkpoint import checkpoint

BATCH, TOKENS, WIDTH = 24, 16, 16


class Mlp(nn.Module):
    """A residual pair of linear layers with dropout; the activation may work in place."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = (nn.GELU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Tanh())[variant]
        self.drop = nn.Dropout(0.1, inplace=variant == 3)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(self.act(self.up(self.norm(x)))))
        return out


class Conv(nn.Module):
    """A convolution over the tokens as an image, batch normalisation, and an in-place sum and activation."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False, groups=(1, 1, 4, WIDTH)[variant])
        self.norm = nn.GroupNorm(4, WIDTH) if variant == 1 else nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (4, 4))
        out = self.norm(self.conv(image))
        out += image
        return F.relu_(out).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with a mask that may be given; softmax by hand, or torch's kernel."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.all = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.variant = variant

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        heads = [t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.all(x).chunk(3, dim=-1)]
        q, k, v = heads
        if self.variant >= 2:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        else:
            scores = (q @ k.transpose(-1, -2)).mul_(0.5 if scale is None else scale)
            if mask is not None:
                scores = scores.masked_fill_(~mask, -1e9) if mask.dtype == torch.bool else scores.add_(mask)
            share = F.dropout(scores.softmax(-1), 0.1 * self.variant, self.training)
            mixed = share @ v
        out: Tensor = x + self.out(mixed.transpose(1, 2).reshape_as(x))
        return out


class Norm(nn.Module):
    """A normalisation alone, batch statistics among them."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.norm = (
            nn.BatchNorm1d(WIDTH, momentum=None),
            nn.LayerNorm(WIDTH, elementwise_affine=False),
            nn.InstanceNorm1d(WIDTH, track_running_stats=True),
            nn.RMSNorm(WIDTH),
        )[variant]
        self.rows = variant in (1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) if self.rows else self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


class Stateful(nn.Module):
    """Reads and changes buffers in its forward: a running mean, a counter, a spectral norm's vectors."""

    mean: Tensor
    calls: Tensor

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(WIDTH, WIDTH)
        if variant == 1:
            self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        if variant == 2:
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.lerp_(x.detach().float().mean((0, 1)), 0.1)
        out: Tensor = x + torch.tanh(self.linear(x - self.mean))
        return out


class Squashed(torch.autograd.Function):
    """x / (1 + |x|) with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        below = 1 + x.abs()
        ctx.save_for_backward(below)
        return x / below

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (below,) = ctx.saved_tensors
        return grad / below.square()


class Custom(nn.Module):
    """A custom autograd.Function between two layers."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + Squashed.apply(self.linear(x))
        return out


class Experts(nn.Module):
    """Top-2 routing to four experts of equal capacity, by sorting and index_add; or by who asks for which."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.uneven = variant == 3

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        out = torch.zeros_like(flat)
        for number, (expert, part) in enumerate(zip(self.experts, order.chunk(4), strict=True)):
            asked = (chosen.flatten() == number).nonzero().squeeze(1) if self.uneven else part
            rows = asked // 2
            made = expert(flat[rows]) * weights.flatten()[asked].unsqueeze(1)
            out.index_add_(0, rows, made.to(out.dtype))
        return x + out.view_as(x)


class Branches(nn.Module):
    """Branches on one input that join again."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU()) for _ in range(2))
        self.gate = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH), nn.Sigmoid())
        self.joined = variant % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.joined:
            return x + torch.cat(parts, dim=-1) * self.gate(x.mean(1, keepdim=True))
        return x * self.gate(x.mean(1, keepdim=True)) + (parts[0] * parts[1]).mean(-1, keepdim=True)


class Nested(nn.Sequential):
    """Sequentials within a Sequential."""

    def __init__(self, variant: int) -> None:
        inner = nn.Sequential(nn.GELU(), nn.Dropout(0.1))
        if variant == 1:
            inner = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Identity(), nn.Dropout(0.1))
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), inner, nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH))


class Views(nn.Module):
    """Only moves values, or returns a view of its input; no parameters."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (
            lambda: torch.cat([second, first], dim=-1),
            lambda: x.view(BATCH, TOKENS, 2, -1).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH),
            lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda: x[:, :, :],
        )[self.variant]()


class Gated(nn.Module):
    """An in-place change of its own result, or of its input."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 3:
            return x.mul_(0.9).add_(0.1)
        out: Tensor = self.linear(x)
        out.mul_(x.detach().sigmoid())
        if self.variant == 1:
            out[:, :2] = 0.5
        return out.add_(x) if self.variant else out


class Spectrum(nn.Module):
    """Complex numbers within: a filter in the frequency domain."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(TOKENS // 2 + 1, WIDTH, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            waves = torch.fft.rfft(x.float(), dim=1) * torch.view_as_complex(self.filter)
            return x + torch.fft.irfft(waves, n=TOKENS, dim=1)


class Recurrent(nn.Module):
    """One GRU or LSTM layer over the tokens."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.cell = (nn.GRU if variant % 2 else nn.LSTM)(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.cell(x)[0]
        return out


class Narrow(nn.Module):
    """Autocast of its own inside."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.enabled = variant != 3

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            made = F.gelu(self.linear(x))
        return x + made.to(x.dtype)


class Checkpointed(nn.Module):
    """Recomputes a part of itself already."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.inner = Mlp(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


class Detached(nn.Module):
    """A part without a gradient, sorting, a cumulative sum, and what was chosen by comparing."""

    def __init__(self, variant: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            level = x.mean(-1, keepdim=True)
        if self.variant == 0:
            return torch.where(x > level, x * self.scale, 0.1 * x)
        if self.variant == 1:
            return x.gather(1, x.argsort(1)) * self.scale
        if self.variant == 2:
            return (x * self.scale).cumsum(1) / TOKENS
        return (x - level) * self.scale


class Steps(nn.ModuleList):
    """A ModuleList that is a block: the loop over its members is its own."""

    def __init__(self, variant: int) -> None:
        super().__init__([Mlp(0), Mlp(variant), nn.Dropout(0.1)])

    def forward(self, x: Tensor) -> Tensor:
        for member in self:
            x = member(x)
        return x


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": Mlp,
    "conv": Conv,
    "attention": Attention,
    "norm": Norm,
    "stateful": Stateful,
    "custom": Custom,
    "experts": Experts,
    "branches": Branches,
    "nested": Nested,
    "views": Views,
    "gated": Gated,
    "spectrum": Spectrum,
    "recurrent": Recurrent,
    "narrow": Narrow,
    "checkpointed": Checkpointed,
    "detached": Detached,
    "steps": Steps,
}
