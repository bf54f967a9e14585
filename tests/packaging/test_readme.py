"""The README's code does what its text states, and the examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.shared.helpers import ROOT

README = ROOT / "README.md"


# The compiler looks at .grad of a block's input, which is no leaf; it does so for the plain model, too.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_the_code_of_the_readme_runs_from_top_to_bottom() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("n_layer=4") == 1
    text = text.replace(
        "n_layer=4", "n_layer=2"
    )  # what the blocks do is the same; planning takes half the time
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_readme_leads_with_make_demo_and_make_test() -> None:
    head = README.read_text(encoding="utf-8")[:800]
    assert head.index("make demo") < head.index("make test")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "train_gpt.py",
            ["--steps", "2", "--layers", "2", "--width", "64", "--context", "64", "--batch", "8"],
            "losses of all 2 steps equal bit for bit: yes",
        ),
        ("compare_solvers.py", ["--model", "resnet"], "longest solve"),
        ("train_digits.py", ["--epochs", "4"], "test accuracy 9"),
    ],
)
@pytest.mark.slow
def test_the_example_runs_and_shows_what_it_promises(
    script: str, arguments: list[str], expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
