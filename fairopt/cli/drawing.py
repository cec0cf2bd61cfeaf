"""Problems drawn at random for ``fairopt compare`` and ``bench``, and the plot of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fairopt.agreement.report import Agreement
from fairopt.errors import ProblemError
from fairopt.formulation.program import formulate
from fairopt.notions.names import COMPARING
from fairopt.programs.problem import QP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Differences below this are shown at it: zero has no place on a logarithmic axis.
SMALLEST = 1e-17
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Drawn:
    """A parity problem to draw; everything random follows from the seed.

    Attributes:
        samples: n.
        groups: how many; each has at least one sample if there are enough.
        notion: a key of ``notions.names.COMPARING``.
        comparison: each pair of groups, or each group with all.
        tolerance: of the notion.
        batch: how many problems.
        bounds: of every sample; None for no bound.
        dtype: float64 or float32.
        seed: of scores, groups and targets.
    """

    samples: int = 200
    groups: int = 3
    notion: str = "demographic-parity"
    comparison: Literal["pairwise", "overall"] = "pairwise"
    tolerance: float = 0.05
    batch: int = 1
    bounds: tuple[float | None, float | None] = (0.0, 1.0)
    dtype: Literal["float64", "float32"] = "float64"
    seed: int = 0


def people(drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(B, n)``, groups ``(n,)`` and binary targets ``(B, n)``.

    Scores lie between 0 and 1, and higher for groups of a higher number, so that parity costs
    something. Raises ``ProblemError`` if the notion is unknown.
    """
    if drawn.notion not in COMPARING:
        raise ProblemError(f"notion: expected one of {', '.join(COMPARING)}, got {drawn.notion!r}")
    dtype = {"float64": torch.float64, "float32": torch.float32}[drawn.dtype]
    generator = torch.Generator().manual_seed(drawn.seed)
    shape = drawn.batch, drawn.samples
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    groups = torch.arange(drawn.samples) % drawn.groups
    groups = groups[torch.randperm(drawn.samples, generator=generator)]
    targets = torch.randint(0, 2, (drawn.samples,), generator=generator).to(dtype)
    scores = (0.7 * noise + 0.3 * (groups + 0.5) / drawn.groups).to(dtype)
    return scores, groups, targets.expand(shape)


def draw(drawn: Drawn) -> tuple[QP, dict[str, Tensor]]:
    """The problem, and by name the tensors that its gradients reach: scores, tolerance, bounds.

    Raises ``ProblemError`` where ``people`` and ``formulate`` do.
    """
    scores, groups, targets = people(drawn)
    dtype = scores.dtype
    inputs = {"scores": scores, "tolerance": torch.tensor(drawn.tolerance, dtype=dtype)}
    for name, value in zip(("lower", "upper"), drawn.bounds, strict=True):
        if value is not None:
            inputs[name] = torch.tensor(value, dtype=dtype)
    for tensor in inputs.values():
        tensor.requires_grad_()
    constraint = COMPARING[drawn.notion](inputs["tolerance"], compare=drawn.comparison)
    problem = formulate(
        constraint,
        inputs["scores"],
        groups,
        targets,
        bounds=(inputs.get("lower"), inputs.get("upper")),
    )
    return problem, inputs


def plot(agreement: Agreement, path: Path) -> None:
    """Draw the differences from the reference and the times of every backend, to one file.

    Raises:
        ImportError: matplotlib is not installed; ``pip install 'fairopt[demo]'`` brings it.
        ValueError: matplotlib knows no format of that suffix.
    """
    # Figure, not pyplot: no window, no global state, and any thread may draw.
    from matplotlib.figure import Figure

    rows = agreement.table()
    skip = {"backend", "status", "agrees", "residual", "iterations", "message"}
    quantities = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in skip
        and not key.endswith("_seconds")
        and any(row.get(key) is not None for row in rows)
    ]
    figure = Figure(figsize=(10, 2.2 + 0.3 * max(len(quantities), 5)), layout="constrained")
    verdict = "agree" if agreement.agree else "do NOT agree"
    figure.suptitle(f"The backends {verdict}", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{agreement.kind}. Differences are from {agreement.reference or 'nobody'} (slopes: from "
        f"finite differences); those below {SMALLEST:.0e} are shown there.",
        fontsize=9, color="#444444", x=0.01, ha="left",
    )  # fmt: skip
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    styled: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (row, {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]})
        for i, row in enumerate(rows)
    ]
    differences(left, styled, quantities, agreement)
    times(right, rows)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def differences(
    ax: Axes,
    styled: list[tuple[dict[str, Any], dict[str, Any]]],
    quantities: list[str],
    agreement: Agreement,
) -> None:
    for i, (row, style) in enumerate(styled):
        shift = 0.5 * (i + 0.5) / len(styled) - 0.25  # so that none hides another
        found = [
            (max(min(row[name], 1e3), SMALLEST), height + shift)
            for height, name in enumerate(quantities)
            if row.get(name) is not None
        ]
        if found:
            x, y = zip(*found, strict=True)
            ax.plot(x, y, linestyle="", label=row["backend"], **style)
    for height, name in enumerate(quantities):
        solution = name in ("x", "objective")
        allowed = agreement.tolerance if solution else agreement.gradient_tolerance
        ax.plot([allowed] * 2, [height - 0.4, height + 0.4], color="#AA0000", linewidth=1.4)
    ax.set_xscale("log")
    ax.set_yticks(range(len(quantities)), quantities, fontsize=9)
    ax.invert_yaxis()
    ax.set_title("relative difference (red: allowed)", loc="left", fontsize=11)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9)


def times(ax: Axes, rows: list[dict[str, Any]]) -> None:
    for shift, key, color in (
        (-0.2, "forward_seconds", "#0072B2"),
        (0.2, "backward_seconds", "#E69F00"),
    ):
        there = [(i, row[key]) for i, row in enumerate(rows) if row[key] is not None]
        if there:
            ax.barh(
                [i + shift for i, _ in there], [1e3 * seconds for _, seconds in there],
                0.38, color=color, label=key.removesuffix("_seconds"),
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["backend"] for row in rows], fontsize=9)
    ax.invert_yaxis()
    ax.set_title("milliseconds, best of several", loc="left", fontsize=11)
    if ax.get_legend_handles_labels()[0]:
        ax.set_xscale("log")
        ax.legend(frameon=False, fontsize=9)
