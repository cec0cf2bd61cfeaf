"""Saving and loading problems: nothing is lost, and a file from a stranger does no harm."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import cases
from torch import Tensor

from fairopt import (
    LP,
    QP,
    CellRows,
    DemographicParity,
    DenseRows,
    InfeasibleError,
    ProblemError,
    Rows,
    SparseRows,
    formulate,
    load_problem,
    project,
    save_problem,
    solve,
)
from fairopt.programs import storage
from fairopt.programs.problem import Problem
from fairopt.programs.tensors import compact, is_uniform

INF = float("inf")


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=dtype) + 0.1


def rows_of(form: str, batch: int, m: int, n: int, dtype: torch.dtype) -> Rows:
    if form == "dense":
        return DenseRows(numbers(batch, m, n, dtype=dtype))
    if form == "sparse":  # one coordinate is there twice
        row = torch.tensor([0, 1, 1, 0, 0]) % m
        column = torch.tensor([0, 1, 2, 2, 2]) % n
        return SparseRows(row, column, numbers(batch, 5, dtype=dtype), m, n)
    cell = torch.arange(n) % 3
    kind = {"cells": torch.int64, "cells32": torch.int32, "cells8": torch.uint8}[form]
    weight = numbers(batch, n, dtype=dtype)
    return CellRows(numbers(batch, m, 3, dtype=dtype), cell.to(kind), weight)


def quadratic_of(form: str, batch: int, n: int, dtype: torch.dtype) -> Any:
    if form == "diagonal":
        return numbers(batch, n, dtype=dtype)
    matrix = numbers(batch, n, n, dtype=dtype)
    matrix = matrix @ matrix.mT
    matrix = (matrix + matrix.mT) / 2
    return matrix if form == "dense" else DenseRows(matrix).to_sparse()


def problem_of(
    rows: str, quadratic: str | None, *, batch: int = 2, n: int = 4, dtype: Any = torch.float64
) -> Problem:
    m = 2
    A = rows_of(rows, batch, m, n, dtype)
    u = numbers(batch, m, dtype=dtype)
    u[0, 1] = INF
    lb = torch.full((batch, n), -INF, dtype=dtype)
    lb[:, 0] = -0.0
    data = (A, -u.clamp(max=9), u, lb, 1.0)
    names = {"row_names": ("first: a − b ≤ ε", 'the "second"\n'), "skipped": ("third: no samples",)}
    linear = numbers(batch, n, dtype=dtype)
    if quadratic is None:
        return LP(linear, *data, **names)
    return QP(quadratic_of(quadratic, batch, n, dtype), linear, *data, **names)


def flat(problem: Problem) -> dict[str, Any]:
    """Every field of a problem, those of its matrices spelled out."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(problem):
        name, value = field.name, getattr(problem, field.name)
        if name == "memo":  # what a backend remembers of it while it lives
            continue
        if isinstance(value, Rows):
            out[name] = type(value)
            out.update({f"{name}.{k}": v for k, v in vars(value).items()})
        else:
            out[name] = value
    return out


def assert_same(a: Problem, b: Problem) -> None:
    """The same to the last bit, sign of zero included, with the same things shared."""
    assert type(a) is type(b)
    one, other = flat(a), flat(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            copy = other[name]
            assert copy.dtype == value.dtype and copy.shape == value.shape, name
            assert value.detach().cpu().numpy().tobytes() == copy.numpy().tobytes(), name
            assert not value.numel() or compact(copy).shape == compact(value).shape, name
        else:
            assert other[name] == value, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("quadratic", ["diagonal", "dense", "sparse", None])
@pytest.mark.parametrize("rows", ["dense", "sparse", "cells", "cells32", "cells8"])
def test_round_trip(rows: str, quadratic: str | None, dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    problem = problem_of(rows, quadratic, dtype=dtype)
    save_problem(problem, tmp_path / "problem.npz")
    assert_same(problem, load_problem(tmp_path / "problem.npz"))


@settings(suppress_health_check=list(HealthCheck))
@given(case=cases(100))
def test_round_trip_of_what_formulate_writes(
    case: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    problem = formulate(
        case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
        weights=case.weights,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("saved") / "problem"
    save_problem(problem, path)
    assert_same(problem, load_problem(path))


def test_a_loaded_problem_has_the_same_solution(tmp_path: Path) -> None:
    scores = torch.rand(60, dtype=torch.float64)
    problem = formulate(
        DemographicParity(tolerance=0.01), scores, torch.arange(60) % 3, bounds=(0, 1)
    )
    save_problem(problem, tmp_path / "a")
    again = solve(load_problem(tmp_path / "a"))  # strides differ, so sums round differently
    assert torch.allclose(solve(problem).x, again.x, rtol=0, atol=1e-14)


def test_the_problem_of_an_error_can_be_saved(tmp_path: Path) -> None:
    scores = torch.rand(4, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    bounds = (torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    with pytest.raises(InfeasibleError) as error:
        project(scores, groups, DemographicParity(tolerance=0.1), bounds=bounds)
    save_problem(error.value.solution.problem, tmp_path / "a")
    loaded = load_problem(tmp_path / "a")
    with pytest.raises(InfeasibleError) as again:
        solve(loaded)
    assert again.value.rows == error.value.rows != ()


def test_what_is_shared_is_stored_once(tmp_path: Path) -> None:
    n, batch = 1000, 4096
    rows = CellRows(
        torch.ones(1, 2), (torch.arange(n) % 2).to(torch.uint8), torch.ones(1).expand(n)
    )
    one = torch.ones(1)
    problem = QP(
        torch.ones(()).expand(batch, n), torch.rand(n).expand(batch, n), rows, -one, one, 0.0, 1.0,
    )  # fmt: skip
    save_problem(problem, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 10_000
    loaded = load_problem(tmp_path / "a")
    assert_same(problem, loaded)
    assert is_uniform(loaded.lb)


def test_all_shared_by_the_batch(tmp_path: Path) -> None:
    one = torch.ones(1)
    for rows in (torch.ones(1, 1, 3), SparseRows.from_tensor(torch.ones(1, 3))):
        problem = LP(torch.rand(1, 3).expand(7, 3), rows, -one, one)
        save_problem(problem, tmp_path / "a")
        assert_same(problem, load_problem(tmp_path / "a"))


def test_without_rows(tmp_path: Path) -> None:
    none = torch.zeros(3, 0)
    problem = QP(torch.ones(3, 2), torch.rand(3, 2), torch.zeros(3, 0, 2), none, none)
    save_problem(problem, tmp_path / "a")
    assert_same(problem, load_problem(tmp_path / "a"))


def test_views_and_history_are_no_obstacle(tmp_path: Path) -> None:
    matrix = torch.rand(5, 2, 3, dtype=torch.float64, requires_grad=True)
    side = torch.ones(5, 3, dtype=torch.float64)
    problem = LP(torch.rand(10, 2)[::2], matrix.mT, -side, side)
    save_problem(problem, tmp_path / "a")
    loaded = load_problem(tmp_path / "a")
    assert_same(problem, loaded)
    assert not loaded.rows.tensors[0].requires_grad


def test_from_any_device(device: torch.device, tmp_path: Path) -> None:
    one = torch.ones(1, device=device)
    problem = LP(torch.rand(3, device=device), torch.ones(1, 3, device=device), -one, one)
    save_problem(problem, tmp_path / "a")
    assert_same(problem, load_problem(tmp_path / "a"))


def test_names_survive_whatever_they_hold(tmp_path: Path) -> None:
    name = "\x00\ud800 \U0001f600 \\ \" '"
    problem = LP(torch.ones(1), torch.ones(1, 1), -torch.ones(1), torch.ones(1), row_names=(name,))
    save_problem(problem, tmp_path / "a")
    assert load_problem(tmp_path / "a").row_names == (name,)


# ---------------------------------------------------------------- writing


def test_the_file_opens_in_numpy_without_pickle(tmp_path: Path) -> None:
    problem = problem_of("cells", "diagonal")
    save_problem(problem, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["q"], problem.q.numpy())
        assert json.loads(archive["header"].tobytes())["kind"] == "QP"


def test_writing_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "problem"
    path.write_text("older")
    problem = problem_of("dense", None)
    save_problem(problem, str(path))
    assert_same(problem, load_problem(str(path)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "problem"
    path.write_text("older")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="no space"):
                save_problem(problem_of("dense", None), path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    save_problem(problem_of("dense", None), tmp_path / "a")
    (tmp_path / "b").touch()
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert mode[0] == mode[1]


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="expected a QP or an LP, got dict"):
        save_problem({}, tmp_path / "a")  # type: ignore[arg-type]

    class Mine(DenseRows):
        def expand(self, batch: int) -> Mine:
            return Mine(self.matrix.expand(batch, -1, -1))

    one = torch.ones(1)
    with pytest.raises(ProblemError, match=r"got Mine.*to_sparse"):
        save_problem(LP(one, Mine(torch.ones(1, 1)), -one, one), tmp_path / "a")
    problem = LP(one.clone(), torch.ones(1, 1), -one, one)
    problem.c.fill_(float("nan"))
    with pytest.raises(ProblemError, match="finite"):
        save_problem(problem, tmp_path / "a")
    n = 2**29
    cell = torch.zeros(1, dtype=torch.uint8).expand(n)
    huge = LP(one.expand(n), CellRows(one[None], cell, one.expand(n)), -one, one)
    with pytest.raises(ProblemError, match="at most"):
        save_problem(huge, tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        save_problem(problem_of("dense", None), tmp_path / "missing" / "a")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- reading what is not ours


def test_a_missing_file_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_problem(tmp_path / "a")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"", b"PK\x03\x04", b"x,y\n1,2\n", pickle.dumps([1]), os.urandom(1000)):
        path.write_bytes(content)
        with pytest.raises(ProblemError, match="expected a file written by save_problem"):
            load_problem(path)
    np.savez(path.with_suffix(".npz"), a=np.ones(3))
    with pytest.raises(ProblemError, match="without its header"):
        load_problem(path.with_suffix(".npz"))


def test_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_problem(problem_of("sparse", "sparse"), path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ProblemError, match="torn or of another kind"):
            load_problem(path)


def test_a_changed_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    problem = problem_of("dense", None)
    save_problem(problem, path)
    content = bytearray(path.read_bytes())
    content[content.index(problem.c.numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ProblemError, match="torn"):
        load_problem(path)


class Executed(Exception):
    pass


class Hostile:
    """Pickled, it would raise when loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise __import__('test_storage').Executed",)


def write(path: Path, entries: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> None:
    """An archive of these arrays, or of these bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in entries.items():
            if not isinstance(value, bytes):
                stream = io.BytesIO()
                np.lib.format.write_array(stream, value)
                value = stream.getvalue()
            archive.writestr(f"{name}.npy", value)


def saved(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and header of a problem's file."""
    tensors, header = storage.parts(problem)
    return {name: storage.as_stored(tensor) for name, tensor in tensors.items()}, header


def text(header: Any) -> Any:
    return np.frombuffer(json.dumps(header).encode(), np.uint8)


def changed(problem: Problem, header: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    kept, old = saved(problem)
    return {**kept, **arrays, "header": text({**old, **header})}


def shapes(problem: Problem, **other: list[int]) -> dict[str, Any]:
    return {"shapes": {**saved(problem)[1]["shapes"], **other}}


def test_the_helpers_write_what_save_problem_writes(tmp_path: Path) -> None:
    problem = problem_of("cells", "dense")
    write(tmp_path / "a", changed(problem, {}, {}))
    assert_same(problem, load_problem(tmp_path / "a"))


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a", changed(problem_of("dense", None), {"version": 2}, {"more": np.ones(2)}))
    with pytest.raises(ProblemError, match="got 2; load it with a newer version of fairopt"):
        load_problem(tmp_path / "a")


SPARSE = problem_of("sparse", "sparse", batch=1)
CELLS = problem_of("cells", "diagonal", batch=1)
LINEAR = problem_of("dense", None, batch=1)
SHAPES = saved(LINEAR)[1]["shapes"]
NAN = np.full((1, 4), np.nan)

HOSTILE = {
    "no header": (saved(LINEAR)[0], "without its header"),
    "text in the header": (changed(LINEAR, {}, {}) | {"header": text([])}, "format"),
    "no JSON": (changed(LINEAR, {}, {}) | {"header": np.frombuffer(b"{", np.uint8)}, "JSON"),
    "deep JSON": (
        changed(LINEAR, {}, {}) | {"header": np.frombuffer(b"[" * 100_000, np.uint8)},
        "JSON",
    ),
    "another format": (changed(LINEAR, {"format": "x"}, {}), "format"),
    "version 0": (changed(LINEAR, {"version": 0}, {}), "got 0"),
    "version of another type": (changed(LINEAR, {"version": [1]}, {}), "version"),
    "kind": (changed(LINEAR, {"kind": "SDP"}, {}), "fields"),
    "kind of another type": (changed(LINEAR, {"kind": ["LP"]}, {}), "fields"),
    "form": (changed(LINEAR, {"rows": "__class__"}, {}), "fields"),
    "form of P": (changed(CELLS, {"P": {}}, {}), "fields"),
    "names": (changed(LINEAR, {"row_names": [1, 2]}, {}), "fields"),
    "too many names": (changed(LINEAR, {"row_names": ["a"] * 3}, {}), "row_names"),
    "no shapes": (changed(LINEAR, {"shapes": None}, {}), "fields"),
    "a shape of None": (changed(LINEAR, shapes(LINEAR, c=None), {}), "fields"),  # type: ignore[arg-type]
    "a shape of true": (changed(LINEAR, shapes(LINEAR, c=[True, 4]), {}), "fields"),
    "a negative shape": (changed(LINEAR, shapes(LINEAR, c=[-1, 4]), {}), "fields"),
    "no dimensions": (changed(LINEAR, shapes(LINEAR, c=[]), {}), "batch"),
    "other dimensions": (changed(LINEAR, shapes(LINEAR, c=[1, 2, 2]), {}), "dimensions"),
    "an empty batch": (changed(LINEAR, shapes(LINEAR, c=[0, 4]), {}), "batch"),
    "two batches": (changed(LINEAR, shapes(LINEAR, lb=[3, 4]), {}), "batch"),
    "a huge batch": (
        changed(LINEAR, {"shapes": {k: [10**15, *v[1:]] for k, v in SHAPES.items()}}, {}),
        "batch",
    ),
    "a huge number of variables": (
        changed(LINEAR, shapes(LINEAR, c=[1, 10**15]), {"c": np.ones((1, 1))}),
        "at most",
    ),
    "a number beyond 64 bits": (
        changed(LINEAR, shapes(LINEAR, c=[1, 10**30]), {"c": np.ones((1, 1))}),
        "at most",
    ),
    "a shape without a shape": (changed(LINEAR, shapes(LINEAR, x=[1]), {}), "arrays"),
    "an array too many": (changed(LINEAR, {}, {"x": np.ones(1)}), "arrays"),
    "an array of another form": (changed(LINEAR, {"rows": "cells"}, {}), "arrays"),
    "objects": (
        changed(LINEAR, {}, {"c": np.array([[Hostile()] * 4], object)}),
        "expected plain numbers",
    ),
    "objects, declared alone": (
        changed(LINEAR, {}, {"c": b"\x93NUMPY\x01\x00\x36\x00"
                             + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
                             + pickle.dumps(Hostile())}),
        "expected plain numbers",
    ),
    "strings": (changed(LINEAR, {}, {"c": np.array([["a"] * 4])}), "expected plain numbers"),
    "complex numbers": (changed(LINEAR, {}, {"c": np.ones((1, 4), complex)}), "plain numbers"),
    "columns first": (
        changed(SPARSE, {}, {"rows.values": np.asfortranarray(np.ones((2, 5)))}),
        "Fortran",
    ),
    "integers for numbers": (changed(LINEAR, {}, {"c": np.ones((1, 4), np.int64)}), "float32"),
    "NaN": (changed(LINEAR, {}, {"c": NAN}), "finite"),
    "NaN in a bound": (changed(LINEAR, {}, {"ub": NAN}), "lb <= ub"),
    "crossed bounds": (changed(LINEAR, {}, {"lb": np.full((1, 4), 7.0)}), "lb <= ub"),
    "a negative P": (changed(CELLS, {}, {"P": np.full((1, 4), -1.0)}), "negative"),
    "P not symmetric": (
        changed(SPARSE, {}, {"P.values": np.arange(16.0)[None]}),
        "symmetric",
    ),
    "a row out of range": (
        changed(SPARSE, {}, {"rows.row": np.array([0, 1, 2, 0, 0])}),
        "rows.row: expected indices in 0..1",
    ),
    "a negative row": (changed(SPARSE, {}, {"rows.row": np.array([0, 1, -1, 0, 0])}), "indices"),
    "a column out of range": (
        changed(SPARSE, {}, {"P.column": np.full(16, 4)}),
        "indices in 0..3",
    ),
    "a cell out of range": (changed(CELLS, {}, {"rows.cell": np.full((1, 4), 3)}), "0..2"),
    "a negative cell": (changed(CELLS, {}, {"rows.cell": np.full((1, 4), -1)}), "0..2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    entries, message = HOSTILE[name]
    write(tmp_path / "a", entries)
    with pytest.raises(ProblemError, match=message) as error:
        load_problem(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)


def test_a_huge_declared_shape_takes_no_memory(tmp_path: Path) -> None:
    for shape in ((10**12,), (2**62, 4), (10**30,), (0, 10**30), (-1, 4)):
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f8", "fortran_order": False, "shape": shape}
        )
        write(tmp_path / "a", changed(LINEAR, {}, {"c": stream.getvalue()}))
        with pytest.raises(ProblemError):
            load_problem(tmp_path / "a")


def test_compressed_entries_are_refused_unread(tmp_path: Path) -> None:
    write(tmp_path / "a", changed(LINEAR, {}, {"c": np.zeros((1, 10**6))}), zipfile.ZIP_DEFLATED)
    with pytest.raises(ProblemError, match="not compressed"):
        load_problem(tmp_path / "a")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", changed(LINEAR, {}, {}))
    with zipfile.ZipFile(tmp_path / "a", "a") as archive, pytest.warns(UserWarning, match="Dupl"):
        archive.writestr("c.npy", b"")
    with pytest.raises(ProblemError, match="one entry of that name"):
        load_problem(tmp_path / "a")


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_bytes_raise_anything_but_our_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A valid file with a few bytes changed, also where the checksum does not see it."""
    path = tmp_path_factory.mktemp("fuzz") / "a"
    write(path, changed(data.draw(st.sampled_from([SPARSE, CELLS, LINEAR])), {}, {}))
    if data.draw(st.booleans()):
        content = bytearray(path.read_bytes())
        path.write_bytes(mutated(content, data))
    else:  # inside an entry, with a checksum that fits
        with zipfile.ZipFile(path) as archive:
            entries = {i.filename.removesuffix(".npy"): archive.read(i) for i in archive.infolist()}
        name = data.draw(st.sampled_from(sorted(entries)))
        entries[name] = mutated(bytearray(entries[name]), data)
        write(path, entries)
    try:
        loaded = load_problem(path)
    except ProblemError:
        return
    assert isinstance(loaded, (QP, LP))  # the change was to a value, or to what is not read


def mutated(content: bytearray, data: st.DataObject) -> bytes:
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(
            st.one_of(st.integers(0, 255), st.sampled_from(list(b"0123456789'{}[]()-,|<>OV\"")))
        )
    return bytes(content)
