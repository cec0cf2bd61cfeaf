"""The command line, ``fairopt COMMAND``; each command is a module of ``fairopt.cli``.

``main`` turns every ``FairoptError`` into one line on standard error and status 2. Results go to
standard output, progress to standard error.
"""

from fairopt.cli.entry import main

__all__ = ["main"]
