"""Run code again as replays do, within a backward and on the same random numbers, and compare the bits."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.torch_layer.environment import RunContext, deterministic_switches, switched
from rematplan.scheduler.torch_layer.fake import OpWatch
from rematplan.scheduler.torch_layer.fsdp import is_distributed
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.preserve import RandomState, on_gradient
from rematplan.scheduler.torch_layer.private import version_of
from rematplan.scheduler.torch_layer.target import Device

__all__ = [
    "ELSEWHERE",
    "MOST",
    "ValuesBefore",
    "deterministic",
    "draws_elsewhere",
    "in_backward_of",
    "rounds_alike",
    "unlike",
]

# In units of the data type's precision, against the largest value: what sums in another order may differ by;
# and at most, of the largest value, where deterministic algorithms show that it is the order alone.
ROUNDING, MOST, LARGEST = 64, 1024, 0.05
ELSEWHERE = "it draws, and cuDNN's dropout between the layers of an RNN has random numbers that setting the generator back would change"
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms within it; ops that have none raise RuntimeError.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    workspaces = os.environ.get(CUBLAS)
    if device.type == "cuda":
        os.environ.setdefault(CUBLAS, ":4096:8")  # torch reads it at each product
    try:
        with switched(deterministic_switches(device.type), device.type):
            yield
    finally:
        if device.type == "cuda" and workspaces is None:
            os.environ.pop(CUBLAS, None)


class ValuesBefore:
    """Tensors as they are before a run, to find those that it changes in place.

    Args:
        named: (name, tensor).
        data: whether tensors have values.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], *, data: bool) -> None:
        self.data = data
        self.before = {n: (t, t.detach().clone() if data else t, version_of(t)) for n, t in named}

    def changed(self, ops: OpWatch | None) -> list[str]:
        """Return the names of the tensors changed since; ``ops`` watched the run, if there are no data."""
        if not self.data:
            return [
                n for n, (tensor, _, _) in self.before.items() if ops is not None and ops.has_changed(tensor)
            ]
        # Kernels of batch norm change statistics without a new version; a fill may write equal values.
        return [
            name
            for name, (tensor, value, version) in self.before.items()
            if version_of(tensor) != version or not equal_bits(tensor, value)
        ]


def in_backward_of(device: torch.device, run: Callable[[], Any]) -> Any:
    """Return what ``run`` returns within a backward, in the caller's ``RunContext``.

    Backwards on a GPU have a thread of their own, in which libraries choose their algorithms separately.
    """
    if is_distributed():  # hooks that gather parameters take a backward for one of theirs
        return run()
    found: list[Any] = []
    context = RunContext(device.type)

    def hook(_: Tensor) -> None:
        with context.restored():
            found.append(run())

    with torch.enable_grad():
        trigger = torch.zeros((), device=device, requires_grad=True).clone()
        on_gradient(trigger, hook)
        trigger.backward()
    return found.pop()


def unlike(first: Sequence[Tensor], run: Callable[[], Sequence[Tensor]], random: RandomState) -> str:
    """Return why a run cannot be replayed, in words; "" if a second one gives the same bits.

    Kernels that sum in no fixed order give other last bits each time. Where these alone differ, the two runs
    are made once more under deterministic algorithms; where there are none, they may differ as sums in
    another order do.

    Args:
        first: results of the first run.
        run: runs again, on the state of the first run, torch's generators apart.
        random: how the generators stood before the first run. They are left anywhere.
    """
    device = random.device

    def pair() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        random = RandomState(device)
        return run(), again(random)

    def again(random: RandomState) -> Sequence[Tensor]:
        if random.differs():
            random.restore()
        return in_backward_of(device, run)

    # Random state outside of the generators may restart once these are set: a run that draws is compared with
    # the second run since. Where nothing is drawn nothing is set.
    first, second = pair() if random.differs() else (first, again(random))
    if _alike(equal_bits, first, second):
        return ""
    why = "run again on the same random numbers, it gives other values"
    if is_distributed():  # the other ranks would not make the same runs
        return "" if device.type != "cpu" and _alike(rounds_alike, first, second) else why
    if not _alike(functools.partial(rounds_alike, units=MOST), first, second):
        return why
    try:
        with deterministic(device):
            exact = pair()
    except RuntimeError:
        return "" if _alike(rounds_alike, first, second) else why
    return "" if _alike(equal_bits, *exact) else why


def _alike(test: Callable[..., bool], first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(test, first, second))


def rounds_alike(a: Tensor, b: Tensor, units: int = ROUNDING) -> bool:
    """Whether two tensors differ by no more than sums in another order do.

    Args:
        units: of the data type's precision, against the largest value.
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.layout is not b.layout:
        return False
    a, b = as_real(a), as_real(b)
    if not a.is_floating_point() or not a.numel():
        return equal_bits(a, b)
    tolerance = min(units * torch.finfo(a.dtype).eps, LARGEST) * largest(a)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def as_real(tensor: Tensor) -> Tensor:
    """Return the tensor's numbers: a sparse one as a dense one, a complex one as real and imaginary parts."""
    tensor = tensor.detach()
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude; 0 if no element is finite."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def draws_elsewhere(model: nn.Module, device: Device) -> bool:
    """Whether the model has cuDNN's dropout between RNN layers; see ``ELSEWHERE``.

    Its random state continues from call to call, and restarts when somebody sets the generator.
    """
    return device.type == "cuda" and any(
        isinstance(module, nn.RNNBase) and module.training and module.dropout > 0 and module.num_layers > 1
        for module in model.modules()
    )
