"""``execute``: a plan and a model in; a model that trains by the plan out."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from executors.graph import GraphExecutor
from executors.modules import ModuleExecutor
from executors.watch import Watch, tightened
from scheduler.budget import format_bytes, machine_bytes
from scheduler.capture.graph_capture import GraphCapture, capture_graph, op_graphs
from scheduler.capture.module_capture import ModuleCapture, capture_modules, recorded_modules
from scheduler.capture.sample import Call, CallSignature, canonical_call, model_fingerprint
from scheduler.capture.sharded import reject_wrapped, sharded_within, share_sharding
from scheduler.capture.state import model_device, preserved
from scheduler.capture.verify import difference, run_step
from scheduler.costs.resident import storage_bytes
from scheduler.errors import CaptureError, PlanMismatch
from scheduler.plan import Plan

__all__ = ["execute", "plan_of"]

_RUNNER = "_rematplan"


class _Runner:
    """Runs training forwards of one planned model.

    A capture made in this process is used as it is; for a plan that was loaded, or a model other than the
    one it was made with, the model is captured again at the first forward, on the inputs given there, and
    must come out the same. A plan that was made without data is then tried against a plain step.
    """

    def __init__(self, plan: Plan, model: nn.Module, source: nn.Module, watching: bool) -> None:
        self.plan = plan
        self.watching = watching  # whether the next step is to be the first that is measured
        self.watch: Watch | None = None
        self.signature = inspect.signature(source.forward)
        self.want = CallSignature(plan.capture.structure, plan.capture.leaves)
        self.evaluating = frozenset(plan.capture.evaluating)
        self.sharded = len(sharded_within(model))
        self.executor: GraphExecutor | ModuleExecutor | None = None
        self.seen: tuple[Any, list[Any]] | None = None  # spec and leaf kinds of a call that was checked
        # Shallow copies of one model share these dicts, so that a capture of one is a capture of the other.
        live = plan.live[0] if plan.live is not None else None
        if live is not None and live._modules is source._modules and live._parameters is source._parameters:
            self.executor = self._executor(plan.live[1], model)

    def _executor(
        self, capture: GraphCapture | ModuleCapture, model: nn.Module
    ) -> GraphExecutor | ModuleExecutor:
        if isinstance(capture, GraphCapture):
            return GraphExecutor(capture, self.plan.program, model)
        return ModuleExecutor(capture, self.plan.program, model, functools.partial(_plain_forward, model))

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One training forward by the plan."""
        if "_is_replica" in model.__dict__:  # its parameters are not those that the executor reads
            raise RuntimeError(
                f"planned {type(model).__name__}: DataParallel copies a model to every device in each step, which a planned "
                "model cannot follow; use DistributedDataParallel(execute(plan, model)), one process per device"
            )
        call = canonical_call(self.signature, args, kwargs)
        flat, spec = pytree.tree_flatten(call)
        self._check(model, call, flat, spec)
        if self.executor is None:
            executor = self._executor(self._capture_again(model, call), model)
            if self.plan.capture.target:  # made without data: nothing of it was tried
                self._try(model, call, functools.partial(_forward, executor, flat, call))
            self.executor = executor
        if self.watching:
            self._watch(model)
        output = _forward(self.executor, flat, call)
        if self.watch is not None:
            self.watch.until_backward_ends(output)
        return output

    def _watch(self, model: nn.Module) -> None:
        """Judge the step that was watched, if there is one; else watch the one that begins, if it is as planned."""
        measured = requested = None
        if self.watch is not None:
            measured, requested, self.watch = self.watch.stop(), self.watch.requested, None
        if measured is not None:
            self.watching = False
            tighter = tightened(self.plan, measured, type(model).__name__, requested)
            if tighter is not None and self.executor is not None:
                self.plan = tighter
                self.executor = self._executor(self.executor.capture, model)
            return
        device = model_device(model)
        existing = storage_bytes((p.grad for p in model.parameters() if p.grad is not None), device)
        profiled = device.type == "cpu" and torch._C._autograd._profiler_enabled()
        if existing == self.plan.resident.get("existing gradients") and not profiled:
            self.watch = Watch(device)

    def _try(self, model: nn.Module, call: Call, planned: Callable[[], Any]) -> None:
        """One step by the plan against one plain step, bit for bit; a warning where that would be too dear."""
        hindrance = _hindrance(self.plan, model)
        if hindrance:
            warnings.warn(
                f"planned {type(model).__name__}: the plan was made without data, and it is not tried now whether it "
                f"trains bit for bit like the plain model: {hindrance}",
                stacklevel=4,
            )
            return
        plain = _plain_copy(model)
        want = run_step(plain, lambda: plain(*call[0], **call[1]), offload=True)
        differs = difference(want, run_step(model, planned))
        if differs is not None:
            raise PlanMismatch(
                f"planned {type(model).__name__}: the plan was made without data, and a step of it is not the plain "
                f"step: {differs}; call solve() on the model with its data, without device="
            )

    def _check(self, model: nn.Module, call: Call, flat: list[Any], spec: Any) -> None:
        """Refuse inputs and modes that the plan was not made for."""
        kinds = [
            (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in flat
        ]
        if self.seen is None or self.seen[0] != spec or self.seen[1] != kinds:
            self.want.check(call, f"planned {type(model).__name__}")
            self.seen = (spec, kinds)
        if len(sharded_within(model)) != self.sharded:
            raise PlanMismatch(
                f"planned {type(model).__name__}: fully_shard was called after execute(); call it first, then solve() and "
                "execute() on the sharded model"
            )
        for name, module in model.named_modules():
            if module.training == (name in self.evaluating):
                mode = "train" if module.training else "eval"
                raise PlanMismatch(
                    f"planned {type(model).__name__}: submodule {name!r} is in {mode} mode, and was not when the plan "
                    f"was made; put it back, or call solve() again in this mode"
                )

    def _capture_again(self, model: nn.Module, call: Call) -> GraphCapture | ModuleCapture:
        record = self.plan.capture
        plain = _plain_copy(model)
        if record.kind == "modules" and record.fed and torch.distributed.is_initialized():
            # A forward of this rank alone could wait for the others in a collective for ever.
            return recorded_modules(
                record.stages, record.fed, record.random, record.changed, model_device(model)
            )
        if record.kind == "modules":
            blocks = [model.get_submodule(name) for name in record.stages]
            with preserved(plain):
                capture: GraphCapture | ModuleCapture = capture_modules(plain, call, blocks)
            if len(capture) != len(self.plan.chain):
                raise PlanMismatch(
                    f"planned {type(model).__name__}: {len(capture)} stages are found where the plan has "
                    f"{len(self.plan.chain)}; make a new plan"
                )
            return capture
        try:
            graphs = op_graphs(plain, call)
            graph = next((graph for graph in graphs if graph.fingerprint() == record.graph), None)
        except CaptureError as error:
            raise PlanMismatch(
                f"planned {type(model).__name__}: the plan's op graph cannot be captured again: {error}"
            ) from error
        if graph is None:
            raise PlanMismatch(
                f"planned {type(model).__name__}: the op graph is not the one the plan was made for (torch "
                f"{self.plan.torch_version} then, {torch.__version__} now); make a new plan with solve()"
            )
        again = capture_graph(graph, plain, cuts=record.cuts)
        again.random, again.changed = list(record.random), list(record.changed)
        again.dropped = [tuple(map(frozenset, options)) for options in record.dropped]
        again.rerun, again.gaps, again.clearing = list(record.rerun), list(record.gaps), record.clearing
        return again


def _forward(executor: GraphExecutor | ModuleExecutor, flat: list[Any], call: Call) -> Any:
    if isinstance(executor, GraphExecutor):
        return executor.forward(flat)
    return executor.forward(*call)


def _hindrance(plan: Plan, model: nn.Module) -> str | None:
    """Why a plain step beside a planned one cannot be had for little; None if it can."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "a backward of its own would get in the way of torch.distributed"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        return "its parameters have hooks, which would see gradients of a trial"
    if plan.plain.peak > machine_bytes() / 2:
        return f"the plain step takes {format_bytes(plan.plain.peak)}, more than half of the host's memory"
    return None


def _plain_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class that ``execute`` derived from."""
    original: Any = _original(model)
    return original.forward(model, *args, **kwargs)


def _plain_copy(model: nn.Module) -> nn.Module:
    """The same model, sharing everything, of its original class."""
    plain = _shallow(model)
    plain.__class__ = _original(model)
    for name in (_RUNNER, "_compiled_call_impl"):
        plain.__dict__.pop(name, None)
    return plain


def _original(model: nn.Module) -> Any:
    """The class that the planned model's class was derived from."""
    return type(model).__mro__[1]


def _shallow(model: nn.Module) -> nn.Module:
    twin: nn.Module = object.__new__(model.__class__)
    twin.__dict__.update(model.__dict__)
    share_sharding(model, twin)
    return twin


def execute(plan: Plan, model: nn.Module, *, watch: bool | None = None) -> nn.Module:
    """A model that trains by ``plan``: same class by isinstance, same parameters, same ``state_dict``.

    A forward in train mode with grad enabled follows the plan. In eval mode, or under ``torch.no_grad``, the
    model's own forward runs. The given model is not changed and goes on running plainly; the two share
    parameters, buffers and submodules.

    Args:
        plan: from ``scheduler.solve`` or ``Plan.load``.
        model: the model that the plan was made for, or one like it.
        watch: whether the peak of the first step is measured, and judged when the next begins. If it is above the
            predicted one, a PeakWarning says by how much; if it is over the budget, later steps follow a schedule that is
            tighter by the difference. Default: on CUDA, where it costs nothing (the allocator's peak statistics are
            reset once). On the CPU it takes the autograd profiler from that step's forward to the next one's.

    Returns:
        the planned model.

    Raises:
        TypeError: not a Plan, or not a module.
        PlanMismatch: the plan was made for another model. Raised by the planned model's forward if the
            inputs, or the modes of its submodules, are not those of the plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"execute: plan is a {type(plan).__name__}, expected a Plan; the call is execute(plan, model)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"execute: model is a {type(model).__name__}, expected a torch.nn.Module")
    if _RUNNER in model.__dict__:
        model = _plain_copy(model)
    reject_wrapped("execute", model)
    device = model_device(model)
    if device.type != plan.capture.device:
        raise PlanMismatch(
            f"execute: the plan was made for {plan.capture.device}, the model is on {device}; call solve() there"
        )
    if model_fingerprint(model) != plan.capture.model:
        raise PlanMismatch(
            f"execute: the plan was made for another {type(model).__name__}: class, or names, shapes, dtypes or "
            "requires_grad of parameters or buffers differ; call solve() on this model"
        )
    planned = _shallow(model)
    planned.__class__ = _planned_class(type(model))  # type: ignore[arg-type] # Module's __hash__ confuses mypy
    watching = device.type == "cuda" if watch is None else watch
    planned.__dict__[_RUNNER] = _Runner(plan, planned, model, watching)
    return planned


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that a model trains by, or None."""
    runner = model.__dict__.get(_RUNNER)
    return runner.plan if isinstance(runner, _Runner) else None


def _eagerly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The training forward of a planned model that was compiled: by its plan, and not compiled."""
    warnings.warn(
        f"planned {type(model).__name__}: torch.compile of a planned model is left out, for it would lose the schedule; compile "
        "its blocks instead (block.compile()), before solve(..., capture=[blocks])",
        stacklevel=2,
    )
    return torch.compiler.disable(model.__dict__[_RUNNER].forward)(model, args, kwargs)


# What torch.compiler.disable sets; itself it would load the compiler, which takes seconds, for everyone.
_eagerly._torchdynamo_disable = True  # type: ignore[attr-defined]
_eagerly._torchdynamo_disable_msg = "a planned model is not compiled as a whole; compile its blocks"  # type: ignore[attr-defined]


@functools.cache
def _planned_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls``, of the same name, whose training forward follows the model's plan."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _eagerly(self, args, kwargs)
        return self.__dict__[_RUNNER].forward(self, args, kwargs)

    def reduce(self: nn.Module, _protocol: Any) -> Any:
        # The derived class has no importable name: pickle and deepcopy take the plain model and the plan.
        return _restore, (self.__dict__[_RUNNER].plan.to_json(), copy.copy(_plain_copy(self)))

    return type(
        cls.__name__,
        (cls,),
        {"forward": forward, "_rematplan_plain": _plain_copy, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__,
         "__qualname__": cls.__qualname__},
    )  # fmt: skip # one table


def _restore(plan: dict[str, Any], model: nn.Module) -> nn.Module:
    return execute(Plan.from_json(plan), model)
