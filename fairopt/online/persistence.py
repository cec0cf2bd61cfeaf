"""The state of a stream in one file: written whole or not at all, and checked when read.

A first line that says what it is, a line of JSON with ``configuration``, ``layout`` and ``arrays``
(name, dtype and shape of each), the arrays one after another, and the SHA-256 of all that. Beside
the state's arrays there may be ``EXTRAS``, of bytes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairopt.errors import ProblemError
from fairopt.online.packing import packed, unpacked
from fairopt.online.state import ARRAYS, EXTRAS, State

__all__ = ["differences", "read_state", "write_state"]

MAGIC = b"fairopt stream 1\n"
DIGEST = hashlib.sha256().digest_size


def write_state(
    path: str | os.PathLike[str],
    state: State,
    configuration: Mapping[str, Any],
    extras: Mapping[str, np.ndarray],
) -> None:
    """Write a file beside the target, force it to the disk, and put it in the target's place.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    layout = bytes(state.layout_bytes()).decode()
    header = {"configuration": dict(configuration), "layout": layout}
    body = MAGIC + packed(header, {**state.arrays(), **extras})
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            file.write(body + hashlib.sha256(body).digest())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force the new name to the disk, where the system has a way to."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Configuration, layout and arrays of a file.

    Raises:
        ProblemError: it is not such a file, or not whole.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if not data.startswith(MAGIC):
        raise ProblemError(
            f"{path}: expected a file written by OnlineParity.save, got something else; check the "
            "path"
        )
    body, digest = data[:-DIGEST], data[-DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise ProblemError(
            f"{path}: expected the checksum of its contents, got another; the file is torn or was "
            "changed: restore an older one"
        )
    try:
        header, arrays = unpacked(body[len(MAGIC) :])
        configuration, layout = dict(header["configuration"]), str(header["layout"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{path}: expected the state of a stream, got {error}") from error
    if not set(ARRAYS) <= set(arrays) <= {*ARRAYS, *EXTRAS}:
        raise ProblemError(
            f"{path}: expected the arrays {', '.join(ARRAYS)}, got {', '.join(arrays)}; it was "
            "written by another version of fairopt"
        )
    return configuration, layout, arrays


def differences(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one line each."""
    return [
        f"{key}: here {mine.get(key)!r}, saved {saved.get(key)!r}"
        for key in sorted({*mine, *saved})
        if mine.get(key) != saved.get(key)
    ]
