"""``check_notion``: the checks that a parity notion of your own must pass. It needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from fairopt.agreement.comparison import cross_validate
from fairopt.auditing.report import audit
from fairopt.errors import InfeasibleError
from fairopt.formulation.inputs import Bounds
from fairopt.formulation.program import formulate
from fairopt.layer.module import project
from fairopt.notions.catalogue import Constraint
from fairopt.programs.problem import QP
from fairopt.tolerances import SAME


def check_notion(
    notion: Constraint,
    scores: Tensor,
    groups: Tensor | Mapping[str, Tensor],
    targets: Tensor | None = None,
    *,
    bounds: Bounds = (0.0, 1.0),
    weights: Tensor | None = None,
    parameters: Sequence[str] | None = None,
) -> None:
    """Run a notion through shapes, sizes, weights, gradients and all backends that can solve it.

    Give data that violate the notion and on which it can hold: a few dozen samples, for finite
    differences are taken in each score.

    1.  Rows: there are some, with different names. They are violated before and hold afterwards.
    2.  Projection: predictions that hold are left as they are (not asked where scores are binned).
    3.  Shapes: ``(n,)``, ``(n, 1)``, ``(B, n)`` and float32 give the same predictions.
    4.  Samples: their order does not matter, and one of weight 2 is as good as two of weight 1.
    5.  Gradients: right for scores and parameters, by finite differences.
    6.  Backends: all that take the problem agree in predictions and gradients.

    Args:
        notion: with its parameters.
        scores: ``(n,)``, floating-point.
        groups, targets, bounds, weights: as for ``formulate``, for one problem.
        parameters: the fields that get gradients; by default all that hold a float or a tensor.

    Raises:
        AssertionError: it does not pass; the message says what is wrong, and what to look for.
        ProblemError: the data do not fit the notion.
    """
    call = Call(notion, scores.detach().double(), groups, targets, bounds, weights)
    if call.scores.dim() != 1:
        call.fail(f"scores: expected shape (n,), got {tuple(scores.shape)}")
    fair = check_rows(call)
    check_shapes(call, fair)
    check_samples(call, fair)
    check_gradients(call, parameters)
    agreement = cross_validate(call.problem(), repeats=0)
    if not agreement.agree:
        call.fail(f"backends disagree:\n{agreement}")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one projection."""

    notion: Constraint
    scores: Tensor
    groups: Tensor | Mapping[str, Tensor]
    targets: Tensor | None
    bounds: Bounds
    weights: Tensor | None

    def problem(self) -> QP:
        return formulate(
            self.notion, self.scores, self.groups, self.targets, bounds=self.bounds,
            weights=self.weights,
        )  # fmt: skip

    def project(self) -> Tensor:
        return project(
            self.scores, self.groups, self.notion, self.targets, bounds=self.bounds,
            weights=self.weights,
        )  # fmt: skip

    def of(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with every tensor that has one entry per sample changed."""
        n = len(self.scores)

        def changed(value: object) -> object:
            each = isinstance(value, Tensor) and value.dim() > 0 and len(value) == n
            return change(value) if each and isinstance(value, Tensor) else value

        return Call(
            self.notion,
            change(self.scores),
            {name: changed(t) for name, t in self.groups.items()}  # type: ignore[misc]
            if isinstance(self.groups, Mapping)
            else change(self.groups),
            None if self.targets is None else change(self.targets),
            None if self.bounds is None else tuple(map(changed, self.bounds)),  # type: ignore[arg-type]
            None if self.weights is None else change(self.weights),
        )

    def fail(self, message: str) -> NoReturn:
        raise AssertionError(f"{type(self.notion).__name__}: {message}")

    def same(self, got: Tensor, want: Tensor, message: str) -> None:
        """Fail with the message unless the predictions are the same."""
        allowed = SAME[got.dtype] * max(1e-300, float(want.abs().max()))
        off = float((got.double() - want).abs().max())
        if not off <= allowed:
            self.fail(f"{message} (off by {off:.1e}, allowed {allowed:.0e})")


def check_rows(call: Call) -> Tensor:
    """Check the rows and their effect; return the fair predictions."""
    problem = call.problem()
    names = problem.row_names
    if not names:
        call.fail(f"no rows for these data; skipped: {', '.join(problem.skipped) or 'nothing'}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        call.fail(f"rows need different names, got several of {', '.join(map(repr, twice))}")
    before = audit(call.scores, call.groups, call.notion, call.targets, weights=call.weights)
    if before.holds:
        call.fail(f"it holds for these scores, so that nothing is checked; take others\n{before}")
    try:
        fair = call.project()
    except InfeasibleError as error:
        call.fail(f"it cannot hold for these data; take others, or loosen it: {error}")
    after = audit(
        fair, call.groups, call.notion, call.targets, weights=call.weights, scores=call.scores
    )
    if not after.holds:
        call.fail(f"it does not hold afterwards\n{after}")
    again = replace(call, scores=fair)
    if torch.equal(again.problem().rows.to_dense().matrix, problem.rows.to_dense().matrix):
        call.same(again.project(), fair, "predictions that hold are moved")
    return fair


def check_shapes(call: Call, fair: Tensor) -> None:
    """Shapes and dtypes of scores."""
    column = replace(call, scores=call.scores.unsqueeze(1)).project()
    call.same(column.squeeze(1), fair, "scores (n, 1) give other predictions than (n,)")
    for one in replace(call, scores=call.scores.expand(3, -1)).project():
        call.same(one, fair, "a batch of equal problems gives other predictions than one of them")
    single = replace(call, scores=call.scores.float()).project()
    call.same(single, fair, "scores in float32 give other predictions than in float64")


def check_samples(call: Call, fair: Tensor) -> None:
    """The order of samples, and samples that occur twice."""
    n = len(call.scores)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(fair.device)
    call.same(
        call.of(lambda t: t[order]).project(), fair[order],
        "the order of the samples matters; give what belongs to a sample as an attribute in "
        "groups, not as a field",
    )  # fmt: skip
    twice = call.of(lambda t: torch.cat([t, t])).project()
    weights = torch.ones_like(call.scores) if call.weights is None else call.weights
    heavy = replace(call, weights=2 * weights.double()).project()
    call.same(twice[:n], heavy, "two equal samples count differently from one of weight 2")


def check_gradients(call: Call, parameters: Sequence[str] | None) -> None:
    """Finite differences in the scores, then in each parameter."""
    notion = call.notion
    if parameters is None:
        parameters = [
            each.name
            for each in fields(notion)
            if isinstance(getattr(notion, each.name), (float, Tensor))
        ]

    def differs(function: Callable[[Tensor], Tensor], at: Tensor, message: str) -> None:
        try:
            gradcheck(function, (at.detach().double().requires_grad_(),), atol=1e-6, rtol=1e-4)
        except GradcheckError as error:
            call.fail(f"{message}; or the data sit where a row just becomes active\n{error}")

    differs(
        lambda scores: replace(call, scores=scores).project(), call.scores,
        "the gradient for scores is wrong: rows must not depend on the scores",
    )  # fmt: skip
    for name in parameters:
        value = torch.as_tensor(getattr(notion, name), dtype=torch.float64)

        def with_value(number: Tensor, name: str = name) -> Tensor:
            # A new tensor each time: rows may be kept as long as the parameters are the same ones.
            return replace(call, notion=replace(notion, **{name: number * 1.0})).project()

        differs(
            with_value, value,
            f"the gradient for {name} is wrong: rows must use the parameter itself, not its value "
            "as by float()",
        )  # fmt: skip
