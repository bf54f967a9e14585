"""A model captured as blocks that run one after the other, whole modules as stages.

The user's code between the blocks (*glue*) is left alone: it runs once, in plain autograd, and what it
saves stays. A block is *fed* by the one before if at least one of its tensor arguments is, by identity,
an output of that block; all its other tensor arguments (masks, rotary tables, an encoder's output) are
*external*: held while the step lasts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scheduler.capture.sample import Call
from scheduler.capture.state import RandomState, model_device
from scheduler.errors import CaptureError

__all__ = ["Block", "ModuleCapture", "capture_modules", "intercepted"]


@dataclass(slots=True)
class Block:
    """One stage that is a module.

    Attributes:
        name: dotted name in the model.
        stage: its index in the chain.
        fed: which output leaves of the block before are among its arguments, as
            (argument leaf, output leaf) pairs; empty if glue comes between.
    """

    name: str
    stage: int
    fed: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class ModuleCapture:
    """Blocks in the order in which they run, and where glue lies between them.

    Attributes:
        stages: (L,) index of the block that is this stage, or None for glue.
    """

    blocks: list[Block]
    stages: list[int | None]
    device: torch.device
    reason: str
    random: list[bool] = field(default_factory=list)
    changed: list[tuple[str, ...]] = field(default_factory=list)

    kind = "modules"

    def __len__(self) -> int:
        return len(self.stages)

    def record(self) -> dict[str, Any]:
        """What a plan keeps of this capture, to make it again."""
        return {
            "stages": tuple(block.name for block in self.blocks),
            "random": tuple(self.random),
            "changed": tuple(self.changed),
        }


class _Call:
    """One call of a candidate module during the profiling forward."""

    def __init__(self, name: str, parent: _Call | None) -> None:
        self.name = name
        self.parent = parent
        self.children: list[_Call] = []
        self.inputs: list[weakref.ref[Tensor]] = []
        self.outputs: list[weakref.ref[Tensor]] = []
        self.fed: tuple[tuple[int, int], ...] = ()
        self.enters_first = False  # the first child is given what this call was given
        self.leaves_last = False  # the last child's output is this call's output
        self.random = False
        self.changed: tuple[str, ...] = ()
        self.changes_input = False


def tensor_leaves(value: Any) -> list[tuple[int, Tensor]]:
    """(index, tensor) for every tensor among the leaves of ``value``."""
    return [(i, leaf) for i, leaf in enumerate(pytree.tree_leaves(value)) if isinstance(leaf, Tensor)]


@contextmanager
def intercepted(
    modules: Sequence[tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]],
) -> Iterator[None]:
    """Within it each module's ``forward`` is ``wrap(forward)``; its hooks fire around that as ever."""
    originals = []
    try:
        for module, wrap in modules:
            originals.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = wrap(module.forward)
        yield
    finally:
        for module, original in reversed(originals):
            if original is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Members of every ModuleList and Sequential, by name, shared ones once."""
    found: dict[nn.Module, str] = {}
    for path, container in model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            for key, member in container.named_children():
                if not isinstance(member, (nn.ModuleList, nn.ModuleDict)):
                    found.setdefault(member, f"{path}.{key}" if path else key)
    return {name: module for module, name in found.items()}


def _given(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for position, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or block not in names:
            raise CaptureError(f"capture[{position}] is not a submodule of the model: {type(block).__name__}")
        found[names[block]] = block
    if len(found) != len(blocks):
        raise CaptureError("a module stands twice in the list given as capture")
    return found


def capture_modules(
    model: nn.Module, call: Call, blocks: Sequence[nn.Module] | None = None
) -> ModuleCapture:
    """Find the blocks by one forward without grad; the caller restores the model's state.

    Args:
        blocks: the blocks, if the user names them.

    Raises:
        CaptureError: there are no such blocks, or they cannot be replayed; says why.
    """
    modules = _candidates(model) if blocks is None else _given(model, blocks)
    device = model_device(model)
    root = _profile(model, call, modules, device)
    chosen = root.children if blocks is not None else _expanded(root)
    counts: dict[str, int] = {}
    for entry in chosen:
        counts[entry.name] = counts.get(entry.name, 0) + 1
    usable = [entry for entry in chosen if counts[entry.name] == 1 and entry.inputs and entry.outputs]
    if blocks is not None and [e.name for e in usable] != list(modules):
        raise CaptureError(
            f"the modules given do not each run once, in the order given; seen: {[e.name for e in chosen]}"
        )
    usable = [entry for entry in usable if not entry.changes_input]
    if not usable:
        raise CaptureError("no member of a ModuleList or Sequential runs exactly once with tensors in and out")
    stages: list[int | None] = [None]
    found: list[Block] = []
    before: _Call | None = None
    for entry in usable:
        position = chosen.index(entry)
        adjacent = before is not None and position > 0 and chosen[position - 1] is before and bool(entry.fed)
        if before is not None and not adjacent:
            stages.append(None)
        found.append(Block(entry.name, len(stages), entry.fed if adjacent else ()))
        stages.append(len(found) - 1)
        before = entry
    stages.append(None)
    by_name = {entry.name: entry for entry in usable}
    random = [False if b is None else by_name[found[b].name].random for b in stages]
    changed = [() if b is None else by_name[found[b].name].changed for b in stages]
    reason = f"{len(found)} blocks that run in order ({found[0].name} .. {found[-1].name})"
    return ModuleCapture(found, stages, device, reason, random, changed)


def _profile(model: nn.Module, call: Call, modules: dict[str, nn.Module], device: torch.device) -> _Call:
    """Run the model once without grad and note the calls of the candidates, as a tree."""
    root = _Call("", None)
    current = root

    def watch(name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal current
                entry = _Call(name, current)
                given = tensor_leaves((args, kwargs))
                siblings = current.children
                if siblings:
                    made = {id(t): i for i, ref in enumerate(siblings[-1].outputs) if (t := ref()) is not None}
                    entry.fed = tuple((i, made[id(t)]) for i, t in given if id(t) in made)
                else:
                    own = {id(t) for ref in current.inputs if (t := ref()) is not None}
                    current.enters_first = any(id(t) in own for _, t in given)
                siblings.append(entry)
                entry.inputs = [weakref.ref(t) for _, t in given]
                versions = [t._version for _, t in given]
                buffers = {n: (b, b.clone()) for n, b in module.named_buffers()}
                random = RandomState(device)
                current = entry
                try:
                    result = forward(*args, **kwargs)
                finally:
                    current = entry.parent or root
                made_now = tensor_leaves(result)
                entry.outputs = [weakref.ref(t) for _, t in made_now]
                if entry.children:
                    last = {id(t) for ref in entry.children[-1].outputs if (t := ref()) is not None}
                    entry.leaves_last = any(id(t) in last for _, t in made_now)
                entry.random = random.differs()
                entry.changed = tuple(f"{name}.{n}" for n, (b, v) in buffers.items() if not torch.equal(b, v))
                entry.changes_input = any(t._version != v for (_, t), v in zip(given, versions, strict=True))
                return result

            return watched

        return wrap

    args, kwargs = call
    with torch.no_grad(), intercepted([(m, watch(n, m)) for n, m in modules.items()]):
        model(*args, **kwargs)
    return root


def _expanded(entry: _Call) -> list[_Call]:
    """Blocks as fine as whole modules allow: a block gives way to its members if they are all it does."""
    result: list[_Call] = []
    for child in entry.children:
        chained = all(inner.fed for inner in child.children[1:])
        if len(child.children) > 1 and chained and child.enters_first and child.leaves_last:
            result.extend(_expanded(child))
        else:
            result.append(child)
    return result
