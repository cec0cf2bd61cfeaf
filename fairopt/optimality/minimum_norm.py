"""The support of the multipliers, where more than one multiplier belongs to the same solution.

Tight rows may depend on each other: all pairs among groups at tolerance 0, four groups whose means
are equal in pairs, two notions that ask for the same. A solver then returns one of many multipliers
y, and which rows look active would depend on the solver. The rule here does not: of all multipliers

    N_W^T z = N_W^T y,    z_r >= 0 where only the upper side of row r is tight,
                          z_r <= 0 where only the lower side is,

the one of minimum norm counts (N: the rows on the free variables, of unit length in the metric of
P^-1; W: the tight rows). It is unique, because its square is strictly convex, and it depends only
on x: N_W^T y is fixed by stationarity.

Derivation of the method. With an orthonormal basis U of the range of N_W, the constraint is
U^T z = U^T y =: e. The dual of min |z|^2 / 2 has as many unknowns as the rank: z = [U mu], where
[.] drops the components of the wrong sign, and mu minimises  |[U mu]|^2 / 2 - e.mu,  a convex, once
differentiable, piecewise quadratic function. Newton's method with a line search solves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairopt.tolerances import DEPENDENT, NEWTON, RANK, ZERO_MULTIPLIER

STEPS, HALVINGS = 60, 40  # of Newton's method, and of one of its steps


def are_dependent(N: Tensor, tight: Tensor) -> Tensor:
    """Whether the tight rows of each problem depend on each other: ``(B,)``, bool."""
    length = torch.linalg.vector_norm(N, dim=-1)
    rows: Tensor = tight & (length > 0)
    if not bool((rows.sum(-1) > 1).any()):
        return rows.new_zeros(len(rows))
    S = torch.linalg.svdvals(torch.where(rows.unsqueeze(-1), N / length.unsqueeze(-1), 0.0))
    dependent: Tensor = (S > RANK * S[..., :1]).sum(-1) < rows.sum(-1)
    return dependent


def minimum_norm(N: Tensor, y: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The minimum-norm multiplier, ``(B, m)``, of the solution that y belongs to.

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
    e = torch.einsum("bmr,bm->br", U, torch.where(scale > 0, y * length, 0.0))

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
        gradient = e - torch.einsum("bmr,bm->br", U, z)
        error = gradient.abs().amax(-1)
        if bool((error <= NEWTON * size).all()):
            break
        H = torch.einsum("bmr,bm,bms->brs", U, (z != 0).double(), U)
        small = (error / (size + (size == 0))).clamp(max=1e-2) + NEWTON
        factor = torch.linalg.cholesky(H + small[:, None, None] * eye)
        step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        slope = (gradient * step).sum(-1)
        before = value(mu, z)
        length_ = torch.ones_like(error)
        for _ in range(HALVINGS):
            new = mu + length_.unsqueeze(-1) * step
            new_z = signed(new)
            worse = value(new, new_z) > before - 1e-4 * length_ * slope + 1e-15 * before.abs()
            if not bool(worse.any()):
                break
            length_ = torch.where(worse, length_ / 2, length_)
        mu, z = new, new_z
    z = torch.where(z.abs() > ZERO_MULTIPLIER * z.abs().amax(-1, keepdim=True), z, 0.0)
    return z * scale


def support(N: Tensor, y: Tensor, active: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """The support of the minimum-norm multiplier, where that is another set than ``active``.

    Where the other tight rows are combinations of the active ones, or are zero in every multiplier,
    ``active`` spans the same space and is returned as it is. This usual case costs little.

    Args:
        N, y, upper, lower: as for ``minimum_norm``.
        active: ``(B, m)``, bool, the support of y, and all equality rows.
    """
    extra = (upper | lower) & ~active
    if not bool(extra.any()):
        return active
    length = torch.linalg.vector_norm(N, dim=-1, keepdim=True)
    M = torch.where(length > 0, N / length, 0.0)
    _, S, Vh = torch.linalg.svd(M * active.unsqueeze(-1), full_matrices=False)
    Vh = Vh * (S > RANK * S[..., :1].clamp(min=RANK)).unsqueeze(-1)
    beside = M - (M @ Vh.mT) @ Vh
    outside = extra & (beside.square().sum(-1) > DEPENDENT**2)
    if not bool((outside.sum(-1) > 1).any()):  # a single one is independent: its multiplier is 0
        return active
    z = minimum_norm(N, y, upper, lower)
    equality = upper & lower
    return torch.where(outside.any(-1, keepdim=True), (z != 0) | (equality & active), active)
