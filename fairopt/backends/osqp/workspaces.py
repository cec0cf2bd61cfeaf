"""Solver workspaces that are kept for the next problem of the same kind."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")


class Workspaces(Generic[Work]):
    """Idle workspaces by key, the least recently used dropped first.

    A workspace that is taken belongs to the taker alone until it is given back, so that each is
    used by one thread at a time and a key may have several. What fails is not given back. A copy
    or a pickle of the collection is empty, and so is a forked child's.

    Args:
        limit: how many idle workspaces are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()
        everywhere.add(self)

    def forget(self) -> None:
        """Drop all."""
        self.lock = threading.Lock()
        self.idle: OrderedDict[int, tuple[Hashable, Work]] = OrderedDict()  # oldest first
        self.number = 0

    def __len__(self) -> int:
        return len(self.idle)

    def __reduce__(self) -> tuple[type[Workspaces[Work]], tuple[int]]:
        return Workspaces, (self.limit,)

    def take(self, key: Hashable) -> Work | None:
        """The most recently used workspace of that key; ``None`` if none is idle."""
        with self.lock:
            for number in reversed(self.idle):
                if self.idle[number][0] == key:
                    return self.idle.pop(number)[1]
        return None

    def give(self, key: Hashable, work: Work) -> None:
        """Keep a workspace for the next who needs one of that key."""
        with self.lock:
            self.number += 1
            self.idle[self.number] = key, work
            while len(self.idle) > self.limit:
                self.idle.popitem(last=False)


everywhere: weakref.WeakSet[Workspaces[Any]] = weakref.WeakSet()


def forget_all() -> None:
    # Another thread of the parent may have held the lock, or have been in the middle of a solve.
    for workspaces in everywhere:
        workspaces.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_all)
