"""The usual methods to train in less memory, each as a context in which a model trains by it.

``with method(model) as trained: trained(**batch)``: the same parameters, and on leaving the model is as it
was. The forward and the backward belong inside. ``blocks(model)`` are the layers that Hugging Face
checkpoints, and the residual blocks of convolutional nets.

PyTorch's checkpoint runs BatchNorm twice, so that running statistics are updated twice: loss and gradients
are those of the plain step, buffers are not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from rematplan import Plan, execute, solve_chain

__all__ = [
    "Method",
    "blocks",
    "every",
    "methods",
    "op_level",
    "per_block",
    "plain",
    "planned",
    "segments",
    "selective",
    "stage_level",
]

Method = Callable[[nn.Module], AbstractContextManager[nn.Module]]

BLOCKS = (
    "GPT2Block",
    "LlamaDecoderLayer",
    "ViTLayer",
    "ResNetBasicLayer",
    "ResNetBottleNeckLayer",
    "Residual",
    "Block",
)
UNET_BLOCKS = ("ResnetBlock2D", "Transformer2DModel")  # between them skips come and go: no list

aten = torch.ops.aten
MATMULS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in the order in which they run.

    Raises:
        ValueError: none is known.
    """
    found = [m for m in model.modules() if type(m).__name__ in (*BLOCKS, *UNET_BLOCKS)]
    if not found:
        raise ValueError(
            f"blocks: no block of {type(model).__name__} is known; known are {', '.join(BLOCKS)}"
        )
    return found


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Everything is kept."""
    yield model


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it these modules have other forwards."""
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


@contextmanager
def per_block(model: nn.Module) -> Iterator[nn.Module]:
    """Every block is checkpointed: by the library's own switch, where the model has one."""
    switch: Any = model
    if hasattr(model, "enable_gradient_checkpointing"):  # diffusers
        enable, disable = switch.enable_gradient_checkpointing, switch.disable_gradient_checkpointing
    elif getattr(
        model, "supports_gradient_checkpointing", False
    ):  # transformers, by its new name or its old one
        new = hasattr(model, "activation_checkpointing_enable")
        enable = switch.activation_checkpointing_enable if new else switch.gradient_checkpointing_enable
        disable = switch.activation_checkpointing_disable if new else switch.gradient_checkpointing_disable
        enable = functools.partial(enable, {"use_reentrant": False})
    else:
        with every(1)(model):
            yield model
        return
    enable()
    try:
        yield model
    finally:
        disable()
        if getattr(model, "_require_grads_hooks", None):  # transformers leaves its hooks on the embeddings
            switch.disable_input_require_grads()


def every(n: int) -> Method:
    """Every n-th block is checkpointed, the others keep everything."""

    @contextmanager
    def method(model: nn.Module) -> Iterator[nn.Module]:
        chosen = blocks(model)[::n]
        with _replaced({b: functools.partial(checkpoint, b.forward, use_reentrant=False) for b in chosen}):
            yield model

    return method


def segments(count: int) -> Method:
    """As ``torch.utils.checkpoint.checkpoint_sequential``: segments of blocks; the last one keeps everything.

    The first block of a segment runs all of it, with the other arguments that the model gave to the first;
    the others pass on what they get.
    """

    @contextmanager
    def method(model: nn.Module) -> Iterator[nn.Module]:
        listed = blocks(model)
        size = max(1, len(listed) // count)  # as checkpoint_sequential does: the last takes the rest
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for start in range(0, size * (count - 1), size):
            segment = [b.forward for b in listed[start : start + size]]
            run = functools.partial(_sequence, segment)
            forwards[listed[start]] = functools.partial(checkpoint, run, use_reentrant=False)
            forwards |= dict.fromkeys(listed[start + 1 : start + size], _first)
        with _replaced(forwards):
            yield model

    return method


def _sequence(forwards: list[Callable[..., Tensor]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for forward in forwards:
        x = forward(x, *args, **kwargs)
    return x


def _first(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return x


@contextmanager
def selective(model: nn.Module) -> Iterator[nn.Module]:
    """Every block is checkpointed, and keeps what matmuls, convolutions and attention make."""
    contexts = functools.partial(create_selective_checkpoint_contexts, list(MATMULS))
    wrap = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    with _replaced({b: functools.partial(wrap, b.forward) for b in blocks(model)}):
        yield model


def planned(plan: Plan) -> Method:
    """The model trains by a plan of ours, made for it."""
    executed: dict[nn.Module, nn.Module] = {}

    @contextmanager
    def method(model: nn.Module) -> Iterator[nn.Module]:
        if model not in executed:
            executed[model] = execute(plan, model)
        yield executed[model]

    return method


def op_level(plan: Plan, budget: int) -> Plan:
    """The same captured model under another budget (bytes): stages may be kept in part.

    Raises:
        InfeasibleBudget: no schedule fits.
    """
    return plan.within(budget)


def stage_level(plan: Plan, budget: int) -> Plan:
    """The same, but stages are kept whole or not at all: the optimal persistent schedule of rotor.

    Raises:
        InfeasibleBudget: no schedule fits.
    """
    whole = tuple(dataclasses.replace(stage, options=stage.options[:1]) for stage in plan.chain.stages)
    schedule = solve_chain(dataclasses.replace(plan.chain, stages=whole), budget)
    return dataclasses.replace(plan, memory_budget=budget, schedule=schedule)


def methods(model: nn.Module) -> dict[str, Method]:
    """The baselines that suit a model, by name."""
    found = blocks(model)
    chosen: dict[str, Method] = {"per-block": per_block, "every 2nd": every(2), "every 3rd": every(3)}
    if all(type(b).__name__ in BLOCKS for b in found):
        counts = sorted({2, math.isqrt(len(found)), len(found) // 2} - {0, 1})
        chosen |= {f"{count} segments": segments(count) for count in counts}
    chosen["selective"] = selective
    return chosen
