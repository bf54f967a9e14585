"""Checks that end in every possible way, for tests of the command that runs them."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine


def finds(found: Findings, machine: Machine) -> None:
    found.add("a figure", 1 / 3)
    found.add("a row", {"predicted MiB": 1.0})
    found.add("a row", {"measured MiB": 2.0}, ok=True)
    with found.attempt("not reached"):
        found.add("machine", machine.kind)


def only_figures(found: Findings, machine: Machine) -> None:
    found.equal("steps that differ where the plain one does, too", "2 of 3 differ", repeatable=False)


def mismatches(found: Findings, machine: Machine) -> None:
    found.equal("equal steps", "")
    found.equal("unequal steps", "1 of 3 differ")
    with found.attempt("what raises"):
        raise ValueError("no such kernel")
    found.add("what comes after", 1, ok=True)


def raises(found: Findings, machine: Machine) -> None:
    found.add("before", 1, ok=True)
    raise RuntimeError("lost the device")


def dies(found: Findings, machine: Machine) -> None:
    found.add("before", 1, ok=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(found: Findings, machine: Machine) -> None:
    found.add("before", 1, ok=True)
    time.sleep(600)
