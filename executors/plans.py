"""Hold the plans of one model by the shapes of its calls: made on demand, watched, tightened."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rematplan.executors.fingerprints import CHECKS
from rematplan.executors.first_step_peak import PeakWatch, tightened
from rematplan.executors.in_flight import InFlight
from rematplan.executors.model_guard import (
    Trainable,
    benchmarks_convolutions,
    reject_recording,
    reject_transforms,
)
from rematplan.executors.out_of_memory import Changes, lowered, release
from rematplan.executors.plain import plain_copy, plain_forward
from rematplan.executors.runner import Runner, copied_call
from rematplan.executors.trace import Trace
from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.errors import (
    CaptureError,
    InfeasibleBudget,
    NewShapeWarning,
    PeakWarning,
    PlanMismatch,
    SampleError,
)
from rematplan.scheduler.costs.resident import storage_bytes
from rematplan.scheduler.plan.kinds import BLOCKS
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.solve import solve_again
from rematplan.scheduler.torch_layer.call import (
    Call,
    CallReader,
    CallSignature,
    forward_signature,
    kind_of,
    nothing_to_train,
)
from rematplan.scheduler.torch_layer.environment import (
    Environment,
    environment,
    environment_difference,
    environment_text,
)
from rematplan.scheduler.torch_layer.fsdp import CollectiveCall, NoCollectives, is_distributed, sharded_within
from rematplan.scheduler.torch_layer.leaves import flatten, repeated_floats
from rematplan.scheduler.torch_layer.nested_plans import inner_plans_left_out
from rematplan.scheduler.torch_layer.preserve import HostRandomState, aliased, bare, model_device, preserved
from rematplan.scheduler.torch_layer.private import profiler_is_on

__all__ = ["Plans", "Settings"]

logger = logging.getLogger("rematplan")
MANY_CHANGES = 3  # of Python state that a graph took for constant, before blocks take over


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of ``execute``; see there."""

    watch: bool | None = None
    on_new_shape: str = "plan"
    max_plans: int = 8
    on_oom: str | None = None
    check: str = "metadata"
    debug: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("on_new_shape", ("plan", "plain", "error")),
            ("on_oom", ("replan", "raise", None)),
            ("check", tuple(CHECKS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"execute: {name}={getattr(self, name)!r} is unknown; choose one of {', '.join(map(repr, allowed))}"
                )
        if not isinstance(self.max_plans, int) or self.max_plans < 2:
            raise ValueError(
                f"execute: max_plans={self.max_plans!r}, expected an int of at least 2: the first plan stays, and a new "
                "shape needs one; pass on_new_shape='plain' or 'error' for no other plans"
            )


class Plans:
    """Runs training forwards of one planned model, each by the plan for its shapes.

    Attributes:
        first: the Runner of the first plan, which stays.
        others: those of plans for other calls, Python state or environments, the least recently used first.
        last: that of the latest forward; None if it was plain.
        trace: of the latest step, with ``debug``.
        changes: what a forward changes, if one that runs out of memory is run again.
    """

    def __init__(
        self, plans: Sequence[Plan], model: nn.Module, source: nn.Module, settings: Settings
    ) -> None:
        self.settings, self.name = settings, type(model).__name__
        self.where = f"planned {self.name}"
        self.device = model_device(model)
        # Ranks of a sharded model follow one schedule: none may change it, or run a forward again, by itself.
        self.alone = not sharded_within(model)
        for name, asked in (("watch", settings.watch), ("on_oom", settings.on_oom == "replan")):
            if asked and not self.alone:
                raise ValueError(
                    f"execute: {name}={getattr(settings, name)!r}: {self.name} is sharded by fully_shard, and a rank "
                    f"that followed a tighter schedule by itself would wait for the others for ever; leave {name} out"
                )
        self.read = CallReader(forward_signature(source))
        self.first, *rest = (self._runner(plan, model, source) for plan in plans)
        self.others: OrderedDict[Runner, None] = OrderedDict.fromkeys(rest)
        self.trainable = Trainable(model) if self.alone else None
        self.plain: set[CallSignature] = set()  # of calls that are known to run plainly
        # The last call's spec, leaf kinds, environment, requires_grad of parameters, and runner.
        self.seen: tuple[Any, list[Any], Environment, tuple[bool, ...], Runner | None] | None = None
        self.evicted = False
        self.last: Runner | None = None
        self.watched: tuple[Runner, PeakWatch] | None = None
        self.in_flight = InFlight(self.name, self.device)
        self.trace: Trace | None = None
        replan = self.alone and self.device.type == "cuda"
        if settings.on_oom is not None:
            replan = settings.on_oom == "replan"
        self.changes = Changes(self.device) if replan else None

    def _runner(self, plan: Plan, model: nn.Module, source: nn.Module, **how: Any) -> Runner:
        watch = self.settings.watch
        watching = self.alone and self.device.type == "cuda" if watch is None else watch
        return Runner(plan, model, source, watching, self.settings.check, **how)

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one training forward, by the plan for its shapes."""
        reject_transforms(model)
        if self.device.type == "cuda":
            reject_recording(model)
        call = self.read(args, kwargs)
        flat, spec = flatten(*call)
        self._judge(model)
        shares_casts = self.in_flight.shares_casts(model)
        try:
            with inner_plans_left_out():
                runner = self.last = self._find(model, call, flat, spec)
        except SampleError:  # the plain forward raises too, and leaves behind what it does until then
            return plain_forward(model, *args, **kwargs)
        if runner is None:
            return plain_forward(model, *args, **kwargs)
        with inner_plans_left_out():
            executor = runner.prepare(model, call)
            if (runner.ran_out or executor.ran_out) and self.changes is not None:
                runner.ran_out = executor.ran_out = False
                self.tighten(model, runner, "in the last step", "run_step() would have run that step again")
            self._watch(model, runner)
            self.in_flight.begins(runner.plan, shares_casts)
            output = self._run(model, runner, call, flat)
        self.in_flight.gave(model, runner.plan, output)
        if self.watched is not None:
            self.watched[1].until_backward_ends(output)
        return output

    # ---- which plan --------------------------------------------------------------------------------------

    def _find(self, model: nn.Module, call: Call, flat: list[Any], spec: Any) -> Runner | None:
        """Return what runs calls like this one, as things are; None if they run plainly."""
        kinds = [kind_of(leaf) for leaf in flat]
        repeated = repeated_floats(flat)
        now = environment(self.device.type)
        flags = () if self.trainable is None else self.trainable.flags(model)
        if self.seen is not None and self.seen[:4] == (spec, kinds, now, flags):
            runner = self.seen[4]
            if runner is None or runner.holds(repeated):
                return runner
        signature = CallSignature.of(call)
        frozen = self.first.frozen if self.trainable is None else self.trainable.frozen(flags)
        alike = [r for r in (*reversed(self.others), self.first) if r.takes(signature)]
        usable = [r for r in alike if r.frozen == frozen and r.runs_in(now, self.device.type)]
        found = next((r for r in usable if r.reads_alike(signature) and r.holds(repeated)), None)
        blocks = [r for r in usable if r.kind.runs_code and r.holds(repeated)]
        if found is None and len(blocks) >= MANY_CHANGES:  # their code reads plain values itself
            found = blocks[0]
        if found is not None:
            if found is not self.first:
                self.others.move_to_end(found)
        elif signature not in self.plain:
            found = self._new(model, call, signature, alike, usable, frozen)
        if found is not None or signature in self.plain:
            self.seen = (spec, kinds, now, flags, found)
        return found

    def _new(
        self,
        model: nn.Module,
        call: Call,
        signature: CallSignature,
        alike: list[Runner],
        usable: list[Runner],
        frozen: tuple[str, ...],
    ) -> Runner | None:
        """Return what runs calls, or state around them, not seen yet; None if they run plainly.

        Args:
            alike: run such calls in another environment, with other parameters frozen or other Python state.
            usable: those of them that differ in Python state alone.
            frozen: names of the parameters that do not require grad.
        """
        self.first.guard.check(model, fires_hooks=True)  # submodules that are gone are no other state
        where, settings = self.where, self.settings
        state = any(r.reads_alike(signature) for r in usable)  # Python state is all that differs
        if not any(r.reads_alike(signature) for r in alike) and settings.on_new_shape == "error":
            self.first.want.check(call, where)
        differs = self._difference(signature, alike, usable, frozen)
        if not state and settings.on_new_shape == "error":
            raise PlanMismatch(
                f"{where}: {differs}; call solve() as things are now, and execute that plan too"
            )
        if not state and settings.on_new_shape == "plain":
            logger.warning("%s: %s; such calls run without a plan", where, differs)
            if not alike:
                self.plain.add(signature)
            return None
        known = () if self.trainable is None else self.trainable.known
        trains = len(self.first.frozen) < len({*map(id, known)}) or self.first.want.trains_input()
        if trains and nothing_to_train(model, call):  # a loss that is looked at: there is no backward
            return None
        hindrance = self._hindrance(model, call)
        if hindrance is not None:
            warnings.warn(
                f"{where}: {differs}; such calls run without a plan, for {hindrance}: pass plans for all shapes, "
                "execute([plan, ...], model)",
                NewShapeWarning,
                stacklevel=6,
            )
            return None
        runner = self._renewed(model, call, signature, usable, differs) if usable else None
        if runner is None:
            plain = plain_copy(model)
            plan = self._plan(plain, call, differs)
            renewed = max((r.renewed for r in usable), default=-1) + 1
            runner = self._runner(plan, model, plain, renewed=renewed)
        while len(self.others) >= settings.max_plans - 1:
            self.others.popitem(last=False)
            if not self.evicted:
                self.evicted = True
                warnings.warn(
                    f"{where}: more than max_plans={settings.max_plans} kinds of calls; the least recently used plan goes, "
                    "and is made anew when its shape comes back. Pad batches to fewer shapes, or raise max_plans",
                    NewShapeWarning,
                    stacklevel=6,
                )
        self.others[runner] = None
        return runner

    def _difference(
        self, signature: CallSignature, alike: list[Runner], usable: list[Runner], frozen: tuple[str, ...]
    ) -> str:
        """Return how a call, or what surrounds it, differs from those that have a plan, in words."""
        if not alike:
            return self.first.want.difference(signature)
        if usable:
            same = next((r for r in usable if r.reads_alike(signature)), None)
            return usable[0].want.difference(signature) if same is None else same.changes()
        for runner in alike:
            text = environment_difference(runner.plan.capture.environment, environment_text(self.device.type))
            if text is not None:
                return text
        names = sorted({*frozen} ^ {*alike[0].frozen})
        return f"other parameters require grad than when the plan was made ({', '.join(names[:3])})"

    def _renewed(
        self, model: nn.Module, call: Call, signature: CallSignature, usable: list[Runner], differs: str
    ) -> Runner | None:
        """Return the same plan on a graph captured with the present Python state; None if it does not fit.

        A value that keeps changing would cost a capture each time: blocks, whose code reads it, take over.
        """
        where = self.where
        before = next((r for r in usable if not r.kind.runs_code), None)
        if before is None:
            return None
        plain = plain_copy(model)
        renewed = max(r.renewed for r in usable) + 1
        if renewed == MANY_CHANGES:
            try:
                plan = self._plan(plain, call, differs, capture=BLOCKS)
            except (CaptureError, InfeasibleBudget) as error:
                warnings.warn(
                    f"{where}: {differs}, and the op graph is captured again at every such change, for blocks cannot take over "
                    f"({error}); keep values that change at every step in tensors (register_buffer)",
                    NewShapeWarning,
                    stacklevel=7,
                )
            else:
                return self._runner(plan, model, plain)
        logger.warning("%s: %s; the op graph is captured again, by the same plan", where, differs)
        capture = replace(before.plan.capture, leaves=signature.leaves)
        plan = replace(before.plan, live=None, capture=capture)
        runner = self._runner(plan, model, plain, trying=True, renewed=renewed)
        try:
            with self._apart(model, call) as apart:
                runner.prepare(model, apart)
        except PlanMismatch as error:
            logger.info("%s: %s", where, error)
            return None
        return runner

    def _hindrance(self, model: nn.Module, call: Call) -> str | None:
        """Return why no plan can be made now; None if one can.

        Only some ranks may meet a new shape: a trial must not wait for the others.
        """
        if is_distributed():
            if not self.alone:
                return "ranks of a sharded model must not plan by themselves"
            plain = plain_copy(model)
            try:
                with preserved(plain), torch.no_grad(), NoCollectives():
                    args, kwargs = copied_call(call)
                    plain(*args, **kwargs)
            except CollectiveCall as error:
                return f"a trial would wait for other ranks of torch.distributed ({error})"
        if self.device.type == "cpu" and profiler_is_on():
            return "a profiler is running, and it takes one to count bytes on the CPU"
        return None

    def _plan(self, model: nn.Module, call: Call, differs: str, capture: str = "auto") -> Plan:
        """Plan for another call of the plain model amid training, whose state it leaves as it is."""
        first, where = self.first.plan, self.where
        budget = format_bytes(first.memory_budget)
        logger.warning("%s: %s; planning for it under %s", where, differs, budget)
        began = time.perf_counter()
        try:
            with (
                self._apart(model, call) as apart,
                _accumulating(model, bool(first.resident.get("existing gradients"))),
            ):
                plan = solve_again(
                    first, model, apart, lambda line: logger.info("%s: %s", where, line), capture
                )
        except InfeasibleBudget as error:
            note = f"{where}: a new plan was needed: {differs}. {error.note}"
            raise InfeasibleBudget(error.budget, error.smallest, error.solver, note) from error
        except CaptureError as error:
            raise CaptureError(
                f"{where}: {differs}: {error}; on_new_shape='plain' runs such calls plainly"
            ) from error
        logger.warning(
            "%s: planned in %.1f s; predicted peak %s, overhead %.1f %%",
            where,
            time.perf_counter() - began,
            format_bytes(plan.predicted_peak),
            100 * plan.predicted_overhead,
        )
        return plan

    @contextmanager
    def _apart(self, model: nn.Module, call: Call) -> Iterator[Call]:
        """Yield a call for trials amid training; hooks of the root are left out."""
        random = HostRandomState()
        # Casts in autocast's cache would not be counted; a trial's would stay until the user's context ends.
        torch.clear_autocast_cache()
        try:
            with aliased(model) if is_distributed() else nullcontext(), bare(model):
                yield copied_call(call)
        finally:
            torch.clear_autocast_cache()
            random.restore()

    # ---- the forward itself ------------------------------------------------------------------------------

    def _run(self, model: nn.Module, runner: Runner, call: Call, flat: list[Any]) -> Any:
        """Run the forward; if it runs out of memory, once more by a tighter plan."""
        if self.changes is None:
            return self._once(runner, call, flat)
        state = self.changes.before(model)
        try:
            output = self._once(runner, call, flat)
        except torch.OutOfMemoryError as error:
            runner.ran_out = True
            hindrance = state.hindrance()
            if hindrance is not None:
                error.add_note(f"{self.where}: the forward is not run again: {hindrance}")
                raise
            reason = str(error)
        else:
            self.changes.after(state)
            return output
        # The exception is gone, and with it the frames that held what the forward had computed.
        state.restore()
        if self.watched is not None:
            self.watched[1].stop()
            self.watched = None
        if not self.tighten(model, runner, "in the forward", "the forward is run again"):
            raise torch.OutOfMemoryError(f"{self.where}: no schedule takes less than this one: {reason}")
        try:
            return self._once(runner, call, flat)
        except torch.OutOfMemoryError:
            runner.ran_out = True
            raise

    def _once(self, runner: Runner, call: Call, flat: list[Any]) -> Any:
        assert runner.executor is not None  # prepare() made it
        if self.settings.debug:
            runner.executor.observe = self.trace = Trace(runner.plan, self.name)
        return runner.executor.forward(flat, call)

    def tighten(self, model: nn.Module, runner: Runner, where: str, what: str) -> bool:
        """Follow a plan that takes less, after a step ran out of memory; return False if there is none.

        Warns:
            PeakWarning: says where memory ran out, and what happens now.
        """
        release(self.device)
        tighter = lowered(runner.plan, self.device)
        if tighter is None:
            return False
        before = runner.plan.predicted_peak
        runner.follow(tighter, model)
        warnings.warn(
            f"{self.where}: out of memory {where}; its schedule of "
            f"{format_bytes(before)} gives way to one of {format_bytes(tighter.predicted_peak)} "
            f"({tighter.predicted_overhead:.1%} slower than the plain step); {what}",
            PeakWarning,
            stacklevel=6,
        )
        return True

    def _judge(self, model: nn.Module) -> None:
        """Judge the step that was watched, if there is one."""
        if self.watched is None:
            return
        (watched, watch), self.watched = self.watched, None
        measured = watch.stop()
        if measured is not None:
            watched.watching = False
            tighter = tightened(watched.plan, measured, self.name, watch.requested)
            if tighter is not None:
                watched.follow(tighter, model)

    def _watch(self, model: nn.Module, runner: Runner) -> None:
        """Watch the step that begins, if none of this plan has been measured and it is as planned."""
        if not runner.watching:
            return
        if not runner.benchmarked and benchmarks_convolutions(model, self.device):
            # In the first step cuDNN tries algorithms, in workspaces that later ones do not take.
            runner.benchmarked = True
            return
        existing = storage_bytes((p.grad for p in model.parameters() if p.grad is not None), self.device)
        profiled = self.device.type == "cpu" and profiler_is_on()
        if existing == runner.plan.resident.get("existing gradients") and not profiled:
            self.watched = (runner, PeakWatch(self.device))


@contextmanager
def _accumulating(model: nn.Module, counted: bool) -> Iterator[None]:
    """Give parameters zero gradients within, so that the new plan counts existing ones as the first does."""
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None] if counted else []
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in missing:
            parameter.grad = None
