"""``solve``: a model, a sample and a budget in; a plan out. The one entry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from scheduler.budget import format_bytes, parse_budget
from scheduler.capture.call_reads import CallReads
from scheduler.capture.callables import CallableChain
from scheduler.capture.dry import DRAWS, capture_dry, without_hardware
from scheduler.capture.eager import own_attributes, replaced
from scheduler.capture.environment import environment_text
from scheduler.capture.fake import has_data
from scheduler.capture.flat import map_tensors, tree_leaves
from scheduler.capture.graph_capture import GraphCapture, capture_graph, op_graphs
from scheduler.capture.layouts import is_plain, tensor_bytes
from scheduler.capture.loss import find_loss, output_tensors
from scheduler.capture.module_calls import Recurrence, intercepted, is_compiled
from scheduler.capture.module_capture import ModuleCapture, capture_blocks
from scheduler.capture.nested_plans import inner_plans_left_out
from scheduler.capture.offloaded import on_host
from scheduler.capture.plain_steps import PlainSteps
from scheduler.capture.sample import (
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
from scheduler.capture.sharded import sharded_within
from scheduler.capture.state import HostRandomState, model_device, moving, preserved, set_apart
from scheduler.capture.step_function import Refused, StepFunction, as_model
from scheduler.capture.target import Device, Target
from scheduler.capture.unwind import met
from scheduler.capture.verify import StepResult, difference, run_step
from scheduler.chain import Chain
from scheduler.costs.cuda_memory import allocator_slack
from scheduler.costs.device_memory import device_bytes, free_device_bytes
from scheduler.costs.graph_chain import graph_chain, measure_graph
from scheduler.costs.module_chain import module_chain
from scheduler.costs.resident import optimizer_bytes, optimizer_step_bytes, resident_parts
from scheduler.costs.roofline import roofline_graph
from scheduler.device import DeviceSpec
from scheduler.errors import CaptureError, InfeasibleBudget, SampleError
from scheduler.plan import CaptureRecord, Plan
from scheduler.solvers import SOLVERS, checked_solver, solve_chain

__all__ = ["Priced", "Request", "checked", "priced", "solve", "solve_again"]

COSTS = ("measure", "roofline")
CAPTURES = ("auto", "graph", "modules")
Captured = GraphCapture | ModuleCapture
Progress = Callable[[str], None]


@dataclass(slots=True)
class Request:
    """The checked arguments of one solve()."""

    model: nn.Module
    budget: int
    call: Call
    cacheless: bool  # use_cache=False was added to the call
    device: Device
    solver: str
    capture: str | tuple[nn.Module, ...]
    costs: str
    optimizer_state: int
    optimizer_step: int | None
    progress: Progress
    unread: frozenset[int] = frozenset()  # leaves of that which the forward does not read
    # parameter -> bytes of its gradient, where that is sparse
    sparse: dict[str, int] = field(default_factory=dict)
    arrives: Call | None = None  # what reaches the model's forward, behind its own hooks


@dataclass(frozen=True, slots=True)
class Priced:
    """A captured model with its costs.

    Attributes:
        reason: why it was captured so.
        resident: the chain's fixed bytes, by what they consist of.
    """

    captured: Captured
    reason: str
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
    progress: Progress | None = None,
) -> Plan:
    """Plan the training step of ``model`` so that it fits ``memory_budget``, at the least extra time.

    The model is left as it is: parameters, gradients, buffers, random-number state; so is the sample. What its stages cost
    is remembered as long as it lives: to plan it again, for another budget, takes less time and meets the same figures.
    On CUDA the peaks that ``torch.cuda.max_memory_allocated`` tells of are reset.

    Args:
        model: in train mode, on one device, or sharded by fully_shard; then every rank makes this call. One that trains by a plan already is planned anew. With ``device`` it may
            be without data: on meta, or made under FakeTensorMode. Or a list of callables, the stages: each is called with
            what the one before returned (``CallableChain``). Or a step function: any callable (function, lambda,
            functools.partial, bound method, callable object) that calls the models it uses, as often as it likes, and returns
            the loss. Modules are found in its closure, in global variables that it names, in what it is bound to, and
            in the sample; the loss that it makes of their outputs is in the plan. It leaves ``backward`` to the training loop.
        memory_budget: peak device bytes of a whole training step: parameters, buffers, gradients, optimizer
            state if an optimizer is given, inputs, activations. An int, or text: "6GiB", "800MB", "75%" of the
            device's memory; "auto" is what is free (and what of the step is there already) less 5 % of the device's
            memory, "auto - 2GiB" leaves another reserve.
        sample: what the model is trained on, in shape: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or ``(args, kwargs)``.
        solver: a name in ``scheduler.solvers.SOLVERS``; one that is ``executable``.
        parameters: what else the solver takes, by name: ``{"keep": "attn"}`` for "selective", ``{"host":
            HostMemory(...)}`` for "two_level", which takes a graph capture.
        capture: "graph" (torch.export), "modules" (blocks that run in order), "auto" (graph where it is
            exact, else modules; of callables, these; modules where one module is called a hundred times in a row, each
            call fed by the one before), or the blocks themselves: a list of modules or an nn.Sequential. A module that is
            called so is a block at each call.
        costs: "measure" (seconds by the clock) or "roofline" (from FLOPs and bytes); bytes are counted either way.
            Default: "measure", and "roofline" with ``device``.
        optimizer: its state counts towards the budget.
        device: plan for this device instead of the one that holds the model: a DeviceSpec, or the name of one that is
            built in ("H100", "A100-80GB", ...). Nothing runs on data, and no memory is taken; so that the captured
            graph is not tried against the plain step, and kernels' own scratch space is not counted.
        progress: called with a line of text at each step of the planning.

    Returns:
        the Plan; ``print(plan)`` shows its cost table, ``executors.execute(plan, model)`` trains by it.

    Raises:
        TypeError, ValueError: an argument that cannot be used; says what was got and what was expected.
        CaptureError: the model cannot be captured exactly.
        InfeasibleBudget: no schedule fits; carries the smallest budget that one fits.
    """
    plain: nn.Module = unplanned(as_model(model, sample))
    request = checked(
        plain, memory_budget, sample, solver, parameters or {}, capture, costs, optimizer, device, progress
    )
    if isinstance(request.device, Target):
        with without_hardware(request.model, request.call) as (request.model, request.call):
            return _plan(request, parameters or {})
    # Not around each trial: a graph with a random number of Python's in it as a constant would then pass for exact.
    random = HostRandomState()
    try:
        with set_apart(request.call) as request.call:
            return _plan(request, parameters or {})
    finally:
        random.restore()


def solve_again(plan: Plan, model: nn.Module, call: Call, progress: Progress, capture: str = "auto") -> Plan:
    """The plan for another call of the plan's model: same budget, solver, costs and optimizer, captured likewise.

    Gradients that exist now count as existing. A plan that was made without its device is made anew on the one at hand.

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
    request = Request(
        model,
        plan.memory_budget,
        call,
        False,
        model_device(model),
        solver,
        capture if record.kind == "graph" else tuple(map(model.get_submodule, dict.fromkeys(record.stages))),
        plan.costs,
        plan.resident.get("optimizer state", 0),
        plan.optimizer_step,
        progress,
    )
    return _plan(request, plan.parameters)


def priced(request: Request, *, options: bool = True) -> Priced:
    """The model captured and its chain.

    Args:
        options: whether to look for options of stages that keep less than all.
    """
    name = type(request.model).__name__
    cannot = met(
        f"solve: {name} cannot be planned",
        "pass capture=[blocks], the modules that run in order",
        (ValueError,),
    )
    with cannot, inner_plans_left_out():
        return _priced(request, options)


def _priced(request: Request, options: bool) -> Priced:
    resident = resident_parts(request.model, request.call, request.device)
    resident["optimizer state"] = request.optimizer_state
    captured, reason, own_loss = _captured(request)
    resident["allocator slack"] = allocator_slack(
        request.model, request.call, request.device, request.optimizer_state
    )
    request.progress(f"pricing {len(captured)} stages")
    try:
        chain = _chain(request, captured, sum(resident.values()), own_loss, options)
    except CaptureError as error:
        if request.capture != "auto" or isinstance(captured, ModuleCapture):
            raise
        captured, reason = _as_blocks(request, str(error))
        chain = _chain(request, captured, sum(resident.values()), own_loss, options)
    if isinstance(captured, ModuleCapture) and captured.gathering:
        resident["gathered parameters"] = captured.gathering
    extra = chain.fixed - sum(resident.values())
    if extra:
        resident["constants and replay state"] = extra
    return Priced(captured, reason, chain, resident)


def _plan(request: Request, parameters: Mapping[str, Any]) -> Plan:
    """The plan for checked arguments."""
    model, solver = request.model, request.solver
    found = priced(request)
    captured, chain, resident = found.captured, found.chain, found.resident
    if SOLVERS[solver].two_level and captured.kind == "modules":
        raise CaptureError(
            f"solve: solver={solver!r} copies what autograd saves to the host, which takes a graph capture, and the model "
            f"was captured by its modules ({found.reason}); choose another solver"
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
    # Hooks of the root may change what the forward is given: fully_shard casts the inputs.
    signature = CallSignature.of(request.call if request.arrives is None else request.arrives)
    record = CaptureRecord(
        kind=captured.kind,
        reason=found.reason,
        device=model_device(model).type,
        structure=signature.structure,
        leaves=signature.leaves,
        model=model_fingerprint(model),
        unread=tuple(sorted(request.unread)),
        evaluating=tuple(name for name, module in model.named_modules() if not module.training),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        environment=environment_text(model_device(model).type),
        target=request.device.spec.name if isinstance(request.device, Target) else "",
        target_memory=request.device.spec.memory if isinstance(request.device, Target) else 0,
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
        live=None if isinstance(request.device, Target) else (model, captured),
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
) -> Request:
    """Refuse what cannot be planned, before anything is changed."""
    reject_unusable(model)
    if isinstance(model, (CallableChain, StepFunction)):
        if target is not None:
            raise ValueError(
                "solve: device= plans a copy of the model, and plain callables cannot be copied with what they use; plan them "
                "where their modules are, without device=, or make a module of each"
            )
        if isinstance(model, CallableChain) and isinstance(capture, str) and capture in ("auto", "modules"):
            capture = [*model.stages]
    own = model_device(model)
    device: Device = own if target is None else Target(DeviceSpec.of(target))
    budget = parse_budget(
        memory_budget, _device_bytes(device), lambda: _free_bytes(model, sample, optimizer, device)
    )
    if costs is None:
        costs = "measure" if target is None else "roofline"
    if not checked_solver("solve", solver, parameters).executable:
        raise ValueError(
            f"solve: solver={solver!r} makes schedules that executors cannot follow; use it on chains "
            "(scheduler.solvers.solve_chain), or choose another solver"
        )
    if costs not in COSTS:
        raise ValueError(f"solve: costs={costs!r} is unknown; choose one of {', '.join(COSTS)}")
    if isinstance(capture, str) and capture not in CAPTURES:
        raise ValueError(
            f"solve: capture={capture!r} is unknown; choose one of {', '.join(CAPTURES)}, or pass a list of modules"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"solve: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    if isinstance(device, Target) and costs == "measure":
        raise ValueError(
            f"solve: costs='measure' needs the device, and device={device.spec.name!r} describes one that need not be "
            "there; leave costs out, or pass costs='roofline'"
        )
    args, kwargs = read_sample(sample)
    if isinstance(model, StepFunction):
        args, kwargs = model.marked(args, kwargs)
    if target is None:
        _refuse_without_data("the model", model.parameters())
    try:
        call = canonical_call(forward_signature(model), args, kwargs)
    except TypeError as error:
        raise ValueError(f"solve: the sample does not fit {type(model).__name__}.forward: {error}") from error
    for leaf in tree_leaves(call):
        if target is None and isinstance(leaf, torch.Tensor) and leaf.device.type != own.type:
            raise ValueError(
                f"solve: a tensor of the sample lies on {leaf.device}, the model on {own}; move the sample there"
            )
    reject_unusual(call)
    if target is None:
        _refuse_without_data("the sample", tree_leaves(call))
    elif hindrance := nothing_to_train(model, call):
        raise ValueError(hindrance)
    cacheless = "use_cache" in call[1] and "use_cache" not in kwargs
    if model._forward_pre_hooks or type(model).__call__ is not torch.nn.Module.__call__:
        # What stands before the forward goes by how the call is written.
        call = args, {**kwargs, "use_cache": False} if cacheless else kwargs
    return Request(
        model,
        budget,
        call,
        cacheless,
        device,
        solver,
        capture if isinstance(capture, str) else tuple(capture),
        costs,
        optimizer_bytes(optimizer, device),
        optimizer_step_bytes(optimizer, device),
        progress or (lambda line: None),
    )


def _refuse_without_data(what: str, tensors: Iterable[Any]) -> None:
    if not has_data(tensors):
        raise ValueError(
            f"solve: {what} has no data (it is on meta, or fake); pass device=, the device to plan for: a "
            f"scheduler.DeviceSpec or one of {', '.join(DeviceSpec.names())}"
        )


def _device_bytes(device: Device) -> int:
    return device.spec.memory if isinstance(device, Target) else device_bytes(device)


def _free_bytes(
    model: nn.Module, sample: Any, optimizer: torch.optim.Optimizer | None, device: Device
) -> int:
    """What a step may take: memory that is free, and what of a step is there already. All of a device described."""
    if isinstance(device, Target):
        return device.spec.memory
    there = sum(resident_parts(model, sample, device).values())
    if optimizer is not None and optimizer.state:
        there += optimizer_bytes(optimizer, device)
    return free_device_bytes(device) + there


def _cut_off(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _warm_up(request: Request) -> tuple[Recurrence, bool]:
    """A first forward, from which a rejected sample shows before a step is taken.

    Returns:
        what it calls again and again; whether the model returns its own loss.
    """
    model, (args, kwargs) = request.model, request.call
    signature = forward_signature(model)

    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            arrives = canonical_call(signature, args, kwargs)
            request.arrives = map_tensors(_cut_off, arrives)
            calls = CallReads(model, arrives)
            args, kwargs = calls.watched(arrives)
            try:
                with calls.recording():
                    return forward(*args, **kwargs)
            finally:
                request.unread = calls.unread()

        return noted

    seen = Recurrence()
    try:
        if isinstance(model, StepFunction):
            with preserved(model), on_host(model, request.call):
                model.check(args, kwargs)
        with (
            preserved(model),
            torch.enable_grad(),
            on_host(model, request.call),
            nullcontext() if sharded_within(model) else moving(model),
            intercepted([(model, note)]),
            seen.watching(model),
        ):
            output = model(*args, **kwargs)
        if isinstance(model, CallableChain):
            with preserved(model):
                model.check(args, kwargs)
    except (torch.OutOfMemoryError, CaptureError, Refused):
        raise
    except Exception as error:  # whatever the model's code raises on a sample that does not suit it
        raise SampleError(
            f"solve: {type(model).__name__} rejects the sample: {type(error).__name__}: {error}"
        ) from error
    hindrance = nothing_to_train(model, request.call)
    if hindrance and not any(tensor.requires_grad for tensor in output_tensors(output)):
        raise ValueError(hindrance)
    return seen, find_loss(output)[1]


def _plain_step(request: Request) -> StepResult:
    """One plain step on the sample, saved tensors offloaded where the device is not the host."""
    model, (args, kwargs) = request.model, request.call
    with met(f"solve: a plain step of {type(model).__name__} on the sample raises"):
        plain = run_step(model, lambda: model(*args, **kwargs), offload=True, call=request.call)
    if request.cacheless:
        more = {name: value for name, value in kwargs.items() if name != "use_cache"}
        with suppress(
            torch.OutOfMemoryError
        ):  # the caches may not fit: nobody trains that step, plain or planned
            caching = run_step(model, lambda: model(*args, **more), offload=True, call=request.call)
            # Of the outputs the caches are no part of training.
            differs = difference(replace(plain, outputs=[]), replace(caching, outputs=[]))
            if differs is not None:
                raise ValueError(
                    f"solve: {type(model).__name__} trains otherwise when it fills the caches of generation, which a plan "
                    f"leaves out: {differs}. Pass use_cache=False in the sample and in training, or set "
                    "model.config.use_cache = False"
                )
    return plain


def _captured(request: Request) -> tuple[Captured, str, bool]:
    """The capture, why it was chosen, and whether the model returns its own loss."""
    if isinstance(request.device, Target):
        return capture_dry(request.model, request.call, request.capture, request.device, request.progress)
    request.progress("running one plain step")
    seen, own_loss = _warm_up(request)
    how = request.capture
    refused = seen.unrolled() if how == "auto" else ""
    to_compare = how in ("auto", "graph") and not refused
    to_see = any(getattr(module, "sparse", False) is True for module in request.model.modules())  # embeddings
    random = HostRandomState()
    plain = _plain_step(request) if to_compare or request.cacheless or to_see else None
    draws = random.differs()
    if plain is not None:
        grads = ((name, grad) for name, grad in plain.grads.items() if grad is not None)
        request.sparse = {name: tensor_bytes(grad) for name, grad in grads if not is_plain(grad)}
    if plain is not None and to_compare:
        request.progress("capturing the op graph")
        try:
            captured, exact = _exact_graph(request, plain, draws)
            if how == "auto" and len(captured) == 1:
                with suppress(CaptureError):
                    why = "it is a graph of one stage (code under a decorator, say)"
                    return *_as_blocks(request, why, seen), own_loss
            return captured, f"torch.export; {exact}{_once(captured)}", own_loss
        except CaptureError as error:
            if how == "graph":
                raise CaptureError(
                    f"solve: capture='graph': {error}; try capture='modules' or pass a list of blocks"
                ) from error
            refused = str(error)
    return *_as_blocks(request, refused, seen), own_loss


def _as_blocks(request: Request, refused: str, seen: Recurrence | None = None) -> tuple[ModuleCapture, str]:
    """The capture by blocks, and why.

    Args:
        refused: why there is no graph; "" if none was asked for.
        seen: what a forward calls again and again, if that is known.
    """
    request.progress("capturing the blocks")
    target = request.device if isinstance(request.device, Target) else None
    with preserved(request.model):
        blocks, reason = capture_blocks(request.model, request.call, request.capture, refused, target, seen)
    return blocks, reason + (f"; not as a graph, since {refused}" if refused else "")


def _once(captured: GraphCapture) -> str:
    """Which stages run once, and why, in words."""
    stages = [(stage.name, why) for stage, why in zip(captured.stages, captured.once, strict=True) if why]
    if not stages:
        return ""
    names = ", ".join(name for name, _ in stages[:3]) + (" and others" if len(stages) > 3 else "")
    return f"; {names} {'run' if len(stages) > 1 else 'runs'} once: {stages[0][1]}"


def _exact_graph(request: Request, plain: StepResult, draws: bool) -> tuple[GraphCapture, str]:
    """The op graph, once it has been seen to train like the plain model, and how it does.

    Args:
        draws: whether the plain step drew from the generators of Python or NumPy. Even if the numbers made no difference in it (a
            branch that is taken seldom), they may in another.

    Raises:
        CaptureError: it cannot be captured, or one step of it differs.
    """
    model = request.model
    call = request.call if request.arrives is None else request.arrives
    args, kwargs = request.call
    if draws:
        raise CaptureError(DRAWS)
    if sharded_within(model):
        raise CaptureError("fully_shard's hooks gather its parameters, and an exported graph has no hooks")
    compiled = next((name for name, module in model.named_modules() if is_compiled(module)), None)
    if compiled is not None:
        raise CaptureError(f"submodule {compiled!r} is compiled, and an exported graph runs op by op")
    if plain.custom:
        raise CaptureError(
            f"the custom autograd.Function {plain.custom[0]} is used, whose backward torch.export drops"
        )
    steps = PlainSteps(plain, _step(request, functools.partial(model, *args, **kwargs)), model_device(model))
    refused: CaptureError | None = None
    for graph in op_graphs(model, call):
        try:
            with met("the exported graph cannot be run stage by stage"):
                captured = capture_graph(graph, model)
                trial = _step(request, functools.partial(_planned_call, captured, model, args, kwargs))
                captured.uncached = torch.is_autocast_enabled(request.device.type)
                differs, how = steps.judge(trial)
                if differs is not None and captured.uncached:
                    captured.uncached = False
                    differs, how = steps.judge(trial)
                if differs is not None:
                    raise CaptureError(f"the exported graph does not train like the plain model: {differs}")
                with preserved(model):
                    captured.observe(model, call)
        except CaptureError as error:
            refused = refused or error
            continue
        return captured, how
    raise CaptureError(f"{refused}{steps.hint()}") from refused


def _step(request: Request, forward: Callable[[], Any]) -> Callable[[], StepResult]:
    """A step by that forward, saved tensors offloaded where the device is not the host."""
    return functools.partial(run_step, request.model, forward, offload=True, call=request.call)


def _planned_call(
    captured: GraphCapture, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What calling the planned model gives: its graph takes the place of its forward, within hooks and ``__call__``."""
    signature = forward_signature(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return captured.trial(model, canonical_call(signature, args, kwargs))

    with replaced(own_attributes(model), forward=forward):
        return model(*args, **kwargs)


def _chain(request: Request, captured: Captured, resident: int, own_loss: bool, options: bool) -> Chain:
    """The captured model as a chain."""
    model, call = request.model, request.call
    name = type(model).__name__
    clock = request.costs == "measure"
    arrives = call if request.arrives is None else request.arrives
    sparse = {model.get_parameter(each): size for each, size in request.sparse.items()}
    if isinstance(captured, ModuleCapture):
        what = f"solve: the blocks of {name} cannot be reversed one by one"  # not where the loss does not reach them, say
        with preserved(model) as existing, met(what, "pass other blocks, capture=[modules]"):
            return module_chain(
                captured,
                model,
                call,
                existing=existing,
                resident=resident,
                clock=clock,
                name=name,
                sparse=sparse,
            )
    with preserved(model) as existing, met("the stages of the exported graph cannot be measured"):
        costs = measure_graph(
            captured, model, arrives, existing=existing, loss_is_output=own_loss, clock=clock, options=options
        )
    if not clock and captured.target is None:
        costs = roofline_graph(captured, costs, own_loss)
    return graph_chain(
        captured, model, costs, resident=resident, loss_is_output=own_loss, name=name, sparse=sparse
    )
