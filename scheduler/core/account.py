"""The accounts of a schedule's memory, by sums and by values; the referee keeps one of them.

A value is a storage. Live is the union of what boundaries and kept stages hold; a value that is recomputed is
another copy of it; transients are the chain's. Autograd holds what it saved and no more: an output that no
backward needs is released once the next stage has run, and a value that crosses several cuts is live once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

from rematplan.scheduler.core.chain import Carried, Chain, Option

__all__ = ["Account", "Copy", "SumsAccount", "ValuesAccount"]

Copy = tuple[int, int]  # a value, and the run that made this copy of it: 1 for all first runs, then 2, 3, ...
Copies = Collection[Copy]


class _Account:
    """Count the bytes live while a schedule is carried out; the caller sees that each action is legal.

    Attributes:
        kept: the option of each stage whose saved tensors are on the device, as the caller has it.
        during: the most bytes live during the latest action, ``live`` those after it, all of the chain's
            included.
        rerun_state: held only for stages that may run again.
        grads: parameter gradients.
        carried: gradients of carried values; by sums, these values too.
        boundary_grad: the gradient that flows into the next backward.
        early: negative; of what the stage to be reversed next keeps, what its backward does not need.
    """

    def __init__(self, chain: Chain, kept: dict[int, int]) -> None:
        self.chain = chain
        self.kept = kept
        self.live = self.during = self.early = 0
        self.rerun_state = self.grads = self.carried = self.boundary_grad = 0
        self._last = len(chain) - 1
        self._bytes = chain.fixed  # all that is live, but for ``boundary_grad``

    def done(self, peak: int = 0, early: int = 0) -> None:
        """Count what is live, now that an action is over that took ``peak`` bytes."""
        self.early = early
        self.live = self._bytes + self.boundary_grad + early
        self.during = max(peak, self.live)

    def _reverse(self, stage: int, option: Option, live: int, early: int = 0) -> None:
        """Count the gradients of a backward, whose inputs, released by now, are within the ``live`` bytes."""
        spec = self.chain.stages[stage]
        peak = live + self.boundary_grad + spec.input_grad + option.backward_overhead
        self.grads += spec.grad
        self.carried += spec.carried_change
        self._bytes += spec.grad + spec.carried_change
        self.boundary_grad = spec.input_grad if stage else 0
        self.done(peak, early)


class SumsAccount(_Account):
    """Count by the sums of the chain, as if every value were private to its stage.

    x_i is value i, and the saved tensors of a kept stage i, its output among them, are value ~i, so that
    either can be released without the other.
    """

    def __init__(self, chain: Chain, kept: dict[int, int]) -> None:
        super().__init__(chain, kept)
        self._size: dict[int, int] = {}  # of what is live
        self._working: int | None = None  # a boundary that is not held
        self.hold(0, chain.stages[0].input)

    def run(self, stage: int, option: int | None, *, hold: bool, first: bool, again: bool) -> None:
        """Run a stage.

        Args:
            option: that it is kept with; None if it is not kept.
            hold: whether its input is held from here on, if it is the working boundary.
            first: whether it runs for the first time.
            again: whether it is kept by a run again just before its backward, which makes no output.
        """
        spec, working = self.chain.stages[stage], self._working
        self._working = None
        if working is not None and working != stage:
            self._bytes -= self._size.pop(working)
        if first and spec.carried:
            self.carried += spec.carried
            self._bytes += spec.carried
        peak = self._bytes + self.boundary_grad
        if option is None:
            size = self.chain.input_bytes(stage + 1)
            peak += size + spec.forward_overhead
            if working == stage and not hold:
                self._bytes -= self._size.pop(stage)
            if stage + 1 not in self._size:
                self._working = stage + 1
                self.hold(stage + 1, size)
        else:
            chosen = spec.options[option]
            above = chosen.transient(again=again)
            peak += chosen.saved + above
            self.hold(~stage, chosen.saved + min(0, above))
        if stage == self._last:
            self.boundary_grad = self.chain.output_grad
        self.early, self.during = 0, peak  # the gradient of x_L arrives when the run is over
        self.live = self._bytes + self.boundary_grad

    def reverse(self, stage: int) -> None:
        """Reverse a kept stage."""
        stages, size, kept = self.chain.stages, self._size, self.kept
        option = stages[stage].options[kept[stage]]
        live = self._bytes + option.saved - size[~stage]
        self._bytes -= size.pop(~stage) + size.pop(stage, 0)
        early = 0
        if stage - 1 in kept:
            before = stages[stage - 1]
            early = min(0, before.input_grad + before.options[kept[stage - 1]].backward_overhead)
        self._reverse(stage, option, live, early)

    def free(self, value: int) -> None:
        """Release a held boundary, or the saved tensors of a kept stage."""
        self._bytes -= self._size.pop(value)
        self.done()

    def hold(self, value: int, size: int) -> None:
        """Hold a boundary, or the saved tensors of a stage, from here on."""
        self._size[value] = size
        self._bytes += size

    def copies(self) -> Iterator[tuple[Copy, str, int, str]]:
        """Yield each live copy, what holds it ("kept", "held" or "passing"), its bytes, and its name."""
        shrunk = ~max(self.kept) if self.early else None  # of the stage to be reversed next
        for value, size in self._size.items():
            if value < 0:
                less = self.early if value == shrunk else 0
                yield (value, 1), "kept", size + less, self.chain.stages[~value].name
            else:
                how = "passing" if value == self._working else "held"
                yield (value, 1), how, size, f"boundary {value}"


class ValuesAccount(_Account):
    """Count by the values of the chain."""

    def __init__(self, chain: Chain, kept: dict[int, int]) -> None:
        super().__init__(chain, kept)
        self._size = chain.values
        self._bytes -= sum(stage.rerun_state for stage in chain.stages)
        self._holders: dict[Copy, int] = {}
        self._held: dict[int, Copies] = {}
        self._kept: dict[int, Copies] = {}
        self._made: dict[int, Copies] = {}  # x_i as the kept stage i-1 made it, until stage i is kept
        self._working: dict[int, Copies] = {}  # one at most
        self._reading: dict[int, Copies] = {}  # carried values that wait for the backward of a stage
        self._states: dict[int, int] = {}
        self._ran = [False] * len(chain)
        self._runs = 1
        self._released = [0] * len(chain)  # what ``carried_change`` has, and values release
        self._first = {each.value: frozenset(((each.value, 1),)) for each in chain.carried}
        self._making: dict[int, list[int]] = {}
        self._readers: dict[int, list[Carried]] = {}
        self._leaving: dict[int, list[int]] = {}
        for each in chain.carried:
            self._making.setdefault(each.made, []).append(each.value)
            if each.freed is not None:
                self._released[each.freed] += self._size[each.value]
                last = self._last if each.last is None else each.last
                self._leaving.setdefault(last, []).append(each.value)
            for reader in each.readers:
                self._readers.setdefault(reader, []).append(each)
        self._hold(self._held, 0, self._copies((), self._enters(0), 0))

    def run(self, stage: int, option: int | None, *, hold: bool, first: bool, again: bool) -> None:
        """Run a stage; the arguments are those of ``SumsAccount.run``."""
        spec, last = self.chain.stages[stage], stage == self._last
        if self._working and stage not in self._working:
            self._drop(self._working.popitem()[1])
        if first and option != 0:
            self._states[stage] = spec.rerun_state
            self.rerun_state += spec.rerun_state
            self._bytes += spec.rerun_state
        peak = self._bytes + self.boundary_grad
        if last:  # it runs once, and so has its carried values not among its transients
            peak += spec.carried
        if option is None:
            peak += self.chain.input_bytes(stage + 1) + spec.forward_overhead
            self._advance(stage, hold)
        else:
            chosen = spec.options[option]
            peak += chosen.saved + chosen.transient(again=again)
            self._keep(stage, chosen.keeps, again=again)
        if first and self._first:
            self._carry(stage, whole=option == 0)
        if last:
            self.boundary_grad = self.chain.output_grad
        self.done(peak)

    def reverse(self, stage: int) -> None:
        """Reverse a kept stage."""
        option = self.chain.stages[stage].options[self.kept[stage]]
        self._release(self._made, stage + 1)
        live = self._bytes + self._missing(stage, option.keeps)
        for where in (self._kept, self._held, self._reading):
            self._release(where, stage)
        state = self._states.pop(stage, 0)
        self.rerun_state -= state
        self.carried += self._released[stage]
        self._bytes += self._released[stage] - state
        self._reverse(stage, option, live)

    def free(self, boundary: int) -> None:
        """Release a held boundary."""
        self._release(self._held, boundary)
        self.done()

    def copies(self) -> Iterator[tuple[Copy, str, int, str]]:
        """Yield each live copy, what holds it ("carried" or as by sums), its bytes, and its stage or ""."""
        kept = {copy for copies in self._kept.values() for copy in copies}
        held = {copy for copies in self._held.values() for copy in copies}
        for copy in self._holders:
            how = "kept" if copy in kept else "held" if copy in held else "passing"
            if (value := copy[0]) in self._first:
                how = "carried"
            yield copy, how, self._size[value], self._names.get(value, "")

    @cached_property
    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for stage in reversed(self.chain.stages):
            for values in (stage.enters, *(option.keeps for option in stage.options)):
                names |= dict.fromkeys(values, stage.name)
        return names

    # ---- what holds what -----------------------------------------------------------------------------

    def _advance(self, stage: int, hold: bool) -> None:
        """Follow a run that keeps nothing."""
        inputs, run = self._inputs(stage), self._run_of(stage)
        if hold and stage not in self._held:
            self._hold(self._held, stage, inputs)
        if stage + 1 not in self._held:
            self._hold(self._working, stage + 1, self._copies(inputs, self._enters(stage + 1), run))
        self._release(self._working, stage)

    def _keep(self, stage: int, keeps: Sequence[int], *, again: bool) -> None:
        """Follow a run that keeps the stage: nothing but its backward needs its input from here on."""
        inputs, run = self._inputs(stage), self._run_of(stage)
        self._hold(self._kept, stage, self._copies(inputs, keeps, run))
        if not again:
            self._hold(self._made, stage + 1, self._copies(inputs, self._enters(stage + 1), run))
        self._release(self._working, stage)
        if stage:  # the input of the chain is the user's
            self._release(self._held, stage)
        self._release(self._made, stage)

    def _missing(self, stage: int, keeps: Sequence[int]) -> int:
        """Return the bytes of a kept stage's values and output that its backward takes, less those live."""
        size, making = self._size, self._making.get(stage, ())
        others = {*self.chain.stages[stage].enters}
        made = {*keeps, *self._enters(stage + 1)} - others
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
        where = self._working if stage in self._working else self._held if stage in self._held else self._made
        return where[stage]

    def _run_of(self, stage: int) -> int:
        """Number this run. First runs share one number, as calls of a module share what autocast has cast."""
        if self._ran[stage]:
            self._runs += 1
            return self._runs
        self._ran[stage] = True
        return 1

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
                self._bytes += self._size[copy[0]]
            holders[copy] = count + 1

    def _drop(self, copies: Copies) -> None:
        holders = self._holders
        for copy in copies:
            count = holders[copy] - 1
            if count:
                holders[copy] = count
            else:
                del holders[copy]
                self._bytes -= self._size[copy[0]]

    def _hold(self, where: dict[int, Copies], key: int, copies: Copies) -> None:
        self._add(copies)
        self._release(where, key)
        where[key] = copies

    def _release(self, where: dict[int, Copies], key: int) -> None:
        if key in where:
            self._drop(where.pop(key))


Account: TypeAlias = SumsAccount | ValuesAccount
