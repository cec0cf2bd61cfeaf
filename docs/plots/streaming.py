"""The plot of docs/streaming.md: ``python docs/plots/streaming.py`` writes it beside.

The pooled gap by sex of the Adult test set, one stream in random order, by ``fairopt.demo``. It
needs matplotlib; some seconds on one core.
"""

from __future__ import annotations

from pathlib import Path

from fair_selection import chances

from fairopt.datasets import load_adult
from fairopt.demo import Settings
from fairopt.demo.plots import plot_streaming
from fairopt.demo.streaming import serve_all


def main() -> None:
    adult = load_adult()
    streaming = serve_all(
        chances(adult), adult.test, Settings(attributes=("sex",)), bounds=(0.0, 1.0)
    )
    plot_streaming(streaming, Path(__file__).parents[1] / "streaming.png")
    print(streaming)


if __name__ == "__main__":
    main()
