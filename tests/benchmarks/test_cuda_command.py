"""``make cuda`` runs each check within its limits and reports how it ended, even by a crash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cuda import page, suite
from benchmarks.cuda.order import CHECKS, SECONDS
from benchmarks.cuda.runner import LINES, Check, failures, run_checks
from tests.shared.helpers import PATH, ROOT

MODULE = "tests.shared.cuda_checks"


def written(folder: Path) -> list[dict[str, Any]]:
    """The lines in a folder."""
    return [json.loads(line) for line in (folder / LINES).read_text(encoding="utf-8").splitlines()]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python -m benchmarks.cuda`` did."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH},
        check=False,
    )


def test_checks_that_crash_raise_or_hang_say_so_and_the_others_go_on(tmp_path: Path) -> None:
    names = {
        "dies": 30.0,
        "hangs": 2.0,
        "raises": 30.0,
        "mismatches": 30.0,
        "only_figures": 30.0,
        "finds": 30.0,
    }
    lines = run_checks([Check(name, MODULE, limit) for name, limit in names.items()], "cpu", tmp_path, 120)
    assert written(tmp_path) == lines
    assert [line["check"] for line in lines] == list(names)
    dies, hangs, raises, mismatches, only_figures, finds = lines
    assert (dies["ok"], dies["ended"]) == (False, "died of SIGSEGV")
    assert (hangs["ok"], hangs["ended"]) == (False, "stopped at its limit of 2 s")
    assert 2 <= hangs["seconds"] < 10
    assert (raises["ok"], raises["ended"]) == (False, "exit status 1")
    assert "lost the device" in raises["output"]
    for line in (dies, hangs, raises):
        assert line["figures"] == {"before": 1}
    assert (mismatches["ok"], mismatches["ended"]) == (False, "")
    assert mismatches["wrong"] == ["unequal steps", "what raises"]
    assert mismatches["figures"]["what raises"] == "ValueError: no such kernel"
    assert mismatches["figures"]["what comes after"] == 1
    assert (only_figures["ok"], only_figures["wrong"]) == (None, [])
    assert (finds["ok"], finds["ended"]) == (True, "")
    row = {"predicted MiB": 1.0, "measured MiB": 2.0}
    assert finds["figures"] == {"a figure": 0.333333, "a row": row, "machine": "cpu"}
    table = "\n".join(failures(lines))
    for name in ("dies", "hangs", "raises", "mismatches"):
        assert name in table
    assert "finds" not in table
    assert "only_figures" not in table
    assert not list(tmp_path.glob("*.part"))


def test_the_seconds_of_all_checks_are_kept(tmp_path: Path) -> None:
    began = time.monotonic()
    lines = run_checks([Check("hangs", MODULE, 60), Check("finds", MODULE, 60)], "cpu", tmp_path, 4)
    assert time.monotonic() - began < 15
    assert lines[0]["ended"] == "stopped at its limit of 4 s"
    assert lines[1]["ended"] == "not started: the 4 s of all checks are used up"
    assert [line["ok"] for line in lines] == [False, False]
    assert written(tmp_path) == lines


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.slow
def test_make_runs_the_checks_that_are_named_with_the_python_that_has_torch(tmp_path: Path) -> None:
    own = {"PYTHON": sys.executable, "VENV": str(tmp_path / "environment"), "OUT": str(tmp_path)}
    named = [f"{name}={value}" for name, value in {**own, "DEVICE": "cpu", "CHECKS": "optimizer"}.items()]
    done = subprocess.run(
        ["make", "cuda", *named], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = written(tmp_path)
    assert (line["check"], line["device"], line["ok"], line["ended"]) == ("optimizer", "cpu", True, "")
    row = line["figures"]["AdamW, foreach"]
    assert row["predicted MiB"] == pytest.approx(row["measured MiB"], rel=0.01)
    assert not (tmp_path / "environment").exists(), "nothing is installed"


def test_the_exit_status_and_a_table_say_that_a_check_failed(tmp_path: Path) -> None:
    done = command("--device", "cpu", "--out", str(tmp_path), "--seconds", "1", "optimizer", "copies")
    assert done.returncode == 1
    table = done.stdout.partition("failed:")[2]
    assert "optimizer  not started" in table
    assert "copies     not started" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_the_command_names_the_dry_run() -> None:
    done = command()
    assert done.returncode == 2
    assert "make cuda DEVICE=cpu" in done.stderr


def test_the_checks_are_named_once_and_exist() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert len(page.checks_table()) == len(CHECKS) + 2  # each has a docstring
    assert SECONDS <= 8 * 60


# ---- docs/cuda.md ------------------------------------------------------------------------------------


def test_the_page_lists_what_each_check_looks_at() -> None:
    assert "\n".join(page.checks_table()) in page.PAGE.read_text(encoding="utf-8")


def test_the_page_says_that_no_run_was_made_on_a_gpu(tmp_path: Path) -> None:
    run_checks([Check("finds", MODULE, 30)], "cpu", tmp_path, 30)
    assert page.figures(tmp_path) == [page.NONE_YET]


def test_the_page_has_the_latest_figures_of_each_check(tmp_path: Path) -> None:
    common = {"device": "cuda", "when": "2026-01-01T00:00:00+00:00", "seconds": 2.0}
    peaks = {"budget 0%": {"predicted MiB": 2.0, "measured MiB": 1.0, "measured bytes": 2**20, "said": ""}}
    lines: list[dict[str, Any]] = [
        {"check": "peaks", "ok": False, "ended": "died of SIGSEGV", "wrong": [], "figures": {}},
        {"check": "peaks", "ok": True, "ended": "", "wrong": [], "figures": {"segments": False, **peaks}},
        {"check": "values", "ok": False, "ended": "", "wrong": ["graph"], "figures": {"graph": "a | b"}},
        {"check": "environment", "ok": None, "ended": "", "wrong": [], "figures": {"GPU": "X", "torch": "2"}},
    ]
    (tmp_path / LINES).write_text("".join(json.dumps({**common, **line}) + "\n" for line in lines))
    document = tmp_path / "page.md"
    document.write_text(f"# Title\n\n{page.START}\nold\n")
    page.write(tmp_path, document)
    text = document.read_text()
    assert text.startswith(f"# Title\n\n{page.START}\nGPU X, torch 2; 2026-01-01.\n")
    assert "old" not in text
    assert "SIGSEGV" not in text
    assert "| `peaks` | as it should be | 2 |" in text
    assert "| `values` | not as it should be: graph | 2 |" in text
    assert "|  | predicted MiB | measured MiB |\n|---|---|---|\n| budget 0% | 2.000 | 1.000 |" in text
    assert "| graph | a \\| b |" in text


# ---- make cuda-tests ---------------------------------------------------------------------------------


def test_the_files_with_marked_tests_come_in_order_of_importance() -> None:
    names = [file.name for file in suite.marked_files()]
    assert names[: len(suite.FIRST)] == list(suite.FIRST)
    assert "test_distributed.py" in names
    assert "test_chain.py" not in names


@pytest.mark.slow
def test_each_file_is_a_process_and_a_failure_stops_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.cuda.suite",
            "--out",
            str(tmp_path),
            "no_such_file.py",
            "executors/test_watch.py",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH},
        check=False,
    )
    rows = [json.loads(line) for line in (tmp_path / suite.LINES).read_text().splitlines()]
    assert [(row["file"], row["ok"]) for row in rows] == [("no_such_file.py", False), ("test_watch.py", True)]
    assert done.returncode == 1
    assert "failed: no_such_file.py" in done.stdout
    assert "2 files, 1 failed" in done.stdout


@pytest.mark.slow
def test_what_needs_hypothesis_or_diffusers_is_skipped_without_them() -> None:
    plugins = ["tests.shared.without_extras", "no:hypothesispytest", "no:cacheprovider"]
    options = [option for plugin in plugins for option in ("-p", plugin)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-k",
            "unet",
            "tests/core/test_chain.py",
            "tests/executors/test_offload.py",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PATH, "REMATPLAN_WHEEL": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_chain.py:0: needs hypothesis" in done.stdout
    assert "needs diffusers" in done.stdout
    assert "passed" not in done.stdout
