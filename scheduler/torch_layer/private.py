"""Name everything of torch that is private, and every patch: no other file of this project does.

Names. All of these are in the wheels of torch 2.10.0, 2.13.0 and 2.14.1; the tests have run under 2.11.0 and
2.13.0. Each says what it is for, and what is lost without it; nothing public gives that as exactly, or as
fast where a forward asks for it. tests/test_private_names.py tries each by what it is used for, and finds any
other in the code.

Not here, for they are stable in fact: the attributes of nn.Module (``_parameters``, ``_buffers``,
``_forward_hooks``, ``_compiled_call_impl``, ...), which pickled models carry, so that other names would break
them; and the names of ops (``aten._softmax``), which exported programs carry.

Patches. These are made by ``replaced``, which puts back what was there. They are of the whole process while a
plan is made or a graph is captured; other forwards of a planned model make none:

* ``autograd.Function.apply`` and ``Tensor.register_hook`` (export.py): an export drops custom backwards and
  hooks on tensors silently; seen, they refuse the graph.
* ``torch.autograd.grad`` (inner_gradients.py): torch.export cannot follow it; seen, the graph is traced
  otherwise.
* flags of ``torch.compiler``, and ``is_fake_tensor`` of transformers (eager.py): code that asks whether it is
  exported runs other ops than in a plain step.
* ``__getattribute__`` of the classes of modules and of what hangs on them (python_reads.py), or on what a
  call is given (call_reads.py): a graph is good while what its forward has read is unchanged.
* ``backward`` and ``zero_grad`` (step_function.py): a step function must not call them.
* draws of ``random`` and ``numpy.random`` (layer_drop.py): layers that are left out at random all run.
* ``forward`` and the dicts of hooks of one model (eager.py, export.py, solve.py, preserve.py): its calls are
  led through a capture.

Two files set attributes of single modules themselves: calls.py the ``forward`` (or
``_compiled_call_impl``) of blocks, at every step, so that it must be quick; lightning.py the ``forward`` of
one module until its first call. A planned model, and the module that ``state.bare`` yields, are no patches:
they are objects of a subclass that share the ``__dict__`` of the model, which keeps its class.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _functorch as functorch
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.overrides import _get_current_function_mode_stack as function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode
from torch.utils._python_dispatch import _disable_current_modes as modes_disabled
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

# Re-exported as they are; all that is defined below is for the rest of the project, too.
# - FakeTensor, FakeTensorMode, detect_fake_mode, two exceptions: tensors without data. Without them: no op
#   graph.
# - OpOverload, HigherOrderOperator: kinds of ops. Without them: a branch passes for an op.
# - BackwardHookFunction: what a module's backward hook puts into autograd's graph. Without it: it passes for
#   the user's own.
# - NormBase, Convolution: all batch norms, all convolutions. Without them: a loaded plan that leaves out a
#   norm's statistics is followed; nobody is warned of cuDNN's benchmark.
# - pytree: how torch takes arguments apart. Without it: containers that libraries register are leaves.
# - TorchDispatchMode, dispatch_modes, modes_disabled, function_mode_stack, DeviceContext: see every op, hide
#   from whoever else does, bring that back. Without them: no storage is followed, and re-runs lack a default
#   device.
__all__ = [
    "BackwardHookFunction", "Convolution", "DataDependentOutputException", "DeviceContext",
    "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "NormBase",
    "OpOverload", "TorchDispatchMode", "detect_fake_mode", "dispatch_modes", "function_mode_stack",
    "modes_disabled", "pytree",
]  # fmt: skip # rows


# ---- tensors and storages --------------------------------------------------------------------------------

# How often a tensor has been changed in place: what autograd checks, too. Without it: a re-run reads changed
# values unseen.
version_of: Callable[[Tensor], int] = attrgetter("_version")
# The identity of a storage while it lives, equal for all views; data_ptr is 0 for all without data. Without
# it: nothing can be counted by storage. Of tensors: ``layouts.storage_key``.
storage_id: Callable[[Any], int] = attrgetter("_cdata")
# Keeps the versions of tensors that are changed meanwhile and put back. Without it: autograd refuses what a
# re-run restored.
versions_kept: Callable[[tuple[Tensor, ...]], AbstractContextManager[None]]
versions_kept = torch.autograd._unsafe_preserve_version_counter


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes a tensor for a view. Without it: a change is reversed on its whole base."""
    return bool(tensor._is_view())


def neg_view(tensor: Tensor) -> Tensor:
    """Return the bits of a lazily negated tensor as they lie. Without it: ``resolve_neg`` copies them."""
    return tensor._neg_view()


def set_conj_and_neg(tensor: Tensor, conj: bool, neg: bool) -> None:
    """Say how the bits of a tensor are to be read. Without it: a conjugated one comes back changed."""
    torch._C._set_conj(tensor, conj)
    torch._C._set_neg(tensor, neg)


def coo_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a COO tensor. Without it: one that is not coalesced cannot be read."""
    return tensor._indices(), tensor._values()


# ---- autograd --------------------------------------------------------------------------------------------

# The backward that runs in this thread, -1 if none does. Without it: a forward within a backward (torch's
# checkpoint) passes for one of the training loop, and two backwards of one step for one.
graph_task = torch._C._current_graph_task_id
# Whether that backward leaves its graph for another one (retain_graph). Without it: nothing is released
# before the step ends.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Call something when the running backward has ended. Without it: the first step cannot be watched."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def function_of_node(node: Any) -> type:
    """Return the autograd.Function of a node. Without it: torch.library's own pass for the user's."""
    function: type = node._forward_cls
    return function


def is_of_library_op(function: type) -> bool:
    """Whether an autograd.Function is how torch.library runs an op's backward: such an op is in the graph."""
    return function.__module__ == "torch._library.autograd"


def hooks_of_gradients(leaf: Tensor) -> list[dict[Any, Any]]:
    """Return the dicts of hooks on a leaf's gradient. Without it: a trial may step an optimizer."""
    return [hooks for hooks in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks) if hooks]


def saved_tensors_hooks() -> Any:
    """Return the (pack, unpack) hooks entered last, or None. Without it: an aborted trial's hooks stay."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saved_tensors_refusal() -> str | None:
    """Return why hooks for saved tensors are refused at present; None if they are not."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()


def set_saved_tensors_hooks(hooks: Any, refusal: str | None) -> None:
    """Leave hooks until ``hooks`` are the last; refuse others as before. Without it: as above."""
    autograd = torch._C._autograd
    while (last := saved_tensors_hooks()) is not None:
        if hooks is not None and last[0] is hooks[0] and last[1] is hooks[1]:
            break
        autograd._pop_saved_tensors_default_hooks()
    if saved_tensors_refusal() != refusal:
        if refusal is None:
            autograd._saved_tensors_hooks_enable()
        else:
            autograd._saved_tensors_hooks_disable(refusal)


def dual_level() -> int:
    """Return the level of forward-mode AD, -1 for none. Without it: an aborted trial's level stays."""
    return int(forward_ad._current_level)


def leave_dual_level() -> None:
    """Leave forward-mode AD, whose one level tells only by an error that it has been entered."""
    with suppress(RuntimeError):
        torch._C._enter_dual_level()
    torch._C._exit_dual_level(level=0)
    forward_ad._current_level = -1


# ---- modes and transforms --------------------------------------------------------------------------------

# Within these, ops run below the functions of subclasses and modes, and below autocast. Without them: an op
# that is run to count its scratch bytes is seen by the user's modes, and cast.
torch_functions_disabled = torch._C.DisableTorchFunction
autocast_disabled = torch._C._DisableAutocast
# The functions of torch.func that are entered (vmap, grad). Without it: a planned forward within one trains
# wrongly.
transform_depth = functorch.get_dynamic_layer_stack_depth


def leave_transforms(depth: int) -> None:
    """Leave the transforms entered above ``depth``. Without it: an aborted trial's go on transforming ops."""
    for _ in range(depth, transform_depth()):
        # Before torch 2.13 an assertion fails once the last level has been left.
        with suppress(RuntimeError):
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def pop_dispatch_mode(mode: Any) -> None:
    """Take a mode off the stack. Without it: one whose exit raises stays."""
    _pop_mode(getattr(mode, "_mode_key", None))


def pop_function_modes(depth: int) -> None:
    """Leave the modes of functions entered above ``depth``. Without it: an aborted trial's stay."""
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()


def inference_mode_entered(flag: bool) -> Any:
    """Set inference mode while the result lives. Without it: an aborted trial's mode stays."""
    return torch._C._InferenceMode(flag)


def default_device_context() -> Any:
    """Return what ``torch.set_default_device`` has entered, or None. Without it: an aborted trial's stays."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


# ---- ops and graphs --------------------------------------------------------------------------------------


def schema_of(op: Any) -> Any:
    """Return the schema of an op, None of what is no op. Without it: changes in place are not seen."""
    return getattr(op, "_schema", None)


def composite_kernel(op: Any) -> Callable[..., Any] | None:
    """Return an op's kernel that is a series of other ops; None if it has none.

    ``op.decompose`` prefers one in Python, which may run other ops than a plain step. Without it: no
    composite op is kept in part.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if not isinstance(op, OpOverload) or not torch._C._dispatch_has_kernel_for_dispatch_key(
        op.name(), composite
    ):
        return None
    return functools.partial(op._op_dk, composite)


# What torch.export and all that it calls log to. Without it: their notes of what they gave up on reach the
# user.
EXPORT_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo")


def is_transform(target: Any) -> bool:
    """Whether a node enters or leaves a transform of torch.func. Without it: graphs are cut within one."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


def codegen_of(graph: fx.Graph) -> Any:
    """Return how a graph takes arguments and gives results. Without it: its copy takes others."""
    return graph._codegen


# ---- what of the process chooses kernels -----------------------------------------------------------------
# Every forward reads these: torch.backends takes 100 ns for one of attention's and 600 ns for one of cuDNN's,
# and has no order of attention's kernels; what torch.backends sets it refuses after ``disable_global_flags``.
# Without them: a plan made under other settings is followed, and re-runs choose other kernels.

flash_attention_enabled = torch._C._get_flash_sdp_enabled
mem_efficient_attention_enabled = torch._C._get_mem_efficient_sdp_enabled
math_attention_enabled = torch._C._get_math_sdp_enabled
cudnn_attention_enabled = torch._C._get_cudnn_sdp_enabled
sdp_priority, set_sdp_priority = torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order
onednn_enabled, set_onednn_enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled
quantized_engine = torch._C._get_qengine
cudnn_enabled, set_cudnn_enabled = torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled
cudnn_benchmark, set_cudnn_benchmark = torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark
cudnn_deterministic, set_cudnn_deterministic = (
    torch._C._get_cudnn_deterministic,
    torch._C._set_cudnn_deterministic,
)
cudnn_tf32, set_cudnn_tf32 = torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32
reduced_fp16 = torch._C._get_cublas_allow_fp16_reduced_precision_reduction
reduced_bf16 = torch._C._get_cublas_allow_bf16_reduced_precision_reduction
fp32_precision, set_fp32_precision = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


# ---- the compiler ----------------------------------------------------------------------------------------


def dynamo_is_loaded() -> bool:
    """Whether anything may be compiled. Without it: the compiler is loaded to ask, which takes seconds."""
    return "torch._dynamo" in sys.modules


def is_compiled_function(function: Any) -> bool:
    """Whether torch.compile made a function. Without it: a compiled step function loses its schedule."""
    return hasattr(function, "_torchdynamo_orig_callable")


def never_compiled(function: Any, why: str) -> Any:
    """Mark a function as ``torch.compiler.disable`` does. Without it: the compiler is loaded by all."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = why
    return function


# ---- memory and devices ----------------------------------------------------------------------------------

# Whether a profiler of autograd is on: two at once end each other. Without it: a user's profile is cut short.
profiler_is_on = torch._C._autograd._profiler_enabled


def legacy_memory_events() -> Callable[[], list[tuple[str, str, int]]] | None:
    """Have torch's older profiler note what the CPU's allocator does; None where torch has that no more.

    Without it ``costs.peak`` takes the public one: the same bytes in the same order, but two lines are
    printed at each use.

    Returns:
        ends it, and gives the (kind, name, bytes) of each event.
    """
    try:
        from torch._C._profiler import _ExperimentalConfig
        from torch.autograd import (
            ProfilerConfig,
            ProfilerState,
            _disable_profiler_legacy,
            _enable_profiler_legacy,
        )

        config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    except (ImportError, AttributeError, TypeError):
        return None
    _enable_profiler_legacy(config)

    def stop() -> list[tuple[str, str, int]]:
        threads = _disable_profiler_legacy()
        return [(str(e.kind()), e.name(), e.cpu_memory_usage()) for events in threads for e in events]

    return stop


def expandable_segments_are_on() -> bool:
    """Whether CUDA's allocator has expandable segments. Without it: slack is set aside for nothing."""
    return bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])


def keep_gpu_busy(cycles: int) -> None:
    """Occupy the current CUDA device. Without it: short kernels are timed as long as their launch."""
    torch.cuda._sleep(cycles)


# ---- modules and optimizers ------------------------------------------------------------------------------


def default_foreach(parameters: Sequence[Tensor], differentiable: bool) -> bool:
    """Whether an optimizer groups tensors by default. Without it: its temporaries are not counted."""
    return bool(_default_to_fused_or_foreach(list(parameters), differentiable, use_fused=False)[1])


def drop_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Take the hooks off a copy of an optimizer. Without it: the user's run in a trial."""
    optimizer._optimizer_step_pre_hooks = OrderedDict()
    optimizer._optimizer_step_post_hooks = OrderedDict()


def parametrizations_are_cached() -> bool:
    """Whether ``parametrize.cached`` is entered. Without it: steps that share cached weights go unseen."""
    parametrize = sys.modules.get("torch.nn.utils.parametrize")
    return parametrize is not None and bool(parametrize._cache_enabled)


def share_fsdp_state(model: nn.Module, twin: nn.Module) -> None:
    """Give a twin a model's fully_shard state. Without it: its ``unshard`` and the like raise."""
    from torch.distributed._composable_state import _get_module_state, _insert_module_state

    state = _get_module_state(model)
    if state is not None:
        _insert_module_state(twin, state)


# ---- patches ---------------------------------------------------------------------------------------------


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a class, an object or a module (items of a dict) within the block.

    Raises:
        TypeError: a class written in C, whose attributes cannot be replaced.
    """
    own = owner if isinstance(owner, dict) else vars(owner)
    before = {name: own[name] for name in values if name in own}
    put, drop = (dict.__setitem__, dict.__delitem__) if isinstance(owner, dict) else (setattr, delattr)
    done: list[str] = []
    try:
        for name, value in values.items():
            put(owner, name, value)
            done.append(name)
        yield
    finally:
        for name in done:
            if name in before:
                put(owner, name, before[name])
            else:
                drop(owner, name)
