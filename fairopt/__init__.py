"""fairopt: guaranteed fairness for PyTorch models.

A differentiable layer moves predictions as little as possible so that a parity notion holds,
exactly, in training and in serving. Importing this package imports no solver.
"""

from fairopt.agreement import Agreement, cross_validate
from fairopt.auditing.report import Audit, AuditedRow, audit
from fairopt.errors import (
    BackendNotFoundError,
    Conflict,
    ConvergenceError,
    FairoptError,
    InfeasibleError,
    NotDifferentiableError,
    ProblemError,
    SolveError,
    UnboundedError,
    UnsupportedProblemError,
)
from fairopt.formulation.program import formulate
from fairopt.layer.module import FairnessLayer, project
from fairopt.notions.catalogue import (
    Budget,
    ConditionalParity,
    Constraint,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    Parity,
    PredictiveEquality,
)
from fairopt.notions.functionals import Batch, Functional, Row, Samples
from fairopt.online import OnlineParity
from fairopt.programs.problem import LP, QP
from fairopt.programs.rows import BlockRows, CellRows, DenseRows, Rows, SparseRows
from fairopt.programs.solution import Residuals, Solution, Status, residuals
from fairopt.programs.storage import load_problem, save_problem
from fairopt.sampler import StratifiedBatchSampler
from fairopt.solving.autograd import solve

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "LP", "QP", "Agreement", "Audit", "AuditedRow", "BackendNotFoundError", "Batch", "BlockRows",
    "Budget", "CellRows", "ConditionalParity", "Conflict", "Constraint", "ConvergenceError",
    "Covariance", "DemographicParity", "DenseRows", "EqualOpportunity", "EqualizedOdds",
    "ErrorParity", "FairnessLayer", "FairoptError", "Functional", "GroupCalibration", "ImpactRatio",
    "InfeasibleError", "MeanResidual", "MinimumRate", "NotDifferentiableError", "OnlineParity",
    "Parity", "PredictiveEquality", "ProblemError", "Residuals", "Row", "Rows", "Samples",
    "Solution", "SolveError", "SparseRows", "Status", "StratifiedBatchSampler", "UnboundedError",
    "UnsupportedProblemError", "audit", "cross_validate", "formulate", "load_problem", "project",
    "residuals", "save_problem", "solve",
]
# fmt: on
