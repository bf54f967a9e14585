"""Check the arguments of solvers: numbers in range, chains whose sums do not overflow."""

from __future__ import annotations

import math
from typing import Any

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.checks import is_integer, is_number

__all__ = [
    "MOST_BYTES",
    "MOST_SECONDS",
    "checked_budget",
    "checked_chain",
    "checked_count",
    "checked_sums",
    "checked_time_limit",
]

MOST_BYTES = 2**62  # sums of two such sums still fit an int64
MOST_SECONDS = 1e300  # the tables take more than that for "nothing fits"


def checked_count(call: str, name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as a plain int of at least ``least``; a TypeError or ValueError names ``call``."""
    if not is_integer(value):
        raise TypeError(f"{call}: {name}={value!r} must be an int")
    if value < least:
        raise ValueError(f"{call}: {name}={value} must be at least {least}")
    return int(value)


def checked_budget(call: str, memory_budget: Any) -> int:
    """Return ``memory_budget`` (bytes) as a plain int; a TypeError or ValueError names ``call``."""
    if not is_integer(memory_budget):
        raise TypeError(f"{call}: memory_budget={memory_budget!r} must be an int number of bytes")
    budget = int(memory_budget)
    if not 0 < budget < 2**63:
        raise ValueError(f"{call}: memory_budget={budget} must be in 1 .. 2**63 - 1 (bytes)")
    return budget


def checked_chain(call: str, chain: Any) -> Chain:
    """Return ``chain``, or a TypeError that names ``call``."""
    if not isinstance(chain, Chain):
        raise TypeError(f"{call}: chain={chain!r} must be a Chain; see Chain.from_arrays")
    return chain


def checked_sums(call: str, chain: Chain) -> None:
    """Refuse sizes and seconds whose sums could overflow, by a ValueError that names ``call``."""
    total = chain.fixed + chain.output + chain.output_grad
    seconds = 0.0
    for stage in chain.stages:
        total += stage.input + stage.input_grad + stage.forward_overhead + stage.carried + stage.grad
        total += abs(stage.carried_change)
        total += sum(abs(o.saved) + o.forward_overhead + abs(o.backward_overhead) for o in stage.options)
        seconds += stage.forward + stage.backward + sum(o.recompute for o in stage.options)
    if total >= MOST_BYTES:
        raise ValueError(f"{call}: the chain's sizes add up to {total} bytes; they must stay below 2**62")
    if not seconds * len(chain) < MOST_SECONDS:  # no stage runs more often than there are stages
        raise ValueError(
            f"{call}: the chain's seconds add up to {seconds}; times its stages they must stay below {MOST_SECONDS}"
        )


def checked_time_limit(call: str, time_limit: Any) -> float:
    """Return ``time_limit`` (seconds) as a float, or a ValueError that names ``call``."""
    if not is_number(time_limit) or not 0 < float(time_limit) < math.inf:
        raise ValueError(f"{call}: time_limit={time_limit!r} must be a positive, finite number of seconds")
    return float(time_limit)
