"""One training step by a replay program: a state machine that autograd's hooks drive.

Autograd builds its own graph, without its values. A stage is in one of these states (``StepState``):

    state     in autograd's graph      held for its re-runs        until
    kept      saved tensors            nothing                     autograd releases them
    dropped   handles                  all that its runs read      rebuilt (2), or the last handle dies (3)
    thinned   handles, saved tensors   its boundary, some of both  a handle's unpack runs a part again (5)
    rebuilt   handles, now filled      as dropped, but see 7       unpacks take all, the last handle dies (3)
    released  nothing                  nothing

A boundary is *working* while it is the latest that the replay has produced, and *held* from the first sweep
or a ``Checkpoint`` until a ``Free``, or until no stage that it serves can run again (3).

The rules, referred to by number:

1. The first sweep runs every stage once in grad mode. For a stage whose saved tensors are dropped, the pack
   hook hands autograd a handle (stage, index) in place of each; the index counts the pack calls of that
   stage. A tensor that outlives the step (parameter, input, carried value) is packed by reference.
2. The first unpack of a dropped handle of stage k runs the replay program up to the backward of stage k. A
   rebuild re-runs the stage in grad mode on detached inputs with their requires_grad flags restored; its pack
   hook sees the same calls in the same order, fills the handles, and stops the run after the last one, before
   that op's kernel runs, unless the output is needed.
3. A rebuilt value is released at its unpack. Handles count themselves: when the last handle of a stage dies
   (autograd releases a node's saved tensors when it is done with them), so does what was held for it. Hence
   retain_graph, double backward, partial and abandoned backwards need no case of their own.
4. A request that the program has passed already (a second backward) restarts it; if what it needs is
   released, the stage is rebuilt from the nearest boundary that is held: slower, never wrong.
5. A stage kept with an option drops some of its saved tensors. The first unpack of one of these, once the
   program is at the stage's backward, runs the part of the option's own program (``Rebuild``) that recomputes
   it, on what was kept; any other request is answered as for a dropped stage.
6. Random numbers: each stage that draws is re-run from its own state, and the generators are restored after
   every replay. So is what surrounds the code (``RunContext``): grad mode, autocast, what chooses kernels,
   the default device and function modes. Buffers that a stage changes are changed by its first run only.
7. Once the program has kept a rebuilt stage whole, no run of it starts from that stage's input any more. The
   input is released, and autograd holds what it saved of it; not so where it may be asked for again: the
   graph is retained, or saved tensors of stages that are reversed already are still wanted.
8. Where the program copies between device and host, whatever a kept stage saved, and every boundary that is
   held, is a ``Moved`` (host_copies.py); its unpack runs the program up to the backward of its stage, like
   that of a handle.
9. Autograd checks versions only of tensors that it holds itself. Whatever is kept by reference, and whatever
   a re-run reads, is checked here: a change in place between forward and backward raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rematplan.executors.compare_replay import ReplayCheck, ReplayError
from rematplan.executors.engine import Stages
from rematplan.executors.host_copies import Moved
from rematplan.executors.step_state import Handle, Held, Lasting, StepState, tensors_of
from rematplan.executors.trace import Observer, silent
from rematplan.scheduler.capture.graph.recompute import OtherOps, Rebuild, Thinned, rerun
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.schedule import COPY_ACTIONS, Backward, Checkpoint, Forward, Free, Keep
from rematplan.scheduler.torch_layer.environment import RunContext
from rematplan.scheduler.torch_layer.layouts import storage_key
from rematplan.scheduler.torch_layer.preserve import RandomState, on_gradient, shielded
from rematplan.scheduler.torch_layer.private import detect_fake_mode, graph_task, keeps_graph

__all__ = ["Step"]

_MOVES = (Free, *COPY_ACTIONS)


class Step:
    """One step, from its forward until its graph is gone.

    Args:
        stages: of the executor whose program the step follows.

    Attributes:
        faked: whether tensors have no data.
        random: stages whose generators are noted before their first run.
        context: that of the forward.
    """

    def __init__(self, stages: Stages) -> None:
        executor = stages.executor
        self.program: ReplayProgram = executor.program
        self.stages, self.device, self.random = stages, executor.device, executor.random
        self.tell: Observer = executor.observe or silent
        self.faked = detect_fake_mode() is not None
        self.comparison = ReplayCheck(executor.check, self.faked, stages)
        sampled = self.comparison.sampled
        self.state = StepState(self.program, stages.release, self.tell, sampled, executor.arena)
        self.lasting = Lasting()
        self.context = RunContext(self.device.type)
        self._flags: dict[int, tuple[bool, ...]] = {}  # boundary -> requires_grad of each tensor
        self._position = 0  # in program.replay
        self._task = -1  # autograd's id of the backward pass that the position belongs to
        self._working: tuple[int, tuple[Tensor, ...]] | None = None

    # ---- the first sweep -----------------------------------------------------------------------------

    def before_first_run(self, stage: int, boundary: tuple[Tensor, ...]) -> None:
        """Note what a later re-run of the stage needs: its boundary, its random numbers."""
        self._flags[stage] = tuple([t.requires_grad for t in boundary])
        self.comparison.note_boundary(stage, boundary)
        if stage in self.program.held or self.program.kept[stage]:
            self.state.hold(stage, boundary)
        if self.random[stage]:
            self.state.generators[stage] = RandomState(self.device, self.faked)

    def dropping(self, stage: int, parts: Sequence[Rebuild] | None = None) -> saved_tensors_hooks:
        """Return the context of a first run that drops what it saves (rule 1).

        Args:
            parts: of an option, which drops what these recompute (rule 5); () to drop nothing (rule 8).
        """
        state, lasting, fingerprint = self.state, self.lasting, self.comparison.fingerprint
        prints, keys, store = state.prints[stage], lasting.keys, state.store
        dropped: frozenset[int] | None = None
        wanted: set[int] = set()
        sources: dict[int, Held | Moved] = {}
        if parts is not None and not parts:
            dropped = frozenset()
        elif parts is not None:
            thinned = state.thinned[stage] = Thinned(parts, state.boundaries[stage])
            dropped, wanted, sources = frozenset(thinned.parts), thinned.reads(), thinned.sources

        def pack(tensor: Tensor) -> Handle | Held | Moved:
            index = len(prints)
            lasts = storage_key(tensor) in keys
            if (dropped is None or index in dropped) and not lasts:
                prints.append(fingerprint(tensor))
                return Handle(state, stage, index)
            prints.append(None)
            held: Held | Moved
            if lasts:
                held = lasting.pack(tensor)
            else:
                held = Held(tensor) if store is None else store.pack(stage, tensor)
            if index in wanted:
                sources[index] = held
            return held

        return saved_tensors_hooks(self._shielded(pack), self.unpack)

    def _shielded(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return shielded(hook) if self.stages.executor.compiled else hook

    def watch(self, stage: int, results: Sequence[Tensor]) -> None:
        """Tell the observer that the stage's backward begins, when the gradients of its results arrive."""
        if self.tell is not silent:
            _at_gradients(results, lambda _: self.tell("backward", stage))

    def after_first_run(self, stage: int, results: Sequence[Tensor], following: tuple[Tensor, ...]) -> None:
        """Copy what the program copies once the stage has run; ``following``: the next boundary (rule 8)."""
        state, store = self.state, self.state.store
        if store is None:
            return
        kept = self.program.kept[stage] is not None
        if not kept and stage not in self.program.held:
            store.passed(stage)
        packed = store.ran(stage, following, self.lasting.keys, kept=kept)
        for action in self.program.moves[stage]:
            state.move(action)
        if not packed and not state.handles[stage]:  # nothing that is unpacked would run the program on
            _at_gradients(results, lambda _: self._replay_until(stage))

    # ---- backward ------------------------------------------------------------------------------------

    def unpack(self, packed: Handle | Held | Moved) -> Tensor:
        """Return the saved tensor that ``packed`` stands for."""
        if type(packed) is Handle:
            stage, index = packed.stage, packed.index
            tensor = self.state.filled[stage].pop(index, None)
            if tensor is None:
                self._replay_until(stage, index)
                tensor = self.state.filled[stage].pop(index, None)
            if tensor is None:
                raise self.comparison.error(
                    stage,
                    f"its re-run did not save tensor {index} again, so the model does not run the same ops twice on the "
                    "same input; make it deterministic or keep this stage",
                )
            return tensor
        if isinstance(packed, Moved):
            self._replay_until(packed.stage)
            return packed.tensor()
        assert isinstance(packed, Held)
        return packed.unpack()

    def _replay_until(self, stage: int, index: int | None = None) -> None:
        """Run the program up to the backward of ``stage``; fill this handle of it, if any (rules 2, 4, 5)."""
        task = graph_task()
        if index is None and task == self._task and self._position >= self.program.backward_at[stage]:
            return
        generators = RandomState(self.device, self.faked) if self.state.generators else None
        try:
            with self.context.restored():
                self._replay(task, stage, index)
        except torch.OutOfMemoryError:
            self.stages.executor.ran_out = True
            raise
        finally:
            if generators is not None:
                generators.restore()
            self.tell("backward", stage)

    def _replay(self, task: int, stage: int, index: int | None) -> None:
        end = self.program.backward_at[stage]
        if task != self._task:
            self._task = task
            if self._position >= end:
                self._position, self._working = 0, None
        done = self._position <= end and self._follow(stage, end)
        if index is None:
            return
        state = self.state
        if done:
            self.tell("backward", stage)
            if index not in state.filled[stage] and stage in state.thinned:
                self._recompute(stage, index)
            if index in state.filled[stage]:
                return
        self._rebuild_from_nearest(stage)

    def _follow(self, stage: int, end: int) -> bool:
        """Run the program up to the backward of ``stage``; return False if something it needs is released."""
        replay = self.program.replay
        while self._position < end:
            action = replay[self._position]
            self.tell("replay", self._position)
            if isinstance(action, Backward):
                self.state.reversed(action.stage)
                if self._working is not None and self._working[0] > action.stage:
                    self._working = None
            elif isinstance(action, _MOVES):
                self.state.move(action)
            elif not self.state.rerunnable[action.stage]:
                # Neither it nor a stage that it could lead to has a handle left: its run would serve nobody.
                self._working = None
            elif not self._run(action, stage):
                return False
            self._position += 1
        return True

    def _run(self, action: Forward | Checkpoint | Keep, reversing: int) -> bool:
        """Run a stage, before the backward of ``reversing``; return False if its boundary is released."""
        stage, state = action.stage, self.state
        current = self._boundary(stage)
        if current is None:
            return False
        if isinstance(action, Checkpoint) and stage not in state.boundaries:
            state.hold(stage, current)
        self._working = None
        if isinstance(action, Keep):
            following = self.program.replay[self._position + 1]
            wanted = not (isinstance(following, Backward) and following.stage == stage)
            parts = self.stages.rebuilds(stage, action.option) if action.option else ()
            produced = self._rebuild(stage, current, wanted, parts)
            if stage and not action.option and self._reversed_for_good(reversing):
                state.free(stage)  # rule 7
        else:
            produced = self._advance(stage, current)
        if produced is not None:
            self._working = (stage + 1, produced)
        return True

    def _reversed_for_good(self, stage: int) -> bool:
        """Return whether nothing of the stages after this one can be asked for again (rule 7)."""
        return not keeps_graph() and not any(self.state.handles[stage + 1 : self.state.top() + 1])

    def _boundary(self, boundary: int) -> tuple[Tensor, ...] | None:
        state = self.state
        if self._working is not None and self._working[0] == boundary:
            return self._working[1]
        if boundary not in state.boundaries:
            return None
        held = tensors_of(state.boundaries[boundary])
        if state.store is None and held:
            self.comparison.starts_from(boundary, state.reads[boundary])
        return held

    def _rebuild_from_nearest(self, stage: int) -> None:
        """Rebuild one stage from the nearest held boundary, whatever the program says (rule 4)."""
        start = max((b for b in self.state.boundaries if b <= stage), default=-1)
        current = self._boundary(start)
        if current is None:
            raise ReplayError(
                f"stage {stage}: no boundary before it is held any more; an earlier backward released it. "
                "Pass retain_graph=True to that backward"
            )
        self.tell("again", stage)
        for between in range(start, stage):
            current = self._advance(between, current)
        self._rebuild(stage, current, wanted=False)

    # ---- re-runs -------------------------------------------------------------------------------------

    def _ready(self, stage: int) -> None:
        """Restore the random numbers of the stage's first run; refuse if what a re-run needs is released."""
        if not self.state.rerunnable[stage]:
            raise ReplayError(
                f"stage {stage}: what its re-run needs is not held (any more); if an earlier backward released "
                "it, pass retain_graph=True to that backward"
            )
        if stage in self.state.generators:
            self.state.generators[stage].restore()

    def _advance(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Re-run a stage and save nothing."""
        self._ready(stage)
        self.tell("advance", stage)
        with self._discarding(stage):
            produced = self._outputs(stage, boundary)
        self.comparison.check_output(stage, produced)
        return produced

    def _leaves(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the boundary's tensors, cut off, with the requires_grad flags of the first run."""
        return tuple(
            [t.detach().requires_grad_(flag) for t, flag in zip(boundary, self._flags[stage], strict=True)]
        )

    def _outputs(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Re-run a stage; return the next boundary, cut off from the graph of the re-run."""
        return tuple(
            [t.detach() for t in self.stages.run(stage, self._leaves(stage, boundary), self.comparison)]
        )

    def _rebuild(
        self, stage: int, boundary: tuple[Tensor, ...], wanted: bool, parts: Sequence[Rebuild] = ()
    ) -> tuple[Tensor, ...] | None:
        """Re-run a stage and fill its handles (rule 2), or those that an option keeps (rule 5).

        Returns:
            its output, if wanted.
        """
        state, prints = self.state, self.state.prints[stage]
        needed = prints
        read: set[int] = set()
        sources: dict[int, Held | Moved] = {}
        if parts and state.handles[stage]:
            thinned = state.thinned[stage] = Thinned(parts, boundary)
            sources, read = thinned.sources, thinned.reads()
            needed = [None if i in thinned.parts else known for i, known in enumerate(prints)]
        last = max(read, default=-1)
        last = next((i for i in range(len(needed) - 1, last, -1) if needed[i] is not None), last)
        if last < 0 or not state.handles[stage]:
            return self._advance(stage, boundary) if wanted else None
        filled: dict[int, Tensor] = {}
        count, stop = 0, -1 if wanted or stage in self.stages.executor.reversing else last

        def pack(tensor: Tensor) -> None:
            nonlocal count
            index = count
            count += 1
            if index >= len(prints):
                raise self.comparison.error(
                    stage,
                    f"its re-run saves more tensors than its first run ({len(prints)}); the model must run the same ops on "
                    "the same input",
                )
            self.comparison.check_saved(stage, index, prints[index], tensor)
            if needed[index] is not None:
                filled[index] = tensor.detach()
            if index in read:
                sources[index] = Held(tensor)
            if index == stop:
                raise _Stop

        self._ready(stage)
        self.tell("rebuild", stage)
        produced: tuple[Tensor, ...] | None = None
        try:
            with self._saving(stage, pack):
                produced = self._outputs(stage, boundary)
        except _Stop:
            pass
        if count <= last:
            raise self.comparison.error(
                stage,
                f"its re-run saves {count} tensors, its first run {len(prints)}; the model must run the same ops on the "
                "same input",
            )
        if produced is not None:
            self.comparison.check_output(stage, produced)
        state.filled[stage] = filled
        return produced

    def _recompute(self, stage: int, index: int) -> None:
        """Recompute this saved tensor that an option dropped, and those of the same part (rule 5)."""
        state = self.state
        thinned = state.thinned[stage]
        part = thinned.parts.get(index)
        if part is None or any(source not in thinned.sources for source, _ in part.sources):
            return
        self._ready(stage)
        self.tell("part", stage)
        kept = [self.unpack(thinned.sources[i]).detach().requires_grad_(flag) for i, flag in part.sources]
        thinned.ran(part)
        prints, filled = state.prints[stage], state.filled[stage]
        boundary = tensors_of(thinned.boundary)
        if not thinned.parts:
            del state.thinned[stage]
        del thinned

        def fill(number: int, tensor: Tensor) -> None:
            if prints[number] is not None:
                self.comparison.check_saved(stage, number, prints[number], tensor)
                filled[number] = tensor

        arguments = self.stages.arguments(stage, self._leaves(stage, boundary), self.comparison, part)
        del boundary
        try:
            rerun(part, arguments, kept, fill)
        except OtherOps as error:
            raise self.comparison.error(
                stage, f"{error}; the model must run the same ops on the same input"
            ) from None

    def _discarding(self, stage: int) -> saved_tensors_hooks:
        """Return the context of a re-run of which nothing is saved."""
        if not self.comparison.thorough:
            return self._saving(stage, _discard)
        numbered = enumerate(self.state.prints[stage])

        def look(tensor: Tensor) -> None:
            known = next(numbered, None)
            if known is not None:
                self.comparison.check_saved(stage, *known, tensor)

        return self._saving(stage, look)

    def _saving(self, stage: int, pack: Callable[[Tensor], None]) -> saved_tensors_hooks:
        """Return the context of a re-run that hands saved tensors to ``pack``; a reversing one keeps them."""
        if stage not in self.stages.executor.reversing:
            return saved_tensors_hooks(self._shielded(pack), _never)

        def hold(tensor: Tensor) -> Tensor:
            pack(tensor)
            return tensor if tensor.is_leaf else tensor.detach()

        return saved_tensors_hooks(self._shielded(hold), lambda tensor: tensor)


class _Stop(Exception):
    """Raised by the pack hook when the last handle is filled (rule 2)."""


def _at_gradients(tensors: Sequence[Tensor], then: Callable[[Tensor], None]) -> None:
    for tensor in tensors:
        if tensor.requires_grad:
            on_gradient(tensor, then)


def _discard(_: Tensor) -> None:
    return None


def _never(_: Any) -> Tensor:
    raise ReplayError("the graph of a re-run must not be reversed")
