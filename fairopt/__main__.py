"""``python -m fairopt``: the same as the ``fairopt`` command."""

from __future__ import annotations

import sys

from fairopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
