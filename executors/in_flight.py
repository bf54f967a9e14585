"""Warn of steps of one planned model that overlap or are reversed twice, which exceed what its plan counts.

A plan is for one forward and one backward, which releases what the forward saved. More bytes are live where a
second forward runs before the backward of an earlier one, or where a backward retains the graph. A hook
before the backward of the outputs notices, at some 2 µs a forward: it dies with the graph, and is called when
the graph is reversed. If the bytes exceed the budget, a PeakWarning says so, once of each kind.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.executors.compare_replay import ReplayError
from rematplan.scheduler.core.budget import format_bytes
from rematplan.scheduler.core.errors import PeakWarning
from rematplan.scheduler.core.schedule import Backward, Checkpoint, Keep
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.preserve import in_backward
from rematplan.scheduler.torch_layer.private import keeps_graph, parametrizations_are_cached, version_of

__all__ = ["InFlight", "later_peak", "waiting_bytes"]

_STEP_FUNCTION = (
    "plan the whole step: solve(step_function, budget, sample=batch) takes a function that makes all these calls and returns "
    "the loss"
)


class _CastMark:
    """Tells whether autocast's cache still holds what it held after a forward: its context is still active.

    A cast that is taken from the cache has the graph node of the one that put it there.
    """

    def __init__(self, device: torch.device) -> None:
        self.weight = torch.ones(1, 1, device=device, requires_grad=True)
        self.node: Any = None
        self.versions = 0

    def put(self, weights: Iterable[Tensor]) -> None:
        """Put a cast into the cache, beside those of the weights."""
        self.node = self._cast()
        self.versions = _versions(weights)

    def changed(self, weights: Iterable[Tensor]) -> bool:
        """Return whether the weights have changed since ``put``."""
        return _versions(weights) != self.versions

    def stays(self) -> bool:
        """Return whether the cast is still cached; afterwards it is."""
        before, self.node = self.node, self._cast()
        return before is not None and self.node is before

    def _cast(self) -> Any:
        with torch.enable_grad():
            return torch.mm(self.weight.detach(), self.weight).grad_fn.next_functions[1][0]  # type: ignore[union-attr] # of a product


class _Graph:
    """Hook on the outputs of one forward; it lives as long as they do, or anything computed from them.

    Attributes:
        reversed: whether a backward has begun that releases what the forward saved.
    """

    __slots__ = ("__weakref__", "plan", "reversed", "steps")

    def __init__(self, steps: InFlight, plan: Plan) -> None:
        self.steps, self.plan, self.reversed = steps, plan, False

    def __call__(self, _: Any) -> None:
        if keeps_graph():
            self.steps.retained(self.plan)
        else:
            self.reversed = True


class InFlight:
    """Notices when the steps of one planned model overlap.

    Args:
        name: of the model, for warnings.
        device: that holds it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.mark: _CastMark | None = None
        self.said: set[str] = set()
        self.graphs: list[weakref.ref[_Graph]] = []  # not reversed yet, when last looked at
        self._waiting: dict[int, tuple[Plan, int]] = {}

    def shares_casts(self, model: nn.Module) -> bool:
        """Return whether a forward that begins now shares casts with earlier ones, in the plain model.

        Raises:
            ReplayError: of those casts some are not those of the weights any more.
        """
        if self.mark is None or not self._caches() or in_backward() or not self.mark.stays():
            return False
        if self.mark.changed(model.parameters()):
            raise ReplayError(
                f"planned {self.name}: weights have changed within the torch.autocast in which an earlier forward ran. The plain "
                "model would go on with the casts of the old ones, which autocast keeps until its context ends, and a plan does "
                "not; leave torch.autocast before optimizer.step()"
            )
        return bool(self._earlier())

    def plainly(self, model: nn.Module, forward: Callable[[], Any], plan: Plan) -> Any:
        """Run a plain forward in grad mode (in eval mode, say); it may share casts with planned ones."""
        if not self._caches():
            return forward()
        if self.shares_casts(model) and any(each.capture.uncached for each in self._earlier()):
            self._refuse_shared_casts()
        output = forward()
        self.gave(model, plan, output)
        return output

    def begins(self, plan: Plan, shares_casts: bool = False) -> None:
        """Note that a forward by this plan is about to run.

        Args:
            shares_casts: what the method of this name returned before the plan was looked for.

        Raises:
            ReplayError: the plain model casts each weight once for this forward and those in flight, whose
                gradients it sums before casting them back; these plans do not.

        Warns:
            PeakWarning: with the forwards in flight it will not fit the budget.
        """
        earlier = self._earlier()
        emptied = shares_casts and self.mark is not None and not self.mark.stays()  # by what was planned
        if shares_casts and (emptied or any(each.capture.uncached for each in (plan, *earlier))):
            self._refuse_shared_casts()
        if earlier and parametrizations_are_cached():
            raise ReplayError(
                f"planned {self.name}: another forward runs within torch.nn.utils.parametrize.cached() while an earlier one waits "
                "for its backward. The plain model computes each parametrized weight once for both, which a plan for one forward "
                "does not. Leave cached() out, or call backward on each loss before the next forward"
            )
        if earlier and "forward" not in self.said:
            self._overlap(plan, earlier)

    def _refuse_shared_casts(self) -> None:
        raise ReplayError(
            f"planned {self.name}: another forward runs within the same torch.autocast while an earlier one waits for its "
            "backward. There the plain model casts each weight once, and sums its gradients in the lower precision, which "
            "a plan for one forward does not. Enter torch.autocast for each forward anew, or call backward on each loss "
            f"before the next forward; or {_STEP_FUNCTION}"
        )

    def _earlier(self) -> list[Plan]:
        """Return the plans of the forwards in flight."""
        if not self.graphs or in_backward():
            return []
        alive = [(ref, graph) for ref in self.graphs if (graph := ref()) is not None and not graph.reversed]
        self.graphs = [ref for ref, _ in alive]
        return [graph.plan for _, graph in alive]

    def _caches(self) -> bool:
        """Return whether autocast caches casts of weights now."""
        return torch.is_autocast_enabled(self.device.type) and torch.is_autocast_cache_enabled()

    def gave(self, model: nn.Module, plan: Plan, output: Any) -> None:
        """Note that a forward by this plan has returned ``output``."""
        if in_backward():
            return
        graph = None
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                graph = graph or _Graph(self, plan)
                tensor.grad_fn.register_prehook(graph)
        if graph is not None:
            self.graphs.append(weakref.ref(graph))
            if self._caches():
                self.mark = self.mark or _CastMark(self.device)
                self.mark.put(model.parameters())

    def _overlap(self, plan: Plan, earlier: list[Plan]) -> None:
        waiting = sum(map(self._waiting_of, earlier))
        # The last backward finds the gradients of those before it.
        later = (later_peak(each, retained=False) + waiting - self._waiting_of(each) for each in earlier)
        peak = max(plan.predicted_peak + waiting, *later)
        if peak <= plan.memory_budget:
            return
        one = len(earlier) == 1
        self._warn(
            "forward",
            f"another forward runs while {'an earlier one waits' if one else f'{len(earlier)} earlier ones wait'} for "
            f"{'its' if one else 'their'} backward; {'it holds' if one else 'they hold'} {format_bytes(waiting)}",
            peak,
            plan,
            "call backward on each loss before the next forward",
            level=8,
        )

    def retained(self, plan: Plan) -> None:
        """Note that a backward begins that keeps the graph.

        Warns:
            PeakWarning: with what it keeps, the step exceeds the budget.
        """
        if torch.is_grad_enabled():
            least = 2 * plan.plain.peak - plan.chain.fixed
            if "twice" not in self.said and least > plan.memory_budget:
                self._warn(
                    "twice",
                    "a backward makes a graph of its own (create_graph=True), which holds every tensor that a plan would "
                    "recompute, and its own saved tensors",
                    least,
                    plan,
                    "take the inner gradient of fewer layers",
                    about="at least ",
                )
            return
        peak = later_peak(plan, retained=True)
        if "retained" not in self.said and peak > plan.memory_budget:
            self._warn(
                "retained",
                "a backward retains the graph (retain_graph=True), so that nothing of the forward is released by it",
                peak,
                plan,
                "add up the losses and call backward once",
            )

    def _waiting_of(self, plan: Plan) -> int:
        if id(plan) not in self._waiting:
            self._waiting[id(plan)] = plan, waiting_bytes(plan)
        return self._waiting[id(plan)][1]

    def _warn(
        self, kind: str, what: str, peak: int, plan: Plan, instead: str, about: str = "about ", level: int = 7
    ) -> None:
        self.said.add(kind)
        over = format_bytes(peak - plan.memory_budget)
        warnings.warn(
            f"planned {self.name}: {what}. The plan is for one forward and one backward at a time: expect a peak of {about}"
            f"{format_bytes(peak)}, {over} over the budget of {format_bytes(plan.memory_budget)}. {_STEP_FUNCTION}; or "
            f"{instead}; or solve() for a budget that is lower by {over}",
            PeakWarning,
            stacklevel=level,
        )


def _versions(weights: Iterable[Tensor]) -> int:
    return sum(version_of(weight) for weight in weights if weight.requires_grad)


def waiting_bytes(plan: Plan) -> int:
    """Return the bytes of activations that a step holds between its forward and its backward."""
    chain = plan.chain
    swept = len(plan.schedule) - len(plan.program.replay)
    state = sum(stage.rerun_state for stage in chain.stages)
    return max(0, plan.timeline.live[swept - 1] - chain.fixed + state - chain.output_grad)


def later_peak(plan: Plan, *, retained: bool) -> int:
    """Return a bound on the peak (bytes) of a step whose backward finds the gradients of all parameters.

    Args:
        retained: whether an earlier backward of the same forward has retained the graph: every boundary that
            it held is live, too, and what was kept of a stage is not released when that is reversed.
    """
    stages, kept = plan.chain.stages, plan.program.kept
    holding: frozenset[int] = frozenset()
    if retained:
        holding = plan.program.held | {a.stage for a in plan.schedule if isinstance(a, Checkpoint)}
    waiting = set(holding)  # boundaries that the plan does not count at present
    missing = sum(stage.grad for stage in stages)
    stays = peak = 0
    for action, during in zip(plan.schedule, plan.timeline.during, strict=True):
        if isinstance(action, (Checkpoint, Keep)):
            waiting.discard(action.stage)
        peak = max(peak, during + missing + stays + sum(stages[i].input for i in waiting))
        if isinstance(action, Backward):
            stage, option = stages[action.stage], kept[action.stage]
            missing -= stage.grad
            if retained:
                stays += stage.rerun_state + (0 if option is None else max(0, stage.options[option].saved))
            waiting |= {action.stage} & holding
    return peak
