"""Several backends on one problem, side by side: ``cross_validate`` says whether they agree.

Everything that they answer is compared pair by pair, problem by problem: how the solve ended, x,
the multipliers, and the gradients of g.x, for random g, with respect to all data. A difference is
the largest over the elements, in their natural units, over the largest value; the units
(``fairopt.agreement.parameters``) make it independent of how rows and variables are scaled. Our own
residuals judge each answer without regard to the others, and finite differences can be asked too.

Where x is not unique (an LP with many solutions, a singular P) the objectives are compared instead.
Where multipliers are not unique, neither they nor the gradients that follow from them (of rows,
sides and bounds) are held against each other; those of q and P are.
``fairopt.agreement.degeneracy`` decides which.
"""

from fairopt.agreement.comparison import cross_validate
from fairopt.agreement.report import Agreement, Difference

__all__ = ["Agreement", "Difference", "cross_validate"]
