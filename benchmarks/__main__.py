"""Run benchmarks: all of them, or those named.

python -m benchmarks [solver_speed] [step_peaks] [...] [--write]
python -m benchmarks op_level --only ViT [--write]
python -m benchmarks coverage --only Whisper
python -m benchmarks peak_accuracy --device cuda [--write]
python -m benchmarks random_training_loops --first 400 --count 50 --shrink
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import textwrap
from pathlib import Path

NAMES = (
    "solver_speed",
    "revolve_speed",
    "random_chains",
    "random_module_graphs",
    "random_training_loops",
    "random_op_graphs",
    "overheads",
    "step_peaks",
    "peak_accuracy",
    "coverage",
    "timeline",
    "persistence",
    "cuts",
    "milp_bound",
    "op_level_bound",
    "op_level",
    "compiled",
    "compiled_coverage",
    "plan_without_hardware",
    "roofline_check",
    "training_run",
    "guards",
    "host_overhead",
    "recurrent",
)
DOCS = Path(__file__).resolve().parent.parent / "docs"


def wrapped(text: str, width: int = 110) -> str:
    """Wrap the paragraphs and lists of a Markdown text; leave headings, tables, pictures and code."""
    fill = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)

    def block(part: str) -> str:
        if re.search(r"^(\||#|!\[)", part, re.MULTILINE):
            return part
        items = [" ".join(item.split()) for item in re.split(r"\n(?=[*-] )", part)]
        return "\n".join(
            fill(item, subsequent_indent="  " if item[:2] in ("* ", "- ") else "") for item in items
        )

    pieces = re.split(r"(\n*^```.*?^```$\n*)", text, flags=re.MULTILINE | re.DOTALL)  # code, with its fences
    return "".join(
        piece if piece.lstrip("\n").startswith("```") else "\n\n".join(map(block, piece.split("\n\n")))
        for piece in pieces
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/NAME.md, and NAME.svg if it draws")
    parser.add_argument(
        "--only", help="of op_level, coverage, compiled: the models whose titles have this in them"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="of peak_accuracy; cuda writes NAME_cuda.md"
    )
    parser.add_argument("--first", type=int, help="of random_training_loops: the first seed")
    parser.add_argument("--count", type=int, help="of random_training_loops: how many seeds")
    parser.add_argument(
        "--shrink", action="store_true", default=None, help="of random_training_loops: simplify what fails"
    )
    arguments = parser.parse_args()
    if arguments.only is not None and arguments.names not in (["op_level"], ["coverage"], ["compiled"]):
        parser.error(f"--only is for op_level, coverage or compiled alone, got {arguments.names}")
    if arguments.only is not None and arguments.names != ["op_level"] and arguments.write:
        parser.error(f"{arguments.names[0]} --only prints a part; --write is for all of it")
    if arguments.device is not None and arguments.names != ["peak_accuracy"]:
        parser.error(f"--device is for peak_accuracy alone, got {arguments.names}")
    names = ("only", "device", "first", "count", "shrink")
    part = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    seeds = part.keys() & {"first", "count", "shrink"}
    if seeds and (arguments.names != ["random_training_loops"] or arguments.write):
        parser.error(
            "--first, --count and --shrink are for random_training_loops alone, and --write is for all seeds"
        )
    suffix = "_cuda" if arguments.device == "cuda" else ""
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        text = wrapped(module.report(**part))
        print(text)
        if arguments.write:
            (DOCS / f"{name}{suffix}.md").write_text(text + "\n", encoding="utf-8")
            drawn = {name: module.figure()} if hasattr(module, "figure") else {}
            drawn |= module.figures(**part) if hasattr(module, "figures") else {}
            for each, figure in drawn.items():
                figure.savefig(DOCS / f"{each}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
