"""Leave the modes, functorch levels and settings of torch that a trial in this thread has entered.

A model's code that raises half-way, or an export of it, may leave the process within a level of
``torch.vmap``, a mode of dispatch or other settings; all later ops, the user's too, would run within them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer import private
from rematplan.scheduler.torch_layer.environment import deterministic, set_deterministic

__all__ = ["in_words", "met", "unwound"]

KINDS = ("cpu", "cuda")  # of devices that autocast is set for

# (read, write) of settings.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda then: torch.set_anomaly_enabled(*then),
    ),
    (torch.get_default_dtype, torch.set_default_dtype),
    (deterministic, set_deterministic),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
)
_LEFT: list[Any] = []  # guards, which hold while they live


@contextmanager
def unwound() -> Iterator[None]:
    """Leave, at the end of the block, everything entered within it and not left; restore settings."""
    before = _Surroundings()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def met(what: str, advice: str = "", ours: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any exception in the block into a CaptureError that begins with ``what``; leave what was entered.

    OutOfMemoryError passes: a smaller batch is the cure, not another capture.

    Args:
        advice: end of the message.
        ours: kinds of exceptions that pass, beside CaptureError.
    """
    with unwound():
        try:
            yield
        except Exception as error:  # of whatever kind the model's code, an export or a kernel raises
            if isinstance(error, (CaptureError, torch.OutOfMemoryError, *ours)):
                raise
            raise CaptureError(f"{what}: {in_words(error)}{f'; {advice}' if advice else ''}") from error


def in_words(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0][:300]}" if lines else name


class _Surroundings:
    """The present modes, levels and settings that ops of this thread run under."""

    def __init__(self) -> None:
        self.dual = private.dual_level()
        self.level = private.transform_depth()
        self.dispatch = private.dispatch_modes()
        self.function = private.function_mode_stack()
        self.default_device = private.default_device_context()
        self.inference = torch.is_inference_mode_enabled()
        self.settings = [read() for read, _ in _SETTINGS]
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in KINDS
        ]
        self.nesting = _autocast_nesting()
        self.hooks = private.saved_tensors_hooks()
        self.refused = private.saved_tensors_refusal()

    def restore(self) -> None:
        """Leave what was entered since, the last first; restore settings."""
        private.leave_transforms(self.level)
        if self.dual < 0:
            private.leave_dual_level()
        self._leave_modes()
        if torch.is_inference_mode_enabled() is not self.inference:
            _LEFT.append(private.inference_mode_entered(self.inference))
        for (read, write), then in zip(_SETTINGS, self.settings, strict=True):
            if read() != then:
                write(then)
        self._set_autocast()
        private.set_saved_tensors_hooks(self.hooks, self.refused)

    def _leave_modes(self) -> None:
        for mode in reversed(private.dispatch_modes()):
            if not any(mode is each for each in self.dispatch):
                with suppress(Exception):  # of the mode's own code; the mode leaves the stack in any case
                    mode.__exit__(None, None, None)
                if any(mode is each for each in private.dispatch_modes()):
                    private.pop_dispatch_mode(mode)
        if private.default_device_context() is not self.default_device:
            torch.set_default_device(None if self.default_device is None else self.default_device.device)
        private.pop_function_modes(len(self.function))

    def _set_autocast(self) -> None:
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        left = _autocast_nesting() - self.nesting
        for _ in range(left):
            torch.autocast_decrement_nesting()
        if left > 0 and not self.nesting:
            torch.clear_autocast_cache()


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())
