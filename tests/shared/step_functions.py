"""Steps of more than one call of a model, as users write them, each with its modules and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, ROWS = 32, 128


@dataclass(frozen=True)
class StepCase:
    """A step function, the modules that it uses, and a batch."""

    function: Callable[..., Any]
    modules: list[nn.Module]
    batch: tuple[Any, ...]


class Encoder(nn.Module):
    """Residual layers of a linear map, GELU, dropout and a norm."""

    def __init__(self, layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(WIDTH))
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        found: Tensor = self.head(x)
        return found


def rows(count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(ROWS, WIDTH) for _ in range(count))


def simcse() -> StepCase:
    """Two passes of one encoder, which differ by dropout; InfoNCE outside of it; a closure."""
    encoder = Encoder()

    def contrastive(x: Tensor) -> Tensor:
        one, other = encoder(x), encoder(x)
        alike = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T / 0.05
        return F.cross_entropy(alike, torch.arange(len(x)))

    return StepCase(contrastive, [encoder], rows(1))


class GanTrainer:
    """Bound methods of an object that holds the networks."""

    def __init__(self) -> None:
        self.generator, self.critic = Encoder(), Encoder()

    def critic_loss(self, real: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.generator(noise)
        return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()

    def generator_loss(self, noise: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(noise))).mean()


def gan_critic() -> StepCase:
    trainer = GanTrainer()
    return StepCase(trainer.critic_loss, [trainer.generator, trainer.critic], rows(2))


def gan_generator() -> StepCase:
    trainer = GanTrainer()
    trainer.critic.requires_grad_(False)
    return StepCase(trainer.generator_loss, [trainer.generator, trainer.critic], rows(1))


def siamese() -> StepCase:
    """Three calls and a triplet loss; a lambda."""
    encoder = Encoder()
    return StepCase(
        lambda anchor, near, far: F.triplet_margin_loss(encoder(anchor), encoder(near), encoder(far)),
        [encoder],
        rows(3),
    )


def preference_loss(policy: nn.Module, reference: nn.Module, chosen: Tensor, rejected: Tensor) -> Tensor:
    """DPO: log probabilities of two answers under two models."""

    def log_ratio(model: nn.Module) -> Tensor:
        found: Tensor = model(chosen).log_softmax(-1)[:, 0] - model(rejected).log_softmax(-1)[:, 0]
        return found

    with torch.no_grad():
        before = log_ratio(reference)
    return -F.logsigmoid(0.1 * (log_ratio(policy) - before)).mean()


def dpo() -> StepCase:
    """A partial, with a frozen reference in eval mode."""
    policy, reference = Encoder(), Encoder().requires_grad_(False).eval()
    return StepCase(functools.partial(preference_loss, policy, reference), [policy, reference], rows(2))


class Distillation:
    """A callable object with its networks in a dict; it gives more than the loss."""

    def __init__(self) -> None:
        self.networks = {"student": Encoder(), "teacher": Encoder(5)}

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            soft = self.networks["teacher"](x).softmax(-1)
        logits = self.networks["student"](x)
        loss = F.kl_div(logits.log_softmax(-1), soft, reduction="batchmean") + F.cross_entropy(logits, labels)
        return loss, {"logits": logits.detach()}


def distillation() -> StepCase:
    step = Distillation()
    return StepCase(step, [*step.networks.values()], (*rows(1), torch.randint(0, WIDTH, (ROWS,))))


def multi_task() -> StepCase:
    """Several heads, weights of the losses that are learnt, a batch that is a dict."""
    encoder = Encoder()
    heads = nn.ModuleDict({task: nn.Linear(WIDTH, WIDTH) for task in "abc"})
    weights = nn.ParameterDict({task: nn.Parameter(torch.zeros(())) for task in "abc"})

    def weighted(batch: dict[str, Tensor]) -> Tensor:
        hidden = encoder(batch["x"])
        losses = [
            F.cross_entropy(head(hidden), batch[task]) * torch.exp(-weights[task]) + weights[task]
            for task, head in heads.items()
        ]
        return torch.stack(losses).sum()

    labels = {task: torch.randint(0, WIDTH, (ROWS,)) for task in "abc"}
    return StepCase(weighted, [encoder, heads, weights], ({"x": rows(1)[0], **labels},))


def gradient_penalty() -> StepCase:
    """WGAN-GP: a gradient of the critic is part of its loss."""
    critic = Encoder(dropout=0.0)

    def wasserstein(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
        mixed = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.norm(2, dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    return StepCase(wasserstein, [critic], (*rows(2), torch.rand(ROWS, 1)))


def maml() -> StepCase:
    """An inner step of SGD on half of the batch; its effect on the other half is reversed through it."""
    network = Encoder(dropout=0.0)

    def meta(x: Tensor, y: Tensor, x_after: Tensor, y_after: Tensor) -> Tensor:
        before: dict[str, Tensor] = dict(network.named_parameters())
        loss = F.mse_loss(torch.func.functional_call(network, before, (x,)), y)
        grads = torch.autograd.grad(loss, list(before.values()), create_graph=True)
        after = {name: value - 0.1 * grad for (name, value), grad in zip(before.items(), grads, strict=True)}
        return F.mse_loss(torch.func.functional_call(network, after, (x_after,)), y_after)

    return StepCase(meta, [network], rows(4))


CASES = [
    simcse, gan_critic, gan_generator, siamese, dpo, distillation, multi_task, gradient_penalty, maml,
]  # fmt: skip # a list
SECOND_ORDER = [gradient_penalty, maml]
