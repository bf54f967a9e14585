"""Claim: plans of 1,000 random training loops train none wrong, and none over its budget without a word.

The state that a forward reads and writes besides parameters, buffers and arguments is drawn from
``tests/shared/state_kinds.py`` and ``tests/shared/state_written.py``, the rest of the loop from
``tests/shared/training_loops.py``; ``tests/shared/training_loop_steps.py`` compares everything after each of
five steps.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tests.shared.state_kinds import STATES
from tests.shared.training_loop_steps import Verdict, blamed, judge, shrunk
from tests.shared.training_loops import draw
from tests.shared.training_models import Recipe

LOOPS = 1000
MEASURED = 4  # one loop in so many has a peak measured
KINDS = ("graph", "modules", "raises", "refused", "over", "crash", "wrong")


def report(first: int = 0, count: int = LOOPS, shrink: bool = False) -> str:
    """What was found, as Markdown.

    Args:
        first: the first seed.
        count: how many seeds.
        shrink: whether a loop that goes wrong is made as simple as it can be, so that what is left is to
            blame.
    """
    began = time.perf_counter()
    kinds: Counter[str] = Counter()
    states: defaultdict[str, Counter[str]] = defaultdict(Counter)
    refusals: Counter[str] = Counter()
    failures = []
    one_thread = functools.partial(torch.set_num_threads, 1)
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=one_thread) as pool:
        found = [
            *pool.map(functools.partial(_judged, shrink=shrink), range(first, first + count), chunksize=10)
        ]
    for recipe, verdict in found:
        kinds[verdict.kind] += 1
        for name in blamed(recipe):
            states[name][verdict.kind] += 1
        if verdict.kind == "refused":
            refusals[_in_short(verdict)] += 1
        if verdict.bad:
            failures.append(f"{verdict.kind}: {verdict.reason[:200]} | {recipe}")
    rows = (
        ("planned as a graph, equal after each step", kinds["graph"]),
        ("planned as blocks, equal after each step", kinds["modules"]),
        ("raises, as the plain loop does", kinds["raises"]),
        ("refused with a message", kinds["refused"]),
        ("**over budget**, without a word", kinds["over"]),
        ("**an error** that is neither the plain loop's nor ours", kinds["crash"]),
        ("**wrong**: something differs", kinds["wrong"]),
    )
    order = sorted(states, key=lambda name: (name not in STATES, name))
    return "\n".join(
        [
            "# Random training loops",
            "",
            (
                f"{count:,} random training loops of five steps in {time.perf_counter() - began:.0f} s: models of three to five blocks, "
                f"{len(STATES)} kinds of state at the root or in blocks, each planned at the smallest budget or half way to keeping all. "
                f"One in {MEASURED} has the peak of a further step measured."
            ),
            "",
            "| outcome | loops |",
            "|---|---|",
            *(f"| {what} | {number} |" for what, number in rows),
            "",
            "By what is drawn, of which a loop has several:",
            "",
            f"| state, or what is odd in the loop | {' | '.join(KINDS)} |",
            "|---" * (1 + len(KINDS)) + "|",
            *(
                f"| {name} | {' | '.join(str(states[name][kind] or '') for kind in KINDS)} |"
                for name in order
            ),
            "",
            "| reason of refusal | loops |",
            "|---|---|",
            *(f"| {reason} | {number} |" for reason, number in refusals.most_common()),
            *(["", "Not as they should be:", "", *(f"- {each}" for each in failures)] * bool(failures)),
        ]
    )


def _judged(seed: int, shrink: bool) -> tuple[Recipe, Verdict]:
    """The loop of a seed, and how it went; what goes wrong is printed at once."""
    recipe = draw(seed)
    judged = functools.partial(judge, measured=seed % MEASURED == 0)
    verdict = judged(recipe)
    if verdict.bad and shrink:
        recipe, verdict = shrunk(recipe, verdict, judged)
    if verdict.bad:
        print(f"{verdict.kind}: {verdict.reason[:200]} | {recipe}", flush=True)
    return recipe, verdict


def _in_short(verdict: Verdict) -> str:
    """The kind of a refusal: without what differs from loop to loop."""
    reason = re.split(r"; try capture|; pass capture|; step the|; the model does", verdict.reason)[0]
    reason = re.sub(r"step \d+: ", "in training: ", reason)
    reason = re.sub(r"differ(s?) by up to [\de.+-]+", r"differ\1", reason)
    reason = re.sub(
        r"(gradient of|block|buffer|parameter|submodule|stage) '?[\w.]*[\d.][\w.]*'?", r"\1 ...", reason
    )
    return reason.replace("|", "/")[:200]
