"""The registry of backends: names to modules, imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fairopt.backends.base import Backend, Capabilities
from fairopt.errors import BackendNotFoundError, ProblemError
from fairopt.kkt import Adjoint

if TYPE_CHECKING:
    from fairopt.backends.numba_ import Numba

__all__ = ["Adjoint", "Backend", "Capabilities", "Numba", "available", "get", "names", "register"]


@dataclass(frozen=True)
class Entry:
    """Where a backend lives and what it needs."""

    load: Callable[[], type[Backend]]
    package: str | None  # the import name of the solver's package
    install: str  # how to get it


def built_in(module: str, kind: str, package: str, install: str) -> Entry:
    def load() -> type[Backend]:
        found: type[Backend] = getattr(import_module(f"fairopt.backends.{module}"), kind)
        return found

    return Entry(load, package, install)


registry: dict[str, Entry] = {
    "numba": built_in("numba_", "Numba", "numba", "pip install numba"),
}


def __getattr__(name: str) -> Any:
    """The classes of the built-in backends, for their options: ``Numba(threads=1)``."""
    if name == "Numba":
        return registry["numba"].load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(name: str, load: Callable[[], type[Backend]]) -> None:
    """Add a backend under a name. ``load`` returns the class and may import its solver.

    Raises:
        ProblemError: the name is taken, or reserved.
    """
    if name in registry or name == "auto":
        raise ProblemError(f"backend name: expected one not in use, got {name!r}")
    registry[name] = Entry(load, None, "")


def names() -> tuple[str, ...]:
    """All registered names, installed or not, in the order in which ``"auto"`` tries them."""
    return tuple(registry)


def available() -> tuple[str, ...]:
    """The names whose packages are installed."""
    return tuple(name for name in names() if is_available(name))


def is_available(name: str) -> bool:
    """Whether the package that a registered backend needs is installed."""
    return name in loaded or installed(registry[name])


def installed(entry: Entry) -> bool:
    return entry.package is None or find_spec(entry.package) is not None


loaded: dict[str, Backend] = {}


def get(name: str, **options: Any) -> Backend:
    """The backend of that name, constructed with ``options``.

    Raises:
        BackendNotFoundError: no such name, or its package is not installed.
        ProblemError: an option the backend does not have.
    """
    if not options and name in loaded:
        return loaded[name]
    entry = registry.get(name)
    if entry is None:
        raise BackendNotFoundError(
            f"backend: expected one of {', '.join(registry)} or 'auto', got {name!r}"
        )
    if not installed(entry):
        raise BackendNotFoundError(
            f"backend {name!r} needs the package {entry.package!r}, which is not installed; "
            f"get it with: {entry.install}"
        )
    kind = entry.load()
    if not options:
        return loaded.setdefault(name, kind())
    try:
        return kind(**options)
    except TypeError as error:
        raise ProblemError(f"backend {name!r}: {error}") from error
