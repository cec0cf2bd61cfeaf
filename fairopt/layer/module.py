"""FairnessLayer and project: formulate, solve, and give back the shape and dtype that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fairopt.backends import Backend
from fairopt.formulation.inputs import Bounds, GroupCounts, Groups
from fairopt.formulation.program import formulate_around
from fairopt.formulation.specification import Objective, Specification, as_constraints
from fairopt.formulation.template import MissingGroup
from fairopt.notions.catalogue import Constraint
from fairopt.programs.solution import Solution
from fairopt.solving.autograd import check_backend, solve_detached
from fairopt.solving.elastic import solve_elastic

if TYPE_CHECKING:
    from fairopt.online.module import OnlineParity

# The attributes of a layer that its specification is made of.
OPTIONS = frozenset(each.name for each in fields(Specification)) - {"plans"}


class FairnessLayer(nn.Module):
    """Moves predictions as little as possible so that parity holds, exactly and differentiably.

        x* = argmin  1/2 sum_i w_i (x_i - scores_i)^2   subject to the constraints and bounds

    Args:
        constraints: one parity notion or several, each with its tolerance.
        bounds: ``(lower, upper)`` of the predictions, each a number, a tensor or ``None``; ``None``
            for no bounds. Required: clipping is part of what is guaranteed.
        objective: what to minimise. ``"l2"`` is the formula above; ``"l1"`` the total change
            ``sum_i w_i |x_i - scores_i|``; ``"linf"`` the largest, ``max_i |x_i - scores_i|``.
            ``"utility"`` maximises ``sum_i w_i scores_i x_i``: a selection, not a correction.
        backend: a name, or a backend object with its options; ``"auto"`` picks.
        missing_group: what to do when a batch lacks a group: ``"skip"`` leaves its rows out and
            says so in ``layer.last.skipped``, ``"raise"`` refuses the batch.
        group_counts: how many groups each attribute has, by name, or one number for all. Without it
            a batch that lacks the groups with the highest codes cannot be told from complete.
        classes: the number C of classes. Scores are then ``(n, C)`` or ``(B, n, C)``, predictions
            points of the simplex, targets classes (or the chance of each), and each notion holds
            for each class.
        smoothing: s > 0 adds ``s/2 |z|^2`` to the linear objectives, where z is x for
            ``"utility"``, the change from the clipped scores for ``"l1"``, and that with the
            largest change beyond what the bounds force for ``"linf"``. Needed for gradients.
        elastic: what to do where no predictions within the bounds satisfy all constraints. Without
            it an ``InfeasibleError``; with it, of the predictions with the least total violation
            (the sum of all rows' excess, see ``solving.elastic``) those nearest to the scores, and
            ``layer.last.exceeded`` says what does not hold and by how much. Everywhere else
            nothing changes.
        online: a stream with the same constraints (with the same tensors, if there are any) and
            bounds, for batches that are too small to bound a gap in. In training mode nothing
            changes: every batch is projected, and the stream stays as it is. In eval mode the
            stream serves batches of fewer than ``minimum_batch`` samples, and counts the others,
            which are projected as in training: ``online.report()`` is about everything that was
            served in eval mode. Each holds its own guarantee: a projected batch within itself, and
            the stream for all that was served, pooled.
        minimum_batch: from how many samples on; required with ``online``.

    With ``online``, in eval mode:

    - What the stream serves carries no gradient. What is projected does, as always.
    - Notions that need targets take the scores for forecasts where ``targets`` is ``None``, also
      for batches that are projected; ``online.observe`` then is due for all that was served.
    - A validation set that goes through the layer counts as served: ``online.reset()`` forgets it.
    - ``missing_group``, ``elastic`` and ``backend`` are of the projected batches.
    - ``(B, n)`` scores are B batches of n; B > 1 needs n of at least ``minimum_batch``.
    - ``objective`` is ``"l2"``, there are no ``classes``, and ``bounds`` are numbers.

    Attributes:
        last: the last ``Solution``, detached, around the predictions that were returned; ``None``
            before the first call, and after one that the stream served. Not saved, copied or
            pickled with the module. With ``"l1"`` and ``"linf"`` it is in the variables of their
            programs, which ``formulate`` tells.

    Raises:
        ProblemError: an option is not what it may be; on a call, or by ``formulate`` and ``solve``.

    Shapes:
        scores ``(n,)``, ``(n, 1)`` or ``(B, n)``; groups ``(n,)`` or ``(B, n)``, or a mapping of
        attribute name to such; the output is like the scores in shape, dtype and device. With
        ``classes`` scores have one more dimension of that size.
    """

    last: Solution | None
    online: OnlineParity | None
    _specification: Specification | None  # of the options as they are; made again where they change

    def __init__(  # noqa: PLR0913
        self,
        constraints: Constraint | Sequence[Constraint],
        *,
        bounds: Bounds,
        objective: Objective = "l2",
        backend: str | Backend = "auto",
        missing_group: MissingGroup = "skip",
        group_counts: GroupCounts = None,
        smoothing: float = 0.0,
        classes: int | None = None,
        elastic: bool = False,
        online: OnlineParity | None = None,
        minimum_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.constraints = as_constraints(constraints)
        self.bounds = bounds
        self.objective: Objective = objective
        self.missing_group: MissingGroup = missing_group
        self.group_counts = group_counts
        self.smoothing = smoothing
        self.classes = classes
        self.elastic = elastic
        self.backend = check_backend(backend)
        made = self._specify()
        if online is not None or minimum_batch is not None:
            from fairopt.layer.stream import check_stream

            check_stream(online, minimum_batch, made)
        self.online = online
        self.minimum_batch = minimum_batch
        self.last = None

    def _specify(self) -> Specification:
        """The specification of the options as they are, kept until one is set."""
        made = Specification(
            self.constraints, self.bounds, self.objective, self.missing_group, self.group_counts,
            self.smoothing, self.classes, self.elastic,
        )  # fmt: skip
        pair = None if self.bounds is None else tuple(self.bounds)  # no list: it could change
        self.__dict__.update(constraints=made.constraints, bounds=pair, _specification=made)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            self.__dict__["_specification"] = None
        super().__setattr__(name, value)

    def forward(
        self,
        scores: Tensor,
        groups: Groups,
        targets: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Fair predictions; see ``formulate`` for the arguments and ``solve`` for the errors."""
        if self.minimum_batch is not None and not self.training:
            return self._serve(scores, groups, targets, weights, self.minimum_batch)
        x, solution = self._project(scores, groups, targets, weights)
        self.__dict__["last"] = solution  # not through Module.__setattr__: it costs 5 microseconds
        return x

    def _serve(
        self,
        scores: Tensor,
        groups: Groups,
        targets: Tensor | None,
        weights: Tensor | None,
        minimum_batch: int,
    ) -> Tensor:
        """Eval mode with a stream."""
        from fairopt.layer import stream  # Layers without one do not import it.

        online = self.online
        assert online is not None
        solution: Solution | None = None
        if stream.is_for_stream(scores, minimum_batch):
            x: Tensor = online(scores, groups, targets, weights=weights)
        else:
            known = (
                stream.forecasts(self.constraints, scores, groups) if targets is None else targets
            )
            x, solution = self._project(scores, groups, known, weights)
            online.count(x, groups, targets, scores=scores, weights=weights)
        self.__dict__["last"] = solution
        return x

    def _project(
        self, scores: Tensor, groups: Groups, targets: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Solution]:
        specification = self._specification or self._specify()
        return fair_predictions(specification, self.backend, scores, groups, targets, weights)

    def extra_repr(self) -> str:
        notions = ", ".join(map(repr, self.constraints))
        given = f"{notions}, bounds={self.bounds}, backend={self.backend!r}"
        if self.objective != "l2":
            given += f", objective={self.objective!r}, smoothing={self.smoothing}"
        if self.classes is not None:
            given += f", classes={self.classes}"
        if self.elastic:
            given += ", elastic=True"
        return given if self.online is None else f"{given}, minimum_batch={self.minimum_batch}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_specification": None}


def project(  # noqa: PLR0913
    scores: Tensor,
    groups: Groups,
    constraints: Constraint | Sequence[Constraint],
    targets: Tensor | None = None,
    *,
    bounds: Bounds,
    objective: Objective = "l2",
    weights: Tensor | None = None,
    backend: str | Backend = "auto",
    missing_group: MissingGroup = "skip",
    group_counts: GroupCounts = None,
    smoothing: float = 0.0,
    classes: int | None = None,
    elastic: bool = False,
) -> Tensor:
    """What ``FairnessLayer`` does, as a function."""
    specification = Specification(
        constraints, bounds, objective, missing_group, group_counts, smoothing, classes, elastic
    )
    return fair_predictions(specification, backend, scores, groups, targets, weights)[0]


def fair_predictions(
    specification: Specification,
    backend: str | Backend,
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Solution]:
    """Predictions like the scores, with their history, and the solution, detached."""
    if isinstance(scores, Tensor) and torch.is_autocast_enabled(
        "cpu" if scores.is_cpu else scores.device.type  # naming the device costs a microsecond
    ):
        with torch.autocast(scores.device.type, enabled=False):
            return fair_predictions(specification, backend, scores, groups, targets, weights)
    problem, center, read = formulate_around(specification, scores, groups, targets, weights)
    solver = solve_elastic if specification.elastic else solve_detached
    x, solution = solver(problem, backend, specification.smoothing, center=center)
    if read is not None:
        x = read(x).to(scores.dtype)  # the solution stays in the variables of its problem
    elif x.dtype != scores.dtype:
        x = x.to(scores.dtype)
        solution = solution.with_x(x.detach().view(solution.x.shape))
    return x if x.shape == scores.shape else x.reshape(scores.shape), solution
