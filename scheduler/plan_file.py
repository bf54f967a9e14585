"""What a plan file may hold: the type and range of every field, and what its parts must have to do with each other.

A plan file is data that anybody may have written. Nothing of it is taken before it has been compared with this; what only
the model can tell is compared when the plan meets the model (``executors/recapture.py``).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scheduler.checks import is_integer
from scheduler.cuts import LEFT_OUT, REASONS
from scheduler.json_data import (
    choice,
    count,
    flag,
    integer,
    number,
    objects,
    optional,
    parse,
    refused,
    rows,
    seconds,
    shown,
    text,
    tuples,
)

if TYPE_CHECKING:
    from scheduler.chain import Chain
    from scheduler.plan import CaptureRecord
    from scheduler.schedule import Schedule

__all__ = ["MOST_BYTES", "as_text", "check_chain", "check_parts", "check_plan", "read_json"]

MOST_BYTES = 2**26  # of a plan file; one of ten thousand stages has a tenth of it
MOST_WORK = 10**8  # values that the referee would look at: minutes
MOST_BACK = 100  # blocks that a value may pass by


def read_json(path: str | os.PathLike[str]) -> Any:
    """The data in a JSON file.

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


def _version(where: str, value: Any) -> None:
    if isinstance(value, bool) or value != 1:
        raise refused(where, value, "1, the format that this version knows")


def _budget(where: str, value: Any) -> None:
    if not is_integer(value) or not 0 < value < 2**63:
        raise refused(where, value, "an integer in 1 .. 2**63 - 1 (bytes)")


def _bandwidth(where: str, value: Any) -> None:
    number(where, value)
    if not value:
        raise refused(where, value, "a number above 0 (bytes per second)")


def _leaves(where: str, value: Any) -> None:
    """JSON text: a list with a row for each leaf of the arguments (``CallSignature``)."""
    text(where, value)
    try:
        found = parse(value)
    except ValueError as error:
        raise ValueError(f"{where} is {shown(value)}, expected JSON text: {error}") from error
    rows(rows(_anything))(where, found)
    if any(not row or not isinstance(row[0], str) for row in found):
        raise refused(where, value, "rows that each begin with a word")


def _anything(where: str, value: Any) -> None:
    """Whatever it is, it is only compared and shown."""


def _resident(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise refused(where, value, "an object of numbers of bytes")
    for name, size in value.items():
        text(f"{where}: a name", name)
        count(f"{where}[{shown(name)}]", size)


_OPTION = objects(
    {"saved": integer},
    {
        "recompute": seconds,
        "forward_overhead": count,
        "backward_overhead": integer,
        "name": text,
        "keeps": rows(count),
        "rerun_overhead": optional(integer),
    },
)
_STAGE = objects(
    {"name": text, "forward": seconds, "backward": seconds, "input": count, "options": rows(_OPTION)},
    {
        "forward_overhead": integer,
        "input_grad": count,
        "grad": count,
        "carried": count,
        "carried_change": integer,
        "recomputable": flag,
        "enters": rows(count),
        "rerun_state": count,
    },
)
_CARRIED = objects(
    {"value": count, "made": count},
    {"readers": rows(count), "savers": rows(count), "freed": optional(count), "last": optional(count)},
)
_CHAIN = objects(
    {
        "format": _version,
        "stages": rows(_STAGE),
        "output": count,
        "output_grad": count,
        "fixed": count,
        "name": text,
    },
    {"values": rows(count), "carried": rows(_CARRIED)},
)
_HOST = objects(
    {"capacity": count, "write_bandwidth": _bandwidth, "read_bandwidth": _bandwidth},
    {"latency": seconds, "asynchronous": flag},
)


def _kind(where: str, value: Any) -> None:
    """A kind of capture."""
    from scheduler.kinds import KINDS  # whose checks are here

    choice(*KINDS)(where, value)


_CUT = tuples(choice(*REASONS), count, count, count, count, text)
_RECORD = objects(
    {
        "kind": _kind,
        "reason": text,
        "device": text,
        "structure": text,
        "leaves": _leaves,
        "model": text,
    },
    {
        "graph": text,
        "cuts": rows(count),
        "stages": rows(text),
        "fed": rows(rows(tuples(count, count, count, least=2))),
        "random": rows(flag),
        "changed": rows(rows(text)),
        "dropped": rows(rows(rows(count))),
        "rerun": rows(rows(rows(count))),
        "gaps": rows(seconds),
        "uncached": flag,
        "ops": rows(rows(tuples(text, count))),
        "begins": rows(_CUT),
        "left_out": rows(tuples(choice(*LEFT_OUT), count)),
        "evaluating": rows(text),
        "unread": rows(count),
        "frozen": rows(text),
        "environment": text,
        "target": text,
    },
)
_PLAN = objects(
    {
        "format": _version,
        "memory_budget": _budget,
        "solver": text,
        "costs": choice("measure", "roofline"),
        "torch_version": text,
        "resident": _resident,
        "capture": _RECORD,
        "chain": _CHAIN,
        "schedule": objects({"format": _version, "actions": rows(rows(_anything))}),
    },
    {"optimizer_step": optional(count), "host": optional(_HOST)},
)


def check_plan(data: Mapping[str, Any]) -> None:
    """Compare the types and ranges of all fields of a plan with what they should be.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    _PLAN("plan", data)


def check_chain(data: Any) -> None:
    """The same for a chain.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    _CHAIN("chain", data)


def check_parts(chain: Chain, schedule: Schedule, record: CaptureRecord, solver: str, host: Any) -> None:
    """Compare the parts of a plan with each other, before anything is computed from them.

    Raises:
        ValueError: says what does not fit what.
    """
    from scheduler.solvers import SOLVERS  # which have the chain's module, and that this one

    if solver not in SOLVERS:
        raise refused("solver", solver, f"one of {', '.join(SOLVERS)}")
    if SOLVERS[solver].two_level and host is None:
        raise ValueError(f"host is None, expected the second memory that solver {solver!r} copies to")
    from scheduler.kinds import KINDS  # whose checks are here

    stages, kind = len(chain), KINDS[record.kind]
    allowed = kind.lengths(stages, record)
    for name in ("cuts", "random", "changed", "dropped", "rerun", "gaps", "ops", "begins", "fed"):
        lengths = (0, stages) if name in ("random", "changed") else allowed.get(name, (0,))
        if len(getattr(record, name)) not in lengths:
            raise ValueError(
                f"capture.{name} has {len(getattr(record, name))} entries, expected "
                f"{' or '.join(map(str, dict.fromkeys(lengths)))}: it is of kind {record.kind!r}, and the chain has {stages} "
                "stages"
            )
    kind.check(chain, record)
    _check_work(chain, schedule)


def check_graph(_: Chain, record: CaptureRecord) -> None:
    """Refuse a record of a graph whose cuts, or ops that run again, are not places of ops, or that names modules.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    if any(after <= before for before, after in pairwise((0, *record.cuts))):
        raise refused("capture.cuts", record.cuts, "places of ops, ascending, the first above 0")
    if record.stages:
        raise refused("capture.stages", record.stages, "none: the stages of a graph are no modules")
    if any(
        op >= len(ops)
        for options, ops in zip(record.rerun, record.ops, strict=False)
        for ran in options
        for op in ran
    ):
        raise refused("capture.rerun", record.rerun, "places of ops in their stages, as capture.ops has them")


def check_blocks(chain: Chain, record: CaptureRecord) -> None:
    """Refuse blocks that are kept in part, or fed by others than blocks before them.

    Raises:
        ValueError: names the field, what was got and what was expected.
    """
    for i, stage in enumerate(chain.stages):
        if len(stage.options) != 1:
            raise ValueError(
                f"chain.stages[{i}].options has {len(stage.options)} entries, expected 1: a module is kept whole or not at all"
            )
    if not record.stages:
        raise refused("capture.stages", record.stages, "the names of the modules that are stages")
    begin = 0  # the first block since the code between them was last a stage
    for i, fed in enumerate(record.fed):
        begin = begin if fed else i
        for row in fed:
            back = row[2] if len(row) == 3 else 1
            if not 1 <= back <= min(i - begin, MOST_BACK):
                raise refused(
                    f"capture.fed[{i}]", fed, f"outputs of 1 to {min(i - begin, MOST_BACK)} blocks back"
                )


def _check_work(chain: Chain, schedule: Schedule) -> None:
    """A schedule of a size that the referee can judge in minutes."""
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
    """A plan's data as JSON text.

    Raises:
        ValueError: it is larger than a plan file may be.
    """
    written = json.dumps(data, indent=1)
    if len(written) > MOST_BYTES:
        raise ValueError(
            f"Plan.save: the plan has {len(written)} bytes of JSON, and a plan file at most {MOST_BYTES}; plan fewer stages"
        )
    return written
