"""The package as a whole: what importing it costs, who may know whom, what is shipped."""

from __future__ import annotations

import ast
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


def test_every_public_name_exists_and_is_documented() -> None:
    import fairopt

    assert len(fairopt.__all__) == len(set(fairopt.__all__))
    for name in fairopt.__all__:
        thing = getattr(fairopt, name)
        if callable(thing):
            assert thing.__doc__, f"fairopt.{name} has no docstring"


def test_version_is_the_metadata_s() -> None:
    import fairopt

    assert fairopt.__version__ == importlib.metadata.version("fairopt")


def test_command_line_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fairopt", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "fairopt" in done.stdout


# ---------------------------------------------------------------- who may know whom

# In this order each module may import what stands before it, never what stands behind. `solve`
# reaches backends through their registry only, and so does everything above it.
LAYERS = [
    {"errors", "compiled", "least_norm", "lu", "memory", "scan", "ties"},
    {"problem", "functionals", "combinations"},
    {"block_rows", "partitions", "clipped"},
    {"cell_kkt", "solution", "constraints", "storage"},
    {"kkt", "tracing", "reach"},
    {"refinement", "row_classes", "assembly", "conflicts"},
    {"cell_refinement"},
    {"refine"},
    {"samples", "objectives"},
    {"inputs"},
    {"formulated"},
    {"classes"},
    {"formulate"},
    {"backends"},
    {"solve"},
    {"elastic"},
    {"online", "agreement", "audit", "datasets", "sampler"},
    {"layer"},
    {"demo", "doctor", "compare", "testing", "streamed"},
    {"timing"},
    {"commands"},
    {"cli"},
]
FAIRNESS = {
    "assembly",
    "row_classes",
    "inputs",
    "formulated",
    "classes",
    "constraints",
    "functionals",
    "samples",
    "tracing",
    "formulate",
    "layer",
    "online",
    "audit",
    "datasets",
    "sampler",
    "demo",
    "compare",
    "streamed",
    "commands",
    "cli",
}


def imported(path: Path) -> set[str]:
    """The modules of fairopt that a file names in its imports, `fairopt.` left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("fairopt.") for name in names if name.startswith("fairopt.")}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in {"__init__.py", "__main__.py"})


def test_modules_import_only_from_below() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in modules():
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module in ("__init__", "__main__"):
            continue
        assert module in level, f"{module} has no place in LAYERS"
        for name in imported(path):
            below = name.split(".")[0]
            assert below not in level or level[below] <= level[module], (
                f"{path.relative_to(ROOT)} imports fairopt.{name}, which stands above it"
            )


def test_backends_know_nothing_of_fairness_and_nothing_above_knows_a_backend() -> None:
    for path in modules():
        names = imported(path)
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] in {
            "errors.py",
            "problem.py",
            "solution.py",
            "kkt.py",
            "refine.py",
            "reach.py",
            "conflicts.py",
            "elastic.py",
            "backends",
        }:
            assert not {name.split(".")[0] for name in names} & FAIRNESS, relative
        if relative.parts[0] != "backends":
            solver_files = {
                n
                for n in names
                if n.startswith("backends.") and n.split(".")[1].strip("_") != n.split(".")[1]
            }
            assert not solver_files, f"{relative} reaches past the registry: {solver_files}"


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
