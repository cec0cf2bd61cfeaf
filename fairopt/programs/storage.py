"""Saving a problem to one file, and loading it again: to report it, or to solve it elsewhere.

The file is a NumPy ``.npz`` archive, not compressed: a plain array for each tensor of the problem,
and ``header``, a JSON text in UTF-8 with the rest. Loading executes nothing that the file says: no
pickle is read, every array is checked against the size of the file before memory is taken, and the
problem is made by its own constructor, with all its checks.

    header = {"format": "fairopt problem", "version": 1, "kind": "QP" or "LP",
              "P": the form of P (not for an LP), "rows": the form of the rows,
              "row_names": [...], "skipped": [...], "shapes": {array: shape once expanded}}

What a batch shares is stored once, with a size of 1 where the shape in the header is larger, and is
expanded again on loading.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import struct
import tokenize
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows import FORMS, Rows, SparseRows
from fairopt.programs.tensors import compact

FORMAT = "fairopt problem"
VERSION = 1


def arrays_of(prefix: str, form: type[Rows]) -> dict[str, int]:
    """The arrays of a form, with their numbers of dimensions."""
    return {f"{prefix}.{name}": dims for name, dims in {**form.stored, **form.pattern}.items()}


# Arrays with their number of dimensions; the first is the batch, save where one dimension is all:
# those are shared by it.
SIDES = {"l": 2, "u": 2, "lb": 2, "ub": 2}
QUADRATIC = {"diagonal": {"P": 2}, "dense": {"P": 3}, "sparse": arrays_of("P", SparseRows)}
DTYPES = ("<f4", "<f8", "<i8", "<i4", "|u1")

# A file of a few bytes may declare any shape for an array that is one number, expanded. Nothing is
# allocated for it, but the checks of the constructors read every element.
MOST_EXPANDED = 2**28

# What the readers of zip archives, NumPy headers and JSON raise on bytes that are none.
MALFORMED = (
    zipfile.BadZipFile, OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError,
    RuntimeError, OverflowError, RecursionError, MemoryError, struct.error, tokenize.TokenError,
)  # fmt: skip


def save_problem(problem: Problem, path: str | os.PathLike[str]) -> None:
    """Write a problem to one file, which ``load_problem`` reads and ``numpy.load`` opens.

    Values, dtypes, row names and the form of P and of the rows are kept exactly; gradient history
    and device are not. The file appears whole or not at all.

    Args:
        problem: a ``QP`` or ``LP``, for example ``error.solution.problem``.
        path: where to write; a file that is there is replaced.

    Raises:
        ProblemError: not a problem, its rows are of a form that fairopt does not know, or its data
            were changed so that they no longer pass the checks of its constructor.
        OSError: the file cannot be written.
    """
    if not isinstance(problem, (QP, LP)):
        raise ProblemError(f"problem: expected a QP or an LP, got {type(problem).__name__}")
    tensors, header = parts(problem)
    arrays = {name: as_stored(tensor) for name, tensor in tensors.items()}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    restored(arrays)  # what cannot be loaded is not saved: the data may have been changed in place
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def parts(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a problem by the names they have in the file, and the header."""
    linear = "c" if isinstance(problem, LP) else "q"
    tensors: dict[str, Tensor] = {name: getattr(problem, name) for name in (linear, *SIDES)}
    header = {"format": FORMAT, "version": VERSION, "kind": type(problem).__name__}
    if isinstance(problem, QP):
        if isinstance(problem.P, SparseRows):
            tensors.update(pieces("P", problem.P))
        else:
            tensors["P"] = problem.P
        header["P"] = problem.quadratic_form
    rows = problem.rows.plain()
    if FORMS.get(rows.name) is not type(rows):
        known = ", ".join(form.__name__ for form in FORMS.values())
        raise ProblemError(
            f"rows: expected one of {known}, got {type(rows).__name__}; make the problem with "
            "rows.to_sparse() or rows.to_dense()"
        )
    tensors.update(pieces("rows", rows))
    return tensors, {
        **header,
        "rows": rows.name,
        "row_names": list(problem.row_names),
        "skipped": list(problem.skipped),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def pieces(prefix: str, matrix: Rows) -> dict[str, Tensor]:
    return {name: getattr(matrix, name.split(".")[1]) for name in arrays_of(prefix, type(matrix))}


def as_stored(tensor: Tensor) -> NDArray[Any]:
    """One copy of what is expanded, in C order, little-endian on every machine."""
    array = np.ascontiguousarray(compact(tensor.detach()).cpu().numpy())
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def load_problem(path: str | os.PathLike[str]) -> Problem:
    """Read a problem that ``save_problem`` wrote, on the CPU.

    Safe with files from strangers: see the top of this module.

    Raises:
        ProblemError: the file is torn, is not one of ours, was written by a newer version, or what
            it holds is not a problem; the message says which.
        OSError: the file cannot be read.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = read_arrays(archive, len(content))
    except ProblemError as error:
        raise ProblemError(f"{path}: {error}") from error
    except MALFORMED as error:
        raise ProblemError(
            f"{path}: expected a file written by save_problem, got one that is torn or of another "
            f"kind ({type(error).__name__}: {error}); copy it again from where it was written"
        ) from error
    try:
        return restored(arrays)
    except ProblemError as error:
        raise ProblemError(f"{path}: {error}") from error


def read_arrays(archive: zipfile.ZipFile, size: int) -> dict[str, NDArray[Any]]:
    """All arrays of an archive of ``size`` bytes, none larger than that.

    ``numpy.load`` would allocate what an array's header declares before it looks for the data.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in arrays or info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ProblemError(
                f"{info.filename!r}: expected one entry of that name, not compressed, as "
                "save_problem writes them"
            )
        data = archive.read(info)  # compares the checksum
        stream = io.BytesIO(data)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, in_columns, dtype = readers[np.lib.format.read_magic(stream)](stream)
        start, count = stream.tell(), math.prod(shape)
        if dtype.str not in DTYPES or in_columns:
            raise ProblemError(
                f"{info.filename!r}: expected plain numbers ({', '.join(DTYPES)}) in C order, got "
                f"{dtype}{' in Fortran order' if in_columns else ''}"
            )
        if min(shape, default=0) < 0 or len(data) - start != count * dtype.itemsize:
            raise ProblemError(
                f"{info.filename!r}: expected {dtype} of shape {shape}, got {len(data) - start} "
                "bytes of data"
            )
        arrays[name] = (
            np.frombuffer(data[start:], dtype).reshape(shape).astype(dtype.newbyteorder("="))
        )
    return arrays


def restored(arrays: dict[str, NDArray[Any]]) -> Problem:
    """The problem, from the arrays of its file."""
    header = read_header(arrays.get("header"))
    kind, rows_form = header["kind"], header["rows"]
    linear = "c" if kind == "LP" else "q"
    ranks = {linear: 2, **SIDES, **arrays_of("rows", FORMS[rows_form])}
    if kind == "QP":
        ranks.update(QUADRATIC[header["P"]])
    shapes: dict[str, list[int]] = header["shapes"]
    if not (set(shapes) == set(ranks) and set(arrays) == {*ranks, "header"}):
        raise ProblemError(
            f"expected the arrays {', '.join(sorted(ranks))} with their shapes, got "
            f"{', '.join(sorted(arrays))} with shapes for {', '.join(sorted(shapes))}"
        )
    batch = shapes[linear][0] if shapes[linear] else 0
    if not 1 <= batch <= MOST_EXPANDED:
        raise ProblemError(f"expected a batch of 1 to {MOST_EXPANDED}, got {batch}")
    tensors: dict[str, Tensor] = {}
    for name, rank in ranks.items():
        array, shape = arrays[name], tuple(shapes[name])
        shared = rank == 1  # by the batch: the pattern of a sparse matrix
        if (
            len(shape) != rank
            or array.ndim != rank
            or not all(a in (1, b) for a, b in zip(array.shape, shape, strict=True))
            or not (shared or shape[0] == batch)
        ):
            raise ProblemError(
                f"{name}: expected {rank} dimensions, each stored whole or as 1"
                + ("" if shared else f", and a batch of {batch}")
                + f"; got {array.shape} for {shape}"
            )
        # What the batch shares is checked once: it is expanded last.
        whole = shape if shared else (array.shape[0], *shape[1:])
        if whole != array.shape and math.prod(whole) > MOST_EXPANDED:
            raise ProblemError(
                f"{name}: expected at most {MOST_EXPANDED} elements where some are stored once, "
                f"got shape {shape}"
            )
        tensors[name] = torch.from_numpy(array).expand(whole)
    m, n = shapes["l"][1], shapes[linear][1]
    rows = read_matrix("rows", rows_form, tensors, m, n)
    sides = [tensors[name] for name in SIDES]
    names = {"row_names": header["row_names"], "skipped": header["skipped"]}
    if kind == "LP":
        return LP(tensors["c"], rows, *sides, **names).expand(batch)
    sparse = header["P"] == "sparse"
    P = read_matrix("P", "sparse", tensors, n, n) if sparse else tensors["P"]
    assert isinstance(P, (Tensor, SparseRows))
    return QP(P, tensors["q"], rows, *sides, **names).expand(batch)


def read_header(array: NDArray[Any] | None) -> dict[str, Any]:
    """The header, with its fields of the types they should have."""
    if array is None or array.dtype != np.uint8:
        raise ProblemError(
            "expected a file written by save_problem, got an archive without its header"
        )
    try:
        header = json.loads(array.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"header: expected a JSON text, got something else: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ProblemError(f"header: expected the format {FORMAT!r}, got another")
    version = header.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise ProblemError(
            f"header: expected version {VERSION} of the format, got {version!r}"
            + ("; load it with a newer version of fairopt" if newer else "")
        )
    if not (
        header.get("kind") in ("LP", "QP")
        and one_of(header.get("rows"), FORMS)
        and (header["kind"] == "LP" or one_of(header.get("P"), QUADRATIC))
        and all(are(str, header.get(name)) for name in ("row_names", "skipped"))
        and isinstance(header.get("shapes"), dict)
        and all(
            are(int, shape) and min(shape, default=0) >= 0 for shape in header["shapes"].values()
        )
    ):
        raise ProblemError("header: expected the fields that save_problem writes, got others")
    return header


def one_of(value: object, names: Collection[str]) -> bool:
    return isinstance(value, str) and value in names


def are(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def read_matrix(prefix: str, form: str, tensors: dict[str, Tensor], m: int, n: int) -> Rows:
    kind = FORMS[form]
    sizes = {name: size for name, size in (("m", m), ("n", n)) if name in kind.given}
    arrays = {name.split(".")[1]: tensors[name] for name in arrays_of(prefix, kind)}
    return kind(**arrays, **sizes)
