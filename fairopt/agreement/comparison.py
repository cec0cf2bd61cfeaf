"""The comparison itself: arguments checked, backends chosen, asked and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fairopt import backends as registry
from fairopt.agreement.answers import ask, known_answer
from fairopt.agreement.data import ORACLE, REFERENCE, Allowed, Answer
from fairopt.agreement.finite_differences import slopes
from fairopt.agreement.quantities import examine, gradient_quantities, input_quantities, points
from fairopt.agreement.report import Agreement
from fairopt.agreement.verdict import conclude
from fairopt.backends import Backend
from fairopt.errors import BackendNotFoundError, ProblemError, UnsupportedProblemError, whole_number
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.solution import Solution
from fairopt.tolerances import AGREEMENT, GRADIENT_AGREEMENT


def cross_validate(  # noqa: PLR0913
    problem: Problem,
    backends: Iterable[str | Backend] | None = None,
    reference: str | Backend | Solution | Tensor | None = None,
    *,
    smoothing: float = 0.0,
    inputs: Mapping[str, Tensor] | None = None,
    tolerance: float | None = None,
    gradient_tolerance: float | None = None,
    cotangents: int = 3,
    finite_differences: bool = False,
    repeats: int = 3,
    seed: int = 0,
) -> Agreement:
    """Solve and differentiate one problem with several backends, and compare all they answer.

    Args:
        problem: a ``QP`` or ``LP``.
        backends: names, or backends with their options; by default all that are installed. One that
            does not take this kind of problem is left out, with the reason.
        reference: what the table's differences refer to: a backend, which is asked too; or a
            ``Solution`` or x, ``(B, n)``, known otherwise, which then counts as an answer. By
            default the backend that disagrees with the fewest others; among equals the one with the
            smallest residuals. Who is blamed does not depend on it.
        smoothing: as in ``solve``, for an ``LP``; without it no gradients are compared.
        inputs: tensors that the problem was computed from, by name (``{"scores": scores}``), which
            require gradients: theirs are compared too. They are well defined also where rows depend
            on each other, as long as the inputs move them together.
        tolerance: allowed relative difference of x, and of the objective where x is not unique; by
            default 1e-7, or 1e-5 for float32. It is relative to the largest entry of x.
        gradient_tolerance: the same for gradients and multipliers; by default 1e-6, or 1e-4.
        cotangents: how many random g, for the gradients of g.x.
        finite_differences: whether to compare all gradients with finite differences in float64, by
            the backend named as reference (or the fastest): 8 solves for each kind of data.
        repeats: how often each is timed; the best counts. Zero leaves the times out.
        seed: of the random g and directions.

    Raises:
        ProblemError: an argument is not as described above.
        BackendNotFoundError: a backend that was named is not there.
        UnsupportedProblemError: the backend named as reference does not take the problem.
    """
    check_arguments(problem, inputs, cotangents, repeats, seed)
    if isinstance(problem, LP) and smoothing:
        problem = problem.smoothed(smoothing)
    elif smoothing:
        raise ProblemError("smoothing: a QP needs none; give it a larger P instead")
    data = problem.detach()
    dtype, device = data.linear.dtype, data.lb.device
    allowed = Allowed(
        as_tolerance("tolerance", tolerance, AGREEMENT[dtype]),
        as_tolerance("gradient_tolerance", gradient_tolerance, GRADIENT_AGREEMENT[dtype]),
    )
    generator = torch.Generator().manual_seed(seed)
    batch, _, n = data.shape
    g = torch.randn(cotangents, batch, n, generator=generator, dtype=torch.float64)
    g = g.to(device, dtype)

    asked, left_out = contenders(data, backends, reference)
    answers: list[Answer] = []
    for label, backend in asked:
        try:
            answers.append(ask(label, backend, data, g, repeats))
        except UnsupportedProblemError as error:  # noqa: PERF203 - capabilities could not tell
            left_out[label] = str(error)
    if isinstance(reference, (Solution, Tensor)):
        answers.append(known_answer(data, reference))
    named = named_reference(reference, asked)
    if named in left_out:
        raise UnsupportedProblemError(f"reference: {left_out[named]}")

    order = sorted(answers, key=lambda a: (a.label != named, a.residual))
    where = examine(data, order, allowed)
    quantities = [*points(data, answers, where, allowed)]
    notes: list[str] = []
    if isinstance(data, QP):
        quantities += gradient_quantities(data, answers, where, g, allowed.gradient)
        if inputs:
            quantities += input_quantities(problem, answers, inputs, cotangents, allowed.gradient)
        if finite_differences:
            quantities += slopes(data, answers, where, named, g, allowed.gradient, generator, notes)
    elif inputs or finite_differences:
        notes.append("no gradients: an LP has them only with smoothing")
    return conclude(data, answers, quantities, where, named, left_out, allowed, notes)


def check_arguments(
    problem: object, inputs: object, cotangents: object, repeats: object, seed: object
) -> None:
    if not isinstance(problem, (QP, LP)):
        raise ProblemError(f"problem: expected a QP or an LP, got {type(problem).__name__}")
    whole_number("cotangents", cotangents, 1, "a whole number, at least 1")
    whole_number("repeats", repeats, 0, "a whole number, at least 0")
    whole_number("seed", seed, 0, "a whole number, at least 0")
    if inputs is None:
        return
    if not isinstance(inputs, Mapping):
        raise ProblemError(
            f"inputs: expected a mapping of names to tensors, got {type(inputs).__name__}"
        )
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            raise ProblemError(
                f"inputs: expected tensors that require gradients, got {name!r}, which does not"
            )


def as_tolerance(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ProblemError(f"{name}: expected a number between 0 and 1, got {value!r}")
    return float(value)


def contenders(
    problem: Problem, chosen: Iterable[str | Backend] | None, reference: object
) -> tuple[list[tuple[str, Backend]], dict[str, str]]:
    """The backends to ask with their labels, and those left out with the reason."""
    left_out: dict[str, str] = {}
    wanted: list[str | Backend] = []
    if chosen is None:
        for name in registry.names():
            try:
                wanted.append(registry.get(name))
            except BackendNotFoundError as error:  # noqa: PERF203
                left_out[name] = str(error)
    elif isinstance(chosen, (str, Backend)) or not isinstance(chosen, Iterable):
        raise ProblemError(
            f"backends: expected a list of names or backends, got {chosen!r}; write [{chosen!r}]"
        )
    else:
        wanted = list(chosen)
        if not wanted:
            raise ProblemError("backends: expected at least one, got none; leave it out for all")
    if isinstance(reference, (str, Backend)):
        there = {b if isinstance(b, str) else b.name for b in wanted}
        present = reference in wanted if isinstance(reference, Backend) else reference in there
        if not present:
            wanted.append(reference)
    elif reference is not None and not isinstance(reference, (Solution, Tensor)):
        raise ProblemError(
            "reference: expected a backend's name, a Backend, a Solution or a tensor x, got "
            f"{type(reference).__name__}"
        )
    found: list[Backend] = []
    for item in wanted:
        if not isinstance(item, (str, Backend)):
            raise ProblemError(f"backends: expected names or backends, got {item!r}")
        if isinstance(item, str) and (item == "auto" or wanted.count(item) > 1):
            raise ProblemError(
                f"backends: expected different names, each of one backend, got {item!r}"
                + ("" if item == "auto" else " twice")
            )
        found.append(registry.get(item) if isinstance(item, str) else item)
    if len(set(map(id, found))) < len(found):
        raise ProblemError("backends: expected different ones, got one of them twice")
    asked = []
    for label, backend in labelled(found):
        missing = backend.capabilities.missing(problem)
        if missing is None:
            asked.append((label, backend))
        else:
            left_out[label] = f"does not solve {missing}"
    return asked, left_out


def labelled(found: Sequence[Backend]) -> list[tuple[str, Backend]]:
    """Labels that distinguish backends of one name by their options, and then by a number."""
    taken = [ORACLE, REFERENCE, *(backend.name for backend in found)]
    labels = [repr(each) if taken.count(each.name) > 1 else each.name for each in found]
    return [
        (label if labels.count(label) == 1 else f"{label} #{labels[:i].count(label) + 1}", backend)
        for i, (label, backend) in enumerate(zip(labels, found, strict=True))
    ]


def named_reference(reference: object, asked: Sequence[tuple[str, Backend]]) -> str:
    if isinstance(reference, (Solution, Tensor)):
        return REFERENCE
    for label, backend in asked:
        if backend is reference or (isinstance(reference, str) and backend.name == reference):
            return label
    return reference if isinstance(reference, str) else ""
