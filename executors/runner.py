"""Run training forwards by one plan: its capture, its executor, and the calls and state that it is for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rematplan.executors.engine import Executor
from rematplan.executors.model_guard import Guard
from rematplan.executors.plain import plain_copy
from rematplan.executors.recapture import ENGINES, check_names, recaptured
from rematplan.scheduler.capture.bit_equal_step import PlainSteps, step_result
from rematplan.scheduler.capture.protocol import Capture
from rematplan.scheduler.core.budget import format_bytes, machine_bytes
from rematplan.scheduler.core.errors import PlanMismatch
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import Call, CallSignature
from rematplan.scheduler.torch_layer.environment import Environment, environment_difference, environment_text
from rematplan.scheduler.torch_layer.fsdp import is_distributed, sharded_within
from rematplan.scheduler.torch_layer.layouts import is_strided
from rematplan.scheduler.torch_layer.leaves import flatten, map_tensors
from rematplan.scheduler.torch_layer.preserve import HostRandomState, bare, model_device

__all__ = ["Runner", "copied_call"]


class Runner:
    """Runs training forwards of one planned model by one plan.

    A capture made in this process is used as it is. For a plan that was loaded, or another model, the model
    is captured again at the first forward, on its inputs, and must give the same. A plan that was made
    without data is then tried against a plain step.

    Attributes:
        want: the signature of the calls that the plan is for.
        watching: whether no step was measured yet, and one is to be.
        benchmarked: whether cuDNN has tried its algorithms in a step of this plan.
        ran_out: whether the last step ran out of memory, so that the next one follows a tighter plan.
        frozen: names of the parameters that do not require grad in its steps.
        trying: whether a capture made at the first forward is tried against a plain step.
        renewed: how often the op graph was captured again because Python state had changed.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        source: nn.Module,
        watching: bool,
        check: str,
        *,
        trying: bool = False,
        renewed: int = 0,
    ) -> None:
        check_names(plan, model)
        self.plan = plan
        self.frozen = plan.capture.frozen
        self.trying, self.renewed = trying or bool(plan.capture.target), renewed
        self._environment: Environment | None = None
        self.want = CallSignature(plan.capture.structure, plan.capture.leaves)
        self.watching = watching
        self.benchmarked = False
        self.check = check
        self.ran_out = False
        self.guard = Guard(model, frozenset(plan.capture.evaluating))
        self.sharded = len(sharded_within(model))
        self.kind = KINDS[plan.capture.kind]
        self.executor: Executor | None = None
        # Objects that share their attributes are one model: a capture of one is a capture of the other.
        live = plan.live[0] if plan.live is not None else None
        if live is not None and vars(live) is vars(source):
            self.executor = self.executor_for(plan.live[1], model)

    def executor_for(self, capture: Capture, model: nn.Module) -> Executor:
        """Return what runs the plan on this capture."""
        return ENGINES[self.plan.capture.kind].executor(capture, self.plan, model, self.check)

    def takes(self, signature: CallSignature) -> bool:
        """Return whether the plan is for tensors like these, whatever the plain values beside them."""
        if signature.structure != self.want.structure:
            return False
        pairs = zip(self.want.described, signature.described, strict=True)
        return all(a == b for a, b in pairs if "tensor" in (a[0], b[0]))

    def reads_alike(self, signature: CallSignature) -> bool:
        """Return whether the plain values in a call are those of the plan, as far as they matter.

        Code of blocks reads them itself; there they matter if they may lead it another way.
        """
        unread = None if self.executor is None else self.executor.capture.unread
        unread = self.plan.capture.unread if unread is None else unread
        for leaf, (a, b) in enumerate(zip(self.want.described, signature.described, strict=True)):
            if a[0] == "tensor" or leaf in unread or (a == b and type(a[-1]) is type(b[-1])):
                continue
            if not (self.kind.runs_code and _both_numbers(a[-1], b[-1])):
                return False
        return True

    def runs_in(self, environment: Environment, kind: str) -> bool:
        """Return whether the process is in the state that the plan was made in."""
        if self._environment is None:
            then = self.plan.capture.environment
            if environment_difference(then, environment_text(kind)) is not None:
                return False
            self._environment = environment
        return environment == self._environment

    def holds(self, repeated: tuple[tuple[int, int], ...]) -> bool:
        """Return whether what the plan took for constant is unchanged: Python state, and ``repeated``.

        Args:
            repeated: (leaf, earlier leaf) of the call that are one tensor, which traced code may have asked.
        """
        if self.executor is None or self.kind.runs_code:
            return self.guard.in_modes()
        return bool(self.executor.capture.holds(repeated))

    def changes(self) -> str:
        """Return what has changed that the plan took for constant, in words."""
        if self.executor is None or self.kind.runs_code:
            return self.guard.mode_difference() or ""
        return str(self.executor.capture.changes())

    def follow(self, plan: Plan, model: nn.Module) -> None:
        """Follow another plan of the same capture from the next forward on."""
        self.plan, self.ran_out = plan, False
        if self.executor is not None:
            self.executor = self.executor_for(self.executor.capture, model)

    def prepare(self, model: nn.Module, call: Call) -> Executor:
        """Check that the model has the plan's modules, capture it if needed, and return the executor."""
        # Nothing is sharded where torch.distributed is not initialised: every forward is spared the search.
        if is_distributed() and len(sharded_within(model)) != self.sharded:
            raise PlanMismatch(
                f"planned {type(model).__name__}: fully_shard was called after execute(); call it first, then solve() and "
                "execute() on the sharded model"
            )
        self.guard.check(model, fires_hooks=self.kind.runs_code)
        if self.executor is None:
            random = HostRandomState()
            try:
                self.executor = self._captured(model, call)
            finally:
                random.restore()
        return self.executor

    def _captured(self, model: nn.Module, call: Call) -> Executor:
        apart = copied_call(call)
        executor = self.executor_for(self.capture_again(model, apart), model)
        if self.trying:  # a plan that was made without data, or a graph of other Python state
            flat = flatten(*apart)[0]
            self._try(model, apart, functools.partial(executor.forward, flat, apart))
        return executor

    def _try(self, model: nn.Module, call: Call, planned: Callable[[], Any]) -> None:
        """Compare one step by the plan with a plain one, bit for bit; warn where that costs too much."""
        hindrance = _hindrance(self.plan)
        if hindrance:
            warnings.warn(
                f"planned {type(model).__name__}: the captured graph was never run with data, and it is not tried now whether "
                f"it trains bit for bit like the plain model: {hindrance}",
                stacklevel=6,
            )
            return
        plain = plain_copy(model)
        with bare(plain) as root:
            step = functools.partial(step_result, plain, lambda: root(*call[0], **call[1]), offload=True)
            steps = PlainSteps(step(), step, model_device(plain))
            differs, _ = steps.judge(functools.partial(step_result, plain, planned))
        if differs is not None:
            raise PlanMismatch(
                f"planned {type(model).__name__}: a step of the captured graph, which was never run with data, is not the plain "
                f"step: {differs}; call solve() on the model as it is now, with its data"
            )

    def capture_again(self, model: nn.Module, apart: Call) -> Capture:
        """Return the capture of the plan, made on this model and a call that was ``copied_call``."""
        with bare(plain_copy(model)) as plain:  # this forward is within hooks of the root already
            return recaptured(self.plan, plain, apart)


def copied_call(call: Call) -> Call:
    """Return the call on copies of its tensors without history: trials reverse nothing beyond the model."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            # An expanded one: ops may take another way for a dense tensor.
            if is_strided(tensor) and copy.stride() != tensor.stride():
                copy = tensor.detach()
            made[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    return map_tensors(copied, call)


def _both_numbers(a: Any, b: Any) -> bool:
    """Return whether both are numbers, both 0 or neither: 0 often takes another path through the code."""
    return type(a) in (int, float) and type(a) is type(b) and (a == 0) == (b == 0)


def _hindrance(plan: Plan) -> str | None:
    """Return why a plain step beside a planned one costs too much; None if it does not."""
    if is_distributed():
        return "a backward of its own would get in the way of torch.distributed"
    if plan.plain.peak > machine_bytes() / 2:
        return f"the plain step takes {format_bytes(plan.plain.peak)}, more than half of the host's memory"
    return None
