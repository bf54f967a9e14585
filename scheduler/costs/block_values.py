"""Number the values of a chain of blocks, from the storages of a step without its blocks.

``Traffic`` follows the storages that cross into blocks and those that glue saves, ``Lifetimes`` how long the
user's code holds them; the values are those of boundaries, those kept for a backward, and long-lived ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rematplan.scheduler.capture.blocks.block_capture import BlockCapture
from rematplan.scheduler.core.chain import Carried
from rematplan.scheduler.costs.assemble import Values
from rematplan.scheduler.costs.block_costs import BlockCost
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.skeleton import SkeletonEvent, Visitor
from rematplan.scheduler.costs.stage_run import unowned
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key, storage_of
from rematplan.scheduler.torch_layer.leaves import tensor_leaves
from rematplan.scheduler.torch_layer.private import TorchDispatchMode

__all__ = ["BlockValues", "Lifetimes", "Traffic", "block_values"]

# Zero-dimensional tensors that the user's code holds are no value: ``Chain.fixed`` has room for them.
FEW_BYTES = 2048
LeafPlace: TypeAlias = tuple[int, bool, int]  # block, whether it is an output, leaf


class Lifetimes(Visitor):
    """Follows how long the user's code and its graph hold the arguments and outputs of blocks.

    Attributes:
        last: place -> the last stage at whose start its storage is live; L at the end of the forward.
    """

    def __init__(self, capture: BlockCapture) -> None:
        self.capture = capture
        self.last: dict[LeafPlace, int] = {}
        self._alive: dict[LeafPlace, StorageWeakRef] = {}
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

    def _follow(self, place: LeafPlace, tensor: Tensor) -> None:
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

    def __init__(self, capture: BlockCapture, resident: Iterable[Tensor]) -> None:
        self.capture = capture
        self.mark: Callable[[], None] = lambda: None
        self.returned: set[int] = set()
        self.output_grad = 0
        self.events: list[SkeletonEvent] = []
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

    def shared(self, at: Mapping[SkeletonEvent, int]) -> list[int]:
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


class BlockValues(Values):
    """The values of a chain of blocks.

    Attributes:
        enters: (L,) values of the boundary into each stage.
        keeps: (L,) values that stay for its backward.
        glue_saved: (L,) bytes released with the backward of each stage of glue, which no block sees.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.enters: list[tuple[int, ...]] = []
        self.keeps: list[set[int]] = []
        self.glue_saved = [0] * count


def block_values(
    capture: BlockCapture,
    traffic: Traffic,
    lifetimes: Lifetimes,
    blocks: Sequence[BlockCost],
    live: Sequence[int],
) -> BlockValues:
    """Number the values of a captured model.

    Args:
        traffic: of a step without the blocks.
        lifetimes: of a step in which only the user's code holds arguments and outputs of blocks.
        blocks: the cost of each.
        live: (L,) bytes live in the former when the stage after each begins, or when the forward is over.
    """
    count = len(capture)
    values = BlockValues(count)
    number = {key: values.new(size) for key, size in traffic.size.items()}
    savers = {key: sorted(g for g in stages if g >= 0) for key, stages in traffic.packed.items()}
    # An earlier piece of glue may have made, and saved, an argument of a block.
    made = {key: min((*savers.get(key, ())[:1], stage)) for key, stage in traffic.made.items()}
    enters = _boundaries(capture, traffic, made)
    reading, saving, keeps = _readers(capture, traffic, blocks, enters)
    ends = _ends(traffic, lifetimes)
    outlive = set(traffic.returned)
    for key, m in made.items():
        first = next(iter(savers.get(key, ())), None)
        # The earliest piece of glue that saves it holds it longest.
        held = first is not None and (first == m or (first == m + 1 and key in enters[first]))
        if held and first is not None:
            keeps[first].add(key)
        readers = {k for k in reading.get(key, ()) if key not in enters[k]}
        waiting = readers & saving.get(key, set())
        if first is not None and not held:
            readers.add(first)
            waiting.add(first)
        ended = ends.get(key, m)
        if key in traffic.returned or -1 in traffic.packed.get(key, ()) or (ended >= count and first is None):
            outlive.add(key)
        if not (key in outlive or readers or (ended >= m + 2 and not held)):
            continue
        freed = until = None
        if key not in outlive:
            freed = m if key in keeps[m] else min(readers, default=count - 1)
            until = ended if ended < count - 1 and key in ends and not held else None
        sources = tuple(sorted(readers)), tuple(sorted(waiting))
        values.carried.append(Carried(number[key], m, *sources, freed, until))
    values.enters = [tuple(number[key] for key in keys) for keys in enters]
    values.keeps = [{number[key] for key in keys} for keys in keeps]
    _add_private(capture, blocks, values)
    for key in traffic.private() - outlive:
        values.glue_saved[made[key]] += traffic.size[key]
    appear = [0] * count
    for key, m in made.items():
        appear[m] += traffic.size[key]
    _add_others([now - known for now, known in zip(live, accumulate(appear), strict=True)], values)
    return values


def _boundaries(capture: BlockCapture, traffic: Traffic, made: dict[int, int]) -> list[list[int]]:
    """Return (L,) the storages of the boundary into each stage."""
    result: list[list[int]] = []
    outputs = traffic.outputs
    for k, (before, index) in enumerate(pairwise((None, *capture.stages))):
        if index is not None:
            crossing = capture.blocks[index].boundary
            keys = [outputs[block][leaf] for block, leaf in crossing if leaf in outputs[block]]
            keys = keys if crossing else list(traffic.arguments[index].values())
        else:
            keys = [] if before is None else list(outputs[before].values())
        passing = result[-1] if result else []
        result.append([key for key in dict.fromkeys(keys) if made[key] == k - 1 or key in passing])
    return result


def _readers(
    capture: BlockCapture, traffic: Traffic, blocks: Sequence[BlockCost], enters: list[list[int]]
) -> tuple[dict[int, set[int]], dict[int, set[int]], list[set[int]]]:
    """Return the block stages that read each storage, that save it, and (L,) the storages they keep."""
    reading: dict[int, set[int]] = defaultdict(set)
    saving: dict[int, set[int]] = defaultdict(set)
    keeps: list[set[int]] = [set() for _ in capture.stages]
    for index, (block, cost) in enumerate(zip(capture.blocks, blocks, strict=True)):
        k = block.stage
        arguments = traffic.arguments[index]
        for leaf, key in arguments.items():
            reading[key].add(k)
            if leaf in cost.saved_arguments:
                saving[key].add(k)
                if key in enters[k]:
                    keeps[k].add(key)
        own = (key for leaf, key in traffic.outputs[index].items() if leaf in cost.saved_outputs)
        keeps[k].update(key for key in own if key not in arguments.values())
    return reading, saving, keeps


def _ends(traffic: Traffic, lifetimes: Lifetimes) -> dict[int, int]:
    """Return the last stage at whose start each storage is live."""
    last: dict[int, int] = {}
    for (index, is_output, leaf), stage in lifetimes.last.items():
        places = (traffic.outputs if is_output else traffic.arguments)[index]
        if leaf in places:
            last[places[leaf]] = max(stage, last.get(places[leaf], 0))
    return last


def _add_private(capture: BlockCapture, blocks: Sequence[BlockCost], values: BlockValues) -> None:
    """Add the private saved tensors of blocks, and casts of their weights that autocast's cache holds."""
    calls = Counter(block.name for block in capture.blocks)
    cached: dict[str, tuple[int, int]] = {}  # module -> bytes, and value, that the cache holds for it
    for block, cost in zip(capture.blocks, blocks, strict=True):
        k, (cast, other) = block.stage, cost.casts
        if cost.private:
            values.keeps[k].add(values.new(cost.private))
        shared, value = cached.get(block.name, (0, 0))
        if shared and shared == cast + other:
            if cast:
                values.keeps[k].add(value)
            continue
        if calls[block.name] > 1:  # for later calls to find, all of it
            cast, other = cast + other, 0
        if cast:
            value = values.new(cast)
            values.carried.append(Carried(value, k, freed=k))
            values.keeps[k].add(value)
            cached.setdefault(block.name, (cast, value))
        if other:
            values.carried.append(Carried(values.new(other), k, freed=len(capture) - 1))


def _add_others(held: Sequence[int], values: BlockValues) -> None:
    """Add the user's code's other bytes, ``held[k]`` after stage k, as values, the last released first."""
    stack: list[tuple[int, int]] = []  # (made, bytes)
    total = 0
    for stage, amount in enumerate(held):
        now = amount if amount > FEW_BYTES else 0
        if now > total:
            stack.append((stage, now - total))
            total = now
        while total > now:
            made, size = stack.pop()
            gone = min(size, total - now)
            total -= gone
            if gone < size:
                stack.append((made, size - gone))
            values.carried.append(Carried(values.new(gone), made, freed=len(held) - 1, last=stage))
    for made, size in stack:
        values.carried.append(Carried(values.new(size), made))
