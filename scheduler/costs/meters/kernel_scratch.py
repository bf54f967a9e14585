"""Count the scratch bytes of single ops: what a kernel allocates and releases within itself.

A step on tensors without data shows the results of its ops, not their scratch space: the columns of a
convolution, the float32 sums of attention's backward, the cast of an operand. The device itself counts it op
by op, so that only one op's tensors need memory at a time.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rematplan.scheduler.core.budget import format_bytes, free_machine_bytes
from rematplan.scheduler.costs.meters.peak import CpuEvents, count_bytes
from rematplan.scheduler.torch_layer.preserve import RandomState
from rematplan.scheduler.torch_layer.private import (
    OpOverload,
    autocast_disabled,
    modes_disabled,
    pytree,
    schema_of,
    torch_functions_disabled,
)

__all__ = ["Scratch"]

# On CUDA these may end the process. Kernels read a seed on the host, where tensors without data have none; on
# zeros probabilities add up to nothing and assertions fail, which ends the device's context.
SEEDS = frozenset({"philox_seed", "philox_offset", "rng_state"})
CHECKING = frozenset({"_assert_async", "_functional_assert_async", "_assert_scalar", "multinomial"})
MOST = 4  # an op whose tensors take more than the 4th part of the free memory is not run


class _Like(NamedTuple):
    """A tensor without its data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def extent(self) -> int:
        """The number of elements from its first to its last, gaps included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def zeros(self) -> Tensor:
        """Return a tensor like it. 0 is a valid number, index and probability."""
        flat = torch.zeros(self.extent, dtype=self.dtype, device=self.device)
        return flat.as_strided(self.shape, self.stride)


# (op, arguments, threads) -> bytes. Kernels give each thread a part of their scratch space.
_KNOWN: dict[Hashable, int] = {}


class Scratch:
    """Scratch bytes of ops on a device, counted once in a process for an op and its arguments' metadata.

    The op is run on zeros of the same shapes, strides and dtypes, twice if it takes anything at all: the
    first run may fill caches that stay. It runs below autograd and autocast, outside of all modes, and
    generators are restored. Switches of torch's backends (``torch.backends``) are taken to stay as they are.

    Not run are views, ops that read seeds or check values, ops of other libraries (nobody knows what they do
    on zeros), ops on tensors that are not strided, and ops whose tensors take more than a quarter of the
    memory that is free now.

    Args:
        device: present, "cpu" or "cuda"; ops that touch no tensor on it have no scratch bytes.

    Raises:
        RuntimeError: an autograd profiler is active already (CPU).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._limit = torch.cuda.mem_get_info(device)[0] // MOST
        else:
            CpuEvents().stop()  # fails at once if it cannot count
            self._limit = free_machine_bytes() // MOST
        self._uncounted: dict[Hashable, str] = {}

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Return the ops that were not or could not be run, and why."""
        return tuple(dict.fromkeys(self._uncounted.values()))

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the scratch bytes of one op, whose result was ``result``; 0 if they cannot be counted."""
        if isinstance(func, OpOverload) and (
            func.is_view or torch.Tag.inplace_view in func.tags or func.namespace == "prim"
        ):
            return 0  # only metadata
        leaves, spec = pytree.tree_flatten((args, kwargs))
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + made
        if not any(tensor.device.type == self.device.type for tensor in tensors):
            return 0
        if hindrance := _hindrance(func, args, tensors):
            self._uncounted[func] = f"{func} ({hindrance})"
            return 0
        like = [_described(leaf) for leaf in leaves]
        key = (func, spec, torch.get_num_threads(), *like)
        if key not in _KNOWN and key not in self._uncounted:
            all_like = (each for each in (*like, *map(_described, made)) if isinstance(each, _Like))
            self._count(key, func, like, spec, sum(each.extent * each.dtype.itemsize for each in all_like))
        return _KNOWN.get(key, 0)

    def _count(self, key: Hashable, func: OpOverload, like: list[Any], spec: Any, size: int) -> None:
        if size > self._limit:
            self._uncounted[key] = f"{func} ({format_bytes(size)}, too large to try)"
            return
        # Whoever asks may be in the middle of a step: in its autocast, its modes, its backward.
        with modes_disabled(), torch_functions_disabled(), autocast_disabled(), torch.no_grad():
            random = RandomState(self.device)
            try:
                args, kwargs = pytree.tree_unflatten(
                    [leaf.zeros() if isinstance(leaf, _Like) else leaf for leaf in like], spec
                )
                scratch = 0
                for _ in range(2):
                    counted = count_bytes(lambda mark: func(*args, **kwargs), self.device)
                    scratch = counted.peak - counted.end
                    del counted  # with its result
                    if not scratch:
                        break
                _KNOWN[key] = scratch
            # Kernels raise these on zeros, and where memory does not suffice.
            except (RuntimeError, IndexError, TypeError, ValueError, MemoryError) as error:
                self._uncounted[key] = f"{func} ({type(error).__name__})"
            finally:
                random.restore()


def _hindrance(func: Any, args: Any, tensors: list[Tensor]) -> str:
    """Return why an op cannot be run on zeros; "" if it can."""
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return "of another library"
    schema = schema_of(func)
    if schema.name.removeprefix("aten::") in CHECKING:
        return "checks the values that it is given"
    named = {a.name: given for a, given in zip(schema.arguments, args, strict=False)}
    if not SEEDS.isdisjoint(named) and named.get("dropout_p", 1.0):
        return "reads the seed of random numbers"
    return "" if all(tensor.layout == torch.strided for tensor in tensors) else "not strided"


def _described(leaf: Any) -> Any:
    """Return a leaf of an op's arguments, without data or a generator's state."""
    if isinstance(leaf, Tensor):
        return _Like(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return None if isinstance(leaf, torch.Generator) else leaf
