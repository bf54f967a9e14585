"""Price persistent schedules in compiled code, for solvers that choose among many ready-made ones.

A *tree* is a persistent schedule of L stages that keeps option 0: the decisions that ``persistent.build``
asks for, in its order. 0 keeps the first stage of the segment, j splits the segment at j. Pricing one takes
some nanoseconds an action, where the referee takes microseconds; the referee judges what is chosen all the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.optimal_peaks import Floats, Ints, arrays_of, compiled
from rematplan.scheduler.solvers.persistent import build, run_ends

__all__ = ["fastest_fit", "schedule_of", "segment_tree", "trees_by_runs"]


class Costs(NamedTuple):
    """The chain for compiled code, with option 0 of every stage."""

    forward: Floats  # (L,) seconds
    kept: Ints  # (L,) bytes that stay when stage i is kept
    boundary: Ints  # (L + 1,) bytes of x_i
    running: Ints  # (L,) bytes above the held ones and x_i while stage i runs and is not kept
    keeping: Ints  # (L,) bytes above the held ones while stage i runs and is kept
    rerunning: Ints  # (L,) the same just before its backward, where that is more
    reversing: Ints  # (L,) bytes above the held ones while stage i is reversed
    first: Ints  # (L,) fixed and long-lived bytes while stage i runs for the first time
    later: Ints  # (L,) the same once stages i+1.. are reversed, with the gradient of x_{i+1}


def _costs(chain: Chain, solver: str) -> Costs:
    """Return the arrays, or a ValueError where sums could overflow them."""
    a = arrays_of(solver, chain)
    saved, later = a.saved[:, 0].copy(), a.after + a.grad[1:]
    return Costs(
        forward=a.forward,
        kept=saved,
        boundary=a.boundary,
        running=a.running,
        keeping=saved + a.forward_overhead[:, 0],
        rerunning=saved + np.maximum(a.forward_overhead, a.rerun_overhead)[:, 0],
        reversing=saved + later + a.grad[:-1] + a.backward_overhead[:, 0],
        first=a.first + a.after[-1],
        later=later,
    )


@compiled
def _price(c: Costs, tree: Ints) -> tuple[float, int]:
    """Return the seconds of all forwards and the peak, but for what the last backward leaves (bytes)."""
    length = c.forward.size
    # Segments s..t still to do, the bytes held meanwhile, and whether their stages run for the first time.
    stack = np.empty((length + 1, 4), np.int64)
    stack[0] = 0, length - 1, c.boundary[0], 1
    runs = np.zeros(length, np.int64)
    depth, peak = 1, 0
    for at in tree:
        depth -= 1
        s, t, held, new = stack[depth]
        if at == 0:
            runs[s] += 1
            # The first run of a stage is before any backward: no gradient yet, and long-lived bytes so far.
            base = c.first[s] if new else c.later[t]
            keeping = c.rerunning[s] if s == t and not new else c.keeping[s]
            peak = max(peak, held + base + keeping, held + c.reversing[s])
            if s < t:
                stack[depth] = s + 1, t, held + c.kept[s], new
                depth += 1
            continue
        for i in range(s, at):
            runs[i] += 1
            here = held + (c.first[i] if new else c.later[t]) + c.running[i]
            peak = max(peak, here + (c.boundary[i] if i > s else 0))
        stack[depth] = s, at - 1, held, 0
        depth += 1
        if at <= t:
            stack[depth] = at, t, held + c.boundary[at], new
            depth += 1
    seconds = 0.0  # added in one order, so that equal runs give equal seconds
    for i in range(length):
        seconds += runs[i] * c.forward[i]
    return seconds, peak


def schedule_of(tree: Ints, length: int) -> Schedule:
    """Return the schedule of ``length`` stages that the tree describes."""
    decisions = ((-1 if at else 0, at) for at in tree.tolist())
    return build(length, lambda s, t: next(decisions))


@compiled
def segment_tree(ends: Ints, again: Ints) -> Ints:
    """Return the tree of a chain cut into segments.

    Args:
        ends: (L,) for each stage, the last stage of its segment.
        again: (L,) 1 for each stage of a segment of which only the input is held, and which is run again,
            keeping all, when it is its turn to be reversed; 0 where the segment is kept as it first runs.
    """
    tree = np.zeros(2 * ends.size, np.int64)
    size = s = 0
    while s < ends.size:
        if again[s]:
            tree[size] = ends[s] + 1
            size += 1
        else:
            size += ends[s] + 1 - s
        s = ends[s] + 1
    # What is run again keeps all: as many zeros as there are stages run again.
    return tree[: size + again.sum()]


def trees_by_runs(
    chain: Chain, subtree: Callable[[int, int], Ints], numbers: Callable[[int], Iterable[int]]
) -> Iterator[Ints]:
    """Yield trees of a chain whose runs of recomputable stages have the tree ``subtree(length, number)``.

    Stages that may run only once are kept; the inputs of the runs between them are held. One tree is made
    for each of ``numbers(length of the longest run)``.
    """
    recomputable = [stage.recomputable for stage in chain.stages]
    ends = run_ends(recomputable)
    head: list[int] = []
    runs: list[tuple[int, int]] = []  # first stage and length
    s = 0
    while s < len(chain):
        after = ends[s] + 1
        if not recomputable[s]:
            head.append(0)
        else:
            runs.insert(0, (s, after - s))  # the last one is at work first
            head += [after] if after < len(chain) else []
        s = after
    for number in numbers(max((length for _, length in runs), default=1)):
        inside = ((start, subtree(length, number)) for start, length in runs)
        shifted = (np.where(tree > 0, tree + start, 0) for start, tree in inside)
        yield np.concatenate([np.array(head, np.int64), *shifted])


def fastest_fit(chain: Chain, budget: int, trees: Iterable[Ints], solver: str) -> Schedule:
    """Return the fastest tree within ``budget`` (bytes); of equals the least peak, then the first.

    Raises:
        InfeasibleBudget: none fits; ``smallest`` is the least of their peaks.
        ValueError: sums of the chain's sizes or seconds overflow.
    """
    costs = _costs(chain, solver)
    # Every backward is followed by an action that costs at least what it leaves behind, except the last.
    left = chain.fixed + sum(stage.carried + stage.retained for stage in chain.stages)
    best: tuple[float, int] | None = None
    found = None
    smallest = None
    for tree in trees:
        seconds, peak = _price(costs, tree)
        peak = max(int(peak), left)
        smallest = peak if smallest is None else min(smallest, peak)
        if peak <= budget and (best is None or (seconds, peak) < best):
            best, found = (seconds, peak), tree
    if smallest is None:
        raise ValueError(f"{solver}: there is no schedule to choose from")
    if found is None:
        raise InfeasibleBudget(budget, smallest, solver)
    return schedule_of(found, len(chain))
