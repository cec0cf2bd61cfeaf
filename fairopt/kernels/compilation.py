"""How fairopt compiles: Numba, cached on disk. Import it only where compiled code is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit, cached on disk; without the cache where no cache folder can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # numba: "no locator available", neither folder is writable
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


def identity(x: float) -> float:
    return x


def cache_folder() -> str | None:
    """Where Numba caches the kernels; ``None`` where it cannot. Nothing is compiled or written."""
    try:
        return str(numba.njit(cache=True)(identity).stats.cache_path)
    except RuntimeError:  # as above
        return None
