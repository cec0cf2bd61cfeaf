"""LU factorisation of a batch that is right on the CPU too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lu_factor"]

# torch factors the matrices of a batch in parallel on the CPU, by a routine that is not safe for
# that: from about 150 rows on the factors are silently wrong, or pivots come out as zero
# (pytorch issues 141358 and 142815; seen in 2.13). With a margin.
UNSAFE = 100


def lu_factor(matrix: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor]:
    """``torch.linalg.lu_factor``, ``(B, n, n)``, without raising where a matrix is singular.

    Large matrices on the CPU are factored one after the other, each with all threads.
    """
    if (
        matrix.is_cuda
        or len(matrix) <= 1
        or matrix.shape[-1] < UNSAFE
        or torch.get_num_threads() == 1
    ):
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix, pivot=pivot)
        return factors, pivots
    each = [torch.linalg.lu_factor_ex(one, pivot=pivot) for one in matrix.unbind()]
    return torch.stack([e[0] for e in each]), torch.stack([e[1] for e in each])
