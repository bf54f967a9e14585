"""A model captured as blocks that run one after the other, whole modules as stages.

The user's code between the blocks (*glue*) is left alone: it runs once, in plain autograd, and what it
saves stays. A block is *fed* by the one before if at least one of its tensor arguments is, by identity,
an output of that block, and glue has made none for it since; all its other tensor
arguments (masks, rotary tables, an encoder's output) are *external*: held while the step lasts.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from scheduler.capture.fake import Watch
from scheduler.capture.flat import tensor_leaves
from scheduler.capture.sample import Call
from scheduler.capture.state import RandomState, model_device
from scheduler.capture.target import Device, Target
from scheduler.capture.verify import equal_bits
from scheduler.errors import CaptureError

__all__ = [
    "Block",
    "ModuleCapture",
    "capture_blocks",
    "capture_modules",
    "intercepted",
    "is_compiled",
    "recorded_modules",
]


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
        target: the device that costs are for, if it is not there: then nothing has data.
        gathering: bytes that stand by for fully_shard's collectives while a step runs, once that is priced.
    """

    blocks: list[Block]
    stages: list[int | None]
    device: torch.device
    reason: str
    random: list[bool] = field(default_factory=list)
    changed: list[tuple[str, ...]] = field(default_factory=list)
    target: Target | None = None
    gathering: int = 0

    kind = "modules"

    @property
    def place(self) -> Device:
        """What costs are for: the device that is planned for without being there, or the one at hand."""
        return self.device if self.target is None else self.target

    def __len__(self) -> int:
        return len(self.stages)

    def record(self) -> dict[str, Any]:
        """What a plan keeps of this capture, to make it again."""
        return {
            "stages": tuple(block.name for block in self.blocks),
            "fed": tuple(block.fed for block in self.blocks),
            "random": tuple(self.random),
            "changed": tuple(self.changed),
        }


class _Call:
    """One call of a candidate module during the profiling forward. Tensors are named by tokens."""

    def __init__(self, name: str, parent: _Call | None) -> None:
        self.name = name
        self.parent = parent
        self.children: list[_Call] = []
        self.inputs: list[tuple[int, int]] = []  # (leaf, token)
        self.outputs: list[tuple[int, int]] = []
        self.random = False
        self.changed: tuple[str, ...] = ()
        self.changes_input = False
        self.new_input = False  # an input that no call before had: glue has made it

    def calls(self) -> Iterator[_Call]:
        """All calls within this one."""
        for child in self.children:
            yield child
            yield from child.calls()

    def fed_by(self, other: _Call) -> tuple[tuple[int, int], ...]:
        """(argument leaf, output leaf) pairs of one tensor."""
        made = {token: leaf for leaf, token in reversed(other.outputs)}
        return tuple((leaf, made[token]) for leaf, token in self.inputs if token in made)

    def is_its_children(self) -> bool:
        """Whether the children, one after the other, are all that it does to what flows through it."""
        if len(self.children) < 2:
            return False
        first, last = self.children[0], self.children[-1]
        return (
            bool({t for _, t in first.inputs} & {t for _, t in self.inputs})
            and bool({t for _, t in last.outputs} & {t for _, t in self.outputs})
            and all(b.fed_by(a) for a, b in pairwise(self.children))
        )


class _Tokens:
    """A number for every tensor object ever seen; an address that is used again gets a new one.

    A tensor that was changed in place gets a new one too: it is no longer what was made.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # (tensor, version, number)
        self.count = 0

    def of(self, tensor: Tensor) -> int:
        """The tensor's number."""
        entry = self.known.get(id(tensor))
        if entry is None or entry[0]() is not tensor or entry[1] != tensor._version:
            entry = (weakref.ref(tensor), tensor._version, self.count)
            self.known[id(tensor)] = entry
            self.count += 1
        return entry[2]


@contextmanager
def intercepted(
    modules: Sequence[tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]],
    whole: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Within it each module's ``forward`` is ``wrap(forward)``; its hooks fire around that as ever.

    Of a module that ``module.compile()`` has compiled it is the compiled call, hooks included: what wraps it stays eager.

    Args:
        whole: of these, too, it is the whole call, hooks included.
    """
    originals = []
    try:
        for module, wrap in modules:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            call = getattr(module, name)
            if name == "forward" and module in whole:
                name, call = (
                    "_compiled_call_impl",
                    module._call_impl,
                )  # torch calls the former instead of the latter
            originals.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = wrap(call)
        yield
    finally:
        for module, name, original in reversed(originals):
            if original is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = original


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled a module, by itself or in place."""
    wrapped = any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)
    return wrapped or module._compiled_call_impl is not None


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


def capture_blocks(
    model: nn.Module,
    call: Call,
    how: str | tuple[nn.Module, ...],
    refused: str,
    target: Target | None = None,
) -> tuple[ModuleCapture, str]:
    """The blocks of a model that is not captured as a graph, and why these.

    Args:
        how: what was asked for: a kind of capture, or the blocks.
        refused: why there is no graph, "" if none was asked for.

    Raises:
        CaptureError: the model cannot be captured; says why.
    """
    given = None if isinstance(how, str) else how
    try:
        blocks = capture_modules(model, call, given, target)
    except CaptureError as error:
        why = f" (graph capture: {refused})" if refused else ""
        raise CaptureError(
            f"solve: {type(model).__name__} cannot be captured: {error}{why}; pass capture=[blocks], the modules that "
            "run one after the other"
        ) from error
    return blocks, blocks.reason if given is None else "the blocks given"


def capture_modules(
    model: nn.Module, call: Call, blocks: Sequence[nn.Module] | None = None, target: Target | None = None
) -> ModuleCapture:
    """Find the blocks by one forward without grad; the caller restores the model's state.

    Args:
        blocks: the blocks, if the user names them.
        target: the device that is planned for, if it is not there: nothing has data.

    Raises:
        CaptureError: there are no such blocks, or they cannot be replayed; says why.
    """
    _refuse_layer_drop(model)
    modules = _candidates(model) if blocks is None else _given(model, blocks)
    device = model_device(model)
    root = _profile(model, call, modules, device, data=target is None)
    chosen = root.children if blocks is not None else _expanded(root)
    counts = Counter(entry.name for entry in root.calls())  # within another block, too
    usable = [entry for entry in chosen if counts[entry.name] == 1 and entry.inputs and entry.outputs]
    if blocks is not None and [e.name for e in usable] != list(modules):
        raise CaptureError(
            f"the modules given do not each run once, in the order given; seen: {[e.name for e in chosen]}"
        )
    usable = [entry for entry in usable if not entry.changes_input]
    if target is None and detect_fake_mode() is None:
        usable = _repeatable(model, call, usable, device)
    if not usable:
        raise CaptureError(
            "no member of a ModuleList or Sequential runs exactly once with tensors in and out"
        )
    feeds: list[tuple[tuple[int, int], ...]] = []
    before: _Call | None = None
    for entry in usable:
        position = chosen.index(entry)
        follows = before is not None and position > 0 and chosen[position - 1] is before
        # What glue made for this block (a decoder's embeddings, beside the encoder's output) is glue's to be counted.
        fed = entry.fed_by(before) if before is not None and follows and not entry.new_input else ()
        feeds.append(fed)
        before = entry
    found, stages = _laid_out([entry.name for entry in usable], feeds)
    by_name = {entry.name: entry for entry in usable}
    random = [False if b is None else by_name[found[b].name].random for b in stages]
    changed = [() if b is None else by_name[found[b].name].changed for b in stages]
    reason = f"{len(found)} blocks that run in order ({found[0].name} .. {found[-1].name})"
    return ModuleCapture(found, stages, device, reason, random, changed, target)


def recorded_modules(
    names: Sequence[str],
    feeds: Sequence[tuple[tuple[int, int], ...]],
    random: Sequence[bool],
    changed: Sequence[tuple[str, ...]],
    device: torch.device,
) -> ModuleCapture:
    """The capture that a plan's record tells of, without running the model."""
    blocks, stages = _laid_out(names, feeds)
    return ModuleCapture(blocks, stages, device, "as recorded", list(random), list(changed))


def _laid_out(
    names: Sequence[str], feeds: Sequence[tuple[tuple[int, int], ...]]
) -> tuple[list[Block], list[int | None]]:
    """Blocks and stages: glue comes first, last, and before each block that the one before does not feed."""
    blocks: list[Block] = []
    stages: list[int | None] = [None]
    for index, (name, fed) in enumerate(zip(names, feeds, strict=True)):
        if index and not fed:
            stages.append(None)
        blocks.append(Block(name, len(stages), fed))
        stages.append(index)
    return blocks, [*stages, None]


def _refuse_layer_drop(model: nn.Module) -> None:
    """Refuse a model that leaves out layers at random: a plan is for all of them."""
    for name, module in model.named_modules():
        for owner in (module, getattr(module, "config", None)):
            for kind in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                share = getattr(owner, kind, 0.0)
                if isinstance(share, float) and share > 0:
                    where = ".".join(filter(None, (name, "" if owner is module else "config", kind)))
                    raise CaptureError(
                        f"layers are left out at random ({where} is {share}), and a plan is for all of them; set that to "
                        "0 in the configuration, before the model is made"
                    )


def _repeatable(model: nn.Module, call: Call, entries: list[_Call], device: torch.device) -> list[_Call]:
    """Those of the blocks that give the same results when they are run again.

    Others draw random numbers from elsewhere, or change one of their arguments: a cache.

    Raises:
        CaptureError: none does; or the model cannot go on when they have run twice.
    """
    failed: dict[str, str] = {}

    def wrapper(name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def twice(*args: Any, **kwargs: Any) -> Any:
                random = RandomState(device)
                buffers = [(b, b.clone()) for b in module.buffers()]
                first = forward(*args, **kwargs)
                random.restore()
                for buffer, value in buffers:
                    buffer.data.copy_(value)
                try:
                    again = forward(*args, **kwargs)
                except Exception as error:  # noqa: BLE001 # of whatever kind the model's code raises
                    failed[name] = f"it raises {type(error).__name__}: {error}"
                    return first
                pairs = zip(tensor_leaves(first), tensor_leaves(again), strict=False)
                if any(not _alike(a, b) for (_, a), (_, b) in pairs):
                    failed[name] = "its results differ"
                return first

            return twice

        return wrap

    args, kwargs = call
    error: Exception | None = None
    watched = [(entry.name, model.get_submodule(entry.name)) for entry in entries]
    with torch.no_grad(), intercepted([(m, wrapper(n, m)) for n, m in watched]):
        try:
            model(*args, **kwargs)
        except Exception as other:  # noqa: BLE001 # what the second runs left behind may stop the model
            error = other
    steady = [entry for entry in entries if entry.name not in failed]
    if error is not None or (failed and not steady):
        name, why = next(iter(failed.items()), (watched[0][0], f"the model stops with {error}"))
        raise CaptureError(
            f"{name} does not do the same when it is run again on the same arguments: {why}. If it fills a cache, pass "
            "use_cache=False; random numbers must be torch's"
        ) from error
    return steady


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two results are one, up to what sums of CUDA kernels in no fixed order may make of it."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.device.type == "cpu" or not a.is_floating_point():
        return equal_bits(a, b)
    return torch.allclose(
        a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()) if a.numel() else 0.0, equal_nan=True
    )


def _profile(
    model: nn.Module, call: Call, modules: dict[str, nn.Module], device: torch.device, data: bool
) -> _Call:
    """Run the model once without grad and note the calls of the candidates, as a tree.

    Args:
        data: whether tensors have values; else ops' tags and schemas tell what is random and what changes.
    """
    root = _Call("", None)
    current = root
    tokens = _Tokens()

    def watch(name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal current
                entry = _Call(name, current)
                given = tensor_leaves((args, kwargs))
                current.children.append(entry)
                known = tokens.count
                entry.inputs = [(leaf, tokens.of(t)) for leaf, t in given]
                entry.new_input = tokens.count > known
                versions = [t._version for _, t in given]
                buffers = {n: (b, b.clone(), b._version) for n, b in module.named_buffers()}
                random = RandomState(device)
                current = entry
                ops = Watch()
                try:
                    with nullcontext() if data else ops:
                        result = forward(*args, **kwargs)
                finally:
                    current = entry.parent or root
                entry.outputs = [(leaf, tokens.of(t)) for leaf, t in tensor_leaves(result)]
                entry.random = random.differs() if data else ops.random
                entry.changed = tuple(
                    f"{name}.{n}"
                    for n, (b, value, version) in buffers.items()
                    # Kernels of batch norm change statistics without a new version; a fill may put the same values in again.
                    if (b._version != version or not torch.equal(b, value) if data else ops.has_changed(b))
                )
                entry.changes_input = any(t._version != v for (_, t), v in zip(given, versions, strict=True))
                return result

            return watched

        return wrap

    args, kwargs = call
    with torch.no_grad(), intercepted([(m, watch(n, m)) for n, m in modules.items()]):
        try:
            model(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the model's code, as it does run with grad
            raise CaptureError(f"it does not run under torch.no_grad(): {error}") from error
    return root


def _expanded(entry: _Call) -> list[_Call]:
    """Blocks as fine as whole modules allow: a block gives way to its members if they are all it does."""
    result: list[_Call] = []
    for child in entry.children:
        result.extend(_expanded(child) if child.is_its_children() else [child])
    return result
