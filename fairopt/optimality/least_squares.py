"""Least squares with the shortest solution, for rows that may depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RANK", "least_norm"]

# Singular values below this share of the largest are rank deficiency. Rows are scaled to unit
# length before, so that true dependence shows as 1e-16 and honest ill-conditioning (weights over
# six orders of magnitude) as 1e-6.
RANK = 1e-11


def least_norm(N: Tensor, c: Tensor, e: Tensor | None = None) -> Tensor:
    """The shortest nu that minimises |N^T nu + c|, on rows of N scaled to unit length: ``(B, m)``.

    Given e, ``(B, m)``, the shortest solution of N (N^T nu + c) = e instead; what of e no nu can
    reach is left out. Rows of N that are zero get zero.
    """
    if N.shape[-2] == 0:
        return N.new_zeros(N.shape[:-1])
    length = torch.linalg.vector_norm(N, dim=-1)
    scale = torch.where(length > 0, 1 / length, 0.0)
    if N.shape[-2] == 1:
        nu = -(N * c.unsqueeze(-2)).sum(-1) * scale.square()
        return nu if e is None else nu + e * scale.square()
    U, S, Vh = torch.linalg.svd(N * scale.unsqueeze(-1), full_matrices=False)
    inverse = torch.where(S > RANK * S[..., :1], 1 / S, 0.0)
    z = -(Vh @ c.unsqueeze(-1)).squeeze(-1) * inverse
    if e is not None:
        z = z + torch.einsum("bmk,bm->bk", U, e * scale) * inverse.square()
    return torch.einsum("bmk,bk->bm", U, z) * scale
