"""Bytes of a schedule, storage by storage, for chains that know which storages their stages keep.

A chain's sums say that the output of a kept stage stays, and that a stage which is kept holds its input. Autograd holds
what it saved and no more: an output that no backward needs goes once the next stage has run, and a value that crosses
several cuts is there once. Here every storage is followed from its making to its end, a storage that is made again
being another one. What is live is the union of what boundaries and kept stages hold; transients are the chain's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from scheduler.actions import Action, Backward, Checkpoint, Forward, Free, Keep
from scheduler.chain import Carried, Chain

__all__ = ["Moment", "Storages", "bytes_of", "follow"]

Copy = tuple[int, int]  # a value, and which run made this copy of it: 1 for all first runs, then 2, 3, ...


@dataclass(slots=True)
class Moment:
    """An action of a schedule has been carried out; sizes in bytes.

    Attributes:
        during: the most bytes live while it ran. live: bytes live after it. Both with all that is the chain's.
        state: what is there only for stages that may run again.
        grads: parameter gradients that exist by now. carried_grads: gradients of carried values. at_hand: of a boundary.
        storages: what is held; it goes on with the next action.
    """

    storages: Storages
    during: int = 0
    live: int = 0
    state: int = 0
    grads: int = 0
    carried_grads: int = 0
    at_hand: int = 0


def bytes_of(chain: Chain, actions: Sequence[Action]) -> tuple[list[int], list[int]]:
    """The most bytes live during each action of a legal schedule, and those live after it, all of the chain's included."""
    moments = [(moment.during, moment.live) for moment in follow(chain, actions)]
    return [during for during, _ in moments], [live for _, live in moments]


def follow(chain: Chain, actions: Sequence[Action]) -> Iterator[Moment]:
    """Carry out a legal schedule; the one Moment is given after each action, brought up to date."""
    stages = chain.stages
    storages = Storages(chain)
    now = Moment(storages)
    fixed = chain.fixed - sum(stage.rerun_state for stage in stages)
    chosen: dict[int, int] = {}
    states: dict[int, int] = {}
    seen: set[int] = set()
    off = [0] * len(stages)  # what the sums take off with each backward, and storages do by themselves
    for each in chain.carried:
        if each.freed is not None:
            off[each.freed] += chain.values[each.value]
    for index, action in enumerate(actions):
        peak = fixed + now.state + now.grads + now.carried_grads + now.at_hand
        if isinstance(action, Backward):
            i = action.stage
            stage, option = stages[i], stages[i].options[chosen.pop(i)]
            made = storages.made_bytes(i, option.keeps)
            peak += storages.reversing(i) + made + stage.input_grad + option.backward_overhead
            storages.reversed(i)
            now.grads += stage.grad
            now.carried_grads += stage.carried_change + off[i]
            now.state -= states.pop(i, 0)
            now.at_hand = stage.input_grad if i else 0
        elif isinstance(action, Free):
            storages.free(action.boundary)
        else:
            assert isinstance(action, (Forward, Checkpoint, Keep))  # the caller has seen to it
            i = action.stage
            stage = stages[i]
            storages.before(i)
            first, whole = i not in seen, isinstance(action, Keep) and not action.option
            again = not first and actions[index + 1] == Backward(i)
            seen.add(i)
            if first and not whole:
                states[i] = stage.rerun_state
                now.state += stage.rerun_state
                peak += stage.rerun_state
            # The last stage's transients do not have what it hands out.
            peak += storages.live + (stage.carried if i == len(stages) - 1 else 0)
            if isinstance(action, Keep):
                chosen[i] = action.option
                option = stage.options[action.option]
                peak += option.saved + option.transient(again=again)
                storages.keep(i, option.keeps, output=not again)
            else:
                peak += chain.input_bytes(i + 1) + stage.forward_overhead
                storages.forward(i, hold=isinstance(action, Checkpoint))
            if first:
                storages.first(i, whole=whole)
            if i == len(stages) - 1:
                now.at_hand = chain.output_grad
        now.live = fixed + now.state + now.grads + now.carried_grads + now.at_hand + storages.live
        now.during = max(peak, now.live)
        yield now


class Storages:
    """What boundaries and kept stages hold while a schedule is carried out.

    The caller has seen that each action is legal. Sizes are in bytes.

    Attributes:
        live: bytes of all storages that are held.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.live = 0
        self._holders: Counter[Copy] = Counter()
        self._held: dict[int, frozenset[Copy]] = {}
        self._kept: dict[int, frozenset[Copy]] = {}
        self._made: dict[
            int, frozenset[Copy]
        ] = {}  # x_i as the kept stage i-1 made it, until stage i is kept
        self._working: tuple[int, frozenset[Copy]] | None = None
        self._reading: dict[int, frozenset[Copy]] = {}  # carried values that wait for the backward of a stage
        self._ran = [False] * len(chain)
        self._runs = 1
        self._first = {each.value: frozenset(((each.value, 1),)) for each in chain.carried}
        self._making: dict[int, list[int]] = {}
        self._readers: dict[int, list[Carried]] = {}
        self._leaving: dict[int, list[int]] = {}
        for each in chain.carried:
            self._making.setdefault(each.made, []).append(each.value)
            if each.freed is not None:
                last = len(chain) - 1 if each.last is None else each.last
                self._leaving.setdefault(last, []).append(each.value)
            for stage in each.readers:
                self._readers.setdefault(stage, []).append(each)
        self._hold(self._held, 0, frozenset((value, 0) for value in chain.stages[0].enters))

    def before(self, stage: int) -> None:
        """The stage is about to run: a working boundary that is not its input is let go."""
        if self._working is not None and self._working[0] != stage:
            self._drop(self._working[1])
            self._working = None

    def forward(self, stage: int, *, hold: bool) -> None:
        """The stage has run without being kept; ``hold``: its input is held from here on."""
        inputs = self._inputs(stage)
        if hold and stage not in self._held:
            self._hold(self._held, stage, inputs)
        made = self._copies(stage, inputs, self._enters(stage + 1))
        old, self._working = self._working, None
        if stage + 1 not in self._held:
            self._add(made)
            self._working = stage + 1, made
        if old is not None:
            self._drop(old[1])

    def keep(self, stage: int, kept: Sequence[int], *, output: bool) -> None:
        """The stage has run and keeps these values: nothing but its backward needs its input from here on.

        Args:
            output: whether its output is there too.
        """
        inputs = self._inputs(stage)
        copies = self._copies(stage, inputs, (*kept, *self._enters(stage + 1)))
        self._hold(self._kept, stage, frozenset(copy for copy in copies if copy[0] in set(kept)))
        if output:
            following = set(self._enters(stage + 1))
            self._hold(self._made, stage + 1, frozenset(copy for copy in copies if copy[0] in following))
        if self._working is not None:
            self._drop(self._working[1])
            self._working = None
        self._release(self._made, stage)
        if stage:  # the input of the chain is the user's
            self._release(self._held, stage)

    def first(self, stage: int, *, whole: bool) -> None:
        """The stage has run for the first time.

        Carried values stay until every stage has (the executor's sweep hands them on), or until the user's own code lets
        go of them. From then on they stay for stages whose backward needs them, or that may have to run again: those that are not kept ``whole``.
        """
        for value in self._making.get(stage, ()):
            self._add(self._first[value])
        read = self._readers.get(stage, ())
        waiting = {each.value for each in read if not whole or stage in each.savers}
        self._hold(self._reading, stage, frozenset(copy for value in waiting for copy in self._first[value]))
        for value in self._leaving.get(stage, ()):
            self._drop(self._first[value])

    def reversing(self, stage: int) -> int:
        """Bytes that stay while the stage is reversed, but for what it made itself and its backward needs."""
        self._release(self._made, stage + 1)
        others = set(self.chain.stages[stage].enters)
        if stage == len(self.chain) - 1:  # it runs once, and what it hands out is the one copy that there is
            others.update(self._making.get(stage, ()))
        return self.live - sum(self._size(copy) for copy in self._kept[stage] if copy[0] not in others)

    def made_bytes(self, stage: int, kept: Sequence[int]) -> int:
        """Bytes that the stage makes and keeps, its output included."""
        made = {*kept, *self._enters(stage + 1)} - {
            *self.chain.stages[stage].enters,
            *self._making.get(stage, ()),
        }
        return sum(self.chain.values[value] for value in made)

    def reversed(self, stage: int) -> None:
        """The stage is reversed."""
        for where in (self._kept, self._held, self._reading):
            self._release(where, stage)

    def free(self, boundary: int) -> None:
        """A held boundary is let go of."""
        self._release(self._held, boundary)

    def held(self) -> Iterator[tuple[Copy, str, int]]:
        """Every storage that is there, what holds it ("carried", "kept", "held" or "passing"), and its bytes."""
        carried = set(self._first)
        kept = {copy for copies in self._kept.values() for copy in copies}
        held = {copy for copies in self._held.values() for copy in copies}
        for copy in self._holders:
            how = "kept" if copy in kept else "held" if copy in held else "passing"
            yield copy, "carried" if copy[0] in carried else how, self._size(copy)

    # ---- copies ----------------------------------------------------------------------------------------

    def _enters(self, boundary: int) -> tuple[int, ...]:
        stages = self.chain.stages
        return stages[boundary].enters if boundary < len(stages) else ()

    def _inputs(self, stage: int) -> frozenset[Copy]:
        if self._working is not None:
            return self._working[1]
        return self._held[stage] if stage in self._held else self._made[stage]

    def _copies(self, stage: int, inputs: frozenset[Copy], values: Iterable[int]) -> frozenset[Copy]:
        """The values after a run of the stage: those that entered it as they are, the others anew.

        First runs make the first copies: calls of one module share what autocast has cast for it. Runs again share nothing.
        """
        run = 1
        if self._ran[stage]:
            self._runs += 1
            run = self._runs
        self._ran[stage] = True
        there = dict(inputs)
        return frozenset((value, there.get(value, run)) for value in values)

    def _size(self, copy: Copy) -> int:
        return self.chain.values[copy[0]]

    def _add(self, copies: frozenset[Copy]) -> None:
        for copy in copies:
            if not self._holders[copy]:
                self.live += self._size(copy)
            self._holders[copy] += 1

    def _drop(self, copies: frozenset[Copy]) -> None:
        for copy in copies:
            self._holders[copy] -= 1
            if not self._holders[copy]:
                del self._holders[copy]
                self.live -= self._size(copy)

    def _hold(self, where: dict[int, frozenset[Copy]], key: int, copies: frozenset[Copy]) -> None:
        self._release(where, key)
        self._add(copies)
        where[key] = copies

    def _release(self, where: dict[int, frozenset[Copy]], key: int) -> None:
        if key in where:
            self._drop(where.pop(key))
