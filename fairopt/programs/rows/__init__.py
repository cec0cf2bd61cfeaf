"""The matrix of a problem's rows, in the form that its structure makes cheapest.

A new form is a class in a file of its own that declares its ``name`` and what is ``stored``, with
``shape`` and ``to_tensor``; all else has a default (see ``Rows``), also files and the comparison of
backends. It is imported here, and gets a line in the table of ``tests/test_rows.py``, which checks
each operation against the dense matrix. That is three files. A backend that can use the structure
adds the name to its ``Capabilities`` and asks for the form; no other code knows of it.
"""

from fairopt.programs.rows.base import FORMS, Rows
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.rows.partitions import Partitions
from fairopt.programs.rows.sparse import SparseRows

__all__ = [
    "FORMS",
    "BlockRows",
    "CellRows",
    "DenseRows",
    "PartitionedRows",
    "Partitions",
    "Rows",
    "SparseRows",
]
