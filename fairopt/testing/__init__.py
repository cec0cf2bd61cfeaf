"""What every backend must pass; ours and yours. Needs pytest.

from fairopt.testing import BackendContract

class TestMine(BackendContract):
    backend = MySolver()
"""

from fairopt.testing.contract import BackendContract

__all__ = ["BackendContract"]
