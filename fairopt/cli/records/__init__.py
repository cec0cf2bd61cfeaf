"""Streams of records, CSV or JSON lines, with a state that survives being killed.

``Session`` is a transaction a chunk: serve some lines, save state, position and answers in one file
that appears whole or not at all, then write the answers. ``Source`` hands out lines and knows where
it is, a ``FileOutput`` or ``PipeOutput`` takes answers, and ``records`` has the two formats. The
command is ``fairopt stream``; nothing here prints.
"""

from fairopt.cli.records.files import Source
from fairopt.cli.records.formats import Columns, Refusal
from fairopt.cli.records.outputs import FileOutput, Output, PipeOutput
from fairopt.cli.records.session import Session

__all__ = ["Columns", "FileOutput", "Output", "PipeOutput", "Refusal", "Session", "Source"]
