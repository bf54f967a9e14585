"""Check the planner's promises on a GPU, and measure it.

python -m benchmarks.cuda [--device cpu] [--out out] [--seconds 480] [CHECK ...]
python -m benchmarks.cuda --page out      (write docs/cuda.md's tables from a folder's results)
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cuda.findings import Findings
from benchmarks.cuda.machine import Machine
from benchmarks.cuda.order import CHECKS, SECONDS
from benchmarks.cuda.runner import failures, run_checks

PATIENCE = 3  # how many times its limit a check has in a dry run, on cores that others may use


def main() -> int:
    """Give the exit status: 0 if every check came to its end and none found a mismatch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CHECK", help="default: all of them, in their order")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on tiny models"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all checks together")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write the tables of docs/cuda.md")
    parser.add_argument(
        "--check", metavar="MODULE:NAME", help=argparse.SUPPRESS
    )  # what a process of ours runs
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check is not None:
        _check(arguments.check, arguments.device, arguments.findings)
        return 0
    if arguments.page is not None:
        from benchmarks.cuda.page import write

        print(f"wrote {write(arguments.page)}")
        return 0
    unknown = set(arguments.names) - {check.name for check in CHECKS}
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CHECKS)}")
    if arguments.device == "cuda" and not _has_cuda():
        parser.error("torch finds no CUDA device here; the dry run is --device cpu (make cuda DEVICE=cpu)")
    chosen = [check for check in CHECKS if not arguments.names or check.name in arguments.names]
    if arguments.device == "cpu":
        chosen = [dataclasses.replace(check, seconds=PATIENCE * check.seconds) for check in chosen]
    began, workers = time.monotonic(), 1 if arguments.device == "cuda" else 2
    lines = run_checks(
        chosen, arguments.device, arguments.out.resolve(), arguments.seconds, _say, workers=workers
    )
    wrong = failures(lines)
    print(f"{len(lines)} checks, {time.monotonic() - began:.0f} s; results in {arguments.out}")
    if wrong:
        print("\n".join(["", "failed:", *wrong]))
    return 1 if wrong else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _check(where: str, device: str, file: Path) -> None:
    """Run one check, in this process."""
    module, name = where.split(":")
    getattr(importlib.import_module(module), name)(Findings(file), Machine(device))


def _say(line: dict[str, Any]) -> None:
    """Print how a check went."""
    ok = {True: "ok", False: "FAILED", None: "figures"}[line["ok"]]
    why = line["ended"] or ", ".join(line["wrong"])
    print(f"{line['check']:22} {ok:8} {line['seconds']:6.1f} s{'  ' + why if why else ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
