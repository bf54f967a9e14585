"""Train by a plan whose stages are whole modules, with the user's code between them left alone."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from executors.graph import locate
from executors.replay import ReplayError, Step
from executors.trace import Observer
from scheduler.capture.flat import flatten, tensor_leaves, unflatten
from scheduler.capture.layouts import storage_key
from scheduler.capture.module_calls import intercepted, is_compiled
from scheduler.capture.module_capture import Block, ModuleCapture
from scheduler.capture.sharded import gathered, holders, sharded_within
from scheduler.capture.state import AutocastState, Draws, autocast_contexts, autocast_state
from scheduler.program import ReplayProgram

__all__ = ["ModuleExecutor"]


class _Own:
    """What a module that is one block or several reads of the model, and where that lies.

    Attributes:
        constant: (dict, key) of its parameters, and of its buffers that it does not change.
        changed: of its other buffers.
        outer, inner: modules around it and within it that fully_shard has sharded.
    """

    def __init__(self, model: nn.Module, name: str, module: nn.Module, changed: tuple[str, ...]) -> None:
        # Those that fully_shard gathers deeper within a block are there only while their module runs.
        names = [
            n
            for n, _ in module.named_parameters()
            if all(holder is module for holder in holders(module, n.rpartition(".")[0]))
        ]
        names += [n for n, _ in module.named_buffers() if f"{name}.{n}" not in changed]
        self.constant = [locate(model, f"{name}.{n}") for n in names]
        self.changed = [locate(model, n) for n in changed]
        self.outer = holders(model, name)
        self.inner = [inner for inner in sharded_within(module) if inner is not module]


class ModuleExecutor:
    """Runs steps of one model by one program; made once per execute().

    Args:
        capture: the blocks.
        program: the replay program, for as many stages as the capture has.
        model: whose submodules are run.
        plain: the plain forward.
        observe: is told where each step is.
        check: what a replayed tensor is compared by; a key of ``executors.check.CHECKS``.
    """

    def __init__(
        self,
        capture: ModuleCapture,
        program: ReplayProgram,
        model: nn.Module,
        plain: Callable[..., Any],
        observe: Observer | None = None,
        check: str = "metadata",
    ) -> None:
        self.capture = capture
        self.check = check
        self.program = program
        self.device = capture.device
        self.observe = observe
        self.ran_out = False  # whether a replay of a step ran out of memory
        self.plain = plain
        self.modules = {block.name: model.get_submodule(block.name) for block in capture.blocks}
        changed = {block.name: capture.changed[block.stage] for block in capture.blocks}
        self.own = {name: _Own(model, name, module, changed[name]) for name, module in self.modules.items()}
        self.compiled = any(
            is_compiled(inner) for module in self.modules.values() for inner in module.modules()
        )
        self.replays = any(program.kept[block.stage] is None for block in capture.blocks)
        # forward is intercepted while a step runs: one step at a time may do that to these modules.
        self.lock = threading.Lock()

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own forward with the blocks intercepted; gives its output."""
        if not self.replays and self.observe is None:
            return self.plain(*args, **kwargs)
        step = ModuleStep(self)
        if self.observe is not None:
            self.observe("first", 0)
        with self.lock, intercepted([(m, step.wrapper(name)) for name, m in self.modules.items()]):
            output = self.plain(*args, **kwargs)
        if step.ran != len(self.capture.blocks):
            raise ReplayError(
                f"the plan was made for {len(self.capture.blocks)} blocks, of which this forward ran {step.ran}; the model "
                "took another path, so make a plan for this call"
            )
        step.finish()
        return output


class _Run:
    """The first run of a block that may run again.

    Attributes:
        forward: its plain forward.
        leaves: of its arguments; None in the places of its boundary.
        spec: how they are put together.
        places: (leaf, position in the boundary) of the arguments that are fed.
        external: places of all other tensors.
        read: the parameters and steady buffers, then the external tensors, that it read.
        versions: of these, as it began.
        buffers: copies of those that it changes.
    """

    __slots__ = ("buffers", "external", "forward", "leaves", "places", "read", "spec", "versions")

    def __init__(
        self,
        forward: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        places: list[tuple[int, int]],
        own: _Own,
    ) -> None:
        self.forward, self.leaves, self.spec, self.places = forward, leaves, spec, places
        for i, _ in places:
            leaves[i] = None
        self.external = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.read = [values[key] for values, key in own.constant] + [leaves[i] for i in self.external]
        self.versions = [tensor._version for tensor in self.read]
        self.buffers = [values[key].clone() for values, key in own.changed]

    def has_changed(self, own: _Own) -> bool:
        """Whether one of the tensors that a re-run reads was changed in place since."""
        if own.outer or own.inner:
            # Where fully_shard's hooks are inside of what is intercepted, the parameters were not gathered yet when the
            # first run began: others than the re-run finds.
            then = dict(zip(map(id, self.read), self.versions, strict=True))
            now = [values[key] for values, key in own.constant] + self.read[len(own.constant) :]
            return any(then.get(id(tensor), tensor._version) != tensor._version for tensor in now)
        return self.versions != [tensor._version for tensor in self.read]

    def is_as_then(self, own: _Own) -> bool:
        """Whether a re-run finds its parameters and buffers as the first run did."""
        if self.buffers:
            return False
        if own.outer or own.inner:  # gathered parameters are others each time
            return True
        return all(map(operator.is_, [values[key] for values, key in own.constant], self.read))


class ModuleStep(Step):
    """One step of a ModuleExecutor."""

    def __init__(self, executor: ModuleExecutor) -> None:
        capture = executor.capture
        # Which blocks draw random numbers may depend on data, so that it is seen at each run, where there is data.
        super().__init__(executor.program, executor.device, capture.random, executor.observe, executor.check)
        if not self.faked:
            self.random = [False] * len(capture)
        self.executor = executor
        self.compiled = executor.compiled
        self.ran = 0
        # (block, output leaf) -> (tensor, version): what crosses into the next block, while that is awaited
        self.crossing: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.runs: dict[int, _Run] = {}
        # Where it is not that of the step: the model's code sets it.
        self.autocasts: dict[int, AutocastState] = {}

    def finish(self) -> None:
        """The forward is over."""
        self.crossing = {}
        self.sweep_is_over()

    def wrapper(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """How the module of that name, one block or several, is intercepted."""
        blocks = self.executor.capture.blocks

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def intercept(*args: Any, **kwargs: Any) -> Any:
                index = self.ran
                expected = blocks[index].name if index < len(blocks) else "no more"
                if expected != name or not self.sweeping:
                    raise ReplayError(
                        f"block {name} ran out of the order of the plan (at position {index}, where that has {expected}); "
                        "make a plan for this call, or pass other blocks to solve(capture=...)"
                    )
                self.ran += 1
                return self._first_run(index, forward, args, kwargs)

            return intercept

        return wrap

    def _first_run(self, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        block = self.executor.capture.blocks[index]
        stage, following = block.stage, self._following(index)
        leaves, spec = flatten(args, kwargs)
        places, boundary = self._boundary_into(index, block, leaves)
        self.crossing = {value: each for value, each in self.crossing.items() if value in following}
        if self.observe is not None:
            values = block.boundary or [(index - 1, 0)] * len(boundary)
            made = [t for (maker, _), t in zip(values, boundary, strict=True) if maker == index - 1]
            self.watch(stage - 1, made)
            self.observe("first", stage)
        if self.program.kept[stage] is None:
            own = self.executor.own[block.name]
            self.last([values[key] for values, key in own.changed])
            run = _Run(forward, leaves, spec, places, own)
            result = self._drop(stage, run, boundary, args, kwargs)
        else:
            result = forward(*args, **kwargs)
        outputs = tensor_leaves(result)
        for output, tensor in outputs:
            if (index, output) in following:
                self.crossing[index, output] = tensor, tensor._version
        if self.observe is not None:
            self.watch(stage, [t for _, t in outputs])
            self.observe("first", stage + 1)
        return result

    def _following(self, index: int) -> tuple[tuple[int, int], ...]:
        """What crosses into the block after; see ``Block.boundary``."""
        blocks = self.executor.capture.blocks
        return blocks[index + 1].boundary if index + 1 < len(blocks) else ()

    def _boundary_into(
        self, index: int, block: Block, leaves: list[Any]
    ) -> tuple[list[tuple[int, int]], tuple[Tensor, ...]]:
        """The boundary into a block, checked against the plan: (leaf, position in it) of what is fed, and its tensors."""
        if not block.fed:
            tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            return [(i, at) for at, i in enumerate(tensors)], tuple([leaves[i] for i in tensors])
        crossing = {value: tensor for value, (tensor, _) in self.crossing.items()}
        places = []
        for argument, output, back in block.fed:
            value = index - back, output
            given = leaves[argument] if argument < len(leaves) else None
            if not isinstance(given, Tensor) or not _same_value(given, *self.crossing.get(value, (None, 0))):
                before = "the block before" if back == 1 else self.executor.capture.blocks[index - back].label
                raise ReplayError(
                    f"argument {argument} of block {block.label} is not output {output} of {before}, as it "
                    "was when the plan was made; make a plan for this call"
                )
            crossing[value] = given
            places.append((argument, block.boundary.index(value)))
        if any(value not in crossing for value in block.boundary):
            raise ReplayError(
                f"what passes by block {block.label} is not what passed when the plan was made; make a plan for this call"
            )
        return places, tuple([crossing[value] for value in block.boundary])

    def _drop(self, stage: int, run: _Run, boundary: tuple[Tensor, ...], args: Any, kwargs: Any) -> Any:
        """The first run of a block whose saved tensors are dropped."""
        self.runs[stage] = run
        self.last(run.read)
        self.before_first_run(stage, boundary)
        if (autocast := autocast_state(self.device)) != self.autocast:
            self.autocasts[stage] = autocast
        draws = None if self.faked else Draws(self.device)
        with self.dropping(stage):
            result = run.forward(*args, **kwargs)
        if draws is not None:
            state = draws.state()
            if state is not None:
                self.states[stage] = state
        return result

    def run_stage(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Re-run a block; see Step. Parameters that fully_shard has sharded are gathered for it."""
        index = self.executor.capture.stages[stage]
        assert index is not None  # glue runs once: the referee refuses a schedule that re-runs it
        own = self.executor.own[self.executor.capture.blocks[index].name]
        if own.outer or own.inner:
            with gathered(own.outer, own.inner):
                return self._run_block(stage, index, boundary)
        return self._run_block(stage, index, boundary)

    def _run_block(self, stage: int, index: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Re-run a block."""
        block, run = self.executor.capture.blocks[index], self.runs[stage]
        own = self.executor.own[block.name]
        if run.has_changed(own):
            raise RuntimeError(
                f"a parameter, buffer or argument of block {block.label} has been modified by an inplace "
                "operation between forward and backward, so that the block cannot be replayed; step the optimizer "
                "after backward"
            )
        leaves = run.leaves.copy()
        for i in run.external:
            leaves[i] = leaves[i].detach().requires_grad_(leaves[i].requires_grad)
        for place, position in run.places:
            leaves[place] = boundary[position]
        after = self._following(index)
        passing = zip(block.boundary, boundary, strict=False)
        there = {value: tensor for value, tensor in passing if value in after}
        del boundary
        args, kwargs = unflatten(leaves, run.spec)
        del leaves
        if stage not in self.autocasts and run.is_as_then(own):
            result = run.forward(*args, **kwargs)
        else:
            with ExitStack() as contexts:
                contexts.enter_context(_as_then(run, own))
                for context in autocast_contexts(self.autocasts.get(stage, ())):
                    contexts.enter_context(context)
                result = run.forward(*args, **kwargs)
        del args, kwargs
        for output, tensor in tensor_leaves(result):
            there[index, output] = tensor
        return tuple([there[value] for value in after])

    def ran_out(self) -> None:
        """See Step."""
        self.executor.ran_out = True

    def name_of(self, stage: int) -> str:
        """See Step."""
        index = self.executor.capture.stages[stage]
        return "code between blocks" if index is None else self.executor.capture.blocks[index].label

    def saved_tensor(self, stage: int, index: int) -> str:
        """See Step."""
        return f"saved tensor {index} of block {self.name_of(stage)}"

    def release_inputs(self, stage: int) -> None:
        """Drop the arguments that only re-runs of this stage still needed."""
        self.runs.pop(stage, None)


def _same_value(tensor: Tensor, made: Tensor | None, version: int) -> bool:
    """Whether a tensor is what was made, unchanged, or a view of just that: hooks of modules wrap in views."""
    if made is None or tensor._version != version:
        return False
    return tensor is made or (
        storage_key(tensor) == storage_key(made)
        and tensor.storage_offset() == made.storage_offset()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (made.shape, made.stride(), made.dtype)
    )


@contextmanager
def _as_then(run: _Run, own: _Own) -> Iterator[None]:
    """Within it, buffers that a run changes have the values of before the first run; all else that it reads is what it was.

    Others may have taken the places of parameters and buffers meanwhile (functional_call).
    """
    buffers = [values[key] for values, key in own.changed]
    current = [buffer.clone() for buffer in buffers]
    places = [] if own.outer or own.inner else own.constant
    now = [values[key] for values, key in places]
    for buffer, value in zip(buffers, run.buffers, strict=True):
        buffer.data.copy_(value)  # .data: the version that autograd saw stays
    for (values, key), tensor in zip(places, run.read, strict=False):
        values[key] = tensor
    try:
        yield
    finally:
        for (values, key), tensor in zip(places, now, strict=True):
            values[key] = tensor
        for buffer, value in zip(buffers, current, strict=True):
            buffer.data.copy_(value)
