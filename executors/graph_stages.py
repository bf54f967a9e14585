"""Train by a plan whose stages are slices of an exported op graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rematplan.executors.as_read import AsRead, Sampler
from rematplan.executors.compare_replay import ReplayCheck
from rematplan.executors.engine import Executor, Stages
from rematplan.executors.host_arena import Arena
from rematplan.executors.step import Step
from rematplan.scheduler.capture.graph.compiled import CompiledCapture
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.recompute import Rebuild, compile_rebuilds, origin_of_pack
from rematplan.scheduler.capture.graph.stages import GraphStage, Source
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.schedule import Keep
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.leaves import tree_unflatten
from rematplan.scheduler.torch_layer.preserve import uncached

__all__ = ["CompiledExecutor", "GraphExecutor", "locate"]


class GraphExecutor(Executor):
    """Runs the steps of one model, whose parameters and buffers are read at every step."""

    def __init__(self, capture: GraphCapture, plan: Plan, model: nn.Module, check: str) -> None:
        super().__init__(capture, plan, check)
        program = self.program
        self.arena = Arena(plan.timeline.host_peak, capture.device) if program.copies else None
        self.stages, self.constants = capture.stages, capture.constants
        self.reads = [_Reads(model, each, capture.changing(k)) for k, each in enumerate(self.stages)]
        self.readers: dict[str, list[int]] = {}  # of carried values, which run again
        for k, reads in enumerate(self.reads):
            for name in reads.carried if program.kept[k] != 0 else ():
                self.readers.setdefault(name, []).append(k)
        self.returned = {
            leaf.key: locate(model, leaf.key)
            for leaf in capture.outputs
            if isinstance(leaf, Source) and leaf.kind in ("parameter", "buffer")
        }
        used = {(k, option) for k, option in enumerate(program.kept) if option}
        used |= {(a.stage, a.option) for a in program.replay if isinstance(a, Keep) and a.option}
        self.rebuilds = {
            (k, option): compile_rebuilds(
                capture.graph, capture.linear, k, self.stages[k].argument_names, capture.dropped[k][option]
            )
            for k, option in used
        }
        # Nothing is run again, so that a step needs no Step.
        self.keeps_all = not any(program.kept) and None not in program.kept and not program.copies

    def forward(self, flat: list[Any], call: Call) -> Any:  # noqa: ARG002
        """Run the first sweep in grad mode; return the model's output."""
        flat_inputs = self.capture.graph.flat(flat) if self.capture.graph.face.state else flat
        step = stages = None
        if not self.keeps_all or self.observe is not None:
            stages = GraphStages(self, flat_inputs)
            step = Step(stages)
            # Boundary 0 is empty (the inputs are read where they are needed), so holding it costs nothing.
            step.state.hold(0, ())
            step.lasting.add([t for t in flat_inputs if isinstance(t, Tensor)])
            step.lasting.add(list(self.constants.values()))
        carried: dict[str, Tensor] = {}
        boundary: tuple[Tensor, ...] = ()
        with uncached() if self.capture.uncached else nullcontext():
            for k, stage in enumerate(self.stages):
                if step is None or stages is None:
                    own = [values[key] for _, values, key in self.reads[k].lookups]
                    results = stage.function(
                        *self.reads[k].gather(own, boundary, carried, flat_inputs, self.constants)
                    )
                else:
                    results = stages.first_run(step, k, boundary, carried)
                boundary = self.reads[k].follow(results, boundary)
                for name, index in zip(stage.carried, stage.carried_from, strict=True):
                    carried[name] = results[index]
                    if step is not None and stages is not None:
                        step.lasting.add((results[index],))
                        stages.carry(name, results[index])
                if step is not None:
                    step.watch(k, results)
                    step.after_first_run(k, results, boundary)
                del results
        output = [self._output(leaf, flat_inputs, carried) for leaf in self.capture.outputs]
        if step is not None:
            step.state.sweep_is_over()
        return tree_unflatten(output, self.capture.graph.output_spec)

    def _output(self, leaf: Any, flat_inputs: list[Any], carried: dict[str, Tensor]) -> Any:
        if not isinstance(leaf, Source):
            return leaf
        if leaf.kind == "carried":
            return carried[leaf.key]
        if leaf.kind == "input":
            return flat_inputs[leaf.key]
        if leaf.kind == "constant":
            return self.constants[leaf.key]
        values, key = self.returned[leaf.key]
        return values[key]


class CompiledExecutor(GraphExecutor):
    """Runs compiled stages, each by the variant that the plan keeps it with, of which all is kept."""

    def __init__(self, capture: CompiledCapture, plan: Plan, model: nn.Module, check: str) -> None:
        options = [plan.option(k) for k in range(len(capture))]
        stages = [
            replace(stage, function=chosen[option].function)
            for stage, chosen, option in zip(capture.stages, capture.chosen, options, strict=True)
        ]
        super().__init__(replace(capture, stages=stages), plan, model, check)

    def program_of(self, plan: Plan) -> ReplayProgram:
        """See ``Executor.program_of``: a variant is kept whole or not at all."""
        return plan.program.without_options()


class _Reads:
    """The sources of a stage's arguments.

    Attributes:
        lookups: (argument, dict, key) of parameters and buffers, so that replaced ones are seen.
        changed: arguments that are buffers which it changes.
        constant: numbers of lookups that nobody may change between forward and backward.
        sampler: of these.
        carried: names of carried values.
        given: (argument, leaf) of what is an input of the call.
        gather: (parameters and buffers, boundary, carried values, inputs, constants) -> its arguments.
        follow: (results, boundary) -> the next boundary.
    """

    __slots__ = ("carried", "changed", "constant", "follow", "gather", "given", "lookups", "sampler")

    def __init__(self, model: nn.Module, stage: GraphStage, changed: list[int]) -> None:
        sources = list(enumerate(stage.sources))
        self.lookups = [(i, *locate(model, s.key)) for i, s in sources if s.kind in ("parameter", "buffer")]
        self.changed = changed
        self.constant = [j for j, (i, _, _) in enumerate(self.lookups) if i not in changed]
        self.sampler = Sampler()
        self.carried = tuple(dict.fromkeys(s.key for _, s in sources if s.kind == "carried"))
        self.given = [(i, s.key) for i, s in sources if s.kind == "input"]
        self.gather = _gathering(stage)
        self.follow = _following(stage)


def _gathering(stage: GraphStage) -> Callable[..., list[Any]]:
    own = itertools.count()
    where = {"boundary": "boundary", "carried": "carried", "input": "inputs", "constant": "constants"}
    terms = [
        f"own[{next(own)}]" if s.kind in ("parameter", "buffer") else f"{where[s.kind]}[{s.key!r}]"
        for s in stage.sources
    ]
    code = f"lambda own, boundary, carried, inputs, constants: [{', '.join(terms)}]"
    return eval(code, {})  # of indices and of names as literals


def _following(stage: GraphStage) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    terms = [f"results[{i}]" if i >= 0 else f"boundary[{-1 - i}]" for i in stage.boundary_from]
    code = f"lambda results, boundary: ({''.join(term + ', ' for term in terms)})"
    return eval(code, {})  # of indices


class GraphStages(Stages):
    """The stages of one step of a GraphExecutor."""

    def __init__(self, executor: GraphExecutor, flat_inputs: list[Any]) -> None:
        super().__init__(executor)
        self.inputs = flat_inputs
        self.carried: dict[str, tuple[Tensor, bool]] = {}  # detached, and whether it requires grad
        # stage -> what its first run read and nobody may change: parameters and buffers; inputs
        self.first_reads: dict[int, tuple[AsRead, AsRead]] = {}
        self.parameters: dict[int, list[Tensor]] = {}
        self.snapshots: dict[int, list[Tensor]] = {}  # of the buffers that the stage changes

    def carry(self, name: str, tensor: Tensor) -> None:
        """Hold a carried value for the stages that read it when they run again."""
        if name in self.executor.readers:
            self.carried[name] = tensor.detach(), tensor.requires_grad

    def first_run(
        self, step: Step, k: int, boundary: tuple[Tensor, ...], carried: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the results of the first run of stage k."""
        executor, program = self.executor, self.executor.program
        option, copies, function = program.kept[k], program.copies, executor.stages[k].function
        reads = executor.reads[k]
        step.tell("first", k)
        if option != 0:
            step.before_first_run(k, boundary)
        own: list[Tensor] = [values[key] for _, values, key in reads.lookups]
        arguments = reads.gather(own, boundary, carried, self.inputs, executor.constants)
        if option != 0 or copies:
            # Views of parameters are packed by reference too: they share the storage.
            step.lasting.add(own)
        if option != 0:
            self._note_reads(k, reads, own, arguments, step.comparison.sampled)
        if option == 0 and not copies:
            return function(*arguments)
        parts = executor.rebuilds[k, option] if option else None if option is None else ()
        with step.dropping(k, parts):
            return function(*arguments)

    def _note_reads(
        self, k: int, reads: _Reads, own: list[Tensor], arguments: list[Any], sampled: bool
    ) -> None:
        self.parameters[k] = own
        if reads.changed:
            self.snapshots[k] = [arguments[i].clone() for i in reads.changed]
        given = [self.inputs[key] for _, key in reads.given]
        self.first_reads[k] = (
            AsRead([own[j] for j in reads.constant], reads.sampler if sampled else None),
            AsRead([t for t in given if isinstance(t, Tensor)], Sampler() if sampled else None),
        )

    def run(self, stage: int, boundary: tuple[Tensor, ...], comparison: ReplayCheck) -> tuple[Tensor, ...]:
        results = self.executor.stages[stage].function(*self.arguments(stage, boundary, comparison))
        return self.executor.reads[stage].follow(results, boundary)

    def rebuilds(self, stage: int, option: int) -> tuple[Rebuild, ...]:
        return self.executor.rebuilds[stage, option]

    def arguments(
        self,
        stage: int,
        boundary: tuple[Tensor, ...],
        comparison: ReplayCheck,
        rebuild: Rebuild | None = None,
    ) -> list[Any]:
        executor, reads = self.executor, self.executor.reads[stage]

        def name_of(which: int, number: int) -> str:
            constant = [reads.lookups[j][0] for j in reads.constant]
            given = [i for i, key in reads.given if isinstance(self.inputs[key], Tensor)]
            position = (constant, given)[which][number]
            source = executor.stages[stage].sources[position]
            return f"{source.kind} {source.key}" if rebuild is None or position in rebuild.arguments else ""

        comparison.check_reads(stage, self.first_reads[stage], name_of)
        carried: dict[str, Tensor] = {}
        for name in reads.carried:
            tensor, flag = self.carried[name]
            carried[name] = tensor.detach().requires_grad_(flag)
        own = self.parameters[stage]
        arguments = reads.gather(own, boundary, carried, self.inputs, executor.constants)
        for position, snapshot in zip(reads.changed, self.snapshots.get(stage, ()), strict=True):
            arguments[position] = snapshot.clone()
        return arguments

    def release(self, stage: int, rerunnable: Sequence[bool]) -> None:
        self.snapshots.pop(stage, None)
        for name in self.executor.reads[stage].carried:
            if name in self.carried and not any(rerunnable[k] for k in self.executor.readers[name]):
                del self.carried[name]

    def name(self, stage: int) -> str:
        return self.executor.stages[stage].name

    def saved_name(self, stage: int, index: int) -> str:
        capture = self.executor.capture
        return f"saved tensor {index}{origin_of_pack(capture.graph, capture.linear, stage, index)}"


def locate(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dict and key that hold a parameter or buffer."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    values = owner._parameters if key in owner._parameters else owner._buffers
    return values, key
