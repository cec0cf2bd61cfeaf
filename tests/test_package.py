"""The package as a whole: what importing it costs, and what is shipped."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fairopt"

HEAVY = {
    "clarabel", "cvxpy", "cvxpylayers", "highspy", "matplotlib", "moreau", "numba",
    "osqp", "pandas", "qpth", "scipy", "sklearn",
}  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fairopt_imports_no_solver() -> None:
    # torch itself may import some of them; only what fairopt adds is ours.
    added = python(
        "import sys, torch; before = set(sys.modules); import fairopt, fairopt.backends\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not HEAVY & set(added.split())


def test_asking_what_is_available_imports_no_solver() -> None:
    added = python(
        "import sys, torch; before = set(sys.modules)\n"
        "from fairopt import backends; backends.available()\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not HEAVY & set(added.split())


@pytest.mark.parametrize(
    "module", ["fairopt", "fairopt.backends", "fairopt.datasets", "fairopt.testing"]
)
def test_every_public_name_exists_and_is_documented(module: str) -> None:
    face = importlib.import_module(module)
    assert len(face.__all__) == len(set(face.__all__))
    for name in face.__all__:
        thing = getattr(face, name)
        if callable(thing):
            assert thing.__doc__, f"{module}.{name} has no docstring"


def test_version_is_the_metadata_s() -> None:
    import fairopt

    assert fairopt.__version__ == importlib.metadata.version("fairopt")


def test_command_line_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fairopt", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "fairopt" in done.stdout


# ---------------------------------------------------------------- what is shipped


def test_the_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    sources = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py")}
    data = {"fairopt/py.typed", "fairopt/datasets/adult.csv.xz", "fairopt/datasets/ATTRIBUTION.md"}
    assert sources | data <= shipped
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
    unwanted = {
        n
        for n in shipped
        if not n.startswith(("fairopt/", "fairopt-")) or n.endswith((".nbi", ".nbc", ".pyc"))
    }
    assert not unwanted
