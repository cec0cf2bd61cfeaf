"""Example data that comes with the package, ready for a model with a fairness layer.

``load_adult`` reads the UCI Adult data. ``ATTRIBUTION.md`` in this folder names source and licence.
"""

from __future__ import annotations

from fairopt.datasets.adult import Adult, Split, load_adult

__all__ = ["Adult", "Split", "load_adult"]
