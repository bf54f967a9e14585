"""The process state that decides which ops and kernels run: recorded in plans, restored for re-runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from rematplan.scheduler.torch_layer import private
from rematplan.scheduler.torch_layer.private import DeviceContext, function_mode_stack

__all__ = [
    "Environment",
    "RunContext",
    "deterministic_switches",
    "environment",
    "environment_difference",
    "environment_text",
    "switched",
    "switches",
]

Environment = tuple[Any, ...]

# (backend, op) whose float32 precision torch.backends sets -> whose precision it has if its own is "none".
_PRECISIONS = {
    ("generic", "all"): None,
    **{(kind, op): ("generic", "all") for kind in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")},
}

_Precision = tuple[str | None, bool | None, tuple[str, ...]]
_Switch = tuple[str, Callable[[], Any], Callable[[Any], Any] | None]


def _or_mixed(read: Callable[[], Any]) -> Any:
    """Return an older setting; None where it raises, since torch.backends was set one by one."""
    try:
        return read()
    except RuntimeError:
        return None


def _precision() -> _Precision:
    """Return the precision of float32 products: of both older settings, and of each of torch.backends."""
    each = [private.fp32_precision(*place) for place in _PRECISIONS]
    named = _or_mixed(torch.get_float32_matmul_precision)
    return named, _or_mixed(private.cudnn_tf32), tuple(each)


def _matmul_precision() -> Any:
    """Return ``torch.get_float32_matmul_precision()``, which is fast; all settings where that raises."""
    return _or_mixed(torch.get_float32_matmul_precision) or _precision()


def _set_precision(then: _Precision) -> None:
    named, tf32, each = _precision()
    if then[0] is not None and named not in (None, then[0]):
        torch.set_float32_matmul_precision(then[0])
    if then[1] is not None and tf32 not in (None, then[1]):
        private.set_cudnn_tf32(then[1])
    wanted, each = dict(zip(_PRECISIONS, then[2], strict=True)), _precision()[2]
    for (place, parent), now in zip(_PRECISIONS.items(), each, strict=True):
        if now != wanted[place]:
            # A setting inherits its parent's by being none itself.
            inherited = parent is not None and wanted[place] == wanted[parent]
            private.set_fp32_precision(*place, "none" if inherited else wanted[place])


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_BACKENDS, _MATMUL = torch.backends.cuda, torch.backends.cuda.matmul
# What chooses kernels: name in a plan's record, read, write; None where another one's ``write`` does it, or
# none can.
_SWITCHES: tuple[_Switch, ...] = (
    (
        "deterministic algorithms",
        _deterministic,
        lambda now: torch.use_deterministic_algorithms(now[0], warn_only=now[1]),
    ),
    ("flash attention", private.flash_attention_enabled, _BACKENDS.enable_flash_sdp),
    (
        "memory-efficient attention",
        private.mem_efficient_attention_enabled,
        _BACKENDS.enable_mem_efficient_sdp,
    ),
    ("math attention", private.math_attention_enabled, _BACKENDS.enable_math_sdp),
    ("cuDNN attention", private.cudnn_attention_enabled, _BACKENDS.enable_cudnn_sdp),
    ("order of attention", private.sdp_priority, private.set_sdp_priority),
    ("oneDNN", private.onednn_enabled, private.set_onednn_enabled),
    ("float32 matmul precision", _precision, _set_precision),
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("quantized engine", private.quantized_engine, None),
)
_ON_CUDA: tuple[_Switch, ...] = (
    ("cuDNN", private.cudnn_enabled, private.set_cudnn_enabled),
    ("cuDNN benchmark", private.cudnn_benchmark, private.set_cudnn_benchmark),
    ("deterministic cuDNN", private.cudnn_deterministic, private.set_cudnn_deterministic),
    ("TF32 in cuDNN", lambda: _or_mixed(private.cudnn_tf32), None),
    (
        "reduced precision of fp16 sums",
        private.reduced_fp16,
        functools.partial(setattr, _MATMUL, "allow_fp16_reduced_precision_reduction"),
    ),
    (
        "reduced precision of bf16 sums",
        private.reduced_bf16,
        functools.partial(setattr, _MATMUL, "allow_bf16_reduced_precision_reduction"),
    ),
)
_NOT_IN_PLANS = ("order of attention", "deterministic cuDNN")
# Plans depend on a part of these, which is read faster.
_PART_IN_PLANS = {
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "float32 matmul precision": _matmul_precision,
}


def _written(rows: tuple[_Switch, ...]) -> list[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    return [(name, read, write) for name, read, write in rows if write is not None]


def _values(rows: tuple[_Switch, ...]) -> list[tuple[str, Callable[[], Any]]]:
    return [(name, _PART_IN_PLANS.get(name, read)) for name, read, _ in rows if name not in _NOT_IN_PLANS]


# By whether the device is the CPU.
_WRITTEN = {True: _written(_SWITCHES), False: _written(_SWITCHES + _ON_CUDA)}
_VALUES, _CUDA_VALUES = _values(_SWITCHES), _values(_ON_CUDA)


def switches(kind: str) -> list[Any]:
    """Return what chooses kernels, all of the process, as it is now.

    Args:
        kind: type of the device that holds the model.
    """
    return [read() for _, read, _ in _WRITTEN[kind == "cpu"]]


def deterministic_switches(kind: str) -> list[Any]:
    """Return ``switches(kind)`` with deterministic algorithms; ops that have none then raise RuntimeError."""
    now = {name: read() for name, read, _ in _WRITTEN[kind == "cpu"]}
    now["deterministic algorithms"] = True, False
    if kind == "cuda":
        now["deterministic cuDNN"], now["cuDNN benchmark"] = True, False
    return [*now.values()]


@contextmanager
def switched(then: list[Any], kind: str) -> Iterator[None]:
    """Within it, what chooses kernels is as ``then``, which ``switches`` returned."""
    rows = zip(_WRITTEN[kind == "cpu"], then, switches(kind), strict=True)
    differs = [(write, before, now) for (_, _, write), before, now in rows if before != now]
    for write, before, _ in differs:
        write(before)
    try:
        yield
    finally:
        for write, _, now in differs:
            write(now)


def _autocast(kind: str) -> list[tuple[str, bool, torch.dtype]]:
    """Return (device type, enabled, dtype) of the CPU and of the model's device."""
    kinds = ("cpu",) if kind == "cpu" else ("cpu", kind)
    return [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in kinds]


def _function_modes() -> tuple[torch.device | None, list[Any]]:
    """Return the default device that this thread's function modes set, if any, and the other modes."""
    device: torch.device | None = None
    others: list[Any] = []
    for mode in function_mode_stack():
        if isinstance(mode, DeviceContext):
            device = mode.device
        else:
            others.append(mode)
    return device, others


class RunContext:
    """What surrounds a run: grad mode, autocast, kernel switches, default device and function modes.

    Captured at a first run, and entered for re-runs: these lie within a backward, outside of the contexts
    that the user's code has around its forward, and perhaps in a thread of autograd's, where there are no
    function modes.

    Args:
        kind: type of the device that holds the model.
    """

    __slots__ = ("autocast", "default_device", "grad", "kind", "modes", "switches")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.grad, self.autocast, self.switches = torch.is_grad_enabled(), _autocast(kind), switches(kind)
        self.default_device, self.modes = _function_modes()

    def is_current(self) -> bool:
        """Whether code that runs now is surrounded alike."""
        return (
            torch.is_grad_enabled() is self.grad
            and _autocast(self.kind) == self.autocast
            and switches(self.kind) == self.switches
            and _function_modes() == (self.default_device, self.modes)
        )

    def restored(self) -> AbstractContextManager[Any]:
        """Return the context that restores it; autocast's cache is off, for its casts may be of a no-grad run."""
        contexts: list[AbstractContextManager[Any]] = []
        if torch.is_grad_enabled() is not self.grad:
            contexts.append(torch.enable_grad() if self.grad else torch.no_grad())
        contexts += [
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
            for kind, enabled, dtype in self.autocast
            if enabled or torch.is_autocast_enabled(kind)
        ]
        if switches(self.kind) != self.switches:
            contexts.append(switched(self.switches, self.kind))
        device, modes = _function_modes()
        contexts += [mode for mode in self.modes if not any(mode is other for other in modes)]
        if device != self.default_device:
            contexts.append(torch.device("cpu" if self.default_device is None else self.default_device))
        if len(contexts) > 1:
            return _all(contexts)
        return contexts[0] if contexts else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _all(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def _autocast_dtype(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def environment(kind: str) -> Environment:
    """Return the state that a plan depends on, as it is now.

    Args:
        kind: type of the device that holds the model.
    """
    found: list[Any] = [_autocast_dtype("cpu")]
    found += [read() for _, read in _VALUES]
    if kind != "cpu":
        found.append(_autocast_dtype(kind))
        found += [read() for _, read in _CUDA_VALUES]
    return tuple(found)


def environment_text(kind: str) -> str:
    """Return that state as JSON, for a plan's record."""
    names = ["autocast on cpu", *(name for name, _ in _VALUES)]
    if kind != "cpu":
        names += [f"autocast on {kind}", *(name for name, _ in _CUDA_VALUES)]
    return json.dumps(dict(zip(names, map(str, environment(kind)), strict=True)))


def environment_difference(then: str, now: str) -> str | None:
    """Return the first difference between two texts, in words; None if they are equal, or one is empty."""
    if then == now or not then or not now:
        return None
    before, after = json.loads(then), json.loads(now)
    for name, value in after.items():
        if name in before and before[name] != value:
            return f"{name} is {_word(value)} instead of {_word(before[name])}"
    return None


def _word(value: str) -> str:
    return {"None": "off", "False": "off", "True": "on"}.get(value, value)
