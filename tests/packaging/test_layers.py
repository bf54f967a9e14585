"""Imports between folders run one way, and the public list is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import networkx as nx
import pytest

import rematplan
from tests.shared.helpers import ROOT

PACKAGE = "rematplan"
# A folder may import from itself and from those before it.
ORDER = (
    "scheduler.core",
    "scheduler.solvers",
    "scheduler.bounds",
    "scheduler.plan",
    "scheduler.torch_layer",
    "scheduler.capture",
    "scheduler.costs",
    "scheduler.solve",
    "scheduler.estimate",
    "executors",
)
TORCH_FREE = ORDER[:4]
# Imported within functions, when they run: what a table in a lower layer names.
LATE = {
    ("scheduler.plan.kinds", "scheduler.costs.graph_producer"): "a kind of capture loads what captures",
    ("scheduler.plan.kinds", "scheduler.costs.block_producer"): "a kind of capture loads what captures",
    ("scheduler.plan.plan", "scheduler.torch_layer.device_memory"): "a share of a GPU's memory takes torch",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("scheduler", "executors"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _walk(child)


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of the modules that a file imports when it runs, wherever it does, with the line."""
    for node in _walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)


def rank(module: str) -> int:
    found = [k for k, name in enumerate(ORDER) if module == name or module.startswith(f"{name}.")]
    assert found, f"{module} is in no layer of ORDER"
    return found[0]


def test_each_folder_imports_from_itself_and_from_those_below() -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module, tree in sources()
        for name, line in imported(tree)
        if name.startswith(f"{PACKAGE}.")
        if module not in ("scheduler", "executors")
        if rank(name.removeprefix(f"{PACKAGE}.")) > rank(module)
        if (module, name.removeprefix(f"{PACKAGE}.").rpartition(".")[0]) not in LATE
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_no_two_modules_import_each_other() -> None:
    trees = dict(sources())
    graph = nx.DiGraph()
    for module, tree in trees.items():
        for name, _ in imported(tree):
            bare = name.removeprefix(f"{PACKAGE}.")
            target = bare if bare in trees else bare.rpartition(".")[0]
            if target in trees and target != module and (module, target) not in LATE:
                graph.add_edge(module, target)
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles


def test_the_core_imports_no_torch() -> None:
    wrong = [
        f"{module}:{line}"
        for module, tree in sources()
        if module.startswith(TORCH_FREE)
        for name, line in imported(tree)
        if name.split(".")[0] == "torch"
    ]
    assert not wrong
    done = subprocess.run(
        [sys.executable, "-c", "import sys, rematplan; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", rematplan.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(rematplan, name)
    assert name in dir(rematplan)
    if isinstance(found, type) or callable(found):
        assert found.__doc__


def test_what_is_not_public_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'solver'"):
        _ = rematplan.solver


def test_the_public_list_is_sorted_and_without_repetition() -> None:
    assert sorted(set(rematplan.__all__)) == sorted(rematplan.__all__)


def public_uses(text: str) -> set[str]:
    return set(re.findall(r"\brematplan\.(?:scheduler|executors)[\w.]*", text))


def test_readme_and_examples_use_the_public_list_alone() -> None:
    used = {
        f"{path.name}: {name}"
        for path in [ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
        for name in public_uses(path.read_text(encoding="utf-8"))
    }
    assert not used
