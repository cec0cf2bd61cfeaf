"""What all tests share: reproducible draws, threads, devices."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import HealthCheck, settings

from fairopt.backends.numba import backend as numba_
from fairopt.cli import main

# Reproducible by default: the same code draws the same problems on every machine, so that a red run
# stays red until it is mended. To look for new counterexamples, with a line that reproduces each:
#
#     HYPOTHESIS_PROFILE=random make test
_common = {
    "deadline": None,  # the first example may compile a kernel
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", derandomize=True, database=None, **_common)
settings.register_profile("quick", derandomize=True, database=None, max_examples=25, **_common)
settings.register_profile("random", derandomize=False, print_blob=True, max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))  # an unknown name raises


@pytest.fixture(autouse=True)
def _clean_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seed torch; give back its threads, default dtype and gradient mode as they were.

    Two threads whatever the machine has, and from sizes that a test can afford: the parallel code
    runs everywhere, and sums agree.
    """
    monkeypatch.setattr(numba_, "PARALLEL_FROM", 40_000)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the machine has; for the others, a skip that says so."""
    if request.param == "cuda" and not torch.cuda.is_available():
        reason = (
            "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device"
        )
        pytest.skip(f"{reason} (torch {torch.__version__})")
    return torch.device(request.param)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, and ``run``, which gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    made = SimpleNamespace(folder=tmp_path)

    def run(*arguments, stdin=b"", state="S"):
        printed, said = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", printed)
            patch.setattr(sys, "stderr", said)
            status = main(["stream", "--state", state, *arguments])
        printed.flush()
        return status, printed.buffer.getvalue(), said.getvalue()

    made.run = run
    return made


@pytest.fixture
def _highs() -> None:
    """Skip where HiGHS is not installed."""
    from agreeing import skip_without

    skip_without("highs")
