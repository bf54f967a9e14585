"""Slow, literal definitions, which the solvers and the referee are tested against."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from functools import cache
from itertools import count, zip_longest

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    Forward,
    Free,
    Keep,
    Schedule,
)

# (stages still to reverse, held boundaries, kept (stage, option) pairs, working boundary, stages ever run)
State = tuple[int, frozenset[int], frozenset[tuple[int, int]], int | None, int]


def live(chain: Chain, state: State) -> int:
    """Bytes live in ``state``, by the memory rules of ``rematplan.scheduler.core.referee``, spelled out."""
    left, held, kept, working, ran = state
    total = chain.fixed
    total += sum(chain.input_bytes(i) for i in held)
    total += sum(chain.stages[i].options[k].saved for i, k in kept)
    total += 0 if working is None else chain.input_bytes(working)
    total += sum(stage.carried for stage in chain.stages[:ran])
    total += sum(stage.grad + stage.carried_change for stage in chain.stages[left:])
    if left and ran == len(chain):
        total += chain.grad_bytes(left)
    return total


def left_over(chain: Chain, state: State) -> int:
    """Bytes live in a state that a backward left: a kept output that its own backward ignores is released."""
    left, _, kept, _, _ = state
    chosen = dict(kept)
    if left - 1 not in chosen:
        return live(chain, state)
    stage = chain.stages[left - 1]
    return live(chain, state) + min(0, stage.input_grad + stage.options[chosen[left - 1]].backward_overhead)


def step(chain: Chain, state: State, action: Action) -> tuple[float, int, State] | None:
    """Seconds of the action, most bytes live during it, and the state after it; None if it is illegal."""
    left, held, kept, working, ran = state
    kept_stages = {i for i, _ in kept}
    if isinstance(action, Free):
        after: State = (left, held - {action.boundary}, kept, working, ran)
        return (0.0, live(chain, after), after) if action.boundary in held else None
    if isinstance(action, COPY_ACTIONS):
        return None  # ``brute_force_host.py`` has these
    i = action.stage
    if not 0 <= i < left:
        return None
    stage = chain.stages[i]
    if isinstance(action, Backward):
        if i != left - 1 or i not in kept_stages or not (i in held or i - 1 in kept_stages):
            return None
        option = stage.options[dict(kept)[i]]
        before = live(chain, state) + stage.input_grad + option.backward_overhead
        after = (i, held - {i}, frozenset(pair for pair in kept if pair[0] != i), working, ran)
        return stage.backward + option.recompute, max(before, left_over(chain, after)), after
    if i in kept_stages or not (i in held or i - 1 in kept_stages or working == i):
        return None
    if i < ran and not stage.recomputable:
        return None
    start: State = (left, held, kept, working if working == i else None, max(ran, i + 1))
    # The gradient of x_L is there once the last stage has run, not while it does.
    early = chain.output_grad if ran == i == len(chain) - 1 else 0
    if isinstance(action, Forward):
        peak = live(chain, start) - early + chain.input_bytes(i + 1) + stage.forward_overhead
        return stage.forward, peak, (left, held, kept, None if i + 1 in held else i + 1, start[4])
    if working == i:
        start = (left, held | {i}, kept, None, start[4])
    if isinstance(action, Checkpoint):
        peak = live(chain, start) - early + chain.input_bytes(i + 1) + stage.forward_overhead
        return stage.forward, peak, (left, start[1], kept, None if i + 1 in held else i + 1, start[4])
    if not 0 <= action.option < len(stage.options):
        return None
    after = (left, start[1], kept | {(i, action.option)}, None, start[4])
    return stage.forward, live(chain, after) - early + stage.options[action.option].forward_overhead, after


def replay(chain: Chain, actions: Schedule) -> tuple[float, tuple[int, ...], tuple[int, ...]] | None:
    """Seconds of a schedule, and bytes live during and after each action; None if illegal or incomplete."""
    state: State = (len(chain), frozenset([0]), frozenset(), None, 0)
    seconds = 0.0
    during, after = [], []
    for action, following in zip_longest(actions, tuple(actions)[1:]):
        ahead = isinstance(action, Keep) and action.stage < state[4] and following == Backward(action.stage)
        outcome = step(chain, state, action)
        if outcome is None:
            return None
        seconds, state = seconds + outcome[0], outcome[2]
        taken, left = outcome[1], (left_over if isinstance(action, Backward) else live)(chain, state)
        if isinstance(action, Keep) and ahead:  # it stops when all that is kept is there
            option = chain.stages[action.stage].options[action.option]
            taken += option.transient(again=True) - option.forward_overhead
            left = min(left, taken)
        during.append(taken)
        after.append(left)
    return (seconds, tuple(during), tuple(after)) if state[0] == 0 else None


def _again(chain: Chain, state: State) -> Iterator[tuple[float, int, State] | None]:
    """``step`` for a run just before its own backward, which stops early, and that backward: one move."""
    i = state[0] - 1
    if i >= state[4]:
        return  # a first run
    for number, option in enumerate(chain.stages[i].options):
        kept = step(chain, state, Keep(i, number))
        reversed_ = step(chain, kept[2], Backward(i)) if kept else None
        if kept and reversed_:
            peak = kept[1] + option.transient(again=True) - option.forward_overhead
            yield kept[0] + reversed_[0], max(peak, reversed_[1]), reversed_[2]


def fastest_of_all(chain: Chain, budget: int, *, free: bool = False) -> float:
    """Least seconds of any sequence of legal actions within ``budget``, by Dijkstra; inf if there is none.

    Boundaries may be let go early only if ``free``.
    """
    everything: list[Action] = []
    for i, stage in enumerate(chain.stages):
        everything += [
            Forward(i),
            Checkpoint(i),
            Backward(i),
            *(Keep(i, k) for k in range(len(stage.options))),
        ]
        everything += [Free(i)] if free else []
    start: State = (len(chain), frozenset([0]), frozenset(), None, 0)
    best: dict[State, float] = {start: 0.0}
    tie = count()
    queue: list[tuple[float, int, State]] = [(0.0, next(tie), start)]
    while queue:
        seconds, _, state = heapq.heappop(queue)
        if state[0] == 0:
            return seconds
        if seconds > best[state]:
            continue
        for outcome in [*(step(chain, state, action) for action in everything), *_again(chain, state)]:
            if outcome is None or outcome[1] > budget:
                continue
            total = seconds + outcome[0]
            if total < best.get(outcome[2], math.inf):
                best[outcome[2]] = total
                heapq.heappush(queue, (total, next(tie), outcome[2]))
    return math.inf


def persistent_schedules(chain: Chain) -> Iterator[Schedule]:
    """Every persistent schedule: every tree of keeps and splits."""

    def segment(s: int, t: int) -> Iterator[tuple[Action, ...]]:
        if s > t:
            yield ()
            return
        for k in range(len(chain.stages[s].options)):
            for rest in segment(s + 1, t):
                yield (Keep(s, k), *rest, Backward(s))
        for j in range(s + 1, t + 1):
            advance: list[Action] = [Checkpoint(s), *(Forward(i) for i in range(s + 1, j))]
            if all(stage.recomputable for stage in chain.stages[s:j]):
                for right in segment(j, t):
                    for left in segment(s, j - 1):
                        yield (*advance, *right, *left)

    return (Schedule(actions) for actions in segment(0, len(chain) - 1))


def fastest_persistent(chain: Chain, budget: int) -> float:
    """Least seconds of a persistent schedule: the recurrence, literally, in exact bytes; inf if none fits."""
    stages, last = chain.stages, len(chain) - 1
    final = chain.fixed + sum(stage.carried + stage.retained for stage in stages)
    if final > budget:
        return math.inf

    def long_lived(stage: int, t: int) -> int:
        """Fixed and long-lived bytes while ``stage`` runs forward in a segment that ends at t."""
        if t == last:
            return chain.fixed + sum(s.carried for s in stages[: stage + 1])
        reversed_ = sum(s.retained for s in stages[t + 1 :])
        return chain.fixed + sum(s.carried for s in stages) + reversed_ + chain.grad_bytes(t + 1)

    @cache
    def cost(s: int, t: int, held: int) -> float:
        if s > t:
            return 0.0
        best = math.inf
        stage = stages[s]
        backward = chain.fixed + sum(x.carried for x in stages) + sum(x.retained for x in stages[s + 1 :])
        backward += chain.grad_bytes(s + 1) + stage.input_grad
        for option in stage.options:
            kept = held + option.saved
            transient = option.transient(again=s == t < last)
            if long_lived(s, t) + kept + transient > budget:
                continue
            if backward + kept + option.backward_overhead > budget:
                continue
            best = min(best, stage.forward + stage.backward + option.recompute + cost(s + 1, t, kept))
        for j in range(s + 1, t + 1):
            if not stages[j - 1].recomputable:
                break
            working = chain.input_bytes(j - 1) if j - 1 > s else 0
            produced = chain.input_bytes(j) + stages[j - 1].forward_overhead
            if long_lived(j - 1, t) + held + working + produced > budget:
                break
            again = sum(x.forward for x in stages[s:j])
            best = min(best, again + cost(j, t, held + chain.input_bytes(j)) + cost(s, j - 1, held))
        return best

    return cost(0, last, chain.input_bytes(0))
