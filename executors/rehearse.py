"""``rehearse``: run one step by a plan, on tensors without data or for real, and count its live bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.executors.execute import execute
from rematplan.executors.plain import plans_within
from rematplan.executors.rehearsal import Difference, Rehearsal
from rematplan.executors.runner import Runner, copied_call
from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.core.device import DeviceSpec
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Forward, Keep
from rematplan.scheduler.costs.meters.clock import wait
from rematplan.scheduler.costs.meters.kernel_scratch import Scratch
from rematplan.scheduler.costs.meters.live_storages import LiveBytes
from rematplan.scheduler.costs.meters.peak import CudaBytes, cpu_events
from rematplan.scheduler.costs.resident import resident_parts, storage_bytes
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.plan.timeline import Allocation, MemoryTimeline, Moment, category_of, in_words
from rematplan.scheduler.torch_layer.call import (
    Call,
    canonical_call,
    forward_signature,
    read_sample,
    unplanned,
)
from rematplan.scheduler.torch_layer.eager import as_eager
from rematplan.scheduler.torch_layer.fake import fake_call, fake_model
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import model_device, preserved
from rematplan.scheduler.torch_layer.private import FakeTensorMode, TorchDispatchMode
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["Difference", "Rehearsal", "rehearse"]


def rehearse(
    plan: Plan, model: nn.Module, sample: Any, *, real: bool = False, scratch: bool = True
) -> Rehearsal:
    """Run one step by ``plan``, by the code that trains, and count its live bytes.

    Without data (``real=False``) the step runs on fake tensors, on a copy of the model without weights:
    forward, loss (found as by ``solve``), backward, gradients into ``.grad``. Every storage is followed from
    its allocation to its release. What a kernel allocates within itself (a convolution's columns, attention's
    float32 sums) does not show in such a step: where the plan's device exists, each distinct op runs there by
    itself on zeros, and its scratch bytes are added wherever it occurs.

    Args:
        plan: from ``rematplan.solve`` or ``Plan.load``.
        model: the model of the plan, left unchanged. Without ``real`` its parameters may be fake.
        sample: as for ``solve``; its values do not matter unless ``real``.
        real: run the step twice on the model's device with its data (the first is a warm-up), and measure: on
            the CPU every allocation, on CUDA the caching allocator's counters at every op, whose peaks are
            reset. Zeros replace gradients that exist, which takes their bytes once more. Copies to the host
            are real, too, and count with the action before them.
        scratch: without ``real``, whether to count kernels' scratch bytes. It takes the memory of one op's
            tensors at a time (ops over a quarter of the free memory are left out, and the table names them)
            and the seconds of each distinct op once or twice in a process; on CUDA it resets the peaks of
            ``torch.cuda.max_memory_allocated``. No effect for a device that is described or does not exist.

    Returns:
        the peak, comparable to ``plan.predicted_peak``, and each action's bytes beside the referee's.

    Raises:
        TypeError, PlanMismatch: as by ``execute``; or the sample is not the plan's.
        RuntimeError: ``real`` or ``scratch``, on the CPU, while an autograd profiler is running. Without
            ``real``: the model's code reads the value of a tensor, which none has.

    Example:
        >>> print(rehearse(plan, model, batch))  # doctest: +SKIP
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"rehearse: plan is a {type(plan).__name__}, expected a Plan")
    if not isinstance(model, nn.Module):
        raise TypeError(f"rehearse: model is a {type(model).__name__}, expected a torch.nn.Module")
    model = unplanned(model)
    args, kwargs = read_sample(sample)
    call = canonical_call(forward_signature(model), args, kwargs)
    notes = _Notes(plan)
    torch.clear_autocast_cache()
    collecting = gc.isenabled()
    gc.disable()  # or tensors of long ago are released in the middle of the count
    try:
        return _real(plan, model, call, notes) if real else _faked(plan, model, call, notes, scratch)
    finally:
        torch.clear_autocast_cache()
        if collecting:
            gc.enable()


# ---- where the step is -------------------------------------------------------------------------------


@dataclass
class _Notes:
    """The observer of a rehearsed step: at which event an action of the schedule begins.

    Attributes:
        now: counts the events so far.
        number: of a tensor's storage.
        begins: (events before it, action).
        held: numbers of the storages that were held as boundaries.
    """

    plan: Plan
    now: Callable[[], int] = lambda: 0
    number: Callable[[Tensor], int | None] = lambda tensor: None
    begins: list[tuple[int, int]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.split = len(self.plan.schedule) - len(self.plan.program.replay)
        self.first: dict[int, int] = {}
        for index, action in enumerate(self.plan.schedule.actions[: self.split]):
            if isinstance(action, (Forward, Checkpoint, Keep)):
                self.first.setdefault(action.stage, index)

    def action(self, what: str, where: int) -> int:
        """Return the index in the schedule of what the executor tells."""
        if what == "first":
            return self.first[where]
        return self.split + (where if what == "replay" else self.plan.program.backward_at[where])

    def __call__(self, what: str, where: int, tensors: Sequence[Tensor] = ()) -> None:
        """See ``rematplan.executors.trace.Observer``."""
        if what == "held":
            numbers = (self.number(tensor) for tensor in tensors)
            self.held.update(number for number in numbers if number is not None)
        elif what in ("first", "replay", "again", "backward"):
            self.begins.append((self.now(), self.action(what, where)))


@dataclass(frozen=True, slots=True)
class _Change:
    """Bytes allocated or released at an op, of a storage (-1 if unknown)."""

    label: str
    change: int
    storage: int = -1


def _step(planned: nn.Module, call: Call, notes: _Notes) -> Any:
    """Run one training step; return what the user holds afterwards."""
    args, kwargs = call
    output = planned(*args, **kwargs)
    loss = find_loss(output)[0]
    notes("backward", len(notes.plan.chain) - 1)
    loss.backward()
    return output, loss


def _runner(planned: nn.Module) -> Runner:
    return plans_within(planned).first


@contextmanager
def _observed(planned: nn.Module, notes: _Notes) -> Iterator[None]:
    executor = _runner(planned).executor
    assert executor is not None
    executor.observe = notes
    try:
        yield
    finally:
        executor.observe = None


# ---- without data ------------------------------------------------------------------------------------


def _faked(plan: Plan, model: nn.Module, call: Call, notes: _Notes, scratch: bool) -> Rehearsal:
    own, place = model_device(model), torch.device(plan.capture.device)
    place = own if own.type == place.type else place
    device = str(place)
    at_hand = not plan.capture.target and (place.type == "cpu" or torch.cuda.is_available())
    kernels = Scratch(place) if scratch and at_hand else None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = fake_model(model, mode, device)
    planned = execute(plan, twin, on_oom="raise")
    call = fake_call(call, mode, device)
    runner = _runner(planned)
    runner.want.check(call, f"rehearse: {type(model).__name__}")
    live = LiveBytes(_rules(plan).type, only=place.type, record=True, scratch=kernels)
    notes.now, notes.number = lambda: len(live.events), live.number
    # The user's code, which a capture of modules runs, must not take another way for fake tensors.
    with as_eager(twin), mode:
        capture = _capture_of(plan, model, twin, call)
    with as_eager(planned), mode, torch.enable_grad():
        place_of_bytes = torch.device(_rules(plan).type)
        capture = capture.without_data(place_of_bytes, lambda tensors: fake_call(tensors, mode, device))
        runner.executor = runner.executor_for(capture, planned)
        resident = _resident(plan, twin, call, capture)
        with live, _observed(planned, notes):
            held = _step(planned, call, notes)
    grads = {live.number(p.grad) for p in twin.parameters() if p.grad is not None}
    changes = [_Change(_op(event.label), event.change, event.storage) for event in live.events]
    del held
    uncounted = None if kernels is None else kernels.uncounted
    return _told(plan, False, resident, changes, notes, grads, uncounted)


def _capture_of(plan: Plan, model: nn.Module, twin: nn.Module, call: Call) -> Capture:
    """Return the plan's capture; captured again, without data, for a loaded plan or another model."""
    live = plan.live[0] if plan.live is not None else None
    if live is not None and live._modules is model._modules and live._parameters is model._parameters:
        return plan.live[1]
    planned = execute(plan, twin)
    return _runner(planned).capture_again(planned, copied_call(call))


def _rules(plan: Plan) -> Device:
    """Return the device whose allocator's rules the plan's bytes follow."""
    name = plan.capture.target
    if not name:
        return torch.device(plan.capture.device)
    known = name in DeviceSpec.names()
    return Target(DeviceSpec.of(name) if known else replace(DeviceSpec.of("H200"), name=name))


def _op(label: str) -> str:
    """Return ``aten.mm.default`` as the profiler names it."""
    name, _, overload = label.rpartition(".")
    return (name if overload == "default" else label).replace("aten.", "aten::", 1)


# ---- for real ----------------------------------------------------------------------------------------


def _real(plan: Plan, model: nn.Module, call: Call, notes: _Notes) -> Rehearsal:
    device = model_device(model)
    planned = execute(plan, model, on_oom="raise")
    _runner(planned).want.check(call, f"rehearse: {type(model).__name__}")

    def step() -> Any:
        with torch.enable_grad():
            return _step(planned, call, notes)

    def fresh(existing: frozenset[nn.Parameter]) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter in existing else None

    with preserved(model) as existing:
        fresh(existing)
        step()
        fresh(existing)
        notes.begins.clear()
        torch.clear_autocast_cache()  # inside the caller's autocast the warm-up's casts would be there already
        executor = _runner(planned).executor
        assert executor is not None  # a step has run
        resident = _resident(plan, model, call, executor.capture)
        with _observed(planned, notes):
            if device.type == "cuda":
                changes, requested = _measured_cuda(step, notes, device)
            else:
                changes, requested = _measured_cpu(step, notes), None
    resident.pop("allocator slack", None)  # what was counted has it
    told = _told(plan, True, resident, changes, notes, set(), ())
    return told if requested is None else replace(told, requested=sum(resident.values()) + requested)


def _measured_cpu(step: Callable[[], Any], notes: _Notes) -> list[_Change]:
    """Return every allocation of torch's CPU allocator with its op."""
    marker = "rematplan: action "
    count = 0

    def now() -> int:
        # The profiler gives its events when all is over: a range without content stands for the place.
        nonlocal count
        with torch.profiler.record_function(f"{marker}{count}"):
            count += 1
        return count - 1

    notes.now = now
    held, events = cpu_events(step)
    del held
    changes: list[_Change] = []
    places: list[int] = []
    open_: list[str] = []
    for kind, name, size in events:
        if kind == "push":
            open_.append(name)
            if name.startswith(marker):
                places.append(len(changes))
        elif kind == "pop":
            if open_:
                open_.pop()
        elif kind == "memory_alloc":
            ops = [each for each in open_ if each.startswith("aten::")] or open_[-1:] or ["between ops"]
            changes.append(_Change(ops[0], size))
    notes.begins = [(places[index], action) for index, action in notes.begins]
    return changes


class _Counters(TorchDispatchMode):
    """Reads the CUDA caching allocator's counters after every op."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.changes: list[_Change] = []
        start = CudaBytes.read(device)
        self.last, self.start = start.allocated, start.requested
        self.requested = 0  # the most bytes that were asked for, above those of the start

    def read(self, label: str) -> None:
        """Note the bytes allocated and released since the last reading."""
        now = CudaBytes.read(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        for change in (now.highest - self.last, now.allocated - now.highest):
            if change:
                self.changes.append(_Change(label or "between ops", change))
        self.last = now.allocated
        self.requested = max(self.requested, now.highest_requested - self.start)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op and read."""
        result = func(*args, **(kwargs or {}))
        self.read(_op(str(func)))
        return result


def _measured_cuda(step: Callable[[], Any], notes: _Notes, device: torch.device) -> tuple[list[_Change], int]:
    """Return the caching allocator's counters between ops, their peaks included; the most bytes requested."""
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    counters = _Counters(device)

    def now() -> int:
        counters.read("")
        return len(counters.changes)

    notes.now = now
    with counters:
        held = step()
    wait(device)
    counters.read("")
    del held
    return counters.changes, counters.requested


# ---- the account -------------------------------------------------------------------------------------


def _resident(plan: Plan, model: nn.Module, call: Call, capture: Capture) -> dict[str, int]:
    """Return the bytes live during the whole step; what the model does not show is the plan's."""
    device = _rules(plan)
    parts = resident_parts(model, call, device)
    for part in ("optimizer state", "workspaces", "allocator slack"):
        parts[part] = plan.resident.get(part, 0)
    parts["constants"] = storage_bytes(capture.constant_tensors(), device)
    return {name: size for name, size in parts.items() if size}


def _told(
    plan: Plan,
    real: bool,
    resident: dict[str, int],
    changes: list[_Change],
    notes: _Notes,
    grads: set[Any],
    uncounted: tuple[str, ...] | None,
) -> Rehearsal:
    """Return the account of the changes, by action."""
    actions = _actions(len(changes), notes.begins)
    words = tuple(map(in_words, plan.schedule))
    points = [Moment(0, "before the step")]
    points += [Moment(action, change.label) for action, change in zip(actions, changes, strict=True)]
    end = len(points)
    blocks = [Allocation(name, category_of(name), size, 0, end) for name, size in resident.items()]
    for label, size, begin, gone, storage in _spans(changes):
        category = "transient"
        if storage in grads and storage >= 0:
            category = "gradients"
        elif storage in notes.held:
            category = "boundaries held"
        elif gone == len(changes):
            category = "carried values"
        elif actions[gone] != actions[begin]:
            reversing = isinstance(plan.schedule.actions[actions[begin]], Backward)
            last_run = isinstance(plan.schedule.actions[actions[begin]], Forward)
            category = "gradient at hand" if reversing else "transient" if last_run else "kept saved tensors"
        blocks.append(Allocation(label, category, size, begin + 1, gone + 1))
    title = "measured" if real else "rehearsed without data"
    timeline = MemoryTimeline(title, plan.memory_budget, words, tuple(points), tuple(blocks))
    most: dict[int, tuple[int, str]] = {}
    for live, point, change in zip(timeline.live[1:], points[1:], changes, strict=True):
        if point.action not in most or (change.change > 0 and live > most[point.action][0]):
            most[point.action] = (live, point.label)
    rows = []
    for index, predicted in enumerate(plan.timeline.during):
        observed, op = most.get(index, (None, ""))
        rows.append(Difference(index, predicted, observed, op))
    return Rehearsal(plan, real, resident, timeline, tuple(rows), uncounted)


def _actions(count: int, begins: list[tuple[int, int]]) -> list[int]:
    """Return (changes,) the action of the schedule that each belongs to.

    Autograd reverses a part of a stage before it needs what was dropped, but the actions that recompute that
    come first in the schedule: what was done before them counts with them.
    """
    actions = [0] * count
    for (begin, action), (end, _) in zip(begins, [*begins[1:], (count, 0)], strict=True):
        actions[begin:end] = [action] * (end - begin)
    for index in range(count - 2, -1, -1):
        actions[index] = min(actions[index], actions[index + 1])
    return actions


def _spans(changes: list[_Change]) -> list[tuple[str, int, int, int, int]]:
    """Return (op, bytes, first change, change of their release, storage) of bytes that lived together.

    A release of an unknown storage is that of the latest bytes of the same size, or else of the latest ones.
    """
    spans: list[tuple[str, int, int, int, int]] = []
    there: list[list[Any]] = []  # op, bytes, first change, storage
    for index, change in enumerate(changes):
        if change.change > 0:
            there.append([change.label, change.change, index, change.storage])
            continue
        left = -change.change
        same = [e for e in there if e[3] == change.storage]
        same.sort(key=lambda e: (e[1] == left, e[2]))
        while left > 0 and same:
            entry = same.pop()
            taken = min(left, entry[1])
            spans.append((entry[0], taken, entry[2], index, entry[3]))
            entry[1] -= taken
            left -= taken
            if not entry[1]:
                there = [e for e in there if e is not entry]
        # What is left was live before the step and is released in it: a lazily made cache, for instance.
    spans += [(e[0], e[1], e[2], len(changes), e[3]) for e in there]
    return spans
