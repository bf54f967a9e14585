"""Configure all tests."""

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests may import from ``benchmarks``, which is in no wheel, without the checkout on the path.
_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
_SPEC = importlib.util.spec_from_file_location(
    "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _SPEC is not None
sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(_SPEC))

# A machine with a GPU may lack these, and may install nothing: tests that need them are skipped there. The
# tests of the wheel fail without them instead, for `make test` has installed them.
OPTIONAL = ("diffusers", "hypothesis")
MAY_LACK = os.environ.get("REMATPLAN_WHEEL") != "1"

if importlib.util.find_spec("hypothesis") is not None or not MAY_LACK:
    from hypothesis import settings

    # Seeded, so that a failure repeats; compiled code makes a first example slow, hence no deadline.
    settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=50)
    settings.load_profile("seeded")


def _lacking(error: BaseException | None) -> str | None:
    """The optional package that is missing; None if it is something else."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    missing = name in OPTIONAL and importlib.util.find_spec(name) is None
    return name if missing and MAY_LACK else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Skip a test whose fixtures need what is missing."""
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip a test that needs what is missing."""
    return (yield from _skipping())


def _skipping() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if name := _lacking(error):
            pytest.skip(f"needs {name}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Skip a file that imports what is missing."""
    report = yield
    raised = report.call.excinfo.value if report.outcome == "failed" else None
    if raised is not None and (name := _lacking(raised.__cause__ or raised)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {name}")
    return report


def _cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _repeatable_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests on CUDA ask for equal bits: kernels that sum in no fixed order would give others each time."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    import torch

    from rematplan.scheduler.capture.repeat import deterministic

    with deterministic(torch.device("cuda")):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
