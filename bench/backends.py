"""What does a backend cost beyond the solver that it wraps, and how long does each take?

Projections onto demographic parity between two groups, tolerance 0.05, bounds (0, 1), float64; the
rows always bind. `fairopt.solve` on the QP that `formulate` writes, and its backward pass, beside

- raw OSQP, set up once: update, solve, and OSQP's own adjoint. The scores change with every call:
  "same people" have new scores near the old ones, as when a model trains on all data at once;
  "next batch" draws groups and scores anew, so that the matrix changes, too;
- raw qpth, its batched solver with the linear solves of its own backward pass.

Neither raw side checks its answer. What they need (sparse matrices, one-sided rows) is assembled
beforehand; fairopt does that in every call. First calls are those of a fresh backend object.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import osqp
import torch
from scipy import sparse
from torch import Tensor

from bench.harness import RESULTS, Report, Spread, arguments, fresh, interleaved, ratio
from bench.problems import able
from fairopt import QP, DemographicParity, backends, formulate, solve
from fairopt.backends import OSQP, QPTH, Backend
from fairopt.backends.osqp.scaled import Standard
from fairopt.backends.qpth.backend import from_file
from fairopt.programs.solution import Solution, Status
from fairopt.programs.tensors import unchecked

PARITY = DemographicParity(tolerance=0.05)
CALLS = 8  # different problems, in turn
# Two successive sets of scores of the same people differ by about this much in their logits.
STEP = 0.05

# The table: problems in a batch, samples in a problem.
BATCHES = (1, 64, 1024, 4096)
LENGTHS = (16, 64, 256, 512)
LONGEST = 5.0  # seconds of one call, beyond which larger sizes are left out
DENSE_COPIES = 12  # of (2n)^2 numbers per problem that a dense interior point holds, about


IN_A_PROCESS = """
import json, sys, time
import torch
from fairopt import DemographicParity, FairnessLayer
n = int(sys.argv[1])
scores = torch.linspace(0, 1, n, dtype=torch.float64).requires_grad_()
groups = (torch.arange(n) > 0.4 * n).long()
times = []
layer = FairnessLayer(DemographicParity(tolerance=0.05), bounds=(0, 1), backend="osqp")
for _ in range(20):
    began = time.perf_counter()
    layer(scores, groups).sum().backward()
    times.append(time.perf_counter() - began)
print(json.dumps({"ratio": times[0] / sorted(times[1:])[9]}))
"""


# ---------------------------------------------------------------- problems


def parity(logits: Tensor, groups: Tensor) -> QP:
    """The projection of these probabilities, as `formulate` writes it, q a leaf."""
    problem = formulate(PARITY, logits.sigmoid(), groups, bounds=(0, 1))
    return unchecked(QP, **{**vars(problem), "q": problem.q.detach().requires_grad_()})


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def same_people(n: int) -> list[QP]:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 2, (n,), generator=generator)
    logits = 1.5 * draw(generator, n) + groups - 0.5
    problems = []
    for _ in range(CALLS):
        problems.append(parity(logits, groups))
        logits = logits + STEP * draw(generator, n)
    return problems


def next_batch(n: int) -> list[QP]:
    generator = torch.Generator().manual_seed(0)
    problems = []
    for _ in range(CALLS):
        groups = torch.randint(0, 2, (n,), generator=generator)
        problems.append(parity(1.5 * draw(generator, n) + groups - 0.5, groups))
    return problems


def batch(b: int, n: int, device: torch.device) -> tuple[QP, Tensor]:
    """A batch of b problems over the same people, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(n) % 2
    logits = 1.5 * draw(generator, b, n) + groups - 0.5
    return parity(logits.to(device), groups.to(device)), draw(generator, b, n).to(device)


Step = Callable[[], tuple[Solution, Tensor]]


def through_fairopt(
    backend: Callable[[], str | Backend], problems: Sequence[QP], gradient: Tensor
) -> Step:
    """Forward and backward of these problems in turn; the solution, and the gradient of q."""
    turn = itertools.cycle(problems)

    def step() -> tuple[Solution, Tensor]:
        problem = next(turn)
        problem.q.grad = None
        solution = solve(problem, backend=backend())
        solution.x.backward(gradient)
        assert problem.q.grad is not None
        return solution, problem.q.grad

    return step


def forward_only(backend: Callable[[], str | Backend], problems: Sequence[QP]) -> Step:
    turn = itertools.cycle(problems)

    def step() -> tuple[Solution, Tensor]:
        with torch.no_grad():
            solution = solve(next(turn), backend=backend())
        return solution, solution.x

    return step


def judged(problem: QP, x: Tensor, y: Tensor) -> Solution:
    """A raw solver's answer before our residuals, clipped into the bounds for their sake."""
    x = torch.minimum(torch.maximum(x, problem.lb), problem.ub)
    status = (Status.SOLVED,) * len(x)
    return Solution(problem=problem.detach(), x=x, row_dual=y, status=status, backend="raw")


# ---------------------------------------------------------------- OSQP


class RawOSQP:
    """OSQP without fairopt, on the data of these problems, which have one pattern.

    Args:
        settings: of OSQP.
        problems: what it is called on, in turn.
    """

    def __init__(self, problems: Sequence[QP], **settings: Any) -> None:
        self.problems, self.settings = problems, settings
        self.gradient = np.zeros(problems[0].shape[2])
        self.q = [p.q[0].detach().numpy() for p in problems]
        self.A = [self.matrix(p) for p in problems]
        self.sides = [
            tuple(
                torch.cat(pair, -1)[0].numpy()
                for pair in ((p.l.detach(), p.lb), (p.u.detach(), p.ub))
            )
            for p in problems
        ]
        self.changes = any(not np.array_equal(A.data, self.A[0].data) for A in self.A)
        self.turn: Iterator[int] = itertools.cycle(range(len(problems)))
        self.solver = self.fresh(0)

    @staticmethod
    def matrix(problem: QP) -> Any:
        """The rows, and below them the identity for the bounds."""
        A = sparse.csc_array(problem.rows.to_dense().matrix[0].numpy())
        eye = sparse.eye_array(problem.shape[2], format="csc")
        return sparse.csc_matrix(sparse.vstack([A, eye], format="csc"))

    def fresh(self, i: int) -> Any:
        """Setup on problem i; what is passed is copied, as OSQP keeps and changes it."""
        P = sparse.csc_matrix(sparse.diags_array(self.problems[i].P[0].numpy()))
        solver = osqp.OSQP(algebra="builtin")
        low, high = self.sides[i]
        solver.setup(P, self.q[i], self.A[i].copy(), low, high, verbose=False, **self.settings)
        return solver

    def update(self, i: int) -> None:
        if self.changes:
            self.solver.update(q=self.q[i], Ax=self.A[i].data)
        else:
            self.solver.update(q=self.q[i])

    def forward(self) -> Any:
        self.update(next(self.turn))
        return self.solver.solve(raise_error=False)

    def first(self) -> Any:
        return self.fresh(next(self.turn)).solve(raise_error=False)

    def step(self) -> tuple[Any, Any]:
        """What it found, and the gradient of q."""
        found = self.forward()
        self.solver.adjoint_derivative_compute(dx=self.gradient)
        return found, self.solver.adjoint_derivative_get_vec()[0]

    def worst(self) -> float:
        """The largest of our residuals over all problems, each solved in its turn."""
        found = []
        for problem in self.problems:
            answer = self.forward()
            x, y = torch.from_numpy(answer.x.copy()), torch.from_numpy(answer.y.copy())
            m = problem.shape[1]
            found.append(judged(problem, x[None], y[None, :m]).residuals.worst)
        return max(found)


class Driven(RawOSQP):
    """OSQP on the scaled data of fairopt's backend, with exactly its settings."""

    def __init__(self, problems: Sequence[QP], backend: OSQP) -> None:
        self.problems = problems
        self.gradient = np.zeros(problems[0].shape[2])
        forms = [Standard(problem.detach()).scaled(0) for problem in problems]
        self.q, self.A = [f.q for f in forms], [f.A for f in forms]
        self.sides = [(f.l, f.u) for f in forms]
        self.changes = any(not np.array_equal(A, self.A[0]) for A in self.A)
        self.turn = itertools.cycle(range(len(problems)))
        with torch.no_grad():
            solve(problems[0], backend=backend)
        ((_, workspace),) = backend._workspaces.idle.values()
        self.solver = workspace.solver

    def update(self, i: int) -> None:
        l, u = self.sides[i]
        changed = {"Ax": self.A[i]} if self.changes else {}
        self.solver.update(q=self.q[i], l=l, u=u, **changed)


def equally_exact(problems: Sequence[QP], target: float) -> tuple[RawOSQP, float, float]:
    """Raw OSQP with the loosest tolerance that leaves our residuals below target, if one does."""
    for eps in (1e-6, 1e-8, 1e-10, 1e-12):
        raw = RawOSQP(problems, eps_abs=eps, eps_rel=eps, polishing=True, max_iter=20_000)
        worst = raw.worst()
        if worst <= target:
            break
    return raw, eps, worst


def osqp_overhead(report: Report, kind: str, problems: Sequence[QP], seconds: float) -> None:
    n = problems[0].shape[2]
    label = f"{kind}, n = {n:,}"
    gradient = draw(torch.Generator().manual_seed(1), 1, n)
    kept = OSQP()
    ours = through_fairopt(lambda: kept, problems, gradient)
    answers = [ours() for _ in problems]
    residual = max(solution.residuals.worst for solution, _ in answers)
    raw, eps, worst = equally_exact(problems, 1e-11)
    raw.gradient = gradient[0].numpy()
    driven = Driven(problems, OSQP())
    driven.gradient = raw.gradient

    raw.turn = itertools.cycle(range(len(problems)))
    theirs = [raw.step()[1] for _ in problems]
    gaps = torch.stack(
        [(dq[0] - torch.from_numpy(v)).abs() for (_, dq), v in zip(answers, theirs, strict=True)]
    )

    times = interleaved(
        {
            "fairopt": ours,
            "raw": raw.step,
            "driven": driven.step,
            "fairopt forward": forward_only(lambda: kept, problems),
            "raw forward": raw.forward,
            "raw first forward": raw.first,
            "first forward": forward_only(OSQP, problems),
        },
        seconds=seconds,
    )
    # As many calls in a row as there are problems: nothing else has the caches in between.
    in_a_row = interleaved(
        {"fairopt": ours, "first": through_fairopt(OSQP, problems, gradient)},
        seconds=seconds / 2,
        calls={"fairopt": CALLS, "first": CALLS},
    )
    report.add(
        f"osqp / raw OSQP, {label}",
        ratio(times, "fairopt", "raw"),
        at_most=1.3,
        detail="forward + backward, equally exact: raw OSQP polished, its tolerance "
        f"{eps:g}, worst residual {worst:.0e} (fairopt: {residual:.0e}); update, solve, "
        "adjoint_derivative_compute, adjoint_derivative_get_vec",
    )
    report.add(
        f"osqp / its own workspace alone, {label}",
        ratio(times, "fairopt", "driven"),
        detail="the same, raw OSQP on fairopt's scaled data with fairopt's settings (loose, not "
        "polished): neither scaling, refinement nor a check, and a rough gradient",
    )
    report.add(
        f"osqp / raw OSQP, forward only, {label}",
        ratio(times, "fairopt forward", "raw forward"),
        detail="equally exact, as above",
    )
    report.add(
        f"gradients that raw OSQP has wrong by more than 0.001, {label}",
        float((gaps.amax(-1) > 1e-3).sum()),
        f"of {len(problems)} problems",
        detail="its adjoint takes a bound for active that is merely near; "
        f"median difference from fairopt {gaps.median():.0e}",
    )
    report.add(
        f"first call / repeated call, osqp, {label}",
        ratio(in_a_row, "first", "fairopt"),
        "times",
        at_least=2,
        detail="forward + backward; a fresh backend object each time, the solver's package loaded; "
        f"{CALLS} calls in a row in each turn",
    )
    report.add(
        f"first / repeated, osqp, forward only, {label}",
        ratio(times, "first forward", "fairopt forward"),
        "times",
    )
    report.add(
        f"first / repeated, raw OSQP, forward only, {label}",
        ratio(times, "raw first forward", "raw forward"),
        "times",
        detail="setup and solve / update and solve",
    )
    for name in ("fairopt", "raw"):
        report.add(f"{name}, forward + backward, {label}", Spread.of(times[name]).scaled(1e3), "ms")
    for name, what in (("fairopt", "repeated call"), ("first", "first call")):
        spread = Spread.of(in_a_row[name]).scaled(1e3)
        report.add(f"{what}, osqp, forward + backward, {label}", spread, "ms")


# ---------------------------------------------------------------- qpth


def raw_module() -> ModuleType:
    """`qpth.solvers.pdipm.batch` as it is; the package itself would import CVXPY."""
    spec = importlib.util.find_spec("qpth")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    before = sys.modules.get("qpth.util")
    sys.modules["qpth.util"] = before or from_file("bench._qpth_util", root / "util.py")
    try:
        return from_file("bench._qpth_batch", root / "solvers" / "pdipm" / "batch.py")
    finally:
        if before is None:
            del sys.modules["qpth.util"]


class RawQpth:
    """qpth's batched interior point on one batch; its backward pass for the gradient of q only."""

    def __init__(
        self, problem: QP, gradient: Tensor, *, eps: float = 1e-12, max_iter: int = 20
    ) -> None:
        self.solver, self.eps, self.max_iter = raw_module(), eps, max_iter
        self.gradient = gradient
        problem = problem.detach()
        A = problem.rows.to_dense().matrix
        b, _, n = A.shape
        eye = torch.eye(n, dtype=A.dtype, device=A.device).expand(b, n, n)
        self.m = A.shape[1]
        self.Q, self.q = torch.diag_embed(problem.P).contiguous(), problem.q.detach()
        self.G = torch.cat([A, -A, eye, -eye], 1)
        self.h = torch.cat([problem.u, -problem.l, problem.ub, -problem.lb], 1)
        self.none = A.new_zeros(0)  # no equalities

    def forward(self) -> tuple[Tensor, ...]:
        factors = self.solver.pre_factor_kkt(self.Q, self.G, self.none)
        x, _, lam, slack = self.solver.forward(
            self.Q, self.q, self.G, self.h, self.none, self.none, *factors,
            eps=self.eps, verbose=-1, maxIter=self.max_iter,
        )  # fmt: skip
        return x, lam, slack, *factors

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, the rows' multipliers, and the gradient of q."""
        x, lam, slack, Q_LU, S_LU, R = self.forward()
        d = lam.clamp(min=1e-8) / slack.clamp(min=1e-8)
        self.solver.factor_kkt(S_LU, R, d)
        zero = torch.zeros_like(lam)
        dq, *_ = self.solver.solve_kkt(
            Q_LU, d, self.G, self.none, S_LU, self.gradient, zero, zero, self.none
        )
        return x, lam[:, : self.m] - lam[:, self.m : 2 * self.m], dq


def qpth_overhead(report: Report, b: int, n: int, device: torch.device, seconds: float) -> None:
    problem, gradient = batch(b, n, device)
    backend = QPTH()
    ours = through_fairopt(lambda: backend, [problem], gradient)
    raw = RawQpth(problem, gradient)
    same = RawQpth(problem, gradient, eps=backend.eps, max_iter=backend.max_iter)
    solution, _ = ours()
    residual = {}
    for name, one in (("raw", raw), ("same", same)):
        x, y, _ = one.step()
        residual[name] = judged(problem, x, y).residuals.worst
    label = f"{device_name(device)}, B = {b:,}, n = {n:,}"
    times = interleaved(
        {
            "fairopt": waiting(ours, device),
            "raw": waiting(raw.step, device),
            "same": waiting(same.step, device),
        },
        seconds=seconds,
        warmup=1,
    )
    report.add(
        f"qpth / raw qpth, {label}",
        ratio(times, "fairopt", "raw"),
        at_most=1.2,
        detail="forward + backward; raw qpth with its default tolerance 1e-12 leaves a worst "
        f"residual of {residual['raw']:.0e} (fairopt: {solution.residuals.worst:.0e})",
    )
    report.add(
        f"qpth / raw qpth with the same settings, {label}",
        ratio(times, "fairopt", "same"),
        at_most=1.2,
        detail=f"tolerance {backend.eps:g}, as fairopt's: raw qpth leaves {residual['same']:.0e}",
    )
    report.add(f"fairopt, {label}", Spread.of(times["fairopt"]).scaled(1e3), "ms")
    report.add(f"raw qpth, {label}", Spread.of(times["raw"]).scaled(1e3), "ms")


# ---------------------------------------------------------------- table


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def waiting(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same, until the device is done."""
    if device.type != "cuda":
        return step

    def wait() -> object:
        done = step()
        torch.cuda.synchronize(device)
        return done

    return wait


def fits(b: int, n: int, device: torch.device) -> bool:
    """Whether a dense interior point finds room for a batch on the GPU, by a rough count."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return DENSE_COPIES * 8 * b * (2 * n) ** 2 < free


def table(report: Report, device: torch.device, seconds: float) -> None:
    """Forward and backward of every backend that takes such problems on this device."""
    slow: dict[str, list[tuple[int, int]]] = {}
    left_out = []
    for b, n in itertools.product(BATCHES, LENGTHS):
        size = f"B = {b:,}, n = {n:,}"
        if not fits(b, n, device):
            left_out.append(f"{size} (memory)")
            continue
        problem, gradient = batch(b, n, device)
        for name in able(problem):
            if any(b >= least_b and n >= least_n for least_b, least_n in slow.get(name, ())):
                left_out.append(f"{name} {size} (time)")
                continue
            backend = backends.get(name)
            step = waiting(through_fairopt(lambda one=backend: one, [problem], gradient), device)
            begun = time.perf_counter()
            step()
            first = time.perf_counter() - begun
            if first > LONGEST:
                slow.setdefault(name, []).append((b, n))
                found, detail = [first], "forward + backward, one call"
            else:
                found = interleaved({name: step}, seconds=seconds, warmup=1, fewest_rounds=3)[name]
                detail = "forward + backward"
            label = f"{name}, {device_name(device)}, {size}"
            report.add(label, Spread.of(found).scaled(1e3), "ms", detail=detail)
    if left_out:
        report.add(
            f"left out, {device_name(device)}", len(left_out), "sizes", detail="; ".join(left_out)
        )


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("backends", (__doc__ or "").strip(), ("scipy", "osqp", "qpth"))
    for n in (1_000, 10_000):
        osqp_overhead(report, "same people", same_people(n), 4 * options.seconds)
        osqp_overhead(report, "next batch", next_batch(n), 4 * options.seconds)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for n in (1_000, 10_000):
        report.add(
            f"first call in a process / repeated call, osqp, n = {n:,}",
            Spread.of([fresh(IN_A_PROCESS, str(n))["ratio"] for _ in range(5)]),
            "times",
            detail="FairnessLayer, forward + backward; the first call loads the solver's package",
        )
    for device in devices:
        qpth_overhead(report, 64, 64, device, 3 * options.seconds)
    for device in devices:
        table(report, device, options.seconds / 3)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
