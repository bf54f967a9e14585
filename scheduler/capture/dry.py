"""Capture a model without its data: nothing is computed, and nothing can be tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from scheduler.capture.eager import as_eager
from scheduler.capture.fake import fake_call, fake_model
from scheduler.capture.graph_capture import GraphCapture, capture_graph, op_graphs
from scheduler.capture.loss import find_loss, output_tensors
from scheduler.capture.module_calls import Recurrence
from scheduler.capture.module_capture import ModuleCapture, capture_blocks
from scheduler.capture.private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    modes_disabled,
)
from scheduler.capture.sample import Call
from scheduler.capture.state import HostRandomState
from scheduler.capture.target import Target
from scheduler.capture.verify import custom_functions
from scheduler.errors import CaptureError

__all__ = ["DRAWS", "UNTRIED", "capture_dry", "without_hardware"]

DRAWS = "the forward draws from the generators of Python or NumPy, which a graph would do once and for all"

UNTRIED = "not tried against the plain model: no data"


@contextmanager
def without_hardware(model: nn.Module, call: Call) -> Iterator[tuple[nn.Module, Call]]:
    """A copy of the model and the call on fake tensors; within the block ops make fake tensors.

    The copy's code takes them for real ones (``eager.py``).

    Raises:
        CaptureError: the model cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copies = fake_model(model, mode), fake_call(call, mode)
    with as_eager(copies[0]), mode:
        yield copies


def capture_dry(
    model: nn.Module,
    call: Call,
    how: str | tuple[nn.Module, ...],
    target: Target,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[GraphCapture | ModuleCapture, str, bool]:
    """The capture, why it was chosen, and whether the model returns its own loss. Called ``without_hardware``.

    Args:
        how: "graph", "modules", "auto", or the blocks.

    Raises:
        CaptureError: the model cannot be captured, or its code asks for values.
        ValueError: it rejects the call.
    """
    progress("running one step without data")
    seen, random = Recurrence(), HostRandomState()
    with seen.watching(model):
        own_loss, custom = _dry_step(model, call)
    draws = random.differs()
    refused = seen.unrolled() if how == "auto" else ""
    if not refused and how in ("auto", "graph"):
        progress("capturing the op graph")
        try:
            if draws:
                raise CaptureError(DRAWS)
            if custom:
                raise CaptureError(
                    f"the custom autograd.Function {custom[0]} is used, whose backward torch.export drops"
                )
            with modes_disabled():
                graph = next(op_graphs(model, call))
            captured = capture_graph(graph, model)
            captured.target = target
            captured.observe(model, call)
            return captured, f"torch.export; {UNTRIED}", own_loss
        except CaptureError as error:
            if how == "graph":
                raise CaptureError(f"solve: capture='graph': {error}; try capture='modules'") from error
            refused = str(error)
    progress("capturing the blocks")
    blocks, reason = capture_blocks(model, call, how, refused, target, seen)
    return (
        blocks,
        f"{reason}; {UNTRIED}" + (f"; not as a graph, since {refused}" if refused else ""),
        own_loss,
    )


def _dry_step(model: nn.Module, call: Call) -> tuple[bool, tuple[str, ...]]:
    """Whether the model returns its own loss, and the custom autograd.Functions that it uses.

    Raises:
        CaptureError, ValueError: it asks for values; it rejects the call.
    """
    args, kwargs = call
    try:
        with torch.enable_grad():
            output: Any = model(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise CaptureError(
            f"solve: {type(model).__name__} asks for the values of tensors ({error}), and without data there are none; "
            "plan it where it has data, without device="
        ) from error
    except Exception as error:  # whatever the model's code raises on a sample that does not suit it
        raise ValueError(
            f"solve: {type(model).__name__} rejects the sample: {type(error).__name__}: {error}"
        ) from error
    loss, own = find_loss(output)
    return own, custom_functions([loss, *output_tensors(output)])
