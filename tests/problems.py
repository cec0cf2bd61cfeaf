"""Problems for the tests: what Hypothesis draws, and independent solvers to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import clarabel
import numpy as np
import torch
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog

from fairopt import (
    QP,
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
    PredictiveEquality,
    formulate,
)

NOTIONS = (DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual)


@dataclass
class Case:
    """The arguments of one call of the layer."""

    constraints: list[Constraint]
    scores: torch.Tensor
    groups: dict[str, torch.Tensor]
    targets: torch.Tensor
    bounds: Any
    weights: torch.Tensor | None


@st.composite
def cases(draw: st.DrawFn, largest: int = 500) -> Case:
    """Parity problems, the nasty ones included: see issue "the core", what it must show, 1."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 18, 40, 100, 250, largest]))
    n = draw(st.integers(1, n))
    names = ["sex", "race", "age"][: draw(st.integers(1, 3))]
    groups = {}
    for name in names:
        count = draw(st.integers(1, 14))
        spread = draw(st.sampled_from(["even", "rare", "copy"]))
        codes = rng.integers(0, count, n)
        if spread == "rare":
            codes = np.minimum(rng.geometric(0.5, n) - 1, count - 1)
        if spread == "copy" and groups:
            codes = next(iter(groups.values())).numpy().copy()
        groups[name] = torch.from_numpy(codes.astype(np.int64))

    scale = 10.0 ** draw(st.integers(-8, 8)) if draw(st.booleans()) else 1.0
    outside = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 1e3]))  # bounds' scale over the scores'
    kind = draw(st.sampled_from(["uniform", "constant", "ties", "normal", "shifted"]))
    first = groups[names[0]].numpy()
    scores = {
        "uniform": lambda: rng.random(n),
        "constant": lambda: np.full(n, 0.5),
        "ties": lambda: rng.integers(0, 3, n) / 2,
        "normal": lambda: 5 * rng.normal(size=n),
        "shifted": lambda: rng.random(n) + 0.1 * first,
    }[kind]() * scale
    side = scale * outside
    limits = draw(
        st.sampled_from(["none", "lower", "upper", "both", "samples", "some meet", "all meet"])
    )
    width = rng.random(n)
    bounds = {
        "none": lambda: None,
        "lower": lambda: (0.0, None),
        "upper": lambda: (None, 0.6 * side),
        "both": lambda: (0.0, side),
        "samples": lambda: tensors(0.3 * side * width, side * (0.3 * width + 0.7)),
        "some meet": lambda: tensors(
            np.full(n, 0.25 * side), side * (0.25 + rng.choice([0.0, 1.0], n))
        ),
        "all meet": lambda: (0.25 * side, 0.25 * side),
    }[limits]()
    weights = None
    if draw(st.booleans()):
        weights = torch.from_numpy(10.0 ** rng.uniform(-3, 3, n))
        if draw(st.booleans()):
            weights[torch.from_numpy(rng.random(n) < 0.1)] = 0.0
    targets = torch.from_numpy(rng.integers(0, 2, n).astype(float))

    constraints = []
    for _ in range(draw(st.integers(1, 3))):
        notion = draw(st.sampled_from(NOTIONS))
        tolerance = draw(st.sampled_from([0.0, 0.0, 1e-9, 1e-4, 0.01, 0.1, np.inf])) * side
        on = draw(st.sampled_from([None, *names, tuple(names)]))
        if isinstance(on, tuple) and np.prod([int(g.max()) + 1 for g in groups.values()]) > 30:
            on = names[0]
        compare = draw(st.sampled_from(["pairwise", "pairwise", "overall"]))
        constraints.append(notion(tolerance, on, compare))
    if any(isinstance(c, MeanResidual) for c in constraints):
        targets_real = targets * side
        if all(isinstance(c, (DemographicParity, MeanResidual)) for c in constraints):
            targets = targets_real
    return Case(constraints, torch.from_numpy(scores), groups, targets, bounds, weights)


def tensors(lower: np.ndarray, upper: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(lower), torch.from_numpy(np.maximum(lower, upper))


# ---------------------------------------------------------------------------------------------
# Independent solvers
# ---------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """One problem of a batch as NumPy arrays, rows scaled to unit length, variables to one."""

    P: np.ndarray
    q: np.ndarray
    A: np.ndarray
    l: np.ndarray
    u: np.ndarray
    lb: np.ndarray
    ub: np.ndarray
    unit: float


def plain(problem: QP, index: int = 0) -> Plain:
    """The problem in x / unit, objective divided by unit^2 and by the mean of P."""
    P, q, lb, ub = (
        t[index].detach().double().numpy() for t in (problem.P, problem.q, problem.lb, problem.ub)
    )
    A = problem.rows.to_dense().matrix[index].detach().double().numpy()
    l, u = (t[index].detach().double().numpy() for t in (problem.l, problem.u))
    sides = np.concatenate([b[np.isfinite(b)] for b in (lb, ub)])
    unit = float(np.abs(sides).max()) if len(sides) and np.abs(sides).max() > 0 else 0.0
    unit = unit or float(np.abs(q / P).max()) or 1.0
    length = np.linalg.norm(A, axis=1)
    length[length == 0] = 1.0
    mean = P.mean()
    return Plain(
        P / mean, q / unit / mean, A / length[:, None], l / length / unit, u / length / unit,
        lb / unit, ub / unit, unit,
    )  # fmt: skip


def clarabel_solution(p: Plain) -> np.ndarray | None:
    """Clarabel's answer, or None where it does not claim one."""
    n = len(p.q)
    equal = p.l == p.u
    eye = np.eye(n)
    blocks = [p.A[equal]]
    right = [p.u[equal]]
    for matrix, side in (
        (p.A[~equal], p.u[~equal]),
        (-p.A[~equal], -p.l[~equal]),
        (eye, p.ub),
        (-eye, -p.lb),
    ):
        there = np.isfinite(side)
        blocks.append(matrix[there])
        right.append(side[there])
    A, b = np.vstack(blocks), np.concatenate(right)
    cones = [clarabel.ZeroConeT(int(equal.sum())), clarabel.NonnegativeConeT(len(b) - equal.sum())]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    answer = clarabel.DefaultSolver(
        sparse.diags(p.P).tocsc(), p.q, sparse.csc_matrix(A), b, cones, settings
    ).solve()
    return np.array(answer.x) if answer.status == clarabel.SolverStatus.Solved else None


def least_violation(p: Plain) -> float:
    """Smallest common violation of the (unit) rows under the bounds, by HiGHS.

    In units of the largest finite side: contradictions are of that size, and HiGHS takes what
    is below 1e-7 for nothing.
    """
    n = len(p.q)
    sides = np.abs(np.concatenate([p.l, p.u]))
    sides = sides[np.isfinite(sides) & (sides > 0)]
    unit = sides.max() if len(sides) else 1.0
    p = replace(p, l=p.l / unit, u=p.u / unit, lb=p.lb / unit, ub=p.ub / unit)
    upper, lower = np.isfinite(p.u), np.isfinite(p.l)
    A = np.vstack([p.A[upper], -p.A[lower]])
    answer = linprog(
        np.r_[np.zeros(n), 1.0],
        np.hstack([A, -np.ones((len(A), 1))]),
        np.r_[p.u[upper], -p.l[lower]],
        bounds=[*zip(p.lb, p.ub, strict=True), (0, None)],
        method="highs",
    )
    assert answer.status == 0, answer.message
    return float(answer.fun)


# ---------------------------------------------------------------------------------------------
# All notions
# ---------------------------------------------------------------------------------------------

CATALOGUE = (
    *NOTIONS, ConditionalParity, ErrorParity, ImpactRatio, MinimumRate, Covariance,
    GroupCalibration, Budget,
)  # fmt: skip


@st.composite
def catalogue_cases(draw: st.DrawFn, largest: int = 120) -> Case:
    """Problems of all notions with hard and soft labels; some point within the bounds holds all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(2, draw(st.sampled_from([3, 8, 20, 60, largest]))))
    soft_groups, soft_targets = draw(st.booleans()), draw(st.booleans())
    sex = torch.from_numpy(rng.integers(0, 2, n))
    race = torch.from_numpy(rng.integers(0, draw(st.integers(1, 5)), n))
    groups = {"sex": sex, "race": race}
    if soft_groups:
        chances = rng.dirichlet(np.full(3, draw(st.sampled_from([0.05, 1.0, 20.0]))), n)
        groups["race"] = torch.from_numpy(chances / chances.sum(1, keepdims=True))
    targets = torch.from_numpy(
        rng.random(n) if soft_targets else rng.integers(0, 2, n).astype(float)
    )
    scores = torch.from_numpy(
        {
            "uniform": rng.random(n),
            "ties": rng.integers(0, 3, n) / 2,
            "normal": 3 * rng.normal(size=n),
        }[draw(st.sampled_from(["uniform", "ties", "normal"]))]
    )
    weights = None
    if draw(st.booleans()):
        weights = torch.from_numpy(10.0 ** rng.uniform(-2, 2, n))
        if draw(st.booleans()):
            weights[torch.from_numpy(rng.random(n) < 0.1)] = 0.0
    bounds = draw(st.sampled_from([(0.0, 1.0), (0.0, None), (None, None), "samples"]))
    lower = np.zeros(n)
    if bounds == "samples":
        lower = 0.3 * rng.random(n)
        bounds = tensors(lower, lower + 0.6)
    inner = torch.from_numpy(lower + rng.choice([0.0, 0.3, 0.6], n) * rng.random(n))

    kinds = draw(st.lists(st.sampled_from(CATALOGUE), min_size=1, max_size=4))
    constraints = []
    for kind in kinds:
        if kind is ImpactRatio and not isinstance(bounds[0], torch.Tensor) and bounds[0] is None:
            kind = MinimumRate
        on = draw(st.sampled_from([None, "sex", "race", ("sex", "race")]))
        if kind is Covariance:
            groups["age"] = torch.from_numpy(20 + 50 * rng.random(n))
            on = "age"
        given = draw(st.sampled_from(["sex", "race"]))

        def rows_at(made: Constraint) -> tuple[torch.Tensor, ...]:
            used = {k: v for k, v in groups.items() if k != "age" or isinstance(made, Covariance)}
            problem = formulate(made, scores, used, targets, bounds=bounds, weights=weights)
            return problem.rows.apply(inner[None])[0], problem.l[0], problem.u[0]

        slack = draw(st.sampled_from([1e-9, 1e-3, 0.03, 0.3]))
        constraints.append(within(draw, kind, on, given, slack, rows_at))
    return Case(constraints, scores, groups, targets, bounds, weights)


def within(
    draw: st.DrawFn, kind: Any, on: Any, given: str, slack: float, rows_at: Any
) -> Constraint:
    """A notion whose parameter leaves a certain point feasible, with some slack."""
    means = rows_at(MinimumRate(0.0, on if kind is not Covariance else None))[0]
    if kind is MinimumRate:
        return MinimumRate(float(means.min()) - slack, on)
    if kind is ImpactRatio:
        ratio = float(means.min() / means.max()) if means.max() > 0 else 0.0
        return ImpactRatio(max(0.0, min(1.0, ratio - slack)), on)
    if kind is Budget:
        total = float(rows_at(Budget(total=0.0))[0])
        limits = (total, (None, total + slack), (total - slack, total + slack))
        return Budget(total=draw(st.sampled_from(limits)))
    compare = draw(st.sampled_from(["pairwise", "overall"]))
    make = {
        ConditionalParity: lambda t: ConditionalParity(t, on, compare, given=given),
        Covariance: lambda t: Covariance(t, "age", given if given == "sex" else None),
        GroupCalibration: lambda t: GroupCalibration(t, 3, on),
    }.get(kind, lambda t: kind(t, on, compare))
    value, lower, upper = rows_at(make(0.0))
    gap = float((value - (lower + upper) / 2).abs().max()) if len(value) else 0.0
    return make(gap * (1 + 1e-9) + slack)
