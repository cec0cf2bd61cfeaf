"""What keeps the code easy to find one's way in, measured on the source.

The order of the packages is held by import-linter (``make lint``). ``python -m bench.architecture``
prints the same measures and draws the picture of ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
import sys

import pytest

from bench import architecture
from bench.architecture import PACKAGE, ROOT, functions, lines, modules

# Public signatures whose keyword-only options are the interface: each option is documented where
# it is written, and a bundle of them would only hide it. They carry "noqa: PLR0913".
PUBLIC = {
    "fairopt.agreement.comparison.cross_validate",
    "fairopt.formulation.program.formulate",
    "fairopt.layer.module.FairnessLayer.__init__",
    "fairopt.layer.module.project",
    "fairopt.programs.problem.QP.__init__",
}

PARAMETERS, KERNEL_PARAMETERS = 8, 12
LONGEST_CHAIN, OF_ONE_PACKAGE = 16, 4
LINES = 700


def test_the_root_holds_the_public_face_only() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 7


def test_each_package_opens_with_its_one_purpose() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        assert first.endswith("."), f"{path.parent.name}: {first!r}"


def test_chains_of_imports_are_short() -> None:
    chain = architecture.longest_chains()[0]
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)
    assert architecture.most_of_one_package(chain) <= OF_ONE_PACKAGE, " > ".join(chain)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml by tomllib")
def test_the_picture_has_few_rooms_and_no_arrow_upward() -> None:
    layers = architecture.layers()
    level = {name: k for k, layer in enumerate(layers) for name in layer}
    assert len(level) <= 24
    assert [f"{a} > {b}" for a, b in architecture.arrows() if level[a] >= level[b]] == []


def test_no_module_is_shadowed_by_a_name_of_its_package() -> None:
    """``package.name`` must mean one thing, the module or what the package's face exports."""
    known = modules()
    for module, tree in known.items():
        names = {name for name, _ in architecture.definitions(module)}
        for each in architecture.statements(tree.body, lazy=False):
            if isinstance(each, ast.ImportFrom) and f"{each.module}" != module:
                names |= {alias.asname or alias.name for alias in each.names}
        assert not [name for name in names if f"{module}.{name}" in known], module


def test_nothing_private_is_a_module_or_stands_in_one() -> None:
    private = [m for m in modules() if m.split(".")[-1].startswith("_") and m[-2:] != "__"]
    for module in modules():
        private += [
            f"{module}.{name}"
            for name, statement in architecture.definitions(module)
            if name.startswith("_")
            and name[-2:] != "__"
            and isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        ]
    assert private == []


@pytest.mark.parametrize("folder", ["fairopt", "tests"])
def test_files_are_short_enough_to_read(folder: str) -> None:
    long = {name for name, count in lines(ROOT / folder).items() if count > LINES}
    assert long == set()


def test_functions_take_few_parameters() -> None:
    many = {f"{f.module}.{f.name}" for f in functions() if f.parameters > PARAMETERS}
    kernels = {f"{f.module}.{f.name}" for f in functions() if f.compiled}
    assert many - kernels - PUBLIC == set()
    assert PUBLIC <= many, "take the name off the list"


def test_kernels_take_few_parameters() -> None:
    many = [f for f in functions() if f.compiled and f.parameters > KERNEL_PARAMETERS]
    assert many == []


def test_columns_are_named_once() -> None:
    twice = {k: v for k, v in architecture.column_names().items() if len(v) > 1}
    assert twice == {}


@pytest.mark.xfail(strict=True, reason="14 files and 32 moves")
def test_a_call_of_the_layer_stays_in_few_files() -> None:
    """Forward and backward of two groups, after a first call; ``python -m bench.call_path``."""
    from bench import call_path

    calls = call_path.calls_of_layer()
    assert len(calls) > 10, "the profiler saw nothing"
    assert len(call_path.files(calls)) <= 12
    assert call_path.moves(calls) <= 30
