"""A model captured as a chain of op-graph stages, ready to be priced and to be run."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.graph.cut import Linear, linearize
from rematplan.scheduler.capture.graph.decompose import in_parts
from rematplan.scheduler.capture.graph.export import export_graph
from rematplan.scheduler.capture.graph.inner_gradients import noted_gradients, traced_graph
from rematplan.scheduler.capture.graph.op_graph import Op, OpGraph, arguments_of, resolve
from rematplan.scheduler.capture.graph.recompute import op_rows
from rematplan.scheduler.capture.graph.stages import GraphStage, Source, compile_stages
from rematplan.scheduler.capture.protocol import Capture, StageEffects
from rematplan.scheduler.capture.repeat import ELSEWHERE, ValuesBefore, unlike
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.eager import as_eager
from rematplan.scheduler.torch_layer.fake import OpWatch
from rematplan.scheduler.torch_layer.leaves import tree_leaves, tree_unflatten
from rematplan.scheduler.torch_layer.preserve import RandomState, model_device, on_gradient, uncached
from rematplan.scheduler.torch_layer.private import detect_fake_mode, schema_of
from rematplan.scheduler.torch_layer.python_state import MISSING
from rematplan.scheduler.torch_layer.target import Target
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["GraphCapture", "capture_graph", "draws_elsewhere_in", "op_graphs"]

RECURRENT = ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::_cudnn_rnn")


@dataclass(slots=True)
class GraphCapture(Capture):
    """An op graph, its stages, and what a trial run showed of them.

    Attributes:
        outputs: flattened outputs: where each comes from, or a plain value.
        constants: tensors that the export lifted out of the model's code.
        dropped: (L,) for each option of the stage, the packs (``recompute.py``) that it does not keep.
        rerun: (L,) for each option of the stage, the ops that run again, by their places in it.
        uncached: whether stages run without autocast's cache, in which the casts of all weights would stay
            until the forward is over. The gradient of a weight that is cast twice is then summed otherwise,
            so that it is to be tried.
        layouts: of values that cross a cut, strides of their gradients in the trial step where they are a
            permutation, () where not; None if no gradient arrived. Empty without a trial.
        gaps: (L,) share by which the seconds of an option may exceed the least for its bytes; 0 if proven.
    """

    graph: OpGraph
    linear: Linear
    stages: list[GraphStage]
    outputs: list[Any]
    constants: dict[str, Tensor]
    device: torch.device
    effects: list[StageEffects] = field(default_factory=list)
    dropped: list[tuple[frozenset[int], ...]] = field(default_factory=list)
    rerun: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    uncached: bool = False
    layouts: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    target: Target | None = None

    kind = "graph"

    def __len__(self) -> int:
        return len(self.stages)

    def arguments(
        self,
        k: int,
        model: nn.Module,
        flat: list[Any],
        boundary: tuple[Tensor, ...],
        carried: Mapping[str, Tensor],
    ) -> list[Any]:
        """Return the arguments of stage k, parameters and buffers as the model holds them now."""
        places = {"boundary": boundary, "carried": carried, "input": flat, "constant": self.constants}
        return [_value_at(source, model, places) for source in self.stages[k].sources]

    def sweep(
        self,
        model: nn.Module,
        call: Call,
        visit: Callable[[int, list[Any]], None] | None = None,
        after: Callable[[int, tuple[Tensor, ...]], None] | None = None,
    ) -> Any:
        """Run all stages in order, in the grad mode of the caller; gives the model's output.

        Args:
            visit: called with (stage, arguments) before each stage runs; may replace it.
            after: called with (stage, results) when it has run.
        """
        flat = self.graph.flat(tree_leaves(call))
        boundary: tuple[Tensor, ...] = ()
        carried: dict[str, Tensor] = {}
        for k, stage in enumerate(self.stages):
            arguments = self.arguments(k, model, flat, boundary, carried)
            if visit is not None:
                visit(k, arguments)
            with uncached() if self.uncached else nullcontext():
                results = self.stages[k].function(*arguments)
            if after is not None:
                after(k, results)
            del arguments
            boundary = tuple(results[i] if i >= 0 else boundary[-1 - i] for i in stage.boundary_from)
            for name, index in zip(stage.carried, stage.carried_from, strict=True):
                carried[name] = results[index]
            del results
        places = {"carried": carried, "input": flat, "constant": self.constants}
        output = [
            _value_at(leaf, model, places) if isinstance(leaf, Source) else leaf for leaf in self.outputs
        ]
        return tree_unflatten(output, self.graph.output_spec)

    def trial(self, model: nn.Module, call: Call) -> Any:
        """Run a sweep in grad mode; the backward that follows notes layouts of gradients across cuts."""

        def visit(k: int, arguments: list[Any]) -> None:
            stage = self.stages[k]
            for name, source, argument in zip(stage.argument_names, stage.sources, arguments, strict=True):
                if source.kind in ("boundary", "carried") and argument.requires_grad:
                    self.layouts.setdefault(name, None)
                    on_gradient(argument, functools.partial(self._arrived, name))

        return self.sweep(model, call, visit)

    def _arrived(self, name: str, grad: Tensor) -> None:
        order = sorted(range(grad.ndim), key=grad.stride, reverse=True)
        permuted = not grad.is_contiguous() and grad.permute(order).is_contiguous()
        self.layouts[name] = grad.stride() if permuted else ()

    def result_layouts(self, k: int) -> tuple[dict[int, tuple[int, ...]], frozenset[int]]:
        """Return strides of gradients of stage k's results, if not contiguous; the results without one."""
        stage = self.stages[k]
        names = (*stage.boundary, *stage.carried)
        places = zip(names, (*stage.boundary_from, *stage.carried_from), strict=True)
        found = {i: self.layouts[name] for name, i in places if i >= 0 and name in self.layouts}
        return {i: s for i, s in found.items() if s}, frozenset(i for i, s in found.items() if s is None)

    def saves(self, k: int) -> set[int]:
        """Return the storages that autograd saves of stage k."""
        first, last = self.linear.cuts[k : k + 2]
        return {key for op in self.graph.ops[first:last] for key in op.saved}

    def own_output(self, stage: GraphStage, results: tuple[Tensor, ...]) -> Any:
        """Return the part of the model's output that ``stage`` makes, None in the place of the rest."""
        made = {name: results[i] for name, i in zip(stage.carried, stage.carried_from, strict=True)}
        leaves = [made.get(leaf.key) if isinstance(leaf, Source) else leaf for leaf in self.outputs]
        return tree_unflatten(leaves, self.graph.output_spec)

    def record(self) -> dict[str, Any]:
        """See ``Capture.record``."""
        return {
            "graph": self.graph.fingerprint(),
            "cuts": self.linear.cuts[1:-1],
            "dropped": tuple(tuple(tuple(sorted(packs)) for packs in options) for options in self.dropped),
            "rerun": tuple(self.rerun),
            "gaps": tuple(self.gaps),
            "uncached": self.uncached,
            "begins": self.linear.reasons,
            "left_out": tuple(self.linear.left_out.items()),
            "ops": tuple(op_rows(self.graph, self.linear, k, int) for k in range(len(self))),
        }

    def without_data(self, device: torch.device, fake: Callable[[Any], Any]) -> GraphCapture:
        """See ``Capture.without_data``."""
        return replace(self, device=device, constants=fake(self.constants))

    @property
    def unread(self) -> Collection[int]:
        """Leaves of the call, other than tensors, that the traced forward did not read."""
        return self.graph.face.unread

    def holds(self, repeated: tuple[tuple[int, int], ...]) -> bool:
        """Whether the Python state that was traced is unchanged, and the same tensors of the call are one."""
        face = self.graph.face
        return face.repeats == repeated and face.guards.holds()

    def changes(self) -> str:
        """Return which Python state has changed, in words."""
        found = self.graph.face.guards.changes()
        if not found:
            return "other arguments are one and the same tensor"
        shown = [f"{path} is {_shown(now)} instead of {_shown(then)}" for path, then, now in found[:3]]
        return ", ".join(shown) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    def constant_tensors(self) -> Collection[Tensor]:
        """See ``Capture.constant_tensors``."""
        return self.constants.values()

    def observe(self, model: nn.Module, call: Call) -> list[bool]:
        """Set ``effects``: run the stages without grad, then each twice with.

        A stage that may draw by its ops' tags is among those that do: whether it does may depend on the data.
        Without data, tags and schemas are all there is. The caller restores the model's state.

        Returns:
            (L,) whether the stage drew in this run.

        Raises:
            CaptureError: a stage reads a buffer that another one changes.
        """
        drew: list[bool] = []
        changed: list[tuple[str, ...]] = []
        before: list[tuple[RandomState, ValuesBefore]] = []
        watch = OpWatch()
        dry = self.target is not None or detect_fake_mode() is not None

        def visit(k: int, arguments: list[Any]) -> None:
            sources = zip(self.stages[k].sources, arguments, strict=True)
            buffers = ValuesBefore(((s.key, each) for s, each in sources if s.kind == "buffer"), data=not dry)
            before[:] = [(RandomState(self.device), buffers)]
            watch.restart()

        def after(_: int, __: tuple[Tensor, ...]) -> None:
            random, buffers = before.pop()
            drew.append(watch.random if dry else random.differs())
            changed.append(tuple(buffers.changed(watch)))

        with torch.no_grad(), watch if dry else nullcontext():
            self.sweep(model, call, visit, after)
        by_any = {name for names in changed for name in names}
        for stage, own in zip(self.stages, changed, strict=True):
            for source in stage.sources:
                if source.kind == "buffer" and source.key in by_any and source.key not in own:
                    raise CaptureError(
                        f"buffer {source.key!r} is changed by one stage and read by another ({stage.name}), which "
                        "could not be replayed on what it was"
                    )
        elsewhere = self.place.type == "cuda" and any(map(draws_elsewhere_in, self.graph.ops))
        random = drew if dry else [*map(operator.or_, drew, self.may_draw())]
        once = [ELSEWHERE if elsewhere and draws else "" for draws in random]
        self.effects = [*map(StageEffects, random, changed, once)]
        if not dry:
            self._run_again(model, call)
        return drew

    def _run_again(self, model: nn.Module, call: Call) -> None:
        """Run each stage twice, the second time within a backward; note those that give other bits then."""
        before: list[tuple[Callable[[], list[Tensor]], RandomState]] = []

        def visit(k: int, arguments: list[Any]) -> None:
            function, changed = self.stages[k].function, self.changing(k)
            fresh = {i: arguments[i].clone() for i in changed}

            def again() -> list[Tensor]:
                given = [fresh[i].clone() if i in fresh else a for i, a in enumerate(arguments)]
                return list(function(*given))

            before[:] = [(again, RandomState(self.device))]

        def after(k: int, results: tuple[Tensor, ...]) -> None:
            again, random = before.pop()
            if not self.effects[k].once:
                moved = RandomState(self.device)
                self.effects[k] = replace(self.effects[k], once=unlike(results, again, random))
                moved.restore()

        # In grad mode, by which ops choose their kernels; nothing is saved.
        saves_nothing = torch.autograd.graph.saved_tensors_hooks(_discard, _discard)
        with torch.enable_grad(), uncached(), saves_nothing:
            self.sweep(model, call, visit, after)

    def changing(self, k: int) -> list[int]:
        """Return the arguments of stage k that are buffers which it changes."""
        sources, changed = self.stages[k].sources, self.effects[k].changed
        return [i for i, s in enumerate(sources) if s.kind == "buffer" and s.key in changed]

    def may_draw(self) -> list[bool]:
        """Return (L,) whether the stage has an op that may draw random numbers."""
        return [any(op.random for op in self.graph.ops[a:b]) for a, b in pairwise(self.linear.cuts)]


def _value_at(source: Source, model: nn.Module, places: Mapping[str, Any]) -> Any:
    """Return the value at a source; ``places`` has those that are not the model's, by kind."""
    if source.kind in ("parameter", "buffer"):
        return resolve(model, source.key)
    return places[source.kind][source.key]


def draws_elsewhere_in(op: Op) -> bool:
    """Whether an op's dropout on a GPU has random state outside of the generator: cuDNN's, in an RNN.

    It goes on from call to call, and begins with a new seed once somebody has set the generator.
    """
    schema = schema_of(op.node.target)
    if schema is None or schema.name not in RECURRENT:
        return False
    given = arguments_of(op.node)
    return bool(given.get("train")) and given.get("dropout") not in (0, 0.0, None)


def _shown(value: Any) -> str:
    """Return a value of Python state, short enough for a message."""
    text = "nothing" if value is MISSING else repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _discard(_: Any) -> Any:
    return None


def op_graphs(model: nn.Module, call: Call, *, whole_first: bool = False) -> Iterator[OpGraph]:
    """Return the op graphs that the model exports as, the one that can be planned best first.

    Whether one trains like the model is to be tried; the next one is for when it does not. First comes what a
    plain step runs (``eager.py``), then what the model's code does for exporters; each with composite ops in
    their parts (``decompose.py``), then with whole ones. No graph comes twice. A forward that takes gradients
    itself is traced (``inner_gradients.py``).

    Args:
        whole_first: whether graphs with whole composite ops come before those in parts.

    Raises:
        CaptureError: the model cannot be exported at all; says why.
    """
    seen: set[str] = set()
    refused: CaptureError | None = None
    gradients: list[str] = []
    for eager in (True, False):
        try:
            with as_eager(model) if eager else nullcontext(), noted_gradients() as gradients:
                whole = export_graph(model, call)
        except CaptureError as error:
            refused = error
            continue
        parts = (lambda graph: _in_parts(graph, call)), (lambda graph: graph)
        for part in reversed(parts) if whole_first else parts:
            graph = part(whole)
            known = graph.fingerprint()
            if known not in seen:
                seen.add(known)
                yield graph
    if gradients:  # of which an export knows nothing
        yield traced_graph(model, call)
    elif refused is not None and not seen:
        raise refused


def _in_parts(whole: OpGraph, call: Call) -> OpGraph:
    """Return the graph with composite ops in their parts; as it is where these cannot be traced."""
    try:
        with met("its composite ops cannot be taken apart"):
            return in_parts(whole, call)
    except CaptureError:
        return whole


def capture_graph(
    graph: OpGraph, model: nn.Module, *, max_stages: int = 100, cuts: tuple[int, ...] | None = None
) -> GraphCapture:
    """Cut an op graph of the model into stages; nothing is run.

    Args:
        cuts: inner cuts of an earlier capture of the same graph, to repeat it.

    Raises:
        CaptureError: the graph cannot be cut; says why.
    """
    linear = linearize(graph, max_stages, cuts)
    stages, outputs = compile_stages(graph, linear, model)
    return GraphCapture(graph, linear, stages, outputs, graph.constants(model), model_device(model))
