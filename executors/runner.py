"""One plan at work: its capture, the executor that follows it, and what it was made for."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from executors.graph import GraphExecutor
from executors.guard import Guard
from executors.modules import ModuleExecutor
from executors.recapture import check_names, recaptured
from scheduler.budget import format_bytes, machine_bytes
from scheduler.capture.eager import wrapped_forward
from scheduler.capture.graph_capture import GraphCapture
from scheduler.capture.module_capture import ModuleCapture
from scheduler.capture.sample import Call, CallSignature
from scheduler.capture.sharded import is_distributed, sharded_within, share_sharding
from scheduler.capture.verify import difference, run_step
from scheduler.errors import PlanMismatch
from scheduler.plan import Plan

__all__ = ["RUNNER", "Runner", "forward_of", "plain_copy", "plain_forward", "shallow", "wrappers"]

RUNNER = "_rematplan"  # where a planned model keeps its plans


class Runner:
    """Runs training forwards of one planned model by one plan.

    A capture made in this process is used as it is; for a plan that was loaded, or a model other than the
    one it was made with, the model is captured again at the first forward, on the inputs given there, and
    must come out the same. A plan that was made without data is then tried against a plain step.

    Attributes:
        want: the signature of the calls that the plan is for.
        watching: whether the next step is to be the first that is measured.
        ran_out: whether the last step ran out of memory, so that the next one is to follow a tighter plan.
    """

    def __init__(self, plan: Plan, model: nn.Module, source: nn.Module, watching: bool, check: str) -> None:
        check_names(plan, model)
        self.plan = plan
        self.want = CallSignature(plan.capture.structure, plan.capture.leaves)
        self.watching = watching
        self.check = check
        self.ran_out = False
        self.guard = Guard(model, frozenset(plan.capture.evaluating))
        self.sharded = len(sharded_within(model))
        self.executor: GraphExecutor | ModuleExecutor | None = None
        # Shallow copies of one model share these dicts, so that a capture of one is a capture of the other.
        live = plan.live[0] if plan.live is not None else None
        if live is not None and live._modules is source._modules and live._parameters is source._parameters:
            self.executor = self.executor_for(plan.live[1], model)

    def executor_for(
        self, capture: GraphCapture | ModuleCapture, model: nn.Module
    ) -> GraphExecutor | ModuleExecutor:
        """What runs the plan on this capture."""
        if isinstance(capture, GraphCapture):
            return GraphExecutor(capture, self.plan.program, model, check=self.check)
        plain = functools.partial(plain_forward, model)
        return ModuleExecutor(capture, self.plan.program, model, plain, check=self.check)

    def follow(self, plan: Plan, model: nn.Module) -> None:
        """Follow another plan of the same capture from the next forward on."""
        self.plan, self.ran_out = plan, False
        if self.executor is not None:
            self.executor = self.executor_for(self.executor.capture, model)

    def prepare(self, model: nn.Module, call: Call, flat: list[Any]) -> GraphExecutor | ModuleExecutor:
        """The executor, once the model is found to be in the plan's modes and captured."""
        # Nothing is sharded where torch.distributed is not initialised: every forward is spared the search.
        if is_distributed() and len(sharded_within(model)) != self.sharded:
            raise PlanMismatch(
                f"planned {type(model).__name__}: fully_shard was called after execute(); call it first, then solve() and "
                "execute() on the sharded model"
            )
        self.guard.check(model, fires_hooks=self.plan.capture.kind == "modules")
        if self.executor is None:
            executor = self.executor_for(self.capture_again(model, call), model)
            if self.plan.capture.target:  # made without data: nothing of it was tried
                self._try(model, call, functools.partial(forward_of, executor, flat, call))
            self.executor = executor
        return self.executor

    def _try(self, model: nn.Module, call: Call, planned: Callable[[], Any]) -> None:
        """One step by the plan against one plain step, bit for bit; a warning where that would be too dear."""
        hindrance = _hindrance(self.plan)
        if hindrance:
            warnings.warn(
                f"planned {type(model).__name__}: the plan was made without data, and it is not tried now whether it "
                f"trains bit for bit like the plain model: {hindrance}",
                stacklevel=6,
            )
            return
        plain = plain_copy(model)
        want = run_step(plain, lambda: plain(*call[0], **call[1]), offload=True)
        differs = difference(want, run_step(model, planned))
        if differs is not None:
            raise PlanMismatch(
                f"planned {type(model).__name__}: the plan was made without data, and a step of it is not the plain "
                f"step: {differs}; call solve() on the model with its data, without device="
            )

    def capture_again(self, model: nn.Module, call: Call) -> GraphCapture | ModuleCapture:
        """The capture of the plan, made on this model; refused if it comes out otherwise."""
        return recaptured(self.plan, plain_copy(model), call)


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
    """The forward of the class that ``execute`` derived from."""
    original: Any = _original(model)
    return original.forward(model, *args, **kwargs)


def plain_copy(model: nn.Module) -> nn.Module:
    """The same model, sharing everything, of its original class."""
    plain = shallow(model)
    plain.__class__ = _original(model)
    for name in (RUNNER, "_compiled_call_impl", *wrappers(model)):
        plain.__dict__.pop(name, None)
    return plain


def wrappers(model: nn.Module) -> dict[str, Any]:
    """What was put around a planned model's methods since (accelerate wraps ``forward`` in autocast): it leads to the plan."""
    return {
        name: value
        for name, value in model.__dict__.items()
        if (name == "forward" and wrapped_forward(model) is not None)
        or (isinstance(value, MethodType) and value.__self__ is model)
    }


def _original(model: nn.Module) -> Any:
    """The class that the planned model's class was derived from."""
    return type(model).__mro__[1]


def shallow(model: nn.Module) -> nn.Module:
    """Another object that shares everything."""
    twin: nn.Module = object.__new__(model.__class__)
    twin.__dict__.update(model.__dict__)
    share_sharding(model, twin)
    return twin
