"""Bytes of all workers of a torch.distributed process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

from fairopt.errors import ProblemError

if TYPE_CHECKING:  # it is missing where torch was built without it
    from torch.distributed import ProcessGroup


def gather(data: bytes, process_group: ProcessGroup | None) -> list[bytes]:
    """What each worker of the group passed, in the order of ranks; the same list on each.

    Collective: two all-gathers, of the lengths and of the bytes, whatever they are.

    Raises:
        ProblemError: there is no process group, or this process is not in it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ProblemError(
            "synchronize: expected an initialised process group, got none; call "
            "torch.distributed.init_process_group in every worker, or use merge(other) for streams "
            "of one process"
        )
    if distributed.get_rank(process_group) < 0:
        raise ProblemError(
            "synchronize: expected a process group that this process is in, got another; call it "
            "in the group's workers only"
        )
    workers = distributed.get_world_size(process_group)
    # NCCL moves what is on the GPU, every other backend of torch's own what is on the CPU.
    nccl = distributed.get_backend(process_group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(workers)]
    distributed.all_gather(lengths, length, group=process_group)
    sizes = [int(each) for each in lengths]
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    mine = torch.from_numpy(padded).to(device)
    found = [torch.empty_like(mine) for _ in range(workers)]
    distributed.all_gather(found, mine, group=process_group)
    return [each.cpu().numpy()[:size].tobytes() for each, size in zip(found, sizes, strict=True)]
