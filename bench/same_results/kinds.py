"""The kinds of problems: each draws one, solves it, and keeps everything that is returned."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import (
    FairnessLayer,
    OnlineParity,
    StratifiedBatchSampler,
    audit,
    backend_of,
    cross_validate,
    formulate,
    project,
    solve,
)
from drawing import PARITY, Draw, bare, draw_notions, draw_samples, draw_scores
from record import Record, keep_gradients, keep_problem, keep_solution
from torch import Tensor

import fairopt
from fairopt import (
    LP,
    QP,
    BlockRows,
    Budget,
    CellRows,
    Constraint,
    Covariance,
    DemographicParity,
    DenseRows,
    EqualizedOdds,
    GroupCalibration,
    ImpactRatio,
    MinimumRate,
    Rows,
    SparseRows,
    load_problem,
    residuals,
    save_problem,
)


def layer(draw: Draw, record: Record) -> None:
    """The layer with the least squares: all notions, shapes, dtypes, backends, elastic or not."""
    backend = draw.one("auto", "auto", "auto", "numba", "numba", "osqp", "qpth")
    most = {"osqp": 60, "qpth": 16}.get(backend, draw.one(60, 300, 300, 4_000))
    samples = draw_samples(draw, most)
    notions = draw_notions(draw, samples)
    options: dict[str, Any] = {
        "bounds": samples.bounds,
        "missing_group": draw.one("skip", "skip", "skip", "skip", "raise"),
        "group_counts": draw.one(None, None, None, None, {"sex": 9}),
        "elastic": draw.chance(0.35),
    }
    groups = bare(draw, samples.groups, notions)
    if not isinstance(groups, dict):
        options["group_counts"] = None
    rest = {"weights": samples.weights}
    g = draw.normal(samples.scores.numel())
    formulated = {k: v for k, v in options.items() if k != "elastic"}
    problem = formulate(notions, samples.scores, groups, samples.targets, **formulated, **rest)
    keep_problem(record, problem)
    module = FairnessLayer(notions, backend=draw_backend(draw, backend), **options)
    x = module(samples.scores, groups, samples.targets, **rest)
    record.add("x", x)
    assert module.last is not None
    keep_solution(record, module.last)
    keep_gradients(record, x, samples.leaves, g)
    if draw.chance(0.3):
        again = module(samples.scores, groups, samples.targets, **rest)
        record.add("again", again)


def draw_backend(draw: Draw, name: str) -> Any:
    """The backend by its name, or now and then with options of its own."""
    if name == "auto" or draw.chance(0.5):
        return name
    options: dict[str, Any] = {
        "numba": {"threads": draw.one(None, 1, 2)},
        "osqp": {"eps": draw.one(1e-6, 1e-8), "threads": draw.one(None, 1, 2)},
        "qpth": {"eps": draw.one(1e-9, 1e-11), "max_iter": draw.one(40, 80)},
        "highs": {"method": draw.one("simplex", "interior-point"), "presolve": draw.chance(0.5)},
    }[name]
    return backend_of(name, **options)


def layer_two_groups(draw: Draw, record: Record) -> None:
    """The plainest layer, of sizes up to the largest code paths."""
    n = draw.size(2, draw.one(100, 1_000, 60_000))
    batch = draw.one(None, None, 3)
    shape = (n,) if batch is None else (batch, n)
    codes = torch.from_numpy(draw.rng.integers(0, draw.one(2, 2, 4), n))
    values = draw_scores(draw, shape, codes.numpy() > 0)
    dtype = draw.one(torch.float64, torch.float32, torch.float32, torch.bfloat16)
    scores = draw.tensor(values, dtype).requires_grad_()
    module = FairnessLayer(
        DemographicParity(draw.one(0.0, 0.02, 0.05)), bounds=draw.one((0, 1), None, (0, None)),
        backend="numba", elastic=draw.chance(0.2),
    )  # fmt: skip
    for call in range(draw.one(1, 2)):
        x = module(scores, codes)
        record.prefix += f"/{call}"
        record.add("x", x)
        assert module.last is not None
        keep_solution(record, module.last)
        keep_gradients(record, x, {"scores": scores}, draw.normal(x.numel()))


def objectives(draw: Draw, record: Record) -> None:
    """The linear objectives, with smoothing and without."""
    smoothing = draw.one(0.0, 0.1, 1.0)
    backend = draw.one("auto", "numba", "osqp", "qpth") if smoothing else draw.one("auto", "highs")
    samples = draw_samples(draw, {"qpth": 10, "osqp": 30}.get(backend, 80))
    if samples.bounds is None or samples.bounds[1] is None:
        samples.bounds = (0.0, 1.0)
    notions = draw_notions(draw, samples)
    objective = draw.one("l1", "linf", "utility")
    leaves = samples.leaves
    if smoothing == 0:
        for leaf in leaves.values():
            leaf.requires_grad_(False)
    options: dict[str, Any] = {"bounds": samples.bounds, "objective": objective}
    keep_problem(
        record,
        formulate(
            notions, samples.scores, samples.groups, samples.targets, weights=samples.weights,
            **options,
        ),
    )  # fmt: skip
    module = FairnessLayer(
        notions, backend=draw_backend(draw, backend), smoothing=smoothing, **options
    )
    x = module(samples.scores, samples.groups, samples.targets, weights=samples.weights)
    record.add("x", x)
    assert module.last is not None
    keep_solution(record, module.last)
    keep_gradients(record, x, leaves, draw.normal(x.numel()))


def multi_class(draw: Draw, record: Record) -> None:
    """Predictions on the simplex."""
    backend = draw.one("auto", "numba", "numba", "osqp", "qpth")
    n = draw.size(4, {"osqp": 25, "qpth": 6}.get(backend, 150))
    classes = draw.one(2, 3, 3, 5)
    shape = (n,) if draw.chance(0.75) else (2, n)
    rng = draw.rng
    chances = rng.dirichlet(np.full(classes, 1.0), shape)
    if draw.chance(0.3):
        chances = chances + 0.2 * rng.normal(size=chances.shape)
    scores = draw.tensor(chances, draw.one(torch.float64, torch.float64, torch.float32))
    groups = {"sex": torch.from_numpy(rng.integers(0, draw.one(2, 3), n))}
    targets = torch.from_numpy(rng.integers(0, classes, shape))
    if draw.chance(0.2):
        targets = draw.tensor(rng.dirichlet(np.full(classes, 1.0), shape))
    kind = draw.one(*PARITY[:5], MinimumRate, GroupCalibration)
    tolerance = draw.one(0.0, 0.02, 0.1, 0.3)
    notion: Constraint
    if kind is MinimumRate:
        notion = MinimumRate(0.5 / classes)
    elif kind is GroupCalibration:
        notion = GroupCalibration(0.2 + tolerance, 2)
    else:
        notion = kind(tolerance)
    weights = draw.tensor(10.0 ** rng.uniform(-1, 1, n)) if draw.chance(0.3) else None
    leaves = {"scores": scores.requires_grad_()}
    if weights is not None:
        leaves["weights"] = weights.requires_grad_()
    keep_problem(
        record,
        formulate(notion, scores, groups, targets, bounds=(0, 1), classes=classes, weights=weights),
    )
    module = FairnessLayer(
        notion, bounds=(0, 1), classes=classes, backend=draw_backend(draw, backend),
        missing_group=draw.one("skip", "skip", "raise"),
        group_counts=draw.one(None, None, {"sex": 4}),
    )  # fmt: skip
    x = module(scores, groups, targets, weights=weights)
    record.add("x", x)
    assert module.last is not None
    keep_solution(record, module.last)
    keep_gradients(record, x, leaves, draw.normal(x.numel()))
    if x.dim() == 2:
        outcome = targets if targets.dim() < 3 else None
        record.add("audit", audit(x, groups, notion, outcome, weights=weights, classes=classes))


def many_attributes(draw: Draw, record: Record) -> None:
    """Attributes with large products of groups, for which rows are held in partitions."""
    n = draw.size(20, 800)
    groups = {
        f"a{k}": torch.from_numpy(draw.rng.integers(0, draw.one(2, 3, 7), n))
        for k in range(draw.one(4, 6, 9))
    }
    values = draw_scores(draw, (n,), groups["a0"].numpy())
    scores = draw.tensor(values, draw.one(torch.float64, torch.float32)).requires_grad_()
    targets = draw.tensor(draw.rng.integers(0, 2, n))
    notions = [draw.one(*PARITY)(draw.one(0.0, 0.02, 0.1)) for _ in range(draw.one(1, 1, 2))]
    weights = draw.tensor(draw.rng.random(n)) if draw.chance(0.3) else None
    leaves = {"scores": scores}
    if weights is not None:
        leaves["weights"] = weights.requires_grad_()
    module = FairnessLayer(
        notions, bounds=draw.one((0, 1), None), backend=draw.one("auto", "numba"),
        elastic=draw.chance(0.3),
    )  # fmt: skip
    x = module(scores, groups, targets, weights=weights)
    record.add("x", x)
    assert module.last is not None
    keep_solution(record, module.last)
    keep_gradients(record, x, leaves, draw.normal(n))


def draw_rows(draw: Draw, batch: int, m: int, n: int, form: str) -> Rows:
    """Rows of any form, with repeated or dependent ones now and then."""
    rng = draw.rng
    if form == "cells":
        k = draw.one(2, 3, 6)
        coefficient = rng.normal(size=(batch, m, k)) * (rng.random((batch, m, k)) < 0.7)
        cell = torch.from_numpy(rng.integers(0, k, (batch, n)))
        weight = draw.tensor(rng.random((batch, n)) + 0.1)
        return CellRows(draw.tensor(coefficient), cell, weight)
    matrix = rng.normal(size=(batch, m, n))
    if m > 2 and draw.chance(0.3):
        matrix[:, -1] = matrix[:, 0] - matrix[:, 1]
    if form == "sparse":
        entry = np.argwhere(rng.random((m, n)) < 0.5)
        row, column = torch.from_numpy(entry.T.copy())
        values = matrix[:, entry[:, 0], entry[:, 1]]
        return SparseRows(row, column, draw.tensor(values), m, n)
    return DenseRows(draw.tensor(matrix))


def general(draw: Draw, record: Record) -> None:
    """QPs and LPs in every form of rows, feasible or not, by each backend that takes them."""
    rng = draw.rng
    backend = draw.one("auto", "numba", "osqp", "qpth", "highs")
    linear = backend == "highs" or draw.chance(0.15)
    n, batch = draw.size(1, 10 if backend == "qpth" else 24), draw.one(1, 1, 3)
    m = int(rng.integers(0, max(1, n // 2) + 2))
    rows = draw_rows(draw, batch, m, n, draw.one("dense", "sparse", "cells"))
    inner = draw.normal(batch, n)
    value = rows.apply(inner)
    gap = draw.tensor(rng.exponential(0.5, (2, batch, m)))
    gap[:, :, torch.from_numpy(rng.random(m) < 0.2)] = 0.0
    if draw.chance(0.12) and m:
        gap[1, :, 0] = -3.0 - gap[0, :, 0] - draw.one(0.0, 5.0)  # sides that may not be reachable
        gap[0, :, 0] = -gap[1, :, 0]
    l, u = value - gap[0], value + gap[1]
    l[:, torch.from_numpy(rng.random(m) < 0.2)] = -math.inf
    u[:, torch.from_numpy(rng.random(m) < 0.1)] = math.inf
    lb: Any = inner - draw.tensor(rng.exponential(0.5, (batch, n)))
    ub: Any = inner + draw.tensor(rng.exponential(0.5, (batch, n)))
    lb, ub = draw.one((lb, ub), (lb, ub), (lb, None), (None, None))
    q = draw.normal(batch, n) * draw.one(1.0, 1.0, 100.0)
    options: dict[str, Any] = {}
    problem: QP | LP
    names = tuple(f"row {k}" for k in range(m)) if draw.chance(0.5) else ()
    if linear:
        problem = LP(q, rows, l, u, lb, ub, row_names=names)
        options["smoothing"] = 0.0 if backend == "highs" else draw.one(0.0, 0.1, 0.5)
    else:
        P: Tensor | SparseRows = draw.tensor(10.0 ** rng.uniform(-1, 1, (batch, n)))
        if draw.chance(0.1 if backend == "numba" else 0.6):
            factor = rng.normal(size=(batch, n, max(1, n - draw.one(0, 0, 0, 2))))
            P = draw.tensor(factor @ factor.transpose(0, 2, 1))
            if draw.chance(0.3):
                P = DenseRows(P).to_sparse()
        problem = QP(P, q, rows, l, u, lb, ub, row_names=names)
    dtype = draw.one(torch.float64, torch.float64, torch.float32)
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in problem.tensors]
    if isinstance(problem, QP):
        problem = problem.with_tensors(*(t.clone() for t in tensors))
        leaves = {f"data {k}": t.requires_grad_() for k, t in enumerate(problem.tensors)}
    else:
        leaves = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        save_problem(problem, path)
        keep_problem(record, load_problem(path), "stored")
    solution = solve(problem, backend=draw_backend(draw, backend), **options)
    keep_solution(record, solution)
    judged = residuals(
        solution.problem, solution.x.detach(), solution.row_dual, solution.bound_dual
    )
    record.add("judged", judged)
    keep_gradients(record, solution.x, leaves, draw.normal(solution.x.numel()))


def blocks(draw: Draw, record: Record) -> None:
    """QPs over blocks with a given sum."""
    rng = draw.rng
    n, width, k, m = draw.size(2, 30), draw.one(2, 3, 4), draw.one(2, 3), draw.one(1, 2, 3)
    coefficient = draw.normal(1, m, k, width)
    cell = torch.from_numpy(rng.integers(0, k, (1, n)))
    rows = BlockRows(coefficient, cell, draw.tensor(rng.random((1, n)) / n))
    inner = draw.tensor(rng.dirichlet(np.full(width, 1.0), (1, n)).reshape(1, n * width))
    value = rows.apply(inner)[:, :m]
    slack = draw.one(0.0, 0.01, 0.1)
    one = torch.ones(1, n, dtype=torch.float64)
    l, u = torch.cat([value - slack, one], 1), torch.cat([value + slack, one], 1)
    q = draw.normal(1, n * width).requires_grad_()
    P = draw.tensor(rng.random((1, n)) + 0.5).repeat_interleave(width, 1)
    problem = QP(P, q, rows, l, u, 0.0, draw.one(1.0, None))
    solution = solve(problem, backend=draw.one("auto", "numba", "osqp"))
    keep_solution(record, solution)
    keep_gradients(record, solution.x, {"q": q}, draw.normal(n * width))


def streams(draw: Draw, record: Record) -> None:
    """Streams with every feedback: served, observed, counted, merged, saved and reported."""
    rng = draw.rng
    feedback = draw.one("pooled", "pooled", "batch", "hard")
    n = draw.size(20, 600)
    samples = draw_samples(draw, 8, hard=True, batched=False)
    groups: dict[str, Tensor] = {
        name: torch.from_numpy(rng.integers(0, draw.one(2, 2, 4), n))
        for name in ("sex", "race")[: draw.one(1, 1, 2)]
    }
    if draw.chance(0.15):
        chances = rng.dirichlet(np.full(3, 0.5), n)
        groups["race"] = draw.tensor(chances / chances.sum(-1, keepdims=True))
    values = draw_scores(draw, (n,), groups["sex"].numpy()).clip(-0.2, 1.2)
    dtype = draw.one(torch.float64, torch.float64, torch.float32, torch.bfloat16)
    scores = draw.tensor(values, dtype)
    targets = draw.tensor(rng.integers(0, 2, n))
    weights = draw.tensor(rng.random(n) + 0.1) if draw.chance(0.25) else None
    samples.groups = groups
    kinds = [*PARITY, MinimumRate, ImpactRatio, GroupCalibration, Budget]
    kinds = list(PARITY) if feedback == "batch" else kinds
    kind = draw.one(*kinds)
    notion: Constraint
    if kind is Budget:
        notion = Budget(mean=(None, 0.4))
    elif kind in (MinimumRate, ImpactRatio):
        notion = kind(draw.one(0.3, 0.5), draw.one(None, "sex"))
    elif kind is GroupCalibration:
        notion = GroupCalibration(0.05, 2)
    else:
        notion = kind(draw.one(0.0, 0.02, 0.05), draw.one(None, "sex", tuple(groups)))
    arguments: dict[str, Any] = {
        "bounds": draw.one((0, 1), (0, 1), (0, None)),
        "feedback": feedback,
        "step_size": draw.one(None, None, 0.3),
        "warm_up": draw.one(0, 30) if feedback == "hard" else 0,
        "history": draw.one(None, 16),
        "group_counts": draw.one(None, None, 4) if len(groups) == 1 else None,
    }
    arguments["unknown_group"] = "raise" if arguments["group_counts"] else "add"
    stream = OnlineParity(notion, **arguments)
    given = targets if feedback == "batch" or draw.chance(0.6) else None
    codes = bare(draw, groups, notion)

    def part(first: int, last: int) -> dict[str, Any]:
        return {
            "groups": codes[first:last]
            if isinstance(codes, Tensor)
            else {name: each[first:last] for name, each in codes.items()},
            "weights": None if weights is None else weights[first:last],
        }

    half = n // 2
    x = stream.run(
        scores[:half], targets=None if given is None else given[:half],
        batch_size=draw.one(1, 1, 7, 64), **part(0, half),
    )  # fmt: skip
    record.add("run", x)
    y = stream(scores[half:], targets=None if given is None else given[half:], **part(half, n))
    record.add("call", y)
    keep_stream(record, stream, "first")
    if given is None and stream.report().pending:
        stream.observe(targets[:half], x, scores=scores[:half], **part(0, half))
        keep_stream(record, stream, "observed")
    else:
        stream.count(
            y, targets=None if given is None else given[half:], scores=scores[half:],
            **part(half, n),
        )  # fmt: skip
        keep_stream(record, stream, "counted")
    other = OnlineParity(notion, **arguments)
    record.add(
        "other",
        other.run(
            scores[half:], targets=None if given is None else given[half:], batch_size=5,
            **part(half, n),
        ),
    )  # fmt: skip
    stream.merge(other)
    keep_stream(record, stream, "merged")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        stream.save(path, notes={"at": n})
        again = OnlineParity(notion, **arguments)
        record.add("notes", again.load(path))
    record.add(
        "resumed", again.run(scores, targets=given, batch_size=3, update=False, **part(0, n))
    )
    again.reset()
    keep_stream(record, again, "reset")


def keep_stream(record: Record, stream: fairopt.OnlineParity, name: str) -> None:
    record.add(f"{name}.report", stream.report().to_dict())
    if stream.history is not None:
        record.add(f"{name}.history", stream.history.to_dict())
    for key, value in stream.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            record.add(f"{name}.state.{key}", value)


def layer_with_stream(draw: Draw, record: Record) -> None:
    """A layer that hands small batches to a stream in eval mode."""
    notion = draw.one(DemographicParity, EqualizedOdds)(0.03)
    online = OnlineParity(notion, bounds=(0, 1))
    module = FairnessLayer(notion, bounds=(0, 1), online=online, minimum_batch=8).eval()
    for k in range(6):
        n = draw.one(1, 3, 12, 40)
        codes = torch.from_numpy(draw.rng.integers(0, 2, n))
        scores = draw.tensor(draw_scores(draw, (n,), codes.numpy())).clip(0, 1)
        targets = draw.tensor(draw.rng.integers(0, 2, n)) if draw.chance(0.7) else None
        record.add(f"x {k}", module(scores, codes, targets))
    record.add("report", online.report().to_dict())


def audits(draw: Draw, record: Record) -> None:
    """Audits of scores as they are, and of their projection."""
    samples = draw_samples(draw, 500, batched=False)
    notions = draw_notions(draw, samples)
    predictions = samples.scores.detach()
    rest = {"weights": None if samples.weights is None else samples.weights.detach()}
    found = audit(
        predictions, samples.groups, notions, samples.targets.detach(),
        scores=draw.one(None, predictions * 0.9),
        group_counts=draw.one(None, None, {"sex": 9}), **rest,
    )  # fmt: skip
    record.add("audit", found.to_dict())
    record.add("text", str(found))
    x = project(
        samples.scores, samples.groups, notions, samples.targets, bounds=samples.bounds,
        elastic=True, weights=samples.weights, missing_group=draw.one("skip", "skip", "raise"),
        group_counts=draw.one(None, None, {"sex": 9}),
    )  # fmt: skip
    record.add("x", x)
    found = audit(
        x.detach(), samples.groups, notions, samples.targets.detach(), scores=predictions, **rest
    )
    record.add("audit of x", found.to_dict())


def agreements(draw: Draw, record: Record) -> None:
    """cross_validate, with everything in its table but the times."""
    samples = draw_samples(draw, 12, batched=False)
    notions = draw_notions(draw, samples)
    problem: QP | LP
    options: dict[str, Any] = {}
    if draw.chance(0.25):
        bounds = (0.0, 1.0) if samples.bounds is None or samples.bounds[1] is None else None
        problem = formulate(
            notions, samples.scores, samples.groups, samples.targets, weights=samples.weights,
            bounds=bounds or samples.bounds, objective="utility",
        )  # fmt: skip
        options["smoothing"] = draw.one(0.0, 0.5)
    else:
        problem = formulate(
            notions, samples.scores, samples.groups, samples.targets, weights=samples.weights,
            bounds=samples.bounds,
        )  # fmt: skip
        options["finite_differences"] = draw.chance(0.2)
        options["cotangents"] = draw.one(3, 1)
        options["tolerance"] = draw.one(None, None, 1e-3)
        options["gradient_tolerance"] = draw.one(None, None, 1e-3)
    options["reference"] = draw.one(None, None, "numba", "osqp")
    options["backends"] = draw.one(None, None, ["numba", "osqp"])
    if isinstance(problem, LP):
        options["reference"] = options["backends"] = None
    if draw.chance(0.2):
        options["seed"] = 1
        if draw.chance(0.5):
            options["inputs"] = {"scores": samples.scores}
    found = cross_validate(problem, repeats=0, **options)
    record.add("agree", found.agree)
    record.add("reference", found.reference)
    record.add("differences", [str(each) for each in found.differences])
    for name in ("undecided", "left_out", "margin", "nearest", "degenerate", "notes"):
        record.add(name, getattr(found, name))
    for k, row in enumerate(found.rows):
        record.add(f"rows {k}", {key: row[key] for key in row if key != "seconds"})


def samplers(draw: Draw, record: Record) -> None:
    """Stratified batches."""
    n = draw.size(20, 400)
    groups = {
        name: torch.from_numpy(draw.rng.integers(0, draw.one(2, 3), n)) for name in ("sex", "race")
    }
    sampler = StratifiedBatchSampler(
        groups, draw.one(8, 16), seed=3, drop_last=draw.chance(0.5), shuffle=draw.chance(0.8)
    )
    for epoch in range(2):
        record.add(f"epoch {epoch}", list(sampler))


def refusals(draw: Draw, record: Record) -> None:
    """Arguments that are refused, each with its message."""
    n = 12
    scores = draw.tensor(draw.rng.random(n)).requires_grad_()
    codes = torch.from_numpy(draw.rng.integers(0, 2, n))
    parity = DemographicParity(0.05)
    usual: dict[str, Any] = {
        "scores": scores, "groups": codes, "constraints": parity, "bounds": (0, 1)
    }  # fmt: skip
    wrong = draw.one(
        {"bounds": (1, 0)}, {"bounds": (0, 1, 2)}, {"bounds": ("0", 1)}, {"bounds": 3},
        {"missing_group": "foo"}, {"classes": -3}, {"classes": 1}, {"classes": 3},
        {"backend": 7}, {"backend": "none"}, {"backend": "highs"}, {"objective": "l3"},
        {"objective": "l1", "smoothing": -1.0}, {"objective": "l1"}, {"smoothing": 0.5},
        {"elastic": 1}, {"elastic": True, "objective": "l1"}, {"constraints": []},
        {"constraints": "parity"}, {"constraints": [parity, 3]}, {"group_counts": {"sex": 2}},
        {"group_counts": 1}, {"group_counts": -1}, {"weights": -scores.detach()},
        {"weights": scores.detach()[:3]}, {"scores": scores.detach() * math.nan},
        {"scores": scores[None, None]}, {"scores": codes}, {"scores": [1.0, 2.0]},
        {"groups": codes[:3]}, {"groups": codes - 1}, {"groups": {}}, {"groups": codes.double()},
        {"groups": {"sex": [0] * n}}, {"groups": codes * 0, "missing_group": "raise"},
        {"constraints": DemographicParity(0.1, "race")}, {"constraints": EqualizedOdds(0.1)},
        {"constraints": EqualizedOdds(0.1), "targets": scores.detach() + 3},
        {"constraints": ImpactRatio(0.8), "bounds": (-1, 1)},
        {"constraints": MinimumRate(2.0)},
        {"constraints": Budget(mean=(0.9, None)), "bounds": (0, 0.5)},
        {"constraints": [MinimumRate(0.8), Budget(mean=(None, 0.3))]},
        {"constraints": Covariance(0.1, "age")}, {"backend": "osqp", "objective": "l1"},
        {"bounds": (float("nan"), 1)}, {"bounds": (scores.detach() + 1, 0.5)},
    )  # fmt: skip
    record.add("arguments", sorted(wrong))
    record.add("x", project(**{**usual, **wrong}))


# The share of each kind among the problems.
KINDS: dict[Callable[[Draw, Record], None], float] = {
    layer: 0.36,
    layer_two_groups: 0.06,
    objectives: 0.09,
    multi_class: 0.06,
    many_attributes: 0.03,
    general: 0.15,
    blocks: 0.02,
    streams: 0.11,
    layer_with_stream: 0.01,
    audits: 0.04,
    agreements: 0.03,
    samplers: 0.01,
    refusals: 0.03,
}
