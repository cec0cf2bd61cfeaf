"""The result of a comparison, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

JUDGES = ("our residuals", "our check of its certificate")

# The columns of the text, and the keys of the table that they sum up.
COLUMNS = ("x", "objective", "duals", "gradients", "slopes")
COLUMNS_OF: dict[str, str | tuple[str, ...]] = {
    "duals": ("row_dual", "bound_dual"),
    "gradients": "gradient of ",
    "slopes": "slope along ",
}


@dataclass(frozen=True)
class Difference:
    """One disagreement, at its worst place.

    Attributes:
        quantity: "status", "residuals", "certificate", "x", "objective", "row_dual",
            "bound_dual", "gradient of q", "slope along q" (by finite differences), ...
        backend: the one that is blamed, or one of two where nothing tells who is right.
        against: the other; or the judge: "our residuals"; empty where a backend gave no answer.
        odd: whether all others that have the quantity agree with each other, at least two.
        problem: number in the batch; None where the quantity belongs to the whole batch.
        where: the element, with the names of rows: ``u['group: 0 - 1']``.
        value, other: what the two say there.
        size: the relative difference; infinite where it is not a number.
        tolerance: the relative difference that was allowed.
        problems: all problems of the batch in which the two disagree on this.
    """

    quantity: str
    backend: str
    against: str
    odd: bool
    problem: int | None
    where: str
    value: float | str
    other: float | str
    size: float
    tolerance: float
    problems: tuple[int, ...]

    def blames_the_wrong(self, guilty: set[str]) -> bool:
        """Whether the other of the two is the one that our own judges refuse."""
        return not self.odd and self.against in guilty and self.backend not in guilty

    def turned(self) -> Difference:
        """The same difference, seen from the other of the two."""
        return replace(
            self, backend=self.against, against=self.backend, value=self.other, other=self.value
        )

    def __str__(self) -> str:
        at = self.where
        if self.problem is not None:
            at = f"problem {self.problem}" + (f", {self.where}" if self.where else "")
        many = ""
        if len(self.problems) > 1:
            listed = ", ".join(map(str, self.problems[:8]))
            dots = ", ..." if len(self.problems) > 8 else ""
            many = f" (in {len(self.problems)} problems: {listed}{dots})"
        if isinstance(self.value, str):
            said = f"; {self.against}: {self.other}" if self.against else ""
            return f"{self.quantity}: {at}: {self.value}{said}{many}"
        other = self.other if isinstance(self.other, str) else f"{self.other:.9g}"
        return (
            f"{self.quantity}: {at}: {self.value:.9g}, {self.against} has {other}; relative "
            f"difference {self.size:.1e}, allowed {self.tolerance:.0e}{many}"
        )


@dataclass(frozen=True)
class Agreement:
    """The result of ``cross_validate``; ``str(agreement)`` is a table with the verdict.

    Attributes:
        kind: the problem that was solved, in words.
        reference: the label that the table's differences refer to; empty if nothing was answered.
        differences: all disagreements, those of the same backend together.
        undecided: problems of the batch for which fewer than two backends gave an answer.
        left_out: why a backend was not asked, by name.
        margin: of each problem, to its next active set, relative to the size of x; infinite where
            no constraint is near, and where no backend solved it.
        nearest: the constraint that has that margin.
        degenerate: problems whose margin is within the tolerance: gradients may jump there. What
            fairopt documents for it (weakly active counts as inactive) is still one answer, and
            backends that give different ones disagree.
        notes: quantities that were not compared, with the reason.
        tolerance, gradient_tolerance: the relative differences that were allowed.
    """

    kind: str
    reference: str
    differences: tuple[Difference, ...]
    undecided: tuple[int, ...]
    left_out: Mapping[str, str]
    margin: tuple[float, ...]
    nearest: tuple[str, ...]
    degenerate: tuple[int, ...]
    notes: tuple[str, ...]
    tolerance: float
    gradient_tolerance: float
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)

    @property
    def agree(self) -> bool:
        """Two or more answered every problem, nothing they say differs, and our judge is content.

        A backend that gives no answer to a problem disagrees with any that does. If all prove that
        a problem has no solution, they agree.
        """
        return not self.differences and not self.undecided

    def table(self) -> list[dict[str, Any]]:
        """One row for each backend, as plain data; None where there is nothing to tell.

        Keys: ``backend``, ``status``, ``agrees``; the largest relative difference from the
        reference of ``x``, ``objective``, ``row_dual``, ``bound_dual`` and each ``gradient of
        ...``; ``residual``, the worst of our residuals; ``iterations``, the most of any problem;
        ``forward_seconds`` and ``backward_seconds``, the best of several; ``message``.
        """
        return [dict(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: numbers that are not finite are None."""
        plain = {k: v for k, v in vars(self).items() if k not in ("rows", "differences")}
        result: dict[str, Any] = jsonable(
            {
                "agree": self.agree,
                "verdict": self.verdict,
                **plain,
                "differences": [asdict(d) for d in self.differences],
                "table": self.table(),
            }
        )
        return result

    @property
    def verdict(self) -> str:
        """Who disagrees where, by how much; and what limits the verdict."""
        lines = []
        if self.undecided:
            who = ", ".join(row["backend"] for row in self.rows) or "no backend"
            which = "any problem" if len(self.undecided) == len(self.margin) else (
                f"problem {', '.join(map(str, self.undecided[:8]))}"
            )  # fmt: skip
            lines.append(
                f"NOTHING TO COMPARE for {which}: fewer than two answers (asked: {who}); "
                "install or name more backends, or give a reference"
            )
        if self.agree:
            worst = [
                f"{name} {max(found):.1e}"
                for name in COLUMNS
                if (found := [v for row in self.rows for v in column(row, name)])
            ]
            lines.append(
                f"AGREE: {len(self.rows)} answers; largest differences: {', '.join(worst) or '0'}"
            )
        elif self.differences:
            lines.append("DISAGREE")
        for backend in dict.fromkeys(d.backend for d in self.differences):
            mine = [d for d in self.differences if d.backend == backend]
            against = dict.fromkeys(d.against for d in mine if d.against not in ("", *JUDGES))
            words = [f"refused by {d.against}" for d in mine if d.against in JUDGES]
            if any(d.odd for d in mine):
                words.insert(0, f"the odd one out of {len(self.rows)}")
            elif against:
                words.insert(0, f"differs from {', '.join(against)}")
            lines.append(f"  {backend}: {'; '.join(dict.fromkeys(words)) or 'gives no answer'}")
            lines += [f"    {d}" for d in mine]
        if self.differences and self.degenerate:
            lines.append(
                "  Where the margin is zero gradients may jump; weakly active constraints count as "
                "inactive in fairopt."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        shown = [c for c in COLUMNS if any(column(row, c) for row in self.rows)]
        lines = [["backend", "status", *shown, "residual", "iterations", "forward", "backward"]]
        for row in self.rows:
            star = " *" if row["backend"] == self.reference else ""
            lines.append(
                [
                    row["backend"] + star,
                    row["status"],
                    *(number(max(column(row, c), default=None)) for c in shown),
                    number(row["residual"]),
                    "-" if row["iterations"] is None else str(row["iterations"]),
                    milliseconds(row["forward_seconds"]),
                    milliseconds(row["backward_seconds"]),
                ]
            )
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        text = [self.kind, ""]
        text += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        if self.reference:
            text.append("* the reference, from which the others' relative differences are")
        text.append("")
        text += [f"{row['backend']}: {row['message']}" for row in self.rows if row["message"]]
        text += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        if self.margin and math.isfinite(least := min(self.margin)):
            b = self.margin.index(least)
            count = len(self.degenerate)
            word = f"; {count} of {len(self.margin)} problems degenerate" if count else ""
            text.append(
                f"margin to the next active set: {least:.1e} at the least (problem {b}, "
                f"{self.nearest[b]}){word}"
            )
        return "\n".join([*text, *self.notes, self.verdict])


def column(row: Mapping[str, Any], name: str) -> list[float]:
    """The differences in a row of the table that belong to one column of the text."""
    return [
        value
        for key, value in row.items()
        if value is not None and (key == name or key.startswith(COLUMNS_OF.get(name, "\0")))
    ]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms"


def jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
