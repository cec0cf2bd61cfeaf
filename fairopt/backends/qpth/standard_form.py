"""A batch of problems in the form that a batched interior point wants:

    minimise 1/2 z^T K z   subject to  G z <= h,  E z = e,

K positive definite with a unit diagonal, rows of unit length, those of E orthonormal (both in the
metric of K^-1), one shape for the whole batch, and a solution about one unit away from z = 0. All
is batched and stays on the device but one readback of which sides exist, and one of ranks where
there are equalities: the host must know sizes.

How. With x = ref + s (z0 + t z), s_i = K_ii^(-1/2):

- Variables whose bounds meet have s_i = 0: they stay at ref, which lies within the bounds.
- A proximal term rho/2 |x - ref|^2 makes a singular P definite.
- z0 is the minimum without constraints, so that no linear term is left, and t the worst
  violation there, the least distance that the solution can be away.
- Equalities: of E = U S V^T only the independent part of V^T is kept.
- Which sides are finite, which rows are equalities and of what rank may differ within the batch. An
  inequality that a problem does not have gets a side that is far away; an equality it
  does not have gets a variable of its own, and holds that at zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows.sparse import SparseRows
from fairopt.tolerances import QPTH_PIVOT, QPTH_RANK

# What ``curvature`` finds.
DEFINITE, SINGULAR, NONCONVEX = 0, 1, 2

# What is this many units further away than the solution must be, is not reached. A problem where
# it is comes out unsolved, never wrong.
FAR = 1e8


def to_dense(problem: Problem) -> Problem:
    """The same problem in float64, rows dense, P diagonal or dense."""
    if isinstance(problem, QP) and isinstance(problem.P, SparseRows):
        problem = problem.replace(P=problem.P.to_tensor())
    problem = problem.replace(rows=problem.rows.to_dense())
    return problem.with_tensors(*(tensor.double() for tensor in problem.tensors))


def quadratic(problem: Problem) -> Tensor:
    """P, ``(B, n)`` or ``(B, n, n)``; zero for an LP."""
    if isinstance(problem, LP):
        return torch.zeros_like(problem.c)
    assert isinstance(problem.P, Tensor)
    return problem.P


def diagonal(P: Tensor) -> Tensor:
    return P if P.dim() == 2 else P.diagonal(dim1=-2, dim2=-1)


def curvature(problem: Problem, precision: float) -> Tensor:
    """``DEFINITE``, ``SINGULAR`` or ``NONCONVEX``, one int8 for each problem of the batch.

    Args:
        precision: the machine precision of what P was computed in. Negative eigenvalues up to 8 n
            times that share of the largest are taken for rounding.
    """
    P = quadratic(problem)
    d = diagonal(P)
    if P.dim() == 2:
        return torch.where((d > 0).all(-1), DEFINITE, SINGULAR).to(torch.int8)
    top = d.abs().amax(-1, keepdim=True)
    root = torch.where(d > 0, d, torch.where(top > 0, top, 1.0)).rsqrt()
    H = P * root.unsqueeze(-1) * root.unsqueeze(-2)
    L, info = torch.linalg.cholesky_ex(H)
    definite = (info == 0) & (L.diagonal(dim1=-2, dim2=-1).square().amin(-1) > QPTH_PIVOT)
    kind = torch.where(definite, DEFINITE, SINGULAR).to(torch.int8)
    if not bool(definite.all()):
        values = torch.linalg.eigvalsh(H)
        rounding = 8 * H.shape[-1] * precision * values.abs().amax(-1)
        kind = torch.where(~definite & (values[:, 0] < -rounding), NONCONVEX, kind)
    return kind


def proximal_metric(problem: Problem) -> Tensor:
    """The diagonal of P, and where it is zero a curvature of the problem's own scale: ``(B, n)``.

    That is the largest of P and, for the linear term, its largest coefficient over the median of
    the distances that sides and bounds are away: an LP moves that far against a weight of one.
    """
    P = quadratic(problem)
    d = diagonal(P)
    q = problem.linear
    length = torch.linalg.vector_norm(problem.rows.to_tensor(), dim=-1)
    sides = torch.cat([problem.l / length, problem.u / length, problem.lb, problem.ub], -1).abs()
    known = torch.isfinite(sides) & (sides > 0)
    middle = (known.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    typical = torch.where(known, sides, torch.inf).sort(-1).values.gather(-1, middle)
    typical = torch.where(torch.isfinite(typical), typical, 1.0)
    base = d.amax(-1, keepdim=True) + q.abs().amax(-1, keepdim=True) / typical
    base = torch.where(base > 0, base, 1.0)
    return torch.where(d > 0, d, base)


@dataclass(frozen=True)
class Sides:
    """Indices of the rows and variables that some problem of the batch bounds on that side."""

    upper: Tensor
    lower: Tensor
    equal: Tensor
    ub: Tensor
    lb: Tensor

    @property
    def one_sided(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inequalities, in the order of the rows of G."""
        return self.upper, self.lower, self.ub, self.lb

    @staticmethod
    def of(problem: Problem) -> Sides:
        equal, fixed = problem.l == problem.u, problem.lb == problem.ub
        masks = (
            torch.isfinite(problem.u) & ~equal,
            torch.isfinite(problem.l) & ~equal,
            equal,
            torch.isfinite(problem.ub) & ~fixed,
            torch.isfinite(problem.lb) & ~fixed,
        )
        there = torch.cat([mask.any(0) for mask in masks]).cpu()  # one transfer, sizes only
        parts = there.split([mask.shape[-1] for mask in masks])
        device = problem.l.device
        return Sides(*(part.nonzero().squeeze(-1).to(device) for part in parts))


class Standard:
    """One batch in the form above.

    Args:
        problem: from ``to_dense``.
        weight: of the proximal term, ``(B,)``, relative to the curvature; zero for none. Where P
            and the term are not definite together, what comes out is of no use, but finite.
        center: ``(B, n)``, where that term is zero.

    Attributes:
        K: ``(B, k, k)``, where k is n and the number of variables that stand in for equalities.
        G, h: ``(B, i, k)`` and ``(B, i)``; i may be 0.
        E, e: ``(B, r, k)`` and ``(B, r)``; r may be 0.
    """

    def __init__(self, problem: Problem, weight: Tensor, center: Tensor) -> None:
        P, A = quadratic(problem), problem.rows.to_tensor()
        q = problem.linear
        l, u, lb, ub = problem.l, problem.u, problem.lb, problem.ub
        self.sides = sides = Sides.of(problem)
        self.shape = batch, _, n = A.shape

        fixed, equal = lb == ub, l == u
        proximal = weight.unsqueeze(-1) * proximal_metric(problem)
        curve = diagonal(P) + proximal
        self.ref = torch.minimum(torch.maximum(center, lb), ub)
        self.s = s = torch.where(fixed | ~(curve > 0), 0.0, curve.rsqrt())
        slope = s * (product(P, self.ref) + q)
        scaled = A * s.unsqueeze(-2)
        eye = torch.eye(n, dtype=A.dtype, device=A.device).expand(batch, n, n)
        if P.dim() == 2:
            K = self.root = eye
            whole, variance = scaled, torch.ones_like(q)
            self.z0 = -slope
        else:
            K = P * s.unsqueeze(-1) * s.unsqueeze(-2)
            K = K + torch.diag_embed(torch.where(s == 0, 1.0, proximal * s.square()))
            root, failed = torch.linalg.cholesky_ex(K)
            failed = (failed != 0).view(-1, 1, 1)  # K = I keeps the garbage to come finite
            K, self.root = torch.where(failed, eye, K), torch.where(failed, eye, root)
            inverse = torch.cholesky_inverse(self.root)
            variance = inverse.diagonal(dim1=-2, dim2=-1)
            whole = torch.linalg.solve_triangular(self.root, scaled.mT, upper=False).mT
            self.z0 = -product(inverse, slope)

        # Rows of unit length in the metric of K^-1, and what they are away from their sides at z0.
        length = torch.linalg.vector_norm(whole, dim=-1)
        self.scale = torch.where(length > 0, 1 / length, 0.0)
        self.held = torch.where(equal, self.scale, 0.0)
        value = product(scaled, self.z0) + product(A, self.ref)
        none = equal | (length == 0)
        upper = torch.where(none, torch.inf, (u - value) * self.scale)
        lower = torch.where(none, torch.inf, (value - l) * self.scale)
        width = variance.sqrt()
        x0, reach = self.ref + s * self.z0, s * width
        over = torch.where(s == 0, torch.inf, (ub - x0) / reach)
        under = torch.where(s == 0, torch.inf, (x0 - lb) / reach)
        pairs = zip((upper, lower, over, under), sides.one_sided, strict=True)
        h = torch.cat([slack[:, index] for slack, index in pairs], -1)
        rows, axes = scaled * self.scale.unsqueeze(-1), eye / width.unsqueeze(-1)
        pairs = zip((rows, -rows, axes, -axes), sides.one_sided, strict=True)
        G = torch.cat([side[:, index] for side, index in pairs], -2)

        e = torch.where(equal, (u - value) * self.scale, 0.0)[:, sides.equal]
        E, e = self.independent((whole * self.held.unsqueeze(-1))[:, sides.equal], e)

        distance = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
        if h.shape[-1]:
            distance = torch.maximum(distance, -h.amin(-1, keepdim=True))
        self.t = distance  # where it is zero, z0 is the solution, whatever z comes back
        unit = torch.where(distance > 0, distance, 1.0)
        self.h, self.e = (h / unit).clamp(max=FAR), e / unit
        self.K, self.G, self.E = self.with_stand_ins(K, G, E)

    def independent(self, whole: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal rows that say the same as these equalities; those past the rank are zero.

        Args:
            whole: the equalities' rows in whitened variables, ``(B, j, n)``; zero for none.
            e: their right-hand sides.
        """
        if not whole.shape[-2]:
            self.ranks, self.combine = None, whole.new_zeros(*whole.shape[:2], 0)
            return whole, e
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        there = QPTH_RANK * S[:, :1] < S
        self.ranks = there.sum(-1)
        inverse = torch.where(there, 1 / S, 0.0)
        self.fewest, most = torch.stack(self.ranks.aminmax()).tolist()
        self.combine = (U * inverse.unsqueeze(-2))[..., :most]
        E = (Vh * there.unsqueeze(-1))[:, :most] @ self.root.mT
        return E, product(self.combine.mT, e)

    def with_stand_ins(self, K: Tensor, G: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where ranks differ, a variable of its own for each equality that a problem lacks."""
        r = E.shape[-2]
        if self.ranks is None or r == self.fewest:
            return K, G, E
        place = torch.arange(r, device=K.device)
        stand_in = torch.diag_embed((place >= self.ranks.unsqueeze(-1)).to(K.dtype))
        pad = torch.nn.functional.pad
        K = pad(K, (0, r, 0, r))
        K.diagonal(dim1=-2, dim2=-1)[:, -r:] = 1.0
        return K, pad(G, (0, r)), torch.cat([E, stand_in], -1)

    def without_inequalities(self) -> tuple[Tensor, Tensor]:
        """The solution where G has no rows, and the multipliers of E, whose E K^-1 E^T is I."""
        right = product(self.E[..., : self.shape[-1]].mT, self.e)
        return torch.cholesky_solve(right.unsqueeze(-1), self.root).squeeze(-1), -self.e

    def recover(self, z: Tensor, lam: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """x and the multipliers of the rows from the solution z and those of G and of E."""
        batch, m, n = self.shape
        x = self.ref + self.s * (self.z0 + self.t * z[:, :n])
        parts = (self.t * lam).split([len(index) for index in self.sides.one_sided], -1)
        y = x.new_zeros(batch, m)
        y = y.index_add(1, self.sides.upper, parts[0]).index_add(1, self.sides.lower, -parts[1])
        y = y * self.scale
        if nu.shape[-1]:
            equal = product(self.combine, self.t * nu)
            y = y.index_add(1, self.sides.equal, equal * self.held[:, self.sides.equal])
        return x, y


def product(M: Tensor, v: Tensor) -> Tensor:
    """M v, for M ``(B, i, j)`` or a diagonal ``(B, j)``."""
    return M * v if M.dim() == 2 else (M @ v.unsqueeze(-1)).squeeze(-1)
