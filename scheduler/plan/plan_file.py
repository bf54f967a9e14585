"""Check plan files: the type and range of every field, and what the parts must agree on.

Anybody may have written a plan file: nothing of it is used before this check. What only the model can tell is
compared when the plan meets the model (``executors/recapture.py``).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rematplan.scheduler.core.chain import CHAIN, Chain
from rematplan.scheduler.core.checks import is_integer
from rematplan.scheduler.core.json_data import (
    accept,
    anything,
    choice,
    count,
    flag,
    number,
    objects,
    optional,
    parse,
    refused,
    rows,
    seconds,
    shown,
    text,
    version,
)
from rematplan.scheduler.core.schedule import Schedule
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.plan.record import RECORD, CaptureRecord
from rematplan.scheduler.solvers import SOLVERS

__all__ = ["MOST_BYTES", "as_text", "check_parts", "check_plan", "read_json"]

MOST_BYTES = 2**26  # of a plan file; one of ten thousand stages has a tenth of it
MOST_WORK = 10**8  # values that the referee would look at: minutes


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the data in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no file, is larger than ``MOST_BYTES``, or not JSON.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{os.fspath(path)} is no file; pass the path of a file that Plan.save wrote")
    with Path(path).open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"{os.fspath(path)} has more than {MOST_BYTES} bytes, which no plan has; pass a file that Plan.save wrote"
        )
    try:
        return parse(data)
    except ValueError as error:  # of json, of the decoder, and of numbers of thousands of digits
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from error


def _bandwidth(where: str, value: Any) -> None:
    number(where, value)
    if not value:
        raise refused(where, value, "a number above 0 (bytes per second)")


def _resident(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise refused(where, value, "an object of numbers of bytes")
    for name, size in value.items():
        text(f"{where}: a name", name)
        count(f"{where}[{shown(name)}]", size)


_BUDGET = accept(
    "an integer in 1 .. 2**63 - 1 (bytes)", lambda value: is_integer(value) and 0 < value < 2**63
)
_HOST = objects(
    {"capacity": count, "write_bandwidth": _bandwidth, "read_bandwidth": _bandwidth},
    {"latency": seconds, "asynchronous": flag},
)
_PLAN = objects(
    {
        "format": version,
        "memory_budget": _BUDGET,
        "solver": text,
        "costs": choice("measure", "roofline"),
        "torch_version": text,
        "resident": _resident,
        "capture": RECORD,
        "chain": CHAIN,
        "schedule": objects({"format": version, "actions": rows(rows(anything))}),
    },
    {"optimizer_step": optional(count), "host": optional(_HOST)},
)


def check_plan(data: Mapping[str, Any]) -> None:
    """Compare the types and ranges of all fields of a plan with what they should be.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    _PLAN("plan", data)


def check_parts(chain: Chain, schedule: Schedule, record: CaptureRecord, solver: str, host: Any) -> None:
    """Compare the parts of a plan with each other, before anything is computed from them.

    Raises:
        ValueError: says what does not fit what.
    """
    if solver not in SOLVERS:
        raise refused("solver", solver, f"one of {', '.join(SOLVERS)}")
    if SOLVERS[solver].two_level and host is None:
        raise ValueError(f"host is None, expected the second memory that solver {solver!r} copies to")
    stages, kind = len(chain), KINDS[record.kind]
    allowed = kind.lengths(stages, record)
    for name in ("cuts", "random", "changed", "dropped", "rerun", "gaps", "shares", "ops", "begins", "fed"):
        lengths = (0, stages) if name in ("random", "changed") else allowed.get(name, (0,))
        if len(getattr(record, name)) not in lengths:
            raise ValueError(
                f"capture.{name} has {len(getattr(record, name))} entries, expected "
                f"{' or '.join(map(str, dict.fromkeys(lengths)))}: it is of kind {record.kind!r}, and the chain has {stages} "
                "stages"
            )
    kind.check(chain, record)
    _check_work(chain, schedule)


def _check_work(chain: Chain, schedule: Schedule) -> None:
    """Refuse a schedule that the referee cannot judge in minutes."""
    stages = chain.stages
    entering = [*(len(stage.enters) for stage in stages), 0]
    work = [
        1 + entering[i] + entering[i + 1] + max(len(option.keeps) for option in stage.options)
        for i, stage in enumerate(stages)
    ]
    for each in chain.carried:
        for reader in each.readers:
            work[reader] += 1
    total = 0
    for action in schedule:
        stage = getattr(action, "stage", 0)
        if not 0 <= stage < len(stages):
            raise refused("schedule.actions", action, f"stages in 0 .. {len(stages) - 1}")
        total += work[stage]
    if total > MOST_WORK:
        raise ValueError(
            f"schedule.actions has {len(schedule)} actions on {len(stages)} stages, more than can be judged; no solver's "
            "schedule is that long"
        )


def as_text(data: Mapping[str, Any]) -> str:
    """Write a plan's data as JSON text.

    Raises:
        ValueError: it is larger than a plan file may be.
    """
    written = json.dumps(data, indent=1)
    if len(written) > MOST_BYTES:
        raise ValueError(
            f"Plan.save: the plan has {len(written)} bytes of JSON, and a plan file at most {MOST_BYTES}; plan fewer stages"
        )
    return written
