"""Everything compiled, and how it is loaded: the only package that imports Numba.

``from fairopt import kernels`` costs nothing: a module of it is imported when first asked for, as
in ``kernels.checks.finite``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{name}"
    if name.startswith("__") or find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(module)
