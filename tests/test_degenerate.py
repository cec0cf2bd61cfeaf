"""Where more than one answer could be given, every backend gives the one that is documented.

One table: a problem with data that are exact in binary, its solution and the gradients of g.x, all
written out by hand. What is documented (docs/mathematics.md, "Which constraints are active",
docs/linear-programs.md): a zero multiplier counts as inactive; dependent rows share the shortest
multiplier; where rows and bounds hold the same variables, the row with the shortest y holds what
the bounds cannot; an LP has its least-norm solution, once it is smoothed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from agreeing import LINEAR, QUADRATIC, differentiated, skip_without
from torch import Tensor

from fairopt import LP, QP, DemographicParity, formulate, solve
from fairopt.agreement.parameters import names

INF = float("inf")


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def projection(s: list[float], A: list[list[float]], l: list[float], u: list[float],
               lb: float | list[float] = -INF, ub: float | list[float] = INF) -> QP:  # fmt: skip
    """min |x - s|^2 / 2 with l <= A x <= u, lb <= x <= ub."""
    n = len(s)
    rows = tensor(*A) if A else torch.zeros(0, n, dtype=torch.float64)
    sides = (torch.tensor(side, dtype=torch.float64) for side in (l, u, lb, ub))
    return QP(torch.ones(1, n, dtype=torch.float64), -tensor(s), rows, *sides)


@dataclass(frozen=True)
class Case:
    """Gradients that are left out are zero; that of q is minus that of the scores."""

    problem: Callable[[], QP]
    x: list[float]
    g: list[float]
    gradients: dict[str, list[Any]] = field(default_factory=dict)


CASES = {
    "a row that touches and does not push": Case(
        lambda: projection([1, 2], [[1, 1]], [-INF], [3]), [1, 2], [3, 5],
        {"P": [-3, -10], "q": [-3, -5]},
    ),
    "a bound that touches and does not push": Case(
        lambda: projection([1, 2], [], [], [], 0.0, [4, 2]), [1, 2], [3, 5],
        {"P": [-3, -10], "q": [-3, -5]},
    ),
    "an equality that holds anyway": Case(  # both sides of a row that nothing pushes get half
        lambda: projection([1, 2], [[1, 1]], [3], [3]), [1, 2], [3, 5],
        {"P": [1, -2], "q": [1, -1], "rows": [[-4, -8]], "l": [2], "u": [2]},
    ),
    "bounds that meet where x is anyway": Case(  # the upper one counts
        lambda: projection([1, 2], [], [], [], [0, 2], [4, 2]), [1, 2], [3, 5],
        {"P": [-3, 0], "q": [-3, 0], "ub": [0, 5]},
    ),
    "a corner of a weak bound and a row that pushes": Case(
        # y = 1 holds x_1 + x_2 = 2; x_2 = 1 touches its bound and is free.
        lambda: projection([2, 2], [[1, 1]], [-INF], [2], -INF, [INF, 1]), [1, 1], [1, 3],
        {"P": [1, -1], "q": [1, -1], "rows": [[-1, -3]], "u": [2]},
    ),
    "the same row twice": Case(  # y = 1/2 and nu = -1 each
        lambda: projection([1, 1], [[1, 1], [1, 1]], [-INF] * 2, [0, 0]), [0, 0], [1, 3],
        {"q": [1, -1], "rows": [[0.5, -0.5]] * 2, "u": [1, 1]},
    ),
    "a row and its double": Case(  # on rows of unit length the same y and nu
        lambda: projection([1, 1], [[1, 1], [2, 2]], [-INF] * 2, [0, 0]), [0, 0], [1, 3],
        {"q": [1, -1], "rows": [[0.5, -0.5], [0.25, -0.25]], "u": [1, 0.5]},
    ),
    "a row that is its own opposite": Case(  # only the one that pushes counts
        lambda: projection([1, 1], [[1, 1], [-1, -1]], [-INF] * 2, [0, 0]), [0, 0], [1, 3],
        {"q": [1, -1], "rows": [[1, -1], [0, 0]], "u": [2, 0]},
    ),
    "three rows through a point of the plane": Case(
        # A^T y = (1, 1), on rows of unit length: y = 1/2 each. x cannot move; nu likewise.
        lambda: projection([1, 1], [[1, 0], [0, 1], [1, 1]], [-INF] * 3, [0, 0, 0]), [0, 0], [1, 3],
        {"u": [0, 2, 1]},
    ),
    "a row and the bound that says the same": Case(  # the bound holds it: y = 0
        lambda: projection([2, 0.5], [[1, 0]], [-INF], [1], -INF, [1, 1]), [1, 0.5], [3, 5],
        {"P": [0, -2.5], "q": [0, -5], "ub": [3, 0]},
    ),
    "an equality and the bound that says the same": Case(
        lambda: projection([2, 0.5], [[1, 0]], [1], [1], -INF, [1, 1]), [1, 0.5], [3, 5],
        {"P": [0, -2.5], "q": [0, -5], "ub": [3, 0]},
    ),
    "two groups at one bound, one held up by the row": Case(
        # Any y from 1/2 to 2; at 1/2 bound 1 holds x_1 and the row x_2.
        lambda: projection([3, 0.5], [[1, -1]], [-INF], [0], 0.0, 1.0), [1, 1], [1, 10],
        {"rows": [[10, 10]], "u": [-10], "ub": [11, 0]},
    ),
    "all of it at the bounds": Case(
        lambda: projection([3, 2], [[1, -1]], [0], [0], 0.0, 1.0), [1, 1], [1, 10],
        {"ub": [1, 10]},
    ),
    "a single point is feasible": Case(
        lambda: projection([3, -1], [[1, 1]], [1], [INF], 0.0, 0.5), [0.5, 0.5], [1, 2],
        # Bound 1 holds x_1 with 2.5 - |y|, the row x_2 with |y| = 3/2: x_2 = l - x_1.
        {"rows": [[-1, -1]], "l": [2], "ub": [-1, 0]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", QUADRATIC)
@pytest.mark.parametrize("name", CASES)
def test_the_documented_answer(name: str, backend: str) -> None:
    skip_without(backend)
    case = CASES[name]
    problem = case.problem()
    assert set(case.gradients) <= set(names(problem))
    x, _, grads = differentiated(problem, backend, tensor(case.g))
    torch.testing.assert_close(x, tensor(case.x), rtol=0, atol=1e-9)
    for parameter, grad in zip(names(problem), grads, strict=True):
        want = tensor(case.gradients[parameter]) if parameter in case.gradients else 0 * grad
        worst = float((grad - want).abs().max()) if grad.numel() else 0.0
        assert worst <= 1e-8, f"{parameter}: expected {want.tolist()}, got {grad.tolist()}"


@pytest.mark.parametrize("backend", QUADRATIC)
def test_91_dependent_pairs(backend: str) -> None:
    """14 groups of one sample, scores 0 to 13, tolerance 0: x is the mean.

    Rows e_a - e_b of equal length: the shortest multiplier is y_ab = (s_a - s_b) / 14, for the sum
    over b gives s_a - mean. Likewise nu_ab = -(g_a - g_b) / 14.
    """
    skip_without(backend)
    scores = torch.arange(14, dtype=torch.float64).requires_grad_()
    tolerance = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = torch.ones(14, dtype=torch.float64, requires_grad=True)
    problem = formulate(
        DemographicParity(tolerance), scores, torch.arange(14), bounds=None, weights=weights
    )
    assert problem.shape == (1, 91, 14)
    x = solve(problem, backend=backend).x
    g = torch.linspace(-1, 2, 14, dtype=torch.float64).square()
    by_scores, by_tolerance, by_weights = torch.autograd.grad(
        x, [scores, tolerance, weights], g.unsqueeze(0)
    )
    torch.testing.assert_close(x.detach(), torch.full_like(x, 6.5), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_scores, g.mean().expand(14), rtol=0, atol=1e-12)
    # x = sum w s / sum w: a move of w_i by 1 moves it by (s_i - x) / 14.
    expected = g.sum() * (scores.detach() - 6.5) / 14
    torch.testing.assert_close(by_weights, expected, rtol=0, atol=1e-9)
    above = torch.triu(torch.ones(14, 14, dtype=torch.float64), 1)
    expected = ((g.unsqueeze(1) - g.unsqueeze(0)) / 14 * -above).sum()  # a < b: x_a <= x_b
    torch.testing.assert_close(by_tolerance, expected, rtol=0, atol=1e-9)


# min x_1 + x_2 over x_1 + x_2 >= 1, x_1 <= 3/4, x >= 0: a segment of solutions.
SEGMENT = LP(tensor(1, 1), tensor([1, 1]), tensor(1), tensor(INF), 0.0, tensor(0.75, 1))


@pytest.mark.parametrize("backend", LINEAR)
def test_a_linear_program_with_many_solutions_gets_one_of_them(backend: str) -> None:
    """Which one is the solver's affair; the same each time."""
    skip_without(backend)
    x = solve(SEGMENT, backend=backend).x
    assert abs(float(x.sum()) - 1) <= 1e-12
    assert bool(((x >= 0) & (x <= tensor(0.75, 1))).all())
    assert torch.equal(x, solve(SEGMENT, backend=backend).x)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("backend", QUADRATIC)
def test_the_smoothed_one_is_the_shortest_of_the_solutions(backend: str, smoothing: float) -> None:
    """(1/2, 1/2); the cost moves it along the segment by 1 / smoothing, and l moves both."""
    skip_without(backend)
    c = SEGMENT.c.clone().requires_grad_()
    l = SEGMENT.l.clone().requires_grad_()
    problem = LP(c, SEGMENT.rows, l, SEGMENT.u, SEGMENT.lb, SEGMENT.ub)
    x = solve(problem, backend=backend, smoothing=smoothing).x
    torch.testing.assert_close(x.detach(), tensor([0.5, 0.5]), rtol=0, atol=1e-9)
    by_c, by_l = torch.autograd.grad(x, [c, l], tensor([1, 3]))
    torch.testing.assert_close(by_c * smoothing, tensor([1, -1]), rtol=0, atol=1e-9)
    torch.testing.assert_close(by_l, tensor([2]), rtol=0, atol=1e-9)
