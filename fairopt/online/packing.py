"""Named arrays and a header as bytes: a line of JSON, then the arrays one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fairopt.errors import ProblemError


def packed(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes; arrays in little-endian order."""
    whole = {name: np.ascontiguousarray(each) for name, each in arrays.items()}
    listed = [[name, each.dtype.str, list(each.shape)] for name, each in whole.items()]
    line = json.dumps({**header, "arrays": listed}).encode() + b"\n"
    little = [each.astype(each.dtype.newbyteorder("<")) for each in whole.values()]
    return line + b"".join(each.tobytes() for each in little)


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays, which are copies.

    Raises:
        ProblemError: the bytes are none that ``packed`` gives.
    """
    line, _, rest = data.partition(b"\n")
    try:
        header = dict(json.loads(line))
        arrays, first = {}, 0
        for name, kind, shape in header.pop("arrays"):
            dtype = np.dtype(kind).newbyteorder("<")
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            flat = np.frombuffer(rest[first : first + size], dtype)
            arrays[str(name)] = flat.reshape(shape).astype(dtype.newbyteorder("="))
            first += size
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"expected the state of a stream, got {error}") from error
    if first != len(rest):
        raise ProblemError(f"expected {first} bytes of arrays, got {len(rest)}")
    return header, arrays
