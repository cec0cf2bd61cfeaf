"""The command line: ``fairopt demo``, ``fairopt doctor`` and ``fairopt compare``.

A command is a function from parsed arguments to an exit status. It imports what it needs when it
runs; ``main`` turns every ``FairoptError`` into one line on standard error and status 2. Results go
to standard output, progress to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fairopt.errors import FairoptError, ProblemError

__all__ = ["main"]

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``fairopt``; those of the process if ``None``.

    Returns:
        The exit status: 0, 1 where a check that the command makes fails, 2 for unusable input.
    """
    parsed = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except FairoptError as error:
        print(f"fairopt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nfairopt: interrupted", file=sys.stderr)
        return 130


# ---------------------------------------------------------------------------------------------
# demo
# ---------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    from fairopt import demo

    # What would fail at the end should fail at the start.
    folder: Path = arguments.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.touch()
    except OSError as error:
        print(f"fairopt: error: cannot write to {error.filename}: {error.strerror}; "
              "choose another place with --output or --json", file=sys.stderr)  # fmt: skip
        return USAGE_ERROR

    settings = demo.Settings(
        tolerance=arguments.tolerance,
        notions=arguments.notions,
        attributes=arguments.attributes,
        backend=arguments.backend,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        streaming=arguments.streaming,
        limit=arguments.limit,
        repeats=arguments.repeats,
        threads=arguments.threads,
    )
    report = demo.run_demo(settings, _Progress(sys.stderr))
    print(report)
    print()
    try:
        training, tolerance = demo.plot(report, folder)
        stream = None
        if report.streaming is not None:
            stream = demo.plot_streaming(report.streaming, folder / "streaming.png")
    except ImportError as error:
        plots: list[str] = []
        print(f"No plots: {error.name} is not installed. Get it with:  pip install 'fairopt[demo]'")
    else:
        plots = [str(training), str(tolerance)]
        print(f"Plots: {training}   (gap and log loss over epochs)")
        print(f"       {tolerance}   (accuracy and log loss against tolerance)")
        if stream is not None:
            plots.append(str(stream))
            print(f"       {stream}   (gap of everything served so far)")
    if arguments.json is not None:
        _write_json(report.as_dict() | {"plots": plots}, arguments.json)
        print(f"Figures: {arguments.json}")
    print(f"All of it took {report.seconds:.0f} seconds.")
    return 0 if report.within_tolerance else 1


class _Progress:
    """One line that is rewritten on a terminal; a plain line now and then elsewhere."""

    SECONDS_BETWEEN_PLAIN_LINES = 5.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = time.monotonic()

    def __call__(self, line: str, done: bool) -> None:
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if done else ""))
        else:
            now = time.monotonic()
            if not done and now - self._last < self.SECONDS_BETWEEN_PLAIN_LINES:
                return
            self._last = now
            self._stream.write(f"{line}\n")
        self._stream.flush()


# ---------------------------------------------------------------------------------------------
# doctor
# ---------------------------------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace) -> int:
    from fairopt.doctor import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.as_dict(), indent=2) if arguments.json else diagnosis)
    return 0 if diagnosis.healthy else 1


# ---------------------------------------------------------------------------------------------
# compare
# ---------------------------------------------------------------------------------------------


_NOTIONS = (
    "demographic-parity",
    "equal-opportunity",
    "predictive-equality",
    "equalized-odds",
    "mean-residual",
)
_DEMO_NOTIONS = (
    "demographic-parity",
    "equal-opportunity",
    "predictive-equality",
    "equalized-odds",
    "error-parity",
    "mean-residual",
    "impact-ratio",
)
_DRAWING = (
    "samples", "groups", "notion", "comparison", "tolerance", "batch", "bounds", "dtype", "seed"
)  # fmt: skip


def _compare(arguments: argparse.Namespace) -> int:
    from fairopt import compare
    from fairopt.agreement import cross_validate
    from fairopt.storage import load_problem, save_problem

    chosen = {name: getattr(arguments, name) for name in _DRAWING}
    given = {name: value for name, value in chosen.items() if value is not None}
    if arguments.file is not None and given:
        raise ProblemError(
            f"expected a file, or how to draw a problem, got both (--{', --'.join(given)}); leave "
            "one out"
        )
    outputs: list[Path] = [p for p in (arguments.json, arguments.plot, arguments.save) if p]
    try:
        if arguments.plot is not None:
            import matplotlib.figure  # noqa: F401 - what would fail at the end fails at the start
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if arguments.file is not None:
            problem, inputs = load_problem(arguments.file), None
            source: dict[str, Any] = {"file": str(arguments.file)}
        else:
            drawn = compare.Drawn(**given)  # what was not given has its default there
            problem, inputs = compare.draw(drawn)
            source = {"drawn": asdict(drawn)}
        if arguments.save is not None:
            save_problem(problem, arguments.save)
    except ImportError as error:
        raise ProblemError(
            f"--plot: {error.name} is not installed; get it with: pip install 'fairopt[demo]'"
        ) from error
    except OSError as error:
        raise ProblemError(
            f"cannot open {error.filename}: {error.strerror}; name another file"
        ) from error

    agreement = cross_validate(
        problem,
        arguments.backends,
        arguments.reference,
        inputs=inputs,
        smoothing=arguments.smoothing,
        tolerance=arguments.allow,
        gradient_tolerance=arguments.allow_gradients,
        finite_differences=arguments.finite_differences,
        cotangents=arguments.cotangents,
        repeats=arguments.repeats,
    )
    print(agreement)
    if arguments.json is not None:
        _write_json({"problem": source, **agreement.to_dict()}, arguments.json)
    if arguments.plot is not None:
        compare.plot(agreement, arguments.plot)
    return 0 if agreement.agree else 1


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


def _write_json(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {smallest}, not {text!r}"
            )
        return value

    return parse


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.05, not {text!r}")
    return value


def _bound(text: str) -> float | None:
    return None if text.lower() == "none" else _finite(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class _Version(argparse.Action):
    """Prints the version; an action, so that only it pays for importing the package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from fairopt import __version__

        print(f"fairopt {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fairopt",
        description="Fairness layers for PyTorch: predictions moved as little as possible so that "
        "a chosen notion of parity holds.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="train fair models on bundled census data and show what the layer does",
        description="Train a small network on the UCI Adult data three ways - unconstrained, with "
        "post-hoc projection, with a fairness layer - and compare them. About one minute on two "
        "cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--tolerance", type=_finite, default=0.05, metavar="GAP",
        help="the largest gap allowed between two groups",
    )  # fmt: skip
    demo.add_argument(
        "--notions", type=_names, default="demographic-parity", metavar="NAME,...",
        help=f"of parity, all at once: {', '.join(_DEMO_NOTIONS)}",
    )  # fmt: skip
    demo.add_argument(
        "--attributes", type=_names, default="sex,race", metavar="NAME,...",
        help="on which they hold: sex, race",
    )  # fmt: skip
    demo.add_argument(
        "--backend", default="numba", metavar="NAME",
        help="solver of the projections; `fairopt doctor` lists them",
    )  # fmt: skip
    demo.add_argument(
        "--epochs", type=_at_least(1), default=12, help="passes over the training rows per model"
    )
    demo.add_argument(
        "--batch-size", type=_at_least(2), default=1024, metavar="ROWS",
        help="rows per training batch",
    )  # fmt: skip
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of weights and batches")
    demo.add_argument(
        "--limit", type=_at_least(200), metavar="ROWS", default=argparse.SUPPRESS,
        help="use only so many training and test rows, drawn in proportion, for a quick look",
    )  # fmt: skip
    demo.add_argument(
        "--repeats", type=_at_least(1), default=3, metavar="COUNT",
        help="networks per point of the tolerance plot",
    )  # fmt: skip
    demo.add_argument(
        "--threads", type=_at_least(1), default=1, metavar="COUNT",
        help="threads of torch; more hardly pay for so small a network",
    )  # fmt: skip
    demo.add_argument(
        "--streaming", action="store_true",
        help="also serve the test rows as a stream, by the paper's online rule and by the pooled "
        "one, and plot the gap of everything served so far; a few seconds more",
    )  # fmt: skip
    demo.add_argument(
        "--output", type=Path, default=Path("fairopt-demo"), metavar="FOLDER", help="for the plots"
    )
    demo.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="also write all figures to this file",
    )  # fmt: skip
    demo.set_defaults(command=_demo, limit=None, json=None)

    doctor = commands.add_parser(
        "doctor",
        help="say which backends are installed, what each can do, and how to get the others",
        description="Check this installation: versions, threads, devices, caches, and one small "
        "solve with every installed backend.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(command=_doctor)
    _add_compare(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="solve one problem with several backends and say whether they agree",
        description="Solve and differentiate one problem with several backends: a saved problem, "
        "or a parity problem drawn at random. The exit status is 0 if all agree, 1 if not.",
    )
    compare.add_argument(
        "file", nargs="?", type=Path, metavar="FILE",
        help="a problem written by fairopt.save_problem; without it one is drawn",
    )  # fmt: skip
    draw = compare.add_argument_group("the problem to draw")
    draw.add_argument("--samples", type=_at_least(1), metavar="COUNT", help="default: 200")
    draw.add_argument("--groups", type=_at_least(1), metavar="COUNT", help="default: 3")
    draw.add_argument("--notion", choices=_NOTIONS, help="of parity; default: demographic-parity")
    draw.add_argument(
        "--comparison", choices=("pairwise", "overall"),
        help="each pair of groups, or each group with all; default: pairwise",
    )  # fmt: skip
    draw.add_argument("--tolerance", type=_finite, metavar="GAP", help="default: 0.05")
    draw.add_argument("--batch", type=_at_least(1), metavar="COUNT", help="problems; default: 1")
    draw.add_argument(
        "--bounds", type=_bound, nargs=2, metavar=("LOWER", "UPPER"),
        help="numbers, or none; default: 0 1",
    )  # fmt: skip
    draw.add_argument("--dtype", choices=("float64", "float32"), help="default: float64")
    draw.add_argument("--seed", type=_at_least(0), help="default: 0")

    how = compare.add_argument_group("the comparison")
    how.add_argument(
        "--backends", type=_names, metavar="NAME,NAME",
        help="by default all that are installed and take the problem; `fairopt doctor` lists them",
    )  # fmt: skip
    how.add_argument(
        "--reference", metavar="NAME", help="backend that the differences in the table are from"
    )
    how.add_argument(
        "--smoothing", type=_finite, default=0.0, metavar="NUMBER",
        help="of a linear program, to compare gradients too",
    )  # fmt: skip
    how.add_argument(
        "--finite-differences", action="store_true", help="compare gradients with these as well"
    )
    how.add_argument(
        "--allow", type=_finite, metavar="NUMBER",
        help="relative difference of solutions; default: 1e-7, or 1e-5 for float32",
    )  # fmt: skip
    how.add_argument(
        "--allow-gradients", type=_finite, metavar="NUMBER",
        help="and of gradients and multipliers; default: 1e-6, or 1e-4 for float32",
    )  # fmt: skip
    how.add_argument(
        "--cotangents", type=_at_least(1), default=3, metavar="COUNT",
        help="random vectors whose products with the solution are differentiated; default: 3",
    )  # fmt: skip
    how.add_argument(
        "--repeats", type=_at_least(0), default=3, metavar="COUNT",
        help="how often each is timed, the best counts; 0 for no times; default: 3",
    )  # fmt: skip

    out = compare.add_argument_group("what to write")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything that was found")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="differences and times")
    out.add_argument("--save", type=Path, metavar="FILE.npz", help="the problem, for a bug report")
    compare.set_defaults(command=_compare)
