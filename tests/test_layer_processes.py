"""The layer in threads and processes, and for inputs that are large enough to take other ways."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from layers import GROUPS, PARITY, SCORES, N, parity
from torch import Tensor
from torch.utils.data import Dataset

from fairopt import FairnessLayer, ProblemError, project
from fairopt.backends import Numba
from fairopt.backends.numba import backend as numba_

# ---------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------


def task(seed: int, layer: FairnessLayer, n: int) -> tuple[list[float], list[float]]:
    """One forward and backward on its own data."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, dtype=torch.float64, generator=generator).requires_grad_()
    groups = torch.randint(0, 2 + seed % 3, (n,), generator=generator)
    fair = layer(scores, groups)
    (grad,) = torch.autograd.grad(fair.square().sum(), scores)
    return fair.tolist(), grad.tolist()


@pytest.mark.parametrize("n", [50, 50_000], ids=["small", "split over threads"])
def test_one_layer_from_eight_threads(n: int) -> None:
    layer = parity()
    seeds = range(24)
    serial = [task(seed, layer, n) for seed in seeds]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda seed: task(seed, layer, n), seeds))
    for got, want in zip(parallel, serial, strict=True):
        # A pass split elsewhere adds in another order.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 5])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_one_thread_and_two_agree(weighted: bool, groups: int) -> None:
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n, dtype=torch.float64, generator=generator)
    codes = torch.randint(0, groups, (n,), generator=generator)
    scores += 0.2 * codes
    weights = torch.rand(n, dtype=torch.float64, generator=generator) if weighted else None
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaf = scores.clone().requires_grad_()
        fair = parity()(leaf, codes, weights=weights)
        (grad,) = torch.autograd.grad(fair.square().sum(), leaf)
        found.append((fair, grad))
    assert Numba(threads=2).workers(1, n) == 2  # or this compares nothing
    assert abs(float(scores[codes == 0].mean() - scores[codes == 1].mean())) > 0.1
    torch.testing.assert_close(*(f for f, _ in found), rtol=0, atol=1e-12)
    torch.testing.assert_close(*(g for _, g in found), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def script(folder: Path, code: str, **environment: str) -> str:
    """Run a script in a fresh process that can import fairopt and this file; its output."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(code))
    here = Path(__file__).resolve().parent
    path = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_child(seed: int) -> list[float]:
    """What a worker does: large enough for the backend to use its threads, if told to use them.

    Torch itself keeps to one thread: its own OpenMP does not survive a fork (a bare ``x.sum()``
    hangs in the child), which is why a DataLoader sets this, too.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(50_000, dtype=torch.float64, generator=generator)
    groups = torch.randint(0, 2, (50_000,), generator=generator)
    backend = Numba(threads=2)
    with patch.object(numba_, "PARALLEL_FROM", 40_000):
        assert backend.workers(1, 50_000) == 2
        return project(scores, groups, PARITY, bounds=(0.1, 0.9), backend=backend)[:50].tolist()


class Projected(Dataset):
    """A data set that projects when it is asked for an item."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(in_child(index), dtype=torch.float64)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_child_processes(method: str, tmp_path: Path) -> None:
    """After the parent's own threads have been at work."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform does not {method}")
    code = f"""
        import json, multiprocessing
        from test_layer_processes import in_child
        if __name__ == "__main__":
            in_child(0)
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                print(json.dumps(pool.map_async(in_child, range(3)).get(timeout=100)))
    """
    got = json.loads(script(tmp_path, code))
    np.testing.assert_allclose(got, [in_child(seed) for seed in range(3)], rtol=0, atol=1e-12)


def test_in_the_workers_of_a_data_loader(tmp_path: Path) -> None:
    code = """
        import json
        from torch.utils.data import DataLoader
        from test_layer_processes import Projected, in_child
        if __name__ == "__main__":
            in_child(0)
            loader = DataLoader(Projected(), batch_size=3, num_workers=2, timeout=100)
            print(json.dumps([batch.tolist() for batch in loader]))
    """
    got = json.loads(script(tmp_path, code))
    want = [[in_child(3 * b + i) for i in range(3)] for b in range(2)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


UNWRITABLE = """
    import os, tempfile

    # Numba tries every folder with a temporary file. Permissions stop nobody who runs as root.
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    tempfile.TemporaryFile = refuse
"""

SOLVE = """
    import json, torch
    from fairopt import DemographicParity, project
    from fairopt.kernels import projection as _projection

    scores = torch.tensor([0.9, 0.1, 0.8, 0.3], dtype=torch.float64, requires_grad=True)
    fair = project(scores, torch.arange(4) % 2, DemographicParity(tolerance=0.05), bounds=(0, 1))
    fair[0].backward()
    kept = _projection.solve.stats.cache_path
    print(json.dumps([fair.tolist(), scores.grad.tolist(), kept]))
"""


@pytest.mark.slow
def test_kernels_where_no_cache_folder_can_be_written(tmp_path: Path) -> None:
    """They are compiled in memory: slower at the start, and the same."""
    code = textwrap.dedent(UNWRITABLE) + textwrap.dedent(SOLVE)
    fair, grad, kept = json.loads(script(tmp_path, code))
    assert kept is None  # the simulation works: nothing is cached
    leaf = SCORES[:4].clone().requires_grad_()
    want = project(leaf, GROUPS[:4], PARITY, bounds=(0, 1))
    want[0].backward()
    assert fair == want.tolist()
    assert grad == leaf.grad.tolist()


def test_kernels_where_the_named_cache_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    fair, _, kept = json.loads(
        script(tmp_path, SOLVE, NUMBA_CACHE_DIR=str(tmp_path / "file" / "kernels"))
    )
    assert "file" not in Path(kept).parts  # another folder serves
    assert fair == pytest.approx([0.6, 0.4, 0.5, 0.6])


# ---------------------------------------------------------------------------------------------
# Large and small inputs take other ways
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_scores_are_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Huge pages for q and x, torch's reductions for the checks."""
    found = []
    for large, small in ((10**9, 10**9), (0, 0)):
        monkeypatch.setattr("fairopt.kernels.memory.LARGE", large)
        monkeypatch.setattr(sys.modules["fairopt.formulation.inputs"], "SMALL", small)
        leaf = SCORES.to(dtype).clone().requires_grad_()
        fair = parity()(leaf, GROUPS)
        fair.backward(torch.arange(N, dtype=dtype))
        found.append((fair.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_found(
    monkeypatch: pytest.MonkeyPatch, small: int, value: float
) -> None:
    monkeypatch.setattr(sys.modules["fairopt.formulation.inputs"], "SMALL", small)
    for at in (0, 7, N - 1):
        scores = SCORES.clone()
        scores[at] = value
        with pytest.raises(ProblemError, match=rf"1 NaN or infinite ones, first at index \({at},"):
            parity()(scores, GROUPS)


@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("code", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_codes_of_every_width(
    monkeypatch: pytest.MonkeyPatch, small: int, code: torch.dtype
) -> None:
    monkeypatch.setattr(sys.modules["fairopt.formulation.inputs"], "SMALL", small)
    want = parity()(SCORES, GROUPS)
    assert torch.equal(parity()(SCORES, GROUPS.to(code)), want)
    for factor in (63, 64):  # the largest code kept, and the smallest that is renumbered
        got = parity()(SCORES, (factor * GROUPS).to(code))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)  # 64 cells: another kernel
    if code != torch.uint8:
        with pytest.raises(ProblemError, match="expected codes of at least 0, got -1"):
            parity()(SCORES, (-GROUPS).to(code))
