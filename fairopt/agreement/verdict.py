"""The verdict: who disagrees with whom, by the quantities that were compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from fairopt.agreement.data import DEFINITE, ORACLE, REFERENCE, Allowed, Answer, Merged, Quantity
from fairopt.agreement.report import JUDGES, Agreement, Difference
from fairopt.optimality.certificates import proves_infeasible
from fairopt.programs.problem import LP, Problem
from fairopt.programs.solution import Status


@dataclass(eq=False)
class Pair:
    """How two answers differ in one quantity, as Python numbers, one for each problem."""

    quantity: Quantity
    size: list[float]
    at: list[int]
    fails: list[bool]


def compare(quantities: Sequence[Quantity]) -> dict[tuple[int, str, str], Pair]:
    """Every pair of answers in every quantity, by the quantity's number and the two labels."""
    pairs = {}
    for i, quantity in enumerate(quantities):
        for a, b in combinations(quantity.values, 2):
            size, at = quantity.difference(a, b)
            fails = ~(size <= quantity.tolerance) & ~size.isnan()
            pairs[i, a, b] = Pair(quantity, size.tolist(), at.tolist(), fails.tolist())
    return pairs


def conclude(
    problem: Problem,
    answers: Sequence[Answer],
    quantities: Sequence[Quantity],
    where: Merged,
    named: str,
    left_out: dict[str, str],
    allowed: Allowed,
    notes: list[str],
) -> Agreement:
    """Find all differences and who is to blame for them, and fill in the table."""
    batch = problem.shape[0]
    pairs = compare(quantities)
    reference = named or (choose_reference(answers, pairs) if answers else "")
    differences = [*own_faults(problem, answers), *of_status(answers, reference, batch)]
    for i, quantity in enumerate(quantities):
        mine = {(a, b): pair for (k, a, b), pair in pairs.items() if k == i}
        differences += of_quantity(quantity, mine, reference)
    guilty = {d.backend for d in differences if d.against in JUDGES}
    differences = [d.turned() if d.blames_the_wrong(guilty) else d for d in differences]
    differences.sort(key=lambda d: d.backend)
    definite = [sum(a.status[b] in DEFINITE for a in answers) for b in range(batch)]
    solved = where.solved.tolist()
    margin = [
        float(v) if ok else math.inf
        for v, ok in zip(where.standing.margin.tolist(), solved, strict=True)
    ]
    limits = (
        (where.standing.unique, "x is not shown to be unique", "objectives are compared instead"),
        (
            where.standing.unique_duals,
            "multipliers are not unique",
            "they and the gradients of rows, sides and bounds are not held against each other",
        ),
    )
    for unique, fact, consequence in limits:
        which = [b for b in range(batch) if solved[b] and not bool(unique[b])]
        if which:
            shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
            notes.append(f"{fact} in problem {shown}: {consequence}")
    return Agreement(
        kind=described(problem),
        reference=reference,
        differences=tuple(differences),
        undecided=tuple(b for b in range(batch) if definite[b] < 2),
        left_out=left_out,
        margin=tuple(margin),
        nearest=where.standing.nearest,
        degenerate=tuple(b for b in range(batch) if margin[b] <= allowed.solution),
        notes=tuple(notes),
        tolerance=allowed.solution,
        gradient_tolerance=allowed.gradient,
        rows=tuple(
            table_row(answer, quantities, pairs, reference, differences) for answer in answers
        ),
    )


def described(problem: Problem) -> str:
    batch, m, n = problem.shape
    kind = "linear" if isinstance(problem, LP) else "quadratic"
    return (
        f"{batch} {kind} program{'s' if batch != 1 else ''}, {n} variable{'s' if n != 1 else ''}, "
        f"{m} row{'s' if m != 1 else ''}, "
        f"{str(problem.linear.dtype).removeprefix('torch.')} on {problem.lb.device}"
    )


def choose_reference(answers: Sequence[Answer], pairs: Mapping[tuple[int, str, str], Pair]) -> str:
    """Disagrees with the fewest; then solved the most problems; then has the least residuals."""

    def rank(answer: Answer) -> tuple[float, ...]:
        failing = sum(
            fails and counts
            for (_, a, b), pair in pairs.items()
            if answer.label in (a, b)
            for fails, counts in zip(pair.fails, pair.quantity.counts.tolist(), strict=True)
        )
        return failing, -int(answer.accepted.sum()), answer.residual

    return min(answers, key=rank).label


def own_faults(problem: Problem, answers: Sequence[Answer]) -> Iterable[Difference]:
    """The faults that our own judges find in an answer, whatever the others say."""
    for answer in answers:
        silent = [b for b, s in enumerate(answer.status) if s not in DEFINITE]
        if silent:
            status = answer.status[silent[0]]
            reason = answer.message or (status.value if status is not None else "")
            yield in_words("status", (answer.label, "", False), silent, (reason, ""))
        refused = (answer.claimed & ~answer.accepted).nonzero().squeeze(-1).tolist()
        if refused and answer.solution is not None:
            b = refused[0]
            found = {k: float(v[b]) for k, v in vars(answer.solution.residuals).items()}
            name, worst = max(found.items(), key=lambda kv: (kv[1] != kv[1], kv[1]))
            ours = f"{name} {worst:.1e}, beyond the promised precision"
            who = (answer.label, JUDGES[0], False)
            yield in_words("residuals", who, refused, ("claims to have solved it", ours), worst)
        claims = [b for b, s in enumerate(answer.status) if s is Status.INFEASIBLE]
        if claims and answer.row_dual is not None:
            proven = proves_infeasible(problem, answer.row_dual).tolist()
            unproven = [b for b in claims if not proven[b]]
            if unproven:
                said = "claims that it is infeasible", "its multipliers do not prove it"
                yield in_words("certificate", (answer.label, JUDGES[1], False), unproven, said)


def of_status(answers: Sequence[Answer], reference: str, batch: int) -> Iterable[Difference]:
    """Answers that say different things of a problem."""
    found: dict[tuple[tuple[str, str, bool], tuple[str, str]], list[int]] = {}
    for b in range(batch):
        said = {a.label: a.status[b] for a in answers if a.status[b] in DEFINITE}
        fails = {(one, other): said[one] is not said[other] for one, other in combinations(said, 2)}
        for who in blame(list(said), fails, reference):
            words = name_of(said[who[0]]), name_of(said[who[1]])
            found.setdefault((who, words), []).append(b)
    for (who, words), problems in found.items():
        yield in_words("status", who, problems, words)


def in_words(
    quantity: str,
    who: tuple[str, str, bool],
    problems: Sequence[int],
    said: tuple[str, str],
    size: float = math.inf,
) -> Difference:
    """A disagreement in what two say of problems, not in a number."""
    return Difference(
        quantity, *who, problems[0], "", *said, size, 0.0, tuple(problems)
    )  # fmt: skip


def name_of(status: Status | None) -> str:
    return "no answer" if status is None else status.name.lower()


def of_quantity(
    quantity: Quantity, pairs: Mapping[tuple[str, str], Pair], reference: str
) -> Iterable[Difference]:
    """The disagreements on one quantity."""
    found: dict[tuple[str, str, bool], list[tuple[float, int, int]]] = {}
    counts = quantity.counts.tolist()
    failing = {b for p in pairs.values() for b, f in enumerate(p.fails) if f and counts[b]}
    for b in sorted(failing):
        there = [label for label, present in quantity.present.items() if bool(present[b])]
        fails = {
            pair: p.fails[b] for pair, p in pairs.items() if pair[0] in there and pair[1] in there
        }
        for backend, against, odd in blame(there, fails, reference):
            p = pairs.get((backend, against)) or pairs[against, backend]
            found.setdefault((backend, against, odd), []).append((p.size[b], b, p.at[b]))
    for (backend, against, odd), cases in found.items():
        size, b, e = max(cases)
        yield Difference(
            quantity.name, backend, against, odd, None if quantity.whole else b,
            quantity.place(e), float(quantity.values[backend][b, e]),
            float(quantity.values[against][b, e]), size, float(quantity.tolerance[b]),
            () if quantity.whole else tuple(sorted(b for _, b, _ in cases)),
        )  # fmt: skip


def blame(
    labels: Sequence[str], fails: Mapping[tuple[str, str], bool], reference: str
) -> list[tuple[str, str, bool]]:
    """Who disagrees with whom in one problem: (backend, against, whether it is the odd one).

    The odd one differs from all others, of which there are two or more and which agree. Where there
    is none, the pairs that differ are returned; those with the reference, if it is among them.
    """
    bad = [pair for pair, fail in fails.items() if fail]
    if not bad:
        return []
    if len(labels) >= 3:
        for label in labels:
            mine = [pair for pair in fails if label in pair]
            if len(bad) == len(mine) and all(label in pair for pair in bad):
                others = [other for other in labels if other != label]
                return [(label, reference if reference in others else others[0], True)]
    with_reference = [pair for pair in bad if reference in pair]
    chosen = with_reference or bad
    return [(b, a, False) if a in (reference, ORACLE) else (a, b, False) for a, b in chosen]


def table_row(
    answer: Answer,
    quantities: Sequence[Quantity],
    pairs: Mapping[tuple[int, str, str], Pair],
    reference: str,
    differences: Sequence[Difference],
) -> dict[str, Any]:
    label = answer.label
    guilty = {d.backend for d in differences if d.against in JUDGES}
    count: dict[str, int] = {}
    for status in answer.status:
        count[name_of(status)] = count.get(name_of(status), 0) + 1
    row: dict[str, Any] = {
        "backend": label,
        "status": next(iter(count)) if len(count) == 1
        else ", ".join(f"{number} {name}" for name, number in count.items()),
        "agrees": not any(
            label == d.backend or (label == d.against and not d.odd and d.backend not in guilty)
            for d in differences
        ),
    }  # fmt: skip
    for i, quantity in enumerate(quantities):
        other = ORACLE if ORACLE in quantity.values else reference
        pair = pairs.get((i, label, other)) or pairs.get((i, other, label))
        sizes = [] if pair is None else [
            size
            for size, counts in zip(pair.size, quantity.counts.tolist(), strict=True)
            if counts and not math.isnan(size)
        ]  # fmt: skip
        row[quantity.name] = max(sizes, default=None)
    found = answer.residuals() if answer.label != REFERENCE or answer.row_dual is not None else None
    iterations = () if answer.solution is None else answer.solution.iterations
    return {
        **row,
        "residual": None if found is None else float(found.max()),
        "iterations": max(iterations, default=None),
        "forward_seconds": answer.forward,
        "backward_seconds": answer.backward,
        "message": answer.message,
    }
