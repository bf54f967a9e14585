"""The one referee of schedules: what each action means for memory and time.

No solver's own bookkeeping counts. The actions, for stage i with input x_i:

* ``Forward(i)``: run stage i without keeping its saved tensors; x_i is released unless it is held.
* ``Checkpoint(i)``: run stage i without keeping its saved tensors, and hold x_i.
* ``Keep(i, k)``: run stage i keeping what its option k keeps, and hold x_i. A run again just before
  ``Backward(i)`` stops when all that is kept is live.
* ``Backward(i)``: reverse stage i; its saved tensors, the gradient of x_{i+1} and a held x_i are released;
  the gradient of x_i is live.
* ``Free(i)``: release the held x_i before its stage is reversed.

Memory rules. Live bytes are the chain's fixed bytes, held boundaries, kept saved tensors, the working
boundary, the gradient that flows, and what the reversed stages retain (parameter gradients, long-lived
values). x_{i+1} lies inside the saved tensors of a kept stage i and costs nothing on top. x_0 is held
from the start. The gradient of x_L appears once stage L-1 has run.

With a second memory, the host (``HostMemory``), there are actions for copies between the two:

* ``Offload(i)``: start to copy the held x_i to the host; the device copy stays.
* ``Free(i)``: release the device copy alone; ``FreeHost(i)``: release the one on the host.
* ``Prefetch(i)``: claim the bytes of x_i on the device, start to copy it there, and hold it. It comes from
  its own copy on the host, or else out of that of the saved tensors of stage i-1.
* ``OffloadSaved(i)``: start to copy the saved tensors of the kept stage i to the host.
* ``FreeSaved(i)``: release their device copy. x_{i+1}, which lies inside, stays held until its stage is
  reversed, or until ``Free(i+1)``.
* ``PrefetchSaved(i)``: claim their bytes on the device and start to copy them back.

The device bytes of a copy being written stay until it is freed; those of a copy being read count from its
prefetch on. ``Backward(i)`` releases what the host has of x_i and of the saved tensors of stage i. Copies
of each direction are served in order. An action that needs what is being read waits for it; a read waits
for the write of what it reads; and what releases a copy, on either side, waits for the copying of it. Bytes
of a schedule that copies are counted by sums, those of ``Chain.apart``, even if the chain knows its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from rematplan.scheduler.core import schedule as acts
from rematplan.scheduler.core.account import Account, SumsAccount, ValuesAccount
from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.host import HostCopies, HostMemory, Item

__all__ = ["Referee", "Timeline", "simulate"]


@dataclass(frozen=True, slots=True)
class Timeline:
    """The referee's account of a schedule.

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


def simulate(
    chain: Chain, schedule: acts.Schedule | Iterable[acts.Action], host: HostMemory | None = None
) -> Timeline:
    """Carry out ``schedule`` on ``chain`` by the memory rules above.

    Args:
        chain: what each stage costs.
        schedule: the actions.
        host: the second memory, for a schedule that copies to it.

    Returns:
        the Timeline: seconds, bytes, runs.

    Raises:
        IllegalAction: an action that cannot be carried out (one that the host has no room for among them), or
            something left over at the end.
        ValueError: the schedule copies to a host, and none is given.

    Example:
        >>> from rematplan import Backward, Chain, Checkpoint, Keep
        >>> chain = Chain.from_arrays([1.0] * 2, [2.0] * 2, boundary=[10] * 3, saved=[50] * 2)
        >>> line = simulate(chain, [Checkpoint(0), Keep(1), Backward(1), Keep(0), Backward(0)])
        >>> line.seconds, line.peak, line.runs
        (7.0, 90, (2, 1))
    """
    referee = Referee(chain, schedule, host)
    during, live = zip(*[(account.during, account.live) for account in referee.steps()], strict=True)
    peak = max(during)
    copies = referee.copies
    used = (copies.peak, copies.stall) if copies else (0, 0.0)
    return Timeline(referee.seconds, peak, live, during, tuple(referee.runs), during.index(peak), *used)


class Referee:
    """Carry out a step: check that actions are legal, keep the clock and an account of the bytes.

    Args:
        chain, schedule, host: as for ``simulate``.

    Attributes:
        chain: what the bytes are counted by.
        seconds: so far. runs: (L,) of each stage so far.
        copies: on the host; None without one.
        account: of the bytes.
    """

    def __init__(
        self, chain: Chain, schedule: acts.Schedule | Iterable[acts.Action], host: HostMemory | None = None
    ) -> None:
        self.actions = tuple(schedule)
        self._following = (*self.actions[1:], None)
        self.chain = chain = chain.apart() if acts.has_copies(self.actions) else chain
        self.copies = None if host is None else HostCopies(host)
        self.seconds = 0.0
        self.runs = [0] * len(chain)
        self._index = 0
        self._held = {0}
        self._kept: dict[int, int] = {}  # the option of each stage whose saved tensors are on the device
        self._away: dict[int, int] = {}  # likewise, of those on the host alone
        self._working: int | None = None  # a boundary that is neither held nor inside a kept stage
        self._to_reverse = len(chain) - 1
        self.account: Account = (ValuesAccount if chain.values else SumsAccount)(chain, self._kept)

    def steps(self) -> Iterator[Account]:
        """Carry out the actions one by one; yield the account of bytes after each."""
        for index, action in enumerate(self.actions):
            self._index = index
            if isinstance(action, acts.Backward):
                self._reverse(action.stage)
            elif isinstance(action, (acts.Keep, acts.Forward, acts.Checkpoint)):
                self._run(action)
            elif isinstance(action, acts.Free):
                self._free(action.boundary)
            elif self.copies is None:
                raise ValueError(
                    f"simulate: action {index}, {action}, copies between device and host; pass host=HostMemory(...)"
                )
            else:
                self._copy(action, self.copies)
            yield self.account
        if self._to_reverse >= 0:
            self._end(f"stage {self._to_reverse} is not reversed yet")
        if self._held or self._kept or self._working is not None:
            self._end(
                f"left over: held {sorted(self._held)}, kept {sorted(self._kept)}, working {self._working}"
            )

    def _refuse(self, why: str) -> NoReturn:
        raise acts.IllegalAction(self._index, self.actions[self._index], why)

    def _refuse_stage(self, i: int, why: str) -> NoReturn:
        last = len(self.runs) - 1
        self._refuse(why if 0 <= i <= last else f"there is no such stage; stages are 0..{last}")

    def _end(self, why: str) -> NoReturn:
        raise acts.IllegalAction(len(self.actions), None, why)

    def _run(self, action: acts.Forward | acts.Checkpoint | acts.Keep) -> None:
        i = action.stage
        if not 0 <= i <= self._to_reverse:
            self._refuse_stage(i, f"stage {i} is reversed already")
        stage = self.chain.stages[i]
        if i in self._kept or i in self._away:
            self._refuse(f"stage {i} is kept already")
        if self.runs[i] and not stage.recomputable:
            self._refuse(f"stage {i} may run only once")
        if i not in self._held and i - 1 not in self._kept and self._working != i:
            self._refuse(f"x_{i} is not there: neither held, nor kept, nor just computed")
        if self.copies is not None:
            self.seconds = self.copies.use(self.seconds, *self._sources(i))
        first = not self.runs[i]
        self.runs[i] += 1
        self.seconds += stage.forward
        hold = not isinstance(action, acts.Forward)
        if hold and self._working == i:
            self._held.add(i)
        option, again = None, False
        if isinstance(action, acts.Keep):
            option = action.option
            if not 0 <= option < len(stage.options):
                self._refuse(f"stage {i} has {len(stage.options)} options")
            self._kept[i] = option
            following = self._following[self._index]
            again = not first and isinstance(following, acts.Backward) and following.stage == i
        # A second copy of a held boundary is released at once.
        self._working = None if option is not None or i + 1 in self._held else i + 1
        self.account.run(i, option, hold=hold, first=first, again=again)

    def _reverse(self, i: int) -> None:
        if i != self._to_reverse or i < 0:
            left = self._to_reverse
            why = f"stage {left} is to be reversed next" if left >= 0 else "all stages are reversed"
            self._refuse_stage(i, why)
        if i not in self._kept:
            first = f"PrefetchSaved({i})" if i in self._away else f"Keep({i})"
            self._refuse(f"the saved tensors of stage {i} are not there; {first} first")
        if i not in self._held and i - 1 not in self._kept:
            self._refuse(f"x_{i} is neither held nor inside the kept stage {i - 1}")
        if self.copies is not None:
            self.seconds = self.copies.use(self.seconds, ("saved", i))
            self.seconds = self.copies.use(self.seconds, *self._sources(i))
        stage = self.chain.stages[i]
        self.seconds += stage.backward + stage.options[self._kept[i]].recompute
        if self.copies is not None:
            self.seconds = self.copies.drop(self.copies.drop(self.seconds, ("saved", i)), ("boundary", i))
        self._held.discard(i)
        self._to_reverse -= 1
        self.account.reverse(i)
        del self._kept[i]

    def _free(self, boundary: int) -> None:
        if boundary not in self._held:
            self._refuse(f"x_{boundary} is not held")
        self._held.remove(boundary)
        if self.copies is not None:
            self.seconds = self.copies.settle(self.seconds, ("boundary", boundary))
        self.account.free(boundary)

    def _copy(self, action: acts.CopyAction, copies: HostCopies) -> None:
        account = self.account
        assert isinstance(account, SumsAccount)  # of ``Chain.apart``
        if saved := isinstance(action, (acts.OffloadSaved, acts.PrefetchSaved, acts.FreeSaved)):
            i, what = action.stage, f"the saved tensors of stage {action.stage}"
        else:
            i, what = action.boundary, f"x_{action.boundary}"
        item: Item = ("saved" if saved else "boundary", i)
        if isinstance(action, (acts.Offload, acts.OffloadSaved)):
            if i not in (self._kept if saved else self._held):
                self._refuse(f"{what} {'are not on the device' if saved else 'is not held'}")
            if item in copies.there:
                self._refuse(f"{what} {'are' if saved else 'is'} on the host already")
            size, room = self._bytes_of(item), copies.host.capacity - copies.used
            if size > room:
                self._refuse(f"the host has {room} bytes left, and {what} would take {size}")
            self.seconds = copies.write(self.seconds, item, size)
        elif isinstance(action, acts.FreeHost):
            if item not in copies.there:
                self._refuse(f"{what} is not on the host")
            self.seconds = copies.drop(self.seconds, item)
        elif isinstance(action, acts.FreeSaved):
            if i not in self._kept or item not in copies.there:
                self._refuse(f"{what} are not both on the device and on the host; OffloadSaved({i}) first")
            self._away[i] = self._kept.pop(i)
            account.free(~i)
            if i + 1 <= self._to_reverse and i + 1 not in self._held:
                self._held.add(i + 1)
                account.hold(i + 1, self.chain.input_bytes(i + 1))
            self.seconds = copies.settle(self.seconds, item)
        else:
            self._fetch(item, copies, what)
            account.hold(~i if saved else i, self._bytes_of(item))
        account.done()

    def _fetch(self, item: Item, copies: HostCopies, what: str) -> None:
        """Start to copy a boundary, or the saved tensors of a stage, back to the device."""
        source, i = item, item[1]
        if item[0] == "saved":
            if i not in self._away:
                self._refuse(f"{what} are not on the host alone")
            self._kept[i] = self._away.pop(i)
        else:
            if i in self._held or i - 1 in self._kept or i == self._working:
                self._refuse(f"{what} is on the device already")
            if item not in copies.there:
                source = ("saved", i - 1)
            if source not in copies.there or i > self._to_reverse:
                self._refuse(f"{what} is not on the host")
            self._held.add(i)
        self.seconds = copies.read(self.seconds, item, self._bytes_of(item), source)

    def _sources(self, i: int) -> list[Item]:
        """Return where on the device x_i is, besides the working boundary."""
        sources: list[Item] = [("boundary", i)] if i in self._held else []
        return [*sources, ("saved", i - 1)] if i - 1 in self._kept else sources

    def _bytes_of(self, item: Item) -> int:
        what, i = item
        if what == "boundary":
            return self.chain.input_bytes(i)
        return self.chain.stages[i].options[self._kept[i]].saved
