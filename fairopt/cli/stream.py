"""``fairopt stream``: adjusted scores of records as they come, with a state that is kept."""

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fairopt.cli.arguments import USAGE_ERROR, at_least, bound, finite, names, write_json
from fairopt.errors import ProblemError
from fairopt.notions.names import NOTIONS

if TYPE_CHECKING:
    from io import BufferedReader

    from fairopt.cli.records import Output, Source
    from fairopt.notions.catalogue import Constraint
    from fairopt.online import OnlineParity

BY_SIGNAL = 128


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    stream = commands.add_parser(
        "stream",
        help="adjust scores as they come so that parity holds for all that was ever served",
        description="Read records, CSV with a header or JSON objects, one on a line; write each "
        "with its adjusted score as it comes; keep the state in a file, also if killed; print a "
        "report at the end, on standard error.",
    )
    # fmt: off
    option = stream.add_argument
    option("file", nargs="?", default="-", metavar="FILE",
        help="of records; without it, or with -, standard input")
    option("--state", type=Path, required=True, metavar="FILE",
        help="where the state is kept between runs; made if there is none")

    option = stream.add_argument_group("what shall hold").add_argument
    option("--notion", type=notions, required=True, metavar="NAME[=GAP],...",
        help=f"of parity, all at once: {', '.join(NOTIONS)}")
    option("--tolerance", type=finite, metavar="GAP",
        help="the largest gap, for notions that are not given one of their own")
    option("--on", type=names, metavar="NAME,...",
        help="the attributes compared, sex+race for intersections; default: each of --groups")
    option("--bounds", type=bound, nargs=2, required=True, metavar=("LOWER", "UPPER"),
        help="of adjusted scores, numbers or none")
    option("--feedback", choices=("pooled", "hard", "batch"), default="pooled",
        help="how the stream learns; default: pooled")
    option("--step-size", type=finite, metavar="NUMBER", help="of the feedback")
    option("--warm-up", type=at_least(0), default=0, metavar="COUNT",
        help="records that --feedback hard serves by pooled first; default: 0")
    option("--batch-size", type=at_least(1), default=1, metavar="COUNT",
        help="records that are adjusted together; default: 1")

    option = stream.add_argument_group("the records").add_argument
    option("--format", choices=("csv", "jsonl"), help="default: as the first line looks")
    option("--score", default="score", metavar="NAME", help="default: score")
    option("--groups", type=names, required=True, metavar="NAME,...",
        help="columns, or keys, of the attributes; their values are any labels")
    option("--target", metavar="NAME", help="of targets, for notions that need them")
    option("--weight", metavar="NAME", help="of weights")
    option("--adjusted", default="adjusted", metavar="NAME",
        help="of the adjusted scores in what is written; default: adjusted")
    option("--group-labels", type=declared, action="append", default=[], metavar="NAME=LABEL,...",
        help="labels of an attribute that are known; may be repeated")
    option("--unknown-group", choices=("add", "raise"), default="add",
        help="what to do with other labels; default: add")

    option = stream.add_argument_group("input and output").add_argument
    option("--output", type=Path, metavar="FILE",
        help="for records with adjusted scores, instead of standard output; a later run appends")
    option("--observe", action="store_true",
        help="the records were served before, and have their targets now: count these, write none")
    option("--from-start", action="store_true",
        help="standard input is sent again from its beginning: skip what was counted")
    option("--new-input", action="store_true",
        help="count FILE from its start if it is not the one that was counted under its name")
    option("--chunk-size", type=at_least(1), metavar="LINES",
        help="lines that are saved together, at most; default: 8192")
    option("--json", type=Path, metavar="FILE", help="for the report, too")
    # fmt: on
    stream.set_defaults(command=run)


def notions(text: str) -> dict[str, float | None]:
    """Names of notions, each with its own tolerance or none."""
    found: dict[str, float | None] = {}
    for part in names(text):
        name, equals, number = part.partition("=")
        if name not in NOTIONS or name in found:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(NOTIONS)}, each once, got {name!r}"
            )
        found[name] = finite(number) if equals else None
    return found


def declared(text: str) -> tuple[str, list[str]]:
    """An attribute with its labels."""
    name, _, rest = text.partition("=")
    labels = names(rest)
    if not name or not labels or len(set(labels)) < len(labels):
        raise argparse.ArgumentTypeError(
            f"expected an attribute with different labels, such as sex=Female,Male, got {text!r}"
        )
    return name.strip(), labels


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    check_arguments(arguments)
    try:
        if arguments.json is not None:
            arguments.json.touch()  # what would fail at the end fails at the start
        with ExitStack() as stack:
            return serve(arguments, stack)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        say(f"error: cannot read or write{where}: {error.strerror}; what is in the state is safe")
        return USAGE_ERROR


def serve(arguments: argparse.Namespace, stack: ExitStack) -> int:
    from fairopt.cli.records import Columns, Session

    signals = Signals()
    stack.enter_context(signals.caught_here())
    columns = Columns(
        arguments.score, tuple(arguments.groups), arguments.target, arguments.weight,
        arguments.adjusted, arguments.observe,
    )  # fmt: skip
    source = source_of(arguments.file, signals, stack)
    chosen = {} if arguments.chunk_size is None else {"chunk": arguments.chunk_size}
    status, session = 0, None
    try:
        session = stack.enter_context(
            Session(
                parity_of(arguments),
                columns,
                state=arguments.state,
                output=output_of(arguments, signals, stack),
                kind=arguments.format,
                batch_size=arguments.batch_size,
                labels=dict(arguments.group_labels),
                **chosen,
            )
        )
        if session.found:
            say(f"going on after record {session.records}")
        if session.repeated:
            say("the answers of the last chunk come once more: the run before was cut short")
        session.run(
            source,
            from_start=arguments.from_start,
            new_input=arguments.new_input,
            stopped=lambda: signals.caught is not None,
        )
    except Stop:
        pass
    except BrokenPipeError:
        say("nobody reads what is written any more; what is missing comes first in the next run")
        status = BY_SIGNAL + 13
    if signals.caught is not None:
        say(f"ended by {signal.Signals(signals.caught).name}; the state is saved")
        status = BY_SIGNAL + signals.caught
    if session is not None:
        report = session.report()
        with suppress(BrokenPipeError):
            print(f"{session.records} records\n{report}", file=sys.stderr, flush=True)
        if arguments.json is not None:
            write_json({"records": session.records, **report.to_dict()}, arguments.json)
    return status


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise where arguments contradict each other."""
    groups, labels = arguments.groups, dict(arguments.group_labels)
    if not groups or len(set(groups)) < len(groups):
        raise ProblemError(f"--groups: expected different names, got {', '.join(groups) or 'none'}")
    used = [arguments.score, arguments.target, arguments.weight, arguments.adjusted, *groups]
    used = [name for name in used if name is not None]
    if len(set(used)) < len(used):
        raise ProblemError(f"columns: expected different names, got {', '.join(used)}")
    for each in (name for on in arguments.on or () for name in on.split("+")):
        if each not in groups:
            raise ProblemError(f"--on: expected some of {', '.join(groups)}, got {each!r}")
    if not set(labels) <= set(groups) or len(labels) < len(arguments.group_labels):
        raise ProblemError(
            f"--group-labels: expected some of {', '.join(groups)}, each once, got "
            f"{', '.join(name for name, _ in arguments.group_labels)}"
        )
    open_ones = [name for name in groups if name not in labels]
    if arguments.unknown_group == "raise" and open_ones:
        raise ProblemError(
            f"--unknown-group raise: expected --group-labels for {', '.join(groups)}, got none for "
            f"{', '.join(open_ones)}"
        )
    bare = [name for name, gap in arguments.notion.items() if gap is None]
    if bare and arguments.tolerance is None:
        raise ProblemError(f"--tolerance: expected a number for {', '.join(bare)}, got none")
    if arguments.state.is_dir():
        raise ProblemError(f"--state: expected a file, got the folder {arguments.state}")
    files = [arguments.state, arguments.output, arguments.json]
    files += [] if arguments.file == "-" else [Path(arguments.file)]
    files = [str(path.resolve()) for path in files if path is not None]
    if len(set(files)) < len(files):
        raise ProblemError(f"files: expected different ones, got {', '.join(files)}")
    if arguments.observe and arguments.target is None:
        raise ProblemError("--observe: expected --target, the column of the targets, got none")
    if arguments.observe and arguments.output is not None:
        raise ProblemError("--observe: expected no --output, for nothing is written, got one")


def parity_of(arguments: argparse.Namespace) -> OnlineParity:
    from fairopt.online import OnlineParity

    made: list[Constraint] = []
    for name, gap in arguments.notion.items():
        tolerance = arguments.tolerance if gap is None else gap
        for on in arguments.on or arguments.groups:
            parts = tuple(on.split("+"))
            made.append(NOTIONS[name].make(tolerance, parts[0] if len(parts) == 1 else parts))
    return OnlineParity(
        made,
        bounds=tuple(arguments.bounds),
        feedback=arguments.feedback,
        step_size=arguments.step_size,
        warm_up=arguments.warm_up,
        group_counts={name: len(each) for name, each in arguments.group_labels} or None,
        unknown_group=arguments.unknown_group,
    )


def source_of(name: str, signals: Signals, stack: ExitStack) -> Source:
    from fairopt.cli.records import Source

    if name == "-":
        make_blocking(sys.stdin.buffer)
        return Source(cast("BufferedReader", sys.stdin.buffer), None, signals.reading)
    path = Path(name)
    file = stack.enter_context(path.open("rb"))
    regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    return Source(file, path if regular else None, signals.reading)


def output_of(arguments: argparse.Namespace, signals: Signals, stack: ExitStack) -> Output:
    from fairopt.cli.records import FileOutput, Output, PipeOutput

    path: Path | None = arguments.output
    if arguments.observe:
        return Output()
    if path is None:
        make_blocking(sys.stdout.buffer)
        return PipeOutput(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), signals.writing)
    if path.exists() and not path.is_file():  # a named pipe, a device
        return PipeOutput(stack.enter_context(path.open("wb", buffering=0)), signals.writing)
    return FileOutput(path, stack)


def make_blocking(file: BinaryIO) -> None:
    """Let a standard stream wait, whatever the process before us made of it."""
    with suppress(AttributeError, OSError, ValueError):  # no file of the system, or no such system
        os.set_blocking(file.fileno(), True)


def say(line: str) -> None:
    with suppress(BrokenPipeError):  # nobody listens; that is no reason to fail
        print(f"fairopt: {line}", file=sys.stderr, flush=True)


class Stop(BaseException):
    """Ends a wait."""


class Signals:
    """SIGINT and SIGTERM end the stream in order: behind the chunk at hand, or while it waits.

    While it waits for a sender, the first signal ends it. While it waits for a reader, the second
    one does: an interrupted answer may have been read, and has to come again in the next run.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.reading = Wait(self, 1)
        self.writing = Wait(self, 2)
        self.enough: int | None = None  # how many signals end what is waited for now
        self.count = 0

    def check(self) -> None:
        """End a wait if there were enough."""
        if self.enough is not None and self.count >= self.enough:
            self.enough = None
            raise Stop

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.caught = number
        self.count += 1
        self.check()

    @contextmanager
    def caught_here(self) -> Iterator[None]:
        """Catch them; in other threads than the main one there are none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, self.catch) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Wait:
    """A context that is entered around each wait."""

    def __init__(self, signals: Signals, enough: int) -> None:
        self._signals = signals
        self._enough = enough

    def __enter__(self) -> None:
        self._signals.enough = self._enough
        self._signals.check()

    def __exit__(self, *_: object) -> None:
        self._signals.enough = None
