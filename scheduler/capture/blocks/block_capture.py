"""A model captured as blocks that run one after the other, whole modules as stages.

The user's code between the blocks (*glue*) is left alone: it runs once, in plain autograd, and what it saves
stays. A block is *fed* by the one before if at least one of its tensor arguments is, by identity, an output
of that block, and glue has made none for it since; all its other tensor arguments (masks, rotary tables, an
encoder's output) are *external*: held while the step lasts.

A module that is called several times (an encoder that sees two batches) is a block at each call. So is a
*recurrent* one, where each call is fed by the one before (a cell that the user's code unrolls over time). Its
input at one step, which glue makes, is external and ends no chain; and it may be fed by a block further back,
whose output passes by those between (the state of a layer of cells while the others run).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from rematplan.scheduler.capture.blocks.calls import (
    CONTAINERS,
    BlockCall,
    Recurrence,
    expanded,
    profile,
    recurrent,
    repeatable,
)
from rematplan.scheduler.capture.blocks.layer_drop import VALUES, Effort, fixed_draws
from rematplan.scheduler.capture.graph.inner_gradients import noted_gradients
from rematplan.scheduler.capture.protocol import Capture, StageEffects
from rematplan.scheduler.capture.repeat import ELSEWHERE, draws_elsewhere
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.preserve import model_device, uncompiled
from rematplan.scheduler.torch_layer.private import detect_fake_mode
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["Block", "BlockCapture", "capture_blocks", "recorded_blocks"]

GLUE = "it is code between blocks"
MOST_PASSED = 16  # blocks that a value may pass by between its making and a block that is fed by it


@dataclass(slots=True)
class Block:
    """One stage that is a call of a module.

    Attributes:
        name: dotted name of the module in the model.
        label: the same, and which call of it, if there are several.
        stage: its index in the chain.
        fed: which outputs of blocks before are among its arguments, as (argument leaf, output leaf, how many
            blocks back); empty if glue comes between.
        boundary: what crosses into it, as (block, output leaf): what it is fed, then what passes by to later
            ones. Empty if glue comes between; then all its tensor arguments do.
    """

    name: str
    label: str
    stage: int
    fed: tuple[tuple[int, int, int], ...] = ()
    boundary: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class BlockCapture(Capture):
    """Blocks in the order in which they run, and where glue lies between them.

    Attributes:
        stages: (L,) index of the block that is this stage, or None for glue.
        gathering: bytes that stand by for fully_shard's collectives while a step runs, once that is priced.
        overwritten: names of attributes whose tensors blocks replace before they read them.
        state_bytes: bytes that the state of blocks takes: what they leave on modules, and what is held for
            re-runs.
        grad: whether the model's code runs in grad mode only.
        fixed_draw: what random numbers are fixed at for all layers to run, if some may be left out; see
            layer_drop.py.
        reversing: names of blocks that call autograd.grad on what they have made.
    """

    blocks: list[Block]
    stages: list[int | None]
    device: torch.device
    effects: list[StageEffects]
    reason: str
    target: Target | None = None
    gathering: int = 0
    overwritten: frozenset[str] = frozenset()
    state_bytes: int = 0
    grad: bool = False
    fixed_draw: float | None = None
    reversing: frozenset[str] = frozenset()

    kind = "modules"

    def __len__(self) -> int:
        return len(self.stages)

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the module of each block."""
        found = {name: model.get_submodule(name) for name in {block.name for block in self.blocks}}
        return [found[block.name] for block in self.blocks]

    def without_data(self, device: torch.device, fake: Callable[[Any], Any]) -> BlockCapture:  # noqa: ARG002
        """See ``Capture.without_data``."""
        return replace(self, device=device)

    def live_besides(self) -> dict[str, int]:
        """See ``Capture.live_besides``: what fully_shard's collectives take."""
        return {"gathered parameters": self.gathering} if self.gathering else {}

    def record(self) -> dict[str, Any]:
        """See ``Capture.record``; a block's name stands as often as it runs."""
        return {
            "stages": tuple(block.name for block in self.blocks),
            "fed": tuple(block.fed for block in self.blocks),
        }


def _candidates(model: nn.Module, call: Call, seen: Recurrence | None) -> dict[str, nn.Module]:
    """Return members of ModuleLists and Sequentials, shared ones once, and recurrent modules, by name."""
    found: dict[nn.Module, str] = {}
    for path, container in model.named_modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            for key, member in container.named_children():
                if not isinstance(member, CONTAINERS):
                    found.setdefault(member, f"{path}.{key}" if path else key)
    if seen is None:
        seen = Recurrence()
        args, kwargs = call
        with torch.no_grad(), seen.watching(model):
            model(*args, **kwargs)
    for name, row in seen.row.items():
        if row > 1:
            found.setdefault(model.get_submodule(name), name)
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


def capture_blocks(
    model: nn.Module,
    call: Call,
    blocks: Sequence[nn.Module] | None = None,
    target: Target | None = None,
    seen: Recurrence | None = None,
) -> BlockCapture:
    """Find the blocks by one forward without grad; the caller restores the model's state.

    Args:
        blocks: the blocks, if the user names them.
        target: the device that is planned for, if the model is without data.
        seen: what a forward called again and again, if that is known.

    Raises:
        CaptureError: there are no such blocks, or they cannot be replayed; says why.
    """
    modules = _candidates(model, call, seen) if blocks is None else _given(model, blocks)
    device = model_device(model)
    data = target is None and detect_fake_mode() is None
    with noted_gradients() as gradients:
        try:
            run = functools.partial(profile, model, call, modules, device, data)
            root, grad, fixed = _profiled(model, modules, run)
        except CaptureError as error:
            if not gradients:
                raise
            raise CaptureError(
                "the forward takes gradients itself (torch.autograd.grad); of such a forward only a graph can be had, or blocks "
                f"outside of what it reverses, that part within torch.enable_grad(): {error}"
            ) from error
    again = recurrent(root)
    if again and sharded_within(model):
        raise CaptureError(
            f"{min(again)} is called again and again in one forward, and fully_shard gathers and reduces at every call; "
            "shard the module that makes these calls, and plan modules that are called once"
        )
    calls = Counter(entry.name for entry in root.within())
    chosen = root.children if blocks is not None else expanded(root, calls, again)
    counts = Counter(entry.name for entry in chosen)
    within_others = {name for name, count in counts.items() if count != calls[name]}
    unusable = within_others | {entry.name for entry in chosen if not (entry.inputs and entry.outputs)}
    if blocks is not None and (unusable or list(counts) != list(modules)):
        raise CaptureError(
            "the modules given do not each run, once or several times, in the order given and outside of each other; "
            f"seen: {_in_words([entry.name for entry in chosen])}"
        )
    # What the forward itself reverses would be run again in the middle of the first sweep, beside all that it
    # holds.
    unusable |= {entry.name for entry in chosen if entry.changes_input or entry.reversed_outside}
    transformed = sorted({entry.name for entry in root.within() if entry.transformed})
    unusable.update(transformed)
    usable = [entry for entry in chosen if entry.name not in unusable]
    if data:
        with fixed_draws(fixed):
            usable = repeatable(model, call, usable, device, grad=grad)
    asked = [entry.name for entry in chosen if entry.reversed_outside]
    if not usable and asked:
        raise CaptureError(
            f"autograd.grad, or a backward, runs in the forward outside of {asked[0]} on what that has made, so that it cannot "
            "be run again; pass a module that contains both as a block"
        )
    if not usable:
        within = (
            f" ({transformed[0]} runs within torch.vmap, another transform of torch.func, or torch.inference_mode)"
            if transformed
            else ""
        )
        raise CaptureError(
            "no member of a ModuleList or Sequential runs with tensors in and out, and no module is called again and again, "
            f"each call fed by the one before{within}"
        )
    found, stages = _laid_out([entry.name for entry in usable], _feeds(chosen, usable, again))
    of: dict[str, set[str]] = {}  # in any of its calls: what one changes, all of them find
    for entry in usable:
        of.setdefault(entry.name, set()).update(entry.changed)
    return BlockCapture(
        found,
        stages,
        device,
        _effects(
            model,
            target or device,
            stages,
            [b is not None and usable[b].random for b in stages],
            [() if b is None else tuple(sorted(of[usable[b].name])) for b in stages],
        ),
        reason=f"{len(found)} blocks that run in order ({found[0].label} .. {found[-1].label})",
        target=target,
        overwritten=frozenset(name for entry in usable for name in entry.overwritten),
        # What a block leaves on modules, and what was there before it, which a re-run may read.
        state_bytes=sum(
            size * (1 if name in entry.overwritten else 2)
            for entry in usable
            for name, size in entry.left.items()
        ),
        grad=grad,
        fixed_draw=fixed,
        reversing=frozenset(entry.name for entry in usable if entry.reverses),
    )


def _profiled(
    model: nn.Module, modules: dict[str, nn.Module], run: Callable[..., BlockCall]
) -> tuple[BlockCall, bool, float | None]:
    """Return the candidates' calls, whether they need grad mode, and the value of draws for which all run.

    Raises:
        CaptureError: the model does not run; says why.
    """
    with uncompiled(), fixed_draws(None, counting=True) as draws, Effort() as effort:
        root, grad = _either_way(run)
    best, fixed = (len([*root.within()]), effort.ops), None
    for value in VALUES if draws.count and not sharded_within(model) else ():
        with uncompiled(), fixed_draws(value), Effort() as effort:
            other, _ = _either_way(run)
        done = len([*other.within()]), effort.ops
        if done > best or (done == best and fixed is None):
            root, best, fixed = other, done, value
    _refuse_left_out(model, modules, root)
    return root, grad, fixed


def _either_way(run: Callable[..., BlockCall]) -> tuple[BlockCall, bool]:
    """Return the calls of the candidates without grad, or in grad mode where that does not run."""
    failed: RuntimeError | None = None
    for grad in (False, True):
        try:
            return run(grad=grad), grad
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # without grad: forces by autograd.grad, a hook on a tensor
            failed = error
    raise CaptureError(f"it does not run on the sample: {failed}") from failed


def _in_words(names: Sequence[str]) -> str:
    """Return the names in order, repetitions counted."""
    runs = [(name, len(list(same))) for name, same in groupby(names)]
    shown = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in runs[:20])
    return shown + (", ..." if len(runs) > 20 else "")


def _feeds(
    chosen: Sequence[BlockCall], usable: Sequence[BlockCall], again: Collection[str]
) -> list[tuple[tuple[int, int, int], ...]]:
    """Return which outputs of blocks before each block is fed; see ``Block.fed``."""
    number = {id(entry): index for index, entry in enumerate(usable)}
    made: dict[int, tuple[int, int]] = {}  # token -> (block, output leaf), since glue was last a stage
    feeds: list[tuple[tuple[int, int, int], ...]] = []
    before: BlockCall | None = None
    for entry in chosen:
        index = number.get(id(entry))
        if index is not None:
            places = [(leaf, *made[token]) for leaf, token in entry.inputs if token in made]
            if entry.name in again:
                fed = tuple((leaf, output, index - block) for leaf, block, output in places)
            elif before is not None and index and usable[index - 1] is before and not entry.new_input:
                fed = tuple((leaf, output, 1) for leaf, block, output in places if block == index - 1)
            else:  # what glue made for this block (a decoder's embeddings) is glue's to be counted
                fed = ()
            if not fed:
                made = {}
            feeds.append(fed)
            made.update({token: (index, leaf) for leaf, token in reversed(entry.outputs)})
        before = entry
    return _within_reach(feeds)


def _within_reach(feeds: list[tuple[tuple[int, int, int], ...]]) -> list[tuple[tuple[int, int, int], ...]]:
    """Return the feeds without values that many blocks would pass by, which become external."""
    furthest = Counter[tuple[int, int]]()
    for index, fed in enumerate(feeds):
        for _, output, back in fed:
            furthest[index - back, output] = max(back, furthest[index - back, output])
    kept, begin = [], 0  # the first block since glue was last a stage
    for index, fed in enumerate(feeds):
        near = tuple(
            (leaf, output, back)
            for leaf, output, back in fed
            if index - back >= begin and (back == 1 or furthest[index - back, output] <= MOST_PASSED)
        )
        begin = begin if near else index
        kept.append(near)
    return kept


def _effects(
    model: nn.Module,
    device: Device,
    stages: Sequence[int | None],
    random: Sequence[bool],
    changed: Sequence[tuple[str, ...]],
) -> list[StageEffects]:
    elsewhere = draws_elsewhere(model, device)
    once = [
        GLUE if b is None else ELSEWHERE * (elsewhere and r) for b, r in zip(stages, random, strict=False)
    ]
    return [*map(StageEffects, random, changed, once)]


def recorded_blocks(
    model: nn.Module,
    names: Sequence[str],
    feeds: Sequence[tuple[tuple[int, int, int], ...]],
    random: Sequence[bool],
    changed: Sequence[tuple[str, ...]],
) -> BlockCapture:
    """Return the capture that a plan's record tells of, without running the model."""
    blocks, stages = _laid_out(names, feeds)
    device = model_device(model)
    effects = _effects(model, device, stages, random, changed)
    return BlockCapture(blocks, stages, device, effects, "as recorded")


def _laid_out(
    names: Sequence[str], feeds: Sequence[tuple[tuple[int, int, int], ...]]
) -> tuple[list[Block], list[int | None]]:
    """Return blocks and stages; glue comes first, last, and before each block that none before feeds."""
    blocks: list[Block] = []
    stages: list[int | None] = [None]
    total, seen = Counter(names), Counter[str]()
    for index, (name, fed) in enumerate(zip(names, feeds, strict=True)):
        if index and not fed:
            stages.append(None)
        label = name if total[name] == 1 else f"{name}[{seen[name]}]"
        seen[name] += 1
        blocks.append(Block(name, label, len(stages), fed))
        stages.append(index)
    needed: list[tuple[int, int]] = []  # by blocks after, and made before
    for index, block in reversed([*enumerate(blocks)]):
        own = [(index - back, output) for _, output, back in block.fed]
        passing = sorted(value for value in needed if value[0] < index)
        if block.fed:
            block.boundary = tuple(dict.fromkeys((*own, *passing)))
        needed = [*block.boundary]
    return blocks, [*stages, None]


def _refuse_left_out(model: nn.Module, modules: dict[str, nn.Module], root: BlockCall) -> None:
    """Refuse a model that leaves out layers at random, if no forward was found in which all of them run."""
    called = {entry.name for entry in root.within()}
    missing = next((name for name in modules if name not in called), None)
    if missing is None:
        return
    for name, module in model.named_modules():
        for owner in (module, getattr(module, "config", None)):
            for kind in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                share = getattr(owner, kind, 0.0)
                if isinstance(share, float) and share > 0:
                    where = ".".join(filter(None, (name, "" if owner is module else "config", kind)))
                    raise CaptureError(
                        f"layers are left out at random ({where} is {share}), and no forward was found in which {missing} "
                        "runs; set that to 0 in the configuration, before the model is made"
                    )
