"""Compile the stages of an op graph by Inductor, each at several shares of its activations.

A stage compiled at another share is another autograd function, which saves less and recomputes more in its
own backward: an option of the stage. The reference is the stage that saves all it likes: every other must
give its bits, outputs, gradients, random numbers and buffers, or it is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.layouts import equal_bits, storage_key
from rematplan.scheduler.torch_layer.preserve import RandomState
from rematplan.scheduler.torch_layer.private import allow_retained_graphs, compile_graph

__all__ = ["SHARES", "CompiledCapture", "Variant", "compile_capture", "fresh_arguments"]

# Of a stage's activations, given to Inductor's partitioner. Not 0: then it recomputes from the inputs alone,
# random seeds included, and dropping the stage whole serves the same purpose.
SHARES = (1.0, 0.5, 0.3, 0.2, 0.1)
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-2}  # to the eager stage, relative; others 0.1


@dataclass(frozen=True, slots=True)
class Variant:
    """A stage compiled at one share of its activations.

    Attributes:
        share: that the partitioner was given.
        function: (*arguments) -> tuple of results; an autograd function of its own.
        arguments, results: positions of those whose storages it saves.
        private: bytes of the other storages that it saves.
        made: bytes that it saves of what it makes, results among them.
    """

    share: float
    function: Callable[..., tuple[Tensor, ...]]
    arguments: frozenset[int]
    results: frozenset[int]
    private: tuple[int, ...]
    made: int


@dataclass(slots=True)
class CompiledCapture(GraphCapture):
    """An op graph whose stages are compiled.

    Attributes:
        variants: (L,) each stage's compilations, that which saves most first.
        chosen: (L,) for each option of the stage, the variant that it is; set when the stages are priced.
    """

    variants: list[tuple[Variant, ...]] = field(default_factory=list)
    chosen: list[tuple[Variant, ...]] = field(default_factory=list)

    kind = "compiled"

    def record(self) -> dict[str, Any]:
        """See ``Capture.record``."""
        own = dict.fromkeys(("dropped", "rerun", "gaps", "ops"), ())
        shares = tuple(tuple(variant.share for variant in options) for options in self.chosen)
        return super(CompiledCapture, self).record() | own | {"shares": shares}

    def storages(self, k: int, arguments: Iterable[int], results: Iterable[int]) -> set[int]:
        """Return the storages of the graph that these arguments and results of stage k lie in."""
        stage, groups = self.stages[k], self.graph.groups
        nodes = {node.name: node for node in self.graph.group_of}
        made = [*zip(stage.boundary, stage.boundary_from, strict=True)]
        made += zip(stage.carried, stage.carried_from, strict=True)
        names = [name for name, i in made if i in results]
        names += [stage.argument_names[i] for i in arguments]
        keys = (key for name in names for key in self.graph.group_of[nodes[name]])
        return {key for key in keys if groups[key].producer >= 0}

    def saves(self, k: int) -> set[int]:
        """See ``GraphCapture.saves``: what any variant saves."""
        each = (self.storages(k, variant.arguments, variant.results) for variant in self.variants[k])
        return set().union(*each)


_COMPILED: WeakKeyDictionary[nn.Module, dict[str, tuple[Variant, ...]]] = WeakKeyDictionary()


def compile_capture(
    eager: GraphCapture,
    model: nn.Module,
    call: Call,
    progress: Callable[[str], None],
    shares: Sequence[Sequence[float]] | None = None,
) -> CompiledCapture:
    """Compile the stages of a capture; equal stages, and later captures of the model, share theirs.

    The caller preserves the model's state.

    Args:
        shares: (L,) those to compile of each stage; by default ``SHARES``.

    Raises:
        CaptureError: a stage cannot be compiled, or trains otherwise than when it runs op by op.
    """
    own = {each.name: getattr(eager, each.name) for each in fields(eager)}
    found = CompiledCapture(**own | {"stages": [*eager.stages], "layouts": {}})
    known = _COMPILED.setdefault(model, {})
    kinds = len({stage.signature for stage in eager.stages})
    done = 0

    def visit(k: int, arguments: list[Any]) -> None:
        nonlocal done
        stage = found.stages[k]
        asked = tuple(SHARES if shares is None else dict.fromkeys((1.0, *shares[k])))
        key = f"{asked}|{_key(found, k, arguments)}"
        if key not in known:
            done += 1
            progress(f"compiling {stage.name} ({done} of about {kinds} distinct stages)")
            known[key] = _variants(found, k, arguments, asked)
        found.variants.append(known[key])
        found.stages[k] = replace(stage, function=known[key][0].function)

    with torch.no_grad():
        found.sweep(model, call, visit)
    return found


def _key(capture: GraphCapture, k: int, arguments: Sequence[Any]) -> str:
    """Return text that is equal for stages that one compilation serves."""
    kinds = {"cpu", capture.device.type}
    how: list[Any] = [
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in sorted(kinds)
    ]
    how += [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), capture.uncached]
    storages: dict[int | None, int] = {}
    for argument in arguments:
        same = storages.setdefault(storage_key(argument), len(storages))
        how.append(
            (tuple(argument.shape), argument.stride(), argument.storage_offset(), argument.dtype, same)
        )
    return f"{how}|{capture.stages[k].signature}"


def fresh_arguments(capture: GraphCapture, k: int, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the arguments as leaves that require grad as in the step; buffers as copies."""
    fresh = []
    for argument, source in zip(arguments, capture.stages[k].sources, strict=True):
        if source.kind == "buffer":
            fresh.append(argument.clone())
        elif source.kind == "parameter":
            fresh.append(argument)
        else:
            fresh.append(argument.detach().requires_grad_(source.requires_grad))
    return fresh


def _variants(
    capture: GraphCapture, k: int, arguments: Sequence[Any], shares: Sequence[float]
) -> tuple[Variant, ...]:
    """Return the stage compiled at each share that saves less than those before and gives the same bits.

    Raises:
        CaptureError: at the first share it cannot be compiled, or is not what the stage is op by op.
    """
    stage = capture.stages[k]
    module = stage.function.__self__  # type: ignore[attr-defined] # the forward of a GraphModule
    assert isinstance(module, fx.GraphModule)
    for name, argument in zip(stage.argument_names, arguments, strict=True):
        if not isinstance(argument, Tensor):
            kind = type(argument).__name__
            raise CaptureError(f"stage {k} ({stage.name}) takes {name}, {kind}, which is no tensor")
    fresh = functools.partial(fresh_arguments, capture, k, arguments)
    random = RandomState(capture.device)
    draws = any(op.random for op in _ops(capture, k))
    eager = [_trained(stage.function, fresh(), random, seed) for seed in ((0, 1, 2, 3) if draws else (0,))]
    found: list[Variant] = []
    reference: list[Any] = []
    for share in shares:
        try:
            function = compile_graph(module, fresh(), share)
            trained = _trained(function, fresh(), random)
        except Exception as error:
            if found:
                continue  # that option is not offered
            raise CaptureError(f"stage {k} ({stage.name}) cannot be compiled by Inductor: {error}") from error
        if not found:
            if difference := _far(trained, eager):
                raise CaptureError(f"stage {k} ({stage.name}), compiled, is not the stage: {difference}")
            reference = trained
        elif not _same(trained, reference):
            continue
        variant = _seen(share, function, fresh())
        random.restore()
        if not found or variant.made < found[-1].made:
            found.append(variant)
    return tuple(found)


def _ops(capture: GraphCapture, k: int) -> Sequence[Any]:
    return capture.graph.ops[capture.linear.cuts[k] : capture.linear.cuts[k + 1]]


def _trained(
    function: Callable[..., tuple[Tensor, ...]], arguments: list[Tensor], random: RandomState, seed: int = 0
) -> list[Tensor | None]:
    """Return what one run of a stage and its backward leave: a random number, results, buffers, gradients.

    Args:
        seed: how many numbers are drawn before.
    """
    random.restore()
    torch.rand(seed, device=random.device)
    leaves = [a for a in arguments if a.requires_grad]
    with torch.enable_grad():
        results = function(*arguments)
    allow_retained_graphs(results)
    after = torch.rand((), device=random.device)
    outputs = [r for r in results if r.requires_grad]
    generator = torch.Generator(random.device).manual_seed(0)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float32, device=r.device).to(r.dtype)
        for r in outputs
    ]
    grads: Sequence[Tensor | None] = ()
    if outputs and leaves:
        grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    random.restore()
    buffers = [a for a in arguments if not a.requires_grad]
    return [after, *(r.detach() for r in results), *buffers, *grads]


def _same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else equal_bits(a, b) for a, b in pairs)


def _far(compiled: Sequence[Tensor | None], eager: Sequence[Sequence[Tensor | None]]) -> str:
    """Return how results or gradients differ from the eager ones, in words; "" if only by rounding.

    A stage that draws has several eager runs, with other numbers: it may be as far from them as they are from
    one another, three times over.
    """
    for number, (a, *runs) in enumerate(zip(compiled, *eager, strict=True)):
        b, *others = runs
        if not number or a is None or b is None or not a.is_floating_point():  # no gradient is zeros
            continue
        scale = _norm(b)
        allowed = CLOSE.get(a.dtype, 0.1) * scale + 3 * max(
            (_apart(b, other) for other in others), default=0.0
        )
        if math.isfinite(allowed) and scale and not (apart := _apart(a, b)) <= allowed:
            return f"tensor {number} of results, buffers and gradients is {apart / scale:.2g} apart, relative"
    return ""


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _apart(a: Tensor, b: Tensor | None) -> float:
    return _norm(a) if b is None else _norm(a.double() - b.double())


def _seen(share: float, function: Callable[..., tuple[Tensor, ...]], arguments: list[Tensor]) -> Variant:
    """Return the variant, with what one run of it saves."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key is not None:
            saved.setdefault(key, tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*arguments)
    given = {storage_key(a): i for i, a in reversed([*enumerate(arguments)])}
    made = {storage_key(r): i for i, r in reversed([*enumerate(results)])}
    sizes = {key: t.untyped_storage().nbytes() for key, t in saved.items() if key not in given}
    return Variant(
        share,
        function,
        frozenset(given[key] for key in saved if key in given),
        frozenset(made[key] for key in sizes if key in made),
        tuple(size for key, size in sizes.items() if key not in made),
        sum(sizes.values()),
    )
