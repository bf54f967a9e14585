"""Beside a user's own ``scheduler.py`` rematplan is imported from a wheel, from ``-e`` and an sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import rematplan.executors
import rematplan.scheduler
from tests.shared.helpers import ROOT

FIRST_PROGRAM = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
)[0]
IMPORTS = "\n".join(line for line in FIRST_PROGRAM.splitlines() if line.startswith("from rematplan"))

pytest.importorskip("hatchling", reason="building takes hatchling, which `make test` installs")


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the packages are made of, to be built in."""
    folder = tmp_path_factory.mktemp("checkout")
    kept = shutil.ignore_patterns("__pycache__", "*.nb?", ".*")
    for name in ("scheduler", "executors", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def built(folder: Path, kind: str, into: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into), cwd=folder)
    (found,) = into.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def test_an_sdist_gives_the_wheel_that_the_checkout_gives(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    archive = built(checkout, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = built(unpacked, "wheel", tmp_path / "again")
    names = [set(zipfile.ZipFile(each).namelist()) for each in (wheel, again)]
    assert names[0] == names[1]
    assert "rematplan/scheduler/solvers/optimal.py" in names[0]
    assert all(name.startswith(("rematplan/", "rematplan-")) for name in names[0])


def share_compiled(into: Path) -> None:
    """Give these packages what numba compiled of the tests' own, for equal sources.

    numba tells them by size and time. Without it, each program would compile the solvers anew, in 15 seconds.
    """
    for package in (rematplan.scheduler, rematplan.executors):
        here = Path(package.__path__[0])
        there = into / here.name
        for source in here.rglob("*.py"):
            same = there / source.relative_to(here)
            if same.read_bytes() == source.read_bytes():
                os.utime(same, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
        for kept in here.rglob("*.nb?"):
            place = there / kept.relative_to(here)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(kept, place)


@pytest.mark.slow
def test_the_readmes_first_program_runs_beside_a_users_own_scheduler(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    """Whether a file or a package of that name lies beside the script, and however rematplan is installed."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = str(environment / "bin" / "python")
    # What the tests' environment has is seen from the new one, but for rematplan, which comes first.
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (site / "zz_tests.pth").write_text(
        "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
    )
    editable = built(checkout, "wheel:editable", tmp_path / "editable")
    for package in (wheel, editable):
        for old in site.glob("rematplan*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        zipfile.ZipFile(package).extractall(site)
        share_compiled(site / "rematplan" if package is wheel else checkout)
        # Files beside the script, for the whole program; packages beside it, for its imports alone.
        for names, program in (
            (("scheduler.py", "executors.py"), FIRST_PROGRAM),
            (("scheduler/__init__.py", "executors/__init__.py"), IMPORTS),
        ):
            folder = tmp_path / package.parent.name / names[0].replace("/", "-")
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("raise ImportError('a file of the user, not of rematplan')\n")
            script = folder / f"train_{len(program)}.py"
            script.write_text(f"{program}\nimport rematplan; print(rematplan.__file__)\n")
            said = run(python, str(script), cwd=folder)
            assert str(checkout if package is editable else site) in said
