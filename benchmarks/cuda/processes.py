"""Run a command within a time limit, its output in a file, and tell how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Ended", "run_within"]

ROOT = Path(__file__).resolve().parent.parent.parent
PATH = os.pathsep.join([str(ROOT / "src"), str(ROOT)])  # of modules: the checkout's
GRACE = 10.0  # seconds for the driver to end a process that was killed


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; negative the number of the signal that it died of; None if it was stopped at
            its limit.
        seconds: that it took.
        limit: seconds that it had.
    """

    status: int | None
    seconds: float
    limit: float

    @property
    def words(self) -> str:
        """How it ended, in words; "" with exit status 0."""
        if self.status is None:
            return f"stopped at its limit of {self.limit:.0f} s"
        if self.status < 0:
            return f"died of {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" if self.status else ""


def run_within(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a command in the root of the checkout, which it can import from, for at most ``limit`` seconds.

    Args:
        log: the file that gets what it prints.
        environment: variables that it has besides those of this process.
    """
    variables = {**os.environ, "PYTHONPATH": PATH, **(environment or {})}
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
    return Ended(status, time.monotonic() - began, limit)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: its session is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
