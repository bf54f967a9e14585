"""Schedules, and the one referee that judges them all.

A schedule is inert data: a tuple of actions. ``simulate`` is the only place that says what an action
means for memory and time; no solver's own bookkeeping counts.

The words, for stage i with input x_i:

* ``Forward(i)`` is read as: run stage i without keeping its saved tensors; x_i goes unless it is held.
* ``Checkpoint(i)`` is read as: run stage i without keeping its saved tensors, and hold on to x_i.
* ``Keep(i, k)`` is read as: run stage i keeping what its option k keeps, and hold on to x_i. A run again just before
  ``Backward(i)`` stops when all that is kept is there.
* ``Backward(i)`` is read as: reverse stage i; its saved tensors, the gradient of x_{i+1} and a held
  x_i are let go; the gradient of x_i is there.
* ``Free(i)`` is read as: let go of the held x_i before its stage is reversed.

Memory rules. Live bytes are the chain's fixed bytes, held boundaries, kept saved tensors, the working
boundary, the gradient at hand, and what the reversed stages retain (parameter gradients, long-lived
values). x_{i+1} lies inside the saved tensors of a kept stage i and costs nothing on top. x_0 is held
from the start. The gradient of x_L appears once stage L-1 has run.

With a second memory, the host (``HostMemory``), there are words for copies between the two:

* ``Offload(i)`` is read as: start to copy the held x_i to the host; the device copy stays.
* ``Free(i)`` lets go of the device copy alone, ``FreeHost(i)`` of the one on the host.
* ``Prefetch(i)`` is read as: claim the bytes of x_i on the device, start to copy it there, and hold it. It
  comes from its own copy on the host, or else out of that of the saved tensors of stage i-1.
* ``OffloadSaved(i)`` is read as: start to copy the saved tensors of the kept stage i to the host.
* ``FreeSaved(i)`` is read as: let go of their device copy. x_{i+1}, which lies inside, stays and is held
  until its stage is reversed, or until ``Free(i+1)``.
* ``PrefetchSaved(i)`` is read as: claim their bytes on the device and start to copy them back.

The device bytes of a copy being written stay until it is freed; those of a copy being read count from its
prefetch on. ``Backward(i)`` lets go of what the host has of x_i and of the saved tensors of stage i. Copies
of each direction are served in order. An action that needs what is being read waits for it; a read waits
for the write of what it reads; and what lets go of a copy, on either side, waits for the copying of it. Bytes
of a schedule that copies are counted by sums, those of ``host.apart``, even if the chain knows its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.actions import (
    COPY_ACTIONS,
    Action,
    Backward,
    Checkpoint,
    CopyAction,
    DeviceAction,
    Forward,
    Free,
    FreeHost,
    FreeSaved,
    IllegalAction,
    Keep,
    Offload,
    OffloadSaved,
    Prefetch,
    PrefetchSaved,
    Schedule,
    has_copies,
)
from scheduler.chain import Chain
from scheduler.host import Copies, HostMemory, Item, apart
from scheduler.storages import bytes_of

__all__ = [
    "COPY_ACTIONS",
    "Action",
    "Backward",
    "Checkpoint",
    "DeviceAction",
    "Forward",
    "Free",
    "FreeHost",
    "FreeSaved",
    "IllegalAction",
    "Keep",
    "Offload",
    "OffloadSaved",
    "Prefetch",
    "PrefetchSaved",
    "Schedule",
    "Timeline",
    "simulate",
]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the referee saw.

    Attributes:
        seconds: of the whole step.
        peak: the most bytes live at once, ``chain.fixed`` included.
        live: (actions,) bytes live after each action.
        during: (actions,) the most bytes live while each action runs.
        runs: (L,) how often each stage ran forward.
        peak_action: index of the action during which the peak is reached.
        host_peak: the most bytes on the host at once.
        stall: seconds, of ``seconds``, in which the device computed nothing because of a copy.
    """

    seconds: float
    peak: int
    live: tuple[int, ...]
    during: tuple[int, ...]
    runs: tuple[int, ...]
    peak_action: int
    host_peak: int = 0
    stall: float = 0.0


def simulate(chain: Chain, schedule: Schedule | Iterable[Action], host: HostMemory | None = None) -> Timeline:
    """Carry out ``schedule`` on ``chain`` by the memory rules above. The one referee.

    Args:
        chain: what each stage costs.
        schedule: the actions.
        host: the second memory, for a schedule that copies to it.

    Returns:
        the Timeline: seconds, bytes, runs.

    Raises:
        IllegalAction: an action that cannot be carried out (one that the host has no room for among them), or
            something left over at the end.
        ValueError: the schedule copies to a host, and there is none.
    """
    actions = tuple(schedule)
    if has_copies(actions):  # of whole boundaries, and of all that a stage keeps
        chain = apart(chain)
    stages = chain.stages
    count = len(stages)
    held: dict[int, int] = {0: stages[0].input}
    kept: dict[int, int] = {}
    away: dict[int, int] = {}  # kept stages whose saved tensors are on the host alone
    copies = None if host is None else Copies(host)
    working: int | None = None  # a boundary that is neither held nor inside a kept stage
    runs = [0] * count
    to_reverse = count - 1
    base = chain.fixed + stages[0].input  # fixed, held, kept and long-lived bytes
    gradient = 0
    seconds = 0.0
    live: list[int] = []
    during: list[int] = []

    for index, action in enumerate(actions):
        working_bytes = chain.input_bytes(working) if working is not None else 0
        if isinstance(action, Backward):
            i = action.stage
            if not 0 <= i < count:
                raise IllegalAction(index, action, f"there is no such stage; stages are 0..{count - 1}")
            if i != to_reverse:
                raise IllegalAction(
                    index,
                    action,
                    "all stages are reversed"
                    if to_reverse < 0
                    else f"stage {to_reverse} is to be reversed next",
                )
            if i not in kept:
                first = f"PrefetchSaved({i})" if i in away else f"Keep({i})"
                raise IllegalAction(
                    index, action, f"the saved tensors of stage {i} are not there; {first} first"
                )
            if i not in held and i - 1 not in kept:
                raise IllegalAction(index, action, f"x_{i} is neither held nor inside the kept stage {i - 1}")
            stage, option = stages[i], stages[i].options[kept[i]]
            peak = base + working_bytes + gradient + stage.input_grad + option.backward_overhead
            if copies is not None:
                seconds = copies.use(seconds, ("saved", i))
                seconds = copies.use(seconds, *_sources(i, held, kept))
            seconds += stage.backward + option.recompute
            if copies is not None:
                seconds = copies.drop(copies.drop(seconds, ("saved", i)), ("boundary", i))
            base += stage.retained - option.saved - held.pop(i, 0)
            del kept[i]
            gradient = stage.input_grad if i else 0
            to_reverse -= 1
            left = base + working_bytes + gradient
            if i - 1 in kept:
                # x_i lies inside stage i-1, whose backward is next and says how much of it is left.
                before = stages[i - 1]
                left += min(0, before.input_grad + before.options[kept[i - 1]].backward_overhead)
            during.append(max(peak, left))
            live.append(left)
            continue
        if isinstance(action, Free):
            if action.boundary not in held:
                raise IllegalAction(index, action, f"x_{action.boundary} is not held")
            base -= held.pop(action.boundary)
            if copies is not None:
                seconds = copies.settle(seconds, ("boundary", action.boundary))
            during.append(base + working_bytes + gradient)
            live.append(base + working_bytes + gradient)
            continue
        if not isinstance(action, (Forward, Checkpoint, Keep)):
            if copies is None:
                raise ValueError(
                    f"simulate: action {index}, {action}, copies between device and host; pass host=HostMemory(...)"
                )
            why, seconds, change = _copy(
                chain, action, copies, seconds, held, kept, away, to_reverse, working
            )
            if why:
                raise IllegalAction(index, action, why)
            base += change
            during.append(base + working_bytes + gradient)
            live.append(base + working_bytes + gradient)
            continue

        i = action.stage
        if not 0 <= i < count:
            raise IllegalAction(index, action, f"there is no such stage; stages are 0..{count - 1}")
        stage = stages[i]
        if i > to_reverse:
            raise IllegalAction(index, action, f"stage {i} is reversed already")
        if i in kept or i in away:
            raise IllegalAction(index, action, f"stage {i} is kept already")
        if runs[i] and not stage.recomputable:
            raise IllegalAction(index, action, f"stage {i} may run only once")
        inside = i - 1 in kept
        if i not in held and not inside and working != i:
            raise IllegalAction(
                index, action, f"x_{i} is not there: neither held, nor kept, nor just computed"
            )
        if working is not None and working != i:
            working, working_bytes = None, 0  # superseded: this run starts from another boundary
        if copies is not None:
            seconds = copies.use(seconds, *_sources(i, held, kept))
        again = runs[i] > 0 and actions[index + 1 : index + 2] == (Backward(i),)
        if not runs[i]:
            base += stage.carried
        runs[i] += 1
        seconds += stage.forward
        if isinstance(action, (Checkpoint, Keep)) and working == i:
            held[i] = working_bytes
            base += working_bytes
            working, working_bytes = None, 0
        if isinstance(action, Keep):
            if not 0 <= action.option < len(stage.options):
                raise IllegalAction(index, action, f"stage {i} has {len(stage.options)} options")
            option = stage.options[action.option]
            kept[i] = action.option
            base += option.saved
            during.append(base + gradient + option.transient(again=again))
            working, working_bytes = None, 0
        else:
            produced = chain.input_bytes(i + 1)
            during.append(base + working_bytes + gradient + produced + stage.forward_overhead)
            # A second copy of a held boundary is let go at once.
            working, working_bytes = (None, 0) if i + 1 in held else (i + 1, produced)
        if i == count - 1:
            gradient = chain.output_grad
        left = base + working_bytes + gradient
        live.append(min(left, during[-1]) if again else left)

    end = len(live)
    if to_reverse >= 0:
        raise IllegalAction(end, None, f"stage {to_reverse} is not reversed yet")
    if held or kept or working is not None:
        raise IllegalAction(
            end, None, f"left over: held {sorted(held)}, kept {sorted(kept)}, working {working}"
        )
    if chain.values:
        during, live = bytes_of(chain, actions)
    peak_action = max(range(end), key=during.__getitem__)
    used = (copies.peak, copies.stall) if copies else (0, 0.0)
    return Timeline(seconds, max(during), tuple(live), tuple(during), tuple(runs), peak_action, *used)


def _sources(i: int, held: Mapping[int, int], kept: Mapping[int, int]) -> list[Item]:
    """Where on the device x_i is, besides the working boundary."""
    sources: list[Item] = [("boundary", i)] if i in held else []
    return [*sources, ("saved", i - 1)] if i - 1 in kept else sources


def _copy(
    chain: Chain,
    action: CopyAction,
    copies: Copies,
    now: float,
    held: dict[int, int],
    kept: dict[int, int],
    away: dict[int, int],
    to_reverse: int,
    working: int | None,
) -> tuple[str, float, int]:
    """Carry out a word for copies: why it is illegal ("" if it is not), the clock, the change of device bytes."""
    if isinstance(action, (OffloadSaved, PrefetchSaved, FreeSaved)):
        i = action.stage
        item: Item = ("saved", i)
        what = f"the saved tensors of stage {i}"
        here = kept
    else:
        i = action.boundary
        item, what, here = ("boundary", i), f"x_{i}", held
    if isinstance(action, (Offload, OffloadSaved)):
        if i not in here:
            return f"{what} {'are not on the device' if here is kept else 'is not held'}", now, 0
        if item in copies.there:
            return f"{what} {'are' if here is kept else 'is'} on the host already", now, 0
        size = chain.stages[i].options[kept[i]].saved if here is kept else held[i]
        room = copies.host.capacity - copies.used
        if size > room:
            return f"the host has {room} bytes left, and {what} would take {size}", now, 0
        return "", copies.write(now, item, size), 0
    if isinstance(action, FreeHost):
        if item not in copies.there:
            return f"{what} is not on the host", now, 0
        return "", copies.drop(now, item), 0
    if isinstance(action, Prefetch):
        if i in held or i - 1 in kept or i == working:
            return f"{what} is on the device already", now, 0
        source = item if item in copies.there else ("saved", i - 1)
        if source not in copies.there or i > to_reverse:
            return f"{what} is not on the host", now, 0
        held[i] = chain.input_bytes(i)
        return "", copies.read(now, item, held[i], source), held[i]
    if isinstance(action, PrefetchSaved):
        if i not in away:
            return f"{what} are not on the host alone", now, 0
        kept[i] = away.pop(i)
        size = chain.stages[i].options[kept[i]].saved
        return "", copies.read(now, item, size, item), size
    if i not in kept or item not in copies.there:
        return f"{what} are not both on the device and on the host; OffloadSaved({i}) first", now, 0
    away[i] = kept.pop(i)
    change = -chain.stages[i].options[away[i]].saved
    if i + 1 <= to_reverse and i + 1 not in held:
        held[i + 1] = chain.input_bytes(i + 1)
        change += held[i + 1]
    return "", copies.settle(now, item), change
