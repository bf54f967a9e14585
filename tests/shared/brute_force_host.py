"""Slow, literal definitions of plans with a second memory."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from itertools import count

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.host import HostMemory
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    Forward,
    Free,
    FreeHost,
    FreeSaved,
    Keep,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
    Schedule,
)
from tests.shared.brute_force import State, live, step

Item = tuple[str, int]
# (the state of one level, kept (stage, option) pairs that are on the host alone, items on the host)
HostState = tuple[State, frozenset[tuple[int, int]], frozenset[Item]]


def item_bytes(chain: Chain, options: dict[int, int], item: Item) -> int:
    """Bytes of a copy; ``options`` are those of the kept stages."""
    what, i = item
    return chain.input_bytes(i) if what == "boundary" else chain.stages[i].options[options[i]].saved


def host_step(  # noqa: C901 - one case per action
    chain: Chain, host: HostMemory, state: HostState, action: Action
) -> tuple[float, int, HostState] | None:
    """Seconds of the action with synchronous copies, most bytes live in it, the state after it; or None."""
    here, away, there = state
    left, held, kept, working, ran = here
    options = dict(kept | away)

    def used(items: frozenset[Item]) -> int:
        return sum(item_bytes(chain, options, item) for item in items)

    if isinstance(action, (Forward, Checkpoint, Keep, Backward, Free)):
        if isinstance(action, (Forward, Checkpoint, Keep)) and action.stage in dict(away):
            return None
        outcome = step(chain, here, action)
        if outcome is None:
            return None
        gone = (
            {("saved", action.stage), ("boundary", action.stage)} if isinstance(action, Backward) else set()
        )
        return outcome[0], outcome[1], (outcome[2], away, there - gone)
    saved = isinstance(action, (OffloadSaved, PrefetchSaved, FreeSaved))
    i = action.stage if isinstance(action, (OffloadSaved, PrefetchSaved, FreeSaved)) else action.boundary
    item = ("saved" if saved else "boundary", i)
    pair = frozenset([(i, options[i])]) if i in options else frozenset()
    seconds = 0.0
    if isinstance(action, (Offload, OffloadSaved)):
        if item in there or not (i in dict(kept) if saved else i in held):
            return None
        if used(there | {item}) > host.capacity:
            return None
        seconds = host.write_seconds(item_bytes(chain, options, item))
        there |= {item}
    elif isinstance(action, FreeHost):
        if item not in there:
            return None
        there -= {item}
    elif isinstance(action, Prefetch):
        if i in held or i - 1 in dict(kept) or i == working or i >= left:
            return None
        if item not in there and ("saved", i - 1) not in there:
            return None
        held |= {i}
        seconds = host.read_seconds(chain.input_bytes(i))
    elif isinstance(action, PrefetchSaved):
        if i not in dict(away):
            return None
        away, kept = away - pair, kept | pair
        seconds = host.read_seconds(item_bytes(chain, options, item))
    else:
        if i not in dict(kept) or item not in there:
            return None
        away, kept = away | pair, kept - pair
        held |= {i + 1} if i + 1 < left else set()
    after = (left, held, kept, working, ran)
    return seconds, live(chain, after), (after, away, there)


def start_of(chain: Chain) -> HostState:
    """Before the first action."""
    return (len(chain), frozenset([0]), frozenset(), None, 0), frozenset(), frozenset()


def host_replay(
    chain: Chain, host: HostMemory, actions: Schedule
) -> tuple[float, tuple[int, ...], tuple[int, ...], int] | None:
    """``replay`` by ``host_step``, and the host's peak."""
    state = start_of(chain)
    seconds, host_peak = 0.0, 0
    during, after = [], []
    for action in actions:
        outcome = host_step(chain, host, state, action)
        if outcome is None:
            return None
        seconds, state = seconds + outcome[0], outcome[2]
        during.append(outcome[1])
        after.append(live(chain, state[0]))
        options = dict(state[0][2] | state[1])
        host_peak = max(host_peak, sum(item_bytes(chain, options, item) for item in state[2]))
    return (seconds, tuple(during), tuple(after), host_peak) if state[0][0] == 0 else None


def every_action(chain: Chain) -> list[Action]:
    """Each action that a schedule of the chain could have."""
    actions: list[Action] = []
    for i, stage in enumerate(chain.stages):
        actions += [Forward(i), Checkpoint(i), Backward(i), Free(i)]
        actions += [Keep(i, k) for k in range(len(stage.options))]
        actions += [kind(i) for kind in COPY_ACTIONS]
    return actions


def _next(chain: Chain, state: HostState, rng: random.Random) -> Action:
    """An action that brings the next backward closer; there is one as long as x_0 is somewhere."""
    (left, held, pairs, working, _), gone, there = state
    kept, away = dict(pairs), dict(gone)
    i = left - 1
    if i in away:
        return PrefetchSaved(i)
    if i in kept and (i in held or i - 1 in kept):
        return Backward(i)
    target = i - 1 if i in kept else i  # to be kept, so that x_i is there
    if i in kept and i != working and (("boundary", i) in there or target in away):
        return Prefetch(i)
    if target in away:
        return PrefetchSaved(target)
    for i in range(target, -1, -1):
        if i in held or i - 1 in kept or working == i:
            ways: list[Action] = [Keep(i, rng.randrange(len(chain.stages[i].options)))]
            if i < target and chain.stages[i].recomputable:
                ways += [Forward(i), Checkpoint(i)]
            return rng.choice(ways)
        if ("boundary", i) in there or i - 1 in away:
            return Prefetch(i)
    raise AssertionError("x_0 is nowhere")


def legal_walk(chain: Chain, host: HostMemory, seed: int, *, in_order: bool = False) -> tuple[Action, ...]:
    """A random legal schedule: up to twenty actions of any kind among those that lead to the end.

    Args:
        in_order: the detours run no stage again before all have run, as executors have it.
    """
    rng = random.Random(seed)
    state = start_of(chain)
    actions: list[Action] = []
    detours = rng.randrange(21)
    while state[0][0]:
        action = _next(chain, state, rng)
        if detours and rng.random() < 0.6:
            detours -= 1
            others = [
                other
                for other in every_action(chain)
                if host_step(chain, host, state, other)
                and not (other == Free(0) and ("boundary", 0) not in state[2])
                and not (other == FreeHost(0) and 0 not in state[0][1])
                and not (
                    in_order
                    and isinstance(other, (Forward, Checkpoint, Keep, Backward))
                    and state[0][4] < len(chain)
                    and other.stage != state[0][4]
                )
                # What may run only once is kept when it runs.
                and not (
                    isinstance(other, (Forward, Checkpoint)) and not chain.stages[other.stage].recomputable
                )
            ]
            kinds = sorted({type(other) for other in others}, key=lambda kind: kind.__name__)
            kind = rng.choice(kinds) if kinds else None
            action = rng.choice([other for other in others if type(other) is kind] or [action])
        outcome = host_step(chain, host, state, action)
        assert outcome is not None
        state = outcome[2]
        actions.append(action)
    return tuple(actions)


def overlapped_seconds(chain: Chain, host: HostMemory, schedule: Schedule) -> float:  # noqa: C901 - one case per action
    """Seconds of a legal schedule with asynchronous copies: for each action and copy, when it is over.

    Each is over its own duration after the last of what it waits for; all of that is looked up anew.
    """
    now = 0.0
    log: list[tuple[str, Item, float]] = []  # "write" or "read", of what, when it is over
    sources: list[Item] = []  # of each entry of the log, for reads
    device: set[Item] = {("boundary", 0)}
    options: dict[int, int] = {}

    def over(kind: str, item: Item) -> float:
        return max((end for k, what, end in log if k == kind and what == item), default=0.0)

    def channel(kind: str) -> float:
        return max((end for k, _, end in log if k == kind), default=0.0)

    def reads_out_of(item: Item) -> float:
        return max(
            (e for (k, _, e), s in zip(log, sources, strict=True) if k == "read" and s == item), default=0.0
        )

    def let_go(item: Item) -> float:
        return max(over("write", item), over("read", item), reads_out_of(item))

    def needs(i: int) -> float:
        there = [item for item in (("boundary", i), ("saved", i - 1)) if item in device]
        return min((over("read", item) for item in there), default=0.0)

    for action in schedule:
        if isinstance(action, (Forward, Checkpoint, Keep)):
            i = action.stage
            now = max(now, needs(i)) + chain.stages[i].forward
            if isinstance(action, (Checkpoint, Keep)) and ("saved", i - 1) not in device:
                device.add(("boundary", i))
            if isinstance(action, Keep):
                device.add(("saved", i))
                options[i] = action.option
        elif isinstance(action, Backward):
            i = action.stage
            own: list[Item] = [("saved", i), ("boundary", i)]
            now = max(now, over("read", own[0]), needs(i))
            now += chain.stages[i].backward + chain.stages[i].options[options[i]].recompute
            now = max(now, *map(let_go, own))
            device -= set(own)
        elif isinstance(action, (Free, FreeHost, FreeSaved)):
            item = ("saved", action.stage) if isinstance(action, FreeSaved) else ("boundary", action.boundary)
            now = max(now, let_go(item))
            if not isinstance(action, FreeHost):
                device.discard(item)
            else:
                keep = [index for index, entry in enumerate(log) if entry[:2] != ("write", item)]
                log, sources = [log[k] for k in keep], [sources[k] for k in keep]
            if isinstance(action, FreeSaved):
                device.add(("boundary", action.stage + 1))
        else:
            saved = isinstance(action, (OffloadSaved, PrefetchSaved))
            i = action.stage if isinstance(action, (OffloadSaved, PrefetchSaved)) else action.boundary
            item = ("saved" if saved else "boundary", i)
            size = item_bytes(chain, options, item)
            source = item
            if isinstance(action, (Offload, OffloadSaved)):
                end = max(now, channel("write"), over("read", item)) + host.write_seconds(size)
                log.append(("write", item, end))
            else:
                if not any(entry[:2] == ("write", item) for entry in log):
                    source = ("saved", i - 1)
                end = max(now, channel("read"), over("write", source)) + host.read_seconds(size)
                log.append(("read", item, end))
                device.add(item)
            sources.append(source)
    return now


def fastest_of_all_with_host(chain: Chain, budget: int, host: HostMemory) -> float:
    """Least seconds of any sequence of legal actions within both budgets, copies synchronous, by Dijkstra."""
    everything = every_action(chain)
    start = start_of(chain)
    best: dict[HostState, float] = {start: 0.0}
    tie = count()
    queue: list[tuple[float, int, HostState]] = [(0.0, next(tie), start)]
    while queue:
        seconds, _, state = heapq.heappop(queue)
        if state[0][0] == 0:
            return seconds
        if seconds > best[state]:
            continue
        for action in everything:
            outcome = host_step(chain, host, state, action)
            if outcome is None or outcome[1] > budget:
                continue
            total = seconds + outcome[0]
            if total < best.get(outcome[2], math.inf):
                best[outcome[2]] = total
                heapq.heappush(queue, (total, next(tie), outcome[2]))
    return math.inf


def two_level_schedules(chain: Chain) -> Iterator[Schedule]:  # noqa: C901 - a literal enumeration
    """Every schedule of the class of ``rematplan.scheduler.solvers.two_level``, its copies synchronous."""
    last = len(chain) - 1

    def again(s: int, t: int) -> Iterator[tuple[Action, ...]]:
        if s > t:
            yield ()
            return
        for k in range(len(chain.stages[s].options)):
            yield from ((Keep(s, k), *rest, Backward(s)) for rest in again(s + 1, t))
        for j in range(s + 1, t + 1):
            if all(stage.recomputable for stage in chain.stages[s:j]):
                run: list[Action] = [Checkpoint(s), *(Forward(i) for i in range(s + 1, j))]
                yield from ((*run, *right, *left) for right in again(j, t) for left in again(s, j - 1))

    def sweep(s: int, before: str) -> Iterator[tuple[Action, ...]]:  # noqa: C901 - a literal enumeration
        """``before``: the saved tensors of stage s-1, with x_s, are "here", "gone", or "none" (not kept)."""
        if s > last:
            yield ()
            return
        # (right after stage s has run, before it is reversed or run again)
        ways: list[tuple[tuple[Action, ...], tuple[Action, ...]]] = [((), ())]
        if before == "none" and s < last:
            ways.append(((Offload(s), Free(s)), (Prefetch(s),)))
        if before == "gone" and s < last:
            ways += [((Free(s),), (Prefetch(s),)), ((Free(s),), (PrefetchSaved(s - 1),))]
        for go, back in ways:
            for k in range(len(chain.stages[s].options)):
                for rest in sweep(s + 1, "here"):
                    yield (Keep(s, k), *go, *rest, *back, Backward(s))
                if s < last:
                    off: list[Action] = [OffloadSaved(s), FreeSaved(s)]
                    for rest in sweep(s + 1, "gone"):
                        own = [] if PrefetchSaved(s) in rest else [PrefetchSaved(s)]
                        yield (Keep(s, k), *go, *off, *rest, *own, *back, Backward(s))
            for j in range(s + 1, last + 1):
                if all(stage.recomputable for stage in chain.stages[s:j]):
                    for right in sweep(j, "none"):
                        for left in again(s, j - 1):
                            run = [Forward(i) for i in range(s + 1, j)]
                            yield (Checkpoint(s), *go, *run, *right, *back, *left)

    return (Schedule(actions) for actions in sweep(0, "none"))
