"""Record how a model was captured, as data in a plan file, and check that data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rematplan.scheduler.core.json_data import (
    anything,
    choice,
    count,
    flag,
    objects,
    parse,
    refused,
    rows,
    seconds,
    shown,
    text,
    tuples,
)
from rematplan.scheduler.plan.kinds import KINDS
from rematplan.scheduler.plan.why_cut import LEFT_OUT, REASONS, Cut

__all__ = ["RECORD", "CaptureRecord"]


@dataclass(frozen=True, slots=True)
class CaptureRecord:
    """How the model was captured: enough to capture it again, and to see that it is the same.

    Attributes:
        kind: a key of ``kinds.KINDS``.
        reason: why this kind, in words.
        device: type of the device that held the model.
        structure, leaves: the call's signature.
        model: fingerprint of the model.
        graph: fingerprint of the op graph ("" for modules).
        cuts: inner cuts of the op graph (empty for modules).
        stages: names of the modules that are stages, as often as they run (empty for graph).
        fed: for each of them, which outputs of those before are among its arguments: (argument leaf, output
            leaf, how many blocks back).
        random: (L,) whether a stage draws random numbers.
        changed: (L,) names of what a stage changes: buffers; of blocks also attributes and frozen parameters.
        dropped: (L,) for each option of a stage, the numbers of the saved tensors that it drops (empty for
            modules).
        rerun: (L,) for each option of a stage, the ops that run again, by their places in it (empty for
            modules).
        gaps: (L,) share by which the seconds of an option may exceed the least for its bytes; 0 if proven
            (likewise).
        ops: (L,) for each op of a stage, its name and the bytes that autograd saves of what it makes
            (likewise).
        shares: (L,) for each option of a compiled stage, the share of its activations that it is compiled to
            save at most (empty where stages are not compiled).
        uncached: whether stages run without autocast's cache of casts.
        begins: (L - 1,) why each stage but the first begins where it does (empty for modules, and in old
            plans).
        left_out: (why, how many) gaps that are no cuts after all.
        evaluating: names of submodules that were in eval mode.
        unread: leaves of the call, other than tensors, that the forward does not read.
        frozen: names of parameters that did not require grad.
        environment: what else decides which ops run (``torch_layer.environment``), as JSON; "" if unknown.
        target: name of the device that was planned for without being there; "" for the one that held the
            model.
        target_memory: bytes of that device; 0 if none was named, and in old plans.
    """

    kind: str
    reason: str
    device: str
    structure: str
    leaves: str
    model: str
    graph: str = ""
    cuts: tuple[int, ...] = ()
    stages: tuple[str, ...] = ()
    fed: tuple[tuple[tuple[int, ...], ...], ...] = ()
    random: tuple[bool, ...] = ()
    changed: tuple[tuple[str, ...], ...] = ()
    dropped: tuple[tuple[tuple[int, ...], ...], ...] = ()
    rerun: tuple[tuple[tuple[int, ...], ...], ...] = ()
    gaps: tuple[float, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    uncached: bool = False
    ops: tuple[tuple[tuple[str, int], ...], ...] = ()
    begins: tuple[Cut, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()
    evaluating: tuple[str, ...] = ()
    unread: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    environment: str = ""
    target: str = ""
    target_memory: int = 0

    def __post_init__(self) -> None:
        for name in ("cuts", "stages", "random", "gaps", "evaluating", "unread", "frozen"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "changed", tuple(tuple(names) for names in self.changed))
        for name in ("fed", "dropped", "rerun", "ops"):
            rows = tuple(tuple(tuple(row) for row in rows) for rows in getattr(self, name))
            object.__setattr__(self, name, rows)
        object.__setattr__(self, "shares", tuple(tuple(row) for row in self.shares))
        object.__setattr__(self, "begins", tuple(Cut(*row) for row in self.begins))
        object.__setattr__(self, "left_out", tuple((why, count) for why, count in self.left_out))
        if self.kind not in KINDS:
            raise ValueError(f"CaptureRecord: kind={self.kind!r}, expected {' or '.join(map(repr, KINDS))}")


def _leaves(where: str, value: Any) -> None:
    """Accept JSON text: a list with a row for each leaf of the arguments (``CallSignature``)."""
    text(where, value)
    try:
        found = parse(value)
    except ValueError as error:
        raise ValueError(f"{where} is {shown(value)}, expected JSON text: {error}") from error
    rows(rows(anything))(where, found)
    if any(not row or not isinstance(row[0], str) for row in found):
        raise refused(where, value, "rows that each begin with a word")


def _kind(where: str, value: Any) -> None:
    """Accept a kind of capture; the table may have grown since this file was loaded."""
    choice(*KINDS)(where, value)


_CUT = tuples(choice(*REASONS), count, count, count, count, text)
RECORD = objects(
    {"kind": _kind, "reason": text, "device": text, "structure": text, "leaves": _leaves, "model": text},
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
        "shares": rows(rows(seconds)),
        "uncached": flag,
        "ops": rows(rows(tuples(text, count))),
        "begins": rows(_CUT),
        "left_out": rows(tuples(choice(*LEFT_OUT), count)),
        "evaluating": rows(text),
        "unread": rows(count),
        "frozen": rows(text),
        "environment": text,
        "target": text,
        "target_memory": count,
    },
)
