"""The installed package is whole, and `make test` tests it."""

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import rematplan
from tests.shared.helpers import ROOT

FOLDERS = ("scheduler", "executors")  # of the repository, installed within the package

only_the_wheel = pytest.mark.skipif(
    os.environ.get("REMATPLAN_WHEEL") != "1", reason="about the installed wheel: run `make test`"
)


def location(package: str) -> Path:
    """The folder that ``import package`` would read, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} cannot be imported"
    assert spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    return Path(folder).resolve()


def source_files() -> set[str]:
    """Paths of the wheel's files, as the checkout has them."""
    inside = {
        f"rematplan/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    return inside | {"rematplan/__init__.py", "rematplan/py.typed"}


@pytest.fixture
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("rematplan")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("REMATPLAN_WHEEL") == "1":
            raise
        pytest.skip("rematplan is not installed in this environment: run `make test`")


def test_the_package_says_that_it_is_typed():
    assert (location("rematplan") / "py.typed").is_file()


@only_the_wheel
def test_the_tests_import_the_installed_wheel():
    assert location("rematplan").parent == Path(sysconfig.get_path("purelib")).resolve()


@only_the_wheel
def test_the_checkout_is_not_on_the_import_path():
    assert ROOT not in {Path(entry).resolve() for entry in sys.path}


@only_the_wheel
def test_the_wheel_holds_every_source_file_and_nothing_else(distribution):
    sources = source_files()
    installed = {file.as_posix() for file in distribution.files or () if "__pycache__" not in file.parts}
    metadata = {file for file in installed if file.startswith("rematplan-")}
    assert installed - metadata == sources


def test_the_metadata_is_that_of_pyproject(distribution):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = distribution.metadata
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == rematplan.__version__
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == project["license"]
    assert metadata.get_all("License-File") == project["license-files"]
    assert set(metadata.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])
    unconditional = {line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line}
    assert unconditional == set(project["dependencies"])


def test_every_declared_dependency_is_pinned():
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name] = version
    declared = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(requirements.Requirement, declared):
        assert pins[requirement.name] in requirement.specifier, requirement
