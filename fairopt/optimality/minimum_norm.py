"""Which rows carry a multiplier, when more than one multiplier belongs to the same solution.

Tight rows may depend on each other: all pairs among groups at tolerance 0, four groups in two tied
pairs, two notions that ask for the same. A solver then returns one of many multipliers y, and which
rows look active would depend on the solver. The rule here does not: of all multipliers

    N_W^T z = N_W^T y,    z_r >= 0 where only the upper side of row r is tight,
                          z_r <= 0 where only the lower side is,

the shortest counts (N: the rows on the free variables, of unit length in the metric of P^-1; W:
the tight rows). It is unique, for its square is strictly convex, and it depends only on x: N_W^T y
is fixed by stationarity.

Derivation of the method. With an orthonormal basis U of the range of N_W, the constraint is
U^T z = U^T y =: e. The dual of min |z|^2 / 2 has as many unknowns as the rank: z = [U mu], where
[.] drops what has the wrong sign, and mu minimises  |[U mu]|^2 / 2 - e.mu,  a convex, once
differentiable, piecewise quadratic function. Newton's method with a line search solves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["carrying", "dependent", "shortest"]

RANK = 1e-11  # singular values below this share of the largest are rank deficiency
NONE = 1e-9  # a multiplier below this share of the largest is zero but for rounding
STEPS = 60


def dependent(N: Tensor, tight: Tensor) -> Tensor:
    """Whether the tight rows of each problem depend on each other: ``(B,)``, bool."""
    length = torch.linalg.vector_norm(N, dim=-1)
    kept: Tensor = tight & (length > 0)
    if not bool((kept.sum(-1) > 1).any()):
        return kept.new_zeros(len(kept))
    S = torch.linalg.svdvals(torch.where(kept.unsqueeze(-1), N / length.unsqueeze(-1), 0.0))
    found: Tensor = (S > RANK * S[..., :1]).sum(-1) < kept.sum(-1)
    return found


def shortest(N: Tensor, y: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The shortest multiplier, ``(B, m)``, of the solution that y belongs to.

    Args:
        N: ``(B, m, k)``, float64, the rows on the free variables, N N^T = A P^-1 A^T there.
        y: ``(B, m)``, float64.
        upper, lower: ``(B, m)``, bool, which sides are tight; a row without either gets zero.
    """
    if N.shape[-2] == 0:
        return y
    tight = upper | lower
    length = torch.linalg.vector_norm(N, dim=-1)
    scale = torch.where((length > 0) & tight, 1 / length, 0.0)
    U, S, _ = torch.linalg.svd(N * scale.unsqueeze(-1), full_matrices=False)
    U = U * (S > RANK * S[..., :1]).unsqueeze(-2)
    given = torch.where(scale > 0, y * length, 0.0)
    e = torch.einsum("bmr,bm->br", U, given)

    def signed(mu: Tensor) -> Tensor:
        z = torch.einsum("bmr,br->bm", U, mu)
        z = torch.where(upper, z, z.clamp(max=0))
        return torch.where(lower, z, z.clamp(min=0))

    def value(mu: Tensor, z: Tensor) -> Tensor:
        return 0.5 * z.square().sum(-1) - (e * mu).sum(-1)

    mu = e.clone()
    z = signed(mu)
    size = e.abs().amax(-1) if e.shape[-1] else e.new_zeros(len(e))
    eye = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device)
    for _ in range(STEPS):
        left = e - torch.einsum("bmr,bm->br", U, z)
        error = left.abs().amax(-1)
        if bool((error <= 1e-14 * size).all()):
            break
        H = torch.einsum("bmr,bm,bms->brs", U, (z != 0).double(), U)
        small = (error / (size + (size == 0))).clamp(max=1e-2) + 1e-14
        factor = torch.linalg.cholesky(H + small[:, None, None] * eye)
        step = torch.cholesky_solve(left.unsqueeze(-1), factor).squeeze(-1)
        slope = (left * step).sum(-1)
        before = value(mu, z)
        length_ = torch.ones_like(error)
        for _ in range(40):
            new = mu + length_.unsqueeze(-1) * step
            new_z = signed(new)
            worse = value(new, new_z) > before - 1e-4 * length_ * slope + 1e-15 * before.abs()
            if not bool(worse.any()):
                break
            length_ = torch.where(worse, length_ / 2, length_)
        mu, z = new, new_z
    z = torch.where(z.abs() > NONE * z.abs().amax(-1, keepdim=True), z, 0.0)
    return z * scale


def carrying(N: Tensor, y: Tensor, active: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The rows that carry the shortest multiplier, where that is another set than ``active``.

    Where the tight rows beside the active ones are combinations of them, or have no part in any
    multiplier, ``active`` spans the same space and stays as it is: the usual case, seen at little
    cost.

    Args:
        N, y, upper, lower: as for ``shortest``.
        active: ``(B, m)``, bool, the rows that carry y, and those whose sides meet.
    """
    extra = (upper | lower) & ~active
    if not bool(extra.any()):
        return active
    length = torch.linalg.vector_norm(N, dim=-1, keepdim=True)
    M = torch.where(length > 0, N / length, 0.0)
    _, S, Vh = torch.linalg.svd(M * active.unsqueeze(-1), full_matrices=False)
    Vh = Vh * (S > RANK * S[..., :1].clamp(min=RANK)).unsqueeze(-1)
    beside = M - (M @ Vh.mT) @ Vh
    outside = extra & (beside.square().sum(-1) > 1e-18)
    if not bool((outside.sum(-1) > 1).any()):  # one alone is independent: it carries nothing
        return active
    z = shortest(N, y, upper, lower)
    meet = upper & lower
    return torch.where(outside.any(-1, keepdim=True), (z != 0) | (meet & active), active)
