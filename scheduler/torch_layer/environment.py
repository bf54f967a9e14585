"""Read, record in plans, and restore for re-runs the process state that decides which kernels run."""

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
    "autocast_settings",
    "deterministic",
    "deterministic_switches",
    "environment",
    "environment_difference",
    "environment_text",
    "set_deterministic",
    "switched",
    "switches",
]

Environment = tuple[Any, ...]

# (backend, op) whose float32 precision torch.backends sets -> the one it inherits from if its own is "none".
_PRECISIONS = {
    ("generic", "all"): None,
    **{(kind, op): ("generic", "all") for kind in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")},
}

_Precision = tuple[str | None, bool | None, tuple[str, ...]]
_Switch = tuple[str, Callable[[], Any], Callable[[Any], Any] | None]


def _or_mixed(read: Callable[[], Any]) -> Any:
    """Return an older setting; None where it raises because torch.backends was set one by one."""
    try:
        return read()
    except RuntimeError:
        return None


def _precision() -> _Precision:
    """Return the precision of float32 products: of both older settings, and of each of torch.backends."""
    each = tuple([private.fp32_precision(*place) for place in _PRECISIONS])
    return _or_mixed(torch.get_float32_matmul_precision), _or_mixed(private.cudnn_tf32), each


def _matmul_precision() -> Any:
    """Return ``torch.get_float32_matmul_precision()``, which is fast; all settings where that raises."""
    return _or_mixed(torch.get_float32_matmul_precision) or _precision()


def _set_precision(then: _Precision) -> None:
    named, tf32, _ = _precision()
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


def deterministic() -> tuple[bool, bool]:
    """Return whether deterministic algorithms are on, and whether ops that have none only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def set_deterministic(then: tuple[bool, bool]) -> None:
    """Set what ``deterministic`` returned."""
    torch.use_deterministic_algorithms(then[0], warn_only=then[1])


def _set_reduced(dtype: str) -> Callable[[bool], None]:
    name = f"allow_{dtype}_reduced_precision_reduction"
    return functools.partial(setattr, torch.backends.cuda.matmul, name)


_CUDA, _NOTHING = torch.backends.cuda, nullcontext()
_WORDS = {"None": "off", "False": "off", "True": "on"}
# Switches that choose kernels: name in a plan's record, read, write; None where another one's ``write`` sets
# it, or none can.
_SWITCHES: tuple[_Switch, ...] = (
    ("deterministic algorithms", deterministic, set_deterministic),
    ("flash attention", private.flash_attention_enabled, _CUDA.enable_flash_sdp),
    ("memory-efficient attention", private.mem_efficient_attention_enabled, _CUDA.enable_mem_efficient_sdp),
    ("math attention", private.math_attention_enabled, _CUDA.enable_math_sdp),
    ("cuDNN attention", private.cudnn_attention_enabled, _CUDA.enable_cudnn_sdp),
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
    ("reduced precision of fp16 sums", private.reduced_fp16, _set_reduced("fp16")),
    ("reduced precision of bf16 sums", private.reduced_bf16, _set_reduced("bf16")),
)
_NOT_IN_PLANS = ("order of attention", "deterministic cuDNN")
# Plans depend on a part of these, which is read faster.
_PART_IN_PLANS = {
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "float32 matmul precision": _matmul_precision,
}


# By whether the device is the CPU.
_WRITTEN = {
    cpu: [(name, read, write) for name, read, write in rows if write is not None]
    for cpu, rows in ((True, _SWITCHES), (False, _SWITCHES + _ON_CUDA))
}


@functools.cache
def _in_plans(kind: str) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, read) of the state that a plan depends on."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for device, rows in (("cpu", _SWITCHES), (kind, _ON_CUDA))[: 1 + (kind != "cpu")]:
        found.append((f"autocast on {device}", functools.partial(_autocast_dtype, device)))
        found += [
            (name, _PART_IN_PLANS.get(name, read)) for name, read, _ in rows if name not in _NOT_IN_PLANS
        ]
    found.append(("function modes", _names_of_modes))
    return found


def _names_of_modes() -> str | None:
    """Return the classes of the user's function modes that see what a forward calls; None without any."""
    kinds = map(type, _function_modes()[1])
    names = [kind.__qualname__ for kind in kinds if not kind.__module__.startswith("rematplan.")]
    return ", ".join(names) or None


def switches(kind: str) -> list[Any]:
    """Return the values of the process's switches that choose kernels for a type of device."""
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
    """Set the switches to ``then``, which ``switches`` returned, within the block."""
    rows = zip(_WRITTEN[kind == "cpu"], then, switches(kind), strict=True)
    differs = [(write, before, now) for (_, _, write), before, now in rows if before != now]
    for write, before, _ in differs:
        write(before)
    try:
        yield
    finally:
        for write, _, now in differs:
            write(now)


def autocast_settings(kind: str) -> list[tuple[str, bool, torch.dtype]]:
    """Return (type, enabled, dtype) for the CPU and another type of device."""
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
    """The surroundings of a run: grad mode, autocast, kernel switches, default device and function modes.

    Captured at a first run and entered for re-runs, which run within a backward: outside of the contexts that
    the user's code has around its forward, and perhaps in a thread of autograd's without function modes.
    """

    __slots__ = ("autocast", "default_device", "grad", "kind", "modes", "switches")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.grad, self.autocast, self.switches = (
            torch.is_grad_enabled(),
            autocast_settings(kind),
            switches(kind),
        )
        self.default_device, self.modes = _function_modes()

    def is_current(self) -> bool:
        """Whether the surroundings are these now."""
        return (
            torch.is_grad_enabled() is self.grad
            and autocast_settings(self.kind) == self.autocast
            and switches(self.kind) == self.switches
            and _function_modes() == (self.default_device, self.modes)
        )

    def restored(self) -> AbstractContextManager[Any]:
        """Return the context that restores them, autocast's cache off: its casts may be of no-grad runs."""
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


@contextmanager
def _all(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def _autocast_dtype(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def environment(kind: str) -> Environment:
    """Return the present state that a plan for a type of device depends on."""
    return tuple([read() for _, read in _in_plans(kind)])


def environment_text(kind: str) -> str:
    """Return that state as JSON, for a plan's record."""
    return json.dumps({name: str(read()) for name, read in _in_plans(kind)})


def environment_difference(then: str, now: str) -> str | None:
    """Return the first difference between two texts, in words; None if they are equal, or one is empty."""
    if then == now or not then or not now:
        return None
    before, after = json.loads(then), json.loads(now)
    for name, value in after.items():
        if name in before and before[name] != value:
            now, then = (_WORDS.get(each, each) for each in (value, before[name]))
            return f"{name} is {now} instead of {then}"
    return None
