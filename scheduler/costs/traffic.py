"""Follow the storages of a step without its blocks: which cross into blocks, and which glue saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rematplan.scheduler.capture.blocks.block_capture import ModuleCapture
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.skeleton import Event, Visitor
from rematplan.scheduler.costs.stage_run import unowned
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key, storage_of
from rematplan.scheduler.torch_layer.leaves import tensor_leaves
from rematplan.scheduler.torch_layer.private import TorchDispatchMode

__all__ = ["Lifetimes", "Traffic"]

Place: TypeAlias = tuple[int, bool, int]  # block, whether it is an output, leaf


class Lifetimes(Visitor):
    """Follows how long the user's code and its graph hold the arguments and outputs of blocks.

    Attributes:
        last: place -> the last stage at whose start its storage is live; L at the end of the forward.
    """

    def __init__(self, capture: ModuleCapture) -> None:
        self.capture = capture
        self.last: dict[Place, int] = {}
        self._alive: dict[Place, StorageWeakRef] = {}
        self._due: int | None = None  # a stage of glue that has not run an op yet

    def enter(self, block: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:  # noqa: ARG002, D102
        for leaf, tensor in tensor_leaves((args, kwargs)):
            self._follow((block, False, leaf), tensor)
        self._due = None
        self.check(self.capture.blocks[block].stage)

    def leave(self, block: int, produced: Any) -> None:  # noqa: D102
        for leaf, tensor in tensor_leaves(produced):
            self._follow((block, True, leaf), tensor)
        following = self.capture.blocks[block].stage + 1
        self._due = following if self.capture.stages[following] is None else None

    def _follow(self, place: Place, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is not None:
            self._alive[place] = StorageWeakRef(storage)

    def check(self, stage: int) -> None:
        """Note the storages that are live when ``stage`` is about to start."""
        self._alive = {place: ref for place, ref in self._alive.items() if not ref.expired()}
        self.last.update(dict.fromkeys(self._alive, stage))

    def watching(self) -> TorchDispatchMode:
        """Return a mode that sees glue start: callers of a block hold its arguments until they run on."""
        lifetimes = self

        class FirstOp(TorchDispatchMode):
            supports_higher_order_operators = True

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if lifetimes._due is not None:
                    due, lifetimes._due = lifetimes._due, None
                    lifetimes.check(due)
                return func(*args, **(kwargs or {}))

        return FirstOp()


class Traffic(Visitor):
    """Notes the storages that enter and leave blocks, and holds them; and those that the user's code saves.

    All others that are live are the user's code's alone, whatever is kept of the blocks.

    Attributes:
        size: storage -> bytes.
        made: storage -> the stage that makes it, so far as is seen.
        arguments, outputs: (blocks,) leaf -> storage; tensors that live on anyway are left out.
        packed: storage -> the stages of glue that save it; -1 for a piece between blocks that is no stage.
        incoming: block -> bytes of the storages of its outputs' gradients.
        returned: storages of the model's outputs. output_grad: bytes of their gradients.
        mark: called at each event.
        waiting: blocks of which an output got no gradient, though the user holds a tensor made of it.
    """

    def __init__(self, capture: ModuleCapture, resident: Iterable[Tensor]) -> None:
        self.capture = capture
        self.mark: Callable[[], None] = lambda: None
        self.returned: set[int] = set()
        self.output_grad = 0
        self.events: list[Event] = []
        self.size: dict[int, int] = {}
        self.made: dict[int, int] = {}
        self.arguments: list[dict[int, int]] = []
        self.outputs: list[dict[int, int]] = []
        self.packed: dict[int, set[int]] = {}
        self.incoming: dict[int, int] = {}
        self.waiting: set[int] = set()
        self._resident = {storage_key(t) for t in resident}
        self._refs: dict[int, StorageWeakRef] = {}
        self._held: list[Tensor] = []
        self._seen: set[int] = set()
        self._stage = 0

    def enter(self, block: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:  # noqa: ARG002, D102
        self.arguments.append(self._hold(tensor_leaves((args, kwargs)), self.capture.blocks[block].stage - 1))
        self.note("enter", block)

    def leave(self, block: int, produced: Any) -> None:  # noqa: D102
        stage = self.capture.blocks[block].stage
        self.outputs.append(self._hold(tensor_leaves(produced), stage))
        self._stage = stage + 1 if self.capture.stages[stage + 1] is None else -1
        self.note("leave", block)

    def note(self, what: str, block: int = -1) -> None:  # noqa: D102
        if what == "over":
            gone = {key for key, ref in self._refs.items() if key not in self._seen and ref.expired()}
            for key in gone:  # with its graph
                del self.packed[key], self.size[key], self.made[key]
        self.events.append((what, block))
        self.mark()

    def arrived(self, block: int, grads: Sequence[Tensor]) -> None:  # noqa: D102
        sizes = {storage_key(t): held_bytes(t) for t in grads}
        self.incoming[block] = sum(allocated(size, self.capture.place) for size in sizes.values())

    def unreversed(self, block: int) -> None:  # noqa: D102
        self.waiting.add(block)

    def shared(self, at: Mapping[Event, int]) -> list[int]:
        """Return (blocks,) bytes of incoming gradients that stay after it: others are views of them.

        Args:
            at: bytes live at each event.
        """
        stay = {b: size - (at["reverse", b] - at["cleared", b]) for b, size in self.incoming.items()}
        return [stay.get(block, 0) for block in range(len(self.capture.blocks))]

    def _hold(self, tensors: list[tuple[int, Tensor]], made: int) -> dict[int, int]:
        places: dict[int, int] = {}
        for leaf, tensor in tensors:
            key = self._know(tensor, made)
            if key is not None:
                places[leaf] = key
                if key not in self._seen:
                    self._seen.add(key)
                    self._held.append(tensor.detach())
        return places

    def _know(self, tensor: Tensor, made: int) -> int | None:
        key = storage_key(tensor)
        if key is None or key in self._resident:
            return None
        if key not in self.size:
            self.size[key] = allocated(held_bytes(tensor), self.capture.place)
            self.made[key] = made
        return key

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that the user's code saves."""
        if self._stage >= 0 or storage_key(tensor) in self.size:
            key = self._know(tensor, self._stage)
            if key is not None:
                self.packed.setdefault(key, set()).add(self._stage)
                # A weak reference keeps the address from being used again.
                self._refs.setdefault(key, StorageWeakRef(storage_of(tensor)))
        return unowned(tensor)

    def private(self) -> set[int]:
        """Return the storages that the user's code saves and no block sees."""
        return self.size.keys() - self._seen
