"""Observe the calls of a model's submodules in one forward: what feeds what, draws, changes and repeats.

A module is *recurrent* if it is called several times, each call fed by the one before: a cell that the
user's code unrolls over time.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_state import BlockState, CallState
from rematplan.scheduler.capture.repeat import unlike
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.eager import own_attributes
from rematplan.scheduler.torch_layer.fake import OpWatch
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.leaves import tensor_leaves, tensors_in
from rematplan.scheduler.torch_layer.preserve import RandomState, shielded, uncompiled
from rematplan.scheduler.torch_layer.private import transform_depth, version_of

__all__ = [
    "CONTAINERS",
    "BlockCall",
    "Recurrence",
    "expanded",
    "intercepted",
    "is_compiled",
    "makes_weights",
    "profile",
    "recurrent",
    "repeatable",
]

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they have no forward
MANY_CALLS = 100  # of one module in a row: the export of them all takes minutes
CALLS_TRIED = 3  # of one module, whether they repeat themselves


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has compiled a module, by itself or in place."""
    wrapped = any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)
    return wrapped or module._compiled_call_impl is not None


def makes_weights(module: nn.Module) -> bool:
    """Whether a pre-hook of the module makes what its forward reads: weight and spectral norm, pruning."""
    kinds = (kind for hook in module._forward_pre_hooks.values() for kind in type(hook).__mro__)
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in kinds)


@contextmanager
def intercepted(
    modules: Sequence[tuple[nn.Module, Callable[[Callable[..., Any]], Callable[..., Any]]]],
    whole: Collection[nn.Module] = (),
) -> Iterator[None]:
    """Replace within it each module's ``forward`` by ``wrap(forward)``; its hooks fire around that.

    Of a module that ``module.compile()`` has compiled it is the compiled call, hooks included: what wraps it
    stays eager. Of one whose weights a pre-hook makes it is the whole call, so that they are made where they
    are read.

    Args:
        whole: modules of which, too, it is the whole call, hooks included.
    """
    originals = []
    try:
        for module, wrap in modules:
            name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
            call = getattr(module, name)
            if name == "forward" and (module in whole or makes_weights(module)):
                # torch calls the former instead of the latter
                name, call = "_compiled_call_impl", module._call_impl
            own = own_attributes(module)
            originals.append((own, name, own.get(name)))
            own[name] = _Intercept(module, name, wrap(call))
        yield
    finally:
        for own, name, original in reversed(originals):
            if original is None:
                own.pop(name, None)
            else:
                own[name] = original


class _Intercept:
    """Stand for a method of a module while calls are intercepted; a copy of the module has its own."""

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.__wrapped__ = self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.name != "forward":
            return None
        twin = memo.get(id(self.module))
        return self if twin is None else MethodType(type(self.module).forward, twin)


@dataclass(eq=False, slots=True)
class BlockCall:
    """One call of a candidate module during the profiling forward. Tensors are named by tokens.

    Attributes:
        inputs, outputs: (leaf, token) of each tensor.
        left: place -> bytes of what is new there.
        reverses: it calls autograd.grad on what it has made.
        reversed_outside: other code does so, while the forward runs.
        transformed: within torch.vmap, another transform of torch.func, or torch.inference_mode.
        new_input: an input that no call before had: glue has made it.
    """

    name: str
    parent: BlockCall | None
    children: list[BlockCall] = field(default_factory=list)
    inputs: list[tuple[int, int]] = field(default_factory=list)
    outputs: list[tuple[int, int]] = field(default_factory=list)
    random: bool = False
    changed: frozenset[str] = frozenset()
    overwritten: frozenset[str] = frozenset()
    left: dict[str, int] = field(default_factory=dict)
    reverses: bool = False
    reversed_outside: bool = False
    changes_input: bool = False
    transformed: bool = False
    new_input: bool = False

    def within(self) -> Iterator[BlockCall]:
        """Yield all calls in it, in the order in which they began."""
        for child in self.children:
            yield child
            yield from child.within()

    def around(self) -> Iterator[BlockCall]:
        """Yield it and the calls that it is made in, from the inside out; not the model's own."""
        entry = self
        while entry.parent is not None:
            yield entry
            entry = entry.parent

    def feeds_itself(self, following: BlockCall) -> bool:
        """Whether the next call of the same module takes something that this one made."""
        made = {token for _, token in self.outputs} - {token for _, token in self.inputs}
        return any(token in made for _, token in following.inputs)

    def is_its_children(self) -> bool:
        """Whether the children, one after the other, are all that it does to what flows through it."""
        if len(self.children) < 2:
            return False
        first, last = self.children[0], self.children[-1]
        flow = [(self.inputs, first.inputs), (self.outputs, last.outputs)]
        flow += [(a.outputs, b.inputs) for a, b in pairwise(self.children)]
        return all({token for _, token in a} & {token for _, token in b} for a, b in flow)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; -1 if made in inference mode, uncounted."""
    return -1 if tensor.is_inference() else version_of(tensor)


class _Tokens:
    """A number for every tensor object ever seen; an address that is used again gets a new one.

    A tensor that was changed in place gets a new one too: it is no longer what was made.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # tensor, version, number
        self.count = 0

    def of(self, tensor: Tensor) -> int:
        """Return the tensor's number."""
        entry = self.known.get(id(tensor))
        version = _version(tensor)
        if entry is None or entry[0]() is not tensor or entry[1] != version:
            entry = (weakref.ref(tensor), version, self.count)
            self.known[id(tensor)] = entry
            self.count += 1
        return entry[2]


def recurrent(root: BlockCall) -> frozenset[str]:
    """Return the modules that are called several times, most of the calls fed by the one before."""
    calls: dict[str, list[BlockCall]] = {}
    for entry in root.within():
        calls.setdefault(entry.name, []).append(entry)
    return frozenset(
        name
        for name, of_it in calls.items()
        if len(of_it) > 1 and 2 * sum(a.feeds_itself(b) for a, b in pairwise(of_it)) >= len(of_it)
    )


class Recurrence:
    """Note, at little cost, which submodules a forward calls again and again, each fed by the call before.

    Attributes:
        row: the most calls of each in a row that the call before fed.
    """

    def __init__(self) -> None:
        self.row = Counter[str]()
        self._now = Counter[str]()
        self._made: dict[str, dict[int, weakref.ref[Tensor]]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the forwards of a model's submodules; not where fully_shard or the compiler look at them."""
        if sharded_within(model) or any(map(is_compiled, model.modules())):
            yield
            return
        named = [(n, m) for n, m in model.named_modules() if n and not isinstance(m, CONTAINERS)]
        with intercepted([(module, self._wrapper(name)) for name, module in named]):
            yield

    def _wrapper(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def noted(*args: Any, **kwargs: Any) -> Any:
                given = {id(t): t for t in tensors_in((args, kwargs))}
                made = self._made.get(name, {})
                fed = any(key in made and made[key]() is tensor for key, tensor in given.items())
                self._now[name] = self._now[name] + 1 if fed else 1
                self.row[name] = max(self.row[name], self._now[name])
                result = forward(*args, **kwargs)
                own = [tensor for tensor in tensors_in(result) if id(tensor) not in given]
                self._made[name] = {id(tensor): weakref.ref(tensor) for tensor in own}
                return result

            return noted

        return wrap

    def unrolled(self) -> str:
        """Return why a graph of all calls is hopeless; "" if no module is called so often in a row."""
        name, row = max(self.row.items(), key=lambda each: each[1], default=("", 0))
        if row < MANY_CALLS:
            return ""
        return (
            f"{name} is called {row} times in a row, each call fed by the one before, so that each is a stage"
        )


class _Enough(BaseException):
    """End a forward of which nothing more is wanted; no ``except Exception`` of the model's stops it."""


def repeatable(  # noqa: C901 - nested closures of one trial
    model: nn.Module, call: Call, entries: list[BlockCall], device: torch.device, *, grad: bool
) -> list[BlockCall]:
    """Return the blocks that give the same results when they are run again on the state that they found.

    Others change what cannot be put back: a file, an iterator. Notes what each changes. Of a module that is
    called many times the first calls are tried; where there are no others, the forward ends with these.

    Raises:
        CaptureError: none does; or the model cannot go on when they have run twice.
    """
    failed: dict[str, str] = {}
    calls = Counter(entry.name for entry in entries)
    left = {name: min(count, CALLS_TRIED) for name, count in calls.items()}
    short = all(count > CALLS_TRIED for count in calls.values())

    def wrapper(name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        state = BlockState(name, module, everything=True)

        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def twice(*args: Any, **kwargs: Any) -> Any:
                if not left[name]:
                    if short and not any(left.values()):
                        raise _Enough
                    return forward(*args, **kwargs)
                left[name] -= 1
                random = RandomState(device)
                before = CallState(state, args, kwargs)
                first = forward(*args, **kwargs)
                after = RandomState(device)
                beyond = before.beyond()
                if beyond:
                    failed[name] = f"it changes {beyond}, whose state cannot be put back"
                    return first
                changed, replaced, new = before.changed(), before.replaced(), before.left()

                def runs_alike(without: Collection[str] = ()) -> str:
                    def again() -> list[Tensor]:
                        with before.again(without):
                            return tensors_in(forward(*args, **kwargs))

                    try:
                        return unlike(tensors_in(first), again, random)
                    except Exception as error:  # noqa: BLE001 # of whatever kind the model's code raises
                        return f"it raises {type(error).__name__}: {error}"
                    finally:
                        after.restore()

                why = runs_alike()
                if why:
                    failed[name] = why
                    return first
                unread = replaced if replaced and not runs_alike(replaced) else set()
                for entry in (entry for entry in entries if entry.name == name):
                    entry.changed |= changed
                    entry.overwritten |= unread
                    entry.left |= new
                return first

            return twice

        return wrap

    args, kwargs = call
    error: Exception | None = None
    watched = [(name, model.get_submodule(name)) for name in calls]
    with torch.set_grad_enabled(grad), intercepted([(m, wrapper(n, m)) for n, m in watched]):
        try:
            model(*args, **kwargs)
        except _Enough:
            pass
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


def profile(
    model: nn.Module,
    call: Call,
    modules: dict[str, nn.Module],
    device: torch.device,
    data: bool,
    *,
    grad: bool = False,
) -> BlockCall:
    """Run the model once and note the calls of the candidates, as a tree.

    Args:
        data: whether tensors have values; else ops' tags and schemas tell what is random and what changes.
        grad: whether it runs in grad mode.
    """
    root = BlockCall("", None)
    current = root
    tokens = _Tokens()
    states: dict[str, BlockState] = {}

    def unpack(packed: tuple[BlockCall, Tensor]) -> Tensor:
        now = set(current.around())
        for entry in packed[0].around():
            entry.reverses |= entry in now
            entry.reversed_outside |= entry not in now
        return packed[1]

    def hooks(entry: BlockCall) -> AbstractContextManager[Any]:
        # Nobody is to own its own output.
        pack = shielded(lambda t: (entry, t if t.is_leaf else t.detach()))
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def watch(name: str, module: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                nonlocal current
                entry = BlockCall(name, current)
                given = tensor_leaves((args, kwargs))
                current.children.append(entry)
                entry.transformed = bool(transform_depth()) or torch.is_inference_mode_enabled()
                known = tokens.count
                entry.inputs = [(leaf, tokens.of(t)) for leaf, t in given]
                entry.new_input = tokens.count > known
                versions = [_version(t) for _, t in given]
                if name not in states:
                    states[name] = BlockState(name, module, everything=True)
                before = CallState(states[name], args, kwargs, data=data)
                random = RandomState(device)
                current = entry
                ops = OpWatch()
                try:
                    with (
                        hooks(entry),
                        nullcontext() if data else uncompiled(),
                        nullcontext() if data else ops,
                    ):
                        result = forward(*args, **kwargs)
                finally:
                    current = entry.parent or root
                entry.outputs = [(leaf, tokens.of(t)) for leaf, t in tensor_leaves(result)]
                entry.random = random.differs() if data else ops.random
                entry.changed = frozenset(before.changed(ops))
                entry.left = before.left()
                entry.changes_input = any(_version(t) != v for (_, t), v in zip(given, versions, strict=True))
                return result

            return watched

        return wrap

    args, kwargs = call
    with torch.set_grad_enabled(grad), intercepted([(m, watch(n, m)) for n, m in modules.items()]):
        model(*args, **kwargs)
    return root


def expanded(entry: BlockCall, within: Counter[str], again: Collection[str]) -> list[BlockCall]:
    """Return blocks as fine as whole modules allow: members replace a block if they are all it does.

    They also replace one that unrolls a recurrent module over many steps. A recurrent one is a block at each
    call.

    Args:
        within: how often each module is called.
        again: the recurrent ones.
    """
    result: list[BlockCall] = []
    for child in entry.children:
        steps = Counter(inner.name for inner in child.children if inner.name in again)
        within_it = any(inner.reversed_outside for inner in child.children)
        finer = (child.is_its_children() and not within_it) or max(steps.values(), default=0) >= MANY_CALLS
        if finer and (within[child.name] == 1 or child.name not in again):
            result.extend(expanded(child, within, again))
        else:
            result.append(child)
    return result
