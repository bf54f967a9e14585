"""Run the tests that need a GPU, one file per process: ``make cuda-tests`` or this module.

A file that crashes, hangs or fails stops no other. Tests that need hypothesis or diffusers are skipped where
these are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

from benchmarks.cuda.processes import ROOT, Ended, run_within

__all__ = ["LINES", "marked_files"]

LINES = "tests.jsonl"
FIRST = (
    "test_cuda.py",
    "test_watch.py",
    "test_check_values.py",
    "test_offload.py",
    "test_rehearse.py",
    "test_oom.py",
)
SECONDS = 300.0  # of a file
NOTHING_CHOSEN = 5  # pytest's exit status
MARK = re.compile(r"\bmark\.cuda\b")


def marked_files() -> list[Path]:
    """The files with tests marked ``cuda``, the most important first."""
    files = [
        file for file in (ROOT / "tests").rglob("test_*.py") if MARK.search(file.read_text(encoding="utf-8"))
    ]
    rank = {name: i for i, name in enumerate(FIRST)}
    return sorted(files, key=lambda file: (rank.get(file.name, len(rank)), file.name))


def main() -> int:
    """Give the exit status: 0 if no test failed and each file came to its end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", help="test files, as paths in tests/; default: all with a test marked cuda"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one file")
    parser.add_argument("--in-all", type=float, default=float("inf"), help="seconds for all files")
    arguments = parser.parse_args()
    chosen = [ROOT / "tests" / name for name in arguments.files] or marked_files()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.in_all
    rows = []
    with (folder / LINES).open("w", encoding="utf-8") as lines:
        for file in chosen:
            limit = min(arguments.seconds, until - time.monotonic())
            row = (
                _run(file, limit, folder)
                if limit > 0
                else (file.name, False, 0.0, "not started: no time left")
            )
            rows.append(row)
            print(
                json.dumps(dict(zip(("file", "ok", "seconds", "said"), row, strict=True))),
                file=lines,
                flush=True,
            )
            print(f"{row[0]:24} {'ok' if row[1] else 'FAILED':8} {row[2]:6.1f} s  {row[3]}", flush=True)
    wrong = [row for row in rows if not row[1]]
    print(f"{len(rows)} files, {len(wrong)} failed; output of each in {arguments.out}")
    for name, _, _, said in wrong:
        print(f"failed: {name}: {said}")
        print("\n".join(_failed(folder / f"{name}.log")))
    return 1 if wrong else 0


def _run(file: Path, limit: float, folder: Path) -> tuple[str, bool, float, str]:
    """Run the marked tests of a file: its name, whether all is well, seconds, and what was said."""
    log = folder / f"{file.name}.log"
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-q", "--durations=5"]
    ended: Ended = run_within([*command, str(file)], limit, log)
    last = next(reversed(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()), "")
    ok = ended.status in (0, NOTHING_CHOSEN)
    said = last.strip("= ") if ok or (ended.status or 0) > 0 else f"{ended.words}; last line: {last[:100]}"
    return file.name, ok, round(ended.seconds, 1), said


def _failed(log: Path) -> list[str]:
    """The lines of pytest's summary that name what failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [f"  {line[:200]}" for line in lines if line.startswith(("FAILED ", "ERROR "))]


if __name__ == "__main__":
    sys.exit(main())
