"""The plans of one model, by the shapes of its calls: made on demand, watched, and tightened where memory runs out."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from executors.check import CHECKS
from executors.guard import reject_transforms
from executors.oom import Changes, lowered, release
from executors.runner import Runner, forward_of, plain_copy, plain_forward
from executors.trace import Trace
from executors.watch import Watch, tightened
from scheduler.budget import format_bytes
from scheduler.capture.flat import flatten
from scheduler.capture.layouts import is_plain
from scheduler.capture.sample import Call, CallReader, CallSignature, forward_signature, kind_of
from scheduler.capture.sharded import CollectiveCall, NoCollectives, is_distributed, sharded_within
from scheduler.capture.state import HostRandomState, aliased, model_device, preserved
from scheduler.costs.resident import storage_bytes
from scheduler.errors import CaptureError, InfeasibleBudget, NewShapeWarning, PeakWarning
from scheduler.plan import Plan
from scheduler.planning import solve_again

__all__ = ["Plans", "Settings"]

logger = logging.getLogger("rematplan")


@dataclass(frozen=True, slots=True)
class Settings:
    """How ``execute`` was told to run the plans; see there."""

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
        first: of the first plan, which stays.
        others: of plans for other calls, the least recently used first.
        last: of the latest forward; None if it was plain.
        trace: of the latest forward and its backward, if that is asked for.
        changes: what a forward changes, if one that runs out of memory is to be run again.
    """

    def __init__(
        self, plans: Sequence[Plan], model: nn.Module, source: nn.Module, settings: Settings
    ) -> None:
        self.settings = settings
        self.device = model_device(model)
        # Ranks of a sharded model follow one schedule: none may take another one, or run a forward again, by itself.
        self.alone = not sharded_within(model)
        for name, asked in (("watch", settings.watch), ("on_oom", settings.on_oom == "replan")):
            if asked and not self.alone:
                raise ValueError(
                    f"execute: {name}={getattr(settings, name)!r}: {type(model).__name__} is sharded by fully_shard, and a rank "
                    f"that followed a tighter schedule by itself would wait for the others for ever; leave {name} out"
                )
        self.read = CallReader(forward_signature(source))
        self.first, *rest = (self._runner(plan, model, source) for plan in plans)
        self.others: OrderedDict[CallSignature, Runner] = OrderedDict((r.want, r) for r in rest)
        self.plain: set[CallSignature] = set()  # of calls that are known to run plainly
        # The last call's spec, leaf kinds and runner.
        self.seen: tuple[Any, list[Any], Runner | None] | None = None
        self.evicted = False
        self.last: Runner | None = None
        self.watched: tuple[Runner, Watch] | None = None
        self.trace: Trace | None = None
        replan = self.alone and self.device.type == "cuda"
        if settings.on_oom is not None:
            replan = settings.on_oom == "replan"
        self.changes = Changes(self.device) if replan else None

    def _runner(self, plan: Plan, model: nn.Module, source: nn.Module) -> Runner:
        watch = self.settings.watch
        watching = self.alone and self.device.type == "cuda" if watch is None else watch
        return Runner(plan, model, source, watching, self.settings.check)

    def forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One training forward, by the plan for its shapes."""
        if "_is_replica" in model.__dict__:  # its parameters are not those that the executor reads
            raise RuntimeError(
                f"planned {type(model).__name__}: DataParallel copies a model to every device in each step, which a planned "
                "model cannot follow; use DistributedDataParallel(execute(plan, model)), one process per device"
            )
        reject_transforms(model)
        call = self.read(args, kwargs)
        flat, spec = flatten(*call)
        self._judge(model)
        runner = self.last = self._find(model, call, flat, spec)
        if runner is None:
            return plain_forward(model, *args, **kwargs)
        executor = runner.prepare(model, call, flat)
        if (runner.ran_out or executor.ran_out) and self.changes is not None:
            runner.ran_out = executor.ran_out = False
            self.tighten(model, runner, "in the last step", "run_step() would have run that step again")
        self._watch(model, runner)
        output = self._run(model, runner, call, flat)
        if self.watched is not None:
            self.watched[1].until_backward_ends(output)
        return output

    # ---- which plan --------------------------------------------------------------------------------------

    def _find(self, model: nn.Module, call: Call, flat: list[Any], spec: Any) -> Runner | None:
        """What runs calls like this one; None if they run plainly."""
        kinds = [kind_of(leaf) for leaf in flat]
        if self.seen is not None and self.seen[0] == spec and self.seen[1] == kinds:
            return self.seen[2]
        signature = CallSignature.of(call)
        runner: Runner | None = None
        if signature == self.first.want:
            runner = self.first
        elif signature in self.others:
            runner = self.others[signature]
            self.others.move_to_end(signature)
        elif signature not in self.plain:
            runner = self._new(model, call, signature)
        if runner is not None or signature in self.plain:
            self.seen = (spec, kinds, runner)
        return runner

    def _new(self, model: nn.Module, call: Call, signature: CallSignature) -> Runner | None:
        """What runs calls of a kind not seen before; None if they run plainly."""
        where, settings = f"planned {type(model).__name__}", self.settings
        if settings.on_new_shape == "error":
            self.first.want.check(call, where)
        differs = self.first.want.difference(signature)
        if settings.on_new_shape == "plain":
            logger.warning("%s: %s; such calls run without a plan", where, differs)
            self.plain.add(signature)
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
        plain = plain_copy(model)
        runner = self._runner(self._plan(plain, call, where, differs), model, plain)
        self.others[signature] = runner
        return runner

    def _hindrance(self, model: nn.Module, call: Call) -> str | None:
        """Why no plan can be made now; None if one can.

        Of ranks that meet a new shape, others may not: a trial must not wait for them.
        """
        if is_distributed():
            if not self.alone:
                return "ranks of a sharded model must not plan by themselves"
            plain = plain_copy(model)
            try:
                with preserved(plain), torch.no_grad(), NoCollectives():
                    args, kwargs = _cut_off(call)
                    plain(*args, **kwargs)
            except CollectiveCall as error:
                return f"a trial would wait for other ranks of torch.distributed ({error})"
        if self.device.type == "cpu" and torch._C._autograd._profiler_enabled():
            return "a profiler is running, and it takes one to count bytes on the CPU"
        return None

    def _plan(self, model: nn.Module, call: Call, where: str, differs: str) -> Plan:
        """A plan for another call, in the middle of training: nothing that training goes by is changed.

        Args:
            model: the plain one.
        """
        first = self.first.plan
        budget = format_bytes(first.memory_budget)
        logger.warning("%s: %s; planning for it under %s", where, differs, budget)
        began, random = time.perf_counter(), HostRandomState()
        # Casts in autocast's cache would not be counted; those of a trial would stay until the user's context ends.
        torch.clear_autocast_cache()
        try:
            with (
                aliased(model) if is_distributed() else nullcontext(),
                _accumulating(model, bool(first.resident.get("existing gradients"))),
            ):
                plan = solve_again(
                    first, model, _cut_off(call), lambda line: logger.info("%s: %s", where, line)
                )
        except InfeasibleBudget as error:
            note = f"{where}: this call has {differs}. {error.note}"
            raise InfeasibleBudget(error.budget, error.smallest, error.solver, note) from error
        except CaptureError as error:
            raise CaptureError(
                f"{where}: {differs}: {error}; on_new_shape='plain' runs such calls plainly"
            ) from error
        finally:
            torch.clear_autocast_cache()
            random.restore()
        logger.warning(
            "%s: planned in %.1f s; predicted peak %s, overhead %.1f %%",
            where,
            time.perf_counter() - began,
            format_bytes(plan.predicted_peak),
            100 * plan.predicted_overhead,
        )
        return plan

    # ---- the forward itself ------------------------------------------------------------------------------

    def _run(self, model: nn.Module, runner: Runner, call: Call, flat: list[Any]) -> Any:
        """The forward; once more, by a tighter plan, if it runs out of memory."""
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.changes is None or recording:  # a CUDA graph has no place for copies of generators
            return self._once(model, runner, call, flat)
        state = self.changes.before(model)
        try:
            output = self._once(model, runner, call, flat)
        except torch.OutOfMemoryError as error:
            runner.ran_out = True
            hindrance = state.hindrance()
            if hindrance is not None:
                error.add_note(f"planned {type(model).__name__}: the forward is not run again: {hindrance}")
                raise
            reason = str(error)
        else:
            self.changes.after(state)
            return output
        # The exception is gone, and with it the frames that held what the forward had made.
        state.restore()
        if self.watched is not None:
            self.watched[1].stop()
            self.watched = None
        if not self.tighten(model, runner, "in the forward", "the forward is run again"):
            raise torch.OutOfMemoryError(
                f"planned {type(model).__name__}: no schedule takes less than this one: {reason}"
            )
        try:
            return self._once(model, runner, call, flat)
        except torch.OutOfMemoryError:
            runner.ran_out = True
            raise

    def _once(self, model: nn.Module, runner: Runner, call: Call, flat: list[Any]) -> Any:
        assert runner.executor is not None  # prepare() made it
        if self.settings.debug:
            runner.executor.observe = self.trace = Trace(runner.plan, type(model).__name__)
        return forward_of(runner.executor, flat, call)

    def tighten(self, model: nn.Module, runner: Runner, where: str, what: str) -> bool:
        """After a step ran out of memory, follow a plan that takes less; False if there is none.

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
            f"planned {type(model).__name__}: out of memory {where}; its schedule of "
            f"{format_bytes(before)} gives way to one of {format_bytes(tighter.predicted_peak)} "
            f"({tighter.predicted_overhead:.1%} slower than the plain step); {what}",
            PeakWarning,
            stacklevel=6,
        )
        return True

    def _judge(self, model: nn.Module) -> None:
        """Judge the step that was watched, if there is one."""
        if self.watched is not None:
            (watched, watch), self.watched = self.watched, None
            measured = watch.stop()
            if measured is not None:
                watched.watching = False
                tighter = tightened(watched.plan, measured, type(model).__name__, watch.requested)
                if tighter is not None:
                    watched.follow(tighter, model)

    def _watch(self, model: nn.Module, runner: Runner) -> None:
        """Watch the step that begins, if nothing has been measured of this plan and the step is as planned."""
        if not runner.watching:
            return
        existing = storage_bytes((p.grad for p in model.parameters() if p.grad is not None), self.device)
        profiled = self.device.type == "cpu" and torch._C._autograd._profiler_enabled()
        if existing == runner.plan.resident.get("existing gradients") and not profiled:
            self.watched = (runner, Watch(self.device))


@contextmanager
def _accumulating(model: nn.Module, counted: bool) -> Iterator[None]:
    """Where the first plan counts gradients that exist before the step, so must this one: zeros stand in for them."""
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None] if counted else []
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in missing:
            parameter.grad = None


def _cut_off(call: Call) -> Call:
    """The call on copies of its tensors, without their history: a trial reverses nothing beyond the model."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            if (
                is_plain(tensor) and copy.stride() != tensor.stride()
            ):  # an expanded tensor: ops may take another way for a dense one
                copy = tensor.detach()
            made[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    return pytree.tree_map_only(Tensor, copied, call)
