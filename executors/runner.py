"""One plan at work: its capture, the executor that follows it, and what it was made for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from executors.block_stages import ModuleExecutor
from executors.graph_stages import GraphExecutor
from executors.guard import Guard
from executors.recapture import check_names, recaptured
from scheduler.budget import format_bytes, machine_bytes
from scheduler.capture.eager import wrapped_forward
from scheduler.capture.environment import Environment, environment_difference, environment_text
from scheduler.capture.flat import flatten, map_tensors
from scheduler.capture.graph_capture import GraphCapture
from scheduler.capture.layouts import is_plain as is_view
from scheduler.capture.module_capture import ModuleCapture
from scheduler.capture.plain_steps import PlainSteps
from scheduler.capture.python_state import MISSING
from scheduler.capture.sample import Call, CallSignature
from scheduler.capture.sharded import is_distributed, sharded_within, share_sharding
from scheduler.capture.state import HostRandomState, bare, model_device
from scheduler.capture.verify import run_step
from scheduler.errors import PlanMismatch
from scheduler.plan import Plan

__all__ = [
    "Runner",
    "cut_off",
    "forward_of",
    "in_words",
    "plain_copy",
    "plain_forward",
    "plans_within",
    "sharing",
    "wrappers",
]


class Runner:
    """Runs training forwards of one planned model by one plan.

    A capture made in this process is used as it is; for a plan that was loaded, or a model other than the
    one it was made with, the model is captured again at the first forward, on the inputs given there, and
    must come out the same. A plan that was made without data is then tried against a plain step.

    Attributes:
        want: the signature of the calls that the plan is for.
        watching: whether the next step is to be the first that is measured.
        benchmarked: whether cuDNN has tried its algorithms in a step of this plan.
        ran_out: whether the last step ran out of memory, so that the next one is to follow a tighter plan.
        frozen: names of the parameters that do not require grad in its steps.
        trying: whether the capture that is made at the first forward is to be tried against a plain step.
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
        self.executor: GraphExecutor | ModuleExecutor | None = None
        # Objects that share their attributes are one model: a capture of one is a capture of the other.
        live = plan.live[0] if plan.live is not None else None
        if live is not None and vars(live) is vars(source):
            self.executor = self.executor_for(plan.live[1], model)

    def executor_for(
        self, capture: GraphCapture | ModuleCapture, model: nn.Module
    ) -> GraphExecutor | ModuleExecutor:
        """What runs the plan on this capture."""
        if isinstance(capture, GraphCapture):
            host = self.plan.timeline.host_peak
            return GraphExecutor(capture, self.plan.program, model, check=self.check, host_bytes=host)
        plain = functools.partial(plain_forward, model)
        return ModuleExecutor(capture, self.plan.program, model, plain, check=self.check)

    def takes(self, signature: CallSignature) -> bool:
        """Whether the plan is for tensors like these, whatever the plain values beside them."""
        if signature.structure != self.want.structure:
            return False
        pairs = zip(self.want.described, signature.described, strict=True)
        return all(a == b for a, b in pairs if "tensor" in (a[0], b[0]))

    def reads_alike(self, signature: CallSignature) -> bool:
        """Whether the plain values in a call are those of the plan, as far as they matter.

        Code of blocks reads them itself; there they matter if they may lead it another way.
        """
        graph = isinstance(self.executor, GraphExecutor)
        unread = self.executor.capture.graph.face.unread if graph else self.plan.capture.unread  # type: ignore[union-attr]
        for leaf, (a, b) in enumerate(zip(self.want.described, signature.described, strict=True)):
            if a[0] == "tensor" or leaf in unread or (a == b and type(a[-1]) is type(b[-1])):
                continue
            if self.plan.capture.kind == "graph" or not _both_numbers(a[-1], b[-1]):
                return False
        return True

    def runs_in(self, environment: Environment, kind: str) -> bool:
        """Whether the process is in the state that the plan was made in."""
        if self._environment is None:
            then = self.plan.capture.environment
            if environment_difference(then, environment_text(kind)) is not None:
                return False
            self._environment = environment
        return environment == self._environment

    def holds(self, repeated: tuple[tuple[int, int], ...]) -> bool:
        """Whether what the plan took for constant is still so: Python state, and which tensors of the call are one.

        Args:
            repeated: (leaf, earlier leaf) of the tensors that are; of a graph the code may have asked.
        """
        if isinstance(self.executor, GraphExecutor):
            face = self.executor.capture.graph.face
            return face.repeats == repeated and face.guards.holds()
        return self.guard.in_modes()

    def changes(self) -> str:
        """What the plan took for constant and is otherwise now, in words."""
        if not isinstance(self.executor, GraphExecutor):
            return self.guard.mode_difference() or ""
        found = self.executor.capture.graph.face.guards.changes()
        if not found:
            return "other arguments are one and the same tensor"
        shown = [f"{path} is {in_words(now)} instead of {in_words(then)}" for path, then, now in found[:3]]
        return ", ".join(shown) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    def follow(self, plan: Plan, model: nn.Module) -> None:
        """Follow another plan of the same capture from the next forward on."""
        self.plan, self.ran_out = plan, False
        if self.executor is not None:
            self.executor = self.executor_for(self.executor.capture, model)

    def prepare(self, model: nn.Module, call: Call) -> GraphExecutor | ModuleExecutor:
        """The executor, once the model is found to have the plan's modules and is captured."""
        # Nothing is sharded where torch.distributed is not initialised: every forward is spared the search.
        if is_distributed() and len(sharded_within(model)) != self.sharded:
            raise PlanMismatch(
                f"planned {type(model).__name__}: fully_shard was called after execute(); call it first, then solve() and "
                "execute() on the sharded model"
            )
        self.guard.check(model, fires_hooks=self.plan.capture.kind == "modules")
        if self.executor is None:
            random = HostRandomState()
            try:
                self.executor = self._captured(model, call)
            finally:
                random.restore()
        return self.executor

    def _captured(self, model: nn.Module, call: Call) -> GraphExecutor | ModuleExecutor:
        """What runs the plan on a capture that is made now."""
        executor = self.executor_for(self.capture_again(model, call), model)
        if self.trying:  # a plan that was made without data, or a graph of other Python state
            apart = cut_off(call)
            self._try(model, apart, functools.partial(forward_of, executor, flatten(*apart)[0], apart))
        return executor

    def _try(self, model: nn.Module, call: Call, planned: Callable[[], Any]) -> None:
        """One step by the plan against one plain step, bit for bit; a warning where that would be too dear."""
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
            step = functools.partial(run_step, plain, lambda: root(*call[0], **call[1]), offload=True)
            steps = PlainSteps(step(), step, model_device(plain))
            differs, _ = steps.judge(functools.partial(run_step, plain, planned))
        if differs is not None:
            raise PlanMismatch(
                f"planned {type(model).__name__}: a step of the captured graph, which was never run with data, is not the plain "
                f"step: {differs}; call solve() on the model as it is now, with its data"
            )

    def capture_again(self, model: nn.Module, call: Call) -> GraphCapture | ModuleCapture:
        """The capture of the plan, made on this model; refused if it comes out otherwise."""
        with bare(plain_copy(model)) as plain:  # this forward is within hooks of the root already
            return recaptured(self.plan, plain, cut_off(call))


def cut_off(call: Call) -> Call:
    """The call on copies of its tensors, without their history: a trial reverses nothing beyond the model."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copy = tensor.detach().clone()
            # An expanded one: ops may take another way for a dense tensor.
            if is_view(tensor) and copy.stride() != tensor.stride():
                copy = tensor.detach()
            made[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    return map_tensors(copied, call)


def _both_numbers(a: Any, b: Any) -> bool:
    """Whether both are numbers, and both are 0 or neither is: a probability of 0 is often another way through the code."""
    return type(a) in (int, float) and type(a) is type(b) and (a == 0) == (b == 0)


def in_words(value: Any) -> str:
    """A value of Python state, short enough for a message."""
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def forward_of(executor: GraphExecutor | ModuleExecutor, flat: list[Any], call: Call) -> Any:
    """One training forward by the plan."""
    if isinstance(executor, GraphExecutor):
        return executor.forward(flat)
    return executor.forward(*call)


def _hindrance(plan: Plan) -> str | None:
    """Why a plain step beside a planned one cannot be had for little; None if it can."""
    if is_distributed():
        return "a backward of its own would get in the way of torch.distributed"
    if plan.plain.peak > machine_bytes() / 2:
        return f"the plain step takes {format_bytes(plan.plain.peak)}, more than half of the host's memory"
    return None


def plain_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the plain model: what was put on the object, or that of the class that ``execute`` derived from."""
    own = vars(model).get("forward")
    if own is not None:
        return own(*args, **kwargs)
    original: Any = _original(model)
    return original.forward(model, *args, **kwargs)


def plain_copy(model: nn.Module) -> nn.Module:
    """The plain model behind a planned one: of its original class, sharing everything, its attributes too."""
    return sharing(model, _original(model))


def plans_within(model: Any) -> Any:
    """The plans that a planned model trains by; None of any other."""
    return getattr(model, "_rematplan_plans", None) if hasattr(type(model), "_rematplan_plain") else None


def wrappers(model: nn.Module) -> dict[str, Any]:
    """What was put around a planned model's methods since (accelerate wraps ``forward`` in autocast): it leads to the plan."""
    own: dict[str, Any] = model._rematplan_own  # type: ignore[assignment] # a slot of planned classes
    found = {"forward": own["forward"]} if wrapped_forward(model) is not None else {}
    bound = {n: v for n, v in vars(model).items() if isinstance(v, MethodType) and v.__self__ is model}
    return {**found, **bound}


def _original(model: nn.Module) -> Any:
    """The class that the planned model's class was derived from."""
    return type(model).__mro__[1]


def sharing(model: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Another object, of that class, that shares everything: what is set on one is set on both."""
    twin: nn.Module = object.__new__(cls)
    object.__setattr__(twin, "__dict__", vars(model))
    share_sharding(model, twin)
    return twin
