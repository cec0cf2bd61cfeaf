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

# Comparisons between answers.

# Differences between backends, relative to the largest entry of x, and of gradients (and
# multipliers, which are gradients of the optimal value) relative to their natural sizes. Solvers
# that are right agree to about the square root of the rounding or better.
AGREEMENT = {torch.float64: 1e-7, torch.float32: 1e-5}
GRADIENT_AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4}
# Differences of numbers below these shares of their natural size are relative to that share
# instead: a number that is zero but for rounding has no digits to agree on. Gradients lose more.
ZERO_GRADIENT = 1e-3
ZERO_SOLUTION = 1e-6
# A finite difference is left out where its two steps differ by more than this share of its value:
# truncation is then larger than what it should judge.
DOUBTFUL = 1e-3
# Predictions of one problem in several shapes and orders, relative to the largest: only rounding
# tells them apart.
SAME = {torch.float64: 1e-9, torch.float32: 1e-5}
# The self-test of a backend, in x of size 1: a wrong answer is off by 0.1 and more.
SELF_TEST = 1e-6
