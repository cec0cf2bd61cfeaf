"""What cannot be solved, or is no problem at all, is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from refusals import GROUPS, INF, META, NAN, SCORES, TARGETS, refused

from fairopt import (
    LP,
    QP,
    BackendNotFoundError,
    CellRows,
    DemographicParity,
    DenseRows,
    InfeasibleError,
    MeanResidual,
    NotDifferentiableError,
    ProblemError,
    Solution,
    SparseRows,
    Status,
    UnsupportedProblemError,
    backends,
    project,
    solve,
)
from fairopt.backends import Backend, Capabilities

# ---------------------------------------------------------------------------------------------
# Infeasible
# ---------------------------------------------------------------------------------------------


def test_bounds_that_contradict_a_row_name_it() -> None:
    lower = torch.tensor([0.0, 0.8, 0.0, 0.8])
    upper = torch.tensor([0.2, 1.0, 0.2, 1.0])
    error = refused(
        "problem 0 of the batch: no point satisfies all rows within the bounds; loosen a tolerance "
        r"or widen the bounds; the rows in conflict are .sex: 0 vs 1.; 1\.2\d* times the tol",
        SCORES,
        {"sex": GROUPS, "race": TARGETS},
        constraints=[
            DemographicParity(tolerance=0.5, on="sex"),
            DemographicParity(tolerance=0.5, on="race"),
        ],
        bounds=(lower, upper),
        error=InfeasibleError,
    )
    assert error.batch == 0
    assert error.rows == ("sex: 0 vs 1",)


def test_rows_that_contradict_each_other_are_all_named() -> None:
    # parity of means and parity of residuals, where the targets' means are far apart
    error = refused(
        "no point satisfies",
        SCORES,
        {"race": TARGETS},
        TARGETS,
        constraints=[DemographicParity(tolerance=0.1), MeanResidual(tolerance=0.1)],
        bounds=None,
        error=InfeasibleError,
    )
    assert set(error.rows) == {"race: 0 vs 1", "race: 0 vs 1 | residual"}


def test_the_problem_of_the_batch_that_cannot_be_is_named() -> None:
    lower = torch.zeros(3, 4)
    lower[2] = torch.tensor([0.0, 0.8, 0.0, 0.8])
    upper = torch.ones(3, 4)
    upper[2] = torch.tensor([0.2, 1.0, 0.2, 1.0])
    error = refused(
        "problem 2 of the batch: no point",
        SCORES.repeat(3, 1),
        bounds=(lower, upper),
        error=InfeasibleError,
    )
    assert error.batch == 2


def test_rows_without_names_are_numbered() -> None:
    # x0 + x1 = 5 within 0..1
    problem = QP(
        torch.ones(2), torch.zeros(2), torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
        torch.tensor([-1.0, 5.0]), torch.tensor([1.0, 5.0]), 0.0, 1.0,
    )  # fmt: skip
    with pytest.raises(
        InfeasibleError,
        match=r"the rows in conflict are 'row 1'; no multiple of the tolerances .* 3 added",
    ) as caught:
        solve(problem)
    assert caught.value.rows == ("row 1",)


def test_barely_feasible_is_feasible() -> None:
    """The bounds allow exactly the tolerance, at one point only."""
    lower = torch.tensor([0.0, 0.75, 0.0, 0.75], dtype=torch.float64)
    upper = torch.tensor([0.25, 1.0, 0.25, 1.0], dtype=torch.float64)
    fair = project(SCORES.double(), GROUPS, DemographicParity(tolerance=0.5), bounds=(lower, upper))
    torch.testing.assert_close(
        fair, torch.tensor([0.25, 0.75, 0.25, 0.75]).double(), rtol=0, atol=1e-12
    )


# ---------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------


def problem(**changes: Any) -> QP:
    """A small QP: two variables, one row."""
    data: dict[str, Any] = {
        "P": torch.ones(2), "q": torch.tensor([-1.0, 0.5]), "rows": torch.ones(1, 2),
        "l": torch.zeros(1), "u": torch.ones(1), "lb": None, "ub": None,
    }  # fmt: skip
    return QP(**{**data, **changes})


def linear(**changes: Any) -> LP:
    """A small LP: two variables, one row."""
    data: dict[str, Any] = {
        "c": torch.tensor([1.0, 2.0]), "rows": torch.ones(1, 2),
        "l": torch.ones(1), "u": torch.ones(1), "lb": 0.0, "ub": 1.0,
    }  # fmt: skip
    return LP(**{**data, **changes})


class Corner(Backend):
    """A linear solver for ``linear()`` alone."""

    name = "corner"
    capabilities = Capabilities(linear=True, rows=frozenset({"dense"}), devices=frozenset({"cpu"}))

    def solve(self, problem: Any) -> Solution:
        x = torch.tensor([[1.0, 0.0]]).expand(problem.shape[0], 2)
        y = torch.full(problem.shape[:2], -1.0, dtype=torch.float64)
        return Solution(problem, x, y, (Status.SOLVED,), self.name)


@pytest.fixture
def corner() -> Iterator[str]:
    backends.register("corner", lambda: Corner)
    yield "corner"
    del backends.registry["corner"]
    backends.loaded.pop("corner", None)


def test_an_unknown_backend() -> None:
    refused(
        "backend: expected one of numba.* or 'auto', got 'nunba'",
        backend="nunba",
        error=BackendNotFoundError,
    )


@pytest.mark.parametrize("backend", [None, [], 3, Corner], ids=repr)
def test_a_backend_that_is_none(backend: Any) -> None:
    refused("backend: expected a name, or a Backend made with its options, got", backend=backend)


def test_an_unknown_option() -> None:
    with pytest.raises(ProblemError, match=r"backend 'numba': .*unexpected keyword.*'eps'"):
        solve(problem(), backend="numba", eps=1e-9)


@pytest.mark.parametrize("threads", [0, -2])
def test_an_option_out_of_range(threads: int) -> None:
    with pytest.raises(ProblemError, match=f"threads: expected at least 1, got {threads}"):
        solve(problem(), backend="numba", threads=threads)


def test_options_that_have_no_owner() -> None:
    with pytest.raises(ProblemError, match='expected none with backend="auto"; name the backend'):
        solve(problem(), threads=1)
    with pytest.raises(ProblemError, match="give them to the backend's constructor"):
        solve(problem(), backend=backends.get("numba"), threads=1)


def test_a_dense_P_is_not_for_numba() -> None:
    dense = problem(P=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    with pytest.raises(
        UnsupportedProblemError,
        match=r"backend 'numba' does not solve a dense P \(it takes: diagonal\); choose another",
    ):
        solve(dense, backend="numba")
    with pytest.raises(UnsupportedProblemError, match="backend 'numba' does not solve a sparse P"):
        solve(problem(P=torch.eye(2).to_sparse()), backend="numba")


def test_a_linear_program_is_not_for_numba_unless_smoothed() -> None:
    with pytest.raises(
        UnsupportedProblemError,
        match=r"does not solve linear programs \(give solve\(..., smoothing=...\) a positive value",
    ):
        solve(linear(), backend="numba")
    assert solve(linear(), backend="numba", smoothing=0.1).x.tolist() == [[1.0, 0.0]]


def test_a_P_with_zeros_is_not_for_numba() -> None:
    with pytest.raises(
        UnsupportedProblemError,
        match=r"needs a positive diagonal P: .* add a small positive weight",
    ):
        solve(problem(P=torch.tensor([1.0, 0.0])), backend="numba")


def test_a_device_that_the_backend_lacks() -> None:
    data = problem()
    moved = QP.__new__(QP)
    moved.__dict__.update(data.__dict__, l=data.l.to(META))
    with pytest.raises(
        UnsupportedProblemError, match=r"does not solve tensors on 'meta' \(it runs on: cpu\)"
    ):
        solve(moved, backend="numba")


@pytest.mark.parametrize("field", ["c", "l", "u", "lb", "ub", "rows"])
def test_a_linear_program_has_no_gradient_without_smoothing(corner: str, field: str) -> None:
    values = {
        "c": torch.ones(2), "l": torch.ones(1), "u": torch.ones(1), "lb": torch.zeros(2),
        "ub": torch.ones(2), "rows": torch.ones(1, 2),
    }  # fmt: skip
    lp = linear(**{field: values[field].requires_grad_()})
    with pytest.raises(
        NotDifferentiableError,
        match=r"piecewise constant in its cost; pass smoothing=... .*no_grad",
    ):
        solve(lp, backend=corner)
    with torch.no_grad():
        assert solve(lp, backend=corner).x.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("smoothing", [-1.0, NAN, INF])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ProblemError, match="smoothing: expected a positive number, got"):
        solve(linear(), smoothing=smoothing)


def test_smoothing_of_a_quadratic_program() -> None:
    with pytest.raises(ProblemError, match="smoothing: a QP needs none; give it a larger P"):
        solve(problem(), smoothing=0.1)


def test_a_problem_that_is_none() -> None:
    with pytest.raises(ProblemError, match="problem: expected a QP or an LP, got Tensor"):
        solve(SCORES)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# QP and LP
# ---------------------------------------------------------------------------------------------


BAD_PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "q no tensor": ({"q": [1.0, 2.0]}, "q: expected a tensor, got list"),
    "q integers": ({"q": torch.ones(2).long()}, r"q: expected float32 or float64, got torch.int64"),
    "q half": ({"q": torch.ones(2).half()}, r"q: expected float32 or float64, got torch.float16"),
    "q of 3 dimensions": ({"q": torch.ones(1, 1, 2)}, r"q: expected shape \(n,\) or \(B, n\)"),
    "q empty": ({"q": torch.ones(0)}, r"q: expected shape .* n >= 1, got \(0,\)"),
    "q NaN": ({"q": torch.tensor([NAN, 0])}, "q: expected finite values, got NaN or infinity"),
    "q infinite": ({"q": torch.tensor([INF, 0])}, "q: expected finite values, got NaN or infinity"),
    "P no tensor": ({"P": None}, "P: expected a tensor, got NoneType"),
    "P integers": ({"P": torch.ones(2).int()}, "P: expected float32 or float64, got torch.int32"),
    "P of a wrong size": ({"P": torch.ones(3)}, r"P: expected \(1, 2\) for a diagonal or .*3"),
    "P of a wrong batch": (
        {"P": torch.ones(3, 2), "q": torch.zeros(2, 2)}, r"P: expected \(2, 2\) for .*got \(3, 2\)"
    ),
    "dense P of a wrong size": (
        {"P": torch.ones(1, 3, 3)}, r"P: expected \(1, 2\) for a diagonal or \(1, 2, 2\) for a mat"
    ),
    "P negative": (
        {"P": torch.tensor([1.0, -1.0])},
        r"P: expected a finite diagonal without negative entries \(a convex problem\)",
    ),
    "P NaN": ({"P": torch.tensor([1.0, NAN])}, "P: expected a finite diagonal"),
    "dense P NaN": ({"P": torch.full((2, 2), NAN)}, "P: expected finite values, got NaN"),
    "sparse P NaN": (
        {"P": torch.tensor([[NAN, 0.0], [0.0, 1.0]]).to_sparse()}, "P: expected finite values"
    ),
    "P asymmetric": (
        {"P": torch.tensor([[1.0, 2.0], [0.0, 1.0]])},
        r"P: expected a symmetric matrix; pass \(P \+ P.mT\) / 2",
    ),
    "sparse P asymmetric": (
        {"P": torch.tensor([[1.0, 2.0], [0.0, 1.0]]).to_sparse()}, "P: expected a symmetric matrix"
    ),
    "sparse P of a wrong size": (
        {"P": torch.eye(3).to_sparse()}, r"P: expected shape \(1, 2, 2\), got \(1, 3, 3\)"
    ),
    "rows no tensor": ({"rows": [[1.0, 1.0]]}, "rows: expected Rows or a tensor, got list"),
    "rows integers": ({"rows": torch.ones(1, 2).int()}, "rows: expected float32 or float64"),
    "rows of 1 dimension": (
        {"rows": torch.ones(2)}, r"rows: expected a matrix \(m, n\) or \(B, m, n\), got"
    ),
    "rows too wide": (
        {"rows": torch.ones(1, 3)}, "rows: expected 2 columns, one per variable, got 3"
    ),
    "rows NaN": ({"rows": torch.tensor([[1.0, NAN]])}, "rows: expected finite values, got NaN"),
    "rows of a wrong batch": (
        {"rows": torch.ones(2, 1, 2), "q": torch.zeros(3, 2)}, "rows: expected a batch of 1 or 3"
    ),
    "rows elsewhere": ({"rows": torch.ones(1, 2, device=META)}, "rows: expected device cpu, got m"),
    "l no tensor": ({"l": 0.0}, "l: expected a tensor, got float"),
    "l of a wrong size": ({"l": torch.zeros(2)}, r"l: expected shape \(1, 1\) or \(1,\), got"),
    "l of a wrong batch": (
        {"l": torch.zeros(2, 1), "q": torch.zeros(3, 2)}, r"l: expected shape \(3, 1\) or \(1,\)"
    ),
    "l elsewhere": (
        {"l": torch.zeros(1, device=META)}, "l: expected device cpu, where q is, got meta; move it"
    ),
    "sides crossed": (
        {"l": torch.ones(1), "u": torch.zeros(1)},
        r"l, u: expected l <= u without NaN, .*; it fails first at index \(0,\)",
    ),
    "side NaN": ({"l": torch.tensor([NAN])}, "l, u: expected l <= u without NaN"),
    "side infinite on the wrong end": (
        {"l": torch.tensor([INF]), "u": torch.tensor([INF])}, "no side infinite on the wrong end"
    ),
    "bounds crossed": (
        {"lb": torch.tensor([0.0, 1.0]), "ub": torch.tensor([1.0, 0.0])},
        r"lb, ub: expected lb <= ub without NaN, .*; it fails first at index \(1,\)",
    ),
    "bound NaN": ({"ub": NAN}, "lb, ub: expected lb <= ub without NaN"),
    "bound no number": ({"lb": "0"}, "lb: expected a number, a tensor or None, got '0'"),
    "bound integers": ({"lb": torch.zeros(2).int()}, "lb: expected float32 or float64, got"),
    "bound of a wrong size": ({"ub": torch.ones(3)}, r"ub: expected shape \(1, 2\) or \(2,\), got"),
    "bound elsewhere": ({"ub": torch.ones(2, device=META)}, "ub: expected device cpu, where q is"),
    "names too few": (
        {"row_names": ("a", "b")}, "row_names: expected 1 names, one per row, got 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), BAD_PROBLEMS.values(), ids=BAD_PROBLEMS.keys())
def test_a_malformed_QP(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        problem(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [value for name, value in BAD_PROBLEMS.items() if not {"P", "q"} & set(value[0])],
    ids=[name for name, value in BAD_PROBLEMS.items() if not {"P", "q"} & set(value[0])],
)
def test_a_malformed_LP(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ProblemError, match=match.replace("where q is", "where c is")):
        linear(**changes)


@pytest.mark.parametrize(
    ("c", "match"),
    [
        ([1.0, 2.0], "c: expected a tensor, got list"),
        (torch.ones(2).int(), "c: expected float32 or float64, got torch.int32"),
    ],
)
def test_a_malformed_cost(c: Any, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        linear(c=c)


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.ones(2, 3), torch.tensor([0, 3]), torch.ones(2)),
         r"rows.cell: expected values in 0..2, one for each cell of coefficient; got 0..3"),
        ((torch.ones(2, 3), torch.tensor([-1, 0]), torch.ones(2)), "rows.cell: .*got -1..0"),
        ((torch.ones(2, 3), INDEX.short(), torch.ones(2)),
         r"rows.cell: expected int64, int32 or uint8, got torch.int16; convert with .long\(\)"),
        ((torch.ones(2, 3), INDEX.double(), torch.ones(2)), "rows.cell: .*got torch.float64"),
        ((torch.ones(2, 3), [0, 1], torch.ones(2)), "rows.cell: expected a tensor, got list"),
        ((torch.ones(2, 3).int(), INDEX, torch.ones(2)), "rows.coefficient: expected float32"),
        (([[1.0]], INDEX, torch.ones(2)), "rows.coefficient: expected a tensor, got list"),
        ((torch.ones(2, 3), INDEX, torch.ones(2).int()), "rows.weight: expected float32"),
        ((torch.ones(2, 3), INDEX, torch.ones(3)),
         r"rows: expected coefficient \(B, m, K\).*; got \(1, 2, 3\), \(1, 2\) and \(1, 3\)"),
        ((torch.ones(3), INDEX, torch.ones(2)), r"rows: expected coefficient \(B, m, K\)"),
        ((torch.ones(2, 2, 3), INDEX.repeat(3, 1), torch.ones(2)), "with one B and one n; got"),
    ],
)  # fmt: skip
def test_malformed_cell_rows(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        CellRows(*arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((INDEX, INDEX, torch.ones(2), 1, 2),
         r"rows.row: expected indices in 0..0, got 0..1"),
        ((INDEX, INDEX - 1, torch.ones(2), 2, 2), r"rows.column: expected indices in 0..1, got -1"),
        ((INDEX.int(), INDEX, torch.ones(2), 2, 2),
         r"rows.row: expected an int64 tensor of shape \(2,\), .*got torch.int32 of shape \(2,\)"),
        ((INDEX, INDEX[:1], torch.ones(2), 2, 2), r"rows.column: expected an int64 .*shape \(1,\)"),
        (([0, 1], INDEX, torch.ones(2), 2, 2), "rows.row: expected a tensor, got list"),
        ((INDEX, INDEX, torch.ones(2).int(), 2, 2), "rows.values: expected float32 or float64"),
        ((INDEX, INDEX, torch.ones(1, 1, 2), 2, 2),
         r"rows.values: expected shape \(E,\) or \(B, E\), got \(1, 1, 2\)"),
    ],
)  # fmt: skip
def test_malformed_sparse_rows(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        SparseRows(*arguments)


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        ([[1.0]], "rows: expected a tensor, got list"),
        (torch.ones(1, 2).int(), "rows: expected float32 or float64, got torch.int32; convert"),
        (torch.ones(2), r"rows: expected a matrix \(m, n\) or \(B, m, n\), got shape \(2,\)"),
        (torch.ones(1, 1, 1, 2), r"got shape \(1, 1, 1, 2\)"),
    ],
)
def test_malformed_dense_rows(matrix: Any, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        DenseRows(matrix)
