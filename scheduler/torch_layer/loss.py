"""Find the loss, which the backward starts from, in a model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rematplan.scheduler.torch_layer.leaves import tensors_in

__all__ = ["find_loss"]


def find_loss(output: Any) -> tuple[Tensor, bool]:
    """Return the loss in ``output``, and whether it is the model's own.

    A scalar is the loss; so is ``output.loss`` or ``output["loss"]``, and a scalar that begins a tuple or
    list. Of any other output the sum of squares of its tensors that require grad stands in, for measuring.

    Raises:
        ValueError: no tensor in the output requires grad.
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    for candidate in (own, output, first):
        if isinstance(candidate, Tensor) and candidate.ndim == 0 and candidate.requires_grad:
            return candidate, True
    tensors = tensors_in(output)
    grad = [t for t in tensors if t.requires_grad and (t.is_floating_point() or t.is_complex())]
    if not grad:
        what = "holds no tensor" if not tensors else "holds no tensor that requires grad"
        raise ValueError(
            f"solve: the model's output ({type(output).__name__}) {what}, so there is nothing to reverse; "
            "return the loss, an object with .loss, or tensors that depend on trainable parameters"
        )
    squares = [
        (t.abs() if t.is_complex() else t).pow(2).sum(dtype=torch.float32 if t.element_size() < 4 else None)
        for t in grad
    ]
    return torch.stack(squares).sum() if len(squares) > 1 else squares[0], False
