"""Name everything private of torch that this project uses, and make every patch.

Names. All are in the wheels of torch 2.10.0, 2.13.0 and 2.14.1; the tests have run under 2.11.0 and 2.13.0.
Each says what it is for and what is lost without it; nothing public gives that as exactly, or as fast where a
forward asks for it. tests/capture/test_private_names.py tries each, and finds any other in the code.

Not here, for pickled models and exported programs carry them and so keep them stable: attributes of nn.Module
(``_parameters``, ``_forward_hooks``, ``_compiled_call_impl``, ...) and names of ops (``aten._softmax``).

Patches. ``replaced`` makes and undoes them. They are of the whole process while a plan is made or a graph is
captured; other forwards of a planned model make none:

* ``autograd.Function.apply`` and ``Tensor.register_hook`` (export.py): an export drops custom backwards and
  hooks on tensors silently; seen, they refuse the graph.
* ``torch.autograd.grad`` (inner_gradients.py): torch.export cannot follow it; seen, the graph is traced
  otherwise.
* flags of ``torch.compiler``, and ``is_fake_tensor`` of transformers (eager.py): code that asks whether it is
  exported runs other ops than in a plain step.
* ``__getattribute__`` of classes of modules and of what they reach (python_reads.py), or of arguments of a
  call (call_reads.py): a graph holds while what its forward has read is unchanged.
* ``backward`` and ``zero_grad`` (step_function.py): a step function must not call them.
* draws of ``random`` and ``numpy.random`` (layer_drop.py): layers that are dropped at random all run.
* ``forward`` and the dicts of hooks of one model (eager.py, export.py, solve.py, preserve.py): its calls are
  led through a capture.

Two files set attributes of single modules themselves: calls.py the ``forward`` (or ``_compiled_call_impl``)
of blocks, at every step and so by the fastest way; lightning.py the ``forward`` of one module until its first
call. A planned model, and the module that ``preserve.bare`` yields, are no patches: they are objects of a
subclass that share the ``__dict__`` of the model, which keeps its class.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from operator import attrgetter, methodcaller
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

# Re-exported as they are; the rest of the project uses everything defined below, too.
# - FakeTensor, FakeTensorMode, detect_fake_mode, two exceptions: tensors without data. Without: no op graph.
# - OpOverload, HigherOrderOperator: kinds of ops. Without: a branch passes for an op.
# - BackwardHookFunction: a module's backward hook in autograd's graph. Without: passes for the user's own.
# - NormBase, Convolution: all batch norms, all convolutions. Without: a loaded plan that leaves out a norm's
#   statistics is followed; nobody is warned of cuDNN's benchmark.
# - pytree: how torch takes arguments apart. Without: containers that libraries register are leaves.
# - TorchDispatchMode, dispatch_modes, modes_disabled, function_mode_stack, DeviceContext: see every op, hide
#   ops from other modes, restore modes. Without: no storage is followed; re-runs lack a default device.
__all__ = [
    "BackwardHookFunction", "Convolution", "DataDependentOutputException", "DeviceContext",
    "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode", "HigherOrderOperator", "NormBase",
    "OpOverload", "TorchDispatchMode", "detect_fake_mode", "dispatch_modes", "function_mode_stack",
    "modes_disabled", "pytree",
]  # fmt: skip # rows


# ---- tensors and storages --------------------------------------------------------------------------------

# Count of a tensor's changes in place, which autograd checks. Without it: re-runs read changed values unseen.
version_of: Callable[[Tensor], int] = attrgetter("_version")
# The identity of a storage while it lives, equal for all views; data_ptr is 0 for all without data. Without
# it: nothing can be counted by storage. Of tensors: ``layouts.storage_key``.
storage_id: Callable[[Any], int] = attrgetter("_cdata")
# Keeps the versions of tensors that are changed within it. Without it: autograd refuses restored values.
versions_kept: Callable[[tuple[Tensor, ...]], AbstractContextManager[None]]
versions_kept = torch.autograd._unsafe_preserve_version_counter
# Whether autograd takes a tensor for a view. Without it: a change is reversed on its whole base.
is_view: Callable[[Tensor], bool] = methodcaller("_is_view")
# The bits of a lazily negated tensor as they lie. Without it: ``resolve_neg`` copies them.
neg_view: Callable[[Tensor], Tensor] = methodcaller("_neg_view")


def set_conj_and_neg(tensor: Tensor, conj: bool, neg: bool) -> None:
    """Set whether a tensor's bits are read as conjugated or negated. Without it: copies lose that."""
    torch._C._set_conj(tensor, conj)
    torch._C._set_neg(tensor, neg)


def coo_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values of a COO tensor. Without it: one that is not coalesced cannot be read."""
    return tensor._indices(), tensor._values()


# ---- autograd --------------------------------------------------------------------------------------------

# The number of the backward that runs in this thread, -1 for none. Without it: a forward within a backward
# (torch's checkpoint) passes for one of the training loop, and two backwards of one step for one.
graph_task = torch._C._current_graph_task_id
# Whether that backward keeps its graph (retain_graph). Without it: nothing is released before the step ends.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
# Calls a function when the running backward has ended. Without it: the first step cannot be watched.
at_end_of_backward: Callable[[Callable[[], None]], None]
at_end_of_backward = torch.autograd.Variable._execution_engine.queue_callback
# The autograd.Function of a node. Without it: torch.library's own pass for the user's.
function_of_node: Callable[[Any], type] = attrgetter("_forward_cls")
# Why hooks for saved tensors are refused now, None if they are not. Without it: a trial's refusal stays.
saved_tensors_refusal = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
# The (pack, unpack) hooks entered last, or None. Without it: an aborted trial's hooks stay.
saved_tensors_hooks = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, True)


def is_of_library_op(function: type) -> bool:
    """Whether an autograd.Function is how torch.library runs an op's backward: such an op is in the graph."""
    return function.__module__ == "torch._library.autograd"


def hooks_of_gradients(leaf: Tensor) -> list[dict[Any, Any]]:
    """Return the dicts of hooks on a leaf's gradient. Without it: a trial may step an optimizer."""
    return [hooks for hooks in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks) if hooks]


def set_saved_tensors_hooks(hooks: Any, refusal: str | None) -> None:
    """Leave hooks entered after ``hooks``, and refuse others if ``refusal`` says why."""
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

# Contexts in which ops run below subclasses and modes of functions, and below autocast. Without them: the
# user's modes see an op that is run to count its scratch bytes, and autocast casts it.
torch_functions_disabled = torch._C.DisableTorchFunction
autocast_disabled = torch._C._DisableAutocast
# Number of torch.func's transforms (vmap, grad) entered. Without it: a planned forward in one trains wrongly.
transform_depth = functorch.get_dynamic_layer_stack_depth
# Sets inference mode while the result lives. Without it: an aborted trial's mode stays.
inference_mode_entered: Callable[[bool], Any] = torch._C._InferenceMode


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


def default_device_context() -> Any:
    """Return what ``torch.set_default_device`` has entered, or None. Without it: an aborted trial's stays."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


# ---- ops and graphs --------------------------------------------------------------------------------------


def schema_of(op: Any) -> Any:
    """Return the schema of an op, None for anything else. Without it: changes in place are not seen."""
    return getattr(op, "_schema", None)


def composite_kernel(op: Any) -> Callable[..., Any] | None:
    """Return an op's kernel that is a series of other ops; None if it has none.

    ``op.decompose`` prefers one in Python, which may run other ops than a plain step. Without it: no
    composite op is kept in part.
    """
    key, has_kernel = torch._C.DispatchKey, torch._C._dispatch_has_kernel_for_dispatch_key
    if isinstance(op, OpOverload) and has_kernel(op.name(), key.CompositeImplicitAutograd):
        return functools.partial(op._op_dk, key.CompositeImplicitAutograd)
    return None


# How a graph takes arguments and gives results. Without it: its copy takes others.
codegen_of: Callable[[fx.Graph], Any] = attrgetter("_codegen")
# The loggers of torch.export and of all it calls. Without it: their notes of failed tries reach the user.
EXPORT_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo")


def is_transform(target: Any) -> bool:
    """Whether a node enters or leaves a transform of torch.func. Without it: graphs are cut within one."""
    return getattr(target, "__module__", "") == "torch._functorch.predispatch"


# ---- switches of the process that choose kernels ---------------------------------------------------------
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
cudnn_deterministic = torch._C._get_cudnn_deterministic
set_cudnn_deterministic = torch._C._set_cudnn_deterministic
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

# Occupies the CUDA device for some cycles. Without it: short kernels are timed as long as their launch.
keep_gpu_busy: Callable[[int], None] = torch.cuda._sleep
# Whether a profiler of autograd is on: two at once end each other. Without it: a user's profile is cut short.
profiler_is_on = torch._C._autograd._profiler_enabled


def legacy_memory_events() -> Callable[[], list[tuple[str, str, int]]] | None:
    """Start torch's older profiler of the CPU's allocator; None where torch has it no more.

    Without it ``costs.meters.peak`` takes the public one: the same bytes in the same order, but two lines are
    printed at each use.

    Returns:
        a function that ends it and returns the (kind, name, bytes) of each event.
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


# ---- Inductor --------------------------------------------------------------------------------------------


def compile_graph(module: fx.GraphModule, arguments: Sequence[Tensor], share: float) -> Callable[..., Any]:
    """Return a graph of ops compiled by Inductor, as a function that autograd differentiates.

    Public torch.compile reads Python code, makes guards and gives up after eight variants of a function; what
    is compiled here is a graph already. A backward may run again (no buffers are donated), and random seeds
    are saved: torch 2.13 draws others in the backward where it recomputes a mask
    (https://github.com/pytorch/pytorch/issues/190717). Without it: nothing is compiled.

    Args:
        arguments: of the shapes, strides and ``requires_grad`` that it is compiled for; not run.
        share: of the activations that Inductor's partitioner would save, the most that it may.

    Raises:
        Exception: whatever Inductor raises for a graph that it cannot compile.
    """
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    copy = fx.GraphModule(module, deepcopy(module.graph))
    with (
        modes_disabled(),
        torch.enable_grad(),
        functorch_config.patch(
            activation_memory_budget=share, donated_buffer=False, force_non_lazy_backward_lowering=True
        ),
        inductor_config.patch(joint_custom_post_pass=_seeds_saved()),
    ):
        function: Any = compile_fx(copy, [*arguments])
    return lambda *given: tuple(function(*given))


def allow_retained_graphs(results: Sequence[Tensor]) -> None:
    """Let the backward of a compiled graph run with its graph retained; ``results`` are of its first run.

    torch 2.13 asks at run time whether buffers were donated, and takes "not known" for yes. Without it:
    ``backward(retain_graph=True)`` raises, though nothing was donated.
    """
    nodes = {result.grad_fn for result in results if result.grad_fn is not None}
    for _ in range(3):  # the views that it returns lie before its own node
        nodes |= {node for each in nodes for node, _ in each.next_functions if node is not None}
    for node in nodes:
        metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
        if metadata is not None and getattr(metadata, "bw_donated_idxs", ()) is None:
            metadata.bw_donated_idxs = []


def no_compiler(device: str) -> str:
    """Return why Inductor cannot compile for a type of device, in words; "" if it can.

    Without it: the first of many stages fails, minutes into planning.
    """
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler: install g++ or clang++, or set CXX to one"
        return ""
    try:
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton does not serve this device: install the triton of this torch"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # of its import, or of its driver
        return f"Triton does not load: {error}"


@functools.cache
def _seeds_saved() -> Any:
    """Return a pass over joint graphs by which what draws from the generators is always saved."""
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    class SeedsSaved(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for node in graph.nodes:
                name, tags = str(node.target), getattr(node.target, "tags", ())
                if name.startswith(SEEDS) or torch.Tag.nondeterministic_seeded in tags:
                    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

        def uuid(self) -> str:  # part of the key of Inductor's cache
            return "rematplan: seeds saved, 1"

    return SeedsSaved()


SEEDS = ("prims.inductor_seed", "prims.inductor_lookup_seed")


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
