"""cross_validate and `fairopt compare`: broken backends are named, with the place and the size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from comparing import GROUPS, Twin, WrongX, parity
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairopt import (
    LP,
    QP,
    Agreement,
    BackendNotFoundError,
    DemographicParity,
    FairoptError,
    ProblemError,
    Solution,
    SparseRows,
    Status,
    UnsupportedProblemError,
    backends,
    cross_validate,
    formulate,
    solve,
)
from fairopt.agreement import Difference
from fairopt.agreement.degeneracy import standing
from fairopt.backends import Adjoint, Backend, Capabilities
from fairopt.backends.numba.backend import Numba
from fairopt.cli.drawing import Drawn, draw
from fairopt.programs.problem import Problem


def apart() -> QP:
    """The same, where problem 0 is infeasible: group 2 stays above 0.9, the others below 0.5."""
    lower, upper = torch.zeros(4, 20).double(), torch.ones(4, 20).double()
    lower[0, GROUPS == 2], upper[0, GROUPS != 2] = 0.9, 0.5
    return parity(bounds=(lower, upper))


# ---------------------------------------------------------------------------------------------
# Toy backends: the closed form, with one thing broken
# ---------------------------------------------------------------------------------------------


class WrongSlope(Twin):
    """The multiplier of the derivative is one per cent too large, in the last row of problem 1."""

    name: ClassVar[str] = "wrong-slope"

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        right = super().vjp(problem, solution, grad_x)
        nu = right.nu.clone()
        nu[1, -1] *= 1.01
        return Adjoint(right.v, nu)


class Steep(Twin):
    """All multipliers of the derivative are one per cent too large."""

    name: ClassVar[str] = "steep"

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        right = super().vjp(problem, solution, grad_x)
        return Adjoint(right.v, 1.01 * right.nu)


class WrongSign(Twin):
    name: ClassVar[str] = "wrong-sign"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        return replace(solution, row_dual=-solution.row_dual)


class Liar(Twin):
    """Claims to have solved everything."""

    name: ClassVar[str] = "liar"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        return replace(solution, status=(Status.SOLVED,) * len(solution.status))


class Pessimist(Twin):
    """Claims that everything is infeasible, with multipliers that prove nothing."""

    name: ClassVar[str] = "pessimist"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        return replace(solution, status=(Status.INFEASIBLE,) * len(solution.status))


class Raises(Twin):
    name: ClassVar[str] = "raises"

    def solve(self, problem: Problem) -> Solution:
        raise RuntimeError("out of luck")


class RaisesBackward(Twin):
    name: ClassVar[str] = "raises-backward"

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        raise ZeroDivisionError("out of luck")


class Stalls(Twin):
    name: ClassVar[str] = "stalls"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        return replace(solution, status=(Status.STALLED,) * len(solution.status))


class NotNumbers(Twin):
    name: ClassVar[str] = "not-numbers"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        return solution.with_x(torch.full_like(solution.x, torch.nan))


class Picky(Twin):
    """Refuses what its capabilities cover."""

    name: ClassVar[str] = "picky"

    def solve(self, problem: Problem) -> Solution:
        raise UnsupportedProblemError("not on a Monday")


def against(*others: Backend, problem: Problem | None = None, **options: Any) -> Agreement:
    """Compare with the closed form."""
    wanted = ["numba", *others]
    return cross_validate(problem or parity(), wanted, repeats=0, **options)


def of(agreement: Agreement, quantity: str) -> Difference:
    """The only difference in a quantity."""
    (found,) = [d for d in agreement.differences if d.quantity == quantity]
    return found


def agreeing(agreement: Agreement) -> dict[str, bool]:
    return {row["backend"]: row["agrees"] for row in agreement.table()}


# ---------------------------------------------------------------------------------------------
# Broken backends
# ---------------------------------------------------------------------------------------------


def test_one_wrong_variable_is_named_with_its_problem_and_size() -> None:
    agreement = against(Twin(), WrongX())
    assert not agreement.agree
    assert agreeing(agreement) == {"numba": True, "twin": True, "wrong-x": False}
    found = of(agreement, "x")
    assert (found.backend, found.odd, found.problem, found.where) == ("wrong-x", True, 2, "x[3]")
    assert found.problems == (2,)
    assert isinstance(found.value, float) and isinstance(found.other, float)
    assert found.value - found.other == pytest.approx(1e-3)
    largest = float(solve(parity()).x[2].max())
    assert found.size == pytest.approx(1e-3 / largest, rel=1e-2)
    assert of(agreement, "residuals").problems == (2,), "our own judge sees it too"
    text = str(agreement)
    assert "wrong-x: the odd one out of 3; refused by our residuals" in text
    assert "problem 2, x[3]" in text


def test_of_two_that_differ_the_one_that_our_residuals_refuse_is_blamed() -> None:
    agreement = against(WrongX())
    assert not agreement.agree
    assert agreeing(agreement) == {"numba": True, "wrong-x": False}
    assert {d.backend for d in agreement.differences} == {"wrong-x"}
    # Whichever comes first.
    assert cross_validate(parity(), [WrongX(), "numba"], repeats=0).differences[0].backend == (
        "wrong-x"
    )


def test_a_gradient_wrong_in_u_alone_is_named() -> None:
    # At x = 0 the gradient of the rows is y v^T + nu 0^T: only those of the sides see nu.
    two = torch.eye(2).double()
    problem = QP(
        torch.ones(2).double(), -torch.tensor([[1.0, 2.0], [3.0, 1.0]]).double(), two,
        torch.full((2,), -math.inf).double(), torch.zeros(2).double(), row_names=["one", "two"],
    )  # fmt: skip
    agreement = against(Twin(), WrongSlope(), problem=problem)
    assert {d.quantity for d in agreement.differences} == {"gradient of u"}
    found = of(agreement, "gradient of u")
    assert (found.backend, found.odd, found.problem) == ("wrong-slope", True, 1)
    assert found.where == "u['two']"
    assert found.problems == (1,)
    assert float(found.value) / float(found.other) == pytest.approx(1.01)
    row = agreement.table()[-1]
    assert row["gradient of u"] > 1e-6
    assert all(v == 0 for k, v in row.items() if k.startswith("gradient") and not k.endswith("u"))
    assert "wrong-slope: the odd one out of 3" in str(agreement)


def test_finite_differences_say_which_of_two_gradients_is_right() -> None:
    agreement = against(Steep(), finite_differences=True)
    assert of(agreement, "gradient of l").odd is False, "two alone cannot tell"
    found = of(agreement, "slope along l")
    assert (found.backend, found.odd) == ("steep", True)
    assert found.size == pytest.approx(0.01, rel=0.5)
    assert agreement.table()[0]["slope along l"] < 1e-6


def test_a_wrong_sign_of_the_multipliers_is_named() -> None:
    agreement = against(Twin(), WrongSign())
    assert agreeing(agreement) == {"numba": True, "twin": True, "wrong-sign": False}
    found = of(agreement, "row_dual")
    assert found.odd
    assert found.where.startswith("row_dual['group: ")
    assert float(found.value) == pytest.approx(-float(found.other))
    assert found.size == pytest.approx(2.0)
    assert "refused by our residuals" in agreement.verdict


def test_claiming_to_have_solved_the_infeasible() -> None:
    for others in ([Liar()], [Twin(), Liar()]):
        agreement = against(*others, problem=apart())
        assert not agreement.agree
        assert [name for name, good in agreeing(agreement).items() if not good] == ["liar"]
        status = of(agreement, "status")
        assert (status.backend, status.value, status.other) == ("liar", "solved", "infeasible")
        assert status.problems == of(agreement, "residuals").problems == (0,)
        assert agreement.table()[-1]["status"] == "solved"
        assert agreement.table()[0]["status"] == "1 infeasible, 3 solved"
        # The other three are compared all the same.
        assert agreement.table()[-1]["gradient of q"] == 0


def test_a_claim_of_infeasibility_needs_its_proof() -> None:
    agreement = against(Pessimist())
    assert of(agreement, "certificate").problems == (0, 1, 2, 3)
    assert agreeing(agreement) == {"numba": True, "pessimist": False}
    assert not cross_validate(parity(), [Pessimist(), Pessimist()], repeats=0).agree


def test_all_say_infeasible_with_proofs_and_agree() -> None:
    agreement = against(Twin(), problem=apart())
    assert agreement.agree
    assert agreement.table()[0]["status"] == "1 infeasible, 3 solved"
    assert agreement.margin[0] == math.inf
    assert max(agreement.margin[1:]) < 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Raises(), "raised RuntimeError: out of luck"),
        (RaisesBackward(), "raised ZeroDivisionError in its backward pass: out of luck"),
        (Stalls(), "stopped before the promised precision"),
    ],
    ids=lambda value: value.name if isinstance(value, Backend) else "",
)
def test_no_answer_is_a_disagreement(broken: Backend, message: str) -> None:
    agreement = against(Twin(), broken)
    assert not agreement.agree
    assert agreeing(agreement) == {"numba": True, "twin": True, broken.name: False}
    assert message in str(agreement)
    assert f"{broken.name}: gives no answer" in agreement.verdict
    # Not even with another that has none either.
    assert not cross_validate(parity(), [broken, type(broken)()], repeats=0).agree


def test_not_a_number_is_a_difference() -> None:
    agreement = against(Twin(), NotNumbers())
    assert of(agreement, "x").size == math.inf
    assert agreeing(agreement) == {"numba": True, "twin": True, "not-numbers": False}
    json.dumps(agreement.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------------------------------
# Nothing to compare, references, arguments
# ---------------------------------------------------------------------------------------------


def test_one_answer_is_no_agreement() -> None:
    for wanted in (["numba"], ["numba", Picky()]):
        agreement = cross_validate(parity(), wanted, repeats=0)
        assert not agreement.agree
        assert not agreement.differences
        assert agreement.undecided == (0, 1, 2, 3)
        assert "NOTHING TO COMPARE" in str(agreement)
    assert agreement.left_out == {"picky": "not on a Monday"}


def test_no_backend_that_takes_the_problem_is_no_agreement() -> None:
    dense = QP(
        torch.eye(2).double().unsqueeze(0), torch.ones(1, 2).double(), torch.ones(1, 2).double(),
        torch.zeros(1).double(), torch.ones(1).double(),
    )  # fmt: skip
    agreement = cross_validate(dense, ["numba"])
    assert not agreement.agree
    assert "dense P" in agreement.left_out["numba"]
    assert agreement.table() == []
    assert "asked: no backend" in str(agreement)
    json.dumps(agreement.to_dict(), allow_nan=False)


def test_a_known_solution_as_reference() -> None:
    problem = parity()
    right = solve(problem)
    for reference in (right, right.x):
        agreement = cross_validate(problem, ["numba"], reference, repeats=0)
        assert agreement.agree
        assert agreement.reference == "reference"
        assert agreement.table()[0]["x"] == 0
    off = cross_validate(problem, ["numba"], right.x + 1e-5, repeats=0)
    assert of(off, "x").against == "reference"
    assert of(off, "x").problems == (0, 1, 2, 3)
    assert not cross_validate(problem, ["numba"], right.x + 1e-5, tolerance=1e-7).agree
    assert cross_validate(problem, ["numba"], right.x + 1e-5, tolerance=1e-4).agree


def test_the_reference_does_not_decide_who_is_blamed() -> None:
    for reference in ("numba", "wrong-x"):
        broken = WrongX()
        agreement = cross_validate(
            parity(), ["numba", Twin(), broken], broken if reference == "wrong-x" else reference,
            repeats=0,
        )  # fmt: skip
        assert agreement.reference == reference
        assert {d.backend for d in agreement.differences} == {"wrong-x"}
    assert against(WrongX(), Twin()).reference in ("numba", "twin"), "by default one that is right"
    assert cross_validate(parity(), [Twin()], "numba").agree, "a named reference is asked too"


def test_backends_of_one_name_are_told_apart() -> None:
    agreement = cross_validate(parity(), [Numba(), Numba(threads=1)], repeats=0)
    assert [row["backend"] for row in agreement.table()] == [
        "Numba(threads=None)",
        "Numba(threads=1)",
    ]
    twins = cross_validate(parity(), [Twin(), Twin()], repeats=0).table()
    assert len({row["backend"] for row in twins}) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"problem": 3}, ProblemError, "a QP or an LP"),
        ({"backends": []}, ProblemError, "at least one"),
        ({"backends": "numba"}, ProblemError, "list"),
        ({"backends": ["numba", "numba"]}, ProblemError, "twice"),
        ({"backends": ["auto"]}, ProblemError, "different names"),
        ({"backends": [3]}, ProblemError, "names or backends"),
        ({"backends": ["abacus"]}, BackendNotFoundError, "abacus"),
        ({"reference": 3}, ProblemError, "reference"),
        ({"reference": torch.ones(3)}, ProblemError, "shape"),
        ({"reference": torch.full((4, 20), math.nan)}, ProblemError, "finite"),
        ({"tolerance": -1.0}, ProblemError, "tolerance"),
        ({"tolerance": math.nan}, ProblemError, "tolerance"),
        ({"gradient_tolerance": 2}, ProblemError, "gradient_tolerance"),
        ({"cotangents": 0}, ProblemError, "cotangents"),
        ({"repeats": -1}, ProblemError, "repeats"),
        ({"seed": 0.5}, ProblemError, "seed"),
        ({"smoothing": 1.0}, ProblemError, "smoothing"),
        ({"inputs": [1]}, ProblemError, "mapping"),
        ({"inputs": {"scores": torch.ones(2)}}, ProblemError, "scores"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: dict[str, Any], error: type[FairoptError], words: str
) -> None:
    with pytest.raises(error, match=words):
        cross_validate(**{"problem": parity(), **arguments})


def test_a_reference_must_be_able_to_answer() -> None:
    with pytest.raises(UnsupportedProblemError, match="Monday"):
        cross_validate(parity(), ["numba"], Picky())


# ---------------------------------------------------------------------------------------------
# What is not unique, degenerate, linear, in float32
# ---------------------------------------------------------------------------------------------


class Other(Backend):
    """The closed form, which then does something to the multipliers."""

    name: ClassVar[str] = "other"
    capabilities: ClassVar[Capabilities] = replace(Numba.capabilities, certifies=False)

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def solve(self, problem: Problem) -> Solution:
        solution = Numba().solve(problem)
        return replace(solution, row_dual=self.change(solution.row_dual), context=None)


def test_multipliers_that_are_not_unique_are_not_compared() -> None:
    one = torch.ones(1, 3).double()
    side = torch.ones(2).double()
    problem = QP(
        torch.ones(3).double(), -torch.tensor([1.0, 2.0, 3.0]).double(), torch.cat([one, one]),
        side - 2, side,
    )  # fmt: skip
    total = solve(problem).row_dual.sum()
    first = Other(lambda y: torch.stack([total, 0 * total]).expand_as(y).clone())
    agreement = cross_validate(problem, ["numba", first], repeats=0)
    assert agreement.agree
    row = agreement.table()[-1]
    assert row["row_dual"] is None, "not held against each other"
    assert row["gradient of u"] is None
    assert row["gradient of q"] < 1e-12, "while this one is defined"
    assert "multipliers are not unique in problem 0" in str(agreement)


def test_the_margin_is_found_and_weak_activity_reported() -> None:
    # x = clip(0.5, ub = 0.5 + gap): the bound touches without pushing at gap = 0.
    P, A = torch.ones(1).double(), torch.zeros(1, 1).double()
    gaps = torch.tensor([[0.0], [1e-9], [1e-3], [-1e-3]]).double()
    none = torch.full((1,), math.inf).double()
    problem = QP(P, torch.full((4, 1), -0.5).double(), A, -none, none, None, 0.5 + gaps)
    agreement = cross_validate(problem, ["numba", Twin()], repeats=0)
    assert agreement.margin == pytest.approx([0.0, 2e-9, 2e-3, 2e-3], rel=1e-6)
    assert agreement.nearest == ("bound of x[0]",) * 4
    assert agreement.degenerate == (0, 1)
    assert "2 of 4 problems degenerate" in str(agreement)


def test_a_difference_at_a_degenerate_point_still_counts_and_is_explained() -> None:
    ones = torch.ones(2).double()
    problem = QP(ones, -ones / 2, torch.ones(1, 2).double(), ones[:1] - 2, ones[:1])
    pushes = Other(lambda y: y + 1e-9)  # zero multiplier and zero slack, called active

    agreement = cross_validate(problem, ["numba", pushes], repeats=0)
    assert agreement.degenerate == (0,)
    assert of(agreement, "gradient of q").size > 0.1
    assert "weakly active constraints count as inactive" in agreement.verdict


@given(st.integers(0, 2**31))
def test_standing_of_random_projections(seed: int) -> None:
    """The margin is what moving u by it needs to change the active set, and no less."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.1
    q = -torch.rand(1, 6, generator=generator, dtype=torch.float64)
    u = torch.rand(1, 1, generator=generator, dtype=torch.float64)
    P = torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.5
    none = torch.full((1, 1), -math.inf, dtype=torch.float64)
    problem = QP(P, q, a, none, u)
    solution = solve(problem, backend="numba")
    found = standing(problem, solution.x, solution.row_dual, solution.bound_dual, touch=1e-7)
    assert bool(found.unique.all()) and bool(found.unique_duals.all())
    size = float(torch.cat([P.sqrt() * solution.x.abs(), -q / P.sqrt()]).max())
    length = float((a.square() / P).sum().sqrt())
    # One row: its slack or its multiplier falls to zero where u meets a.x at the free minimum.
    away = abs(float(u - (a * -q / P).sum())) / length / size
    assert float(found.margin) == pytest.approx(away, rel=1e-6, abs=1e-12)


def test_a_linear_program_with_many_solutions_compares_objectives() -> None:
    class Vertex(Backend):
        """Minimises x0 + x1 with x0 + x1 >= 1 at a given point of the edge."""

        capabilities = Capabilities(
            linear=True, rows=frozenset({"dense"}), devices=frozenset({"cpu"})
        )

        def __init__(self, name: str, share: float, x1: float) -> None:
            self.name = name  # type: ignore[misc]
            self.x = torch.tensor([[share, x1]]).double()

        def solve(self, problem: Problem) -> Solution:
            y = -torch.ones(1, 1).double()
            return Solution(problem, self.x, y, (Status.SOLVED,), self.name)

    one = torch.ones(1, 2).double()
    flat = LP(one, one, one[0, :1], torch.full((1,), math.inf).double(), 0.0)
    agreement = cross_validate(flat, [Vertex("a", 0.25, 0.75), Vertex("b", 0.5, 0.5)], repeats=0)
    assert agreement.agree
    assert agreement.table()[1]["x"] is None
    assert agreement.table()[1]["objective"] == 0
    assert "x is not shown to be unique in problem 0" in str(agreement)
    assert not any("gradient" in key for row in agreement.table() for key in row)
    steep = LP(torch.tensor([1.0, 2.0]).double(), one, one[0, :1], flat.u, 0.0)
    assert cross_validate(steep, [Vertex("a", 1, 0), Vertex("b", 0.5, 0.5)], repeats=0).differences


def test_an_lp_is_smoothed_on_request() -> None:
    one = torch.ones(1, 3).double()
    program = LP(torch.tensor([1.0, 2.0, 3.0]).double(), one, one[0, :1], one[0, :1], 0.0, 1.0)
    agreement = cross_validate(program, ["numba", Twin()], smoothing=0.1, repeats=0)
    assert agreement.agree
    assert agreement.table()[1]["gradient of q"] == 0


def test_float32_has_looser_defaults() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 20, generator=generator) + 0.2 * GROUPS
    problem = formulate(DemographicParity(0.05), scores, GROUPS, bounds=(0, 1))
    agreement = cross_validate(problem, ["numba", Twin()], finite_differences=True, repeats=0)
    assert agreement.agree
    assert (agreement.tolerance, agreement.gradient_tolerance) == (1e-5, 1e-4)
    assert "float32" in agreement.kind


def test_gradients_reach_what_the_problem_was_computed_from() -> None:
    problem, inputs = draw(Drawn(samples=20, batch=2))
    agreement = cross_validate(problem, ["numba", Twin()], inputs=inputs, repeats=0)
    assert agreement.agree
    names = {"scores", "tolerance", "lower", "upper"}
    assert all(agreement.table()[1][f"gradient of {name}"] == 0 for name in names)

    wrong = against(Twin(), Steep(), problem=problem, inputs=inputs)
    found = of(wrong, "gradient of tolerance")
    assert (found.backend, found.problem, found.where) == ("steep", None, "tolerance")
    assert found.size == pytest.approx(0.01, rel=0.02)


def test_times_and_iterations() -> None:
    timed, untimed = (
        cross_validate(parity(), ["numba", Twin()], repeats=repeats).table() for repeats in (1, 0)
    )
    for row in timed:
        assert row["forward_seconds"] > 0
        assert row["backward_seconds"] > 0
        assert row["iterations"] > 0
        assert row["residual"] < 1e-12
    assert all(row["forward_seconds"] is None for row in untimed)


def test_the_result_is_plain_data() -> None:
    agreement = against(Twin(), WrongX())
    plain = agreement.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["agree"] is False
    assert plain["verdict"] == agreement.verdict
    assert [row["backend"] for row in plain["table"]] == ["numba", "twin", "wrong-x"]
    keys = set(vars(agreement)) - {"rows"} | {"agree", "verdict", "table"}
    assert set(plain) == keys
    agreement.table()[0]["x"] = "changed"
    assert agreement.table()[0]["x"] != "changed"


# ---------------------------------------------------------------------------------------------
# The installed ones
# ---------------------------------------------------------------------------------------------


def well_posed(seed: int) -> Iterable[QP]:
    """A projection with dense rows, and a sparse one with a coupled P."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, x = normal(3, 4, 8), normal(3, 8)
    middle = (A @ x.unsqueeze(-1)).squeeze(-1)
    yield QP(normal(3, 8).exp(), normal(3, 8), A, middle - 0.1, middle + 0.2, x - 1, x + 1)
    root = normal(3, 8, 8)
    coupled = root @ root.mT + torch.eye(8).double()
    sparse = SparseRows.from_tensor(A[0] * (A[0] > 0))
    middle = sparse.apply(x[:1])[0]
    yield QP(coupled, normal(3, 8), sparse, middle - 0.1, middle + 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_the_installed_backends_agree(seed: int) -> None:
    for problem in well_posed(seed):
        agreement = cross_validate(problem, finite_differences=True, repeats=0)
        if len(agreement.rows) < 2:
            assert not agreement.agree
            continue
        assert agreement.agree, str(agreement)
    asked = {row["backend"] for row in agreement.table()} | set(agreement.left_out)
    assert asked == set(backends.names())
