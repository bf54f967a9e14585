"""Plain steps of a model on one call, and whether a step of its captured form is like them.

Kernels that sum in no fixed order (atomic additions in the backward of attention, convolutions, scatter and embedding on a
GPU) give the plain model other last bits at each step. A captured step is then held against the plain one under deterministic
algorithms. Where there are none, outputs and buffers must be equal bit for bit, and gradients may differ as those of plain
steps do from one another, if that is no more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from scheduler.capture.repeat import MOST, deterministic, rounds_alike
from scheduler.capture.state import HostRandomState
from scheduler.capture.verify import StepResult, difference, equal_bits

__all__ = ["BIT_EQUAL", "PlainSteps"]

BIT_EQUAL = "one step is bit-equal to the plain model"
SPREAD = 8  # times what plain steps differ by from one another
SAMPLES = 3


class PlainSteps:
    """One plain step, and more of them once a captured step is not equal to it.

    Args:
        first: a plain step.
        step: makes one more, from the same state.
        device: of the model.
    """

    def __init__(self, first: StepResult, step: Callable[[], StepResult], device: torch.device) -> None:
        self.first, self.step, self.device = first, step, device

    @cached_property
    def samples(self) -> list[StepResult]:
        """Plain steps that begin with the same random numbers, Python's and NumPy's included."""
        random = HostRandomState()
        found = [self.step()]
        while len(found) < SAMPLES and (len(found) < 2 or self._apart(found)):
            random.restore()
            found.append(self.step())
        return found

    @staticmethod
    def _apart(steps: list[StepResult]) -> str | None:
        return next(filter(None, (difference(steps[0], other) for other in steps[1:])), None)

    @cached_property
    def apart(self) -> str | None:
        """In what plain steps differ from one another, in words; None if they are equal bit for bit."""
        return self._apart(self.samples)

    @cached_property
    def wide(self) -> str | None:
        """What plain steps differ in by more than rounding, in words: that is no matter of an order of sums."""
        seen = [_tensors(step) for step in self.samples]
        for name, tensor in seen[0].items():
            for other in seen[1:]:
                if _distance(tensor, other[name]) > 0 and not _rounds(tensor, other[name]):
                    return f"{name} differs by up to {_distance(tensor, other[name]):.3g}"
        return None

    @cached_property
    def exact(self) -> StepResult | None:
        """A plain step under deterministic algorithms; None where that is not repeated to the bit, or an op has none."""
        random = HostRandomState()
        try:
            with deterministic(self.device):
                one = self.step()
                random.restore()
                other = self.step()
        except RuntimeError:
            return None
        return one if difference(one, other) is None else None

    def judge(self, trial: Callable[[], StepResult]) -> tuple[str | None, str]:
        """Compare a step of the captured model with the plain one.

        Args:
            trial: makes such a step, from the same state.

        Returns:
            in what it is not like the plain step, in words, and None if it is; how it is like it.
        """
        found = trial()
        differs = difference(self.first, found)
        if differs is None:
            return None, BIT_EQUAL
        if self.apart is None:
            return differs, ""
        if self.wide is not None:
            return f"{differs}, and between plain steps {self.wide}, which is more than rounding", ""
        if self.exact is not None:
            try:
                with deterministic(self.device):
                    differs = difference(self.exact, trial())
            except RuntimeError as error:
                return f"under deterministic algorithms it raises {type(error).__name__}: {error}", ""
            how = f"{BIT_EQUAL} under deterministic algorithms; by default plain steps differ: {self.apart}"
            return (None, how) if differs is None else (f"{differs}, under deterministic algorithms", "")
        beyond = self._beyond(found)
        how = f"gradients of one step differ from the plain ones as those do from one another: {self.apart}"
        return (None, how) if beyond is None else (beyond, "")

    def hint(self) -> str:
        """What to say when no captured step is like the plain one; "" if there is nothing to say."""
        if self.apart is not None:
            cublas = (
                ", and CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
                if self.device.type == "cuda"
                else ""
            )
            return (
                f"; the plain model itself is not deterministic: {self.apart} (torch.use_deterministic_algorithms(True){cublas} "
                "makes it so, where each of its ops has such an algorithm)"
            )
        if difference(self.first, self.samples[0]) is not None:
            return "; the forward draws from the generators of Python or NumPy, which a graph would do once and for all"
        return ""

    def _beyond(self, found: StepResult) -> str | None:
        """The first thing in which a step differs from the plain one by more than plain steps from one another."""
        plain, seen = _gradients(self.first), [_gradients(step) for step in self.samples]
        for name, tensor in _gradients(found).items():
            off = _distance(plain[name], tensor)
            spread = max(_distance(seen[0][name], other[name]) for other in seen[1:])
            if off > SPREAD * spread:
                return f"{name} differs by up to {off:.3g}, between plain steps by {spread:.3g}"
        steps = (self.first, *self.samples, found)
        return self._apart([replace(each, grads={}, given=()) for each in steps])


def _gradients(step: StepResult) -> dict[str, Tensor | None]:
    """The gradients that a step left behind, by name."""
    return {
        **{f"the gradient of {name}": each for name, each in step.grads.items()},
        **{f"the gradient of input {i}": each for i, each in enumerate(step.given)},
    }


def _tensors(step: StepResult) -> dict[str, Tensor | None]:
    """All that a step left behind, by name."""
    return {
        **{f"output {i}": each for i, each in enumerate(step.outputs)},
        **{f"buffer {name}": each for name, each in step.buffers.items()},
        **_gradients(step),
    }


def _rounds(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors differ by no more than rounding."""
    return a is not None and b is not None and rounds_alike(a, b, MOST)


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """By how much two tensors differ at most; 0 if they are equal bit for bit, infinite if they cannot be compared."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if equal_bits(a, b):
        return 0.0
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout or not a.is_floating_point():
        return math.inf
    a, b = (each.to_dense().double() for each in (a, b))
    off = (a - b).abs()
    off[a.isnan() & b.isnan()] = 0.0
    most = float(off.max())
    return math.inf if math.isnan(most) else most
