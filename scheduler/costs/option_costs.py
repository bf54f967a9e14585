"""Measure a stage's options: seconds of the ops that run again, and bytes meanwhile.

Ops are timed one by one; ``rematplan.scheduler.solvers.stage_options`` chooses which run again for which
bytes. Every option is then tried on the tensors of the real step, by the code that recomputes it in training
(``recompute.rerun``): an option whose result is not, bit for bit, what autograd saved is left out. Without
data (``Target``) only shapes, dtypes and strides are compared.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.recompute import (
    Rebuild,
    Thinned,
    compile_rebuilds,
    divisible,
    packs_of,
    rerun,
    stage_values,
)
from rematplan.scheduler.costs.meters.clock import Spans
from rematplan.scheduler.costs.meters.peak import allocated, count_bytes
from rematplan.scheduler.costs.roofline import Tally, device_rates
from rematplan.scheduler.costs.stage_run import OptionCost, StageRun, both_ways, rebuild_peak, saving, unowned
from rematplan.scheduler.solvers.stage_options import choices
from rematplan.scheduler.torch_layer.environment import RunContext
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.preserve import RandomState, may_be_seed
from rematplan.scheduler.torch_layer.private import storage_id
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["TimedOps", "makes_again", "measure_options"]

# Options of a stage, the one that keeps all included: each is tried, so the more distinct stages, the fewer.
MOST, LEAST = 8, 4
IN_ALL = 400  # of all distinct stages together
REPEATS, PATIENCE = 5, 0.5  # timed runs, and seconds after which no more of them begin


class TimedOps(fx.Interpreter):
    """Runs a graph op by op and notes the seconds of each, measured or estimated."""

    def __init__(self, module: fx.GraphModule, device: Device, clock: bool) -> None:
        super().__init__(module)
        self.device, self.spans = device, Spans(device) if clock else None
        self.estimates: list[float] = []

    def seconds(self) -> list[float]:
        """Return the seconds of each op, in order."""
        return self.estimates if self.spans is None else self.spans.seconds()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        if n.op != "call_function":
            return super().run_node(n)
        if self.spans is not None:
            with self.spans.span():
                return super().run_node(n)
        with Tally(device_rates(self.device)) as tally:
            result = super().run_node(n)
        self.estimates.append(tally.seconds)
        return result


def measure_options(
    capture: GraphCapture, k: int, run: StageRun, arguments: list[Any], *, clock: bool
) -> tuple[tuple[OptionCost, ...], float]:
    """Return the options of stage k that keep less than all, from the largest to the smallest, and their gap.

    Args:
        run: the stage in isolation.
        arguments: of the stage, as the real step has them.
        clock: whether seconds are measured, not estimated (``roofline.py``).
    """
    most = max(LEAST, min(MOST, IN_ALL // len({stage.signature for stage in capture.stages})))
    stage, device = capture.stages[k], capture.place
    module = getattr(stage.function, "__self__", None)
    if not divisible(capture.graph, capture.linear, k) or not isinstance(module, fx.GraphModule):
        return (), 0.0
    timings: list[list[float]] = []
    began, data = time.perf_counter(), not isinstance(device, Target)
    while not timings or (clock and len(timings) < REPEATS and time.perf_counter() - began < PATIENCE):
        timed = TimedOps(module, device, clock)
        with torch.enable_grad():
            timed.run(*_fresh(capture, k, arguments))
        timings.append(timed.seconds())
    seconds = [statistics.median(times) for times in zip(*timings, strict=True)]
    values = stage_values(capture.graph, capture.linear, k, lambda size: allocated(size, device), seconds)
    packs = packs_of(capture.graph, capture.linear, k)
    position = {group: value for value, group in enumerate(values.groups) if group >= 0}
    random = RandomState(capture.device)
    saved = _saved(capture, k, arguments)
    if len(saved) != len(packs):
        return (), 0.0
    names = [op.node.name for op in capture.graph.ops[capture.linear.cuts[k] : capture.linear.cuts[k + 1]]]
    found: list[OptionCost] = []
    chosen = choices(values.ops, values.values, most=most)
    for choice in chosen.choices[1:]:
        # A storage that no op of the stage makes is always kept.
        gone = {group for group, value in position.items() if value not in choice.kept}
        dropped = frozenset(number for number, pack in enumerate(packs) if pack.group in gone)
        parts = compile_rebuilds(capture.graph, capture.linear, k, stage.argument_names, dropped)
        took = _tried(parts, lambda: _fresh(capture, k, arguments), saved, random, data)
        if not dropped or took is None:
            continue
        keeping, backward, kept = _peaks(capture, k, run, parts, arguments)
        needed = {n for part in parts for n, _ in part.sources} | (set(range(len(packs))) - dropped)

        def wanted(n: int, tensor: Tensor, needed: set[int] = needed) -> bool:
            return n in needed and storage_id(tensor.untyped_storage()) not in run.lasting

        rebuild = rebuild_peak(run.run, wanted, device)
        rerun = tuple(sorted(i for part in parts for i in part.rerun))
        name = _name([names[i] for i in rerun])
        recompute = took if clock else choice.seconds
        found.append(OptionCost(dropped, recompute, keeping, backward, name, rerun, rebuild, kept))
    return tuple(found), chosen.gap


def _name(rerun: Sequence[str]) -> str:
    """Return a name that lists what runs again, by kind of op."""
    kinds = Counter(name.rstrip("0123456789").rstrip("_") for name in rerun)
    return "all but " + ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in kinds.items())


def makes_again(capture: GraphCapture, k: int, arguments: Sequence[Any], dropped: frozenset[int]) -> bool:
    """Whether the packs that an option of stage k drops are recomputed bit for bit.

    Args:
        arguments: of the stage, as the real step has them; the generators are as it begins with them.

    Raises:
        ValueError: no option drops these.
    """
    parts = compile_rebuilds(capture.graph, capture.linear, k, capture.stages[k].argument_names, dropped)
    random = RandomState(capture.device)
    saved = _saved(capture, k, arguments)
    if len(saved) != len(packs_of(capture.graph, capture.linear, k)):
        return False
    found = _tried(parts, lambda: _fresh(capture, k, arguments), saved, random, times=1)
    random.restore()
    return found is not None


def _saved(capture: GraphCapture, k: int, arguments: Sequence[Any]) -> list[Tensor]:
    """Return what autograd saves in a run of stage k."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with saving(pack):
        capture.stages[k].function(*_fresh(capture, k, arguments))
    return saved


def _fresh(capture: GraphCapture, k: int, arguments: Sequence[Any]) -> list[Any]:
    """Return the arguments as a re-run gets them: detached, requiring grad as they did, buffers as copies."""
    fresh = []
    for argument, source in zip(arguments, capture.stages[k].sources, strict=True):
        if source.kind == "buffer":
            fresh.append(argument.clone())
        elif isinstance(argument, Tensor) and source.kind != "parameter":
            fresh.append(argument.detach().requires_grad_(source.requires_grad))
        else:
            fresh.append(argument)
    return fresh


def _tried(
    parts: Sequence[Rebuild],
    fresh: Callable[[], list[Any]],
    saved: list[Tensor],
    random: RandomState,
    data: bool = True,
    times: int = REPEATS,
) -> float | None:
    """Return median seconds of an option's programs; None if they do not give the bits that autograd saved.

    Args:
        random: the generators as the stage begins with them.
        data: whether there are values to compare; without, one run shows that the layouts are the same.
        times: runs, at most.
    """
    took: list[float] = []
    context = RunContext(random.device.type)
    while len(took) < (times if data else 1) and sum(took) < PATIENCE:
        seconds = 0.0
        for part in parts:
            arguments = fresh()
            random.restore()
            kept = [saved[number].detach().requires_grad_(flag) for number, flag in part.sources]
            filled: dict[int, Tensor] = {}
            spans = Spans(random.device)
            try:
                with context.restored(), spans.span():
                    rerun(part, arguments, kept, filled.__setitem__)
            except RuntimeError:  # other ops than before, or fewer: not an option
                return None
            seconds += sum(spans.seconds())
            if not took and filled.keys() != part.dropped:
                return None
            if not took and not all(_equal(filled[n], saved[n], data) for n in filled):
                return None
            del filled
        took.append(seconds)
    return statistics.median(took)


def _equal(a: Tensor, b: Tensor, data: bool) -> bool:
    if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
        return False
    return not data or may_be_seed(a) or equal_bits(a, b)


def _peaks(
    capture: GraphCapture, k: int, run: StageRun, parts: Sequence[Rebuild], arguments: list[Any]
) -> tuple[int, int, int]:
    """Return the most bytes above the inputs in the stage's forward, in its backward, and those kept."""
    context = RunContext(capture.device.type)

    def step(mark: Callable[[], None]) -> None:
        filled: dict[int, Tensor] = {}
        thinned: Thinned[Tensor] = Thinned(parts)
        read = thinned.reads()
        count = 0

        def pack(tensor: Tensor) -> int | Tensor:
            nonlocal count
            number, count = count, count + 1
            if number in thinned.parts and storage_id(tensor.untyped_storage()) not in run.lasting:
                return number
            held = unowned(tensor)
            if number in read:
                thinned.sources[number] = held
            return held

        def unpack(packed: int | Tensor) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if packed not in filled:
                part = thinned.parts[packed]
                kept = [thinned.sources[n].detach().requires_grad_(flag) for n, flag in part.sources]
                with context.restored():
                    rerun(part, _fresh(capture, k, arguments), kept, filled.__setitem__)
                thinned.ran(part)
            return filled.pop(packed)

        both_ways(run, saving(pack, unpack), mark)

    counted = count_bytes(step, capture.place, slack=False)
    run.reset()
    return counted.peaks[0], max(0, *counted.peaks[1:]), counted.marks[0]
