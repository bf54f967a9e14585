"""Run checks one by one, each in its own process, within seconds for each and for all."""

from __future__ import annotations

import datetime as dt
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cuda.findings import read_findings
from benchmarks.cuda.processes import run_within

__all__ = ["LINES", "Check", "failures", "latest", "run_checks"]

LINES = "checks.jsonl"
DRY = {
    "OMP_NUM_THREADS": "1"
}  # tiny models gain nothing from threads, which wait for each other on busy cores
LEAST = 3.0  # seconds with which a check is not worth its start
TAIL = 1500  # characters of the output of a check that came to no good end


@dataclass(frozen=True, slots=True)
class Check:
    """A check: ``module.name(findings, machine)``.

    Attributes:
        seconds: its time limit.
        environment: variables that its process has, for what is read when torch or CUDA starts.
    """

    name: str
    module: str
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def run_checks(
    checks: Sequence[Check],
    device: str,
    folder: Path,
    seconds: float,
    say: Callable[[dict[str, Any]], None] = lambda line: None,
    *,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Run the checks; add one line of JSON for each to ``checks.jsonl`` in ``folder`` as soon as it ends.

    Args:
        device: "cuda" or "cpu".
        seconds: for all of them.
        say: is told each line.
        workers: how many run at once; more than one is for dry runs, whose times and peaks mean nothing.

    Returns:
        the lines. ``ok`` is True, False or None (only figures); ``ended`` is "" or says why the check did not
            come to its
        end; ``wrong`` names the figures that are not as they should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    lines = []

    def run(check: Check) -> dict[str, Any]:
        return _run(check, device, folder, until - time.monotonic(), seconds)

    with (folder / LINES).open("a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        for line in map(run, checks) if workers == 1 else pool.map(run, checks):
            lines.append(line)
            print(json.dumps(line), file=file, flush=True)
            say(line)
    return lines


def _run(check: Check, device: str, folder: Path, left: float, seconds: float) -> dict[str, Any]:
    line: dict[str, Any] = {
        "check": check.name,
        "device": device,
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "ok": False,
        "seconds": 0.0,
        "ended": f"not started: the {seconds:.0f} s of all checks are used up",
        "wrong": [],
        "figures": {},
    }
    if left < LEAST:
        return line
    log = folder / f"{check.name}.log"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{check.name}.", suffix=".part") as part:
        command = [sys.executable, "-m", "benchmarks.cuda", "--device", device, "--check"]
        command += [f"{check.module}:{check.name}", "--findings", part.name]
        variables = {**(DRY if device == "cpu" else {}), **check.environment}
        ended = run_within(command, min(check.seconds, left), log, variables)
        figures, wrong, ok = read_findings(Path(part.name))
    line |= {"ok": ok, "seconds": round(ended.seconds, 1), "ended": ended.words}
    line |= {"wrong": wrong, "figures": figures}
    if ended.words:
        line |= {"ok": False, "output": log.read_text(encoding="utf-8", errors="replace")[-TAIL:]}
    return line


def failures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A short table of what failed, as lines of text."""
    rows = []
    for line in lines:
        if line["ended"]:
            output = line.get("output", "").strip().splitlines()
            rows.append((line["check"], f"{line['ended']}{': ' + output[-1][:160] if output else ''}"))
        rows += [(line["check"], f"{name}: {str(line['figures'][name])[:160]}") for name in line["wrong"]]
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {what}" for name, what in rows]


def latest(folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """The latest line of each check that was made on a kind of device."""
    file = folder / LINES
    lines = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    )
    return {line["check"]: line for line in lines if line["device"] == device}
