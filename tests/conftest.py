"""Settings of all tests."""

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Tests may import from ``benchmarks``, which is in no wheel, without the checkout on the path.
_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
_SPEC = importlib.util.spec_from_file_location(
    "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
assert _SPEC is not None
sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(_SPEC))

# Seeded, so that a failure repeats; compiled code makes a first example slow, hence no deadline.
settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("seeded")


def _cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
