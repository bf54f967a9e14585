"""Train by a plan whose stages are whole modules, with the user's code between them left alone."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.executors.as_read import AsRead, Sampler
from rematplan.executors.compare_replay import ReplayCheck, ReplayError
from rematplan.executors.engine import Executor, Stages
from rematplan.executors.graph_stages import locate
from rematplan.executors.plain import plain_forward
from rematplan.executors.step import Step
from rematplan.executors.step_state import Handle
from rematplan.executors.trace import silent
from rematplan.scheduler.capture.blocks.block_capture import Block, BlockCapture
from rematplan.scheduler.capture.blocks.block_state import BlockState
from rematplan.scheduler.capture.blocks.calls import intercepted, is_compiled
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.environment import RunContext
from rematplan.scheduler.torch_layer.fsdp import gathered, holders, sharded_within
from rematplan.scheduler.torch_layer.layouts import storage_key
from rematplan.scheduler.torch_layer.leaves import flatten, repeats, tensor_leaves, unflatten
from rematplan.scheduler.torch_layer.nested_plans import inner_plans_left_out
from rematplan.scheduler.torch_layer.preserve import Draws
from rematplan.scheduler.torch_layer.private import version_of
from rematplan.scheduler.torch_layer.python_state import is_plain

__all__ = ["BlockExecutor"]

LOGGER = logging.getLogger("rematplan")


class _ModuleReads:
    """The parameters, buffers and state that a module, one block or several, reads.

    Attributes:
        names: of its parameters and buffers that it does not change.
        constant, sampler: (dict, key) of these, and a sampler of their values.
        state: the rest: attributes of its modules, and tensors that it changes.
        outer, inner: modules around it and within it that fully_shard has sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        module: nn.Module,
        changed: tuple[str, ...],
        overwritten: frozenset[str],
    ) -> None:
        # Those that fully_shard gathers deeper within a block exist only while their module runs.
        names = [
            n
            for n, _ in module.named_parameters()
            if f"{name}.{n}" not in changed
            and all(holder is module for holder in holders(module, n.rpartition(".")[0]))
        ]
        names += [n for n, _ in module.named_buffers() if f"{name}.{n}" not in changed]
        self.names = [f"{name}.{n}" for n in names]
        self.constant = [locate(model, n) for n in self.names]
        self.sampler = Sampler()
        self.state = BlockState(name, module, changed, overwritten)
        self.outer = holders(model, name)
        self.inner = [inner for inner in sharded_within(module) if inner is not module]

    def tensors(self) -> list[Tensor]:
        """Return the present parameters and buffers."""
        return [values[key] for values, key in self.constant]


class BlockExecutor(Executor):
    """Runs the steps of one model: its own forward, with its blocks intercepted."""

    def __init__(self, capture: BlockCapture, plan: Plan, model: nn.Module, check: str) -> None:
        super().__init__(capture, plan, check)
        self.plain = functools.partial(plain_forward, model)
        self.modules = {block.name: model.get_submodule(block.name) for block in capture.blocks}
        changed = {block.name: capture.effects[block.stage].changed for block in capture.blocks}
        self.own = {
            name: _ModuleReads(model, name, module, changed[name], capture.overwritten)
            for name, module in self.modules.items()
        }
        inner = itertools.chain.from_iterable(module.modules() for module in self.modules.values())
        self.compiled = any(map(is_compiled, inner))
        self.replays = any(self.program.kept[block.stage] is None for block in capture.blocks)
        self.reversing = frozenset(b.stage for b in capture.blocks if b.name in capture.reversing)
        self.told = False  # that a forward left out blocks
        # One step at a time may intercept the forward of these modules.
        self.lock = threading.Lock()

    def forward(self, flat: list[Any], call: Call) -> Any:  # noqa: ARG002
        """See ``Executor``."""
        args, kwargs = call
        if not self.replays and self.observe is None:
            return self.plain(*args, **kwargs)
        # Which blocks draw random numbers may depend on data: where there is data, each first run tells.
        stages = BlockStages(self)
        step = Step(stages)
        if not step.faked:
            step.random = [False] * len(self.capture)
        sweep = _Sweep(stages, step)
        step.tell("first", 0)
        intercepting = [(m, sweep.wrapper(name)) for name, m in self.modules.items()]
        with self.lock, intercepted(intercepting):
            output = self.plain(*args, **kwargs)
        sweep.crossing = {}
        step.state.sweep_is_over()
        left_out = len(self.capture.blocks) - sweep.count
        if left_out and not self.told:
            self.told = True
            text = "a forward left out %d of %d blocks of the plan; they cost nothing"
            LOGGER.info(text, left_out, len(self.capture.blocks))
        return output

    def following(self, index: int) -> tuple[tuple[int, int], ...]:
        """Return what crosses into the block after; see ``Block.boundary``."""
        blocks = self.capture.blocks
        return blocks[index + 1].boundary if index + 1 < len(blocks) else ()


class _Run:
    """The first run of a block that may run again.

    Attributes:
        forward: its plain forward.
        leaves, spec: of its arguments; None in the places of its boundary.
        places: (leaf, position in the boundary) of the arguments that are fed.
        repeats: (leaf, earlier leaf) of arguments that are one tensor.
        external: places of all other tensors.
        reads: parameters and unchanged buffers; external tensors and those of its state, as it found them.
        taken: the state that it found.
        given: that of generators and objects among the arguments, if any.
    """

    __slots__ = ("external", "forward", "given", "leaves", "places", "reads", "repeats", "spec", "taken")

    def __init__(
        self,
        forward: Any,
        leaves: list[Any],
        spec: Any,
        places: list[tuple[int, int]],
        own: _ModuleReads,
        sampled: bool,
    ) -> None:
        self.forward, self.leaves, self.spec, self.places = forward, leaves, spec, places
        self.repeats = repeats(leaves)
        for i, _ in places:
            leaves[i] = None
        self.external = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.taken = own.state.take()
        self.given = None
        if type(spec) is not tuple:  # not all of them are tensors and plain values
            objects = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and not is_plain(leaf)]
            if objects:
                self.given = BlockState("argument", objects).take()
        others = [leaves[i] for i in self.external]
        if self.taken.tensors or self.taken.contents:
            others += [tensor for _, tensor in self.taken.read()]
        sharded = own.outer or own.inner  # gathered parameters are others each time
        self.reads = (
            AsRead(own.tensors(), own.sampler if sampled and not sharded else None),
            AsRead(others, Sampler() if sampled and others else None),
        )

    def name_of(self, own: _ModuleReads, label: str, which: int, number: int) -> str:
        """Return what was read, in words."""
        if which == 0:
            return f"{own.names[number]} of block {label}"
        if number < len(self.external):
            return f"argument {self.external[number]} of block {label}"
        return f"{self.taken.read()[number - len(self.external)][0]} of block {label}"

    def note_gathered(self, own: _ModuleReads) -> None:
        """Replace the parameters of the first run by those that fully_shard has gathered now."""
        # Where its hooks run within what is intercepted, it had not gathered them when that began.
        then = dict(zip(map(id, self.reads[0].tensors), self.reads[0].versions, strict=True))
        now = AsRead(own.tensors())
        now.versions = [then.get(id(t), version_of(t)) for t in now.tensors]
        self.reads = now, self.reads[1]

    def is_as_then(self, own: _ModuleReads) -> bool:
        """Return whether a re-run finds its parameters and buffers as the first run did."""
        return bool(own.outer or own.inner) or all(map(operator.is_, own.tensors(), self.reads[0].tensors))


class _Sweep:
    """The first sweep of a step: the model's own forward, with its blocks intercepted.

    Attributes:
        ran: the block after the latest that ran.
        count: blocks that ran.
        crossing: (block, output leaf) -> (tensor, version) of what crosses into the next block.
    """

    def __init__(self, stages: BlockStages, step: Step) -> None:
        self.executor, self.stages, self.step = stages.executor, stages, step
        self.blocks = self.executor.capture.blocks
        self.ran = self.count = 0
        self.crossing: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def wrapper(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return the wrapper of a module's forward, which is one block or several."""

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def intercept(*args: Any, **kwargs: Any) -> Any:
                begin = self.ran
                ahead = range(begin, len(self.blocks))
                index = next((i for i in ahead if self.blocks[i].name == name), None)
                if index is None or not self.step.state.sweeping:
                    expected = self.blocks[begin].name if ahead else "no more"
                    raise ReplayError(
                        f"block {name} ran out of the order of the plan (at position {begin}, where that has {expected}); "
                        "make a plan for this call, or pass other blocks to solve(capture=...)"
                    )
                self.ran, self.count = index + 1, self.count + 1
                return self._first_run(begin, index, forward, args, kwargs)

            return intercept

        return wrap

    def _first_run(self, begin: int, index: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block; those from ``begin`` to it are left out."""
        block, step = self.blocks[index], self.step
        stage, following = block.stage, self.executor.following(index)
        leaves, spec = flatten(args, kwargs)
        if begin < index:
            self._pass_over(begin, index, leaves)
        places, boundary = self._boundary_into(index, block, leaves)
        self.crossing = {value: each for value, each in self.crossing.items() if value in following}
        if step.tell is not silent:
            makers = [maker for maker, _ in block.boundary] or [index - 1] * len(boundary)
            step.watch(
                stage - 1, [t for t, maker in zip(boundary, makers, strict=True) if maker == index - 1]
            )
        step.tell("first", stage)
        if step.program.kept[stage] is None:
            own = self.executor.own[block.name]
            run = _Run(forward, leaves, spec, places, own, step.comparison.sampled)
            result = self.stages.drop(step, stage, run, boundary, args, kwargs)
        else:
            result = forward(*args, **kwargs)
        outputs = tensor_leaves(result)
        for output, tensor in outputs:
            if (index, output) in following:
                self.crossing[index, output] = tensor, version_of(tensor)
        step.watch(stage, [t for _, t in outputs])
        step.tell("first", stage + 1)
        return result

    def _pass_over(self, begin: int, end: int, leaves: list[Any]) -> None:
        """Pass on, by identity, what would have entered blocks left out, to the one at ``end``."""
        blocks = self.blocks
        # The arguments of the block at the end show what the user's code would have passed to the first one.
        crossing: dict[tuple[int, int], Any] = dict(self.crossing)
        boundaries: dict[int, list[Any]] = {}
        for index in range(begin, end):
            block, following = blocks[index], blocks[index + 1]
            if block.fed and any(value not in crossing for value in block.boundary):
                return  # the check of what enters the block at the end refuses it
            if not block.fed:
                boundary: list[Any] = [object() for _ in following.boundary]
                positions = tuple(range(len(boundary)))
            else:
                boundary = [crossing[value] for value in block.boundary]
                fed = {
                    output: block.boundary.index((index - back, output))
                    for _, output, back in reversed(block.fed)
                }
                first = block.boundary.index((index - block.fed[0][2], block.fed[0][1]))
                positions = tuple(
                    fed.get(output, first) if made == index else block.boundary.index((made, output))
                    for made, output in following.boundary
                )
            boundaries[index], self.stages.passed[block.stage] = boundary, positions
            crossing.update(zip(following.boundary, [boundary[at] for at in positions], strict=True))
        known: dict[int, tuple[Tensor, int]] = {}
        for argument, output, back in blocks[end].fed:
            there = crossing.get((end - back, output))
            given = leaves[argument] if argument < len(leaves) else None
            if there is not None and not isinstance(there, tuple) and isinstance(given, Tensor):
                known[id(there)] = given, version_of(given)
        for index, boundary in boundaries.items():
            resolved = [known.get(id(each), each) for each in boundary]
            tensors = tuple([each[0] for each in resolved if isinstance(each, tuple)])
            stage = blocks[index].stage
            if self.step.program.kept[stage] is None:
                self.step.before_first_run(stage, tensors)
        found = {value: known.get(id(each), each) for value, each in crossing.items()}
        self.crossing = {value: each for value, each in found.items() if isinstance(each, tuple)}

    def _boundary_into(
        self, index: int, block: Block, leaves: list[Any]
    ) -> tuple[list[tuple[int, int]], tuple[Tensor, ...]]:
        """Return (leaf, position in the boundary) of what is fed into a block, and the boundary."""
        if not block.fed:
            tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            return [(i, at) for at, i in enumerate(tensors)], tuple([leaves[i] for i in tensors])
        crossing = {value: tensor for value, (tensor, _) in self.crossing.items()}
        places = []
        for argument, output, back in block.fed:
            value = index - back, output
            given = leaves[argument] if argument < len(leaves) else None
            if not isinstance(given, Tensor) or not _same_value(given, *self.crossing.get(value, (None, 0))):
                before = "the block before" if back == 1 else self.blocks[index - back].label
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


class BlockStages(Stages):
    """The blocks of one step of a BlockExecutor.

    Attributes:
        runs: stage -> its first run, while it may run again.
        contexts: stage -> the context of that, where the model's code has set one.
        passed: stage left out -> its next boundary, by positions in its own.
    """

    def __init__(self, executor: BlockExecutor) -> None:
        super().__init__(executor)
        self.runs: dict[int, _Run] = {}
        self.contexts: dict[int, RunContext] = {}
        self.passed: dict[int, tuple[int, ...]] = {}

    def drop(
        self, step: Step, stage: int, run: _Run, boundary: tuple[Tensor, ...], args: Any, kwargs: Any
    ) -> Any:
        """Run a block for the first time; drop its saved tensors."""
        self.runs[stage] = run
        step.lasting.add(run.reads[0].tensors)
        step.lasting.add([*run.reads[1].tensors, *(t for t, _ in run.taken.copies)], bound=False)
        step.before_first_run(stage, boundary)
        if not step.context.is_current():
            self.contexts[stage] = RunContext(step.device.type)
        before = None if step.faked else Draws(step.device)
        with _dropping_late(step, stage) if stage in self.executor.reversing else step.dropping(stage):
            result = run.forward(*args, **kwargs)
        if before is not None and (state := before.state()) is not None:
            step.state.generators[stage] = state
        return result

    def run(self, stage: int, boundary: tuple[Tensor, ...], comparison: ReplayCheck) -> tuple[Tensor, ...]:
        if stage in self.passed:
            return tuple([boundary[at] for at in self.passed[stage]])
        index = self.executor.capture.stages[stage]
        assert index is not None  # glue runs once: the referee refuses a schedule that re-runs it
        own = self.executor.own[self.executor.capture.blocks[index].name]
        if own.outer or own.inner:
            with gathered(own.outer, own.inner):  # parameters that fully_shard has sharded
                self.runs[stage].note_gathered(own)
                return self._run_block(stage, index, own, boundary, comparison)
        return self._run_block(stage, index, own, boundary, comparison)

    def _run_block(
        self,
        stage: int,
        index: int,
        own: _ModuleReads,
        boundary: tuple[Tensor, ...],
        comparison: ReplayCheck,
    ) -> tuple[Tensor, ...]:
        block, run = self.executor.capture.blocks[index], self.runs[stage]
        comparison.check_reads(stage, run.reads, functools.partial(run.name_of, own, block.label))
        leaves = run.leaves.copy()
        for i in run.external:
            leaves[i] = leaves[i].detach().requires_grad_(leaves[i].requires_grad)
        for place, position in run.places:
            leaves[place] = boundary[position]
        for i, earlier in run.repeats:
            leaves[i] = leaves[earlier]
        after = self.executor.following(index)
        crossing = {v: t for v, t in zip(block.boundary, boundary, strict=False) if v in after}
        del boundary
        args, kwargs = unflatten(leaves, run.spec)
        del leaves
        with (
            inner_plans_left_out(),
            own.state.as_of(run.taken),
            nullcontext() if run.given is None else own.state.as_of(run.given),
            nullcontext() if run.is_as_then(own) else _as_then(run, own),
            self.contexts[stage].restored() if stage in self.contexts else nullcontext(),
        ):
            result = run.forward(*args, **kwargs)
        del args, kwargs
        for output, tensor in tensor_leaves(result):
            crossing[index, output] = tensor
        return tuple([crossing[value] for value in after])

    def release(self, stage: int, rerunnable: Sequence[bool]) -> None:  # noqa: ARG002 # no value crosses several
        self.runs.pop(stage, None)

    def name(self, stage: int) -> str:
        index = self.executor.capture.stages[stage]
        return "code between blocks" if index is None else self.executor.capture.blocks[index].label

    def saved_name(self, stage: int, index: int) -> str:
        return f"saved tensor {index} of block {self.name(stage)}"


@contextmanager
def _dropping_late(step: Step, stage: int) -> Iterator[None]:
    """Drop what a first run saves once it is over: until then it may reverse what it has computed."""
    dropping = step.dropping(stage)
    live: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        packed = dropping.pack_hook(tensor)
        if type(packed) is Handle:
            live[packed.index] = tensor.detach()
        return packed

    def unpack(packed: Any) -> Tensor:
        if type(packed) is Handle and packed.index in live:
            return live[packed.index]
        return step.unpack(packed)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        live.clear()


def _same_value(tensor: Tensor, made: Tensor | None, version: int) -> bool:
    """Return whether a tensor is ``made``, unchanged, or a view of all of it (module hooks wrap in views)."""
    if made is None or version_of(tensor) != version:
        return False
    return tensor is made or (
        storage_key(tensor) == storage_key(made)
        and tensor.storage_offset() == made.storage_offset()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (made.shape, made.stride(), made.dtype)
    )


@contextmanager
def _as_then(run: _Run, own: _ModuleReads) -> Iterator[None]:
    """Restore the parameters and buffers that a block's first run read, where others replaced them since."""
    now = own.tensors()
    for (values, key), tensor in zip(own.constant, run.reads[0].tensors, strict=True):
        values[key] = tensor
    try:
        yield
    finally:
        for (values, key), tensor in zip(own.constant, now, strict=True):
            values[key] = tensor
