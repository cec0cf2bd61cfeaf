"""One pool of threads for all backends whose solvers run without the GIL.

Plain threads: unlike OpenMP's or Numba's own they survive a fork (the child makes its own) and
calls from several threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

pool: ThreadPoolExecutor | None = None


def forget_pool() -> None:
    global pool
    pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_pool)


def in_parallel(work: Callable[[int, int], Result], size: int, workers: int) -> list[Result]:
    """``work(first, last)`` on ranges that cover 0..size-1; the caller takes the first."""
    global pool
    if workers <= 1 or size <= 1:
        return [work(0, size)]
    workers = min(workers, size)
    cut = [size * i // workers for i in range(workers + 1)]
    if pool is None:
        pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="fairopt")
    others = [pool.submit(work, cut[c], cut[c + 1]) for c in range(1, workers)]
    return [work(cut[0], cut[1]), *(other.result() for other in others)]


def each(workers: int, work: Callable[[int], None]) -> None:
    """Call ``work(c)`` for each c in 0..workers-1, one per thread."""

    def some(first: int, last: int) -> None:
        for c in range(first, last):
            work(c)

    in_parallel(some, workers, workers)
