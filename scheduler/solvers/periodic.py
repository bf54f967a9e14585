"""Hold a checkpoint every k stages, as training code does by hand: one ``checkpoint()`` around each block.

Of segments of k stages only the input is held, and each is run again, keeping all, when it is reversed, the
last one too. That is what Hugging Face's ``gradient_checkpointing_enable`` (k = 1), Megatron's uniform
recomputation (``recompute_num_layers`` = k) and most training loops do; torch's ``checkpoint_sequential`` and
``sqrt`` spare the last segment its second run. If k covers the whole chain, the step is the plain one.

Claim: given no k, the fastest of all k that fits, and of those the one of least peak (every k but the last
takes the same seconds); ``InfeasibleBudget.smallest`` is the least of their peaks.

Stages that may run only once are kept, and k counts from 0 after each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from rematplan.scheduler.core.chain import Chain
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.solvers.candidates import fastest_fit, segment_tree
from rematplan.scheduler.solvers.checks import checked_count
from rematplan.scheduler.solvers.optimal_peaks import Ints
from rematplan.scheduler.solvers.persistent import run_ends

__all__ = ["solve"]


def _trees(chain: Chain, periods: Iterable[int]) -> Iterator[Ints]:
    """Yield the tree of each number of stages k."""
    stage = np.arange(len(chain))
    again = np.array([stage.recomputable for stage in chain.stages])
    runs = np.array(run_ends(again.tolist()))
    # The first stage of a run is the one that follows the end of another.
    starts = np.maximum.accumulate(np.where(np.append(-1, runs[:-1]) < stage, stage, 0))
    for k in periods:
        ends = np.minimum(starts + ((stage - starts) // k + 1) * k - 1, runs)
        yield segment_tree(ends, np.where(again & (ends[0] < len(chain) - 1), 1, 0))


def solve(chain: Chain, memory_budget: int, *, every: int | None = None) -> Schedule:
    """Return the schedule with a checkpoint every ``every`` stages; the best number of stages if it is None.

    Args:
        memory_budget: bytes.
        every: stages in a segment, k >= 1.

    Raises:
        InfeasibleBudget: it does not fit; or none does, if ``every`` is None.
        TypeError: ``every`` is no int.
        ValueError: ``every`` is below 1, or sums of the chain's sizes or seconds overflow.
    """
    periods = range(len(chain), 0, -1)
    if every is not None:
        period = min(checked_count("periodic", "every", every), len(chain))
        periods = range(period, period + 1)
    return fastest_fit(chain, memory_budget, _trees(chain, periods), "periodic")
