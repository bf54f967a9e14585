"""Code that is run again as replays run it: within a backward, on the random numbers of its first run; does it give the same bits?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scheduler.capture.environment import default_device, function_modes, on_default_device, under_modes
from scheduler.capture.layouts import equal_bits
from scheduler.capture.sharded import is_distributed
from scheduler.capture.state import RandomState, autocast_contexts, autocast_state, on_gradient
from scheduler.capture.target import Device

__all__ = [
    "ELSEWHERE",
    "MOST",
    "deterministic",
    "draws_elsewhere",
    "in_backward_of",
    "rounds_alike",
    "unlike",
]

# In units of the data type's precision, against the largest value: what sums in another order may differ by; and at most, of
# the largest value, where deterministic algorithms show that it is the order alone.
ROUNDING, MOST, LARGEST = 64, 1024, 0.05
ELSEWHERE = "it draws, and cuDNN's dropout between the layers of an RNN has random numbers that setting the generator back would change"
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms within it; ops that have none raise RuntimeError.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn, environment = torch.backends.cudnn, os.environ.get(CUBLAS)
    flags = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
        os.environ.setdefault(CUBLAS, ":4096:8")  # torch asks for it at each product
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        if device.type == "cuda":
            cudnn.deterministic, cudnn.benchmark = flags
            if environment is None:
                os.environ.pop(CUBLAS, None)


def in_backward_of(device: torch.device, run: Callable[[], Any]) -> Any:
    """What ``run`` gives within a backward, in the caller's grad mode, autocast, default device and function modes.

    Backwards on a GPU have a thread of their own, in which libraries choose their algorithms anew.
    """
    if is_distributed():  # hooks that gather parameters take a backward for one of theirs
        return run()
    found: list[Any] = []
    autocast, grad = autocast_state(device), torch.is_grad_enabled()
    default, modes = default_device(), function_modes()

    def hook(_: Tensor) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            for context in (*autocast_contexts(autocast), *under_modes(modes), *on_default_device(default)):
                stack.enter_context(context)
            found.append(run())

    with torch.enable_grad():
        trigger = torch.zeros((), device=device, requires_grad=True).clone()
        on_gradient(trigger, hook)
        trigger.backward()
    return found.pop()


def unlike(first: Sequence[Tensor], run: Callable[[], Sequence[Tensor]], random: RandomState) -> str:
    """Why a run cannot be replayed, in words; "" if a second one gives the same bits.

    Kernels that sum in no fixed order give other last bits each time. Where these alone differ, the two runs are made once more
    under deterministic algorithms; where there are none, they may differ as sums in another order do.

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

    # Random state outside of the generators may begin anew once these are set: of a run that draws, the one that is compared
    # is not the first since. Where nothing is drawn nothing is set.
    first, second = pair() if random.differs() else (first, again(random))
    if _equal(first, second):
        return ""
    why = "run again on the same random numbers, it gives other values"
    if is_distributed():  # the other ranks would not make the same runs
        return "" if device.type != "cpu" and _rounded(first, second) else why
    if not _rounded(first, second, MOST):
        return why
    try:
        with deterministic(device):
            exact = pair()
    except RuntimeError:
        return "" if _rounded(first, second) else why
    return "" if _equal(*exact) else why


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(equal_bits, first, second))


def _rounded(first: Sequence[Tensor], second: Sequence[Tensor], units: int = ROUNDING) -> bool:
    return len(first) == len(second) and all(
        rounds_alike(a, b, units) for a, b in zip(first, second, strict=True)
    )


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
    """The tensor's numbers: of a sparse one all, of a complex one both parts."""
    tensor = tensor.detach()
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def largest(tensor: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def draws_elsewhere(model: nn.Module, device: Device) -> bool:
    """Whether modules have dropout whose random state is outside of the generator: cuDNN's, between the layers of an RNN.

    It goes on from call to call, and begins anew when somebody sets the generator.
    """
    return device.type == "cuda" and any(
        isinstance(module, nn.RNNBase) and module.training and module.dropout > 0 and module.num_layers > 1
        for module in model.modules()
    )
