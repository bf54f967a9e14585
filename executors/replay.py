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
   after every replay. Buffers that a stage changes are changed by its first run only.
7. Once the program has kept a stage again whole, no run of it starts from that stage's input any more. The input is let
   go of, and autograd holds what it saved of it; not so where it may be asked for again: the graph is retained, or
   saved tensors of stages that are reversed already are still wanted.
8. Where the program copies between device and host, whatever a kept stage saved, and every boundary that is held, is a
   ``Moved`` (offload.py); its unpack runs the program up to the backward of its stage, like that of a handle.
9. Autograd checks versions only of tensors that it holds itself. Whatever is kept by reference, and
   whatever a re-run reads, is checked here: a change in place between forward and backward raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from executors.check import CHECKS, Fingerprint, difference
from executors.handles import Handle, Held, Thinned
from executors.offload import Moved, Store
from executors.trace import Observer
from scheduler.actions import CopyAction
from scheduler.capture.recompute import Rebuild
from scheduler.capture.state import RandomState, autocast_contexts, autocast_state, shielded
from scheduler.program import ReplayProgram
from scheduler.schedule import COPY_ACTIONS, Backward, Checkpoint, Forward, Free, FreeHost, Keep

__all__ = ["ReplayError", "Step"]


class ReplayError(RuntimeError):
    """A stage cannot be replayed exactly; no gradient was returned."""


class _Stop(Exception):
    """Raised by the pack hook when the last handle is filled (rule 2)."""


class Step:
    """The state of one step, from its forward until its graph is gone.

    Attributes:
        program: what to run.
        boundaries: boundary -> its tensors, detached, while held; or what stands for them (rule 8).
        store: what is on the device and on the host, if the program copies between the two.
        flags: boundary -> requires_grad of each tensor.
        filled: stage -> index -> rebuilt saved tensor.
        handles: stage -> handles alive.
        thinned: stage kept with an option -> how to rebuild what it dropped.
        rerunnable: stage -> whether what its re-run needs is still held.
        prints: stage -> index -> what a replay of a dropped saved tensor is compared by; None if packed by reference.
        entries: boundary -> likewise, of each of its tensors.
        observe: is told where the step is; None, as in training, costs nothing.
        compiled: whether stages have code that torch.compile has compiled.
    """

    compiled = False

    def __init__(
        self,
        program: ReplayProgram,
        device: torch.device,
        random: Sequence[bool],
        observe: Observer | None = None,
        check: str = "metadata",
    ) -> None:
        stages = len(program.kept)
        self.program = program
        self.device = device
        self.random = random
        self.observe = observe
        self.draws = any(random)
        self.boundaries: dict[int, tuple[Tensor | Moved, ...]] = {}
        self.store = Store() if program.copies else None
        self.versions: dict[int, tuple[int, ...]] = {}
        self.flags: dict[int, tuple[bool, ...]] = {}
        self.filled: list[dict[int, Tensor]] = [{} for _ in range(stages)]
        self.handles = [0] * stages
        self.rerunnable = [kept != 0 for kept in program.kept]
        self.thinned: dict[int, Thinned] = {}
        self.fingerprint = CHECKS[check]
        self.prints: list[list[Fingerprint | None]] = [[] for _ in range(stages)]
        self.entries: dict[int, tuple[Fingerprint, ...]] = {}
        self.states: dict[int, RandomState] = {}
        self.lasting: set[int] = set()  # identities of storages that are packed by reference
        self.sweeping = True
        self.position = 0  # in program.replay
        self.working: tuple[int, tuple[Tensor, ...]] | None = None
        self.task = -1  # autograd's id of the backward pass that the position belongs to
        self.autocast = autocast_state(device)

    # ---- what a kind of capture supplies -------------------------------------------------------------

    def run_stage(self, stage: int, boundary: tuple[Tensor, ...], grad: bool) -> tuple[Tensor, ...]:
        """Re-run a stage on the tensors of its boundary; gives those of the next boundary.

        Args:
            grad: whether autograd records it; then everything that required grad in the first run must.
        """
        raise NotImplementedError

    def release_inputs(self, stage: int) -> None:
        """Let go of what is held only for re-runs of this stage."""

    def rebuilds_of(self, stage: int, option: int) -> tuple[Rebuild, ...]:
        """How what an option (not the first) of the stage drops is made again."""
        raise NotImplementedError

    def run_rebuild(
        self, stage: int, rebuild: Rebuild, boundary: tuple[Tensor, ...], sources: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run a part of an option's program on the tensors of the stage's boundary and on kept packs."""
        raise NotImplementedError

    def name_of(self, stage: int) -> str:
        """The stage's name."""
        raise NotImplementedError

    def ran_out(self) -> None:
        """A replay ran out of memory."""

    def saved_tensor(self, stage: int, index: int) -> str:
        """A saved tensor of the stage, and where it comes from, in words."""
        raise NotImplementedError

    # ---- the first sweep -----------------------------------------------------------------------------

    def hold(self, boundary: int, tensors: tuple[Tensor, ...]) -> None:
        """Hold on to a boundary."""
        if self.store is not None:
            self.boundaries[boundary] = self.store.hold(boundary, tensors, own=not self.sweeping)
        else:
            self.boundaries[boundary] = tuple(t.detach() for t in tensors)
            self.versions[boundary] = tuple(t._version for t in tensors)
        if self.observe is not None:
            self.observe("held", boundary, tensors)

    def before_first_run(self, stage: int, boundary: tuple[Tensor, ...]) -> None:
        """Note what a later re-run of the stage needs: its boundary, its random numbers."""
        self.flags[stage] = tuple(t.requires_grad for t in boundary)
        self.entries[stage] = tuple(map(self.fingerprint, boundary))
        if stage in self.program.held or self.program.kept[stage]:
            self.hold(stage, boundary)
        if self.random[stage]:
            self.states[stage] = RandomState(self.device)

    def watch(self, stage: int, results: Sequence[Tensor]) -> None:
        """Tell the observer that the backward of the stage begins, when the gradients of its results arrive."""
        observe = self.observe
        if observe is not None:
            for tensor in results:
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: observe("backward", stage))

    def dropping(
        self, stage: int, parts: Sequence[Rebuild] | None = None
    ) -> torch.autograd.graph.saved_tensors_hooks:
        """The context of a first run whose saved tensors are dropped (rule 1), or those that an option drops (rule 5).

        With ``parts`` of () nothing is dropped (rule 8).
        """
        prints, lasting, store = self.prints[stage], self.lasting, self.store
        fingerprint = self.fingerprint
        dropped: frozenset[int] | None = None
        wanted: set[int] = set()
        sources: dict[int, Held | Moved] = {}
        if parts is not None and not parts:
            dropped = frozenset()
        elif parts is not None:
            thinned = self.thinned[stage] = Thinned(parts, self.boundaries[stage])
            dropped, wanted, sources = frozenset(thinned.parts), thinned.reads(), thinned.sources

        def pack(tensor: Tensor) -> Handle | Held | Moved:
            index = len(prints)
            lasts = tensor.untyped_storage()._cdata in lasting
            if (dropped is None or index in dropped) and not lasts:
                prints.append(fingerprint(tensor))
                return Handle(self, stage, index)
            prints.append(None)
            held = Held(tensor) if store is None or lasts else store.pack(stage, tensor)
            if index in wanted:
                sources[index] = held
            return held

        return torch.autograd.graph.saved_tensors_hooks(self._shielded(pack), self.unpack)

    def discarding(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context of a run in grad mode that nothing is saved of."""
        return torch.autograd.graph.saved_tensors_hooks(self._shielded(_discard), _never)

    def _shielded(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return shielded(hook) if self.compiled else hook

    def last(self, tensors: Sequence[Tensor]) -> None:
        """These storages live on through the step: saved tensors among them are packed by reference."""
        self.lasting.update(t.untyped_storage()._cdata for t in tensors)

    def after_first_run(self, stage: int, results: Sequence[Tensor], following: tuple[Tensor, ...]) -> None:
        """Copy what the program copies once the stage has run; ``following`` is the next boundary (rule 8)."""
        store = self.store
        if store is None:
            return
        packed = store.ran(stage, following, self.lasting, kept=self.program.kept[stage] is not None)
        for action in self.program.moves[stage]:
            self._move(action)
        if (
            not packed and not self.handles[stage]
        ):  # the program goes on where this stage is reversed all the same
            for tensor in results:
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: self.replay_until(stage))

    def _move(self, action: CopyAction | Free) -> None:
        """Carry out a copy, or let go of one (rule 8)."""
        assert self.store is not None
        self.store.move(action)
        if isinstance(action, (Free, FreeHost)) and not self.store.wanted(action.boundary):
            self.boundaries.pop(action.boundary, None)

    def sweep_is_over(self) -> None:
        """The forward is done; from here on handles that die release what was held for them."""
        self.sweeping = False
        if self.store is not None:
            self.store.sweep_is_over()
        for stage, alive in enumerate(self.handles):
            if not alive and self.rerunnable[stage]:
                self.stage_is_done(stage)

    # ---- release -------------------------------------------------------------------------------------

    def stage_is_done(self, stage: int) -> None:
        """The last handle of the stage is gone: nobody will ask for its saved tensors again (rule 3).

        What is held for re-runs goes with the last stage that such a re-run could serve: a boundary serves
        the stages up to the next held one, and each of these is run over by those after it.
        """
        self.filled[stage].clear()
        self.thinned.pop(stage, None)
        holder = max((b for b in self.boundaries if b <= stage), default=0)
        following = min((b for b in self.boundaries if b > holder), default=len(self.handles))
        for served in range(following - 1, holder - 1, -1):
            if self.handles[served]:
                return
            if self.rerunnable[served]:
                self.rerunnable[served] = False
                self.states.pop(served, None)
                self.release_inputs(served)
        self.free(holder)

    def free(self, boundary: int) -> None:
        """Hold a boundary no longer."""
        held = self.boundaries.pop(boundary, None)
        if self.observe is not None and held is not None:
            self.observe("freed", boundary, _tensors(held) if self.store is None else ())

    # ---- backward ------------------------------------------------------------------------------------

    def unpack(self, packed: Handle | Held | Moved) -> Tensor:
        """The saved tensor that ``packed`` stands for."""
        if isinstance(packed, Moved):
            self.replay_until(packed.stage)
            return packed.tensor()
        if isinstance(packed, Held):
            if packed.tensor._version != packed.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace "
                    f"operation: a tensor of shape {tuple(packed.tensor.shape)} is at version "
                    f"{packed.tensor._version}, expected version {packed.version}"
                )
            return packed.tensor
        filled = self.filled[packed.stage]
        if packed.index not in filled:
            self.replay_until(packed.stage, packed.index)
            filled = self.filled[packed.stage]
            if packed.index not in filled:
                raise ReplayError(
                    f"stage {packed.stage} ({self.name_of(packed.stage)}): its re-run did not save tensor {packed.index} again, so the model "
                    "does not run the same ops twice on the same input; make it deterministic or keep this stage"
                )
        return filled.pop(packed.index)

    def replay_until(self, stage: int, index: int | None = None) -> None:
        """Run the program up to the backward of ``stage``, so that this handle of it, if any, is filled (rules 2, 4, 5)."""
        there = self.position >= self.program.backward_at[stage]
        if index is None and there and torch._C._current_graph_task_id() == self.task:
            return
        generators = RandomState(self.device) if self.draws else None
        try:
            with ExitStack() as contexts:
                for context in autocast_contexts(self.autocast):
                    contexts.enter_context(context)
                task = torch._C._current_graph_task_id()
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
        except torch.OutOfMemoryError:
            self.ran_out()
            raise
        finally:
            if generators is not None:
                generators.restore()
            if self.observe is not None:
                self.observe("backward", stage)

    def _follow(self, stage: int) -> bool:
        """Run the program's actions up to the backward of ``stage``; False if something it needs is gone."""
        replay, target = self.program.replay, self.program.backward_at[stage]
        while self.position < target:
            action = replay[self.position]
            if self.observe is not None:
                self.observe("replay", self.position)
            if isinstance(action, Backward):
                self.filled[action.stage].clear()
                self.thinned.pop(action.stage, None)
                if self.working is not None and self.working[0] > action.stage:
                    self.working = None
                if self.store is not None:
                    self.store.reversed(action.stage)
            elif self.store is not None and isinstance(action, (Free, *COPY_ACTIONS)):
                self._move(action)
            elif isinstance(action, Free):
                self.free(action.boundary)
            elif isinstance(action, (Forward, Checkpoint, Keep)) and not self.rerunnable[action.stage]:
                # Neither it nor a stage that it could lead to has a handle left: its run would serve nobody.
                self.working = None
            elif isinstance(action, (Forward, Checkpoint, Keep)):
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
        return (
            not any(self.handles[stage + 1 :]) and not torch._C._autograd._get_current_graph_task_keep_graph()
        )

    def _boundary(self, boundary: int) -> tuple[Tensor, ...] | None:
        if self.working is not None and self.working[0] == boundary:
            return self.working[1]
        if boundary not in self.boundaries:
            return None
        held = _tensors(self.boundaries[boundary])
        if self.store is None and tuple(t._version for t in held) != self.versions[boundary]:
            raise RuntimeError(
                f"boundary {boundary} has been modified by an inplace operation since the forward, so that the "
                "stages after it cannot be replayed"
            )
        return held

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
        """Run a stage without grad."""
        self._ready(stage)
        if self.observe is not None:
            self.observe("advance", stage)
        with torch.no_grad():
            produced = self.run_stage(stage, boundary, grad=False)
        self._compare_output(stage, produced)
        return produced

    def _compare_output(self, stage: int, produced: tuple[Tensor, ...]) -> None:
        """Refuse a re-run that gives the next stage something else than the first run did."""
        for number, (expected, tensor) in enumerate(
            zip(self.entries.get(stage + 1, ()), produced, strict=False)
        ):
            found = self.fingerprint(tensor)
            if found != expected:
                self._refuse(stage, f"its output {number}", expected, found)

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
        thinned = Thinned(parts, boundary)
        sources, read = thinned.sources, thinned.reads()
        needed = {i for i, known in enumerate(prints) if known is not None and i not in thinned.parts}
        last = max(needed | read, default=-1)
        if not self.handles[stage]:
            return self._advance(stage, boundary) if wanted else None
        filled: dict[int, Tensor] = {}
        if parts:
            self.thinned[stage] = thinned
        if last < 0:
            return self._advance(stage, boundary) if wanted else None
        count = 0

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
            if index in needed:
                filled[index] = tensor.detach()
            if index in read:
                sources[index] = Held(tensor)
            if index == last and not wanted:
                raise _Stop

        self._ready(stage)
        if self.observe is not None:
            self.observe("rebuild", stage)
        inputs = tuple(
            t.detach().requires_grad_(flag) for t, flag in zip(boundary, self.flags[stage], strict=True)
        )
        produced: tuple[Tensor, ...] | None = None
        hooks = torch.autograd.graph.saved_tensors_hooks(self._shielded(pack), _never)
        with suppress(_Stop), torch.enable_grad(), hooks:
            produced = tuple(t.detach() for t in self.run_stage(stage, inputs, grad=True))
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
        inputs = tuple(
            t.detach().requires_grad_(flag)
            for t, flag in zip(_tensors(thinned.boundary), self.flags[stage], strict=True)
        )
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


def _tensors(held: tuple[Tensor | Moved, ...]) -> tuple[Tensor, ...]:
    return tuple(t.tensor() if isinstance(t, Moved) else t for t in held)


def _discard(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise ReplayError("the graph of a re-run must not be reversed")
