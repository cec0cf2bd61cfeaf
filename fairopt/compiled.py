"""How fairopt compiles: Numba, cached on disk. Import it only where compiled code is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit, cached on disk; without the cache where no cache folder can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # numba: "no locator available", neither folder is writable
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate
