"""Values by name, kept bit for bit, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import SEEN
from torch import Tensor

from fairopt import LP, QP, InfeasibleError, Solution, SolveError


class Record:
    """Values by name, each as bytes with its type."""

    def __init__(self) -> None:
        self.index: dict[str, tuple[str, list[int], int, int]] = {}
        self.data = bytearray()
        self.prefix = ""

    def add(self, name: str, value: object) -> None:
        """Keep a value under a name; mappings and dataclasses are kept part by part."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype in HALF else value).contiguous().numpy()
        if isinstance(value, Mapping):
            for key, part in value.items():
                self.add(f"{name}.{key}", part)
        elif is_dataclass(value) and not isinstance(value, type):
            for each in fields(value):
                self.add(f"{name}.{each.name}", getattr(value, each.name))
        elif isinstance(value, np.ndarray):
            self.keep(name, value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, (bool, int, float)):
            self.add(name, np.asarray(value))
        elif isinstance(value, (list, tuple)):
            if value and all(isinstance(part, (bool, int, float)) for part in value):
                self.add(name, np.asarray(value))
            else:
                self.keep(f"{name}.length", "text", (), str(len(value)).encode())
                for k, part in enumerate(value):
                    self.add(f"{name}[{k}]", part)
        else:
            self.keep(name, "text", (), str(value).encode())

    def keep(self, name: str, kind: str, shape: Sequence[int], raw: bytes) -> None:
        name = f"{self.prefix}/{name}"
        assert name not in self.index, name
        self.index[name] = (kind, list(shape), len(self.data), len(raw))
        self.data += raw

    def join(self, index: Mapping[str, tuple[str, list[int], int, int]], data: bytes) -> None:
        """Append what another record holds."""
        first = len(self.data)
        self.index |= {
            k: (kind, shape, first + at, size) for k, (kind, shape, at, size) in index.items()
        }
        self.data += data

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(
                file, index=np.frombuffer(json.dumps(self.index).encode(), np.uint8),
                data=np.frombuffer(bytes(self.data), np.uint8),
            )  # fmt: skip

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """Arrays and texts by name."""
        with np.load(path) as file:
            index = json.loads(file["index"].tobytes().decode())
            data = file["data"].tobytes()
        found: dict[str, Any] = {}
        for name, (kind, shape, first, size) in index.items():
            raw = data[first : first + size]
            found[name] = (
                raw.decode() if kind == "text" else np.frombuffer(raw, kind).reshape(shape)
            )
        return found


HALF = (torch.float16, torch.bfloat16)


def keep_solution(record: Record, solution: Solution, name: str = "solution") -> None:
    """Everything a solution says but its time."""
    SEEN["solutions", "backend", solution.backend] += 1
    SEEN["solutions", "dtype", str(solution.x.dtype)] += 1
    SEEN["solutions", "rows", type(solution.problem.rows).__name__] += 1
    for status in solution.status:
        SEEN["solutions", "status", status.name] += 1
    record.add(f"{name}.x", solution.x)
    record.add(f"{name}.row_dual", solution.row_dual)
    record.add(f"{name}.bound_dual", solution.bound_dual)
    record.add(f"{name}.status", [status.name for status in solution.status])
    record.add(f"{name}.iterations", [float(k) for k in solution.iterations])
    record.add(f"{name}.backend", solution.backend)
    record.add(f"{name}.residuals", solution.residuals)
    record.add(f"{name}.excess", solution.excess)
    record.add(f"{name}.exceeded", solution.exceeded)
    record.add(f"{name}.skipped", solution.skipped)


def keep_error(record: Record, error: Exception) -> None:
    """Type, message, and what the error carries."""
    SEEN["errors", "type", type(error).__name__] += 1
    record.add("error.type", type(error).__name__)
    record.add("error.message", str(error))
    if isinstance(error, SolveError):
        record.add("error.batch", error.batch)
        record.add("error.rows", error.rows)
        if error.solution is not None:
            record.add("error.status", [status.name for status in error.solution.status])
            record.add("error.row_dual", error.solution.row_dual)
    if isinstance(error, InfeasibleError) and error.conflict is not None:
        record.add("error.conflict", error.conflict)


def keep_problem(record: Record, problem: QP | LP, name: str = "problem") -> None:
    """All data of a problem."""
    record.add(f"{name}.form", type(problem.rows).__name__)
    record.add(f"{name}.tensors", list(problem.tensors))
    record.add(f"{name}.row_names", problem.row_names)
    record.add(f"{name}.skipped", problem.skipped)


def keep_gradients(record: Record, x: Tensor, leaves: dict[str, Tensor], g: Tensor) -> None:
    """Gradients of g.x with respect to all leaves."""
    if not x.requires_grad:
        return
    loss = (x.double() * g.reshape(x.shape).double()).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        record.add(f"gradient.{name}", gradient)
