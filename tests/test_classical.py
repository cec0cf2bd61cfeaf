"""Problems that nobody here wrote, with the optima that were published.

QPs from W. Hock and K. Schittkowski, Test Examples for Nonlinear Programming Codes, Lecture Notes
in Economics and Mathematical Systems 187, Springer 1981 (numbers 21, 35, 76 and 118), and from
K. Schittkowski, More Test Examples for Nonlinear Programming Codes, Springer 1987 (number 268).
LPs: V. Klee and G. Minty, How good is the simplex algorithm?, 1972, in the form of Chvatal, Linear
Programming, 1983, chapter 4; and the Wyndor Glass Co. of Hillier and Lieberman, Introduction to
Operations Research, chapter 3, with optimum 36.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fairopt import LP, QP, ConvergenceError, backends, solve

inf = math.inf


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hs21() -> tuple[QP, float, float]:
    P = torch.diag(t(0.02, 2.0)).unsqueeze(0)
    return (
        QP(P, t(0.0, 0.0), t([10.0, -1.0]), t(10.0), t(inf), t(2.0, -50.0), t(50.0, 50.0)),
        -100,
        -99.96,
    )


def hs35() -> tuple[QP, float, float]:
    P = t([4.0, 2.0, 2.0], [2.0, 4.0, 0.0], [2.0, 0.0, 2.0]).unsqueeze(0)
    return QP(P, t(-8.0, -6.0, -4.0), t([1.0, 1.0, 2.0]), t(-inf), t(3.0), 0.0), 9, 1 / 9


def hs76() -> tuple[QP, float, float]:
    P = t([2.0, 0, -1, 0], [0, 1.0, 0, 0], [-1, 0, 2.0, 1], [0, 0, 1, 1.0]).unsqueeze(0)
    A = t([1.0, 2, 1, 1], [3.0, 1, 2, -1], [0.0, 1, 4, 0])
    l, u = t(-inf, -inf, 1.5), t(5.0, 4.0, inf)
    return QP(P, t(-1.0, -3, 1, -1), A, l, u, 0.0), 0, -4.681818181818


def hs118() -> tuple[QP, float, float]:
    linear = t(*[2.3, 1.7, 2.2] * 5)
    P = 2 * t(*[0.0001, 0.0001, 0.00015] * 5)
    rows, l, u = [], [], []
    for k, high in ((0, 6.0), (1, 7.0), (2, 6.0)):  # x[3j+k] - x[3j+k-3] within -7..high
        for j in range(1, 5):
            row = torch.zeros(15, dtype=torch.float64)
            row[3 * j + k], row[3 * j + k - 3] = 1.0, -1.0
            rows.append(row)
            l.append(-7.0)
            u.append(high)
    for j, least in enumerate((60.0, 50.0, 70.0, 85.0, 100.0)):
        row = torch.zeros(15, dtype=torch.float64)
        row[3 * j : 3 * j + 3] = 1.0
        rows.append(row)
        l.append(least)
        u.append(inf)
    lower = torch.zeros(15, dtype=torch.float64)
    lower[:3] = t(8.0, 43.0, 3.0)
    upper = t(*[90.0, 120.0, 60.0] * 5)
    upper[:3] = t(21.0, 57.0, 16.0)
    return QP(P, linear, torch.stack(rows), t(*l), t(*u), lower, upper), 0, 664.8204500


def hs268() -> tuple[QP, float, float]:
    D = t(
        [-74, 80, 18, -11, -4], [14, -69, 21, 28, 0], [66, -72, -5, 7, 1], [-12, 66, -30, -23, 3],
        [3, 8, -7, -4, 1], [4, -12, 4, 4, 0],
    )  # fmt: skip
    d = t(51.0, -61, -56, 69, 10, -12)
    A = t(
        [-1.0, -1, -1, -1, -1], [10.0, 10, -3, 5, 4], [-8.0, 1, -2, -5, 3], [8.0, -1, 2, 5, -3],
        [-4.0, -2, 3, -5, 1],
    )  # fmt: skip
    l = t(-5.0, 20, -40, 11, -30)
    constant = float(d @ d)
    return QP(2 * (D.T @ D).unsqueeze(0), -2 * D.T @ d, A, l, t(*[inf] * 5)), constant, 0.0


def klee_minty(n: int) -> tuple[LP, float, float]:
    """Maximise sum 10^(n-j) x_j under 2 sum_(i<j) 10^(j-i) x_i + x_j <= 100^(j-1)."""
    c = t(*[-(10.0 ** (n - j)) for j in range(1, n + 1)])
    A = torch.eye(n, dtype=torch.float64)
    for j in range(n):
        for i in range(j):
            A[j, i] = 2 * 10.0 ** (j - i)
    u = t(*[100.0**j for j in range(n)])
    return LP(c, A, t(*[-inf] * n), u, 0.0), 0, -(100.0 ** (n - 1))


def wyndor() -> tuple[LP, float, float]:
    A = t([1.0, 0], [0.0, 2], [3.0, 2])
    return LP(t(-3.0, -5.0), A, t(-inf, -inf, -inf), t(4.0, 12.0, 18.0), 0.0), 0, -36.0


Made = tuple[QP | LP, float, float]
PROBLEMS: dict[str, Callable[[], Made]] = {
    "HS21": hs21,
    "HS35": hs35,
    "HS76": hs76,
    "HS118": hs118,
    "HS268": hs268,
    "Klee-Minty 3": lambda: klee_minty(3),
    "Klee-Minty 4": lambda: klee_minty(4),
    "Wyndor": wyndor,
}


# Sides from 1 to 1e6 and a cost from 1 to 1e3 are beyond this interior point, which says so.
REFUSED = {("Klee-Minty 4", "qpth")}


@pytest.mark.parametrize("name", backends.names())
@pytest.mark.parametrize("title", PROBLEMS)
def test_the_published_optimum(title: str, name: str) -> None:
    """To the digits that were published; HS268 is ill-conditioned (1e5) around an optimum of 0."""
    problem, constant, optimum = PROBLEMS[title]()
    if not backends.is_available(name):
        pytest.skip(f"backend {name!r} is not installed")
    backend = backends.get(name)
    if missing := backend.capabilities.missing(problem):
        pytest.skip(f"{name} does not solve {missing}")
    if (title, name) in REFUSED:
        with pytest.raises(ConvergenceError):
            solve(problem, backend=backend)
        return
    solution = solve(problem, backend=backend)
    x = solution.x
    linear = problem.c if isinstance(problem, LP) else problem.q
    value = float((linear * x).sum()) + constant
    if isinstance(problem, QP):
        value += 0.5 * float((x * problem.apply_quadratic(x)).sum())
    scale = abs(constant) + float((linear * x).abs().sum())
    assert value == pytest.approx(optimum, rel=2e-9, abs=1e-13 * scale + 1e-12)
    assert solution.residuals.worst < 1e-9
