"""Many attributes at once: rows over partitions are the same rows, with the same gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import clarabel_solution, plain
from torch.autograd import gradcheck

from fairopt import (
    QP,
    Budget,
    CellRows,
    ConditionalParity,
    Constraint,
    DemographicParity,
    EqualizedOdds,
    ErrorParity,
    FairnessLayer,
    ImpactRatio,
    InfeasibleError,
    MeanResidual,
    MinimumRate,
    ProblemError,
    Row,
    Solution,
    audit,
    cross_validate,
    formulate,
    project,
    solve,
)
from fairopt.backends import Numba
from fairopt.backends.numba import partitioned as _many
from fairopt.backends.numba.partitioned import Many
from fairopt.formulation import template
from fairopt.kernels import active_set, partitions
from fairopt.kernels.combinations import number
from fairopt.notions.functionals import Batch
from fairopt.optimality.derivative import adjoint
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.solution import RowValues
from fairopt.programs.tensors import unchecked

seen: Counter[str] = Counter()


@dataclass
class Case:
    constraints: list[Constraint]
    scores: torch.Tensor
    groups: dict[str, torch.Tensor]
    targets: torch.Tensor
    bounds: Any
    weights: torch.Tensor | None

    def problem(self) -> QP:
        return formulate(
            self.constraints, self.scores, self.groups, self.targets, bounds=self.bounds,
            weights=self.weights,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, largest: int = 300) -> Case:
    """Up to 20 attributes with up to 20 values, some of them copies or nearly copies of others."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(2, draw(st.sampled_from([6, 20, 60, 150, largest]))))
    count = draw(st.integers(4, 20))
    profile = rng.integers(0, draw(st.integers(1, 6)), n)
    groups: dict[str, torch.Tensor] = {}
    for i in range(count):
        size = draw(st.integers(8 if i < 4 else 2, 20))  # more than 4096 in all
        kind = draw(st.sampled_from(["even", "rare", "profile", "profile", "copy", "nearly"]))
        codes = rng.integers(0, size, n)
        if kind == "rare":
            codes = np.minimum(rng.geometric(0.5, n) - 1, size - 1)
        if kind == "profile":
            codes = np.where(rng.random(n) < 0.8, rng.integers(0, size, 6)[profile], codes)
        if kind in ("copy", "nearly") and groups:
            codes = groups[f"a{rng.integers(0, i)}"].numpy().copy()
            if kind == "nearly":
                codes[rng.integers(0, n)] = rng.integers(0, size)
        groups[f"a{i}"] = torch.from_numpy(codes.astype(np.int64))
    first = groups["a0"].numpy()
    scores = {
        "uniform": lambda: rng.random(n),
        "ties": lambda: rng.integers(0, 3, n) / 2,
        "normal": lambda: 3 * rng.normal(size=n),
        "shifted": lambda: 0.5 * rng.random(n) + 0.05 * first,
    }[draw(st.sampled_from(["uniform", "ties", "normal", "shifted"]))]()
    weights = None
    if draw(st.booleans()):
        weights = torch.from_numpy(10.0 ** rng.uniform(-2, 2, n))
        if draw(st.booleans()):
            weights[torch.from_numpy(rng.random(n) < 0.1)] = 0.0
    lower = torch.from_numpy(0.3 * rng.random(n))
    bounds = draw(
        st.sampled_from([(0.0, 1.0), (0.0, 1.0), (0.0, None), None, (lower, lower + 0.6)])
    )
    constraints: list[Constraint] = []
    for _ in range(draw(st.integers(1, 2))):
        notion = draw(st.sampled_from([DemographicParity, DemographicParity, EqualizedOdds]))
        tolerance = draw(st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 0.02, 0.1, np.inf]))
        compare = draw(st.sampled_from(["overall", "overall", "pairwise"]))
        constraints.append(notion(tolerance, compare=compare))
    targets = torch.from_numpy(rng.integers(0, 2, n).astype(float))
    return Case(constraints, torch.from_numpy(scores), groups, targets, bounds, weights)


def without_partitions(problem: QP) -> QP:
    """The same problem with dense coefficients."""
    rows = problem.rows
    assert isinstance(rows, PartitionedRows)
    dense = CellRows(rows.coefficient, rows.cell.long(), rows.weight)
    return unchecked(QP, **{**problem.__dict__, "rows": dense})


def solved(problem: QP) -> Solution:
    """The solution, judged by our residuals on the dense coefficients."""
    solution = solve(problem, backend="numba")
    x = solution.x
    assert ((x >= problem.lb) & (x <= problem.ub)).all()
    other = without_partitions(problem)
    assert (RowValues(other.rows, problem.l, problem.u, x).relative <= 1e-12).all()
    judged = unchecked(Solution, **{**solution.__dict__, "problem": other})
    assert judged.residuals.worst <= 1e-9, str(judged.residuals)
    return solution


# ---------------------------------------------------------------------------------------------
# Drawn problems
# ---------------------------------------------------------------------------------------------


@settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
@given(cases())
def exact_and_as_clarabel(case: Case) -> None:
    problem = case.problem()
    if not isinstance(problem.rows, PartitionedRows):
        seen["no rows"] += 1
        assert not problem.shape[1] or problem.rows.coefficient.shape[2] <= 4096
        return
    seen["drawn"] += 1
    try:
        solution = solved(problem)
    except InfeasibleError:
        seen["infeasible"] += 1  # per-sample bounds: constants may be forbidden
        assert isinstance(case.bounds, tuple) and isinstance(case.bounds[0], torch.Tensor)
        with pytest.raises(InfeasibleError):
            solve(without_partitions(problem), backend="numba")
        return
    seen["in classes"] += isinstance(solution.context, Many)
    p = plain(problem)
    other = clarabel_solution(p)
    if other is None:
        return
    seen["compared"] += 1
    ours = solution.x[0].numpy() / p.unit

    def value(z: np.ndarray) -> float:
        return float(0.5 * z @ (p.P * z) + p.q @ z)

    gap = 1e-6 * max(abs(value(ours)), 0.5 * float((p.q**2 / p.P).sum())) + 1e-9
    assert abs(value(ours) - value(other)) <= gap
    assert float((p.P * (ours - other) ** 2).sum()) <= 4 * gap


@pytest.mark.slow
def test_exact_and_as_clarabel_on_drawn_problems() -> None:
    """And most of them were solved in classes, and compared."""
    seen.clear()
    exact_and_as_clarabel()
    assert seen["in classes"] > 0.8 * seen["drawn"], seen
    assert seen["compared"] > 0.5 * seen["drawn"], seen


def strictly_complementary(problem: QP, solution: Solution) -> bool:
    """Whether no multiplier is zero but for rounding: then two roundings see one active set."""
    d = problem.diagonal()
    scale = float((problem.q / d).abs().max()) + 1e-300
    push = (solution.bound_dual / d).abs()
    held = (solution.x == problem.lb) | (solution.x == problem.ub)
    apart = problem.lb < problem.ub
    y = (solution.row_dual * problem.rows.norms(1 / d).square()).abs()
    unequal = problem.l < problem.u
    return bool((push > 1e-9 * scale)[held & apart].all()) and bool(
        ((y == 0) | (y > 1e-9 * scale))[unequal].all()
    )


@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
@given(cases(largest=120), st.integers(0, 2**31))
def backward_is_the_shared_one(case: Case, seed: int) -> None:
    problem = case.problem()
    assume(isinstance(problem.rows, PartitionedRows))
    backend = Numba()
    solution = backend.solve(problem)
    assume(all(status.name == "SOLVED" for status in solution.status))
    assume(strictly_complementary(problem, solution))
    dense = without_partitions(problem)
    shared_solution = unchecked(Solution, **{**solution.__dict__, "problem": dense})
    g = torch.from_numpy(np.random.default_rng(seed).normal(size=solution.x.shape))
    native, shared = backend.vjp(problem, solution, g), adjoint(dense, shared_solution, g)
    size = float(g.abs().max()) / float(problem.P.min())
    assert float((native.v - shared.v).abs().max()) <= 1e-9 * size
    seen["adjoints"] += 1
    if isinstance(solution.context, Many) and solution.context.adjoint(g) is not None:
        seen["adjoints in classes"] += 1
    tilts = [dense.rows.transpose_apply(a.nu) for a in (native, shared)]
    free = shared.v != 0
    assert float(((tilts[0] - tilts[1]) * free).abs().max()) <= 1e-7 * float(
        g.abs().max() * problem.P.max() / problem.P.min()
    )


@pytest.mark.slow
def test_backward_is_the_shared_one_on_drawn_problems() -> None:
    """And most adjoints came from classes."""
    seen.clear()
    backward_is_the_shared_one()
    assert seen["adjoints in classes"] > 0.5 * seen["adjoints"], seen


# ---------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------


def data(n: int = 200, attributes: int = 8, size: int = 6, seed: int = 0) -> dict[str, Any]:
    """Scores whose means differ between the values of correlated attributes."""
    rng = np.random.default_rng(seed)
    profile = rng.integers(0, 4, n)
    groups = {}
    logit = 1.5 * rng.normal(size=n)
    for i in range(attributes):
        liked = rng.integers(0, size, 4)[profile]
        codes = np.where(rng.random(n) < 0.6, liked, rng.integers(0, size, n))
        logit += (0.4 * rng.normal(size=size))[codes]
        groups[f"a{i}"] = torch.from_numpy(codes)
    return {
        "scores": torch.from_numpy(1 / (1 + np.exp(-logit))),
        "groups": groups,
        "targets": torch.from_numpy((rng.random(n) < 0.5).astype(float)),
        "weights": torch.from_numpy(0.5 + rng.random(n)),
    }


NOTIONS = {
    "overall": DemographicParity(0.02, compare="overall"),
    "pairwise": DemographicParity(0.02, compare="pairwise"),
    "reference": DemographicParity(0.02, "a1", compare="reference", reference=2),
    "odds": EqualizedOdds(0.03, compare="overall"),
    "intersection": DemographicParity(0.05, on=("a0", "a3")),
    "strata": ConditionalParity(0.05, on="a1", given="a2"),
    "residual": MeanResidual(0.05),
    "error": ErrorParity(0.05),
    "ratio": ImpactRatio(0.8),
    "rate": MinimumRate(0.3),
    "budget": [DemographicParity(0.05), Budget(total=90.0)],
}


def products(rows: CellRows, d: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """N N^T and N c of the factor."""
    N, c = rows.factor(d, g)
    return N @ N.mT, (N @ c.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("notion", NOTIONS)
def test_partitions_write_the_same_rows(
    notion: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = data()
    if not weighted:
        d["weights"] = None
    others = DemographicParity(np.inf)  # all attributes take part: cells are combinations
    constraints = NOTIONS[notion]
    constraints = [*(constraints if isinstance(constraints, list) else [constraints]), others]

    def problem() -> QP:
        return formulate(
            constraints, d["scores"], d["groups"], d["targets"], bounds=(0, 1), weights=d["weights"]
        )

    ours = problem()
    template.partition.cache_clear()
    monkeypatch.setattr(template, "MOST_PARTS", 0)
    cells = problem()
    template.partition.cache_clear()
    assert isinstance(ours.rows, PartitionedRows)
    assert type(cells.rows) is CellRows
    assert (ours.row_names, ours.skipped) == (cells.row_names, cells.skipped)
    close = {"rtol": 1e-12, "atol": 1e-16}
    torch.testing.assert_close(ours.rows.coefficient, cells.rows.coefficient, **close)
    torch.testing.assert_close(ours.l, cells.l, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.u, cells.u, rtol=1e-12, atol=1e-14)

    # Every operation of the rows, with what the dense coefficients give.
    rng = torch.Generator().manual_seed(0)
    x, v = (torch.rand(1, 200, generator=rng, dtype=torch.float64) for _ in range(2))
    y, nu = (torch.randn(1, ours.shape[1], generator=rng, dtype=torch.float64) for _ in range(2))
    a, b = ours.rows, cells.rows
    for pair in (
        (a.apply(x), b.apply(x)),
        (a.transpose_apply(y), b.transpose_apply(y)),
        (a.norms(x), b.norms(x)),
        (a.absolute().apply(x), b.absolute().apply(x)),
        (a.gram(x), b.gram(x)),
        *zip(products(a, x, v), products(b, x, v), strict=True),
        (a.pull_back(y, v, nu, x)[1], b.pull_back(y, v, nu, x)[1]),
        (a.to_dense().matrix, b.to_dense().matrix),
        (a.by_part()[0] @ a.partitions.sum(v[:, : a.cells])[0], a.values(v[:, : a.cells])[0]),
    ):
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-14)

    solution = solved(ours)
    assert isinstance(solution.context, Many)
    other = solve(cells, backend="numba")
    assert (solution.x - other.x).abs().max() <= 1e-12


def test_table_gradient_is_that_of_the_coefficients() -> None:
    d = data(n=60)
    rows = formulate(NOTIONS["overall"], d["scores"], d["groups"], bounds=(0, 1)).rows
    assert isinstance(rows, PartitionedRows)
    rng = torch.Generator().manual_seed(0)
    y, nu = (torch.randn(1, rows.shape[1], generator=rng, dtype=torch.float64) for _ in range(2))
    v, x = (torch.randn(1, 60, generator=rng, dtype=torch.float64) for _ in range(2))
    table, weight = (t.clone().requires_grad_() for t in rows.tensors)
    A = rows.with_tensors(table, weight).to_dense().matrix
    A.backward(y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2))
    found = rows.pull_back(y, v, nu, x)
    torch.testing.assert_close(found[0], table.grad)
    torch.testing.assert_close(found[1], weight.grad)


@pytest.mark.parametrize("compare", ["overall", "pairwise"])
@pytest.mark.parametrize("tolerance", [0.0, 0.03])
def test_gradcheck_of_every_input(compare: Any, tolerance: float) -> None:
    d = data(n=60, attributes=5)
    side = torch.tensor(tolerance, dtype=torch.float64)
    lower, upper = torch.zeros(60, dtype=torch.float64), torch.full((60,), 0.9).double()
    inputs = [d["scores"], d["weights"], lower, upper, *([side] if tolerance else [])]
    for tensor in inputs:
        tensor.requires_grad_()

    def fair(scores, weights, lower, upper, *sides):  # type: ignore[no-untyped-def]
        return project(
            scores, d["groups"], DemographicParity(*sides or (0.0,), compare=compare),
            bounds=(lower, upper), weights=weights, backend="numba",
        )  # fmt: skip

    assert isinstance(
        formulate(DemographicParity(0.1), d["scores"], d["groups"], bounds=None).rows,
        PartitionedRows,
    )
    before = fair(*inputs).detach()
    assert ((before == 0.9) | (before == 0.0)).any(), "some bound should be active"
    assert gradcheck(fair, inputs, atol=1e-6, rtol=1e-5)


def test_the_dense_coefficients_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where classes do not get through, the answer and the gradient are those of the cells."""
    d = data()
    problem = formulate(NOTIONS["overall"], d["scores"], d["groups"], bounds=(0, 1))
    g = torch.randn(1, 200, dtype=torch.float64)
    backend = Numba()
    ours = backend.solve(problem)
    v = backend.vjp(problem, ours, g).v
    with monkeypatch.context() as patch:
        patch.setattr(_many, "PLAIN_SQUARE", (1.0, 1e-13))
        assert ours.context.adjoint(g) is None
        assert (backend.vjp(problem, ours, g).v - v).abs().max() <= 1e-12
    monkeypatch.setattr(Many, "solve", lambda self: False)
    dense = backend.solve(problem)
    assert not isinstance(dense.context, Many)
    assert dense.problem is problem
    assert (dense.x - ours.x).abs().max() <= 1e-13
    assert (backend.vjp(problem, dense, g).v - v).abs().max() <= 1e-12


def test_weights_over_twelve_orders_of_magnitude() -> None:
    """Directions that the squares cannot see: exact all the same."""
    d = data(n=120)
    rng = np.random.default_rng(1)
    weights = torch.from_numpy(10.0 ** rng.uniform(-6, 6, 120))
    problem = formulate(
        DemographicParity(0.0), d["scores"], d["groups"], bounds=(0, 1), weights=weights
    )
    solved(problem)


def test_scores_far_outside_the_bounds_clip_whole_classes() -> None:
    for seed in range(20):
        d = data(n=40, seed=seed)
        scores = 50 * torch.from_numpy(np.random.default_rng(seed).normal(size=40))
        solved(formulate(EqualizedOdds(0.0), scores, d["groups"], d["targets"], bounds=(0, 1)))


@pytest.mark.parametrize("spread", [1e8, 1e-8])
def test_rows_hold_to_the_precision_of_the_predictions(spread: float) -> None:
    d = data(n=150)
    scores = spread * torch.from_numpy(np.random.default_rng(0).normal(size=150))
    solved(formulate(DemographicParity(0.01), scores, d["groups"], bounds=None))
    solved(formulate(DemographicParity(0.01 * spread), scores, d["groups"], bounds=(0, spread)))


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_nearly_all_predictions_at_a_bound(spread: float) -> None:
    """Scores far outside the bounds: nearly a linear program, hundreds of steps."""
    d = data(n=150)
    scores = spread * torch.from_numpy(np.random.default_rng(0).normal(size=150))
    solution = solved(formulate(DemographicParity(0.01), scores, d["groups"], bounds=(0, 1)))
    assert ((solution.x == 0) | (solution.x == 1)).double().mean() > 0.7


def test_a_group_that_is_nearly_everyone() -> None:
    """Its row against everyone cancels, unless it is written without a difference."""
    d = data(n=3000)
    rare = torch.zeros(3000, dtype=torch.int64)
    rare[17] = 1
    d["groups"]["rare"] = rare
    solved(formulate(NOTIONS["overall"], d["scores"], d["groups"], bounds=(0, 1)))


def test_batches_of_shared_and_of_own_groups() -> None:
    one = data()
    scores = torch.stack([data(seed=s)["scores"] for s in range(3)])
    own = {k: torch.stack([data(seed=s)["groups"][k] for s in range(3)]) for k in one["groups"]}
    weights = torch.stack([data(seed=s)["weights"] for s in range(3)])
    constraint = DemographicParity(0.02, compare="overall")
    for groups in (one["groups"], own):
        for w in (None, weights):
            problem = formulate(constraint, scores, groups, bounds=(0, 1), weights=w)
            assert isinstance(problem.rows, PartitionedRows)
            solution = solved(problem)
            g = torch.randn(3, 200, dtype=torch.float64)
            v = Numba().vjp(problem, solution, g).v
            for b in range(3):
                single = {k: c[b] if c.dim() == 2 else c for k, c in groups.items()}
                alone = formulate(
                    constraint,
                    scores[b],
                    single,
                    bounds=(0, 1),
                    weights=None if w is None else w[b],
                )
                found = solve(alone, backend="numba")
                assert (found.x[0] - solution.x[b]).abs().max() <= 1e-12
                u = Numba().vjp(alone, found, g[b : b + 1]).v
                assert (u[0] - v[b]).abs().max() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_recomputed_from_the_returned_tensor(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairopt.backends.numba.backend.PARALLEL_FROM", 1_000)
    d = data(n=5000, attributes=12)
    scores = d["scores"].to(dtype).requires_grad_()
    constraint = DemographicParity(0.01, compare="pairwise")
    layer = FairnessLayer(constraint, bounds=(0, 1), backend=Numba(threads=threads))
    fair = layer(scores, d["groups"])
    assert fair.dtype == dtype and fair.min() >= 0 and fair.max() <= 1
    limit = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    x = fair.detach().double()
    for codes in d["groups"].values():
        means = [x[codes == c].mean().item() for c in range(6)]
        assert max(means) - min(means) <= 0.01 + 2 * limit
    fair.sum().backward()
    report = audit(fair.detach(), d["groups"], constraint)
    assert report.holds and len(report.rows) == 12 * 15


def test_infeasible_rows_are_named() -> None:
    d = data(n=50)
    one = d["groups"]["a0"] == 1
    lower = torch.where(one, 0.9, 0.0).double()
    upper = torch.where(one, 1.0, 0.1).double()
    with pytest.raises(InfeasibleError, match="a0: "):
        project(
            d["scores"], d["groups"], DemographicParity(0.5), bounds=(lower, upper), backend="numba"
        )


class Share(Constraint):
    """sum over group 1 of a0 within group 1 of a1, over the mass of the latter, is at least 0.1."""

    def rows(self, batch: Batch) -> Iterator[Row]:
        a, b = batch.groups("a0")[1], batch.groups("a1")[1]
        yield Row("share", (a & b).mean(per=b), 0.1)
        yield from DemographicParity(np.inf).rows(batch)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_can_never_hold_are_refused_by_name(weighted: bool) -> None:
    d = data(n=100)
    both = (d["groups"]["a0"] == 1) & (d["groups"]["a1"] == 1)
    assert both.any() and (d["groups"]["a1"][~both] == 1).any()
    weights = torch.ones(100, dtype=torch.float64)
    if weighted:
        weights[both] = 0.0
    else:
        d["groups"]["a0"] = torch.where(both, 0, d["groups"]["a0"])
    with pytest.raises(ProblemError, match="'share': no prediction has any weight in them"):
        formulate(
            Share(), d["scores"], d["groups"], bounds=(0, 1), weights=weights if weighted else None
        )


def test_missing_groups_are_skipped_by_name() -> None:
    d = data(n=12)
    constraint = DemographicParity(0.02, compare="pairwise")
    problem = formulate(constraint, d["scores"], d["groups"], bounds=(0, 1), group_counts=6)
    assert isinstance(problem.rows, PartitionedRows)
    assert len(problem.skipped) + problem.shape[1] == 8 * 15
    assert problem.skipped
    solved(problem)
    with pytest.raises(ProblemError, match="lacks a group"):
        formulate(
            constraint, d["scores"], d["groups"], bounds=(0, 1), group_counts=6,
            missing_group="raise",
        )  # fmt: skip


def test_other_backends_solve_the_same_problem() -> None:
    d = data(n=40, attributes=5, size=7)
    problem = formulate(DemographicParity(0.05), d["scores"], d["groups"], bounds=(0, 1))
    assert isinstance(problem.rows, PartitionedRows)
    pytest.importorskip("osqp")
    agreement = cross_validate(problem, ["numba", "osqp"])
    assert agreement.agree, str(agreement)


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 3000),
    st.sampled_from([2, 20, 300]),
)
def test_numbering_of_combinations(seed: int, attributes: int, n: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.integers(1, n + 1)
    pool = rng.integers(0, size, (attributes, distinct))
    codes = pool[:, rng.integers(0, distinct, n)]
    kinds = [np.int64, np.int32, np.uint8 if size <= 256 else np.int16]
    given_ = [row.astype(kinds[i % 3]) for i, row in enumerate(codes)]
    index, combinations, counts = number(given_, [size] * attributes)
    expected, times = np.unique(codes, axis=1, return_counts=True)
    assert len(combinations) == expected.shape[1]
    assert (combinations.T[:, index] == codes).all()
    assert (np.bincount(index) == counts).all()
    assert (np.sort(times) == np.sort(counts)).all()
    first = [int(np.argmax(index == k)) for k in range(len(combinations))]
    assert (np.diff(first) > 0).all()  # in the order in which they occur


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 12))
def test_rows_leave_the_factorisation(seed: int, K: int, count: int) -> None:
    """Givens' rotations leave what a factorisation afresh would make, but for signs."""
    rng = np.random.default_rng(seed)
    count = min(count, K)
    N = rng.normal(size=(count, K))
    N /= np.linalg.norm(N, axis=1)[:, None]
    Q, R = np.empty((count + 1, K)), np.zeros((count + 1, count + 1))
    W, side, lam = np.arange(count + 1), np.ones(count + 1), rng.random(count + 1)
    before = lam.copy()
    for j in range(count):
        active_set.keep(Q, R, j, active_set.orthogonalise(N, j, Q, R, j, True))
    gone = int(rng.integers(0, count))
    active_set.remove(Q, R, W, side, lam, gone, count, True)
    left = np.delete(np.arange(count), gone)
    q = count - 1
    assert (W[:q] == left).all() and (lam[:q] == before[left]).all()
    np.testing.assert_allclose(np.triu(R[:q, :q]).T @ Q[:q], N[left], atol=1e-12)
    np.testing.assert_allclose(Q[:q] @ Q[:q].T, np.eye(q), atol=1e-12)


def test_factor_of_the_classes_sees_their_dependence() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (300, 4))
    member = (codes + 5 * np.arange(4)).astype(np.uint32)
    D = rng.random(300)
    V = np.zeros((20, 300))
    for f in range(4):
        V[member[:, f], np.arange(300)] = 1.0
    expected = (V * D) @ V.T
    G = np.zeros((20, 20))
    partitions.gram(member, D, G)
    np.testing.assert_allclose(np.triu(G), np.triu(expected), rtol=1e-12)
    L, least, rest = partitions.factorise_parts(G, 1e-12)
    assert L.shape[1] == 20 - 3  # the classes of each partition add up to everyone
    assert least > 1e-3 and rest < 1e-13
    np.testing.assert_allclose(L @ L.T, expected, atol=1e-12 * expected.max())
