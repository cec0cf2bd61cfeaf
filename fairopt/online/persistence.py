"""The state of a stream in one file: written whole or not at all, and checked when read.

A first line that says what it is, a line of JSON with ``configuration``, ``layout`` and ``arrays``
(name, dtype and shape of each), the arrays one after another, and the SHA-256 of all that. Beside
the state's arrays there may be ``EXTRAS``, of bytes, and ``notes`` of whoever saved it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairopt.errors import ProblemError
from fairopt.online.packing import packed, unpacked
from fairopt.online.state import ARRAYS, EXTRAS, State

MAGIC = b"fairopt stream 1\n"
DIGEST = hashlib.sha256().digest_size


def write_state(
    path: str | os.PathLike[str],
    state: State,
    configuration: Mapping[str, Any],
    extras: Mapping[str, np.ndarray],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a file beside the target, force it to the disk, and put it in the target's place.

    Raises:
        ProblemError: JSON cannot hold the notes.
        OSError: it cannot be written; what was there before is still there.
    """
    header: dict[str, Any] = {
        "configuration": dict(configuration),
        "layout": bytes(state.layout_bytes()).decode(),
    }
    if notes is not None:
        try:
            json.dumps(notes, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ProblemError(
                f"notes: expected what JSON can hold, got others: {error}"
            ) from error
        header["notes"] = dict(notes)
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


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what writers of a file left beside it when they were killed.

    Only for who knows that nobody is writing it now.
    """
    target = Path(path)
    ours = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{16}")
    for each in target.parent.iterdir():
        if ours.fullmatch(each.name):
            each.unlink(missing_ok=True)


def read_state(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]:
    """Configuration, layout, arrays and notes of a file.

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
        notes = dict(header.get("notes", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{path}: expected the state of a stream, got {error}") from error
    if not set(ARRAYS) <= set(arrays) <= {*ARRAYS, *EXTRAS}:
        raise ProblemError(
            f"{path}: expected the arrays {', '.join(ARRAYS)}, got {', '.join(arrays)}; it was "
            "written by another version of fairopt"
        )
    return configuration, layout, arrays, notes


def differences(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, one line each."""
    return [
        f"{key}: here {mine.get(key)!r}, saved {saved.get(key)!r}"
        for key in sorted({*mine, *saved})
        if mine.get(key) != saved.get(key)
    ]
