"""Train by a plan whose stages are whole modules, with the user's code between them left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from executors.graph import locate
from executors.replay import ReplayError, Step
from executors.trace import Observer
from scheduler.capture.module_calls import intercepted, is_compiled, tensor_leaves
from scheduler.capture.module_capture import ModuleCapture
from scheduler.capture.sharded import gathered, holders, sharded_within
from scheduler.program import ReplayProgram

__all__ = ["ModuleExecutor"]


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
        # Those that fully_shard gathers deeper within a block are there only while their module runs.
        self.parameters = {
            name: [
                locate(model, f"{name}.{n}")
                for n, _ in module.named_parameters()
                if all(holder is module for holder in holders(module, n.rpartition(".")[0]))
            ]
            for name, module in self.modules.items()
        }
        self.buffers = {
            name: [locate(model, f"{name}.{n}") for n, _ in module.named_buffers()]
            for name, module in self.modules.items()
        }
        self.sharded = {
            name: (holders(model, name), [inner for inner in sharded_within(module) if inner is not module])
            for name, module in self.modules.items()
        }
        self.changed = [[locate(model, n) for n in capture.changed[block.stage]] for block in capture.blocks]
        self.compiled = any(
            is_compiled(inner) for module in self.modules.values() for inner in module.modules()
        )
        # forward is intercepted while a step runs: one step at a time may do that to these modules.
        self.lock = threading.Lock()

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own forward with the blocks intercepted; gives its output."""
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


class ModuleStep(Step):
    """One step of a ModuleExecutor."""

    def __init__(self, executor: ModuleExecutor) -> None:
        capture = executor.capture
        # Which blocks draw random numbers may depend on data: note the state before each.
        random = [index is not None for index in capture.stages]
        super().__init__(executor.program, executor.device, random, executor.observe, executor.check)
        self.executor = executor
        self.compiled = executor.compiled
        self.ran = 0
        # (block, output leaf) -> (tensor, version): what crosses into the next block, while that is awaited
        self.crossing: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.calls: dict[int, tuple[Callable[..., Any], list[Any], Any]] = {}
        self.versions_read: dict[int, dict[int, int]] = {}
        # stage -> (argument leaf, position in its boundary)
        self.places: dict[int, list[tuple[int, int]]] = {}
        self.snapshots: dict[int, list[Tensor]] = {}

    def finish(self) -> None:
        """The forward is over."""
        self.crossing = {}
        self.sweep_is_over()

    def wrapper(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """How the module of that name, one block or several, is intercepted."""
        blocks, kept = self.executor.capture.blocks, self.program.kept

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
                stage = blocks[index].stage
                boundary = self._enter(index, args, kwargs)
                if self.observe is not None:
                    self._watch_boundary(index, boundary)
                    self.observe("first", stage)
                if kept[stage] is not None:
                    result = forward(*args, **kwargs)
                else:
                    result = self._drop(index, forward, boundary, args, kwargs)
                made = tensor_leaves(result)
                following = self._following(index)
                self.crossing |= {
                    (index, output): (tensor, tensor._version)
                    for output, tensor in made
                    if (index, output) in following
                }
                if self.observe is not None:
                    self.watch(stage, [t for _, t in made])
                    self.observe("first", stage + 1)
                return result

            return intercept

        return wrap

    def _following(self, index: int) -> tuple[tuple[int, int], ...]:
        """What crosses into the block after; see ``Block.boundary``."""
        blocks = self.executor.capture.blocks
        return blocks[index + 1].boundary if index + 1 < len(blocks) else ()

    def _watch_boundary(self, index: int, boundary: tuple[Tensor, ...]) -> None:
        """Tell the observer when the gradients of what the block before has made arrive."""
        block = self.executor.capture.blocks[index]
        values = block.boundary or [(index - 1, 0)] * len(boundary)
        self.watch(
            block.stage - 1,
            [t for (made, _), t in zip(values, boundary, strict=True) if made == index - 1],
        )

    def _enter(self, index: int, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        """The boundary into a block, checked against the plan."""
        block = self.executor.capture.blocks[index]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        crossing = {value: tensor for value, (tensor, _) in self.crossing.items()}
        position = {value: at for at, value in enumerate(block.boundary)}
        places = [(argument, position[index - back, output]) for argument, output, back in block.fed]
        for argument, output, back in block.fed:
            value = index - back, output
            if argument not in tensors or not _same_value(
                tensors[argument], *self.crossing.get(value, (None, 0))
            ):
                before = "the block before" if back == 1 else self.executor.capture.blocks[index - back].label
                raise ReplayError(
                    f"argument {argument} of block {block.label} is not output {output} of {before}, as it "
                    "was when the plan was made; make a plan for this call"
                )
            crossing[value] = tensors[argument]
        if any(value not in crossing for value in block.boundary):
            raise ReplayError(
                f"what passes by block {block.label} is not what passed when the plan was made; make a plan for this call"
            )
        if block.fed:
            boundary = tuple(crossing[value] for value in block.boundary)
        else:
            places = [(argument, at) for at, argument in enumerate(sorted(tensors))]
            boundary = tuple(tensors[argument] for argument, _ in places)
        following = self._following(index)
        self.crossing = {value: each for value, each in self.crossing.items() if value in following}
        if self.program.kept[block.stage] is None:
            self.places[block.stage] = places
            held = {argument for argument, _ in places}
            self.last([leaf for i, leaf in tensors.items() if i not in held])
            for i in held:
                leaves[i] = None
            self.calls[block.stage] = (lambda: None, leaves, spec)
            self.versions_read[block.stage] = self._versions(index, block.stage)
        return boundary

    def _drop(
        self, index: int, forward: Callable[..., Any], boundary: tuple[Tensor, ...], args: Any, kwargs: Any
    ) -> Any:
        """The first run of a block whose saved tensors are dropped."""
        name, stage = self.executor.capture.blocks[index].name, self.executor.capture.blocks[index].stage
        _, leaves, spec = self.calls[stage]
        self.calls[stage] = (forward, leaves, spec)
        self.before_first_run(stage, boundary)
        own = [*self.executor.parameters[name], *self.executor.buffers[name]]
        self.last([values[key] for values, key in own])
        if self.executor.changed[index]:
            self.snapshots[stage] = [values[key].clone() for values, key in self.executor.changed[index]]
        with self.dropping(stage):
            return forward(*args, **kwargs)

    def _versions(self, index: int, stage: int) -> dict[int, int]:
        """Versions of the parameters and external tensors that a re-run reads, by identity.

        Where fully_shard's hooks are inside of what is intercepted, the parameters were not gathered yet when the first
        run began: others than the re-run finds.
        """
        name = self.executor.capture.blocks[index].name
        read = [values[key] for values, key in self.executor.parameters[name]]
        read += [leaf for leaf in self.calls[stage][1] if isinstance(leaf, Tensor)]
        return {id(tensor): tensor._version for tensor in read}

    def run_stage(self, stage: int, boundary: tuple[Tensor, ...], grad: bool) -> tuple[Tensor, ...]:
        """Re-run a block; see Step. Parameters that fully_shard has sharded are gathered for it."""
        index = self.executor.capture.stages[stage]
        assert index is not None  # glue runs once: the referee refuses a schedule that re-runs it
        with gathered(*self.executor.sharded[self.executor.capture.blocks[index].name]):
            return self._run_block(stage, index, boundary, grad)

    def _run_block(
        self, stage: int, index: int, boundary: tuple[Tensor, ...], grad: bool
    ) -> tuple[Tensor, ...]:
        """Re-run a block. Always in grad mode, for its code may ask for the mode."""
        capture = self.executor.capture
        now = self._versions(index, stage)
        if any(now.get(key, version) != version for key, version in self.versions_read[stage].items()):
            raise RuntimeError(
                f"a parameter or argument of block {capture.blocks[index].label} has been modified by an inplace "
                "operation between forward and backward, so that the block cannot be replayed; step the optimizer "
                "after backward"
            )
        forward, template, spec = self.calls[stage]
        leaves = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in template
        ]
        if not grad:
            boundary = tuple(
                t.detach().requires_grad_(flag) for t, flag in zip(boundary, self.flags[stage], strict=True)
            )
        for place, position in self.places[stage]:
            leaves[place] = boundary[position]
        after = self._following(index)
        passing = zip(capture.blocks[index].boundary, boundary, strict=False)
        there = {value: tensor for value, tensor in passing if value in after}
        del boundary
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        del leaves
        with self._buffers_as_before(stage, index):
            if grad:
                result = forward(*args, **kwargs)
            else:
                hooks = torch.autograd.graph.saved_tensors_hooks(self._shielded(_discard), _never)
                with torch.enable_grad(), hooks:
                    result = forward(*args, **kwargs)
        there |= {(index, output): tensor for output, tensor in tensor_leaves(result)}
        return tuple(there[value].detach() for value in after)

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

    def _buffers_as_before(self, stage: int, index: int) -> _Swapped:
        places = self.executor.changed[index]
        return _Swapped([values[key] for values, key in places], self.snapshots.get(stage, []))

    def release_inputs(self, stage: int) -> None:
        """Drop the arguments that only re-runs of this stage still needed."""
        self.calls.pop(stage, None)
        self.snapshots.pop(stage, None)


def _same_value(tensor: Tensor, made: Tensor | None, version: int) -> bool:
    """Whether a tensor is what was made, unchanged, or a view of just that: hooks of modules wrap in views."""
    if made is None or tensor._version != version:
        return False
    return tensor is made or (
        tensor.untyped_storage()._cdata == made.untyped_storage()._cdata
        and tensor.storage_offset() == made.storage_offset()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (made.shape, made.stride(), made.dtype)
    )


class _Swapped:
    """Within it, buffers have the values that they had before the first run."""

    def __init__(self, buffers: list[Tensor], values: list[Tensor]) -> None:
        self.buffers, self.values = buffers, values
        self.current: list[Tensor] = []

    def __enter__(self) -> None:
        self.current = [b.clone() for b in self.buffers]
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.data.copy_(value)  # .data: the version that autograd saw stays

    def __exit__(self, *_: object) -> None:
        for buffer, value in zip(self.buffers, self.current, strict=True):
            buffer.data.copy_(value)


def _discard(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise ReplayError("the graph of a re-run must not be reversed")
