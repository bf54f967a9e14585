"""Make and price captures of op graphs: exported, and tried against a plain step."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.bit_equal_step import PlainSteps, step_result
from rematplan.scheduler.capture.blocks.calls import Recurrence, is_compiled
from rematplan.scheduler.capture.graph.compiled import CompiledCapture, compile_capture
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture, capture_graph, op_graphs
from rematplan.scheduler.capture.protocol import Asked, Producer
from rematplan.scheduler.capture.trial_step import HOST_DRAWS, UNTRIED, TrialStep
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.costs.graph_chain import graph_chain, measure_graph
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.roofline import roofline_graph
from rematplan.scheduler.costs.unreversed import held_by_user
from rematplan.scheduler.plan.plan import CaptureRecord
from rematplan.scheduler.torch_layer.call import canonical_call, forward_signature
from rematplan.scheduler.torch_layer.eager import own_attributes
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.preserve import model_device, preserved
from rematplan.scheduler.torch_layer.private import modes_disabled, replaced
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["CompiledProducer", "GraphProducer"]


class GraphProducer(Producer):
    """Makes and prices captures by ``torch.export``."""

    compares = True
    whole_first = False  # whether graphs with whole composite ops are tried before those in parts

    def unsuited(self, seen: Recurrence) -> str:
        """See ``Producer.unsuited``: a module called a hundred times in a row makes too large a graph."""
        return seen.unrolled()

    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[GraphCapture, str]:  # noqa: ARG002
        """See ``Producer.capture``."""
        step.progress("capturing the op graph")
        try:
            if step.host_draws:
                raise CaptureError(HOST_DRAWS)
            captured, how = _untried(step) if step.target is not None else _exact(step, self.whole_first)
        except CaptureError as error:
            if asked != "graph":
                raise
            other = "" if step.target is not None else " or pass a list of blocks"
            raise CaptureError(f"solve: capture='graph': {error}; try capture='modules'{other}") from error
        return captured, f"torch.export; {how}"

    def price(
        self, captured: GraphCapture, step: TrialStep, *, resident: int, clock: bool, options: bool
    ) -> Chain:
        """See ``Producer.price``."""
        model, own_loss = step.model, step.own_loss
        with preserved(model) as existing, met("the stages of the exported graph cannot be measured"):
            call = step.arrives
            costs = measure_graph(
                captured,
                model,
                call,
                existing=existing,
                loss_is_output=own_loss,
                clock=clock,
                options=options,
            )
        if not clock and captured.target is None:
            costs = roofline_graph(captured, costs, own_loss)
        return graph_chain(
            captured, model, costs, resident=resident, loss_is_output=own_loss, sparse=step.sparse
        )

    def asked_again(self, record: CaptureRecord, model: nn.Module, asked: str) -> str:  # noqa: ARG002
        """See ``Producer.asked_again``: a graph that cannot be exported again gives way to blocks."""
        return asked

    def activations(
        self,
        captured: GraphCapture,
        chain: Chain,  # noqa: ARG002
        named: Callable[[str], str],
    ) -> dict[str, int]:
        """See ``Producer.activations``."""
        graph, found = captured.graph, Counter[str]()
        kept = {key for op in graph.ops for key in op.saved}
        kept |= held_by_user(graph)
        for key in kept:
            group = graph.groups[key]
            if group.producer >= 0:
                stack = graph.ops[group.producer].node.meta.get("nn_module_stack") or {}
                path = list(stack.values())[-1][0] if stack else ""
                found[named(path)] += allocated(group.bytes, captured.place)
        return dict(found.most_common())


class CompiledProducer(GraphProducer):
    """Makes and prices captures whose stages Inductor compiles.

    It takes composite ops apart itself, into others than an eager step runs.
    """

    whole_first = True

    def capture(self, step: TrialStep, asked: Asked, refused: str) -> tuple[CompiledCapture, str]:
        """See ``Producer.capture``."""
        model = step.model
        try:
            eager, how = super().capture(step, asked, refused)
        except CaptureError as error:
            raise CaptureError(
                f"solve: backend='inductor' compiles stages of the op graph, and there is none: {error}; leave backend out, or "
                "compile the blocks yourself (block.compile()) and pass capture=[blocks]"
            ) from error
        with preserved(model), met("the stages cannot be compiled"):
            found = compile_capture(eager, model, step.arrives, step.progress)
        trial = functools.partial(_planned_call, found, model, *step.call)
        step_result(model, trial, offload=True, call=step.call)
        with preserved(model):
            found.observe(model, step.arrives)
        return found, f"{how}; its stages compiled by Inductor"

    def asked_again(self, record: CaptureRecord, model: nn.Module, asked: str) -> str:  # noqa: ARG002
        """See ``Producer.asked_again``."""
        return record.kind if asked == "auto" else asked


def _untried(step: TrialStep) -> tuple[GraphCapture, str]:
    """Return the op graph of a model without data."""
    model = step.model
    _refuse_custom(step)
    with modes_disabled():
        graph = next(op_graphs(model, step.call))
    captured = capture_graph(graph, model)
    captured.target = step.target
    captured.observe(model, step.call)
    return captured, UNTRIED


def _exact(step: TrialStep, whole_first: bool) -> tuple[GraphCapture, str]:
    """Return the op graph, once it trains like the plain model in a trial, and how.

    Raises:
        CaptureError: it cannot be captured, or one step of it differs.
    """
    model, call, (args, kwargs) = step.model, step.arrives, step.call
    assert step.plain is not None
    if sharded_within(model):
        raise CaptureError("fully_shard's hooks gather its parameters, and an exported graph has no hooks")
    compiled = next((name for name, module in model.named_modules() if is_compiled(module)), None)
    if compiled is not None:
        raise CaptureError(f"submodule {compiled!r} is compiled, and an exported graph runs op by op")
    _refuse_custom(step)
    run = functools.partial(step_result, model, offload=True, call=step.call)
    plain = functools.partial(model, *args, **kwargs)
    steps = PlainSteps(step.plain, functools.partial(run, plain), model_device(model))
    refused: CaptureError | None = None
    for graph in op_graphs(model, call, whole_first=whole_first):
        try:
            with met("the exported graph cannot be run stage by stage"):
                captured = capture_graph(graph, model)
                planned = functools.partial(_planned_call, captured, model, args, kwargs)
                trial = functools.partial(run, planned)
                captured.uncached = torch.is_autocast_enabled(captured.device.type)
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
        return captured, f"{how}{_once(captured)}"
    raise CaptureError(f"{refused}{steps.hint()}") from refused


def _refuse_custom(step: TrialStep) -> None:
    if step.custom:
        raise CaptureError(
            f"the custom autograd.Function {step.custom[0]} is used, whose backward torch.export drops"
        )


def _planned_call(
    captured: GraphCapture, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return the planned model's output: its graph stands for its forward, within hooks and ``__call__``."""
    signature = forward_signature(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return captured.trial(model, canonical_call(signature, args, kwargs))

    with replaced(own_attributes(model), forward=forward):
        return model(*args, **kwargs)


def _once(captured: GraphCapture) -> str:
    """Return which stages run once, and why, in words."""
    each = zip(captured.stages, captured.effects, strict=True)
    once = {stage.name: effects.once for stage, effects in each if effects.once}
    names, reasons = [*once], [*once.values()]
    if not names:
        return ""
    listed = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return f"; {listed} {'run' if len(names) > 1 else 'runs'} once: {reasons[0]}"
