"""Claim: plans of 1,000 random graphs of ops train none wrong and none over its budget.

The ops sort, index, scatter, view and write in place (``tests/shared/op_graphs.py``). Each model is planned
by ``two_level``, which copies to a host drawn with it, and by ``optimal``, each at its smallest budget and
one in the middle.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch

from tests.shared.op_graphs import LAYERS, OPS, Fault, Trained, judge

GRAPHS = 1000


def _verdict(seed: int) -> list[Trained] | str:
    """How the plans of a model trained, or why not."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    try:
        return judge(seed)
    except Fault as error:
        return f"{error.kind}: seed {seed}: {error}"
    except Exception as error:  # noqa: BLE001 # all that should not be
        return f"wrong: seed {seed}: {type(error).__name__}: {error}"


def report() -> str:
    """What was found, as Markdown."""
    began = time.perf_counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    plans: dict[str, list[Trained]] = {"two_level": [], "optimal": []}
    # Processes of their own: a crash of one shows, and peaks are counted by the process.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        verdicts = list(workers.map(_verdict, range(GRAPHS), chunksize=10))
    for verdict in verdicts:
        if isinstance(verdict, str):
            kinds[verdict.partition(":")[0]] += 1
            reasons[verdict.partition("\n")[0].replace("|", "/")[:160]] += 1
            continue
        kinds["trained"] += 1
        for each in verdict:
            plans[each.solver].append(each)
    assert kinds["trained"] >= 0.8 * GRAPHS, "so many refusals prove nothing"
    rows = (
        ("trained by all four plans, bit-equal, within each budget", kinds["trained"]),
        ("raises, as the plain model does", kinds["raises"]),
        ("refused with a message", kinds["refused"]),
        ("**over budget**", kinds["over budget"]),
        ("**over its prediction**, within the budget", kinds["over its prediction"]),
        ("**wrong**: another bit, or an error that the plain model does not raise", kinds["wrong"]),
    )
    return "\n".join(
        [
            "# Random graphs of ops",
            "",
            (
                f"{GRAPHS:,} random models in {time.perf_counter() - began:.0f} s, of 5 to 11 ops out of {len(OPS) + len(LAYERS)} kinds; each planned by "
                "two_level and by optimal, at the smallest budget of each and at one in the middle. A step with no gradients "
                "yet is compared with the plain one bit for bit, and its peak measured."
            ),
            "",
            "| outcome | models |",
            "|---|---|",
            *(f"| {what} | {count} |" for what, count in rows),
            "",
            "| solver | plans | that copy | that recompute | predicted / measured peak: least | median | most |",
            "|---|---|---|---|---|---|---|",
            *(_row(solver, trained) for solver, trained in plans.items()),
            "",
            "| reason | models |",
            "|---|---|",
            *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        ]
    )


def _row(solver: str, trained: list[Trained]) -> str:
    ratios = sorted(each.ratio for each in trained)
    copying = sum(each.copies > 0 for each in trained)
    recomputing = sum(each.recomputes for each in trained)
    return f"| {solver} | {len(trained)} | {copying} | {recomputing} | {ratios[0]:.3f} | {ratios[len(ratios) // 2]:.3f} | {ratios[-1]:.3f} |"
