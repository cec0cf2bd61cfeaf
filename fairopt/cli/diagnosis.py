"""The doctor: it says which backends are installed, what they can do, and how to get the rest.

``diagnose`` returns a ``Diagnosis``; ``fairopt doctor`` prints it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from fairopt import backends
from fairopt.errors import BackendNotFoundError, FairoptError, UnsupportedProblemError
from fairopt.programs.problem import LP, QP
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.rows.sparse import SparseRows
from fairopt.solving.autograd import solve
from fairopt.tolerances import SELF_TEST

OPTIONAL = {"matplotlib": "the plots of `fairopt demo`: pip install 'fairopt[demo]'"}


@dataclass(frozen=True)
class BackendReport:
    """One backend.

    Attributes:
        name: as in ``backend="numba"``.
        source: the distribution that offers it; None for ours and for those registered here.
        installed: whether the package that it needs is there.
        version: of the package that solves, or of the distribution; None if unknown.
        capabilities: what the backend declares, field by field.
        passed: whether it loads and solved a tiny problem to 1e-6; None if not installed.
        message: what the tiny problem showed, or how to install the solver.
    """

    name: str
    source: str | None
    installed: bool
    version: str | None
    capabilities: Mapping[str, str | int | float | bool | None]
    passed: bool | None
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings of ``fairopt doctor``, which prints ``str(diagnosis)``.

    Attributes:
        versions: package name to version, None where it is missing.
        threads: what torch, and so the closed-form backend, works with.
        cores: what the process may run on.
        devices: the CUDA devices; empty without any.
        cuda: one line about CUDA.
        kernel_cache: the folder of compiled kernels; None if no folder can be written.
        backends: one report per backend, ours and those of other distributions.
        faults: of entry points of other distributions that name no backend here.
    """

    versions: Mapping[str, str | None]
    system: str
    threads: int
    cores: int
    devices: Sequence[str]
    cuda: str
    kernel_cache: str | None
    backends: Sequence[BackendReport]
    faults: Sequence[str]

    @property
    def healthy(self) -> bool:
        """Some backend solved its problem, none failed, and all entry points are in order."""
        passed = [report.passed for report in self.backends]
        return True in passed and False not in passed and not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return asdict(self) | {"healthy": self.healthy}

    def __str__(self) -> str:
        return "\n".join([*environment_lines(self), "", *backend_lines(self)])


def diagnose() -> Diagnosis:
    """Look at this installation and let every installed backend solve a tiny problem."""
    from fairopt import __version__
    from fairopt.kernels.compilation import cache_folder  # This imports Numba.

    names = ("fairopt", "torch", "numpy", "numba", *OPTIONAL)
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in names}
    versions["fairopt"] = __version__
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if devices:
        cuda = f"CUDA {torch.version.cuda}: " + ", ".join(devices)
    elif torch.version.cuda is None:
        cuda = "no CUDA: this build of torch has none"
    else:
        cuda = f"no CUDA device, though this build of torch knows CUDA {torch.version.cuda}"
    return Diagnosis(
        versions=versions,
        system=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        devices=devices,
        cuda=cuda,
        kernel_cache=cache_folder(),
        backends=[examine(name) for name in backends.names()],
        faults=backends.faults(),
    )


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def solver_version(entry: backends.Entry) -> str | None:
    """Version of the distribution that provides the package that solves."""
    if entry.distribution is not None:
        return version_of(entry.distribution)
    if entry.package is None:
        return None
    package = entry.package.split(".")[0]
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    return version_of(distributions[0])


def examine(name: str) -> BackendReport:
    entry = backends.find(name)
    version = solver_version(entry)
    passed: bool | None
    try:
        can = backends.get(name).capabilities
    except BackendNotFoundError as error:
        missing = not entry.installed and entry.fault is None
        installed, declared = entry.installed, {}
        passed, message = None if missing else False, str(error)
    else:
        installed, declared = (
            True,
            {each.name: plain(getattr(can, each.name)) for each in fields(can)},
        )
        passed, message = self_test(name)
    return BackendReport(name, entry.distribution, installed, version, declared, passed, message)


def plain(value: object) -> str | int | float | bool | None:
    if isinstance(value, (set, frozenset, list, tuple)):
        return ", ".join(sorted(map(str, value))) or "none"
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def self_test(name: str) -> tuple[bool, str]:
    """Equal means of two groups of two, as the first kind of problem that the backend takes."""
    dense = DenseRows(torch.tensor([[[0.5, 0.5, -0.5, -0.5]]], dtype=torch.float64))
    cells = CellRows(
        torch.tensor([[[0.5, -0.5]]], dtype=torch.float64), torch.tensor([[0, 0, 1, 1]]),
        torch.ones(1, 4, dtype=torch.float64),
    )  # fmt: skip
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    scores = torch.tensor([[0.1, 0.3, 0.5, 0.7]], dtype=torch.float64)
    costs = torch.tensor([[-3.0, -2.0, 1.0, 4.0]], dtype=torch.float64)
    projected, cheapest = [[0.3, 0.5, 0.3, 0.5]], [[1.0, 0.0, 1.0, 0.0]]
    trials: list[tuple[str, QP | LP, list[list[float]]]] = []
    sparse = SparseRows.from_tensor(torch.diag(one[0]).to_sparse())
    quadratics: tuple[torch.Tensor | SparseRows, ...] = (one, torch.diag_embed(one), sparse)
    forms: tuple[Rows, ...] = (dense, dense.to_sparse(), cells)
    for rows in forms:
        for P in quadratics:
            quadratic = QP(P, -scores, rows, zero, zero, 0.0, 1.0)
            trials.append(("a quadratic program", quadratic, projected))
        trials.append(("a linear program", LP(costs, rows, zero, zero, 0.0, 1.0), cheapest))
    for kind, problem, expected in trials:
        started = time.perf_counter()
        try:
            x = solve(problem, backend=name).x
        except UnsupportedProblemError:
            continue
        except FairoptError as error:
            return False, f"failed on {kind}: {error}"
        milliseconds = (time.perf_counter() - started) * 1e3
        deviation = float((x - torch.tensor(expected, dtype=x.dtype)).abs().max())
        passed = deviation <= SELF_TEST
        return passed, (
            f"{'solved' if passed else 'WRONG on'} {kind}, error {deviation:.0e}, "
            f"{milliseconds:.0f} ms the first time"
        )
    return False, "takes neither quadratic nor linear programs on the CPU"


def environment_lines(diagnosis: Diagnosis) -> list[str]:
    lines = [f"{name:13}{version}" for name, version in diagnosis.versions.items() if version]
    lines += [
        f"{'system':13}{diagnosis.system}",
        f"{'threads':13}{diagnosis.threads} (torch.get_num_threads), on {diagnosis.cores} cores",
        f"{'device':13}{diagnosis.cuda}",
    ]
    cache = (
        "no writable folder, so kernels are compiled in every process; set NUMBA_CACHE_DIR to one"
        if diagnosis.kernel_cache is None
        else f"{diagnosis.kernel_cache} (writable)"
    )
    missing = [name for name in OPTIONAL if diagnosis.versions[name] is None]
    lines.append(f"{'kernel cache':13}{cache}")
    return lines + [f"{name:13}not installed; it draws {OPTIONAL[name]}" for name in missing]


def backend_lines(diagnosis: Diagnosis) -> list[str]:
    lines = []
    for report in diagnosis.backends:
        version = f" {report.version}" if report.version else ""
        source = f" from {report.source}" if report.source else ""
        if report.passed is None:
            lines.append(f"backend {report.name!r}{source}: not installed")
            lines.append(f"    {report.message}")
            continue
        mark = "ok" if report.passed else "FAILED"
        lines.append(f"backend {report.name!r}{source}{version}: {mark}, {report.message}")
        width = max((len(name) for name in report.capabilities), default=0)
        for name, value in report.capabilities.items():
            shown = ("no", "yes")[value] if isinstance(value, bool) else value
            lines.append(f"    {name.replace('_', ' '):{width}}  {shown}")
    return lines + [f"FAULT: {fault}" for fault in diagnosis.faults]
