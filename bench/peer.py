"""How does the layer compare with fairness-training 0.1.0, on the same problem?

The peer's hard-constraint FairModel around a network that passes its input through, against
FairnessLayer: demographic parity between two groups, tolerance 0.05, bounds (0, 1), float32,
forward and backward.
"""

from __future__ import annotations

import warnings

import torch
from fairness_training import FairModel
from torch import Tensor

from bench.harness import RESULTS, Report, Spread, arguments, interleaved, ratio
from bench.problems import Problem, forward_backward, probabilities
from fairopt import DemographicParity, FairnessLayer

TOLERANCE = 0.05


class PassThrough(torch.nn.Module):
    """A network whose output is what was put into `scores`.

    The peer takes the groups from a column of its input, which therefore cannot require grad: the
    scores come by another way.
    """

    scores: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scores


class Peer:
    """FairModel behind the signature that forward_backward expects."""

    def __init__(self) -> None:
        self.network = PassThrough()
        self.model = FairModel(
            input_dim=1,
            custom_network=self.network,
            protected_attr_idx=0,
            prediction_bounds=(0.0, 1.0),
            fairness_tolerance=TOLERANCE,
            fairness_metric="mean_pred",
        )

    def __call__(self, scores: Tensor, inputs: Tensor) -> Tensor:
        self.network.scores = scores
        return self.model(inputs)


def compare(report: Report, n: int, at_least: float, seconds: float, calls: int) -> None:
    problem: Problem = probabilities(n)
    column = problem.scores.detach().reshape(n, 1).clone().requires_grad_()
    gradient = problem.gradient.reshape(n, 1)
    inputs = problem.groups.float().reshape(n, 1)
    ours = FairnessLayer(DemographicParity(tolerance=TOLERANCE), bounds=(0, 1), backend="numba")
    peer = Peer()

    # The same question gets the same answer, to what the peer's solver delivers.
    theirs = peer(column, inputs)
    theirs.backward(gradient.to(theirs.dtype))
    mine = ours(problem.scores, problem.groups)
    mine.backward(problem.gradient)
    assert column.grad is not None
    assert problem.scores.grad is not None
    report.add(
        f"largest difference of the outputs, n = {n:,}",
        (mine - theirs.reshape(-1)).abs().max().item(),
        at_most=1e-3,
    )
    gap = (problem.scores.grad - column.grad.reshape(-1)).abs()
    report.add(f"median difference of the gradients, n = {n:,}", gap.median().item(), at_most=1e-3)
    report.add(f"largest difference of the gradients, n = {n:,}", gap.max().item())
    column.grad = problem.scores.grad = None

    times = interleaved(
        {
            "peer": forward_backward(peer, column, gradient.to(theirs.dtype), inputs),
            "fairopt": forward_backward(ours, problem.scores, problem.gradient, problem.groups),
        },
        seconds=seconds,
        warmup=1,
        calls={"fairopt": calls},
    )
    report.add(
        f"fairness-training / fairopt, n = {n:,}",
        ratio(times, "peer", "fairopt"),
        "times",
        at_least=at_least,
        detail=f"forward + backward; {calls} calls of fairopt after each of the peer",
    )
    report.add(f"fairness-training, n = {n:,}", Spread.of(times["peer"]).scaled(1e3), "ms")
    report.add(f"fairopt, n = {n:,}", Spread.of(times["fairopt"]).scaled(1e3), "ms")


def main() -> None:
    options = arguments(__doc__ or "")
    warnings.filterwarnings("ignore")  # the peer's dependencies warn on every forward pass
    packages = ("fairness-training", "cvxpy", "cvxpylayers", "diffcp", "scs")
    report = Report("peer", (__doc__ or "").strip(), packages)
    compare(report, 64, 60, options.seconds, calls=50)
    compare(report, 10_000, 2_000, options.seconds, calls=50)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
