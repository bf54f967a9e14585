"""Read a memory budget."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["format_bytes", "parse_budget"]

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip # a table
_HOW = (
    'pass an int of bytes, or text such as "6GiB", "800MB", "75%" (of the device\'s memory), "auto" (what is free) or '
    '"auto - 2GiB"'
)
RESERVE = "5%"  # of the device's memory, that "auto" leaves free: other processes, fragmentation


def parse_budget(
    value: Any,
    device_bytes: int | Callable[[], int] | None = None,
    free_bytes: Callable[[], int] | None = None,
) -> int:
    """Return ``value`` as bytes, rounded down.

    Args:
        value: an int of bytes, or text: a number and a unit (KB, MB, GB, TB decimal; KiB, MiB, GiB, TiB
            binary), or a percentage of ``device_bytes``; or "auto", what is free less ``RESERVE``, or "auto -
            R", less R.
        device_bytes: memory of the device, or a function that finds it where it matters; the machine's memory
            if None.
        free_bytes: gives the bytes that a step may take; those free on this machine if None.

    Raises:
        TypeError: neither an int nor text.
        ValueError: unreadable text, a fraction, zero, negative or not finite, 2^63 bytes or more.
    """
    automatic = re.fullmatch(r"\s*auto\s*(?:-\s*(.*))?", value) if isinstance(value, str) else None
    if automatic is not None:
        reserve = _parse_text(automatic[1] or RESERVE, device_bytes)
        free = free_machine_bytes() if free_bytes is None else free_bytes()
        if reserve >= free:
            raise ValueError(
                f"memory_budget={value!r}: {format_bytes(free)} are free, no more than the reserve of "
                f'{format_bytes(reserve)}; free memory, or keep less in reserve: "auto - 100MiB"'
            )
        result = free - reserve
    elif isinstance(value, str):
        result = _parse_text(value, device_bytes)
    elif isinstance(value, bool):
        raise TypeError(f"memory_budget={value!r} is a bool; {_HOW}")
    elif isinstance(value, numbers.Integral):
        result = int(value)
    elif isinstance(value, numbers.Real):
        number = float(value)
        if math.isfinite(number) and 0 < number <= 1:
            raise ValueError(
                f"memory_budget={number} is a fraction, and of what is not clear; "
                f'write "{number:.0%}" for that share of the device\'s memory, or {_HOW}'
            )
        raise ValueError(f"memory_budget={number} is not a whole number of bytes; {_HOW}")
    else:
        raise TypeError(f"memory_budget is a {type(value).__name__}; {_HOW}")
    if result <= 0:
        raise ValueError(f"memory_budget={value!r} must be more than 0 bytes; {_HOW}")
    if result >= 2**63:
        raise ValueError(f"memory_budget={value!r} is 2^63 bytes or more; {_HOW}")
    return result


def _parse_text(text: str, device_bytes: int | Callable[[], int] | None) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*|%)\s*", text)
    if match is None:
        raise ValueError(f"memory_budget={text!r} cannot be read; {_HOW}")
    number, unit = match.groups()
    if unit == "%":
        share = float(number)
        if not 0 < share <= 100:
            raise ValueError(f"memory_budget={text!r} must be above 0% and at most 100%")
        whole = machine_bytes if device_bytes is None else device_bytes
        return int((whole() if callable(whole) else whole) * share / 100)
    if unit.upper() not in _UNITS:
        raise ValueError(f"memory_budget={text!r}: unit {unit!r} is unknown; {_HOW}")
    if not unit and "." in number:
        raise ValueError(f"memory_budget={text!r} has no unit; {_HOW}")
    scale = _UNITS[unit.upper()]
    return int(number) * scale if "." not in number else int(float(number) * scale)


def machine_bytes() -> int:
    """Return physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_machine_bytes() -> int:
    """Return memory of this machine that programs can have without swapping."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def format_bytes(size: float) -> str:
    """Return a number of bytes as text, in binary units.

    Example:
        >>> format_bytes(1536)
        '1.50 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
