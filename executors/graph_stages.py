"""Train by a plan whose stages are slices of an exported op graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from rematplan.executors.as_read import AsRead, Sampler
from rematplan.executors.compare_replay import Comparison
from rematplan.executors.engine import Executor, Stages
from rematplan.executors.host_arena import Arena
from rematplan.executors.step import Step
from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.recompute import Rebuild, compile_rebuilds, origin_of_pack
from rematplan.scheduler.capture.graph.stages import GraphStage, Source
from rematplan.scheduler.core.referee import Keep
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.leaves import tree_unflatten
from rematplan.scheduler.torch_layer.preserve import uncached

__all__ = ["GraphExecutor", "locate"]


class GraphExecutor(Executor):
    """Runs the steps of one model, whose parameters and buffers are read at every step."""

    def __init__(self, capture: GraphCapture, plan: Plan, model: nn.Module, check: str) -> None:
        super().__init__(capture, plan, check)
        program = self.program
        self.arena = Arena(plan.timeline.host_peak, capture.device) if program.copies else None
        self.stages, self.constants = capture.stages, capture.constants
        # Parameters and buffers are looked up by (dict, key), so that replaced ones are seen.
        self.lookups = [
            [
                (i, *locate(model, s.key))
                for i, s in enumerate(stage.sources)
                if s.kind in ("parameter", "buffer")
            ]
            for stage in self.stages
        ]
        self.changed = [
            [i for i, s in enumerate(stage.sources) if s.kind == "buffer" and s.key in changed]
            for stage, changed in zip(self.stages, capture.changed, strict=True)
        ]
        # Of the tensors looked up, those that nobody may change between forward and backward.
        self.constant = [
            [j for j, (i, _, _) in enumerate(lookups) if i not in changed]
            for lookups, changed in zip(self.lookups, self.changed, strict=True)
        ]
        self.samplers = [Sampler() for _ in self.stages]
        self.readers: dict[str, list[int]] = {}
        for k, stage in enumerate(self.stages):
            for source in stage.sources:
                if source.kind == "carried" and program.kept[k] != 0:
                    self.readers.setdefault(source.key, []).append(k)
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
        self.carried_by = [
            tuple(dict.fromkeys(s.key for s in stage.sources if s.kind == "carried")) for stage in self.stages
        ]
        self.given = [
            [(i, s.key) for i, s in enumerate(stage.sources) if s.kind == "input"] for stage in self.stages
        ]
        self.gather = [_gathering(stage) for stage in self.stages]
        self.follow = [_following(stage) for stage in self.stages]
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
                    own = [values[key] for _, values, key in self.lookups[k]]
                    results = stage.function(
                        *self.gather[k](own, boundary, carried, flat_inputs, self.constants)
                    )
                else:
                    results = stages.first_run(step, k, boundary, carried)
                boundary = self.follow[k](results, boundary)
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
        return tree_unflatten(output, self.capture.output_spec)

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


def _gathering(stage: GraphStage) -> Callable[..., list[Any]]:
    """Return a function that gathers the stage's arguments.

    From its parameters and buffers, the boundary, carried values, the flat inputs of the call, and constants.
    """
    own = itertools.count()
    where = {"boundary": "boundary", "carried": "carried", "input": "inputs", "constant": "constants"}
    terms = [
        f"own[{next(own)}]" if s.kind in ("parameter", "buffer") else f"{where[s.kind]}[{s.key!r}]"
        for s in stage.sources
    ]
    gathering: Callable[..., list[Any]] = eval(  # of indices and of names as literals
        f"lambda own, boundary, carried, inputs, constants: [{', '.join(terms)}]", {}
    )
    return gathering


def _following(stage: GraphStage) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a function from a stage's results and boundary, a part of which passes, to the next boundary."""
    terms = [f"results[{i}]" if i >= 0 else f"boundary[{-1 - i}]" for i in stage.boundary_from]
    following: Callable[..., tuple[Tensor, ...]] = eval(  # of indices
        f"lambda results, boundary: ({''.join(term + ', ' for term in terms)})", {}
    )
    return following


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
        executor = self.executor
        option, function, copies = (
            executor.program.kept[k],
            executor.stages[k].function,
            executor.program.copies,
        )
        step.tell("first", k)
        if option != 0:
            step.before_first_run(k, boundary)
        own: list[Tensor] = [values[key] for _, values, key in executor.lookups[k]]
        arguments = executor.gather[k](own, boundary, carried, self.inputs, executor.constants)
        if option != 0 or copies:
            # Views of parameters are packed by reference too: they share the storage.
            step.lasting.add(own)
        if option != 0:
            self._note_reads(k, own, arguments, step.comparison.sampled)
        if option == 0 and not copies:
            return function(*arguments)
        parts = executor.rebuilds[k, option] if option else None if option is None else ()
        with step.dropping(k, parts):
            return function(*arguments)

    def _note_reads(self, k: int, own: list[Tensor], arguments: list[Any], sampled: bool) -> None:
        executor = self.executor
        self.parameters[k] = own
        if executor.changed[k]:
            self.snapshots[k] = [arguments[i].clone() for i in executor.changed[k]]
        given = [self.inputs[key] for _, key in executor.given[k]]
        self.first_reads[k] = (
            AsRead([own[j] for j in executor.constant[k]], executor.samplers[k] if sampled else None),
            AsRead([t for t in given if isinstance(t, Tensor)], Sampler() if sampled else None),
        )

    def run(self, stage: int, boundary: tuple[Tensor, ...], comparison: Comparison) -> tuple[Tensor, ...]:
        results = self.executor.stages[stage].function(*self.arguments(stage, boundary, comparison))
        return self.executor.follow[stage](results, boundary)

    def rebuilds(self, stage: int, option: int) -> tuple[Rebuild, ...]:
        return self.executor.rebuilds[stage, option]

    def arguments(
        self, stage: int, boundary: tuple[Tensor, ...], comparison: Comparison, rebuild: Rebuild | None = None
    ) -> list[Any]:
        executor = self.executor

        def name_of(which: int, number: int) -> str:
            constant = [executor.lookups[stage][j][0] for j in executor.constant[stage]]
            given = [i for i, key in executor.given[stage] if isinstance(self.inputs[key], Tensor)]
            position = (constant, given)[which][number]
            source = executor.stages[stage].sources[position]
            return f"{source.kind} {source.key}" if rebuild is None or position in rebuild.arguments else ""

        comparison.check_reads(stage, self.first_reads[stage], name_of)
        carried: dict[str, Tensor] = {}
        for name in executor.carried_by[stage]:
            tensor, flag = self.carried[name]
            carried[name] = tensor.detach().requires_grad_(flag)
        arguments = executor.gather[stage](
            self.parameters[stage], boundary, carried, self.inputs, executor.constants
        )
        for position, snapshot in zip(executor.changed[stage], self.snapshots.get(stage, ()), strict=True):
            arguments[position] = snapshot.clone()
        return arguments

    def release(self, stage: int, rerunnable: Sequence[bool]) -> None:
        self.snapshots.pop(stage, None)
        for name in self.executor.carried_by[stage]:
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
