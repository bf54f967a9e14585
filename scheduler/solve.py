"""``solve``: a model, a sample and a budget in; a plan out. The one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.blocks.callables import CallableChain
from rematplan.scheduler.capture.protocol import Asked, Capture
from rematplan.scheduler.capture.step_function import StepFunction, as_model
from rematplan.scheduler.capture.trial_step import TrialStep, first_forward, with_plain_step
from rematplan.scheduler.core.budget import format_bytes, parse_budget
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.errors import CaptureError, InfeasibleBudget
from rematplan.scheduler.costs.meters.cuda_overheads import allocator_slack
from rematplan.scheduler.costs.resident import optimizer_bytes, optimizer_step_bytes, resident_parts
from rematplan.scheduler.plan.kinds import BLOCKS, COMPILED, KINDS
from rematplan.scheduler.plan.plan import CaptureRecord, Plan
from rematplan.scheduler.solvers import SOLVERS, checked_solver, solve_chain
from rematplan.scheduler.torch_layer.call import (
    Call,
    CallSignature,
    canonical_call,
    forward_signature,
    model_fingerprint,
    nothing_to_train,
    read_sample,
    reject_unusable,
    reject_unusual,
    unplanned,
)
from rematplan.scheduler.torch_layer.device_memory import device_bytes, free_device_bytes
from rematplan.scheduler.torch_layer.environment import environment_text
from rematplan.scheduler.torch_layer.fake import has_data, without_hardware
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.nested_plans import inner_plans_left_out
from rematplan.scheduler.torch_layer.preserve import HostRandomState, model_device, set_apart
from rematplan.scheduler.torch_layer.private import no_compiler
from rematplan.scheduler.torch_layer.target import Device, Target
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["Priced", "Request", "checked", "priced", "solve", "solve_again"]

COSTS = ("measure", "roofline")
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """The checked arguments of one solve()."""

    model: nn.Module
    budget: int
    call: Call
    cacheless: bool  # use_cache=False was added to the call
    device: Device
    solver: str
    parameters: Mapping[str, Any]
    capture: Asked
    costs: str
    optimizer_state: int
    optimizer_step: int | None
    progress: Progress


@dataclass(frozen=True, slots=True)
class Priced:
    """A captured model with its costs.

    Attributes:
        reason: why it was captured so.
        step: the trials of the model.
        resident: the chain's fixed bytes by kind.
    """

    captured: Capture
    reason: str
    step: TrialStep
    chain: Chain
    resident: dict[str, int]


def solve(
    model: nn.Module | Callable[..., Any] | Sequence[Callable[..., Any]],
    memory_budget: int | str,
    *,
    sample: Any,
    solver: str = "optimal",
    parameters: Mapping[str, Any] | None = None,
    capture: str | Iterable[nn.Module] = "auto",
    costs: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: DeviceSpec | str | None = None,
    backend: str = "eager",
    progress: Progress | None = None,
) -> Plan:
    """Plan the training step of ``model`` so that it fits ``memory_budget``, at the least extra time.

    The model is left as it is: parameters, gradients, buffers, random-number state; so is the sample. The
    costs of a graph's stages are remembered as long as the model lives: planning it again for another budget
    takes less time and finds the same figures (``Plan.within`` takes none). On CUDA the peaks of
    ``torch.cuda.max_memory_allocated`` are reset.

    Args:
        model: in train mode, on one device, or sharded by fully_shard; then every rank makes this call. One
            that trains by a plan already is planned again. With ``device`` it may be without data: on meta,
            or made under FakeTensorMode. Or a list of callables, the stages: each is called with the result
            of the one before (``CallableChain``). Or a step function: any callable (function, lambda,
            functools.partial, bound method, callable object) that calls the models it uses, as often as it
            likes, and returns the loss. Modules are found in its closure, in global variables that it names,
            in its own object, and in the sample; the loss that it makes of their outputs is in the plan. It
            leaves ``backward`` to the training loop.
        memory_budget: peak device bytes of a whole training step: parameters, buffers, gradients, optimizer
            state if an optimizer is given, inputs, activations. An int, or text: "6GiB", "800MB", "75%" of
            the device's memory; "auto" is the memory that is free or held by the step already, less 5 % of
            the device's; "auto - 2GiB" leaves another reserve.
        sample: a training batch, of which only the form matters: a tensor, a tuple of positional arguments, a
            dict of keyword arguments, or ``(args, kwargs)``.
        solver: a name in ``rematplan.scheduler.solvers.SOLVERS``; one that is ``executable``.
        parameters: of the solver, by name: ``{"keep": "attn"}`` for "selective", ``{"host":
            HostMemory(...)}`` for "two_level", which takes a graph capture.
        capture: "graph" (torch.export), "modules" (blocks that run in order), "auto" (graph where it is
            exact, else modules; of callables, these; modules where one module is called a hundred times in a
            row, each call fed by the one before), or the blocks themselves: a list of modules or an
            nn.Sequential. A module that is called several times is a block at each call.
        costs: "measure" (seconds by the clock) or "roofline" (from FLOPs and bytes); bytes are counted either
            way. Default: "measure", and "roofline" with ``device``.
        optimizer: its state counts towards the budget.
        device: plan for this device instead of the one that holds the model: a DeviceSpec, or the name of a
            built-in one ("H100", "A100-80GB", ...). Nothing runs on data, and no memory is taken; so the
            captured graph is not tried against the plain step, and scratch space of kernels is not counted.
        backend: "eager", or "inductor": it compiles the stages of the op graph, each to save all of its
            activations or less. Loss and gradients are then, bit for bit, those of the same compiled stages
            all kept, and differ from the eager model's by rounding and by dropout's draws.
        progress: called with a line of text at each step of the planning.

    Returns:
        the Plan; ``print(plan)`` shows its cost table, ``rematplan.execute(plan, model)`` trains by it.

    Raises:
        TypeError, ValueError: an argument that cannot be used; says what was got and what was expected.
        SampleError: the model rejects the sample.
        CaptureError: the model cannot be captured exactly.
        InfeasibleBudget: no schedule fits; carries the smallest budget that one fits.
        torch.OutOfMemoryError: one forward on the sample does not fit.

    Example:
        >>> plan = solve(model, "2MiB", sample=batch)
        >>> plan.predicted_peak <= plan.memory_budget
        True
    """
    plain: nn.Module = unplanned(as_model(model, sample))
    request = checked(
        plain,
        memory_budget,
        sample,
        solver,
        parameters or {},
        capture,
        costs,
        optimizer,
        device,
        progress,
        backend,
    )
    if isinstance(request.device, Target):
        with without_hardware(request.model, request.call) as (twin, call):
            return _plan(replace(request, model=twin, call=call))
    # Not around each trial: a graph with one of Python's random numbers as a constant would pass for exact.
    random = HostRandomState()
    try:
        with set_apart(request.call) as call:
            return _plan(replace(request, call=call))
    finally:
        random.restore()


def solve_again(plan: Plan, model: nn.Module, call: Call, progress: Progress, capture: str = "auto") -> Plan:
    """Return the plan for another call of the plan's model: same budget, solver, costs, optimizer, capture.

    Gradients that exist now count as existing. A plan that was made without its device is made again for the
    one that holds the model.

    Args:
        model: plain, in train mode.
        call: canonical; nothing outside may need its tensors, which have no history.
        capture: "auto" or "modules", where the plan's is a graph.

    Raises:
        CaptureError, InfeasibleBudget, ValueError: as ``solve`` does.
    """
    record, solver = plan.capture, plan.solver
    if SOLVERS[solver].parameters and not plan.parameters:
        solver = "optimal"  # a plan that was loaded does not know what its solver was given
    asked = KINDS[record.kind].producer().asked_again(record, model, capture)
    state, step = plan.resident.get("optimizer state", 0), plan.optimizer_step
    budget, device, parameters = plan.memory_budget, model_device(model), plan.parameters
    return _plan(
        Request(
            model, budget, call, False, device, solver, parameters, asked, plan.costs, state, step, progress
        )
    )


def priced(request: Request, *, options: bool = True) -> Priced:
    """Return the model captured and its chain.

    Args:
        options: whether to look for options of stages that keep less than all.
    """
    model, call, device = request.model, request.call, request.device
    cannot = f"solve: {type(model).__name__} cannot be planned"
    advice = "pass capture=[blocks], the modules that run in order"
    with met(cannot, advice, (ValueError,)), inner_plans_left_out():
        resident = resident_parts(model, call, device) | {"optimizer state": request.optimizer_state}
        step, kinds, refused = _tried(request)
        captured, reason, kinds = _captured(request, step, kinds, refused)
        step = replace(step, plain=None)  # its tensors may be released
        resident["allocator slack"] = allocator_slack(model, call, device, request.optimizer_state)
        request.progress(f"pricing {len(captured)} stages")
        resident_bytes, clock = sum(resident.values()), request.costs == "measure"
        chain: Chain | None = None
        while chain is None:
            producer = KINDS[captured.kind].producer()
            try:
                chain = producer.price(captured, step, resident=resident_bytes, clock=clock, options=options)
            except CaptureError as error:
                if not kinds:
                    raise
                captured, reason, kinds = _captured(request, step, kinds, str(error))
        resident |= captured.live_besides()
        if extra := chain.fixed - sum(resident.values()):
            resident["constants and replay state"] = extra
        return Priced(captured, reason, step, chain, resident)


def _tried(request: Request) -> tuple[TrialStep, list[str], str]:
    """Return the plain runs, the kinds of capture to try, in order, and why others are not tried."""
    step = first_forward(request.model, request.call, request.device, request.progress)
    kinds, refused = [request.capture] if isinstance(request.capture, str) else [BLOCKS], ""
    if request.capture == "auto":
        why = {name: kind.producer().unsuited(step.seen) for name, kind in KINDS.items() if kind.automatic}
        kinds, refused = [name for name in why if not why[name]], next(filter(None, why.values()), "")
    if step.target is None:
        compares = any(KINDS[name].producer().compares for name in kinds)
        embeds = any(getattr(module, "sparse", False) is True for module in request.model.modules())
        if compares or embeds or request.cacheless:
            step = with_plain_step(step, cacheless=request.cacheless)
    return step, kinds, refused


def _captured(
    request: Request, step: TrialStep, kinds: list[str], refused: str
) -> tuple[Capture, str, list[str]]:
    """Return the capture, why it is so, and the kinds that have not been tried.

    Args:
        refused: why the kinds before did not capture it; "" if none was tried.

    Raises:
        CaptureError: the model cannot be captured as any of these kinds.
    """
    name, *others = kinds
    try:
        captured, reason = KINDS[name].producer().capture(step, request.capture, refused)
    except CaptureError as error:
        if not others:
            raise
        return _captured(request, step, others, str(error))
    if len(captured) == 1 and others and step.target is None:
        with suppress(CaptureError):
            return _captured(
                request, step, others, "it is a graph of one stage (code under a decorator, say)"
            )
    return captured, reason, others


def _plan(request: Request) -> Plan:
    """Return the plan for checked arguments."""
    model, solver, parameters = request.model, request.solver, request.parameters
    kind = model_device(model).type
    target = request.device.spec if isinstance(request.device, Target) else None
    found = priced(request)
    captured, chain, resident = found.captured, found.chain, found.resident
    if SOLVERS[solver].two_level and not KINDS[captured.kind].copies:
        raise CaptureError(
            f"solve: solver={solver!r} copies what autograd saves to the host, which takes the ops of a graph, and the "
            f"model was captured as {captured.kind} ({found.reason}); choose another solver"
        )
    request.progress(f"solving for {format_bytes(request.budget)}")
    try:
        schedule = solve_chain(chain, request.budget, solver, **parameters)
    except InfeasibleBudget as error:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in resident.items() if size)
        raise InfeasibleBudget(
            error.budget,
            error.smallest,
            error.solver,
            f"Live during the whole step: {parts}; gradients {format_bytes(sum(s.grad for s in chain.stages))} "
            "appear in backward. Raise the budget, shorten the batch, or use an optimizer with less state.",
        ) from error
    # Hooks of the root may change the forward's arguments: fully_shard casts the inputs.
    signature = CallSignature.of(found.step.arrives)
    record = CaptureRecord(
        kind=captured.kind,
        reason=found.reason,
        device=kind,
        structure=signature.structure,
        leaves=signature.leaves,
        model=model_fingerprint(model),
        unread=tuple(sorted(found.step.unread)),
        evaluating=tuple(name for name, module in model.named_modules() if not module.training),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        environment=environment_text(kind),
        target=target.name if target else "",
        target_memory=target.memory if target else 0,
        random=tuple(each.random for each in captured.effects),
        changed=tuple(each.changed for each in captured.effects),
        **captured.record(),
    )
    return Plan(
        chain,
        schedule,
        request.budget,
        solver,
        request.costs,
        record,
        resident,
        torch.__version__,
        request.optimizer_step,
        parameters.get("host"),
        live=None if target else (model, captured),
        parameters=dict(parameters),
    )


def checked(
    model: nn.Module,
    memory_budget: int | str,
    sample: Any,
    solver: str,
    parameters: Mapping[str, Any],
    capture: str | Iterable[nn.Module],
    costs: str | None,
    optimizer: torch.optim.Optimizer | None,
    target: DeviceSpec | str | None,
    progress: Progress | None,
    backend: str = "eager",
) -> Request:
    """Refuse what cannot be planned, before anything is changed."""
    reject_unusable(model)
    if isinstance(model, (CallableChain, StepFunction)):
        if target is not None:
            raise ValueError(
                "solve: device= plans a copy of the model, and plain callables cannot be copied with what they use; plan them "
                "where their modules are, without device=, or make a module of each"
            )
        if isinstance(model, CallableChain) and isinstance(capture, str) and capture in ("auto", BLOCKS):
            capture = [*model.stages]
    own = model_device(model)
    device: Device = own if target is None else Target(DeviceSpec.of(target))
    own_bytes = device.spec.memory if isinstance(device, Target) else device_bytes(device)
    budget = parse_budget(memory_budget, own_bytes, lambda: _free_bytes(model, sample, optimizer, device))
    if costs is None:
        costs = "measure" if target is None else "roofline"
    if not checked_solver("solve", solver, parameters).executable:
        raise ValueError(
            f"solve: solver={solver!r} makes schedules that executors cannot follow; use it on chains "
            "(rematplan.solve_chain), or choose another solver"
        )
    if costs not in COSTS:
        raise ValueError(f"solve: costs={costs!r} is unknown; choose one of {', '.join(COSTS)}")
    known = [kind for kind in KINDS if kind != COMPILED]
    if isinstance(capture, str) and capture not in ("auto", *KINDS):
        raise ValueError(
            f"solve: capture={capture!r} is unknown; choose one of {', '.join(('auto', *known))}, or pass a list of modules"
        )
    if backend != "eager":
        capture = _compiled(backend, capture, costs, own.type)
    elif capture == COMPILED:
        raise ValueError(
            f"solve: capture={COMPILED!r} is what backend='inductor' makes; pass backend='inductor'"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"solve: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if isinstance(device, Target) and costs == "measure":
        raise ValueError(
            f"solve: costs='measure' needs the device, and device={device.spec.name!r} describes one that need not be "
            "there; leave costs out, or pass costs='roofline'"
        )
    call, cacheless = _checked_call(model, sample, device)
    asked = capture if isinstance(capture, str) else tuple(capture)
    state, step = optimizer_bytes(optimizer, device), optimizer_step_bytes(optimizer, device)
    told = progress or (lambda line: None)
    return Request(
        model, budget, call, cacheless, device, solver, parameters, asked, costs, state, step, told
    )


def _compiled(backend: str, capture: str | Iterable[nn.Module], costs: str, device: str) -> str:
    """Return the kind of capture for a backend that compiles.

    Raises:
        ValueError: it is unknown, or other arguments do not go with it.
        CaptureError: it cannot compile for this type of device.
    """
    if backend != "inductor":
        raise ValueError(f"solve: backend={backend!r} is unknown; choose 'eager' or 'inductor'")
    if costs != "measure":
        raise ValueError(
            f"solve: backend='inductor' measures the code that it compiles, and costs={costs!r} runs none; leave costs and "
            "device out, or plan with backend='eager'"
        )
    if capture not in ("auto", "graph", COMPILED):
        raise ValueError(
            f"solve: backend='inductor' compiles stages of the op graph, and capture={capture!r} was asked for; leave "
            "capture out, or compile the blocks yourself (block.compile()) and leave backend out"
        )
    if why := no_compiler(device):
        raise CaptureError(
            f"solve: backend='inductor' cannot compile for {device}: {why}; or plan without backend="
        )
    return COMPILED


def _checked_call(model: nn.Module, sample: Any, device: Device) -> tuple[Call, bool]:
    """Return the call that ``sample`` is, and whether ``use_cache=False`` was added to it.

    Raises:
        ValueError: the sample does not fit the model, lies elsewhere, or has no data.
    """
    described = isinstance(device, Target)
    args, kwargs = read_sample(sample)
    if isinstance(model, StepFunction):
        args, kwargs = model.marked(args, kwargs)
    if not described:
        _refuse_without_data("the model", model.parameters())
    try:
        call = canonical_call(forward_signature(model), args, kwargs)
    except TypeError as error:
        raise ValueError(f"solve: the sample does not fit {type(model).__name__}.forward: {error}") from error
    for leaf in tree_leaves(call):
        if not described and isinstance(leaf, torch.Tensor) and leaf.device.type != device.type:
            raise ValueError(
                f"solve: a tensor of the sample lies on {leaf.device}, the model on {device}; move the sample there"
            )
    reject_unusual(call)
    if not described:
        _refuse_without_data("the sample", tree_leaves(call))
    elif hindrance := nothing_to_train(model, call):
        raise ValueError(hindrance)
    cacheless = "use_cache" in call[1] and "use_cache" not in kwargs
    if model._forward_pre_hooks or type(model).__call__ is not torch.nn.Module.__call__:
        # Code before the forward depends on how the call is written.
        call = args, {**kwargs, "use_cache": False} if cacheless else kwargs
    return call, cacheless


def _refuse_without_data(what: str, tensors: Iterable[Any]) -> None:
    if not has_data(tensors):
        raise ValueError(
            f"solve: {what} has no data (it is on meta, or fake); pass device=, the device to plan for: a "
            f"rematplan.DeviceSpec or one of {', '.join(DeviceSpec.names())}"
        )


def _free_bytes(
    model: nn.Module, sample: Any, optimizer: torch.optim.Optimizer | None, device: Device
) -> int:
    """Return the bytes that a step may take: free or held by its tensors; all of a described device."""
    if isinstance(device, Target):
        return device.spec.memory
    held = sum(resident_parts(model, sample, device).values())
    if optimizer is not None and optimizer.state:
        held += optimizer_bytes(optimizer, device)
    return free_device_bytes(device) + held
