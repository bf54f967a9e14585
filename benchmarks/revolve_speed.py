"""Claim: Revolve of 10^6 steps with 10 slots takes at most 1.5 s packed and 6 s as action objects.

Beside the peers' Revolve in the same run; all must run the steps equally often.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from rematplan.scheduler.solvers.revolve_counts import revolve_actions, revolve_packed, revolve_runs

STEPS, SLOTS = 10**6, 10
KEEP = 2  # its index in PACKED


def packed() -> tuple[int, int]:
    """Actions and runs of the packed form."""
    actions = backward = 0
    for chunk in revolve_packed(STEPS, SLOTS):
        actions += chunk.shape[1]
        backward += int((chunk[0] > KEEP).sum())
    return actions, actions - backward


def objects() -> tuple[int, int]:
    """Actions and runs of the stream of objects."""
    actions = sum(1 for _ in revolve_actions(STEPS, SLOTS))
    return actions, actions - STEPS


def multistage() -> tuple[int, int]:
    """The same of checkpoint_schedules, whose Forward runs a range of steps."""
    peer = importlib.import_module("checkpoint_schedules")
    actions = runs = 0
    for action in peer.MultistageCheckpointSchedule(STEPS, SLOTS, 0):
        actions += 1
        if isinstance(action, peer.Forward):
            runs += action.n1 - action.n0
        elif isinstance(action, peer.EndReverse):
            break
    return actions, runs


def crevolve() -> tuple[int, int]:
    """The same of pyrevolve's compiled part, whose ``advance`` runs a range of steps."""
    peer = importlib.import_module("pyrevolve.crevolve")
    kind = peer.Action
    revolver = peer.CRevolve(SLOTS, STEPS, None)
    actions = runs = 0
    while (action := revolver.revolve()) not in (kind.terminate, kind.error):
        actions += 1
        if action == kind.advance:
            runs += revolver.capo - revolver.oldcapo
        elif action in (kind.firstrun, kind.youturn):
            runs += 1
    if action == kind.error:
        raise RuntimeError("it returned Action.error")
    return actions, runs


def peer(name: str, what: str) -> str:
    """The peer's name and version, if it is installed."""
    try:
        return f"{name} {importlib.metadata.version(name)} {what}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} {what}"


def report() -> str:
    """The table, as Markdown."""
    deque(islice(revolve_packed(100, 3), 1), 0)  # warm-up: numba compiles
    contestants: list[tuple[str, Callable[[], tuple[int, int]]]] = [
        ("`revolve_packed`", packed),
        ("`revolve_actions`", objects),
        (peer("checkpoint_schedules", "Multistage"), multistage),
        (peer("pyrevolve", "CRevolve"), crevolve),
    ]
    expected = revolve_runs(STEPS, SLOTS)
    lines = [
        "# Speed of Revolve",
        "",
        f"{STEPS:,} steps, {SLOTS} slots, one process; by the closed form the steps run {expected:,} times. Each row",
        "goes through the whole schedule and counts. Our actions are of one step; one of a peer may run many.",
        "",
        "| stream | actions | runs | seconds | times `revolve_packed` | times `revolve_actions` |",
        "|---|---|---|---|---|---|",
    ]
    ours: list[float] = []
    for name, contestant in contestants:
        try:
            began = time.perf_counter()
            actions, runs = contestant()
            took = time.perf_counter() - began
        except Exception as error:  # noqa: BLE001 # whatever ails a peer is worth a row, not the end of the table
            reason = "not installed" if isinstance(error, ImportError) else type(error).__name__
            lines.append(f"| {name} | {reason}: {error} | | | | |")
            continue
        ours = [*ours, took][:2]
        ratios = " | ".join(f"{took / own:.2f}" for own in ours) + (" | " if len(ours) < 2 else "")
        note = "" if runs == expected else " (not the least)"
        lines.append(f"| {name} | {actions:,} | {runs:,}{note} | {took:.2f} | {ratios} |")
    return "\n".join(lines)
