"""Write a check's findings figure by figure, so that they survive its process."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Findings", "read_findings", "verdict"]

LONGEST = 400  # characters of an error's message


class Findings:
    """The figures of one check.

    Attributes:
        folder: where the check may leave files for those after it.
    """

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self._file = file.open("w", encoding="utf-8")

    def add(self, name: str, value: Any, ok: bool | None = None) -> None:
        """Write a figure; of several dicts under one name the entries come together.

        Args:
            ok: whether it is as it should be; None if nobody says what it should be.
        """
        found = {"name": name, "value": _rounded(value), "ok": ok}
        print(json.dumps(found, default=str), file=self._file, flush=True)

    def equal(self, name: str, differs: str, *, repeatable: bool = True) -> None:
        """Write whether two steps were equal bit for bit.

        Args:
            differs: how they differ; "" if they do not.
            repeatable: whether the plain step repeats itself; if it does not, a difference is no mismatch.
        """
        self.add(name, differs or "equal", not differs or (None if not repeatable else False))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Within it an exception becomes a figure that is not as it should be, and the check goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 # whatever it is, the other figures are wanted
            traceback.print_exc()
            self.add(name, f"{type(error).__name__}: {str(error)[:LONGEST]}", ok=False)


def _rounded(value: Any) -> Any:
    """The same with six digits of each float."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_findings(file: Path) -> tuple[dict[str, Any], list[str], bool | None]:
    """The figures in a file, the names of those that are not as they should be, and the verdict on all."""
    figures: dict[str, Any] = {}
    verdicts: dict[str, list[bool | None]] = {}
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the process died while it wrote
            found = json.loads(line)
            name, value = found["name"], found["value"]
            both = isinstance(value, dict) and isinstance(figures.get(name), dict)
            figures[name] = {**figures[name], **value} if both else value
            verdicts.setdefault(name, []).append(found["ok"])
    wrong = [name for name, each in verdicts.items() if False in each]
    return figures, wrong, verdict(each for oks in verdicts.values() for each in oks)


def verdict(oks: Iterator[bool | None]) -> bool | None:
    """False if any is; else True if any is; None if nothing was judged."""
    judged = [ok for ok in oks if ok is not None]
    return all(judged) if judged else None
