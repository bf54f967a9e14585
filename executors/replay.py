"""One training step by a replay program: autograd's own graph, without its values.

The rules, referred to by number below:

1. The first sweep runs every stage once in grad mode. For a stage whose saved tensors are dropped, the
   pack hook hands autograd a handle (stage, index) in place of each; the index counts the pack calls of
   that stage. A tensor that lives on anyway (parameter, input, carried value) is packed by reference.
2. The first unpack of a dropped handle of stage k runs the replay program up to the backward of stage k.
   A rebuild re-runs the stage in grad mode on detached inputs with their requires_grad flags restored; its
   pack hook sees the same calls in the same order, fills the handles, and stops the run after the last
   one, before that op's kernel runs, unless the output is needed.
3. A rebuilt value is let go at its unpack. Handles count themselves: when the last handle of a stage dies
   (autograd releases a node's saved tensors when it is done with them), so does what was held for it.
   Hence retain_graph, double backward, partial and abandoned backwards need no case of their own.
4. A request that the program has passed already (a second backward) restarts it; if what it needs is gone,
   the stage is rebuilt from the nearest boundary that is held: slower, never wrong.
5. A stage kept with an option drops some of its saved tensors. The first unpack of one of these, once the
   program is at the stage's backward, runs the part of the option's own program (``Rebuild``) that makes it, on
   what was kept; any other request is answered as for a dropped stage.
6. Random numbers: each stage that draws is re-run from its own state, and the generators are put back
   after every replay. So are autocast, what chooses kernels (attention's, determinism, precision), the default device and function modes. Buffers that a stage changes are changed by its first run only.
7. Once the program has kept a stage again whole, no run of it starts from that stage's input any more. The input is let
   go of, and autograd holds what it saved of it; not so where it may be asked for again: the graph is retained, or
   saved tensors of stages that are reversed already are still wanted.
8. Where the program copies between device and host, whatever a kept stage saved, and every boundary that is held, is a
   ``Moved`` (offload.py); its unpack runs the program up to the backward of its stage, like that of a handle.
9. Autograd checks versions only of tensors that it holds itself. Whatever is kept by reference, and
   whatever a re-run reads, is checked here: a change in place between forward and backward raises.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from executors.as_read import AsRead, unlike
from executors.check import Fingerprint, difference
from executors.first_sweep import FirstSweep, tensors_of
from executors.handles import Handle, Held, Thinned
from executors.offload import Moved
from scheduler.capture.environment import on_default_device, switched, switches, under_modes
from scheduler.capture.private import graph_task, keeps_graph, version_of
from scheduler.capture.recompute import Rebuild
from scheduler.capture.state import RandomState, autocast_contexts
from scheduler.schedule import COPY_ACTIONS, Backward, Checkpoint, Free, Keep

__all__ = ["ReplayError", "Step"]


class ReplayError(RuntimeError):
    """A stage cannot be replayed exactly; no gradient was returned."""


class _Stop(Exception):
    """Raised by the pack hook when the last handle is filled (rule 2)."""


class Step(FirstSweep):
    """The state of one step; its backward."""

    def discarding(self, stage: int) -> torch.autograd.graph.saved_tensors_hooks:
        """The context of a re-run in grad mode that nothing is saved of."""
        if not self.thorough:
            return self._saving(stage, _discard) if stage in self.reversing else self._discarding
        numbers = itertools.count()

        def look(tensor: Tensor) -> None:
            index = next(numbers)
            if index < len(self.prints[stage]):
                self._compare(stage, index, tensor)

        return self._saving(stage, look)

    def _saving(self, stage: int, pack: Callable[[Tensor], None]) -> torch.autograd.graph.saved_tensors_hooks:
        """The context of a re-run whose saved tensors go to ``pack``, and which reverses them only where the first run did."""
        if stage not in self.reversing:
            return torch.autograd.graph.saved_tensors_hooks(self._shielded(pack), _never)

        def hold(tensor: Tensor) -> Tensor:
            pack(tensor)
            return tensor if tensor.is_leaf else tensor.detach()

        return torch.autograd.graph.saved_tensors_hooks(self._shielded(hold), lambda tensor: tensor)

    @functools.cached_property
    def _discarding(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._shielded(_discard), _never)

    # ---- backward ------------------------------------------------------------------------------------

    def unpack(self, packed: Handle | Held | Moved) -> Tensor:
        """The saved tensor that ``packed`` stands for."""
        if type(packed) is Handle:
            stage, index = packed.stage, packed.index
            tensor = self.filled[stage].pop(index, None)
            if tensor is None:
                self.replay_until(stage, index)
                tensor = self.filled[stage].pop(index, None)
            if tensor is None:
                raise ReplayError(
                    f"stage {stage} ({self.name_of(stage)}): its re-run did not save tensor {index} again, so the model "
                    "does not run the same ops twice on the same input; make it deterministic or keep this stage"
                )
            return tensor
        if isinstance(packed, Moved):
            self.replay_until(packed.stage)
            return packed.tensor()
        assert isinstance(packed, Held)
        if version_of(packed.tensor) != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(packed.tensor.shape)} is at version "
                f"{version_of(packed.tensor)}, expected version {packed.version}"
            )
        return packed.tensor

    def replay_until(self, stage: int, index: int | None = None) -> None:
        """Run the program up to the backward of ``stage``, so that this handle of it, if any, is filled (rules 2, 4, 5)."""
        task = graph_task()
        if index is None and task == self.task and self.position >= self.program.backward_at[stage]:
            return
        generators = RandomState(self.device, self.faked) if self.states else None
        contexts: list[AbstractContextManager[Any]] = [*autocast_contexts(self.autocast)]
        if switches(self.device.type) != self.switches:
            contexts.append(switched(self.switches, self.device.type))
        contexts += under_modes(self.modes)
        contexts += on_default_device(self.default_device)
        try:
            if contexts:
                with ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context)
                    self._replay(task, stage, index)
            else:
                self._replay(task, stage, index)
        except torch.OutOfMemoryError:
            self.ran_out()
            raise
        finally:
            if generators is not None:
                generators.restore()
            if self.observe is not None:
                self.observe("backward", stage)

    def _replay(self, task: int, stage: int, index: int | None) -> None:
        if task != self.task:
            self.task = task
            if self.position >= self.program.backward_at[stage]:
                self.position, self.working = 0, None
        done = self.position <= self.program.backward_at[stage] and self._follow(stage)
        if index is None:
            return
        if done:
            if self.observe is not None:
                self.observe("backward", stage)
            if index not in self.filled[stage] and stage in self.thinned:
                self._recompute(stage, index)
            if index in self.filled[stage]:
                return
        self._rebuild_from_nearest(stage)

    def _follow(self, stage: int) -> bool:
        """Run the program's actions up to the backward of ``stage``; False if something it needs is gone."""
        replay, target, store = self.program.replay, self.program.backward_at[stage], self.store
        while self.position < target:
            action = replay[self.position]
            if self.observe is not None:
                self.observe("replay", self.position)
            if isinstance(action, Backward):
                self.filled[action.stage].clear()
                self.thinned.pop(action.stage, None)
                if self.working is not None and self.working[0] > action.stage:
                    self.working = None
                if store is not None:
                    store.reversed(action.stage)
            elif isinstance(action, Free):
                if store is not None:
                    self._move(action)
                else:
                    self.free(action.boundary)
            elif isinstance(action, COPY_ACTIONS):
                if store is not None:
                    self._move(action)
            elif not self.rerunnable[action.stage]:
                # Neither it nor a stage that it could lead to has a handle left: its run would serve nobody.
                self.working = None
            else:
                current = self._boundary(action.stage)
                if current is None:
                    return False
                if isinstance(action, Checkpoint) and action.stage not in self.boundaries:
                    self.hold(action.stage, current)
                self.working = None
                if isinstance(action, Keep):
                    following = replay[self.position + 1]
                    wanted = not (isinstance(following, Backward) and following.stage == action.stage)
                    parts = self.rebuilds_of(action.stage, action.option) if action.option else ()
                    produced = self._rebuild(action.stage, current, wanted, parts)
                    if action.stage and not action.option and self._reversed_for_good(stage):
                        self.free(action.stage)  # rule 7
                else:
                    produced = self._advance(action.stage, current)
                if produced is not None:
                    self.working = (action.stage + 1, produced)
                del current, produced  # or they would outlive the next run
            self.position += 1
        return True

    def _reversed_for_good(self, stage: int) -> bool:
        """Whether nothing of the stages after this one can be asked for again (rule 7)."""
        if keeps_graph():
            return False
        return not any(self.handles[stage + 1 : self.top() + 1])

    def _boundary(self, boundary: int) -> tuple[Tensor, ...] | None:
        if self.working is not None and self.working[0] == boundary:
            return self.working[1]
        if boundary not in self.boundaries:
            return None
        held = tensors_of(self.boundaries[boundary])
        if self.store is None and held:
            read = self.reads[boundary]
            if read.changed():
                self._refuse_changed(-1, f"boundary {boundary}, the output of {self.name_of(boundary - 1)},")
            self.doubtful = read
        return held

    def as_read(
        self,
        stage: int,
        reads: Sequence[AsRead],
        name_of: Callable[[int, int], str],
        matters: Callable[[int, int], bool] = lambda _, __: True,
    ) -> None:
        """Refuse to run a stage again if something that it reads is not what the first run read (rule 9).

        Args:
            reads: its parameters, buffers and arguments.
            name_of: of one of them (which of the reads, number), in words.
            matters: whether the run reads that one.

        Raises:
            RuntimeError: it has been changed in place, has been given other data, or has other values.
        """
        for which, read in enumerate(reads):
            for number in read.changed():
                if matters(which, number):
                    self._refuse_changed(stage, name_of(which, number))
        doubtful, self.doubtful = self.doubtful, None
        if not self.sampled:
            return
        for which, number in unlike([*reads, doubtful] if doubtful is not None else reads):
            if which == len(reads):
                self._refuse_changed(stage, f"tensor {number} of the boundary that it starts from")
            elif matters(which, number):
                self._refuse_changed(stage, name_of(which, number))

    def _refuse_changed(self, stage: int, what: str) -> None:
        where = "a stage" if stage < 0 else f"stage {stage} ({self.name_of(stage)})"
        raise RuntimeError(
            f"{what} has been modified by an inplace operation, or through .data, between forward and backward, so that "
            f"{where} cannot be replayed; step the optimizer after backward"
        )

    def _rebuild_from_nearest(self, stage: int) -> None:
        """Rebuild one stage from the nearest held boundary, whatever the program says (rule 4)."""
        start = max((b for b in self.boundaries if b <= stage), default=None)
        current = None if start is None else self._boundary(start)
        if start is None or current is None:
            raise ReplayError(
                f"stage {stage}: no boundary before it is held any more; an earlier backward released it. "
                "Pass retain_graph=True to that backward"
            )
        if self.observe is not None:
            self.observe("again", stage)
        for between in range(start, stage):
            current = self._advance(between, current)
        self._rebuild(stage, current, wanted=False)

    def _ready(self, stage: int) -> None:
        """Bring back the random numbers of the stage's first run; refuse if what a re-run needs is gone."""
        if not self.rerunnable[stage]:
            raise ReplayError(
                f"stage {stage}: what its re-run needs is not held (any more); if an earlier backward released "
                "it, pass retain_graph=True to that backward"
            )
        if stage in self.states:
            self.states[stage].restore()

    def _advance(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run a stage of which nothing is saved."""
        self._ready(stage)
        if self.observe is not None:
            self.observe("advance", stage)
        with torch.enable_grad(), self.discarding(stage):
            produced = self._outputs(stage, boundary)
        self._compare_output(stage, produced)
        return produced

    def _leaves(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The boundary's tensors, cut off, with the requires_grad flags of the first run."""
        return tuple(
            [t.detach().requires_grad_(flag) for t, flag in zip(boundary, self.flags[stage], strict=True)]
        )

    def _outputs(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next boundary, cut off from the graph of the re-run."""
        return tuple([t.detach() for t in self.run_stage(stage, self._leaves(stage, boundary))])

    def _compare_output(self, stage: int, produced: tuple[Tensor, ...]) -> None:
        """Refuse a re-run that gives the next stage something else than the first run did."""
        expected = self.entries.get(stage + 1, ())
        found = tuple(map(self.fingerprint, produced))
        if found != expected:
            for number, (one, other) in enumerate(zip(expected, found, strict=False)):
                self._refuse(stage, f"its output {number}", one, other)

    def _compare(self, stage: int, index: int, tensor: Tensor) -> None:
        """Refuse a re-run that saves something else than the first run did."""
        expected = self.prints[stage][index]
        if expected is not None:
            found = self.fingerprint(tensor)
            if found != expected:
                self._refuse(stage, self.saved_tensor(stage, index), expected, found)

    def _refuse(self, stage: int, what: str, expected: Fingerprint, found: Fingerprint) -> None:
        how = difference(expected, found)
        if how is not None:
            raise ReplayError(
                f"stage {stage} ({self.name_of(stage)}): {what} {how}; the model does not run the same ops twice on the "
                "same input: make it deterministic, or keep this stage"
            )

    def _rebuild(
        self, stage: int, boundary: tuple[Tensor, ...], wanted: bool, parts: Sequence[Rebuild] = ()
    ) -> tuple[Tensor, ...] | None:
        """Re-run a stage in grad mode and fill its handles (rule 2), or those that an option keeps (rule 5).

        Returns:
            its output, if wanted.
        """
        prints = self.prints[stage]
        needed = prints
        read: set[int] = set()
        sources: dict[int, Held | Moved] = {}
        if parts and self.handles[stage]:
            thinned = self.thinned[stage] = Thinned(parts, boundary)
            sources, read = thinned.sources, thinned.reads()
            needed = [None if i in thinned.parts else known for i, known in enumerate(prints)]
        last = max(read, default=-1)
        last = next((i for i in range(len(needed) - 1, last, -1) if needed[i] is not None), last)
        if last < 0 or not self.handles[stage]:
            return self._advance(stage, boundary) if wanted else None
        filled: dict[int, Tensor] = {}
        count, stop = 0, -1 if wanted or stage in self.reversing else last

        def pack(tensor: Tensor) -> None:
            nonlocal count
            index = count
            count += 1
            if index >= len(prints):
                raise ReplayError(
                    f"stage {stage} ({self.name_of(stage)}): its re-run saves more tensors than its first run "
                    f"({len(prints)}); the model must run the same ops on the same input"
                )
            self._compare(stage, index, tensor)
            if needed[index] is not None:
                filled[index] = tensor.detach()
            if index in read:
                sources[index] = Held(tensor)
            if index == stop:
                raise _Stop

        self._ready(stage)
        if self.observe is not None:
            self.observe("rebuild", stage)
        produced: tuple[Tensor, ...] | None = None
        try:
            with torch.enable_grad(), self._saving(stage, pack):
                produced = self._outputs(stage, boundary)
        except _Stop:
            pass
        if count <= last:
            raise ReplayError(
                f"stage {stage} ({self.name_of(stage)}): its re-run saves {count} tensors, its first run {len(prints)}; "
                "the model must run the same ops on the same input"
            )
        if produced is not None:
            self._compare_output(stage, produced)
        self.filled[stage] = filled
        return produced

    def _recompute(self, stage: int, index: int) -> None:
        """Make what an option dropped again: this saved tensor, and those that hang together with it (rule 5)."""
        thinned = self.thinned[stage]
        part = thinned.parts.get(index)
        if part is None or any(source not in thinned.sources for source, _ in part.sources):
            return
        self._ready(stage)
        if self.observe is not None:
            self.observe("part", stage)
        kept = [self.unpack(thinned.sources[i]).detach().requires_grad_(flag) for i, flag in part.sources]
        thinned.ran(part)
        prints, filled = self.prints[stage], self.filled[stage]
        inputs = self._leaves(stage, tensors_of(thinned.boundary))
        if not thinned.parts:
            del self.thinned[stage]
        del thinned
        count = 0

        def fill(number: int, tensor: Tensor) -> None:
            if number in part.dropped and prints[number] is not None:
                self._compare(stage, number, tensor)
                filled[number] = tensor.detach()

        def pack(tensor: Tensor) -> None:
            nonlocal count
            if count < len(part.saves):
                fill(part.saves[count], tensor)
            count += 1

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _never):
            made = self.run_rebuild(stage, part, inputs, kept)
        if count != len(part.saves):
            raise ReplayError(
                f"stage {stage} ({self.name_of(stage)}): the ops run again save {count} tensors, {len(part.saves)} in the first run; the "
                "model must run the same ops on the same input"
            )
        for number, tensor in zip(part.gives, made, strict=True):
            fill(number, tensor)


def _discard(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise ReplayError("the graph of a re-run must not be reversed")
