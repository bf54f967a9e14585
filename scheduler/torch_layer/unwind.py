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
from rematplan.scheduler.torch_layer.environment import autocast_settings, deterministic, set_deterministic

__all__ = ["in_words", "met", "unwound"]

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
    dual, depth = private.dual_level(), private.transform_depth()
    inference = torch.is_inference_mode_enabled()
    modes = private.dispatch_modes(), private.function_mode_stack(), private.default_device_context()
    settings = [read() for read, _ in _SETTINGS]
    autocast, nesting = autocast_settings("cuda"), _autocast_nesting()
    hooks = private.saved_tensors_hooks(), private.saved_tensors_refusal()
    try:
        yield
    finally:  # the last entered first
        private.leave_transforms(depth)
        if dual < 0:
            private.leave_dual_level()
        _leave_modes(*modes)
        if torch.is_inference_mode_enabled() is not inference:
            _LEFT.append(private.inference_mode_entered(inference))
        for (read, write), then in zip(_SETTINGS, settings, strict=True):
            if read() != then:
                write(then)
        _restore_autocast(autocast, nesting)
        private.set_saved_tensors_hooks(*hooks)


def _leave_modes(dispatch: list[Any], function: list[Any], default_device: Any) -> None:
    for mode in reversed(private.dispatch_modes()):
        if not any(mode is each for each in dispatch):
            with suppress(Exception):  # of the mode's own code; the mode leaves the stack in any case
                mode.__exit__(None, None, None)
            if any(mode is each for each in private.dispatch_modes()):
                private.pop_dispatch_mode(mode)
    if private.default_device_context() is not default_device:
        torch.set_default_device(None if default_device is None else default_device.device)
    private.pop_function_modes(len(function))


def _restore_autocast(settings: list[tuple[str, bool, torch.dtype]], nesting: int) -> None:
    for kind, enabled, dtype in settings:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    left = _autocast_nesting() - nesting
    for _ in range(left):
        torch.autocast_decrement_nesting()
    if left > 0 and not nesting:
        torch.clear_autocast_cache()


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


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
