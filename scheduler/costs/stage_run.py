"""Measure a stage: seconds by the clock, bytes by the allocator.

A stage runs in isolation, on the tensors of the real step, as the executor will run it: without its saved
tensors, with them, and backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.graph.compiled import Variant
from rematplan.scheduler.costs.meters.clock import Spans
from rematplan.scheduler.costs.meters.peak import allocated, count_bytes
from rematplan.scheduler.torch_layer.fsdp import is_distributed
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key
from rematplan.scheduler.torch_layer.preserve import reverse, shielded, uncached
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = [
    "OptionCost",
    "StageCost",
    "StageRun",
    "as_leaf",
    "both_ways",
    "cached_casts",
    "fresh_grads",
    "measure_stage",
    "never",
    "rebuild_peak",
    "root_of",
    "saving",
    "seed_gradients",
    "unowned",
]


@dataclass(frozen=True, slots=True)
class OptionCost:
    """The cost of an option of a stage, as far as it differs from keeping all.

    Attributes:
        dropped: numbers of the saved tensors that it does not keep.
        recompute: seconds to recompute them.
        keeping_peak: most bytes above the inputs while the stage runs forward.
        backward_peak: the same from there to the end of its backward, recomputation included.
        name: what is kept, in words.
        rerun: the ops of the stage that run again, by their places in it.
        rebuild_peak: most bytes above the inputs while the stage is run again to its last kept tensor.
        kept: bytes that are live once the stage has run forward, and nobody holds its outputs.
        variant: of a compiled stage, the compilation that it is.
    """

    dropped: frozenset[int]
    recompute: float
    keeping_peak: int
    backward_peak: int
    name: str
    rerun: tuple[int, ...] = ()
    rebuild_peak: int | None = None
    kept: int = 0
    variant: Variant | None = None

    @property
    def private(self) -> tuple[int, ...]:
        """Bytes of saved storages that are no values of the graph."""
        return self.variant.private if self.variant is not None else ()


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of one stage.

    Attributes:
        forward, backward: seconds, medians.
        dropping_peak: most bytes above the inputs while it runs forward and drops its saved tensors.
        keeping_peak: the same while it keeps them.
        backward_peak: most bytes above the inputs from its re-run's end to its backward's end: saved
            tensors, gradients of outputs, inputs and parameters, and transients.
        output_grads: bytes of the gradients of the outputs, which ``backward_peak`` includes.
        lead: bytes that the backward has made, above the gradients of the outputs, when it first asks for a
            saved tensor that a replay would have to rebuild: they are live during that replay. None if it
            asks for none.
        input_grads: (argument, storage, bytes) of the gradient that the backward leaves of each argument. It
            may be a view of a larger storage (of a concatenation's gradient), or share one with another.
        options: that keep less than all.
        kept: bytes that are live once it has run forward and keeps them, and nobody holds its outputs.
        left: bytes that stay when it is reversed, besides gradients: a state that its code holds.
        gap: share by which the seconds of an option may exceed the least for its bytes.
        rebuild_peak: most bytes above the inputs while it is run again to its last saved tensor.
        cached: bytes of its weights' casts that autocast's cache holds until the forward is over.
        held: bytes that its graph holds though its saved tensors are dropped, such as the random-number
            states of torch's checkpoint.
        variant: of a compiled stage, the compilation that keeps all of these.
    """

    forward: float
    backward: float
    dropping_peak: int
    keeping_peak: int
    backward_peak: int
    output_grads: int
    lead: int | None = None
    input_grads: tuple[tuple[int, int, int], ...] = ()
    options: tuple[OptionCost, ...] = ()
    kept: int = 0
    left: int = 0
    gap: float = 0.0
    rebuild_peak: int | None = None
    cached: int = 0
    held: int = 0
    variant: Variant | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Of a compiled stage, what each option is."""
        return tuple(each.variant for each in (self.whole, *self.options) if each.variant is not None)

    @property
    def whole(self) -> OptionCost:
        """The option that keeps all."""
        peaks = self.keeping_peak, self.backward_peak
        return OptionCost(
            frozenset(),
            0.0,
            *peaks,
            "all",
            rebuild_peak=self.rebuild_peak,
            kept=self.kept,
            variant=self.variant,
        )


Enter = Callable[[int, Tensor], Tensor]
REPEATS = 5  # timed runs of a stage


@dataclass(slots=True)
class StageRun:
    """How to run a stage in isolation.

    Attributes:
        run: returns the outputs, in the caller's grad mode. Every tensor argument that requires grad and is
            no parameter passes through the given function (position, tensor) -> tensor.
        reset: restores the gradients of parameters after a run (``fresh_grads``).
        loss: for the last stage, finds the loss among the outputs (None if it is not there).
        lasting: identities of storages that live on anyway, so that saved tensors on them need no replay.
        unread: the outputs that get no gradient.
        layouts: strides of the gradient that each output gets, where they are known. A kernel that wants
            another layout makes a copy.
        held: indices of outputs that stay live through the backward because the user holds them.
        waiting: parameters of which shares of the gradient, from stages reversed before, wait in the engine.
            Those of this stage are added to them one by one; the waiting ones are not counted.
        reversing: whether it calls autograd.grad itself: nothing is dropped before it is over.
    """

    run: Callable[[Enter], Sequence[Tensor]]
    reset: Callable[[], None]
    loss: Callable[[Sequence[Tensor]], Tensor | None] | None = None
    lasting: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    layouts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    held: frozenset[int] = frozenset()
    waiting: Sequence[nn.Parameter] = ()
    reversing: bool = False


def fresh_grads(parameters: Iterable[nn.Parameter], existing: Collection[nn.Parameter]) -> Callable[[], None]:
    """Set gradients as a step finds them, now and at each call: zeros where they exist already, else None.

    Where a gradient exists, autograd adds to it and releases the addend at once; else the addend stays.
    """
    standing = {p: torch.zeros_like(p) if p in existing else None for p in parameters}

    def reset() -> None:
        for parameter, grad in standing.items():
            parameter.grad = grad

    reset()
    return reset


def as_leaf(_: int, tensor: Tensor) -> Tensor:
    """Return the tensor as a leaf of its own that requires grad."""
    return tensor.detach().requires_grad_()


class _Sink(torch.autograd.Function):
    """Identity; backward notes the gradient that arrives, and holds it as the engine would."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, position: int, arrived: dict[int, Tensor]) -> Tensor:
        ctx.position, ctx.arrived = position, arrived
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.arrived[ctx.position] = grads[0]
        return None, None, None


class _Seed(torch.autograd.Function):
    """Holds nothing forward; backward makes the gradients of the outputs, owned by the engine alone."""

    @staticmethod
    def forward(ctx: Any, strides: Sequence[tuple[int, ...] | None], *outputs: Tensor) -> Tensor:
        ctx.shapes = [(t.shape, s, t.dtype, t.device) for t, s in zip(outputs, strides, strict=True)]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *(
            torch.ones(shape, dtype=dtype, device=device)
            if stride is None
            else torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)
            for shape, stride, dtype, device in ctx.shapes
        )


class _Waiting(torch.autograd.Function):
    """Identity; backward also makes gradients of parameters, owned by the engine until others are added."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return seed.view_as(seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.parameters)
        return grads[0], *made


def seed_gradients(
    outputs: Mapping[int, Tensor], layouts: Mapping[int, tuple[int, ...]]
) -> tuple[Tensor | None, int]:
    """Return something to reverse that reaches all outputs, and the bytes of their gradients."""
    grad = {i: t for i, t in outputs.items() if t.requires_grad}
    if not grad:
        return None, 0
    strides = [layouts.get(i) for i in grad]
    seed: Tensor = _Seed.apply(strides, *grad.values())
    return seed, sum(t.numel() * t.element_size() for t in grad.values())


def root_of(stage: StageRun, outputs: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """Return the tensor to reverse, and the bytes of the gradients that reach the outputs."""
    root = stage.loss(outputs) if stage.loss is not None else None
    if root is not None:
        return root, 4
    return seed_gradients({i: t for i, t in enumerate(outputs) if i not in stage.unread}, stage.layouts)


def unowned(tensor: Tensor) -> Tensor:
    """Return a tensor that a pack hook may hold without making a node own its own output."""
    return tensor if tensor.is_leaf else tensor.detach()


def never(_: Any) -> Tensor:
    """Refuse to unpack."""
    raise RuntimeError("a dropped saved tensor was asked for while measuring")


@contextmanager
def saving(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor] = never) -> Iterator[None]:
    """Run a forward in grad mode, its saved tensors given to ``pack``."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(shielded(pack), unpack):
        yield


def both_ways(
    stage: StageRun, hooks: AbstractContextManager[None], mark: Callable[[], None]
) -> tuple[int, dict[int, Tensor]]:
    """Run a stage forward within ``hooks``, then backward; ``mark`` is called in between.

    Returns:
        bytes of the gradients of its outputs; the gradient of each argument that gets one.
    """
    arrived: dict[int, Tensor] = {}

    def sink(position: int, tensor: Tensor) -> Tensor:
        result: Tensor = _Sink.apply(as_leaf(position, tensor), position, arrived)
        return result

    with hooks:
        outputs = stage.run(sink)
        seed, output_grads = root_of(stage, outputs)
        held = [outputs[i] for i in stage.held]
        del outputs
        if stage.waiting and seed is not None and seed.requires_grad:
            seed = _Waiting.apply(seed, *stage.waiting)
    mark()
    if seed is not None and seed.requires_grad:
        reverse(seed)
    del seed, held
    return output_grads, arrived


class _Stop(Exception):
    """Raised by the pack hook when the last saved tensor has been made."""


def rebuild_peak(
    run: Callable[[Enter], Sequence[Tensor]], wanted: Callable[[int, Tensor], bool], device: Device
) -> int:
    """Return the most bytes above the inputs while a stage runs again, to the last saved tensor wanted.

    Without autocast's cache, as executors do it: a weight that is used twice is cast twice.

    Args:
        run: see ``StageRun``.
        wanted: told the number of a saved tensor and the tensor.
    """
    last = count = 0

    def look(tensor: Tensor) -> None:
        nonlocal last, count
        count += 1
        if wanted(count - 1, tensor):
            last = count

    with uncached(), saving(look):
        run(as_leaf)
    if not last:
        return 0

    def again(_: Callable[[], None]) -> None:
        filled: list[Tensor] = []
        passed = 0

        def fill(tensor: Tensor) -> None:
            nonlocal passed
            passed += 1
            if wanted(passed - 1, tensor):
                filled.append(tensor.detach())
            if passed == last:
                raise _Stop

        with suppress(_Stop), saving(fill):
            run(as_leaf)

    with uncached():
        return count_bytes(again, device, slack=False).peak


def cached_casts(run: Callable[[], Any], device: Device) -> int:
    """Return bytes of cast weights that autocast's cache holds once something has run.

    Args:
        run: leaves among its inputs that require grad are weights to autocast, and count.
    """
    if isinstance(device, Target) or not torch.is_autocast_enabled(device.type):
        return 0

    def step(_: Callable[[], None]) -> None:
        with saving(lambda _: None, lambda _: torch.empty(0)):
            run()

    torch.clear_autocast_cache()
    cached = count_bytes(step, device, slack=False).end
    torch.clear_autocast_cache()
    return cached


def measure_stage(stage: StageRun, device: Device, *, clock: bool = True) -> StageCost:
    """Run a stage a few times and count.

    Args:
        clock: False to count bytes only; then the seconds are 0.
    """
    output_grads = 0
    input_grads: list[tuple[int, int, int]] = []

    def dropping(mark: Callable[[], None]) -> None:
        with saving(unowned, lambda tensor: tensor) if stage.reversing else saving(lambda _: None):
            outputs = stage.run(as_leaf)
            root = stage.loss(outputs) if stage.loss is not None else None
            graph = [output.grad_fn for output in outputs if isinstance(output, Tensor)]
            del outputs, root
        mark()
        del graph

    def keeping(mark: Callable[[], None]) -> None:
        nonlocal output_grads
        asked = True  # not before all has run

        def unpack(tensor: Tensor) -> Tensor:
            nonlocal asked
            if not asked and storage_key(tensor) not in stage.lasting:
                asked = True
                mark()
            return tensor

        def ran() -> None:
            nonlocal asked
            mark()
            asked = False

        output_grads, arrived = both_ways(stage, saving(unowned, unpack), ran)
        input_grads[:] = [
            (position, storage_key(grad) or 0, allocated(held_bytes(grad), device))
            for position, grad in arrived.items()
            if grad is not None
        ]
        arrived.clear()
        stage.reset()

    if not isinstance(device, Target):
        keeping(lambda: None)  # warm-up: lazy initialisation, workspaces
    # Before the others: on the CPU a state of the run before, which this one releases, would hide its own.
    kept = count_bytes(keeping, device, slack=False)
    dropped = count_bytes(dropping, device, slack=False)
    keeping_peak, stays = kept.peaks[0], kept.marks[0]
    if torch.is_autocast_enabled(device.type):
        with uncached():  # as in a re-run, which saves each cast of a weight that is used twice
            twice = count_bytes(keeping, device, slack=False)
        keeping_peak, stays = max(keeping_peak, twice.peaks[0]), max(stays, twice.marks[0])
    again = keeping_peak
    if not stage.reversing:
        again = rebuild_peak(stage.run, lambda _, tensor: storage_key(tensor) not in stage.lasting, device)
    waiting = sum(allocated(p.numel() * p.element_size(), device) for p in stage.waiting)
    lead = max(0, kept.marks[1] - kept.marks[0] - output_grads - waiting) if len(kept.marks) > 1 else None
    return StageCost(
        *(_time(stage, device) if clock else (0.0, 0.0)),
        dropped.peak,
        keeping_peak,
        max(0, *(peak - waiting for peak in kept.peaks[1:])),
        output_grads,
        lead,
        tuple(input_grads),
        kept=stays,
        left=max(0, kept.end),
        rebuild_peak=again,
        held=0 if stage.reversing else max(0, dropped.marks[0] - max(0, kept.end)),
    )


def _time(stage: StageRun, device: Device) -> tuple[float, float]:
    """Return median seconds of the forward and the backward.

    Of ``REPEATS`` runs; of up to ten times as many while they take under 50 ms in all, and of as few as three
    if those take over 3 s. Of just as many where torch.distributed is initialised.
    """
    seconds: list[list[float]] = []
    started = time.perf_counter()
    # On many ranks the clock must not decide how often: a stage may have collectives within.
    together = is_distributed()
    for done in range(REPEATS if together else 10 * REPEATS):
        if done >= REPEATS and time.perf_counter() - started > 0.05:
            break
        spans = Spans(device)
        with torch.enable_grad():
            with spans.span():
                outputs = stage.run(as_leaf)
            seed, _ = root_of(stage, outputs)
            del outputs
        with spans.span():
            if seed is not None and seed.requires_grad:
                reverse(seed)
        seconds.append(spans.seconds())
        del seed
        stage.reset()
        if done >= 2 and not together and time.perf_counter() - started > 3.0:
            break
    forward, backward = map(statistics.median, zip(*seconds, strict=True))
    return forward, backward
