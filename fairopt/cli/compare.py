"""``fairopt compare``: several backends on one problem."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairopt.cli.arguments import (
    add_drawing,
    at_least,
    drawing,
    file_errors,
    finite,
    names,
    write_json,
)
from fairopt.errors import ProblemError


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    compare = commands.add_parser(
        "compare",
        help="solve one problem with several backends and say whether they agree",
        description="Solve and differentiate one problem with several backends: a saved problem, "
        "or a parity problem drawn at random. The exit status is 0 if all agree, 1 if not.",
    )
    # fmt: off
    option = compare.add_argument
    option("file", nargs="?", type=Path, metavar="FILE",
        help="a problem written by fairopt.save_problem; without it one is drawn")
    draw = compare.add_argument_group("the problem to draw")
    option = draw.add_argument
    option("--samples", type=at_least(1), metavar="COUNT", help="default: 200")
    add_drawing(draw)

    option = compare.add_argument_group("the comparison").add_argument
    option("--backends", type=names, metavar="NAME,NAME",
        help="by default all that are installed and take the problem; `fairopt doctor` lists them")
    option("--reference", metavar="NAME", help="backend that the differences in the table are from")
    option("--smoothing", type=finite, default=0.0, metavar="NUMBER",
        help="of a linear program, to compare gradients too")
    option("--finite-differences", action="store_true", help="compare gradients with these as well")
    option("--allow", type=finite, metavar="NUMBER",
        help="relative difference of solutions; default: 1e-7, or 1e-5 for float32")
    option("--allow-gradients", type=finite, metavar="NUMBER",
        help="and of gradients and multipliers; default: 1e-6, or 1e-4 for float32")
    option("--cotangents", type=at_least(1), default=3, metavar="COUNT",
        help="random vectors whose products with the solution are differentiated; default: 3")
    option("--repeats", type=at_least(0), default=3, metavar="COUNT",
        help="how often each is timed, the best counts; 0 for no times; default: 3")

    option = compare.add_argument_group("what to write").add_argument
    option("--json", type=Path, metavar="FILE", help="everything that was found")
    option("--plot", type=Path, metavar="FILE.png", help="differences and times")
    option("--save", type=Path, metavar="FILE.npz", help="the problem, for a bug report")
    # fmt: on
    compare.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    from fairopt.agreement.comparison import cross_validate
    from fairopt.cli import drawing as compare
    from fairopt.programs.storage import load_problem, save_problem

    given = drawing(arguments, "samples")
    if arguments.file is not None and given:
        raise ProblemError(
            f"expected a file, or how to draw a problem, got both (--{', --'.join(given)}); leave "
            "one out"
        )
    if arguments.plot is not None:
        try:
            import matplotlib.figure  # noqa: F401 - what would fail at the end fails at the start
        except ImportError as error:
            raise ProblemError(
                f"--plot: {error.name} is not installed; get it with: pip install 'fairopt[demo]'"
            ) from error
    outputs: list[Path] = [p for p in (arguments.json, arguments.plot, arguments.save) if p]
    with file_errors():
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if arguments.file is not None:
            problem, inputs = load_problem(arguments.file), None
            source: dict[str, Any] = {"file": str(arguments.file)}
        else:
            drawn = compare.Drawn(**given)  # Options that were not given have their defaults there.
            problem, inputs = compare.draw(drawn)
            source = {"drawn": asdict(drawn)}
        if arguments.save is not None:
            save_problem(problem, arguments.save)

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
        write_json({"problem": source, **agreement.to_dict()}, arguments.json)
    if arguments.plot is not None:
        compare.plot(agreement, arguments.plot)
    return 0 if agreement.agree else 1
