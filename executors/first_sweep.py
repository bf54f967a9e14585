"""One training step up to its backward: the first sweep, and what it leaves behind. replay.py numbers the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from executors.arena import Arena
from executors.as_read import AsRead, Sampler
from executors.check import CHECKS, Fingerprint
from executors.handles import Handle, Held, Thinned
from executors.offload import Moved, Store
from executors.trace import Observer
from scheduler.actions import CopyAction
from scheduler.capture.environment import default_device, function_modes, switches
from scheduler.capture.layouts import storage_key, storage_keys, storage_of
from scheduler.capture.private import detect_fake_mode, version_of
from scheduler.capture.recompute import Rebuild
from scheduler.capture.state import RandomState, autocast_state, on_gradient, shielded
from scheduler.program import ReplayProgram
from scheduler.schedule import Free, FreeHost

__all__ = ["FirstSweep", "tensors_of"]


class FirstSweep:
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
        states: stage that draws random numbers -> the generators as its first run began.
        prints: stage -> index -> what a replay of a dropped saved tensor is compared by; None if it is packed by reference, or
            its handle is gone.
        entries: boundary -> likewise, of each of its tensors.
        observe: is told where the step is; None, as in training, costs nothing.
        thorough: whether runs are compared of which nothing is saved, too, so that the op is named that differs first.
        compiled: whether stages have code that torch.compile has compiled.
        reversing: stages that call autograd.grad on what they have made, in their runs.
    """

    compiled = False
    reversing: frozenset[int] = frozenset()

    def __init__(
        self,
        program: ReplayProgram,
        device: torch.device,
        random: Sequence[bool],
        observe: Observer | None = None,
        check: str = "metadata",
        arena: Arena | None = None,
    ) -> None:
        stages = len(program.kept)
        self.program = program
        self.device = device
        self.random = random
        self.observe = observe
        self.faked = detect_fake_mode() is not None
        self.boundaries: dict[int, tuple[Tensor | Moved, ...]] = {}
        self.store = None if arena is None else Store(arena)
        self.reads: dict[int, AsRead] = {}  # boundary -> its tensors as they were when it was held
        self.sampled = (
            check != "none" and not self.faked
        )  # whether a few values of what re-runs read are compared
        self.doubtful: AsRead | None = (
            None  # a boundary whose values are compared with those of the run's other inputs
        )
        self.flags: dict[int, tuple[bool, ...]] = {}
        self.filled: list[dict[int, Tensor]] = [{} for _ in range(stages)]
        self.handles = [0] * stages
        self.rerunnable = [kept != 0 for kept in program.kept]
        self.thinned: dict[int, Thinned] = {}
        self.fingerprint = CHECKS[check]
        self.thorough = check == "values"
        self.prints: list[list[Fingerprint | None]] = [[] for _ in range(stages)]
        self.entries: dict[int, tuple[Fingerprint, ...]] = {}
        self.states: dict[int, RandomState] = {}
        self.lasting: set[int] = set()  # identities of storages that are packed by reference
        self.identities: list[StorageWeakRef] = []  # of those that may go meanwhile
        # One of each: Python's collector goes through all that a step of many stages leaves behind, again and again.
        self.known: dict[Fingerprint, Fingerprint] = {}
        self.leaves: dict[int, Held] = {}
        self.sweeping = True
        self._top = stages - 1  # no stage above it is rerunnable, or has handles
        self.position = 0  # in program.replay
        self.working: tuple[int, tuple[Tensor, ...]] | None = None
        self.task = -1  # autograd's id of the backward pass that the position belongs to
        self.autocast = autocast_state(device)
        self.switches = switches(device.type)
        self.default_device, self.modes = default_device(), function_modes()

    # ---- what a kind of capture supplies -------------------------------------------------------------

    def run_stage(self, stage: int, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Re-run a stage on the tensors of its boundary; gives those of the next boundary.

        Always in grad mode, as in the first run: ops choose their kernels by it (LSTMs, attention), and code may ask for it.

        Args:
            boundary: requires grad where it did.
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
            held = tuple([t.detach() for t in tensors])
            self.boundaries[boundary] = held
            if held:
                self.reads[boundary] = AsRead(held, Sampler() if self.sampled else None)
        if self.observe is not None:
            self.observe("held", boundary, tensors)

    def before_first_run(self, stage: int, boundary: tuple[Tensor, ...]) -> None:
        """Note what a later re-run of the stage needs: its boundary, its random numbers."""
        self.flags[stage] = tuple([t.requires_grad for t in boundary])
        found = tuple(map(self.fingerprint, boundary))
        self.entries[stage] = self.known.setdefault(found, found)
        if stage in self.program.held or self.program.kept[stage]:
            self.hold(stage, boundary)
        if self.random[stage]:
            self.states[stage] = RandomState(self.device, self.faked)

    def watch(self, stage: int, results: Sequence[Tensor]) -> None:
        """Tell the observer that the backward of the stage begins, when the gradients of its results arrive."""
        observe = self.observe
        if observe is not None:
            for tensor in results:
                if tensor.requires_grad:
                    on_gradient(tensor, lambda _: observe("backward", stage))

    def dropping(
        self, stage: int, parts: Sequence[Rebuild] | None = None
    ) -> torch.autograd.graph.saved_tensors_hooks:
        """The context of a first run whose saved tensors are dropped (rule 1), or those that an option drops (rule 5).

        With ``parts`` of () nothing is dropped (rule 8).
        """
        prints, lasting, store = self.prints[stage], self.lasting, self.store
        fingerprint = self.fingerprint
        known = self.known
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
            lasts = storage_key(tensor) in lasting
            if (dropped is None or index in dropped) and not lasts:
                found = fingerprint(tensor)
                prints.append(known.setdefault(found, found))
                return Handle(self, stage, index)
            prints.append(None)
            held: Held | Moved
            if lasts:
                held = self.held(tensor)
            else:
                held = Held(tensor) if store is None else store.pack(stage, tensor)
            if index in wanted:
                sources[index] = held
            return held

        return torch.autograd.graph.saved_tensors_hooks(self._shielded(pack), self.unpack)

    def unpack(self, packed: Handle | Held | Moved) -> Tensor:
        """The saved tensor that ``packed`` stands for."""
        raise NotImplementedError

    def replay_until(self, stage: int, index: int | None = None) -> None:
        """Run the program up to the backward of ``stage``, so that this handle of it, if any, is filled."""
        raise NotImplementedError

    def held(self, tensor: Tensor) -> Held:
        """What stands for a tensor that lives on anyway; of a parameter one does for all who saved it."""
        if not isinstance(tensor, Parameter):  # another leaf (an index, a mask) goes with those who saved it
            return Held(tensor)
        found = self.leaves.get(id(tensor))
        if found is None or found.version != version_of(tensor):
            found = self.leaves[id(tensor)] = Held(tensor)
        return found

    def _shielded(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return shielded(hook) if self.compiled else hook

    def last(self, tensors: Sequence[Tensor], *, bound: bool = True) -> None:
        """These storages live on through the step: saved tensors among them are packed by reference.

        Args:
            bound: whether that is sure. Code may bind others in their place (``p.data = other``): what is made where one of these
                lay would then pass for it, unless its identity is held.
        """
        self.lasting |= storage_keys(tensors)
        if not bound:
            self.identities += [StorageWeakRef(s) for s in map(storage_of, tensors) if s is not None]

    def after_first_run(self, stage: int, results: Sequence[Tensor], following: tuple[Tensor, ...]) -> None:
        """Copy what the program copies once the stage has run; ``following`` is the next boundary (rule 8)."""
        store = self.store
        if store is None:
            return
        kept = self.program.kept[stage] is not None
        if not kept and stage not in self.program.held:
            store.passed(stage)
        packed = store.ran(stage, following, self.lasting, kept=kept)
        for action in self.program.moves[stage]:
            self._move(action)
        if (
            not packed and not self.handles[stage]
        ):  # the program goes on where this stage is reversed all the same
            for tensor in results:
                if tensor.requires_grad:
                    on_gradient(tensor, lambda _: self.replay_until(stage))

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
        boundaries, handles, top = self.boundaries, self.handles, self.top()
        holder = stage
        while holder and holder not in boundaries:
            holder -= 1
        following = holder + 1
        while following <= top and following not in boundaries:
            following += 1
        for served in range(following - 1, holder - 1, -1):
            if handles[served]:
                return
            if self.rerunnable[served]:
                self.rerunnable[served] = False
                self.states.pop(served, None)
                self.release_inputs(served)
        self.free(holder)

    def top(self) -> int:
        """The last stage that may still be run again, or has handles; it only ever moves down."""
        while self._top >= 0 and not self.rerunnable[self._top] and not self.handles[self._top]:
            self._top -= 1
        return self._top

    def free(self, boundary: int) -> None:
        """Hold a boundary no longer."""
        held = self.boundaries.pop(boundary, None)
        self.reads.pop(boundary, None)
        if self.observe is not None and held is not None:
            self.observe("freed", boundary, tensors_of(held) if self.store is None else ())


def tensors_of(held: tuple[Tensor | Moved, ...]) -> tuple[Tensor, ...]:
    """The tensors of a boundary that is held."""
    return tuple([t.tensor() if isinstance(t, Moved) else t for t in held])
