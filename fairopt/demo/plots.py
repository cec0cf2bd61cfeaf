"""The plots of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairopt.demo.report import Quality, Report, Streaming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, whose colours stay apart for colour-blind readers; markers and
# dashes say the same again without colour.
# fmt: off
STYLES: dict[str, dict[str, Any]] = {
    "unconstrained": {"color": "#000000", "marker": "s", "linestyle": "-", "markersize": 4},
    # Open and larger: where both models sit on the tolerance, its markers still show.
    "post-hoc projection": {
        "color": "#E69F00", "marker": "^", "linestyle": "--", "markersize": 9,
        "markerfacecolor": "none",
    },
    "fairness layer": {"color": "#0072B2", "marker": "o", "linestyle": "-", "markersize": 4},
}
RULES: dict[str, dict[str, Any]] = {
    # On top: where the paper's rule moves nothing, both show.
    "raw scores": {"color": "#000000", "linestyle": ":", "zorder": 3},
    "the paper's rule": {"color": "#E69F00", "linestyle": (0, (5, 1.5))},
    "the pooled rule": {"color": "#0072B2", "linestyle": "-"},
}
BEFORE_LAYER: dict[str, Any] = {"color": "#56B4E9", "marker": "", "linestyle": ":"}
LIMIT: dict[str, Any] = {
    "color": "#D55E00", "linewidth": 1.2, "linestyle": (0, (6, 3)), "zorder": 1
}
# fmt: on


def plot(report: Report, folder: Path) -> tuple[Path, Path]:
    """Save both plots as PNG files into ``folder`` and return their paths.

    Raises:
        ImportError: matplotlib is not installed; ``pip install 'fairopt[demo]'`` brings it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "training.png", folder / "tolerance.png"
    training_figure(report).savefig(paths[0], dpi=150)
    tolerance_figure(report).savefig(paths[1], dpi=150)
    return paths


def figure_of(panels: int, title: str, subtitle: str) -> tuple[Figure, list[Axes]]:
    # Figure, not pyplot: no window, no global state, and any thread may draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * panels, 4.3), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.supxlabel(subtitle, fontsize=9, color="#444444", x=0.01, ha="left")
    return figure, axes


def add_legend(figure: Figure, ax: Axes, columns: int | None = None) -> None:
    """Put the legend of one panel above all, by default in one line."""
    handles, labels = ax.get_legend_handles_labels()
    ncols = columns or len(labels)
    figure.legend(
        handles, labels, loc="outside upper right", ncols=ncols, frameon=False, fontsize=9
    )


def training_figure(report: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    tolerance = report.settings.tolerance
    attributes = list(report.models[0].final.raw.gap)
    figure, axes = figure_of(
        1 + len(attributes),
        "Test set after each epoch",
        f"gap: the largest between two groups ({', '.join(report.settings.notions)}"
        f"{'; true labels' if report.settings.needs_targets else ''}).\n"
        f"All {report.rows['test']:,} test predictions are projected in one call.",
    )
    epochs = [entry.epoch for entry in report.models[0].history]
    common: dict[str, Any] = {"linewidth": 1.6}
    for model in report.models:
        style = {**common, **STYLES[model.name], "label": model.name}
        axes[0].plot(epochs, [entry.fair.log_loss for entry in model.history], **style)
        for ax, name in zip(axes[1:], attributes, strict=True):
            ax.plot(epochs, [entry.fair.gap[name] for entry in model.history], **style)
    for ax, name in zip(axes[1:], attributes, strict=True):
        before = [entry.raw.gap[name] for entry in report.models[-1].history]
        ax.plot(epochs, before, **common, **BEFORE_LAYER, label="its network, before the layer")
        ax.axhline(tolerance, **LIMIT, label=f"tolerance {tolerance:g}")
        ax.set_title(f"gap: {name}", loc="left", fontsize=11)
        ax.set_ylim(bottom=0.0)
    axes[0].set_title("log loss (nats)", loc="left", fontsize=11)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, axes[1], None if len(axes) > 2 else 2)
    return figure


def tolerance_figure(report: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    count = len(report.unconstrained)
    figure, axes = figure_of(
        2,
        "Quality and tolerance",
        f"The layer's networks are trained at each tolerance for {report.settings.epochs} epochs."
        + (f" Lines: mean of {count} seeds; shades: their range." if count > 1 else ""),
    )
    tolerances = [point.tolerance for point in report.sweep]
    curves: tuple[tuple[Axes, str, Callable[[Quality], float]], ...] = (
        (axes[0], "accuracy on the test set", lambda quality: quality.accuracy),
        (axes[1], "log loss on the test set (nats)", lambda quality: quality.log_loss),
    )
    for ax, title, value in curves:
        ways: dict[str, Sequence[Sequence[Quality]]] = {
            "unconstrained": [report.unconstrained] * len(tolerances),
            "post-hoc projection": [point.post_hoc for point in report.sweep],
            "fairness layer": [point.layer for point in report.sweep],
        }
        for name, points in ways.items():
            style = dict(STYLES[name], linewidth=1.6, label=name)
            if name == "unconstrained":
                style["marker"] = ""
            values = np.array([[value(quality) for quality in point] for point in points])
            ax.plot(tolerances, values.mean(axis=1), **style)
            low, high = values.min(axis=1), values.max(axis=1)
            ax.fill_between(tolerances, low, high, color=style["color"], alpha=0.12, linewidth=0)
        ax.axvline(report.settings.tolerance, **LIMIT, label="tolerance of the table")
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("tolerance: largest gap allowed between two groups")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    add_legend(figure, axes[0], 2)
    return figure


def plot_streaming(streaming: Streaming, path: Path) -> Path:
    """Save the pooled gap over time as a PNG file, a panel for each size of batches.

    Raises:
        ImportError: matplotlib is not installed; ``pip install 'fairopt[demo]'`` brings it.
    """
    from matplotlib.ticker import StrMethodFormatter

    sizes = sorted({run.batch_size for run in streaming.runs})
    last = max(run.samples[-1] for run in streaming.runs)
    figure, axes = figure_of(
        len(sizes),
        "The gap of everything served so far",
        f"{', '.join(streaming.notions)} on {' and on '.join(streaming.attributes)}; {last:,} "
        "predictions of one model in random order.\n"
        "The paper's rule bounds gaps within batches, the pooled rule the gap that is shown.",
    )
    top = max(1.75 * max(run.end for run in streaming.runs), 2.0 * streaming.tolerance, 1e-3)
    for ax, size in zip(axes, sizes, strict=True):
        ax.axhspan(0.0, streaming.tolerance, color=LIMIT["color"], alpha=0.08, linewidth=0)
        ax.axhline(streaming.tolerance, **LIMIT, label=f"tolerance {streaming.tolerance:g}")
        for run in streaming.runs:
            if run.batch_size == size:
                style = {"linewidth": 1.6, **RULES[run.rule]}
                ax.plot(run.samples, run.gap, label=run.rule, **style)
        ax.set_title(
            "single predictions" if size == 1 else f"batches of {size}", loc="left", fontsize=11
        )
        ax.set_xscale("log")
        ax.set_xlim(10, last)
        ax.set_ylim(0.0, top)
        ax.set_xlabel("predictions served")
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.tick_params(labelleft=ax is axes[0])
    axes[0].set_ylabel("largest gap between two groups")
    add_legend(figure, axes[0])
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path
