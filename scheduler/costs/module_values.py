"""The values of a chain of blocks: which storages cross its boundaries, which stay for a backward, which last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate

from scheduler.capture.module_capture import ModuleCapture
from scheduler.chain import Carried
from scheduler.costs.skeleton import Lifetimes, Traffic

__all__ = ["ModuleValues"]

FEW_BYTES = (
    2048  # numbers of no dimension that the user's code holds are no value: the chain's fixed bytes have room
)


class ModuleValues:
    """Values by number, for ``Chain.values``.

    Args:
        capture: the blocks.
        traffic: of a step without the blocks.
        lifetimes: of one in which nothing else holds on to what enters and leaves them.
        saved: (blocks,) leaves of the arguments, and of the outputs, that the backward of each block needs.
        private: (blocks,) bytes that it saves besides; of weights that are cast until the forward is over, bytes that it
            saves and bytes that it does not.
        returned: storages of the model's outputs.
        live: (L,) bytes live in that step when the stage after each begins, or when the forward is over.

    Attributes:
        sizes: bytes of each value.
        enters: (L,) values of the boundary into each stage.
        keeps: (L,) values that stay for its backward.
        carried: the long-lived ones.
        glue_saved: (L,) bytes that go with the backward of each stage of glue and that no block sees.
    """

    def __init__(
        self,
        capture: ModuleCapture,
        traffic: Traffic,
        lifetimes: Lifetimes,
        saved: Sequence[tuple[Collection[int], Collection[int]]],
        private: Sequence[tuple[int, int, int]],
        returned: Collection[int],
        live: Sequence[int],
    ) -> None:
        count = len(capture)
        self.sizes: list[int] = []
        self.carried: list[Carried] = []
        self.traffic, self.capture = traffic, capture
        number = {key: self._new(size) for key, size in traffic.size.items()}
        # What enters a block may be what an earlier piece of glue has made and saved.
        made = {
            key: min((g for g in traffic.packed.get(key, ()) if g >= 0), default=stage)
            for key, stage in traffic.made.items()
        }
        made = {key: min(stage, traffic.made[key]) for key, stage in made.items()}
        enters = self._boundaries(made)
        reading: dict[int, set[int]] = {}  # storage -> blocks' stages that read it
        saving: dict[int, set[int]] = {}
        keeps: list[set[int]] = [set() for _ in range(count)]
        for index, block in enumerate(capture.blocks):
            k = block.stage
            arguments, outputs = traffic.arguments[index], traffic.outputs[index]
            for leaf, key in arguments.items():
                reading.setdefault(key, set()).add(k)
                if leaf in saved[index][0]:
                    saving.setdefault(key, set()).add(k)
                    if key in enters[k]:
                        keeps[k].add(key)
            own = (key for leaf, key in outputs.items() if leaf in saved[index][1])
            keeps[k].update(key for key in own if key not in arguments.values())
        last: dict[int, int] = {}
        for (index, is_output, leaf), stage in lifetimes.last.items():
            places = traffic.outputs if is_output else traffic.arguments
            if leaf in places[index]:
                key = places[index][leaf]
                last[key] = max(stage, last.get(key, 0))

        outlive = set(returned)
        for key, m in made.items():
            savers = sorted(g for g in traffic.packed.get(key, ()) if g >= 0)
            first = savers[0] if savers else None
            # The earliest piece of glue that saves it holds it longest.
            held = first is not None and (first == m or (first == m + 1 and key in enters[first]))
            if held and first is not None:
                keeps[first].add(key)
            readers = {k for k in reading.get(key, ()) if key not in enters[k]}
            waiting = readers & saving.get(key, set())
            if first is not None and not held:
                readers.add(first)
                waiting.add(first)
            ended = last.get(key, m)
            if key in returned or -1 in traffic.packed.get(key, ()) or (ended >= count and first is None):
                outlive.add(key)
            if not (key in outlive or readers or (ended >= m + 2 and not held)):
                continue
            freed: int | None = m if key in keeps[m] else min(readers, default=count - 1)
            until: int | None = ended if ended < count - 1 and key in last and not held else None
            if key in outlive:
                freed = until = None
            self.carried.append(
                Carried(number[key], m, tuple(sorted(readers)), tuple(sorted(waiting)), freed, until)
            )
        self.enters = [tuple(number[key] for key in keys) for keys in enters]
        self.keeps = [{number[key] for key in keys} for keys in keeps]
        calls = Counter(block.name for block in capture.blocks)
        there: dict[
            str, tuple[int, int]
        ] = {}  # module -> (bytes, value) of what autocast's cache holds for it
        for block, (size, cast, other) in zip(capture.blocks, private, strict=True):
            k = block.stage
            if size:
                self.keeps[k].add(self._new(size))
            shared, value = there.get(block.name, (0, 0))
            if shared and shared == cast + other:
                if cast:
                    self.keeps[k].add(value)
                continue
            if calls[block.name] > 1:  # for later calls to find, all of it
                cast, other = cast + other, 0  # noqa: PLW2901
            if cast:
                self.carried.append(Carried(self._new(cast), k, freed=k))
                self.keeps[k].add(self.carried[-1].value)
                there.setdefault(block.name, (cast, self.carried[-1].value))
            if other:
                self.carried.append(Carried(self._new(other), k, freed=count - 1))
        alone = traffic.private() - outlive
        self.glue_saved = [0] * count
        for key in alone:
            self.glue_saved[made[key]] += traffic.size[key]
        appear = [0] * count
        for key, m in made.items():
            appear[m] += traffic.size[key]
        seen = accumulate(appear)
        self._others([now - known for now, known in zip(live, seen, strict=True)])

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _boundaries(self, made: dict[int, int]) -> list[list[int]]:
        """The storages of the boundary into each stage."""
        result: list[list[int]] = []
        outputs = self.traffic.outputs
        for k in range(len(self.capture)):
            index, before = self.capture.stages[k], self.capture.stages[k - 1] if k else None
            if index is not None:
                crossing = self.capture.blocks[index].boundary
                keys = [outputs[block][leaf] for block, leaf in crossing if leaf in outputs[block]]
                keys = keys if crossing else list(self.traffic.arguments[index].values())
            else:
                keys = [] if before is None else list(outputs[before].values())
            there = result[-1] if result else []
            result.append([key for key in dict.fromkeys(keys) if made[key] == k - 1 or key in there])
        return result

    def _others(self, held: Sequence[int]) -> None:
        """What the user's code holds besides, a number of bytes after each stage, as values that come and go."""
        stack: list[tuple[int, int]] = []  # (made, bytes)
        final = len(held) - 1
        before = 0
        for stage, amount in enumerate(held):
            now = amount if amount > FEW_BYTES else 0
            if now > before:
                stack.append((stage, now - before))
            gone = before - now
            while gone > 0:
                made, size = stack.pop()
                taken = min(size, gone)
                gone -= taken
                if taken < size:
                    stack.append((made, size - taken))
                self.carried.append(Carried(self._new(taken), made, freed=final, last=stage))
            before = now
        for made, size in stack:
            self.carried.append(Carried(self._new(size), made))

    def total(self, values: Iterable[int]) -> int:
        """Bytes of different values."""
        return sum(self.sizes[value] for value in set(values))
