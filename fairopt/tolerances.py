"""All tolerances, each with what it is relative to and why it has that value.

Rounding of float64 is 1e-16. Rows have unit length, in the metric of P^-1, unless stated otherwise.
"""

import torch

# ---------------------------------------------------------------------------------------------
# The promise, and who judges it
# ---------------------------------------------------------------------------------------------

# What "guaranteed" means: worst excess of a row over its side, relative to the row's scale.
ROW_PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6}
# The other relative residuals (stationarity, dual sign, complementarity) of what `solve` returns.
# They do not concern the guarantee, and solvers reach them less easily than feasibility.
OPTIMALITY = {torch.float64: 1e-6, torch.float32: 1e-4}

# ---------------------------------------------------------------------------------------------
# Zero but for rounding
# ---------------------------------------------------------------------------------------------

# A sum below this share of the size of what was added up is zero: some terms, each rounded once.
ROUNDING_OF_SUM = 4e-15
# How far from 1 chances that sum to 1 may be: they come in float32, too. Half precision needs more.
CHANCES = 1e-6
# Added to the scale of a row, so that nothing is divided by zero; far below any data.
TINY = 1e-200
# Numbers that are squared and summed without end, and their weights, must not overflow.
MOST, MOST_WEIGHT = 1e100, 1e50
# A multiplier of a bound below this share of the terms that it is the difference of, or one that
# moves x or its row by less than this share of the scale, counts as zero: the side is weakly
# active, which counts as inactive. Above rounding, below the promise of 1e-12.
WEAK = 1e-13
# The gradient that Newton's method for the minimum-norm multiplier may leave, relative to the
# multiplier, and the shift that keeps its matrix definite: a hundred times rounding.
NEWTON = 1e-14
# A minimum-norm multiplier below this share of the largest one, or of the terms that it is the
# difference of, is zero: it comes out of a factorisation whose condition may be 1e7.
ZERO_MULTIPLIER = 1e-9
# The same for a side that is infinite or has no room, in units of the rounding of an active-set
# solve: so many times its tolerance.
ACTIVE_SET_ROUNDING = 10.0
# The violation that an active-set solve for multipliers may leave, relative to the multipliers.
ACTIVE_SET = 1e-13
# An inequality on multipliers that is shorter than this share of the longest says nothing.
NO_ROW = 1e-12

# ---------------------------------------------------------------------------------------------
# Rank
# ---------------------------------------------------------------------------------------------

# Both values stand in a gap that was measured, on 600 drawn problems over all notions, backends and
# options: of 23,000 singular values of unit rows, as shares of the largest, and of 48,000 parts of
# unit rows outside the span of the rows before them, all that are rounding were below 1e-13, and
# all others above 1e-7 (singular values above 1e-4). No decision changes anywhere between.
#
# Singular values below this share of the largest are rank deficiency.
RANK = 1e-11
# A row whose part outside the span of others is shorter than this depends on them. It is larger
# than RANK, because it is what is left after subtracting row by row, and is then divided by.
DEPENDENT = 1e-9

# The same where lengths come from a matrix of scalar products, whose squared pivots are left out
# below a share of 1e-12: what is kept has an error of no more than 1e-16 / 1e-6.
DEPENDENT_IN_PARTS, DROPPED_PIVOT = 1e-8, 1e-12
# A multiplier in the projection's model problem that changes more slowly than this, relative to the
# step, does not change: the rate is rounding.
NO_RATE = 1e-10
# A part of the cells that keeps less than this share of its curvature is summed afresh, because
# what is left after subtracting would have lost too many digits.
KEPT_CURVATURE = 1e-4

# ---------------------------------------------------------------------------------------------
# Refinement: from a solver's answer to one that is exact to rounding
# ---------------------------------------------------------------------------------------------

# Natural residual, relative to the size of the terms, where nothing is left to correct.
EXACT = 1e-15
# An x below this share of its terms P^-1 q, or of what a step cancels, may have no correct digit.
ROUNDING_OF_TERMS, CANCELLED = 1e-15, 1e-14
# Where nothing is nearer to changing its side than this share of its scale, ten times the promise,
# every rule finds the same active set.
CLEAR = 1e-11
# Beyond the step length at which a multiplier becomes zero, so that rounding does not stop short.
BEYOND = 1e-6

# ---------------------------------------------------------------------------------------------
# Certificates
# ---------------------------------------------------------------------------------------------

# A proof of infeasibility may take coefficients for zero that are this much smaller than the terms
# they are the sum of, and must exceed the sides by more than this share of its own terms.
PROOF = 1e-11
# The same for a cell of a projection's own proof, whose multipliers are exact only to their rank.
PROOF_COEFFICIENT = 1e-9
# In a solver's own proof, a coefficient below this share of its terms is meant to be zero, and so
# is a multiplier below this share of the largest.
MEANT, MEANT_MULTIPLIER = 1e-5, 1e-7
# Rows whose multipliers are above this share of the largest have a part in a proof.
PROOF_SUPPORT = 1e-9
# A direction is one of recession if its products with P and the rows are this small beside their
# terms, and the objective falls along it by at least this share of |q| |d|.
RECESSION = 1e-9

# ---------------------------------------------------------------------------------------------
# The small problem in cell means, which says whether and how far rows can hold
# ---------------------------------------------------------------------------------------------

# Change of x over the weight of a proximal step: the precision to which reduced costs are known.
SETTLED = 1e-12
# Between a linear program's objective and its bound by duality, in units of the problem.
DUALITY_GAP = 1e-13
# A reduced cost below the first share of its terms, or the second of the largest, is rounding.
REDUCED_COST = 1e-11, 1e-13
# By how much more than the least factor or addition all rows may need.
ENOUGH = 1e-9
# A multiplier of the least total violation within this share of its limit has reached it.
AT_LIMIT = 1e-9
# One that is this small beside the largest, on rows of unit length, is zero; so is a sum A^T z of
# terms that are this much larger, and a hundred times as large where a bound is infinite.
NO_VIOLATION = 1e-8
# How far the total violation may be from its lower bound, relative to it.
LEAST_VIOLATION = 1e-8
# A least total violation above this share of its terms is not zero.
IS_VIOLATED = 1e-9
# Relative excess of a row that is not rounding.
EXCEEDED = 1e-11

# ---------------------------------------------------------------------------------------------
# Solvers
# ---------------------------------------------------------------------------------------------

# The tightest feasibility that HiGHS takes; its answers are refined and need no more.
HIGHS_FEASIBILITY = 1e-10
# OSQP's own precision for certificates, which are then made exact and checked.
OSQP_CERTIFICATE = 1e-7
# Relative residuals of optimality (stationarity, dual sign, complementarity) that an attempt of
# qpth aims at, and that count as solved in the end. Exact points leave about 1e-16. Complementarity
# is relative to the whole objective, beside which what narrow bounds decide is small.
QPTH_AIM = {torch.float64: (1e-10, 1e-10, 1e-13), torch.float32: (1e-5, 1e-5, 1e-6)}
QPTH_ENOUGH = {torch.float64: (1e-9, 1e-9, 1e-11), torch.float32: (1e-4, 1e-4, 1e-4)}
# Excess, relative to a row's scale, below which a solver's answer shows that the rows have a point.
FEASIBLE = 1e-9
# Squared pivots of matrices with a unit diagonal, where rounding leaves 1e-16: below this share of
# the largest P counts as singular.
QPTH_PIVOT = 1e-10
# Singular values of equalities below this share of the largest depend on others. An interior point
# squares the condition: a larger value than RANK, because what is kept must be solved with.
QPTH_RANK = 1e-9


# ---------------------------------------------------------------------------------------------
# Comparisons between answers
# ---------------------------------------------------------------------------------------------

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
