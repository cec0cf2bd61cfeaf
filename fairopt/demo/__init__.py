"""The demo: three ways to predict income on the UCI Adult data, side by side.

A small network learns who earns more than 50,000 dollars a year

1. unconstrained;
2. with *post-hoc projection*: the same network, its test predictions projected once, afterwards;
3. with a *fairness layer*: every training batch passes through the projection, so that the network
   learns knowing that its output will be moved.

Both fair ways hold the chosen notions on the chosen attributes at once; by default
demographic parity on sex and on race: for any two groups ``g`` and ``h`` of either attribute

    |mean prediction of g − mean prediction of h| ≤ tolerance.

Notions that speak of outcomes see the labels of training batches. The labels of the test rows are
unknown when they are predicted: a projection that read them would tell them. There the network's
own prediction serves as the chance of each label, the notion holds in expectation over these
chances, and the gaps with the true labels are reported beside it.

Predictions are kept in [0.001, 0.999], not in [0, 1]. A projection onto [0, 1] returns exact zeros
and ones, for which the log loss is infinite where they are wrong. Clamping inside the loss would
score predictions that nobody made; bounds of the projection itself keep loss, predictions and
guarantee about one and the same numbers. A confident right prediction loses about 0.001 nats by it.

If asked to, it also serves the test rows as a stream, one or a few at a time, by the paper's rule
and by the pooled one of ``OnlineParity``, and follows the gap in all that was served.

``run_demo`` returns the figures as a ``Report`` and prints nothing; its command: ``fairopt demo``.
"""

from fairopt.demo.plots import plot, plot_streaming
from fairopt.demo.report import (
    Epoch,
    Model,
    Quality,
    Report,
    Settings,
    Streamed,
    Streaming,
    SweepPoint,
)
from fairopt.demo.run import run_demo

# fmt: off
__all__ = [
    "Epoch", "Model", "Quality", "Report", "Settings", "Streamed", "Streaming", "SweepPoint",
    "plot", "plot_streaming", "run_demo",
]
# fmt: on
