"""The registry of backends, seen by other distributions: entry points, classes by name, the doctor.

``tests/plugin`` is such a distribution, with a backend of its own.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fairopt import (
    LP,
    QP,
    BackendNotFoundError,
    ProblemError,
    UnsupportedProblemError,
    backends,
    solve,
)
from fairopt.backends import Backend, Capabilities
from fairopt.cli.diagnosis import diagnose

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "tests" / "plugin"


def problem() -> QP:
    """Nearest point to (1, -0.5) with x0 + x1 = 1 in the unit square: (1, 0)."""
    one = torch.ones(1, dtype=torch.float64)
    return QP(torch.ones(2).double(), torch.tensor([-1.0, 0.5]).double(),
              torch.ones(1, 2).double(), one, one, 0.0, 1.0)  # fmt: skip


def write_metadata(folder: Path, name: str, version: str, entry_points: str) -> None:
    """What an installer leaves of a distribution, as far as importlib.metadata reads it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def scanned() -> Iterator[None]:
    """Entry points are read again, now and afterwards."""
    registry, loaded = dict(backends.registry), dict(backends.loaded)
    backends.entry_points.cache_clear()
    yield
    backends.entry_points.cache_clear()
    backends.registry.clear()
    backends.registry.update(registry)
    backends.loaded.clear()
    backends.loaded.update(loaded)


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: None) -> Callable[..., None]:
    """Make a distribution that offers these entry points, and modules for them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, lines: str, **modules: str) -> None:
        write_metadata(tmp_path, name, "1.0", f"[fairopt.backends]\n{lines}\n")
        for module, code in modules.items():
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
            monkeypatch.delitem(sys.modules, module, raising=False)

    return write


# ---------------------------------------------------------------------------------------------
# Another distribution, in a fresh process
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an installer would leave it: the plugin's module and its metadata.

    By hand, from its pyproject.toml, for that needs no build backend.
    """
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(PLUGIN / "dual_active_set.py", folder)
    config = configparser.ConfigParser()
    config.read(PLUGIN / "pyproject.toml")
    project = {key: value.strip('"') for key, value in config["project"].items()}
    points = config['project.entry-points."fairopt.backends"']
    lines = "".join(f"{key} = {value.strip(chr(34))}\n" for key, value in points.items())
    write_metadata(folder, project["name"], project["version"], f"[fairopt.backends]\n{lines}")
    return folder


def python(site: Path, *arguments: str, cwd: Path | None = None) -> str:
    """What a fresh process prints that has the folder, and fairopt, on its path."""
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, timeout=300, cwd=cwd or site,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


BY_NAME = """
    import sys
    import torch
    from fairopt import DemographicParity, FairnessLayer, backends, solve

    def layer(name):
        return FairnessLayer(DemographicParity(tolerance=0.05), bounds=(0, 1), backend=name)

    groups = torch.arange(30) % 3
    torch.manual_seed(0)
    start = torch.rand(30, dtype=torch.float64) + 0.2 * groups

    def run(name):
        scores = start.clone().requires_grad_()
        fair = layer(name)(scores, groups)
        fair.square().sum().backward()
        return fair.detach(), scores.grad

    ours = run("numba")
    run("auto")
    assert "dual_active_set" not in sys.modules, "imported though nobody asked for it"
    assert backends.entry_points.cache_info().currsize == 0, "metadata read on the hot path"
    theirs = run("dual-active-set")
    assert "dual_active_set" in sys.modules
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert backends.names()[-1] == "dual-active-set"
    assert "dual-active-set" in backends.available()
    assert backends.get("dual-active-set", rounds=7).rounds == 7
    assert not backends.faults()
    backends.registry.clear()  # with none of ours, auto comes to it
    scores = layer("auto")
    scores(start, groups)
    print(scores.last.backend)
"""


def test_another_distribution_s_backend_works_by_name(site: Path) -> None:
    assert python(site, "-c", textwrap.dedent(BY_NAME)).strip() == "dual-active-set"


def test_it_passes_the_contract_in_three_lines(site: Path, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "from fairopt.testing import BackendContract\n"
        "class TestTheirs(BackendContract):\n"
        "    backend = 'dual-active-set'\n"
    )
    printed = python(
        site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".",
        "test_theirs.py", cwd=tmp_path,
    )  # fmt: skip
    last = printed.strip().splitlines()[-1]
    assert "failed" not in last
    assert int(last.split(" passed")[0].split()[-1]) > 300


def test_the_doctor_examines_it(site: Path) -> None:
    printed = python(site, "-m", "fairopt", "doctor")
    assert "backend 'dual-active-set' from fairopt-dual-active-set 1.0: ok, solved" in printed


def test_an_installer_makes_the_same_of_it(site: Path, tmp_path: Path) -> None:
    """What the tests above wrote by hand is what a wheel says."""
    pytest.importorskip("hatchling", reason="hatchling builds the plugin")
    source = tmp_path / "source"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    python(site, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    for name in ("dual_active_set.py", "fairopt_dual_active_set-1.0.dist-info/entry_points.txt"):
        built, written = ((folder / name).read_text() for folder in (tmp_path / "wheel", site))
        assert built.split() == written.split()


# ---------------------------------------------------------------------------------------------
# Broken entry points
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """An entry point that names no backend, and what is said of it."""

    line: str
    said: str
    code: str = ""


BROKEN = {
    "no such module": Broken(
        "bad = no_such_module_anywhere:Solver",
        "backend 'bad' does not load: ModuleNotFoundError: .*no_such_module_anywhere.*; update or "
        "uninstall the distribution 'fairopt-broken', which offers it",
    ),
    "an extra that is missing": Broken(
        "bad = no_such_module_anywhere:Solver [fast]",
        r"does not load: Module.*; get it with: pip install 'fairopt-broken\[fast\]'",
    ),
    "no such class": Broken("bad = broken_module:Solver", "does not load: AttributeError: "),
    "an error while it is imported": Broken(
        "bad = broken_module:Solver",
        "does not load: RuntimeError: no licence; ",
        "raise RuntimeError('no licence')",
    ),
    "not a class": Broken(
        "bad = broken_module:Solver",
        "backend 'bad': expected a subclass of fairopt.backends.Backend, got 3; ",
        "Solver = 3",
    ),
    "not a backend": Broken(
        "bad = broken_module:Solver",
        "expected a subclass of fairopt.backends.Backend, got <class 'broken_module.Solver'>; ",
        "class Solver: pass",
    ),
    "no solve": Broken(
        "bad = broken_module:Solver",
        "backend 'bad' cannot be made with its defaults: TypeError: .*abstract",
        "from fairopt.backends import Backend\nclass Solver(Backend): pass",
    ),
    "not a reference": Broken("bad = !!", "backend 'bad' does not load: "),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_entry_point_is_our_error_and_breaks_nothing_else(
    broken: Broken, offer: Callable[..., None]
) -> None:
    offer("fairopt-broken", broken.line, broken_module=broken.code)
    for ask in (lambda: backends.get("bad"), lambda: solve(problem(), backend="bad")):
        with pytest.raises(BackendNotFoundError, match=broken.said):
            ask()
    assert solve(problem(), backend="numba").x.tolist() == [[1.0, 0.0]]
    assert "numba" in backends.available()

    diagnosis = diagnose()
    assert not diagnosis.healthy
    (report,) = (report for report in diagnosis.backends if report.name == "bad")
    assert (report.passed, report.source) == (False, "fairopt-broken")
    assert "backend 'bad' from fairopt-broken 1.0: FAILED, " in str(diagnosis)

    backends.registry.clear()  # auto passes it over, and says so
    with pytest.raises(
        UnsupportedProblemError, match=r"no installed backend solves this problem; .*'bad'"
    ):
        solve(problem())


def test_a_name_of_ours_is_ours(offer: Callable[..., None]) -> None:
    offer("fairopt-thief", "numba = broken_module:Solver\nauto = broken_module:Solver")
    assert backends.names().count("numba") == 1
    assert "auto" not in backends.names()
    assert type(backends.get("numba")).__module__ == "fairopt.backends.numba.backend"
    faults = backends.faults()
    assert (
        "backend 'numba' of the distribution 'fairopt-thief' cannot be reached: another"
        in (faults[0])
    )
    assert "backend 'auto'" in faults[1]
    diagnosis = diagnose()
    assert not diagnosis.healthy
    assert f"FAULT: {faults[0]}" in str(diagnosis)


def test_a_name_that_two_distributions_claim_is_nobody_s(offer: Callable[..., None]) -> None:
    offer("fairopt-one", "twice = broken_module:Solver", broken_module="raise RuntimeError")
    offer(
        "fairopt-two", "twice = broken_module:Solver\nother = plugin.dual_active_set:DualActiveSet"
    )
    assert "twice" in backends.names()
    assert "twice" not in backends.available()
    with pytest.raises(
        BackendNotFoundError,
        match=r"backend 'twice': several distributions offer it \(fairopt-(one|two), "
        r"fairopt-(one|two)\); uninstall all but one",
    ):
        backends.get("twice")
    assert "broken_module" not in sys.modules
    assert backends.get("other").name == "dual-active-set"
    (report,) = (report for report in diagnose().backends if report.name == "twice")
    assert report.passed is False


def test_metadata_that_cannot_be_read_is_told_by_the_doctor(
    offer: Callable[..., None], tmp_path: Path
) -> None:
    offer("fairopt-good", "good = plugin.dual_active_set:DualActiveSet")
    offer("fairopt-bad", "there is no equals sign here")
    write_metadata(tmp_path, "unrelated", "1.0", "[other]\nnor here\n")
    assert backends.get("good").name == "dual-active-set"
    (fault,) = backends.faults()
    assert "entry points of the distribution 'fairopt-bad' cannot be read: " in fault
    assert f"FAULT: {fault}" in str(diagnose())


def test_a_distribution_that_is_there_twice_counts_once(
    offer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer("fairopt-good", "good = plugin.dual_active_set:DualActiveSet")
    write_metadata(
        tmp_path / "older", "fairopt-good", "0.9", "[fairopt.backends]\ngood = old:Solver\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "older")])
    assert backends.get("good").name == "dual-active-set"
    assert not backends.faults()


def test_what_is_registered_here_comes_before_an_entry_point(offer: Callable[..., None]) -> None:
    offer("fairopt-good", "good = plugin.dual_active_set:DualActiveSet")
    assert backends.get("good").name == "dual-active-set"
    numba = type(backends.get("numba"))
    backends.register("good", lambda: numba)
    assert type(backends.get("good")) is numba
    assert backends.names().count("good") == 1
    assert "backend 'good' of the distribution 'fairopt-good' cannot" in backends.faults()[0]


# ---------------------------------------------------------------------------------------------
# The hot path
# ---------------------------------------------------------------------------------------------


def test_entry_points_are_not_read_where_one_of_ours_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "entry_points", lambda: pytest.fail("read the metadata"))
    for name in ("numba", "auto"):
        assert solve(problem(), backend=name).x.tolist() == [[1.0, 0.0]]
    assert backends.is_available("numba")
    assert backends.get("numba", threads=1).threads == 1


def test_they_are_read_once(scanned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    calls = []
    distributions = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions",
                        lambda: calls.append(1) or distributions())  # fmt: skip
    for _ in range(3):
        backends.names(), backends.available(), backends.faults()
        with pytest.raises(BackendNotFoundError):
            backends.get("nunba")
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------
# register
# ---------------------------------------------------------------------------------------------


def test_register_states_what_is_missing_and_how_to_get_it(scanned: None) -> None:
    backends.register(
        "mine", lambda: pytest.fail("loaded"), package="no_such_solver", install="pip install mine"
    )
    assert "mine" in backends.names()
    assert "mine" not in backends.available()
    with pytest.raises(
        BackendNotFoundError,
        match="backend 'mine' needs the package 'no_such_solver', which is not installed; get it "
        "with: pip install mine",
    ):
        solve(problem(), backend="mine")
    assert solve(problem()).backend == "numba"
    (report,) = (report for report in diagnose().backends if report.name == "mine")
    assert report.passed is None
    assert "pip install mine" in report.message


@pytest.mark.parametrize("package", ["no_such.solver", "json.no_such_solver"])
def test_a_package_within_another(package: str, scanned: None) -> None:
    backends.register("mine", lambda: pytest.fail("loaded"), package=package, install="pip it")
    assert not backends.is_available("mine")


@pytest.mark.parametrize("half", [{"package": "json"}, {"install": "pip install json"}])
def test_register_takes_package_and_install_together(half: dict[str, str]) -> None:
    with pytest.raises(ProblemError, match="package, install: expected both"):
        backends.register("mine", lambda: pytest.fail("loaded"), **half)
    assert "mine" not in backends.registry


def test_an_option_s_error_is_ours(scanned: None) -> None:
    class Choosy(Backend):
        name = "choosy"
        capabilities = Capabilities()

        def __init__(self, *, eps: float = 0.1) -> None:
            if eps <= 0:
                raise ValueError("eps must be positive")

        def solve(self, problem: QP | LP) -> None:  # type: ignore[override]
            raise NotImplementedError

    backends.register("choosy", lambda: Choosy)
    with pytest.raises(ProblemError, match="backend 'choosy': eps must be positive"):
        backends.get("choosy", eps=0.0)


# ---------------------------------------------------------------------------------------------
# The classes of the built-in backends
# ---------------------------------------------------------------------------------------------

BUILT_IN = {entry.kind: name for name, entry in backends.registry.items() if entry.kind}


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_classes_of_the_built_in_ones_are_at_hand(kind: str) -> None:
    name = BUILT_IN[kind]
    if name not in backends.available():
        with pytest.raises(BackendNotFoundError, match="pip install"):
            getattr(backends, kind)
        pytest.skip(f"{name} is not installed")
    found = getattr(backends, kind)
    assert found is type(backends.get(name))
    assert found.__name__ == kind
    assert found.name == name


def test_without_the_package_the_class_says_how_to_get_it(
    scanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = backends.built_in("missing_", "Missing", "no_such_solver", "pip install missing")
    monkeypatch.setitem(backends.registry, "missing", entry)
    with pytest.raises(BackendNotFoundError, match="pip install missing"):
        _ = backends.Missing


def test_other_attributes_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'OSPQ'"):
        _ = backends.OSPQ


def test_importing_everything_imports_no_solver() -> None:
    code = (
        "import sys; from fairopt.backends import *; "
        "print([m for m in ('numba', 'osqp', 'qpth', 'scipy') if m in sys.modules])"
    )
    assert python(ROOT, "-c", code).strip() == "[]"
