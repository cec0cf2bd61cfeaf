"""The registry of backends: names to classes, imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any

from fairopt.backends.contract import Backend, Capabilities
from fairopt.backends.entries import Entry as Entry
from fairopt.backends.entries import built_in, entry_points
from fairopt.errors import BackendNotFoundError, FairoptError, ProblemError
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.finishing import finish

if TYPE_CHECKING:
    from fairopt.backends.highs import HiGHS as HiGHS
    from fairopt.backends.numba.backend import Numba as Numba
    from fairopt.backends.osqp.backend import OSQP as OSQP
    from fairopt.backends.qpth.backend import QPTH as QPTH

# The classes of the built-in backends (Numba, ...) are public too. They are not listed, so that
# "import *" does not import every solver.
__all__ = ["Adjoint", "Backend", "Capabilities", "available", "finish", "get", "names", "register"]

# Ours and those that `register` added, in the order in which "auto" tries them. What other
# distributions offer comes after, and is looked for only when none of these will do.
registry: dict[str, Entry] = {
    "numba": built_in("numba.backend", "Numba", "numba", "pip install numba"),
    "osqp": built_in("osqp.backend", "OSQP", "osqp", 'pip install "fairopt[osqp]"'),
    "highs": built_in("highs", "HiGHS", "scipy", 'pip install "fairopt[highs]"'),
    # Its metadata asks for numpy<2, but it runs on NumPy 2 when installed with --no-deps.
    "qpth": built_in("qpth.backend", "QPTH", "qpth", 'pip install "fairopt[qpth]"'),
}

loaded: dict[str, Backend] = {}


def __getattr__(name: str) -> Any:
    """The classes of the built-in backends, for their options: ``Numba(threads=1)``."""
    for backend, entry in registry.items():
        if entry.kind == name:
            return load(backend, entry)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(
    name: str,
    load: Callable[[], type[Backend]],
    *,
    package: str | None = None,
    install: str | None = None,
) -> None:
    """Add a backend under a name.

    Args:
        name: what ``backend="..."`` will say. It comes before an entry point of that name.
        load: returns the class. Called when the backend is first asked for; may import its solver.
        package: import name of the package that it needs, if any. While that is not installed the
            backend is not available, and asking for it says how to install it.
        install: the command that installs ``package``.

    Raises:
        ProblemError: the name is taken or reserved, or only one of package and install is given.
    """
    if name in registry or name == "auto":
        raise ProblemError(f"backend name: expected one not in use, got {name!r}")
    if (package is None) != (install is None):
        raise ProblemError(
            "package, install: expected both, the package's import name and the command that "
            f"installs it, or neither; got {package!r} and {install!r}"
        )
    loaded.pop(name, None)
    registry[name] = Entry(load, package, install or "")


def candidates() -> Iterator[str]:
    """``names()`` one after the other; entry points are read only if it comes to them."""
    yield from tuple(registry)
    for name in entry_points().entries:
        if name not in registry and name != "auto":
            yield name


def names() -> tuple[str, ...]:
    """All names, installed or not, in the order in which ``"auto"`` tries them."""
    return tuple(candidates())


def available() -> tuple[str, ...]:
    """The names whose packages are installed."""
    return tuple(name for name in candidates() if is_available(name))


def is_available(name: str) -> bool:
    """Whether the package that a backend needs is installed; it is not loaded for that."""
    return name in loaded or find(name).installed


def faults() -> tuple[str, ...]:
    """What is wrong with the entry points of other distributions, as far as seen unloaded."""
    found = entry_points()
    hidden = (
        f"backend {name!r} of the distribution {entry.distribution!r} cannot be reached: "
        f"{'the name is reserved' if name == 'auto' else 'another has that name'}; ask its authors "
        "to choose another"
        for name, entry in found.entries.items()
        if name in registry or name == "auto"
    )
    return (*found.faults, *hidden)


def find(name: str) -> Entry:
    """What is known of a backend, without loading it.

    Raises:
        BackendNotFoundError: no such name.
    """
    entry = registry.get(name)
    if entry is None and name != "auto":
        entry = entry_points().entries.get(name)
    if entry is None:
        raise BackendNotFoundError(
            f"backend: expected one of {', '.join(names())} or 'auto', got {name!r}"
        )
    return entry


def load(name: str, entry: Entry) -> type[Backend]:
    """The class of a backend.

    Raises:
        BackendNotFoundError: what it needs is missing, or what was found is no backend.
    """
    if entry.fault is not None:
        raise BackendNotFoundError(f"backend {name!r}: {entry.fault}")
    if not entry.installed:
        raise BackendNotFoundError(
            f"backend {name!r} needs the package {entry.package!r}, which is not installed; "
            f"{entry.remedy}"
        )
    try:
        kind = entry.load()
    except FairoptError:
        raise
    except Exception as error:  # whatever the module of a solver raises while it is imported
        raise BackendNotFoundError(
            f"backend {name!r} does not load: {type(error).__name__}: {error}; {entry.remedy}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise BackendNotFoundError(
            f"backend {name!r}: expected a subclass of fairopt.backends.Backend, got {kind!r}; "
            f"{entry.remedy}"
        )
    return kind


def get(name: str, **options: Any) -> Backend:
    """The backend of that name, constructed with ``options``.

    Raises:
        BackendNotFoundError: no such name, its package is not installed, or it does not load.
        ProblemError: an option the backend does not have, or a value it does not take.
    """
    if not options and name in loaded:
        return loaded[name]
    entry = find(name)
    kind = load(name, entry)
    try:
        backend = kind(**options)
    except FairoptError:
        raise
    except Exception as error:
        if options:
            known = ", ".join(map(repr, signature(kind).parameters)) or "none"
            raise ProblemError(f"backend {name!r}: {error}; its options: {known}") from error
        raise BackendNotFoundError(
            f"backend {name!r} cannot be made with its defaults: {type(error).__name__}: {error}; "
            f"{entry.remedy}"
        ) from error
    return backend if options else loaded.setdefault(name, backend)
