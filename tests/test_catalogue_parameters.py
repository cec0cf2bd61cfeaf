"""Parameters of notions and their gradients, notions of one's own, and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalogue_examples import AGE, CHANCE, MIXED, PEOPLE, SCORES, SEX, WEIGHTS, Y, soft_mean
from torch import Tensor
from torch.autograd import gradcheck

from fairopt import (
    Budget,
    ConditionalParity,
    Constraint,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    FairnessLayer,
    GroupCalibration,
    ImpactRatio,
    InfeasibleError,
    MeanResidual,
    MinimumRate,
    Parity,
    ProblemError,
    Row,
    formulate,
    project,
)

# ---------------------------------------------------------------------------------------------
# Parameters and gradients
# ---------------------------------------------------------------------------------------------


def parameter(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


PARAMETERS = {
    "ConditionalParity": (lambda t: ConditionalParity(t, on="sex", given="race"), 0.03),
    "ErrorParity": (lambda t: ErrorParity(t, on="sex"), 0.01),
    "ImpactRatio": (lambda t: ImpactRatio(t, on="sex"), 0.8),
    "MinimumRate": (lambda t: MinimumRate(t, on="sex"), 0.4),
    "Covariance": (lambda t: Covariance(t, on="age"), 0.5),
    "GroupCalibration": (lambda t: GroupCalibration(t, bins=2, on="sex"), 0.1),
    "Budget": (lambda t: Budget(mean=(None, t)), 0.3),
    "soft groups": (lambda t: DemographicParity(t, on="soft"), 0.03),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_gradcheck_of_parameters(name: str, weighted: bool) -> None:
    make, value = PARAMETERS[name]
    groups = {**PEOPLE, "age": AGE, "soft": MIXED}
    if name != "Covariance":
        del groups["age"]
    number = parameter(value)
    scores = (SCORES * 0.9 + 0.03 * torch.sin(7.0 * torch.arange(10))).double().requires_grad_()
    w = (WEIGHTS / 3).requires_grad_() if weighted else None
    inputs = [scores, number, *([w] if weighted else [])]

    def fair(scores: Tensor, number: Tensor, w: Tensor | None = None) -> Tensor:
        return project(scores, groups, make(number), Y, bounds=(0, 1), weights=w)

    before = fair(*inputs)
    assert (before - scores).abs().max() > 1e-3, "the row should be active"
    assert gradcheck(fair, inputs, atol=1e-6, rtol=1e-5)
    before.sum().backward() if name in ("MinimumRate", "Budget") else before[0].backward()
    assert number.grad.abs() > 1e-6


@pytest.mark.parametrize("notion", [EqualizedOdds, EqualOpportunity, ErrorParity, MeanResidual])
def test_gradcheck_of_soft_targets(notion: Any) -> None:
    y = (CHANCE * 0.8 + 0.1).requires_grad_()
    scores = (SCORES * 0.9 + 0.03).requires_grad_()
    assert gradcheck(
        lambda s, t: project(s, SEX, notion(0.013), t, bounds=(0, 1)), (scores, y), atol=1e-6
    )


def test_gradcheck_of_soft_groups_and_continuous_attributes() -> None:
    chances = MIXED[:, :1].clone().requires_grad_()
    age = (AGE / 10).requires_grad_()

    def fair(chances: Tensor, age: Tensor) -> Tensor:
        groups = {"race": torch.cat([chances, 1 - chances], -1), "age": age}
        notions = [DemographicParity(0.02, on="race"), Covariance(0.05, on="age")]
        return project(SCORES, groups, notions, bounds=(0, 1))

    assert gradcheck(fair, (chances, age), atol=1e-6, rtol=1e-5)


def test_parameters_are_read_anew_on_each_call() -> None:
    """The rows are kept from call to call; their numbers are not."""
    threshold = parameter(0.5)
    layer = FairnessLayer(ImpactRatio(threshold, on="sex"), bounds=(0, 1))
    for value in (0.5, 0.8, 0.95):
        with torch.no_grad():
            threshold.fill_(value)
        fair = layer(SCORES, PEOPLE)
        assert (fair[4:].mean() / fair[:4].mean()).item() == pytest.approx(value, abs=1e-12)


# ---------------------------------------------------------------------------------------------
# Notions of one's own
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exposure(Parity):
    """Equal exposure: mean of v x, with v the weight of a position."""

    position: str = "position"

    def value(self, samples: Any) -> Any:
        return samples.mean(times=self.position)


@dataclass(frozen=True, eq=False)
class Derived(Constraint):
    """Computes with its parameter, so that the rows cannot be kept."""

    share: Tensor | float

    def rows(self, batch: Any) -> Any:
        for name, a, b in batch.pairs(None):
            yield Row(name, (1 - self.share) * a.mean() - b.mean() / (2 * self.share) + 0.5, 0.0)


def test_exposure_in_a_ranking() -> None:
    position = 1 / torch.log2(2 + torch.arange(10, dtype=torch.float64))
    groups = {"sex": SEX, "position": position}
    fair = project(SCORES, groups, Exposure(0.02), bounds=(0, 1))
    a, b = (soft_mean(fair * position, (SEX == g).double()) for g in (0, 1))
    assert a - b == pytest.approx(0.02, abs=1e-12)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_notion_that_computes_with_its_parameter(tensor: bool) -> None:
    share = parameter(0.3) if tensor else 0.3
    layer = FairnessLayer(Derived(share), bounds=(0, 1))
    for value in (0.3, 0.45) if tensor else (0.3,):
        if tensor:
            with torch.no_grad():
                share.fill_(value)
        layer(SCORES, SEX).sum().backward() if tensor else layer(SCORES, SEX)
        problem = layer.last.problem
        left = problem.rows.apply(SCORES[None])[0, 0] - problem.l[0, 0]
        expected = (1 - value) * 0.75 - 0.25 / (2 * value) + 0.5
        assert left.item() == pytest.approx(expected, abs=1e-14)
    if tensor:
        scores = SCORES.clone().requires_grad_()
        assert gradcheck(
            lambda s, t: formulate(Derived(t), s, SEX, bounds=None).rows.apply(SCORES[None]),
            (scores, parameter(0.4)),
        )


@dataclass(frozen=True, eq=False)
class Floor(Constraint):
    """The mean of v x of each group, at least a number."""

    least: float

    def rows(self, batch: Any) -> Any:
        for group in batch.groups(None):
            yield Row(group.name, group.mean(times="v"), lower=self.least)


def test_a_row_that_can_never_hold_is_refused_by_name() -> None:
    groups = {"sex": SEX, "v": torch.where(SEX == 0, 1.0, 0.0)}
    with pytest.raises(ProblemError, match="rows 'sex: 1': no prediction has any weight in them"):
        project(SCORES, groups, Floor(0.1), bounds=(0, 1))
    project(SCORES, groups, Floor(0.0), bounds=(0, 1))  # holds as it is


def test_notions_are_equal_by_class_and_parameters() -> None:
    assert DemographicParity(0.1) == DemographicParity(0.1)
    assert hash(GroupCalibration(0.1, bins=[0.5])) == hash(GroupCalibration(0.1, bins=[0.5]))
    assert DemographicParity(0.1) != DemographicParity(0.2)
    assert DemographicParity(0.1) != EqualOpportunity(0.1)
    one, two = parameter(0.1), parameter(0.1)
    assert DemographicParity(one) == DemographicParity(one)
    assert DemographicParity(one) != DemographicParity(two)
    import copy

    layer = FairnessLayer(DemographicParity(one), bounds=(0, 1))
    layer(SCORES, SEX)
    other = copy.deepcopy(layer)
    assert other.constraints != layer.constraints  # their tensors are two
    with torch.no_grad():
        other.constraints[0].tolerance.fill_(0.3)
    fair = other(SCORES, SEX)
    assert (fair[:4].mean() - fair[4:].mean()).item() == pytest.approx(0.3, abs=1e-12)
    fair.sum().backward()
    assert one.grad is None


def test_more_cells_than_can_be_numbered_are_those_that_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 400
    groups = {f"a{i}": torch.randint(0, 20, (n,), generator=generator) for i in range(20)}
    scores = torch.rand(n, generator=generator, dtype=torch.float64) + groups["a0"] / 40
    fair = project(scores, groups, DemographicParity(0.2, compare="overall"), bounds=(0, 2))
    for codes in groups.values():
        means = [fair[codes == g].mean() for g in range(20) if (codes == g).any()]
        assert all(abs(m - fair.mean()) <= 0.2 + 1e-12 for m in means)
    y = torch.rand(n, generator=generator, dtype=torch.float64)
    w = torch.rand(n, generator=generator, dtype=torch.float64)
    few = {name: groups[name] for name in ("a0", "a1", "a2")}  # 8,000 cells
    one = formulate(MeanResidual(0.1), scores, few, y, bounds=None, weights=w)
    for name in few:
        alone = formulate(MeanResidual(0.1), scores, {name: few[name]}, y, bounds=None, weights=w)
        rows = [i for i, row in enumerate(one.row_names) if row.startswith(f"{name}:")]
        torch.testing.assert_close(
            one.rows.to_dense().matrix[0, rows], alone.rows.to_dense().matrix[0], rtol=1e-12, atol=0
        )
        torch.testing.assert_close(one.u[0, rows], alone.u[0], rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ImpactRatio(1.2), "ImpactRatio: threshold: expected a number from 0 to 1, got"),
        (lambda: ImpactRatio("0.8"), "ImpactRatio: threshold: expected a number, got str"),
        (lambda: ImpactRatio(torch.ones(2)), "threshold: expected a number or a floating-point"),
        (lambda: ImpactRatio(0.8, on=()), "ImpactRatio: on: expected the name of an attribute"),
        (lambda: MinimumRate(math.inf), "MinimumRate: rate: expected a finite number, got inf"),
        (lambda: MinimumRate(math.nan), "MinimumRate: rate: expected a finite number, got nan"),
        (lambda: MinimumRate(0.2, on=3), "MinimumRate: on: expected the name of an attribute"),
        (lambda: Covariance(-1, on="age"), "Covariance: tolerance: expected a number of at least"),
        (lambda: Covariance(1, on=None), "Covariance: on: expected the name of a continuous"),
        (lambda: Covariance(1, on="age", given=("a", "a")), "Covariance: given: expected the name"),
        (lambda: ConditionalParity(0.1, given=None), "ConditionalParity: given: expected the name"),
        (lambda: ConditionalParity(0.1, given=()), "ConditionalParity: given: expected the name"),
        (lambda: ErrorParity(-0.1), "ErrorParity: tolerance: expected a number of at least 0"),
        (lambda: GroupCalibration(-0.1, bins=2), "GroupCalibration: tolerance: expected a number"),
        (lambda: GroupCalibration(0.1, bins=1), "bins: expected a whole number of at least 2, or"),
        (lambda: GroupCalibration(0.1, bins=True), "GroupCalibration: bins: expected a whole"),
        (lambda: GroupCalibration(0.1, bins=[]), "GroupCalibration: bins: expected a whole"),
        (lambda: GroupCalibration(0.1, bins=[0.5, 0.5]), "increasing finite edges, got"),
        (lambda: GroupCalibration(0.1, bins=[0.5, math.inf]), "increasing finite edges, got"),
        (lambda: GroupCalibration(0.1, bins="ab"), "increasing finite edges, got 'ab'"),
        (lambda: Budget(), "Budget: expected a total or a mean, one of the two, got total=None"),
        (lambda: Budget(total=1, mean=1), "Budget: expected a total or a mean, one of the two"),
        (lambda: Budget(total=(None, None)), r"Budget: total: expected a number or a pair \(lower"),
        (lambda: Budget(mean=(0, 1, 2)), r"Budget: mean: expected a number or a pair \(lower, upp"),
        (lambda: Budget(mean=[0, 1]), r"Budget: mean: expected a number or a pair \(lower, upper"),
        (lambda: Budget(total=(2, 1)), "Budget: total: expected lower <= upper, got lower 2.0"),
        (lambda: Budget(total="much"), "Budget: total: expected a number, got str"),
        (lambda: Budget(mean=math.nan), "Budget: mean: expected a finite number, got nan"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(make: Any, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        make()


@pytest.mark.parametrize(
    ("notion", "groups", "targets", "bounds", "match"),
    [
        (ImpactRatio(0.8), SEX, None, None,
         "bounds: ImpactRatio needs a lower bound of at least 0, got -inf; a ratio of means"),
        (ImpactRatio(0.8), SEX, None, (-0.1, 1), "lower bound of at least 0, got -0.1;"),
        (ImpactRatio(0.8), SEX, None, (torch.tensor(-1.0), 1), "lower bound of at least 0, got -1"),
        (ErrorParity(0.1), SEX, None, (0, 1), "targets: ErrorParity needs them, got none"),
        (ErrorParity(0.1), SEX, AGE, (0, 1), "targets: ErrorParity needs targets that are 0 or 1,"),
        (GroupCalibration(0.1, bins=2), SEX, None, (0, 1), "GroupCalibration needs them, got none"),
        (EqualizedOdds(0.1), SEX, CHANCE + 0.5, (0, 1), "or chances from 0 to 1, got 1.4"),
        (Covariance(0.1, on="age"), PEOPLE, None, None,
         "Covariance: 'age': expected a continuous attribute, .* in groups; got no such attribute"),
        (Covariance(0.1, on="sex"), PEOPLE, None, None, "in groups; got group codes"),
        (Covariance(0.1, on="age", given="job"), {"age": AGE, "sex": SEX}, None, None,
         "Covariance: on='job': expected attributes among 'sex'; groups has no 'job'"),
        (DemographicParity(0.1, on="age"), {"age": AGE, "sex": SEX}, None, None,
         "DemographicParity: 'age': expected integer or bool codes of groups, got real numbers;"),
        (DemographicParity(0.1), {"age": AGE}, None, None,
         "on=None: expected at least one attribute with group codes, got continuous ones only"),
        (DemographicParity(0.1), {"age": AGE, "sex": SEX}, None, None,
         r"groups\['age'\]: expected integer or bool codes, got torch.float64; convert categories"),
        (Covariance(0.1, on="age"), {"age": AGE.clone().fill_(math.nan)}, None, None,
         r"groups\['age'\]: expected finite values, got NaN or infinity"),
        (Covariance(0.1, on="age"), {"age": AGE[:9]}, None, None,
         r"groups\['age'\]: expected shape \(10,\)"),
        (DemographicParity(0.1), MIXED + 0.1, None, None,
         "groups: expected chances of membership from 0 to 1, got values from 0.15.* to 1.05"),
        (DemographicParity(0.1), MIXED * 0.9, None, None,
         "groups: expected chances of membership that sum to 1 for each sample, got a sum that is "
         "0.1 off; normalise"),
        (DemographicParity(0.1), MIXED.clone().fill_(math.nan), None, None, "from 0 to 1, got val"),
        (DemographicParity(0.1), MIXED[None].repeat(3, 1, 1), None, None,
         r"groups: expected chances of membership of shape \(10, G\), got \(3, 10, 2\)"),
        (DemographicParity(0.1), MIXED.to("meta"), None, None, "groups: expected device cpu"),
        (DemographicParity(0.1), MIXED[:9], None, None, r"groups: expected shape \(10,\)"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(
    notion: Any, groups: Any, targets: Any, bounds: Any, match: str
) -> None:
    with pytest.raises(ProblemError, match=match):
        project(SCORES, groups, notion, targets, bounds=bounds)


def test_declared_counts_and_columns_of_chances() -> None:
    project(SCORES, MIXED, DemographicParity(0.1), bounds=None, group_counts=2)
    with pytest.raises(
        ProblemError, match="expected chances of 3 groups, the number declared, got"
    ):
        project(SCORES, MIXED, DemographicParity(0.1), bounds=None, group_counts=3)


@pytest.mark.parametrize(
    ("make", "value", "match"),
    [
        (lambda t: ImpactRatio(t), 1.1, "threshold: expected a number from 0 to 1, got 1.1"),
        (lambda t: MinimumRate(t), math.nan, "rate: expected a finite number"),
        (lambda t: Budget(total=(t, 1.0)), 2.0, "Budget: total: expected lower <= upper"),
        (lambda t: GroupCalibration(t, bins=2), -1.0, "tolerance: expected a number of at least 0"),
    ],
)
def test_a_parameter_that_training_moved_out_of_range(make: Any, value: float, match: str) -> None:
    number = parameter(0.5)
    notion = make(number)
    project(SCORES, SEX, notion, Y, bounds=(0, 1))
    with torch.no_grad():
        number.fill_(value)
    with pytest.raises(ProblemError, match=match):
        project(SCORES, SEX, notion, Y, bounds=(0, 1))


@dataclass(frozen=True, eq=False)
class Wrong(Constraint):
    """Rows that make no sense, in several ways."""

    make: Any

    def rows(self, batch: Any) -> Any:
        yield self.make(batch.everyone)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda e: "row", "Wrong: rows: expected Row objects, got 'row'"),
        (lambda e: Row("a", 0.3), "row 'a': expected a functional of the predictions, .* got 0.3"),
        (lambda e: Row("a", e.share(e)), "row 'a': expected a functional .* got a constant"),
        (lambda e: Row("a", e.mean() * e.mean()), "a product of two is not affine"),
        (lambda e: Row("a", e.mean() / e.mean()), "a ratio of two is not affine"),
        (
            lambda e: Row("a", e.mean() * torch.ones(2)),
            "what is multiplied with: expected a number",
        ),
        (lambda e: Row("a", e.mean() + "b"), "what is added: expected a number"),
        (lambda e: Row("a", e.mean(), lower="b"), "row 'a': lower: expected a number"),
        (lambda e: Row("a", e.mean(), 1.0, 0.0), "row 'a': expected lower <= upper, got lower 1.0"),
        (lambda e: Row("a", e.mean(), torch.tensor(1.0), 0.0), "row 'a': expected lower <= upper"),
        (lambda e: Row("a", e.mean(times="v")), "Wrong: 'v': expected a continuous attribute"),
    ],
)
def test_rows_that_make_no_sense(make: Any, match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        project(SCORES, SEX, Wrong(make), bounds=None)


def test_a_notion_without_rows() -> None:
    class Empty(Constraint):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty: define rows\(self, batch\)"):
        project(SCORES, SEX, Empty(), bounds=None)


def test_a_rate_beyond_the_bounds_is_infeasible_by_name() -> None:
    with pytest.raises(InfeasibleError, match=r"sex: . \| minimum") as error:
        project(SCORES, PEOPLE, MinimumRate(1.5, on="sex"), bounds=(0, 1))
    assert error.value.rows
