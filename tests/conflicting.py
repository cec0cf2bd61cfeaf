"""Problems whose rows often cannot hold, and what HiGHS says of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from problems import Case, tensors
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
)

# HiGHS takes what is below its tolerance for nothing.
EXACT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


@st.composite
def conflicting_cases(draw: st.DrawFn, largest: int = 40) -> Case:
    """All notions with parameters as they come, within bounds that often do not allow them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(2, draw(st.sampled_from([3, 8, 20, largest]))))
    sex = rng.integers(0, 2, n)
    race = rng.integers(0, draw(st.integers(1, 4)), n)
    groups = {"sex": torch.from_numpy(sex), "race": torch.from_numpy(race)}
    if draw(st.booleans()):
        chances = rng.dirichlet(np.full(3, draw(st.sampled_from([1.0, 20.0]))), n)
        groups["race"] = torch.from_numpy(chances / chances.sum(1, keepdims=True))
    soft = draw(st.booleans())
    targets = torch.from_numpy(rng.random(n) if soft else rng.integers(0, 2, n).astype(float))
    scores = torch.from_numpy(
        {
            "uniform": rng.random(n),
            "ties": rng.integers(0, 3, n) / 2,
            "wide": 3 * rng.normal(size=n),
        }[draw(st.sampled_from(["uniform", "ties", "wide"]))]
    )
    weights = None
    if draw(st.booleans()):
        weights = torch.from_numpy(10.0 ** rng.uniform(-1, 1, n))
        if draw(st.booleans()):
            weights[torch.from_numpy(rng.random(n) < 0.2)] = 0.0
    width = draw(st.sampled_from([0.0, 0.05, 0.4]))
    apart = (0.7 * sex, 0.7 * sex + width)
    anyhow = 0.8 * rng.random(n)
    bounds: Any = {
        "none": None,
        "shared": (0.0, 1.0),
        "apart": tensors(*apart),
        "anyhow": tensors(anyhow, anyhow + width * rng.random(n)),
        "one side": (torch.from_numpy(apart[0]), None),
    }[draw(st.sampled_from(["none", "shared", "apart", "apart", "anyhow", "one side"]))]
    tolerance = st.sampled_from([0.0, 1e-3, 0.03, 0.2])
    constraints: list[Constraint] = []
    for kind in draw(st.lists(st.sampled_from(range(12)), min_size=1, max_size=4)):
        on = draw(st.sampled_from([None, "sex", "race"]))
        compare = draw(st.sampled_from(["pairwise", "overall"]))
        t, level = draw(tolerance), float(rng.random())
        if kind == 11:
            groups["age"] = torch.from_numpy(20 + 50 * rng.random(n))
        constraints.append(notion(kind, t, level, on, compare, bounds is not None))
    return Case(constraints, scores, groups, targets, bounds, weights)


def notion(
    kind: int, t: float, level: float, on: str | None, compare: Any, bounded: bool
) -> Constraint:
    makers = [
        lambda: DemographicParity(t, on, compare),
        lambda: EqualOpportunity(t, on, compare),
        lambda: EqualizedOdds(t, on),
        lambda: MeanResidual(t, on, compare),
        lambda: ConditionalParity(t, "sex", given="race"),
        lambda: ErrorParity(t, on),
        lambda: MinimumRate(level, on),
        lambda: Budget(mean=level),
        lambda: Budget(mean=(level, level + t)),
        lambda: GroupCalibration(t, 2, on),
        lambda: ImpactRatio(level, on) if bounded else MinimumRate(level, on),
        lambda: Covariance(t, "age"),
    ]
    made: Constraint = makers[kind]()
    return made


def arrays(problem: QP, b: int = 0) -> dict[str, np.ndarray]:
    """A, l, u, lb, ub of one problem."""
    data = {name: getattr(problem, name) for name in ("l", "u", "lb", "ub")}
    data["A"] = problem.rows.to_dense().matrix
    return {name: tensor[b].detach().double().numpy() for name, tensor in data.items()}


def linear(c: Any, A: np.ndarray, l: Any, u: Any, lb: Any, ub: Any) -> Any:
    """HiGHS's answer to  min c.x,  l <= A x <= u,  lb <= x <= ub."""
    upper, lower = np.isfinite(u), np.isfinite(l)
    return linprog(
        c,
        np.vstack([A[upper], -A[lower]]),
        np.r_[u[upper], -l[lower]],
        bounds=np.stack([lb, ub], 1),
        method="highs",
        options=EXACT,
    )


def least_total(problem: QP, b: int = 0) -> float:
    """The least total violation of the rows, in their own units."""
    p = arrays(problem, b)
    A, (m, n) = p["A"], p["A"].shape
    answer = linear(
        np.r_[np.zeros(n), np.ones(2 * m)],
        np.hstack([A, -np.eye(m), np.eye(m)]),
        p["l"],
        p["u"],
        np.r_[p["lb"], np.zeros(2 * m)],
        np.r_[p["ub"], np.full(2 * m, np.inf)],
    )
    assert answer.status == 0, answer.message
    return float(answer.fun)


def can_hold(problem: QP, rows: Any, b: int = 0, *, factor: float = 1.0) -> bool:
    """Whether these rows can hold within the bounds, with all tolerances times a factor."""
    p = arrays(problem, b)
    l, u = scaled(p["l"], p["u"], factor)
    rows = list(rows)
    n = p["A"].shape[1]
    return bool(linear(np.zeros(n), p["A"][rows], l[rows], u[rows], p["lb"], p["ub"]).status == 0)


def scaled(l: np.ndarray, u: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    wide = np.isfinite(l) & np.isfinite(u) & (l < u)
    middle, half = (np.where(wide, x, 0.0) for x in ((l + u) / 2, (u - l) / 2))
    return np.where(wide, middle - factor * half, l), np.where(wide, middle + factor * half, u)


def least_factor(problem: QP, b: int = 0) -> float | None:
    """The least common factor of all tolerances; None where none is enough."""
    p = arrays(problem, b)
    A, (m, n) = p["A"], p["A"].shape
    wide = np.isfinite(p["l"]) & np.isfinite(p["u"]) & (p["l"] < p["u"])
    half = np.where(wide, (p["u"] - p["l"]) / 2, 0.0)
    l, u = scaled(p["l"], p["u"], 0.0)
    free = np.full(m, np.inf)
    answer = linear(
        np.r_[np.zeros(n), 1.0],
        np.vstack([np.c_[A, half], np.c_[A, -half]]),
        np.r_[l, -free], np.r_[free, u],
        np.r_[p["lb"], 0.0], np.r_[p["ub"], np.inf],
    )  # fmt: skip
    return float(answer.fun) if answer.status == 0 and wide.any() else None


def least_addition(problem: QP, b: int = 0) -> float:
    """The least number to add to every side of every row."""
    p = arrays(problem, b)
    A, (m, n) = p["A"], p["A"].shape
    free = np.full(m, np.inf)
    answer = linear(
        np.r_[np.zeros(n), 1.0],
        np.vstack([np.c_[A, np.ones(m)], np.c_[A, -np.ones(m)]]),
        np.r_[p["l"], -free], np.r_[free, p["u"]],
        np.r_[p["lb"], 0.0], np.r_[p["ub"], np.inf],
    )  # fmt: skip
    assert answer.status == 0, answer.message
    return float(answer.fun)
