"""Problems with a known solution for the tests of the qpth backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairopt import QP
from fairopt.programs.rows.sparse import SparseRows

INF = float("inf")
DOUBLE = torch.float64


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


@dataclass
class Known:
    """A QP made around its solution, which has a margin to the next active set."""

    problem: QP
    x: Tensor


def known(
    rng: np.random.Generator,
    batch: int,
    n: int,
    m: int,
    *,
    condition: float = 1e2,
    form: str = "dense",
    equalities: int = 0,
    row_scale: float = 1.0,
) -> Known:
    """At most n / 2 rows and n / 4 bounds are active, with multipliers and slacks of 0.1 to 1."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    def margin(*shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(0.1, 1.0, shape))

    spectrum = torch.logspace(0, np.log10(condition), n, dtype=DOUBLE)
    if form == "diagonal":
        P: Any = spectrum[torch.from_numpy(rng.permutation(n))].expand(batch, n)
        Px = P
    else:
        U = torch.linalg.qr(normal(batch, n, n))[0]
        P = (U * spectrum) @ U.mT
        P = Px = (P + P.mT) / 2
    x = normal(batch, n)
    A = normal(batch, m, n) / n**0.5
    value = (A @ x.unsqueeze(-1)).squeeze(-1)
    product = P * x if P.dim() == 2 else (P @ x.unsqueeze(-1)).squeeze(-1)

    # For each row: 0 an equality, 1 upper active, 2 lower active, 3 neither, 4 and 5 one side.
    kinds = torch.from_numpy(rng.integers(1, 6, m))
    kinds[n // 2 :] = 3
    kinds[: min(equalities, n // 2)] = 0
    u = torch.where((kinds == 0) | (kinds == 1), value, value + margin(batch, m))
    l = torch.where((kinds == 0) | (kinds == 2), value, value - margin(batch, m))
    u, l = torch.where(kinds == 4, INF, u), torch.where(kinds == 5, -INF, l)
    sign = torch.where(kinds == 1, 1.0, torch.where(kinds == 2, -1.0, 0.0))
    sign = torch.where(kinds == 0, torch.sign(normal(batch, m)), sign)
    y = sign * margin(batch, m)
    held = torch.from_numpy(rng.integers(0, 4, n))
    held[n // 4 :] = 3  # 0 at ub, 1 at lb, 2 free with bounds, 3 without
    ub = torch.where(held == 0, x, torch.where(held == 3, INF, x + margin(batch, n)))
    lb = torch.where(held == 1, x, torch.where(held == 3, -INF, x - margin(batch, n)))
    w = torch.where(held == 0, 1.0, torch.where(held == 1, -1.0, 0.0)) * margin(batch, n)
    q = -(product + (A.mT @ y.unsqueeze(-1)).squeeze(-1) + w)
    if form == "sparse":
        row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(n),) * 2, indexing="ij"))
        P = SparseRows(row, column, Px.flatten(1), n, n)
    return Known(QP(P, q, A * row_scale, l * row_scale, u * row_scale, lb, ub), x)


def problem_of(batch: int = 4, n: int = 8, m: int = 5, seed: int = 0, **options: Any) -> QP:
    return known(np.random.default_rng(seed), batch, n, m, **options).problem


def changed(problem: QP, **fields: Tensor) -> QP:
    old = {name: getattr(problem, name) for name in ("P", "q", "rows", "l", "u", "lb", "ub")}
    return QP(**{**old, **fields})


def no_rows(batch: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, 0, n, dtype=DOUBLE), *(torch.zeros(batch, 0, dtype=DOUBLE),) * 2


def infeasible(problem: QP) -> QP:
    l, u = problem.l.clone(), problem.u.clone()
    l[1, 2], u[1, 2] = 1e3, 1e3 + 1
    A = problem.rows.to_dense().matrix.clone()
    A[1, 3] = A[1, 2]
    l[1, 3], u[1, 3] = -1.0, 1.0
    return changed(problem, rows=A, l=l, u=u)
