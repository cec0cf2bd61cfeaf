"""All tolerances, each with what it is relative to and why it has that value."""

import torch

# What "guaranteed" means: worst excess of a row over its side, relative to the row's scale.
ROW_PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6}
# A multiplier of a bound below this share of the terms that it is the difference of, or that moves
# x by less than this share of its size, is zero but for rounding: the bound is weakly active, which
# counts as inactive.
WEAK = 1e-13
TINY = 1e-200  # added to the scale of a row: what is smaller than this is zero

# Of numbers that are squared and summed without end.
MOST, MOST_WEIGHT = 1e100, 1e50
