"""Run benchmarks: all of them, or those named.

python -m benchmarks [solver_speed] [step_peaks] [...] [--write]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

NAMES = (
    "solver_speed",
    "revolve_speed",
    "random_chains",
    "overheads",
    "step_peaks",
    "persistence",
    "cuts",
    "milp_bound",
    "op_level_bound",
    "op_level",
)
DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/NAME.md, and NAME.svg if it draws")
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        text = module.report()
        print(text)
        if arguments.write:
            (DOCS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
            if hasattr(module, "figure"):
                module.figure().savefig(DOCS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
