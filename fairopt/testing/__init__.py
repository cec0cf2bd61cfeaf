"""Tests that every backend and every parity notion must pass, ours and yours.

from fairopt.testing import BackendContract  # needs pytest

class TestMine(BackendContract):
    backend = MySolver()

from fairopt.testing import check_notion

def test_mine():
    check_notion(MyParity(tolerance=0.02), scores, groups)
"""

from typing import TYPE_CHECKING, Any

from fairopt.testing.notion import check_notion

if TYPE_CHECKING:
    from fairopt.testing.contract import BackendContract

__all__ = ["BackendContract", "check_notion"]


def __getattr__(name: str) -> Any:
    """The contract, imported when asked for: it needs pytest, and the rest does not."""
    if name == "BackendContract":
        from fairopt.testing.contract import BackendContract

        return BackendContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
