"""The architecture as it is in the source: ``python -m bench.architecture`` measures and draws it.

Everything is read from the syntax trees; nothing is imported. tests/test_architecture.py holds the
measures, and ARCHITECTURE.md shows the picture, which this writes to docs/architecture.svg. The
layers are those of pyproject.toml, which import-linter holds.
"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fairopt"
PICTURE = ROOT / "docs" / "architecture.svg"


@dataclass(frozen=True)
class Function:
    """A function of the source, with the number of its parameters but ``self`` and ``cls``."""

    module: str
    name: str
    parameters: int
    compiled: bool


@lru_cache(maxsize=1)
def modules() -> dict[str, ast.Module]:
    """The syntax trees of all modules of the package, by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def room(module: str) -> str:
    """The package, or the module in the root, that a module belongs to."""
    return ".".join(module.split(".")[:2])


# ---------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------


def statements(body: list[ast.stmt], *, lazy: bool) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; with ``lazy`` those of functions, too."""
    for each in body:
        if isinstance(each, ast.If) and "TYPE_CHECKING" in ast.dump(each.test):
            continue
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        yield each
        for part in ("body", "orelse", "finalbody"):
            yield from statements(getattr(each, part, []), lazy=lazy)
        for handler in getattr(each, "handlers", []):
            yield from statements(handler.body, lazy=lazy)


def imported(module: str, *, lazy: bool = False) -> set[str]:
    """The modules of the package that a module imports."""
    known, found = modules(), set()
    for each in statements(known[module].body, lazy=lazy):
        if isinstance(each, ast.Import):
            found |= {alias.name for alias in each.names}
        elif isinstance(each, ast.ImportFrom) and each.module:
            for alias in each.names:
                name = f"{each.module}.{alias.name}"
                found.add(name if name in known else each.module)
    return {name for name in found if name in known and name != module}


@cache
def longest_chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that starts at a module; there must be no circles."""
    below = map(longest_chain, sorted(imported(module)))  # sorted: of equals always the same
    return (module, *max(below, key=len, default=()))


def longest_chains() -> list[tuple[str, ...]]:
    """All modules' longest chains, the longest first."""
    return sorted(map(longest_chain, modules()), key=len, reverse=True)


def most_of_one_package(chain: tuple[str, ...]) -> int:
    """How many modules of one package a chain goes through."""
    return max(Counter(map(room, chain)).values())


# ---------------------------------------------------------------------------------------------
# Functions and constants
# ---------------------------------------------------------------------------------------------


def count(arguments: ast.arguments) -> int:
    """Parameters but ``self`` and ``cls``; ``*args`` and ``**kwargs`` count as one each."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    several = sum(each is not None for each in (arguments.vararg, arguments.kwarg))
    return len([each for each in every if each.arg not in ("self", "cls")]) + several


def functions() -> Iterator[Function]:
    """All functions and methods, nested ones included."""

    def within(node: ast.AST, prefix: str, module: str) -> Iterator[Function]:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
                decorators = " ".join(map(ast.unparse, each.decorator_list))
                if "overload" not in decorators:
                    compiled = "compiled" in decorators or "njit" in decorators
                    yield Function(module, prefix + each.name, count(each.args), compiled)
            named = isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            inner = f"{prefix}{each.name}." if named else prefix  # type: ignore[attr-defined]
            yield from within(each, inner, module)

    for module, tree in modules().items():
        yield from within(tree, "", module)


def definitions(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a module defines itself, each with the statement that does so."""
    for each in modules()[module].body:
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield each.name, each
        targets = each.targets if isinstance(each, ast.Assign) else []
        targets = [each.target] if isinstance(each, ast.AnnAssign) and each.value else targets
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield name.id, each


def column_names() -> dict[str, list[str]]:
    """Constants that number the columns of an array, with the modules that define them.

    They are those that are unpacked from a range or from whole numbers: ``A, B = range(2)``.
    """
    found: dict[str, list[str]] = {}
    for module in modules():
        for name, statement in definitions(module):
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
                value = ast.unparse(statement.value)
                if value.startswith("range(") or value.strip("()").replace(", ", "").isdigit():
                    found.setdefault(name, []).append(module)
    return found


def lines(folder: Path) -> dict[str, int]:
    """The number of lines of each Python file."""
    return {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sorted(folder.rglob("*.py"))
    }


# ---------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------


def layers() -> list[list[str]]:
    """The rooms, from the top to the bottom, as import-linter holds them."""
    import tomllib  # Python 3.11 or newer

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (order,) = (each for each in contracts["contracts"] if each["id"] == "layers")
    return [layer.replace(" ", "").split("|") for layer in order["layers"]]


def purpose(name: str) -> str:
    """The first sentence of a room's docstring."""
    docstring = ast.get_docstring(modules()[f"fairopt.{name}"]) or ""
    first = " ".join(docstring.split("\n\n")[0].replace("``", "").split())
    return first[: first.index(". ") + 1] if ". " in first else first


def arrows() -> set[tuple[str, str]]:
    """Which room imports which, on import or later, but the face, which imports everything."""
    found = {(room(m), room(o)) for m in modules() for o in imported(m, lazy=True)}
    return {
        (a.removeprefix("fairopt."), b.removeprefix("fairopt."))
        for a, b in found
        if a != b and "fairopt" not in (a, b)
    }


def direct(every: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others: the smallest picture of the same order."""
    below: dict[str, set[str]] = {}
    for name in (name for layer in reversed(layers()) for name in layer):
        near = {b for a, b in every if a == name}
        below[name] = near.union(*(below[b] for b in near))
    return {(a, b) for a, b in every if not any(b in below[c] for x, c in every if x == a)}


def draw(path: Path) -> None:
    """The rooms in their layers, each with its purpose, and the arrows between them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "fairopt"  # the same file from the same source
    order = layers()
    height, gap, whole = 0.78, 0.62, 12.0
    figure = Figure(figsize=(whole, (height + gap) * len(order) * 0.88))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, whole)
    axes.set_ylim(-(height + gap) * len(order) + gap / 2, gap / 2)
    axes.axis("off")
    place = {}
    for level, names in enumerate(order):
        top = -(height + gap) * level
        width = min(5.0, (whole - 0.4) / len(names) - 0.35)
        for k, name in enumerate(names):
            center = whole / 2 + (k - (len(names) - 1) / 2) * (width + 0.35)
            place[name] = (center, top, top - height, level)
            axes.add_patch(
                FancyBboxPatch(
                    (center - width / 2, top - height), width, height, zorder=2,
                    boxstyle="round,pad=0.02,rounding_size=0.08", fc="#eef3f8", ec="#4a6a8a",
                )
            )  # fmt: skip
            axes.text(center, top - 0.08, name, ha="center", va="top", weight="bold", fontsize=11)
            words = textwrap.fill(purpose(name), int(width * 15.5))
            axes.text(center, top - 0.31, words, ha="center", va="top", fontsize=7.6)
    for above, below in sorted(direct(arrows())):
        a, b = place[above], place[below]
        far = b[3] - a[3] > 1
        axes.add_patch(
            FancyArrowPatch(
                (a[0], a[2]), (b[0], b[1]), arrowstyle="-|>", mutation_scale=10, zorder=1,
                connectionstyle=f"arc3,rad={0.12 if far else 0.0}", color="#4a6a8a", lw=1.0,
            )
        )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    chain = longest_chains()[0]
    print(f"longest chain of imports, {len(chain)}: {' > '.join(chain)}")
    print(f"of one package in it: {most_of_one_package(chain)}")
    every = list(functions())
    for least, compiled in ((8, False), (12, True)):
        many = sorted(
            (f for f in every if f.compiled == compiled and f.parameters > least),
            key=lambda f: -f.parameters,
        )
        kind = "compiled functions" if compiled else "functions"
        print(f"{len(many)} {kind} with more than {least} parameters")
        for each in many:
            print(f"    {each.parameters:3d} {each.module}.{each.name}")
    long = {n: k for f in (PACKAGE, ROOT / "tests") for n, k in lines(f).items() if k > 700}
    print(f"files of more than 700 lines: {long}")
    print(f"lines of the package: {sum(lines(PACKAGE).values())}")
    print(f"rooms: {sum(map(len, layers()))}, arrows: {len(arrows())}")
    draw(PICTURE)
    print(f"picture: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
