"""Write the tables of docs/cuda.md from the results of ``make cuda`` in a folder."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cuda.order import CHECKS
from benchmarks.cuda.processes import ROOT
from benchmarks.cuda.runner import latest

__all__ = ["PAGE", "START", "checks_table", "figures", "write"]

PAGE = ROOT / "docs" / "cuda.md"
START = "## What was found\n"  # everything from here on is written
NONE_YET = "No run was made on a GPU yet."
HIDDEN = ("measured bytes",)  # the same in MiB stands beside it


def write(folder: Path, page: Path = PAGE) -> Path:
    """Write the last part of the page anew.

    Raises:
        ValueError: the page has no such part.
    """
    text = page.read_text(encoding="utf-8")
    before, found, _ = text.partition(START)
    if not found:
        raise ValueError(f"--page: {page} has no line {START.strip()!r}, after which the tables belong")
    page.write_text(before + START + "\n" + "\n".join(figures(folder)) + "\n", encoding="utf-8")
    return page


def checks_table() -> list[str]:
    """What each check looks at, as a table."""
    return _table(
        ("check", "looks at"), ((f"`{check.name}`", _claim(check.name, check.module)) for check in CHECKS)
    )


def _claim(name: str, module: str) -> str:
    """The first paragraph of a check's docstring, as one line."""
    doc = getattr(importlib.import_module(module), name).__doc__
    return " ".join(doc.partition("\n\n")[0].replace("``", "`").split())


def figures(folder: Path) -> list[str]:
    """The tables of the latest run of each check on a GPU, as lines of Markdown."""
    lines = latest(folder, "cuda")
    if not lines:
        return [NONE_YET]
    chosen = [lines[check.name] for check in CHECKS if check.name in lines]
    environment = lines.get("environment", {}).get("figures", {})
    machine = ", ".join(
        f"{name} {environment[name]}"
        for name in ("GPU", "torch", "CUDA", "cuDNN", "python")
        if name in environment
    )
    overview = ((f"`{line['check']}`", _verdict(line), f"{line['seconds']:.0f}") for line in chosen)
    text = [f"{machine}; {chosen[0]['when'][:10]}.", ""] if machine else []
    text += _table(("check", "found", "seconds"), overview)
    for line in chosen:
        text += ["", f"### {line['check']}", "", *_figures(line["figures"])]
    return text


def _verdict(line: Mapping[str, Any]) -> str:
    if line["ended"]:
        return str(line["ended"])
    if line["wrong"]:
        return f"not as it should be: {', '.join(line['wrong'])}"
    return "as it should be" if line["ok"] else "figures only"


def _figures(found: Mapping[str, Any]) -> list[str]:
    """Single figures in one table; those that have columns in another."""
    single = {name: value for name, value in found.items() if not isinstance(value, dict)}
    rows = {name: value for name, value in found.items() if isinstance(value, dict)}
    columns = list(dict.fromkeys(key for value in rows.values() for key in value if key not in HIDDEN))
    columns = [key for key in columns if any(rows[name].get(key) not in (None, "") for name in rows)]
    lines = _table(("", "found"), single.items()) if single else []
    lines += [""] if single and rows else []
    if rows:
        lines += _table(
            ("", *columns), ((name, *(value.get(key, "") for key in columns)) for name, value in rows.items())
        )
    return lines


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A table, as lines of Markdown."""
    heads = list(heads)
    cells = ([_cell(each) for each in row] for row in rows)
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")
