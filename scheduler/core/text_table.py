"""Tables as plain text, by rich: the one style in which plans and comparisons are printed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["lines_of", "new_table"]


def new_table(title: str | None = None) -> Table:
    """Return an empty table in the style of all that are printed."""
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def lines_of(width: int, *printed: Any, **options: Any) -> list[str]:
    """Print on a console of ``width`` characters; return the lines, without blanks at their ends."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False, **options)
    for each in printed:
        console.print(each)
    return [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
