"""The compiled kernels of streams: sums, rows, the projection of a batch, and the pooled feedback.

What runs for each sample is inlined by Numba, not left to LLVM: between functions Numba counts
references to every array.
"""

from fairopt.kernels.stream.projection import project, workspace
from fairopt.kernels.stream.rows import (
    close_batch,
    empty_rows,
    evaluate,
    loadings,
    open_batch,
    values,
    widen,
)
from fairopt.kernels.stream.steps import positions, stream, stream_codes
from fairopt.kernels.stream.sums import accumulate, combined, merge_sums, replace_forecast, two_sum

__all__ = [
    "accumulate",
    "close_batch",
    "combined",
    "empty_rows",
    "evaluate",
    "loadings",
    "merge_sums",
    "open_batch",
    "positions",
    "project",
    "replace_forecast",
    "stream",
    "stream_codes",
    "two_sum",
    "values",
    "widen",
    "workspace",
]
