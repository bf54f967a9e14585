"""JSON that others may have written: read within bounds, and compared with what is expected."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from rematplan.scheduler.core.checks import is_integer, is_number

__all__ = [
    "LARGEST",
    "Check",
    "accept",
    "anything",
    "check_format",
    "choice",
    "count",
    "flag",
    "integer",
    "number",
    "objects",
    "optional",
    "parse",
    "refused",
    "rows",
    "seconds",
    "shown",
    "text",
    "tuples",
    "version",
]

LARGEST = 2**62  # numbers of bytes stay below it: sums of two such numbers still fit an int64
Check: TypeAlias = Callable[[str, Any], None]  # (name of the field, its value); raises ValueError


def shown(value: Any) -> str:
    """Return a value in a message, cut short whatever its size and depth."""
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = 60
    return short.repr(value)


def refused(where: str, value: Any, expected: str) -> ValueError:
    """Return the error for a field that is not what it should be."""
    return ValueError(f"{where} is {shown(value)}, expected {expected}")


def parse(data: bytes | str) -> Any:
    """Return the data in JSON text, no key twice.

    Raises:
        ValueError: it is not JSON in UTF-8, names a key twice in one object, or is nested too deeply.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value] # None
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return found


def check_format(call: str, data: Any, expected: int) -> None:
    """Refuse data that is no object, or of another format, by a ValueError that names ``call``."""
    if not isinstance(data, Mapping) or data.get("format") != expected:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"{call}: format {shown(found)}, expected {expected}")


def anything(where: str, value: Any) -> None:
    """Accept whatever it is: it is only compared and shown."""


def accept(expected: str, fits: Callable[[Any], bool]) -> Check:
    """Accept what ``fits``; the error says what was ``expected``."""

    def check(where: str, value: Any) -> None:
        if not fits(value):
            raise refused(where, value, expected)

    return check


version = accept(
    "1, the format that this version knows", lambda value: not isinstance(value, bool) and value == 1
)
text = accept("a string", lambda value: isinstance(value, str))
flag = accept("true or false", lambda value: isinstance(value, bool))
integer = accept(
    "an integer between -2**62 and 2**62", lambda value: is_integer(value) and -LARGEST < value < LARGEST
)
count = accept(
    "an integer of at least 0, below 2**62", lambda value: is_integer(value) and 0 <= value < LARGEST
)
number = accept(  # infinity is one
    "a number of at least 0",
    lambda value: is_number(value) and value >= 0 and not (is_integer(value) and value >= LARGEST),
)


def seconds(where: str, value: Any) -> None:
    """Accept a finite number that is not negative."""
    number(where, value)
    if not math.isfinite(value):
        raise refused(where, value, "a finite number of at least 0")


def choice(*allowed: str) -> Check:
    """Accept one of these strings."""
    expected = f"one of {', '.join(map(repr, allowed))}"
    return accept(expected, lambda value: isinstance(value, str) and value in allowed)


def optional(of: Check) -> Check:
    """Accept null, or what ``of`` takes."""

    def check(where: str, value: Any) -> None:
        if value is not None:
            of(where, value)

    return check


def rows(of: Check) -> Check:
    """Accept a list, each entry as ``of`` says."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise refused(where, value, "a list")
        for i, entry in enumerate(value):
            of(f"{where}[{i}]", entry)

    return check


def tuples(*of: Check, least: int | None = None) -> Check:
    """Accept a list of just these entries; of the last ones those after ``least`` may be missing."""
    fewest = len(of) if least is None else least

    def check(where: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or not fewest <= len(value) <= len(of):
            raise refused(
                where, value, f"a list of {fewest if fewest == len(of) else f'{fewest} to {len(of)}'} entries"
            )
        for i, (entry, each) in enumerate(zip(value, of, strict=False)):
            each(f"{where}[{i}]", entry)

    return check


def objects(required: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """Accept an object with these fields and no others; ``others`` may be missing."""
    known = {**required, **(others or {})}

    def check(where: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise refused(where, value, f"an object with {', '.join(required)}")
        for name in required:
            if name not in value:
                raise ValueError(f"{where} has no field {name!r}; expected {', '.join(required)}")
        for name, entry in value.items():
            if name not in known:
                raise ValueError(f"{where} has an unknown field {shown(name)}; expected {', '.join(known)}")
            known[name](f"{where}.{name}" if where else name, entry)

    return check
