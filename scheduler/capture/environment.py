"""What of the process's state decides which ops and kernels a step runs: autocast, deterministic algorithms, attention kernels, precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from scheduler.capture.private import (
    DeviceContext,
    cudnn_attention_enabled,
    cudnn_benchmark,
    cudnn_deterministic,
    cudnn_enabled,
    cudnn_tf32,
    flash_attention_enabled,
    fp32_precision,
    function_mode_stack,
    math_attention_enabled,
    mem_efficient_attention_enabled,
    onednn_enabled,
    quantized_engine,
    reduced_bf16,
    reduced_fp16,
    sdp_priority,
    set_cudnn_benchmark,
    set_cudnn_deterministic,
    set_cudnn_enabled,
    set_cudnn_tf32,
    set_fp32_precision,
    set_onednn_enabled,
    set_sdp_priority,
)

__all__ = [
    "Environment",
    "default_device",
    "environment",
    "environment_difference",
    "environment_text",
    "function_modes",
    "on_default_device",
    "switched",
    "switches",
    "under_modes",
]

Environment = tuple[Any, ...]

# (backend, op) whose precision of float32 torch.backends sets, and where it comes from if it is "none" there.
_PRECISIONS = {
    ("generic", "all"): None,
    **{(kind, op): ("generic", "all") for kind in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")},
}


Precision = tuple[str | None, bool | None, tuple[str, ...]]


def _or_mixed(read: Callable[[], Any]) -> Any:
    """What an older setting says; None where it raises, since torch.backends was told one by one."""
    try:
        return read()
    except RuntimeError:
        return None


def _precision() -> Precision:
    """That of float32 products, as both older settings have it, and as torch.backends has it one by one."""
    each = [fp32_precision(*place) for place in _PRECISIONS]
    named = _or_mixed(torch.get_float32_matmul_precision)
    return named, _or_mixed(cudnn_tf32), tuple(each)


def _matmul_precision() -> Any:
    """``torch.get_float32_matmul_precision``, for every forward; all there is where that raises."""
    return _or_mixed(torch.get_float32_matmul_precision) or _precision()


def _set_precision(then: Precision) -> None:
    named, tf32, each = _precision()
    if then[0] is not None and named not in (None, then[0]):
        torch.set_float32_matmul_precision(then[0])
    if then[1] is not None and tf32 not in (None, then[1]):
        set_cudnn_tf32(then[1])
    wanted, each = dict(zip(_PRECISIONS, then[2], strict=True)), _precision()[2]
    for (place, parent), now in zip(_PRECISIONS.items(), each, strict=True):
        if now != wanted[place]:
            # What a setting has of its parent it has by being none itself.
            inherited = parent is not None and wanted[place] == wanted[parent]
            set_fp32_precision(*place, "none" if inherited else wanted[place])


_SWITCHES = (
    ("deterministic algorithms", torch.are_deterministic_algorithms_enabled),
    ("flash attention", flash_attention_enabled),
    ("memory-efficient attention", mem_efficient_attention_enabled),
    ("math attention", math_attention_enabled),
    ("cuDNN attention", cudnn_attention_enabled),
    ("oneDNN", onednn_enabled),
    ("float32 matmul precision", _matmul_precision),
    ("default dtype", torch.get_default_dtype),
    ("quantized engine", quantized_engine),
)
_ON_CUDA = (
    ("cuDNN", cudnn_enabled),
    ("cuDNN benchmark", cudnn_benchmark),
    ("TF32 in cuDNN", lambda: _or_mixed(cudnn_tf32)),
    ("reduced precision of fp16 sums", reduced_fp16),
    ("reduced precision of bf16 sums", reduced_bf16),
)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _of(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# What the code of a re-run finds as its first run found it: (read, set). Autocast is of each thread (``state.py``).
_KERNELS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (flash_attention_enabled, torch.backends.cuda.enable_flash_sdp),
    (mem_efficient_attention_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (math_attention_enabled, torch.backends.cuda.enable_math_sdp),
    (cudnn_attention_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (sdp_priority, set_sdp_priority),
    (onednn_enabled, set_onednn_enabled),
    (_precision, _set_precision),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_deterministic, lambda now: torch.use_deterministic_algorithms(now[0], warn_only=now[1])),
)
_CUDA_KERNELS = (
    (cudnn_enabled, set_cudnn_enabled),
    (cudnn_benchmark, set_cudnn_benchmark),
    (cudnn_deterministic, set_cudnn_deterministic),
    _of(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _of(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
)


def switches(kind: str) -> list[Any]:
    """What chooses kernels, all of the process, as it is now.

    Args:
        kind: type of the device that the model lies on.
    """
    return [read() for read, _ in (_KERNELS if kind == "cpu" else _KERNELS + _CUDA_KERNELS)]


@contextmanager
def switched(then: list[Any], kind: str) -> Iterator[None]:
    """Within it, what chooses kernels is as it was when ``switches`` gave ``then``: a backward may lie outside of ``sdpa_kernel``."""
    now = switches(kind)
    differs = [
        (write, before, after)
        for (_, write), before, after in zip(_KERNELS + _CUDA_KERNELS, then, now, strict=False)
        if before != after
    ]
    for write, before, _ in differs:
        write(before)
    try:
        yield
    finally:
        for write, _, after in differs:
            write(after)


def default_device() -> torch.device | None:
    """Where this thread makes tensors that are told no device: what ``set_default_device`` or a device's context say, if they do."""
    modes = reversed(function_mode_stack())
    context = next((mode for mode in modes if isinstance(mode, DeviceContext)), None)
    return None if context is None else context.device


def on_default_device(then: torch.device | None) -> list[AbstractContextManager[Any]]:
    """What brings that default back, where it is another now: autograd's thread of a GPU has none."""
    return [] if default_device() == then else [torch.device("cpu" if then is None else then)]


def function_modes() -> list[Any]:
    """The modes that see torch's functions in this thread, the default device's left out."""
    return [mode for mode in function_mode_stack() if not isinstance(mode, DeviceContext)]


def under_modes(then: list[Any]) -> list[AbstractContextManager[Any]]:
    """What brings back those of these modes that are not entered now: within a backward's hooks there are none."""
    if not then:
        return []
    now = function_modes()
    return [mode for mode in then if not any(mode is other for other in now)]


def _names(kind: str) -> list[str]:
    more = [] if kind == "cpu" else [f"autocast on {kind}", *(name for name, _ in _ON_CUDA)]
    return ["autocast on cpu", *(name for name, _ in _SWITCHES), *more]


def environment(kind: str) -> Environment:
    """The state now.

    Args:
        kind: type of the device that the model lies on.
    """
    found: list[Any] = [torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None]
    found += [read() for _, read in _SWITCHES]
    if kind != "cpu":
        found.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        found += [read() for _, read in _ON_CUDA]
    return tuple(found)


def environment_text(kind: str) -> str:
    """The state now, as JSON for a plan's record."""
    return json.dumps(dict(zip(_names(kind), map(str, environment(kind)), strict=True)))


def environment_difference(then: str, now: str) -> str | None:
    """The first difference between two texts, in words; None if there is none, or nothing is known of one."""
    if then == now or not then or not now:
        return None
    before, after = json.loads(then), json.loads(now)
    for name, value in after.items():
        if name in before and before[name] != value:
            return f"{name} is {_word(value)} instead of {_word(before[name])}"
    return None


def _word(value: str) -> str:
    return {"None": "off", "False": "off", "True": "on"}.get(value, value)
