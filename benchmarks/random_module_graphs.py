"""Claim: plans of 1,000 random module graphs train none wrong and none over its budget.

Each is a model, a capture, a budget between the smallest and keeping all, and a way to train, drawn by
``tests/shared/module_graph_steps.py``; hypothesis draws the same in
``tests/steps/test_random_module_graphs.py``. Refusals come with a message; errors of the plain model are
errors of the planned one.
"""

from __future__ import annotations

import random
import re
import time
import warnings
from collections import Counter

from tests.shared.module_graph_steps import OverBudget, Verdict, judge, recipe_by

GRAPHS = 1000


def report() -> str:
    """What was found, as Markdown."""
    warnings.simplefilter("ignore", UserWarning)
    began = time.perf_counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    recomputed, ratios = 0, []
    for seed in range(GRAPHS):
        try:
            verdict = judge(recipe_by(random.Random(seed).choice))
        except OverBudget as error:
            verdict = Verdict("over budget", f"seed {seed}: {error}")
        except Exception as error:  # noqa: BLE001 # all that should not be
            verdict = Verdict("wrong", f"seed {seed}: {type(error).__name__}: {error}")
        kinds[verdict.kind] += 1
        recomputed += verdict.recomputes
        if verdict.ratio is not None:
            ratios.append(verdict.ratio)
        if verdict.kind in ("refused", "over budget", "wrong"):
            reasons[f"{verdict.kind}: {_in_short(verdict.reason)}"] += 1
    assert kinds["refused"] <= 0.15 * GRAPHS, "so many refusals prove nothing"
    ratios.sort()
    rows = (
        ("planned as a graph, bit-equal", kinds["graph"]),
        ("planned as blocks, bit-equal", kinds["modules"]),
        ("raises, as the plain model does", kinds["raises"]),
        ("refused with a message", kinds["refused"]),
        ("**over budget**", kinds["over budget"]),
        ("**wrong**: another bit, or an error that the plain model does not raise", kinds["wrong"]),
    )
    return "\n".join(
        [
            "# Random module graphs",
            "",
            (
                f"{GRAPHS:,} random module graphs in {time.perf_counter() - began:.0f} s, of two to six blocks of 17 kinds in 12 layouts; "
                "each planned at one budget and trained in one of 11 ways."
            ),
            "",
            "| outcome | graphs |",
            "|---|---|",
            *(f"| {what} | {count} |" for what, count in rows),
            "",
            (
                f"{recomputed} of the plans that were followed recompute. Of {len(ratios)} single steps whose peak was measured the "
                f"prediction was {ratios[0]:.3f} to {ratios[-1]:.3f} times that, {ratios[len(ratios) // 2]:.3f} in the median; "
                f"{sum(ratio < 1 for ratio in ratios)} took more than predicted, within the budget."
            ),
            "",
            "| reason | graphs |",
            "|---|---|",
            *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        ]
    )


def _in_short(reason: str) -> str:
    """The kind of a refusal: without what differs from model to model, or comes after the first reason."""
    reason = re.split(r"; try capture|; pass capture|; step the|; the model does", reason)[0].removeprefix(
        "solve: "
    )
    reason = re.sub(r"(?<=differ)(s?) by up to [\de.+-]+", r"\1", reason)
    reason = re.sub(r"(gradient of|block|argument \d+ of block) [\w.]+", r"\1 ...", reason)
    return re.sub(r"stage \d+ \([^)]*\)", "stage ...", reason).replace("|", "/")[:240]
