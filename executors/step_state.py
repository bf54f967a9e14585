"""The live saved tensors and boundaries of a step; step.py numbers the rules of their release."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from rematplan.executors.as_read import AsRead, Sampler
from rematplan.executors.fingerprints import Fingerprint
from rematplan.executors.host_arena import Arena
from rematplan.executors.host_copies import Moved, Store
from rematplan.executors.trace import Observer
from rematplan.scheduler.capture.graph.recompute import Thinned
from rematplan.scheduler.core.program import ReplayProgram
from rematplan.scheduler.core.schedule import CopyAction, Free, FreeHost
from rematplan.scheduler.torch_layer.layouts import storage_keys, storage_of
from rematplan.scheduler.torch_layer.preserve import RandomState
from rematplan.scheduler.torch_layer.private import version_of

__all__ = ["Handle", "Held", "Lasting", "StepState", "tensors_of"]


class Handle:
    """Stands in autograd's graph for a dropped saved tensor (rules 1 and 3)."""

    __slots__ = ("index", "stage", "state")

    def __init__(self, state: StepState, stage: int, index: int) -> None:
        self.state, self.stage, self.index = state, stage, index
        state.handles[stage] += 1

    def __del__(self) -> None:
        state, stage = self.state, self.stage
        # Nobody asks for it again: its node was reversed, or belongs to an output that no loss is made of.
        state.prints[stage][self.index] = None
        state.filled[stage].pop(self.index, None)
        state.handles[stage] -= 1
        if not state.handles[stage] and not state.sweeping:
            state.release(stage)


class Held:
    """A saved tensor that is packed by reference, with the version that autograd saw (rule 9)."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # A non-leaf is detached, for a node must not own its own output.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = version_of(tensor)

    def unpack(self) -> Tensor:
        """Return the tensor; RuntimeError if it was modified in place since."""
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(self.tensor.shape)} is at version "
                f"{version_of(self.tensor)}, expected version {self.version}"
            )
        return self.tensor


class Lasting:
    """The storages that outlive the step (parameters, inputs, carried values): packed by reference.

    Attributes:
        keys: their identities.
    """

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self._unbound: list[StorageWeakRef] = []
        self._parameters: dict[int, Held] = {}

    def add(self, tensors: Sequence[Tensor], *, bound: bool = True) -> None:
        """Add the storages of these tensors.

        Args:
            bound: whether they surely live on. Otherwise code may replace them (``p.data = other``), and a
                tensor allocated at the same address would pass for one of them unless the identity is held.
        """
        self.keys |= storage_keys(tensors)
        if not bound:
            self._unbound += [StorageWeakRef(s) for s in map(storage_of, tensors) if s is not None]

    def pack(self, tensor: Tensor) -> Held:
        """Return the Held of such a tensor; all that save a parameter share one."""
        if not isinstance(tensor, Parameter):  # another leaf (an index, a mask) dies with its last reader
            return Held(tensor)
        found = self._parameters.get(id(tensor))
        if found is None or found.version != version_of(tensor):
            found = self._parameters[id(tensor)] = Held(tensor)
        return found


class StepState:
    """The state of a step, by stage and by boundary.

    Args:
        program: what the step follows.
        release_inputs: (stage, ``rerunnable``); called once the stage can run no more.
        tell: is told which boundaries are held and freed.
        sampled: whether re-runs compare a few values of the boundaries that they read.
        arena: for copies on the host, if the program makes any.

    Attributes:
        boundaries: boundary -> its tensors, detached, or Moved (rule 8), while held.
        reads: boundary -> its tensors as they were when it was held.
        store: the storages that the program copies between device and host, if any.
        prints: stage -> index -> fingerprint of a dropped saved tensor; None for one packed by reference, or
            once its handle is gone.
        handles: stage -> handles alive.
        filled: stage -> index -> recomputed saved tensor that no unpack has taken yet.
        thinned: stage kept with an option -> how to recompute what it dropped.
        rerunnable: stage -> whether what its re-run needs is still held.
        generators: stage that draws random numbers -> the generators as its first run began.
        sweeping: whether the forward goes on, so that nothing is released yet.
    """

    def __init__(
        self,
        program: ReplayProgram,
        release_inputs: Callable[[int, Sequence[bool]], None],
        tell: Observer,
        sampled: bool,
        arena: Arena | None,
    ) -> None:
        stages = len(program.kept)
        self.tell, self.sampled, self.release_inputs = tell, sampled, release_inputs
        self.boundaries: dict[int, tuple[Tensor | Moved, ...]] = {}
        self.reads: dict[int, AsRead] = {}
        self.store = None if arena is None else Store(arena)
        self.prints: list[list[Fingerprint | None]] = [[] for _ in range(stages)]
        self.handles = [0] * stages
        self.filled: list[dict[int, Tensor]] = [{} for _ in range(stages)]
        self.thinned: dict[int, Thinned[Held | Moved]] = {}
        self.rerunnable = [kept != 0 for kept in program.kept]
        self.generators: dict[int, RandomState] = {}
        self.sweeping = True
        self._top = stages - 1

    def hold(self, boundary: int, tensors: tuple[Tensor, ...]) -> None:
        """Hold a boundary."""
        if self.store is not None:
            self.boundaries[boundary] = self.store.hold(boundary, tensors, own=not self.sweeping)
        else:
            held = tuple([t.detach() for t in tensors])
            self.boundaries[boundary] = held
            if held:
                self.reads[boundary] = AsRead(held, Sampler() if self.sampled else None)
        self.tell("held", boundary, tensors)

    def free(self, boundary: int) -> None:
        """Release a boundary."""
        held = self.boundaries.pop(boundary, None)
        self.reads.pop(boundary, None)
        if held is not None:
            self.tell("freed", boundary, () if self.store is not None else tensors_of(held))

    def move(self, action: CopyAction | Free) -> None:
        """Free a boundary, or carry out a copy (rule 8)."""
        if self.store is not None:
            self.store.move(action)
            if isinstance(action, (Free, FreeHost)) and not self.store.wanted(action.boundary):
                self.boundaries.pop(action.boundary, None)
        elif isinstance(action, Free):
            self.free(action.boundary)

    def reversed(self, stage: int) -> None:
        """Release what a stage that autograd has reversed still holds on the device."""
        self.filled[stage].clear()
        self.thinned.pop(stage, None)
        if self.store is not None:
            self.store.reversed(stage)

    def sweep_is_over(self) -> None:
        """Release stages without handles; after the forward, the last handle of a stage does it."""
        self.sweeping = False
        if self.store is not None:
            self.store.sweep_is_over()
        for stage, alive in enumerate(self.handles):
            if not alive and self.rerunnable[stage]:
                self.release(stage)

    def release(self, stage: int) -> None:
        """Release what is held for a stage whose last handle is gone (rule 3).

        What re-runs need is released with the last stage that they could serve: a boundary serves the stages
        up to the next held one, and a re-run of each passes through those before it.
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
                self.generators.pop(served, None)
                self.release_inputs(served, self.rerunnable)
        self.free(holder)

    def top(self) -> int:
        """Return the last stage that may still run again, or has handles; it only decreases."""
        while self._top >= 0 and not self.rerunnable[self._top] and not self.handles[self._top]:
            self._top -= 1
        return self._top


def tensors_of(held: tuple[Tensor | Moved, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of a boundary that is held, on the device."""
    return tuple([t.tensor() if isinstance(t, Moved) else t for t in held])
