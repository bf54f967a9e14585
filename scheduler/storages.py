"""Bytes live in a step, value by value: the one account of a schedule's memory, which the referee keeps.

A value is a storage. What is live is the union of what boundaries and kept stages hold, a value that is recomputed
being another copy of it; transients are the chain's. Autograd holds what it saved and no more: an output that no
backward needs is released once the next stage has run, and a value that crosses several cuts is live once.

In a chain that knows no more than sums every value is private to its stage. x_i is one value. The saved tensors of a
kept stage are another, with the stage's output inside, so that they and the stage's input can go one without the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from scheduler.chain import Carried, Chain

__all__ = ["Copy", "LiveValues"]

Copy = tuple[int, int]  # a value, and the run that made this copy of it: 1 for all first runs, then 2, 3, ...
NOTHING: frozenset[Copy] = frozenset()


class LiveValues:
    """What is live while a schedule is carried out; the caller has seen that each action is legal. Sizes in bytes.

    Attributes:
        during: the most bytes live during the latest action, ``live`` those after it, all of the chain's included.
        rerun_state: held only for stages that may run again.
        grads: parameter gradients; ``carried_grads``, of carried values, with what sums release of these.
        boundary_grad: the gradient that flows into the next backward.
        early: negative; of what the stage to be reversed next keeps, what its backward does not need.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        stages = chain.stages
        length = len(stages)
        self._private = private = not chain.values
        self._size: list[int] = list(chain.values)
        self._enters: list[tuple[int, ...]] = [*(stage.enters for stage in stages), ()]
        self._keeps = [[option.keeps for option in stage.options] for stage in stages]
        self._keeps_again = self._keeps  # by a run just before the backward
        self._hands_on = [*self._enters, ()]  # what a kept stage i-1 makes for stage i, besides what it keeps
        carried: Iterable[Carried] = chain.carried
        self.rerun_state = self.grads = self.carried_grads = self.boundary_grad = self.early = 0
        self._fixed = chain.fixed
        if private:
            carried = self._as_private()
        else:
            self._fixed -= sum(stage.rerun_state for stage in stages)
        self._live = 0  # of all copies that are held
        self._holders: dict[Copy, int] = {}
        self._held: dict[int, frozenset[Copy]] = {}
        self._kept: dict[int, frozenset[Copy]] = {}
        self._made: dict[
            int, frozenset[Copy]
        ] = {}  # x_i as the kept stage i-1 made it, until stage i is kept
        self._working: tuple[int, frozenset[Copy]] | None = None
        self._reading: dict[int, frozenset[Copy]] = {}  # carried values that wait for the backward of a stage
        self._options: dict[int, int] = {}  # of kept stages
        self._states: dict[int, int] = {}
        self._ran = [False] * length
        self._runs = 1
        self._released = [0] * length  # what sums take off with each backward, and values do by themselves
        self._first = {each.value: frozenset(((each.value, 1),)) for each in carried}
        self._making: dict[int, list[int]] = {}
        self._readers: dict[int, list[Carried]] = {}
        self._leaving: dict[int, list[int]] = {}
        for each in carried:
            self._making.setdefault(each.made, []).append(each.value)
            if each.freed is not None:
                self._released[each.freed] += self._size[each.value]
                last = length - 1 if each.last is None else each.last
                self._leaving.setdefault(last, []).append(each.value)
            for reader in each.readers:
                self._readers.setdefault(reader, []).append(each)
        self._hold(self._held, 0, frozenset((value, 0) for value in self._enters[0]))

    def _as_private(self) -> list[Carried]:
        """Give each boundary, option and stage with carried bytes a value of its own; return the carried ones."""
        chain, size = self.chain, self._size
        size += map(chain.input_bytes, range(len(chain) + 1))
        self._enters = [(boundary,) for boundary in range(len(chain) + 1)]
        self._hands_on = [()] * (len(chain) + 2)
        self._keeps, self._keeps_again, carried = [], [], []
        for i, stage in enumerate(chain.stages):
            begin, end = len(size), len(size) + len(stage.options)
            self._keeps.append([(value,) for value in range(begin, end)])
            self._keeps_again.append([(value,) for value in range(end, 2 * end - begin)])
            size += [option.saved for option in stage.options]
            size += [option.saved + min(0, option.rerun_overhead or 0) for option in stage.options]
            if stage.carried:
                carried.append(Carried(len(size), made=i))
                size.append(stage.carried)
        return carried

    # ---- actions -------------------------------------------------------------------------------------

    def run(self, stage: int, option: int | None, *, hold: bool, first: bool, again: bool) -> None:
        """Run a stage.

        Args:
            option: that it is kept with; None if it is not kept.
            hold: whether its input is held from here on, if it is the working boundary.
            first: whether it runs for the first time.
            again: whether it runs again just before its backward, so that its output is not made.
        """
        spec, last = self.chain.stages[stage], stage == len(self.chain) - 1
        if self._working is not None and self._working[0] != stage:
            self._drop_working()
        if first and option != 0 and not self._private:
            self._states[stage] = spec.rerun_state
            self.rerun_state += spec.rerun_state
        peak = self._total()
        # The transients of a stage have its carried values; but sums count them besides, and the last stage runs once.
        if first if self._private else last:
            peak += spec.carried
        if option is None:
            peak += self.chain.input_bytes(stage + 1) + spec.forward_overhead
            self._advance(stage, hold)
        else:
            chosen = spec.options[option]
            peak += chosen.saved + chosen.transient(again=again)
            self._options[stage] = option
            self._keep(stage, (self._keeps_again if again else self._keeps)[stage][option], output=not again)
        if first:
            self._carry(stage, whole=option == 0)
        if last:
            self.boundary_grad = self.chain.output_grad
        self.done(peak)
        if self._private:  # the gradient of x_L arrives when the run is over
            self.during = peak

    def reverse(self, stage: int) -> None:
        """Reverse a kept stage."""
        spec, option = self.chain.stages[stage], self._options.pop(stage)
        self._release(self._made, stage + 1)
        making = self._making.get(stage, ())
        others = set(self._enters[stage])
        made = {*self._keeps[stage][option], *self._hands_on[stage + 1]} - others
        made.difference_update(making)
        if stage == len(self.chain) - 1:  # it runs once, and what it hands out is the only copy
            others.update(making)
        own = sum(self._size[copy[0]] for copy in self._kept[stage] if copy[0] not in others)
        peak = self._total() - own + sum(self._size[value] for value in made)
        peak += spec.input_grad + spec.options[option].backward_overhead
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
        self._hold(self._held, boundary, self._copies(NOTHING, (boundary,), self._next_run()))
        self.done()

    def fetch_saved(self, stage: int, option: int) -> None:
        """Hold the saved tensors of a stage that come back from the host, its output inside."""
        self._options[stage] = option
        self._hold(self._kept, stage, self._copies(NOTHING, self._keeps[stage][option], self._next_run()))
        self._made[stage + 1] = NOTHING
        self.done()

    def free_saved(self, stage: int, *, hold: bool) -> None:
        """Release the saved tensors of a kept stage that the host has; ``hold``: its output stays, held."""
        del self._options[stage]
        self._release(self._kept, stage)
        self._release(self._made, stage + 1)
        if hold and not self._held.get(stage + 1):
            self._hold(self._held, stage + 1, self._copies(NOTHING, (stage + 1,), self._next_run()))
        self.done()

    def copies(self) -> Iterator[tuple[Copy, str, int]]:
        """Yield each copy that is live, what holds it ("carried", "kept", "held" or "passing"), and its bytes."""
        kept = {copy for copies in self._kept.values() for copy in copies}
        held = {copy for copies in self._held.values() for copy in copies}
        shrunk = self._kept[max(self._options)] if self.early else NOTHING  # of the stage to be reversed next
        for copy in self._holders:
            how = "kept" if copy in kept else "held" if copy in held else "passing"
            size = self._size[copy[0]] + (self.early if copy in shrunk else 0)
            yield copy, "carried" if copy[0] in self._first else how, size

    def names(self) -> dict[int, str]:
        """Return the boundary or the stage that each value belongs to, in words."""
        names: dict[int, str] = {}
        for i in reversed(range(len(self.chain))):
            name = self.chain.stages[i].name
            enters = f"boundary {i}" if self._private else name
            names |= dict.fromkeys(self._enters[i], enters)
            for row in (*self._keeps[i], *self._keeps_again[i]):
                names |= dict.fromkeys(row, name)
        return names | ({len(self.chain): f"boundary {len(self.chain)}"} if self._private else {})

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
        """The stage has run without being kept."""
        inputs = self._inputs(stage)
        if hold and stage not in self._held:
            self._hold(self._held, stage, inputs)
        made = self._copies(inputs, self._enters[stage + 1], self._run_of(stage))
        old, self._working = self._working, None
        if stage + 1 not in self._held:
            self._add(made)
            self._working = stage + 1, made
        if old is not None:
            self._drop(old[1])

    def _keep(self, stage: int, keeps: tuple[int, ...], *, output: bool) -> None:
        """The stage has run and keeps these values: nothing but its backward needs its input from here on."""
        inputs = self._inputs(stage)
        run = self._run_of(stage)
        self._hold(self._kept, stage, self._copies(inputs, keeps, run))
        if output:
            self._hold(self._made, stage + 1, self._copies(inputs, self._hands_on[stage + 1], run))
        if self._private and self._working is not None:
            self._hold(self._held, stage, inputs)
        self._drop_working()
        self._release(self._made, stage)
        if stage and not self._private:  # the input of the chain is the user's
            self._release(self._held, stage)

    def _carry(self, stage: int, *, whole: bool) -> None:
        """The stage has run for the first time.

        Carried values stay until every stage has run (the executor's sweep hands them on), or until the user's own code
        releases them. From then on they stay for stages whose backward needs them, or that may have to run again: those
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

    def _inputs(self, stage: int) -> frozenset[Copy]:
        if self._working is not None:
            return self._working[1]
        return self._held[stage] if stage in self._held else self._made[stage]

    def _run_of(self, stage: int) -> int:
        """Number this run. First runs share one number: calls of one module share what autocast has cast for it."""
        if self._ran[stage]:
            return self._next_run()
        self._ran[stage] = True
        return 1

    def _next_run(self) -> int:
        self._runs += 1
        return self._runs

    @staticmethod
    def _copies(inputs: frozenset[Copy], values: Iterable[int], run: int) -> frozenset[Copy]:
        """The values after a run: those that entered it as they are, and new copies of the others."""
        there = dict(inputs)
        return frozenset([(value, there.get(value, run)) for value in values])

    def _add(self, copies: frozenset[Copy]) -> None:
        holders = self._holders
        for copy in copies:
            count = holders.get(copy, 0)
            if not count:
                self._live += self._size[copy[0]]
            holders[copy] = count + 1

    def _drop(self, copies: frozenset[Copy]) -> None:
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

    def _hold(self, where: dict[int, frozenset[Copy]], key: int, copies: frozenset[Copy]) -> None:
        self._add(copies)
        self._release(where, key)
        where[key] = copies

    def _release(self, where: dict[int, frozenset[Copy]], key: int) -> None:
        if key in where:
            self._drop(where.pop(key))
