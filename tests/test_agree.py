"""Every capable backend gives the same solutions and the same gradients.

Issue "backends", what it must show, 1. Problems have a margin to the next active set, so that there
is one right answer; for random QPs it is chosen before the problem is. What happens without a
margin is in ``test_degenerate.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import clarabel
import numpy as np
import pytest
import torch
from agreeing import (
    GRADIENTS,
    QUADRATIC,
    SOLUTIONS,
    backends_agree,
    capable,
    differentiated,
    inputs_agree,
    relative,
    skip_without,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from fairopt import (
    QP,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    MeanResidual,
    PredictiveEquality,
    formulate,
    solve,
)
from fairopt.agreement.parameters import names
from fairopt.errors import InfeasibleError
from fairopt.programs.rows.sparse import SparseRows

INF = float("inf")
NOTIONS = (DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual)


@pytest.mark.parametrize("name", QUADRATIC)
def test_takes_part(name: str) -> None:
    """The tests below compare what is installed; what is not is skipped here, by name."""
    skip_without(name)
    rng = np.random.default_rng(0)
    assert name in capable(program(rng, Shape(1, 3, 2, "diagonal", "dense", 0.0)).problem)


# ---------------------------------------------------------------------------------------------
# Random QPs, from their solutions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What kind of QP: forms of P and of the rows, and the decades that P's eigenvalues span."""

    batch: int
    n: int
    m: int
    quadratic: str
    rows: str
    decades: float


@dataclass(frozen=True)
class Program:
    """A batch of QPs with their solutions, ``(B, n)``."""

    problem: QP
    x: Tensor


ACTIVE = ("upper", "lower", "upper only", "lower only", "equal")
INACTIVE = ("inside", "below", "above", "free")


def program(rng: np.random.Generator, shape: Shape) -> Program:
    """A batch of one shape. Patterns are shared by the batch, values and active sets are not."""
    n, m = shape.n, shape.m
    links = np.triu(rng.random((n, n)) < 3 / n, 1)
    mask = rng.random((m, n)) < max(0.3, 2 / n) if shape.rows == "sparse" else np.ones((m, n), bool)
    mask[np.arange(m), rng.integers(0, n, m)] = True
    parts = [single(rng, shape, links, mask) for _ in range(shape.batch)]
    stacked = (np.stack(part) for part in zip(*parts, strict=True))
    x, P, q, A, l, u, lb, ub = map(torch.from_numpy, stacked)
    quadratic: Any = P
    if shape.quadratic == "diagonal":
        quadratic = P.diagonal(dim1=-2, dim2=-1).contiguous()
    elif shape.quadratic == "sparse":
        row, column = (torch.from_numpy(links | links.T | np.eye(n, dtype=bool))).nonzero().T
        quadratic = SparseRows(row, column, P[:, row, column], n, n)
    rows: Any = A
    if shape.rows == "sparse":
        row, column = torch.from_numpy(mask).nonzero().T
        rows = SparseRows(row, column, A[:, row, column], m, n)
    return Program(QP(quadratic, q, rows, l, u, lb, ub), x)


def single(
    rng: np.random.Generator, shape: Shape, links: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, ...]:
    """One problem: solution, active set and multipliers first, then q such that they are."""
    n, m = shape.n, shape.m
    x = rng.uniform(-1, 1, n)
    values = 10.0 ** (shape.decades * (rng.permutation(np.linspace(0, 1, n)) - 0.5))
    if shape.quadratic == "dense":
        Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
        P = (Q * values) @ Q.T
        P = (P + P.T) / 2
    else:
        P = np.diag(values)
        if shape.quadratic == "sparse":  # rows of P, scaled to a unit diagonal, sum to at most 1.9
            beside = np.where(links, rng.uniform(-1, 1, (n, n)), 0.0)
            beside = beside + beside.T
            beside *= 0.9 / max(1.0, np.abs(beside).sum(1).max())
            P += beside * np.sqrt(np.outer(values, values))

    held = np.where(rng.random(n) < rng.choice([0.0, 0.3, 0.7]), rng.choice([-1, 1], n), 0)
    lb, ub, w = np.full(n, -INF), np.full(n, INF), np.zeros(n)
    for i in range(n):
        below, above = rng.uniform(0.1, 1, 2)
        kinds = ["one", "both", "fixed"] if held[i] else ["none", "lower", "upper", "both"]
        kind = rng.choice(kinds)
        if held[i] < 0 or kind == "fixed":
            lb[i] = x[i]
        elif kind in ("lower", "both"):
            lb[i] = x[i] - below
        if held[i] > 0 or kind == "fixed":
            ub[i] = x[i]
        elif kind in ("upper", "both"):
            ub[i] = x[i] + above
        w[i] = held[i] * rng.uniform(0.1, 1)

    A = np.where(mask, rng.normal(size=(m, n)), 0.0)
    length = np.linalg.norm(A, axis=1)
    free = held == 0
    active: list[int] = []
    for r in range(int(rng.integers(0, m + 1))):  # as long as their gradients are well independent
        trial = A[[*active, r]][:, free]
        size = np.linalg.norm(trial, axis=1)
        if (
            (size > 0.3 * length[[*active, r]]).all()
            and len(trial) <= free.sum()
            and np.linalg.svd(trial / size[:, None], compute_uv=False)[-1] > 0.1
        ):
            active.append(r)
    y, l, u = np.zeros(m), A @ x, A @ x
    for r in range(m):
        kind = rng.choice(ACTIVE if r in active else INACTIVE)
        below, above = rng.uniform(0.1, 1, 2) * length[r]
        if r in active:
            side = {"u": 1, "l": -1}.get(kind[0], rng.choice([-1, 1]))
            y[r] = side * rng.uniform(0.1, 1) / length[r]
        l[r] -= {"upper": below, "upper only": INF, "inside": below, "above": below}.get(
            kind, INF if kind in ("below", "free") else 0.0
        )
        u[r] += {"lower": above, "lower only": INF, "inside": above, "below": above}.get(
            kind, INF if kind in ("above", "free") else 0.0
        )
    q = -(P @ x + A.T @ y + w)
    return x, P, q, A, l, u, lb, ub


shapes = st.builds(
    Shape,
    batch=st.integers(1, 3),
    n=st.integers(1, 40),
    m=st.integers(0, 40),
    quadratic=st.sampled_from(["dense", "dense", "diagonal", "sparse"]),
    rows=st.sampled_from(["dense", "sparse"]),
    decades=st.sampled_from([0.0, 2.0, 6.0]),
)
seeds = st.integers(0, 2**32 - 1)


def cotangent(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.normal(size=like.shape))


@given(seeds, shapes)
def test_random_qps(seed: int, shape: Shape) -> None:
    rng = np.random.default_rng(seed)
    found = program(rng, shape)
    g = cotangent(rng, found.x)
    x, _ = backends_agree(found.problem, g, capable(found.problem))
    assert relative(x, found.x) <= SOLUTIONS


@settings(max_examples=30)
@given(seeds, shapes)
def test_data_shared_over_the_batch(seed: int, shape: Shape) -> None:
    """Every datum but q is one for all: its gradient is the sum, for each backend alike."""
    rng = np.random.default_rng(seed)
    one = program(rng, replace(shape, batch=1)).problem
    # The same problem but for a q that changes no active set.
    _P, q, *_rest = one.tensors
    small = 1e-3 * torch.from_numpy(rng.normal(size=(4, shape.n))) * one.diagonal().amin()
    several = QP(one.P, torch.cat([q, q + small]), one.rows, one.l, one.u, one.lb, one.ub)
    shared = [i for i in range(len(several.tensors)) if i != 1]
    g = cotangent(rng, several.q)
    backends = capable(several)
    _, together = backends_agree(several, g, backends, shared)
    _, _, apart = differentiated(several, backends[0], g)
    for i, (name, whole, each) in enumerate(zip(names(several), together, apart, strict=True)):
        if i in shared:
            assert relative(whole, each.sum(0, keepdim=True), 1e-9) <= 1e-9, name


def by_clarabel(problem: QP) -> Tensor:
    """The solutions of a batch, by an interior-point method that knows nothing of ours."""
    P = problem.P.to_dense().matrix if isinstance(problem.P, SparseRows) else problem.P
    P = torch.diag_embed(P) if P.dim() == 2 else P
    A = problem.rows.to_dense().matrix
    n = problem.shape[2]
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-13
    found = []
    for b in range(len(problem.q)):
        rows = np.vstack([A[b].numpy(), np.eye(n)])
        low = torch.cat([problem.l[b], problem.lb[b]]).numpy()
        high = torch.cat([problem.u[b], problem.ub[b]]).numpy()
        equal, upper, lower = low == high, np.isfinite(high), np.isfinite(low)
        upper, lower = upper & ~equal, lower & ~equal
        cones: list[Any] = [clarabel.ZeroConeT(int(equal.sum()))] if equal.any() else []
        if (count := int(upper.sum() + lower.sum())) > 0:
            cones.append(clarabel.NonnegativeConeT(count))
        answer = clarabel.DefaultSolver(
            sparse.csc_matrix(np.triu(P[b].numpy())), problem.q[b].numpy(),
            sparse.csc_matrix(np.vstack([rows[equal], rows[upper], -rows[lower]])),
            np.concatenate([high[equal], high[upper], -low[lower]]), cones, options,
        ).solve()  # fmt: skip
        found.append(torch.tensor(answer.x, dtype=torch.float64))
    return torch.stack(found)


@settings(max_examples=40)
@given(
    seeds,
    st.builds(
        Shape,
        batch=st.integers(1, 2),
        n=st.integers(1, 8),
        m=st.integers(0, 8),
        quadratic=st.sampled_from(["dense", "diagonal", "sparse"]),
        rows=st.sampled_from(["dense", "sparse"]),
        decades=st.just(1.0),
    ),
)
def test_gradients_are_the_finite_differences_of_another_solver(seed: int, shape: Shape) -> None:
    """Clarabel is asked for x around the solution; nothing of fairopt decides what is active."""
    rng = np.random.default_rng(seed)
    problem = program(rng, shape).problem
    g = cotangent(rng, problem.q)
    _, grads = backends_agree(problem, g, capable(problem))
    named = zip(names(problem), problem.tensors, grads, strict=True)
    for i, (name, tensor, grad) in enumerate(named):
        if not tensor.numel():
            continue
        move = torch.from_numpy(rng.uniform(-1, 1, tensor.shape))
        other, also = None, torch.zeros(())
        if name == "P":
            move = symmetric_move(problem, move)
        elif name in ("l", "u", "lb", "ub"):
            move = torch.where(tensor.isinf(), 0.0, move)
            other = i + (1 if name in ("l", "lb") else -1)
            also = torch.where(problem.tensors[other] == tensor, move, 0.0)  # sides that meet

        changes = {i: move} if other is None else {i: move, other: also}
        h = 1e-4  # far inside the margin; x is linear in P and A only up to h^2: extrapolated
        slopes = [
            (value(problem, g, changes, s) - value(problem, g, changes, -s)) / (2 * s)
            for s in (h, 2 * h)
        ]
        expected = (4 * slopes[0] - slopes[1]) / 3
        slope = float((grad * move).sum()) + (
            0.0 if other is None else float((grads[other] * also).sum())
        )
        size = float((grad * move).abs().sum()) + float(g.norm())
        assert abs(slope - expected) <= GRADIENTS * size, (name, slope, expected)


def value(problem: QP, g: Tensor, changes: dict[int, Tensor], step: float) -> float:
    """g.x where the tensors of these numbers are moved by a step."""
    moved = [
        tensor + step * changes[i] if i in changes else tensor
        for i, tensor in enumerate(problem.tensors)
    ]
    return float((g * by_clarabel(problem.with_tensors(*moved))).sum())


def symmetric_move(problem: QP, move: Tensor) -> Tensor:
    if isinstance(problem.P, SparseRows):
        n = problem.shape[2]
        square = torch.zeros(len(move), n, n, dtype=torch.float64)
        square[:, problem.P.row, problem.P.column] = move
        return (square + square.mT)[:, problem.P.row, problem.P.column] / 20
    return move / 10 if move.dim() == 2 else (move + move.mT) / 20


# ---------------------------------------------------------------------------------------------
# Parity problems, through formulate
# ---------------------------------------------------------------------------------------------


@dataclass
class Parity:
    """What ``formulate`` is given; every tensor of ``inputs`` is differentiated."""

    constraints: list[tuple[type, str, float]]
    groups: dict[str, Tensor]
    inputs: dict[str, Tensor]
    bounds: str

    def problem(self) -> QP:
        given = self.inputs
        constraints = []
        for i, (notion, compare, _) in enumerate(self.constraints):
            reference = 0 if compare == "reference" else None
            constraints.append(
                notion(given[f"tolerance {i}"], compare=compare, reference=reference)
            )
        bounds = {
            "none": None,
            "lower": (given.get("lower"), None),
            "both": (given.get("lower"), given.get("upper")),
        }[self.bounds]
        return formulate(
            constraints, given["scores"], self.groups, given.get("targets"), bounds=bounds,
            weights=given.get("weights"),
        )  # fmt: skip

    def moved(self, name: str, by: Tensor) -> Parity:
        moved = {k: (v + by if k == name else v).detach() for k, v in self.inputs.items()}
        return replace(self, inputs=moved)


@st.composite
def parities(draw: st.DrawFn, largest: int = 40) -> Parity:
    rng = np.random.default_rng(draw(seeds))
    batch, n = draw(st.integers(1, 8)), draw(st.integers(2, largest))
    groups = {}
    for name in ("sex", "race")[: draw(st.integers(1, 2))]:
        size = (n,) if draw(st.booleans()) else (batch, n)
        groups[name] = torch.from_numpy(rng.integers(0, draw(st.integers(2, 5)), size))
    constraints = [
        (
            draw(st.sampled_from(NOTIONS)),
            draw(st.sampled_from(["pairwise", "pairwise", "overall"])),
            draw(st.sampled_from([0.0, 0.02, 0.1, 0.3])) * (1 + rng.random()),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    shift = 0.3 * groups["sex"].double()
    inputs = {"scores": torch.from_numpy(rng.normal(0.4, 0.4, (batch, n))) + shift}
    for i, (_, _, tolerance) in enumerate(constraints):
        inputs[f"tolerance {i}"] = torch.tensor(tolerance, dtype=torch.float64)
    bounds = draw(st.sampled_from(["none", "lower", "both"]))
    each = draw(st.sampled_from([(), (n,), (batch, n)]))
    if bounds != "none":
        inputs["lower"] = torch.from_numpy(np.asarray(0.1 * rng.random(each)))
    if bounds == "both":
        inputs["upper"] = torch.from_numpy(np.asarray(1 - 0.1 * rng.random(each)))
    if draw(st.booleans()):
        size = (n,) if draw(st.booleans()) else (batch, n)
        inputs["weights"] = torch.from_numpy(rng.uniform(0.2, 5, size))
    binary = (EqualOpportunity, PredictiveEquality, EqualizedOdds)
    outcome = any(issubclass(notion, binary) for notion, _, _ in constraints)
    if outcome or any(notion is MeanResidual for notion, _, _ in constraints):
        targets = rng.integers(0, 2, (batch, n)) if outcome else rng.random((batch, n))
        inputs["targets"] = torch.from_numpy(targets.astype(float))
    return Parity(constraints, groups, inputs, bounds)


def leaves(parity: Parity) -> Parity:
    inputs = {k: v.detach().clone().requires_grad_() for k, v in parity.inputs.items()}
    return replace(parity, inputs=inputs)


def parity_agrees(parity: Parity, g: Tensor) -> dict[str, Tensor] | None:
    """The gradients by all inputs; None where, as all backends say, no point exists."""
    problem = parity.problem()
    backends = capable(problem)
    try:
        solve(problem, backend=backends[0])
    except InfeasibleError as first:
        for name in backends[1:]:
            with pytest.raises(InfeasibleError) as other:
                solve(problem, backend=name)
            assert other.value.batch == first.batch
        return None
    asked = leaves(parity)
    return inputs_agree(
        lambda name: solve(asked.problem(), backend=name).x, asked.inputs, g, backends
    )


@given(parities(), seeds)
def test_parity(parity: Parity, seed: int) -> None:
    parity_agrees(parity, cotangent(np.random.default_rng(seed), parity.inputs["scores"]))


@settings(max_examples=50)
@given(parities(largest=12), seeds)
def test_parity_gradients_are_finite_differences(parity: Parity, seed: int) -> None:
    """Where two step sizes agree: there is no kink within the larger."""
    rng = np.random.default_rng(seed)
    g = cotangent(rng, parity.inputs["scores"])
    grads = parity_agrees(parity, g)
    assume(grads is not None)
    assert grads is not None
    for name, grad in grads.items():
        tensor = parity.inputs[name]
        if (name.startswith("tolerance") and float(tensor) == 0) or (
            name == "targets" and bool(((tensor == 0) | (tensor == 1)).all())
        ):
            continue  # one-sided; an outcome
        move = torch.from_numpy(np.asarray(rng.uniform(-1, 1, tensor.shape)))

        def value(step: float, name: str = name, move: Tensor = move) -> float:
            moved = parity.moved(name, step * move).problem()
            return float((g * solve(moved, backend="numba").x).sum())

        h, here = 1e-5, value(0.0)
        sided = [(value(s) - here) / s for s in (h, -h, 4 * h, -4 * h)]
        near, far = (sided[0] + sided[1]) / 2, (sided[2] + sided[3]) / 2
        size = float((grad * move).abs().sum()) + float(g.norm())
        if abs(sided[0] - sided[1]) > 1e-3 * size or abs(near - far) > GRADIENTS * size:
            continue
        slope = float((grad * move).sum())
        assert abs(slope - near) <= GRADIENTS * size, (name, slope, near)


# ---------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------


def named(
    notion: type,
    groups: Tensor,
    tolerance: float,
    *,
    compare: str = "pairwise",
    batch: int = 1,
    bounds: str = "both",
) -> Parity:
    """Scores around the group's own mean; some of them beyond the bounds."""
    rng = np.random.default_rng(len(groups) + batch)
    mean = torch.linspace(0.2, 0.8, int(groups.max()) + 1, dtype=torch.float64)
    inputs = {
        "scores": mean[groups] + torch.from_numpy(rng.normal(0, 0.3, (batch, len(groups)))),
        "tolerance 0": torch.tensor(tolerance, dtype=torch.float64),
        "lower": torch.tensor(0.0, dtype=torch.float64),
        "upper": torch.tensor(1.0, dtype=torch.float64),
        "weights": torch.from_numpy(rng.uniform(0.5, 2, len(groups))),
    }
    return Parity([(notion, compare, tolerance)], {"group": groups}, inputs, bounds)


def agrees_with_differences(
    parity: Parity, *, sided: tuple[str, ...] = (), kinks: tuple[str, ...] = ()
) -> None:
    """Every backend, and every gradient against differences of the others' solutions.

    Args:
        sided: inputs that can only rise.
        kinks: inputs whose gradient is a convention, held against the other backends only.
    """
    rng = np.random.default_rng(0)
    g = cotangent(rng, parity.inputs["scores"])
    grads = parity_agrees(parity, g)
    assert grads is not None
    backends = capable(parity.problem())
    for i, (name, grad) in enumerate(grads.items()):
        if name in kinks:
            continue
        shape = parity.inputs[name].shape
        move = torch.from_numpy(np.asarray(rng.uniform(0.5, 1, shape) * rng.choice([-1, 1], shape)))
        move = move.abs() if name in sided else move
        backend, h = backends[i % len(backends)], 1e-5

        def value(
            step: float, name: str = name, move: Tensor = move, backend: str = backend
        ) -> float:
            moved = parity.moved(name, step * move).problem()
            return float((g * solve(moved, backend=backend).x).sum())

        if name in sided:  # of second order too
            slope = (4 * value(h) - value(2 * h) - 3 * value(0.0)) / (2 * h)
        else:
            slope = (value(h) - value(-h)) / (2 * h)
        size = float((grad * move).abs().sum()) + float(g.norm())
        assert abs(float((grad * move).sum()) - slope) <= GRADIENTS * size, (name, backend)


def test_the_91_dependent_pairs_of_14_groups() -> None:
    parity = named(DemographicParity, torch.arange(140) % 14, 0.05)
    assert parity.problem().shape == (1, 91, 140)
    agrees_with_differences(parity)


def test_overall_comparison() -> None:
    """Group minus overall: the rows' weighted sum is zero."""
    agrees_with_differences(named(DemographicParity, torch.arange(60) % 5, 0.03, compare="overall"))


@pytest.mark.parametrize("compare", ["pairwise", "overall"])
def test_tolerance_0(compare: str) -> None:
    """Equalities; the tolerance itself can only rise.

    Group minus overall are two parallel rows, of which only the longer holds at a positive
    tolerance: it has a kink, and the gradient that shares it among both is a convention.
    """
    parity = named(DemographicParity, torch.arange(41) % 2, 0.0, compare=compare)
    kind = {"pairwise": "sided", "overall": "kinks"}[compare]
    agrees_with_differences(parity, **{kind: ("tolerance 0",)})


def test_a_parameter_shared_over_the_batch() -> None:
    """Five problems with one tolerance, one pair of bounds and one set of weights: the sum."""
    agrees_with_differences(named(DemographicParity, torch.arange(24) % 3, 0.04, batch=5))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_rows_scaled(scale: float) -> None:
    """The same feasible set: the same x and gradients, those of rows and sides over the scale."""
    rng = np.random.default_rng(7)
    plain = program(rng, Shape(2, 12, 6, "dense", "dense", 2.0)).problem
    g = cotangent(rng, plain.q)
    P, q, A, l, u, lb, ub = plain.tensors
    problem = QP(P, q, scale * A, scale * l, scale * u, lb, ub)
    x, grads = backends_agree(problem, g, capable(problem))
    x_plain, grads_plain = backends_agree(plain, g, capable(plain))
    assert relative(x, x_plain) <= SOLUTIONS
    for name, one, other in zip(names(plain), grads, grads_plain, strict=True):
        grad = one * scale if name in ("rows", "A", "l", "u") else one
        assert relative(grad, other) <= GRADIENTS, name
    assert bool((grads[2] != 0).any())


@pytest.mark.parametrize(
    ("q", "x"), [(-0.5, 0.25), (-6.0, 0.75), (2.0, -0.5)], ids=["inside", "a row", "a bound"]
)
def test_n_is_1(q: float, x: float) -> None:
    """min x^2 + q x with 2 x <= 3/2 and x >= -1/2, by hand."""
    one = torch.ones(1, 1, dtype=torch.float64)
    problem = QP(2 * one, q * one, 2 * one[None], -INF * one, 1.5 * one, -0.5 * one, INF * one)
    found, grads = backends_agree(problem, one, capable(problem))
    assert abs(float(found) - x) <= SOLUTIONS
    expected = dict.fromkeys(names(problem), 0.0)
    if q == -0.5:  # x = -q / P
        expected |= {"P": -x / 2, "q": -0.5}
    elif q == -6.0:  # x = u / A
        expected |= {"u": 0.5, names(problem)[2]: -x / 2}
    else:
        expected["lb"] = 1.0
    for (name, want), grad in zip(expected.items(), grads, strict=True):
        assert abs(float(grad) - want) <= GRADIENTS, name
