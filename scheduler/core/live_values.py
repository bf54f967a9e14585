"""The account of a schedule's memory, value by value; the referee keeps it.

A value is a storage. Live is the union of what boundaries and kept stages hold; a value that is recomputed is
another copy of it; transients are the chain's. Autograd holds what it saved and no more: an output that no
backward needs is released once the next stage has run, and a value that crosses several cuts is live once.

In a chain of sums every value is private to its stage: x_i is one value, and the saved tensors of a kept
stage, its output among them, are another, so that either can be released without the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

from rematplan.scheduler.core.chain import Carried, Chain

__all__ = ["Copy", "LiveValues"]

Copy = tuple[int, int]  # a value, and the run that made this copy of it: 1 for all first runs, then 2, 3, ...
Copies = Collection[Copy]


class LiveValues:
    """Count the bytes live while a schedule is carried out; the caller sees that each action is legal.

    In a chain of sums x_i is value i, and the saved tensors of stage i are value ~i; each is live once at
    most.

    Attributes:
        during: the most bytes live during the latest action, ``live`` those after it, all of the chain's
            included.
        rerun_state: held only for stages that may run again.
        grads: parameter gradients; ``carried_grads``, of carried values, with what sums release of these.
        boundary_grad: the gradient that flows into the next backward.
        early: negative; of what the stage to be reversed next keeps, what its backward does not need.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        length = len(chain)
        self._last = length - 1
        self._private = not chain.values
        self._size: list[int] | dict[int, int] = {} if self._private else list(chain.values)
        self.live = self.during = self.early = 0
        self.rerun_state = self.grads = self.carried_grads = self.boundary_grad = 0
        self._fixed = chain.fixed
        self._live = 0  # of all copies that are held
        self._holders: dict[Copy, int] = {}
        self._held: dict[int, Copies] = {}
        self._kept: dict[int, Copies] = {}
        self._made: dict[int, Copies] = {}  # x_i as the kept stage i-1 made it, until stage i is kept
        self._working: tuple[int, Copies] | None = None
        self._reading: dict[int, Copies] = {}  # carried values that wait for the backward of a stage
        self._options: dict[int, int] = {}  # of kept stages
        self._states: dict[int, int] = {}
        self._ran = [False] * length
        self._runs = 1
        self._released = [0] * length  # what sums take off with each backward, and values do by themselves
        carried: Sequence[Carried] = chain.carried
        if self._private:
            carried = [
                Carried(length + 1 + i, made=i) for i, stage in enumerate(chain.stages) if stage.carried
            ]
            self._size = {each.value: chain.stages[each.made].carried for each in carried}
        else:
            self._fixed -= sum(stage.rerun_state for stage in chain.stages)
        self._first = {each.value: frozenset(((each.value, 1),)) for each in carried}
        self._making: dict[int, list[int]] = {}
        self._readers: dict[int, list[Carried]] = {}
        self._leaving: dict[int, list[int]] = {}
        for each in carried:
            self._making.setdefault(each.made, []).append(each.value)
            if each.freed is not None:
                self._released[each.freed] += self._size[each.value]
                last = self._last if each.last is None else each.last
                self._leaving.setdefault(last, []).append(each.value)
            for reader in each.readers:
                self._readers.setdefault(reader, []).append(each)
        self._hold(self._held, 0, self._boundary(0, (), 0))

    # ---- actions -------------------------------------------------------------------------------------

    def run(self, stage: int, option: int | None, *, hold: bool, first: bool, again: bool) -> None:
        """Run a stage.

        Args:
            option: that it is kept with; None if it is not kept.
            hold: whether its input is held from here on, if it is the working boundary.
            first: whether it runs for the first time.
            again: whether it is kept by a run again just before its backward, which makes no output.
        """
        spec, last = self.chain.stages[stage], stage == self._last
        if self._working is not None and self._working[0] != stage:
            self._drop_working()
        if first and option != 0 and not self._private:
            self._states[stage] = spec.rerun_state
            self.rerun_state += spec.rerun_state
        peak = self._total()
        # The transients of a stage have its carried values; but sums count them besides, and the last stage
        # runs once.
        if first if self._private else last:
            peak += spec.carried
        if option is None:
            peak += self.chain.input_bytes(stage + 1) + spec.forward_overhead
            self._advance(stage, hold)
        else:
            chosen = spec.options[option]
            peak += chosen.saved + chosen.transient(again=again)
            self._options[stage] = option
            self._keep(stage, again=again)
        if first and self._first:
            self._carry(stage, whole=option == 0)
        if last:
            self.boundary_grad = self.chain.output_grad
        self.done(peak)
        if self._private:  # the gradient of x_L arrives when the run is over
            self.during = peak

    def reverse(self, stage: int) -> None:
        """Reverse a kept stage."""
        spec = self.chain.stages[stage]
        self._release(self._made, stage + 1)
        peak = self._total() + self._missing(stage) + spec.input_grad
        peak += spec.options[self._options.pop(stage)].backward_overhead
        for where in (self._kept, self._held, self._reading):
            self._release(where, stage)
        self.grads += spec.grad
        self.carried_grads += spec.carried_change + self._released[stage]
        self.rerun_state -= self._states.pop(stage, 0)
        self.boundary_grad = spec.input_grad if stage else 0
        early = 0
        if self._private and stage - 1 in self._options:
            before = self.chain.stages[stage - 1]
            option = self._options[stage - 1]
            early = min(0, before.input_grad + before.options[option].backward_overhead)
        self.done(peak, early)

    def free(self, boundary: int) -> None:
        """Release a held boundary."""
        self._release(self._held, boundary)
        self.done()

    def fetch(self, boundary: int) -> None:
        """Hold a boundary that comes back from the host."""
        self._hold(self._held, boundary, self._boundary(boundary, (), 1))
        self.done()

    def fetch_saved(self, stage: int, option: int) -> None:
        """Hold the saved tensors of a stage that come back from the host, its output inside."""
        self._options[stage] = option
        self._hold(self._kept, stage, self._saved(stage, (), 1, again=False))
        self._made[stage + 1] = ()
        self.done()

    def free_saved(self, stage: int, *, hold: bool) -> None:
        """Release the saved tensors of a kept stage that the host has; ``hold``: its output stays, held."""
        del self._options[stage]
        self._release(self._kept, stage)
        self._release(self._made, stage + 1)
        if hold and not self._held.get(stage + 1):
            self._hold(self._held, stage + 1, self._boundary(stage + 1, (), 1))
        self.done()

    def copies(self) -> Iterator[tuple[Copy, str, int]]:
        """Yield each live copy, what holds it ("carried", "kept", "held" or "passing"), and its bytes."""
        kept = {copy for copies in self._kept.values() for copy in copies}
        held = {copy for copies in self._held.values() for copy in copies}
        shrunk = self._kept[max(self._options)] if self.early else ()  # of the stage to be reversed next
        for copy in self._holders:
            how = "kept" if copy in kept else "held" if copy in held else "passing"
            size = self._size[copy[0]] + (self.early if copy in shrunk else 0)
            yield copy, "carried" if copy[0] in self._first else how, size

    def name(self, value: int) -> str:
        """Return the stage, or boundary of a chain of sums, that the value belongs to; "" for others."""
        if self._private:
            return f"boundary {value}" if value >= 0 else self.chain.stages[~value].name
        return self._names.get(value, "")

    @cached_property
    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for stage in reversed(self.chain.stages):
            for values in (stage.enters, *(option.keeps for option in stage.options)):
                names |= dict.fromkeys(values, stage.name)
        return names

    # ---- what holds what -----------------------------------------------------------------------------

    def _total(self) -> int:
        other = self.rerun_state + self.grads + self.carried_grads + self.boundary_grad
        return self._fixed + other + self._live

    def done(self, peak: int = 0, early: int = 0) -> None:
        """Count what is live, now that an action is over that took ``peak`` bytes."""
        self.early = early
        self.live = self._total() + early
        self.during = max(peak, self.live)

    def _advance(self, stage: int, hold: bool) -> None:
        """Follow a run that keeps nothing."""
        inputs, old = self._inputs(stage), self._working
        if hold and stage not in self._held:
            self._held[stage] = inputs
            if old is None:
                self._add(inputs)
            old = None
        made = self._boundary(stage + 1, inputs, self._run_of(stage))
        self._working = None
        if stage + 1 not in self._held:
            self._add(made)
            self._working = stage + 1, made
        if old is not None:
            self._drop(old[1])

    def _keep(self, stage: int, *, again: bool) -> None:
        """Follow a run that keeps the stage: nothing but its backward needs its input from here on."""
        inputs, run = self._inputs(stage), self._run_of(stage)
        self._hold(self._kept, stage, self._saved(stage, inputs, run, again=again))
        if self._private:  # the output lies inside, and the input is held apart
            self._made[stage + 1] = ()
            if self._working is not None:
                self._held[stage], self._working = inputs, None
        else:
            if not again:
                self._hold(self._made, stage + 1, self._boundary(stage + 1, inputs, run))
            self._drop_working()
            if stage:  # the input of the chain is the user's
                self._release(self._held, stage)
        self._release(self._made, stage)

    def _missing(self, stage: int) -> int:
        """Return the bytes of a kept stage's values and output that its backward takes, less those live."""
        size, option = self._size, self._options[stage]
        if self._private:
            return self.chain.stages[stage].options[option].saved - size[~stage]
        making = self._making.get(stage, ())
        others = {*self.chain.stages[stage].enters}
        made = {*self.chain.stages[stage].options[option].keeps, *self._enters(stage + 1)} - others
        made.difference_update(making)
        if stage == self._last:  # it runs once, and what it hands out is the only copy
            others.update(making)
        live = sum(size[copy[0]] for copy in self._kept[stage] if copy[0] not in others)
        return sum(size[value] for value in made) - live

    def _carry(self, stage: int, *, whole: bool) -> None:
        """Follow the carried values in the first run of a stage.

        They are held until every stage has run (the executor's sweep hands them on), or until the user's own
        code releases them; from then on for stages whose backward needs them, or that may run again: those
        that are not kept ``whole``.
        """
        for value in self._making.get(stage, ()):
            self._add(self._first[value])
        read = self._readers.get(stage, ())
        waiting = {each.value for each in read if not whole or stage in each.savers}
        if waiting:
            self._hold(self._reading, stage, frozenset((value, 1) for value in waiting))
        for value in self._leaving.get(stage, ()):
            self._drop(self._first[value])

    def _enters(self, boundary: int) -> tuple[int, ...]:
        return self.chain.stages[boundary].enters if boundary <= self._last else ()

    def _inputs(self, stage: int) -> Copies:
        if self._working is not None:
            return self._working[1]
        return self._held[stage] if stage in self._held else self._made[stage]

    def _run_of(self, stage: int) -> int:
        """Number this run. First runs share one number, as calls of a module share what autocast has cast."""
        if self._ran[stage]:
            self._runs += 1
            return self._runs
        self._ran[stage] = True
        return 1

    def _boundary(self, boundary: int, inputs: Copies, run: int) -> Copies:
        """Return x_i, as this run of the stage before makes it of its ``inputs``."""
        if self._private:
            self._size[boundary] = self.chain.input_bytes(boundary)
            return ((boundary, 1),)
        return self._copies(inputs, self._enters(boundary), run)

    def _saved(self, stage: int, inputs: Copies, run: int, *, again: bool) -> Copies:
        """Return what the kept stage keeps of this run; ``again``: which stops when that is live."""
        option = self.chain.stages[stage].options[self._options[stage]]
        if self._private:
            less = option.rerun_overhead if again else None
            self._size[~stage] = option.saved + (min(0, less) if less else 0)
            return ((~stage, 1),)
        return self._copies(inputs, option.keeps, run)

    @staticmethod
    def _copies(inputs: Copies, values: Sequence[int], run: int) -> Copies:
        """Return the values after a run: those that entered it as they are, and new copies of the others."""
        there = dict(inputs)
        return frozenset([(value, there.get(value, run)) for value in values])

    def _add(self, copies: Copies) -> None:
        holders = self._holders
        for copy in copies:
            count = holders.get(copy, 0)
            if not count:
                self._live += self._size[copy[0]]
            holders[copy] = count + 1

    def _drop(self, copies: Copies) -> None:
        holders = self._holders
        for copy in copies:
            count = holders[copy] - 1
            if count:
                holders[copy] = count
            else:
                del holders[copy]
                self._live -= self._size[copy[0]]

    def _drop_working(self) -> None:
        if self._working is not None:
            self._drop(self._working[1])
            self._working = None

    def _hold(self, where: dict[int, Copies], key: int, copies: Copies) -> None:
        self._add(copies)
        self._release(where, key)
        where[key] = copies

    def _release(self, where: dict[int, Copies], key: int) -> None:
        if key in where:
            self._drop(where.pop(key))
