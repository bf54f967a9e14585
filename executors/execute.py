"""``execute``: derive from a model one that trains by a plan."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import MethodType
from typing import Any, TypeVar, overload

import torch
from torch import nn

from rematplan.executors.model_guard import benchmarks_convolutions
from rematplan.executors.plain import plain_copy, plain_forward, plans_within, sharing, wrappers
from rematplan.executors.plans import Plans, Settings
from rematplan.scheduler.capture.step_function import StepFunction, as_model
from rematplan.scheduler.core.errors import PlanMismatch
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import model_fingerprint
from rematplan.scheduler.torch_layer.eager import wrapped_forward
from rematplan.scheduler.torch_layer.fsdp import reject_wrapped
from rematplan.scheduler.torch_layer.nested_plans import within_a_plan
from rematplan.scheduler.torch_layer.preserve import model_device
from rematplan.scheduler.torch_layer.private import never_compiled

__all__ = ["execute", "plan_of", "plans_of", "trace_of"]


M = TypeVar("M", bound=nn.Module)


@overload
def execute(
    plan: Plan | Sequence[Plan],
    model: M,
    *,
    watch: bool | None = ...,
    on_new_shape: str = ...,
    max_plans: int = ...,
    on_oom: str | None = ...,
    check: str = ...,
    debug: bool = ...,
) -> M: ...


@overload
def execute(
    plan: Plan | Sequence[Plan],
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    *,
    watch: bool | None = ...,
    on_new_shape: str = ...,
    max_plans: int = ...,
    on_oom: str | None = ...,
    check: str = ...,
    debug: bool = ...,
) -> nn.Module: ...


def execute(
    plan: Plan | Sequence[Plan],
    model: nn.Module | Callable[..., Any] | Sequence[Callable[..., Any]],
    *,
    watch: bool | None = None,
    on_new_shape: str = "plan",
    max_plans: int = 8,
    on_oom: str | None = None,
    check: str = "metadata",
    debug: bool = False,
) -> Any:
    """Return a model that trains by ``plan``: same class by isinstance, same parameters, same ``state_dict``.

    A forward in train mode with grad enabled follows the plan. In eval mode, or under ``torch.no_grad``, the
    model's own forward runs. The given model stays plain; the two share parameters, buffers and submodules.

    Args:
        plan: from ``rematplan.solve`` or ``Plan.load``; or a list of them for calls of several shapes, of
            which the first gives budget, solver and optimizer to further plans.
        model: the model that the plan was made for, or one like it; or a list of callables
            (``CallableChain``); or the step function: call the planned model in its place, and ``backward``
            on what it returns.
        watch: whether to measure the first step's peak, judged when the next step begins. Above the predicted
            peak, a PeakWarning says by how much; above the budget, later steps follow a schedule that is
            tighter by the difference. Default: on CUDA, where it costs nothing (the allocator's peak
            statistics are reset once). On the CPU it occupies the autograd profiler from that forward to the
            next. Not for a model sharded by fully_shard, whose ranks must keep to one schedule.
        on_new_shape: what to do when a training call has other shapes, dtypes, plain values or arguments than
            any plan. "plan": plan first, which takes as long as ``solve``, leaves gradients, buffers and
            random numbers unchanged, counts gradients that exist, and is logged to ``rematplan``. "plain":
            run such calls without a plan, maybe above the budget; logged once. "error": raise PlanMismatch.
        max_plans: the most plans held, of which the first one stays; the least recently used other one is
            dropped, with a NewShapeWarning the first time.
        on_oom: what to do when a forward raises torch.OutOfMemoryError. "replan": restore buffers and
            generators, switch to a plan that takes less (a PeakWarning says which), and run the forward once
            more; after a replay in a backward that ran out of memory, the next forward switches
            (``run_step`` runs the whole step again). "raise": nothing. Default: "replan" on CUDA; "raise"
            elsewhere, where nothing raises it, and for a model sharded by fully_shard.
        check: how every recomputed tensor is compared with that of the first run: "metadata" (shape, dtype,
            strides, device), "values" (a checksum too, which names the op that differs between runs; it waits
            for the device at each tensor) or "none".
        debug: whether to record the latest step for ``trace_of``.

    Raises:
        TypeError: not a Plan, or not a module.
        ValueError: an option that is unknown, or not for sharded models; a model whose ``forward`` was
            replaced on the object, or a wrapper that goes around a planned model.
        PlanMismatch: the plan was made for another model. By the planned model's forward: inputs (with
            ``on_new_shape="error"``) or modes of submodules differ from the plan's.
        InfeasibleBudget, CaptureError: by the planned model's forward: a new shape cannot be planned.
        ReplayError: by its backward: a re-run does not repeat its first run.

    Warns:
        PeakWarning: a step takes more than was predicted. NewShapeWarning: shapes that cannot be planned run
            plainly.

    Example:
        >>> planned = execute(plan, model)
        >>> planned(batch).sum().backward()  # by the plan
    """
    plans = [plan] if isinstance(plan, Plan) else plan
    if not isinstance(plans, (list, tuple)) or not plans or not all(isinstance(each, Plan) for each in plans):
        raise TypeError(
            f"execute: plan is a {type(plan).__name__}, expected a Plan or a list of them; the call is execute(plan, model)"
        )
    model = _planned_for(plans, model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"execute: model is a {type(model).__name__}, expected a torch.nn.Module")
    settings = Settings(watch, on_new_shape, max_plans, on_oom, check, debug)
    if plans_within(model) is not None:
        model = plain_copy(model)
    reject_wrapped("execute", model)
    if wrapped_forward(model) is not None:
        raise ValueError(
            f"execute: the forward of this {type(model).__name__} was replaced on the object, as accelerate's prepare() does "
            "under mixed precision, and would go around the plan; call execute() first, then what wraps the forward"
        )
    frozen = tuple(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    for each in plans:
        _reject_other(each, model)
        if each.capture.frozen != frozen:
            now, then = set(frozen), set(each.capture.frozen)
            raise PlanMismatch(
                f"execute: the plan was made for another {type(model).__name__}: parameters that require grad differ "
                f"({', '.join(sorted(now ^ then)[:3])}); call solve() on the model as it is trained"
            )
    if benchmarks_convolutions(model, model_device(model)):
        warnings.warn(
            f"execute: torch.backends.cudnn.benchmark is on, and replays of {type(model).__name__} run in autograd's thread, where "
            "cuDNN tries its algorithms once more and may choose others: gradients may then differ in their last bits, and the "
            "first step may take more than was predicted. Set torch.backends.cudnn.deterministic = True, or benchmark = False",
            stacklevel=2,
        )
    return _executed(plans, model, settings)


def _reject_other(plan: Plan, model: nn.Module) -> None:
    """Raise PlanMismatch for a plan made for another model or device."""
    device = model_device(model)
    if device.type != plan.capture.device:
        raise PlanMismatch(
            f"execute: the plan was made for {plan.capture.device}, the model is on {device}; call solve() there"
        )
    if model_fingerprint(model) != plan.capture.model:
        raise PlanMismatch(
            f"execute: the plan was made for another {type(model).__name__}: class, or names, shapes or dtypes "
            "of parameters or buffers differ; call solve() on this model"
        )


def _executed(plans: Sequence[Plan], model: nn.Module, settings: Settings) -> nn.Module:
    planned = sharing(model, _planned_class(type(model)))  # type: ignore[arg-type] # Module's __hash__ confuses mypy
    planned._rematplan_own = {}  # type: ignore[assignment] # slots of the class
    planned._rematplan_plans = Plans(plans, planned, model, settings)  # type: ignore[assignment]
    return planned


def _planned_for(plans: Sequence[Plan], model: Any) -> Any:
    """Return the model to execute: for a step function, the one that was planned in this process."""
    for plan in plans:
        live = plan.live[0] if plan.live is not None else None
        if isinstance(live, StepFunction) and not isinstance(model, nn.Module) and live.function == model:
            return live
    return as_model(model)


def plan_of(model: nn.Module) -> Plan | None:
    """Return the (first) plan that a model trains by, or None.

    Example:
        >>> plan_of(execute(plan, model)) is plan
        True
    """
    return next(iter(plans_of(model)), None)


def plans_of(model: nn.Module) -> tuple[Plan, ...]:
    """Return all plans that a model trains by: the first, then those of other shapes, last used last.

    Example:
        >>> len(plans_of(execute(plan, model)))
        1
    """
    plans = plans_within(model)
    if plans is None:
        return ()
    found: list[Plan] = []
    for runner in (plans.first, *plans.others):
        plan = runner.plan
        # Graphs of other Python state, or of other plain values, share one.
        if not any(each.chain is plan.chain and each.schedule == plan.schedule for each in found):
            found.append(plan)
    return tuple(found)


def trace_of(model: nn.Module) -> str:
    """Return what the latest planned step of a model ran, recomputed and freed, one event a line.

    Raises:
        ValueError: the model does not train by a plan with ``debug=True``, or has run no step.

    Example:
        >>> planned = execute(plan, model, debug=True)
        >>> planned(batch).sum().backward()
        >>> "run" in trace_of(planned)
        True
    """
    plans = plans_within(model)
    if plans is None or not plans.settings.debug:
        raise ValueError(
            f"trace_of: {type(model).__name__} was not planned with a trace; pass debug=True to execute()"
        )
    if plans.trace is None:
        raise ValueError(f"trace_of: {type(model).__name__} has run no planned step yet")
    return plans.trace.text()


def _eagerly(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward of a planned model that was compiled by its plan, uncompiled."""
    warnings.warn(
        f"planned {type(model).__name__}: torch.compile of a planned model is left out, for it would lose the schedule; pass "
        "backend='inductor' to solve instead, or compile the blocks (block.compile()) before solve(..., capture=[blocks])",
        stacklevel=2,
    )
    return torch.compiler.disable(plans_within(model).forward)(model, args, kwargs)


_WHOLE = "a planned model is not compiled as a whole; pass backend='inductor' to solve"
never_compiled(_eagerly, _WHOLE)


@functools.cache
def _planned_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``cls``, of the same name, whose training forward follows the model's plan."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or within_a_plan():
            return plain_forward(self, *args, **kwargs)
        if not self.training:
            plans = plans_within(self)
            plainly = functools.partial(plain_forward, self, *args, **kwargs)
            return plainly() if plans is None else plans.in_flight.plainly(self, plainly, plans.first.plan)
        if torch.compiler.is_compiling():
            return _eagerly(self, args, kwargs)
        plans = plans_within(self)
        if plans is None:  # a copy without what planned models have of their own
            raise RuntimeError(
                f"planned {type(self).__name__}: DataParallel copies a model to every device in each step, which a planned "
                "model cannot follow; use DistributedDataParallel(execute(plan, model)), one process per device"
            )
        return plans.forward(self, args, kwargs)

    # A signature, but no way past the plan: accelerate unwraps a forward as far as ``__wrapped__`` goes.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__

    def reduce(self: nn.Module, _protocol: Any) -> Any:
        # The derived class cannot be imported: pickle and deepcopy take the plain model and the plans.
        plans, added = plans_within(self), wrappers(self)
        plain = object.__new__(cls)
        plain.__dict__.update({n: v for n, v in vars(self).items() if n not in added})
        arguments = [plan.to_json() for plan in plans_of(self)], plain, asdict(plans.settings)
        return _restore, arguments, added or None

    def set_state(self: nn.Module, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    return type(
        cls.__name__,
        (cls,),
        {"__slots__": ("_rematplan_own", "_rematplan_plans"), "forward": _OwnAttribute("forward", forward),
         "_compiled_call_impl": _OwnAttribute("_compiled_call_impl", None), "_rematplan_plain": plain_copy, "__reduce_ex__": reduce, "__setstate__": set_state,
         "__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__},
    )  # fmt: skip # one table


def _bound(function: Any, model: Any) -> Any:
    return MethodType(function, model)


# The compiler stops here, and says why a planned model is no full graph.
never_compiled(_bound, _WHOLE)


class _OwnAttribute:
    """An attribute of planned models alone; all others are shared with the plain model, which runs plainly.

    Args:
        default: of the class; a function is bound to the object.
    """

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, model: Any, _: Any = None) -> Any:
        if model is None:
            return self.default
        own = getattr(model, "_rematplan_own", {})  # a copy that DataParallel makes has none
        if self.name in own:
            return own[self.name]
        return None if self.default is None else _bound(self.default, model)

    def __set__(self, model: Any, value: Any) -> None:
        model._rematplan_own[self.name] = value

    def __delete__(self, model: Any) -> None:
        if model._rematplan_own.pop(self.name, self) is self:
            raise AttributeError(self.name)


def _restore(plans: list[dict[str, Any]], model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    return _executed([Plan.from_json(plan) for plan in plans], model, Settings(**settings))
