"""One of four workers that share streams; tests/test_online_shared.py starts and judges them.

Every scenario is collective: each worker calls it, and returns what it saw.
"""

from __future__ import annotations

import pickle
import sys
import threading
from pathlib import Path

import torch
from torch import distributed

from fairopt import DemographicParity, EqualizedOdds, OnlineParity, ProblemError

WORKERS = 4


def drawn(seed, n=400, groups=2):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, groups, (n,), generator=generator)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    scores = (0.8 * scores + 0.2 * codes / groups).clamp(0, 1)
    targets = (torch.rand(n, generator=generator) < scores).long()
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return scores, codes, targets, weights


def state_of(stream):
    return {name: tensor.clone() for name, tensor in stream.state_dict().items()}


def refused(call):
    try:
        call()
    except ProblemError as error:
        return str(error)
    return None


def parity(**options):
    return OnlineParity(DemographicParity(0.05), **{"bounds": (0, 1), **options})


# ---------------------------------------------------------------------------------------------


def odds(rank, folder):
    """Several rounds with weights and targets; in the second, rank 2 sees a group of its own."""
    stream = OnlineParity(EqualizedOdds(0.03), bounds=(0, 1))
    rounds, served = [], []
    for turn in range(3):
        if not (rank == 3 and turn == 0):  # rank 3 begins with nothing served
            scores, codes, targets, weights = drawn(10 * turn + rank, 150 + 50 * rank)
            if rank == 2 and turn == 1:
                codes = torch.where(codes == 1, 9, codes)
            x = stream.run(scores, codes, targets, batch_size=7, weights=weights)
            served.append((x, codes, targets, weights))
        stream.synchronize()
        rounds.append(state_of(stream))
    again = []
    for _ in range(2):
        stream.synchronize()
        again.append(state_of(stream))
    return {"rounds": rounds, "again": again, "served": served, "report": stream.report()}


def rules(rank, folder):
    found = {}
    for feedback in ("pooled", "hard", "batch"):
        stream, served = parity(feedback=feedback), []
        for turn in range(3):
            scores, codes, _, _ = drawn(100 + 10 * turn + rank)
            dtype = torch.float32 if rank == 1 else torch.float64
            served.append((stream.run(scores.to(dtype), codes, batch_size=8), codes))
            between = stream.report()
            stream.synchronize()
        found[feedback] = {
            "served": served, "between": between, "report": stream.report(),
            "state": state_of(stream),
        }  # fmt: skip
    return found


def late_targets(rank, folder):
    """Rank 0 serves, rank 1 is told the targets; then both are told the same ones."""
    stream = OnlineParity(EqualizedOdds(0.05), bounds=(0, 1))
    scores, codes, targets, _ = drawn(7)
    x = stream.run(scores, codes) if rank == 0 else None
    stream.synchronize()
    passed = [x]
    distributed.broadcast_object_list(passed)
    x = passed[0]
    first = stream.report().pending
    if rank == 1:
        stream.observe(targets[:300], x[:300], codes[:300], scores=scores[:300])
    if rank == 2:
        stream.run(*drawn(8)[:2])
    stream.synchronize()
    second = stream.report()
    other = OnlineParity(EqualizedOdds(0.05), bounds=(0, 1))
    x = other.run(scores, codes) if rank == 0 else x
    other.synchronize()
    if rank in (1, 2):
        other.observe(targets, x, codes, scores=scores)
    before = state_of(other)
    return {
        "first": first, "second": second, "state": state_of(stream), "served": x,
        "twice": refused(other.synchronize), "before": before, "after": state_of(other),
    }  # fmt: skip


def refusals(rank, folder):
    found = {}
    for name in ("configuration", "attributes", "one saved state", "different meetings"):
        stream = parity()
        scores, codes, _, _ = drawn(rank)
        groups = codes
        if name == "configuration" and rank == 2:
            stream = OnlineParity(DemographicParity(0.06), bounds=(0, 1))
        if name == "attributes" and rank == 1:
            groups = {"sex": codes}
        if name == "one saved state" and rank != 0:
            early = parity()
            early.run(*drawn(99)[:2])
            stream = pickle.loads(pickle.dumps(early)) if rank == 1 else stream
            if rank in (2, 3):
                stream.load_state_dict(early.state_dict())
        if name == "different meetings":
            stream.run(scores, groups)
            stream.synchronize()
            old = state_of(stream)
            stream.run(scores, groups)
            stream.synchronize()
            if rank == 3:
                stream = parity()
                stream.load_state_dict(old)
        stream.run(scores, groups)
        before = state_of(stream)
        found[name] = (refused(stream.synchronize), before, state_of(stream))
    # Refusing leaves the group in order: reset where the message says so, and all can meet.
    if rank == 3:
        stream.reset()
    stream.synchronize()
    return found | {"samples": stream.report().samples, "state": state_of(stream)}


def restart(rank, folder):
    """Saved between two meetings, loaded anew; rank 3 has lost its file and begins empty."""
    stream, count = parity(), 0
    for turn in range(2):
        stream.run(*drawn(200 + 10 * turn + rank)[:2])
        stream.synchronize()
    stream.run(*drawn(250 + rank)[:2])
    stream.save(folder / f"state-{rank}")
    stream = parity()
    if rank != 3:
        stream.load(folder / f"state-{rank}")
    stream.run(*drawn(260 + rank)[:2])
    stream.synchronize()
    count = stream.report().samples
    # One file of a moment when all knew the same, loaded by all.
    if rank == 0:
        stream.save(folder / "all")
    distributed.barrier()
    again = parity()
    again.load(folder / "all")
    again.run(*drawn(270 + rank)[:2])
    again.synchronize()
    return {"count": count, "again": again.report().samples, "state": state_of(again)}


def counting(rank, folder):
    """Rank 2's predictions are served by another system; the others make up for them."""
    stream, served = parity(), []
    for turn in range(8):
        scores, codes, _, _ = drawn(500 + 10 * turn + rank)
        if rank == 2 and turn < 4:
            stream.count(scores, codes)
            served.append((scores, codes))
        else:
            served.append((stream.run(scores, codes), codes))
        stream.synchronize()
    return {"served": served, "state": state_of(stream), "report": stream.report()}


def merging(rank, folder):
    """Two streams of one process that met as workers: what is common counts once."""
    stream = parity()
    stream.run(*drawn(300 + rank)[:2])
    stream.synchronize()
    other = parity()
    other.load_state_dict(stream.state_dict())
    stream.run(*drawn(310 + rank)[:2])
    other.run(*drawn(320 + rank)[:2])
    stream.merge(other)
    merged = stream.report().samples
    stream.synchronize()
    return {"merged": merged, "all": stream.report().samples, "state": state_of(stream)}


def serving_meanwhile(rank, folder):
    stream, done, served = parity(), threading.Event(), []
    scores, codes, _, _ = drawn(400 + rank, 5000)

    def serve():
        for i in range(0, 5000, 5):
            if i == 2500:
                codes[i:] += 3 * (rank == 1)  # groups that only this worker sees
            served.append(stream(scores[i : i + 5], codes[i : i + 5]))
        done.set()

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(15):
        stream.synchronize()
    thread.join()
    stream.synchronize()
    return {
        "served": (torch.cat(served), codes), "state": state_of(stream), "report": stream.report(),
    }  # fmt: skip


def a_part_of_the_workers(rank, folder):
    group = distributed.new_group([0, 2])
    stream = parity()
    stream.run(*drawn(rank)[:2])
    message = refused(lambda: stream.synchronize(group))
    return {"message": message, "samples": stream.report().samples}


def adult(rank, folder):
    """A quarter of the test set each, a meeting every 256 samples."""
    scores, sex = torch.load(folder / "adult")
    stream = parity()
    mine, served = slice(rank, None, WORKERS), []
    for part in zip(scores[mine].split(256), sex[mine].split(256), strict=True):
        served.append(stream.run(*part))
        stream.synchronize()
    return {"served": torch.cat(served), "scores": scores[mine], "sex": sex[mine],
            "report": stream.report()}  # fmt: skip


SCENARIOS = (
    odds, rules, late_targets, refusals, restart, counting, merging, serving_meanwhile,
    a_part_of_the_workers, adult,
)  # fmt: skip


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=WORKERS
    )
    found = {scenario.__name__: scenario(rank, folder) for scenario in SCENARIOS}
    (folder / f"found-{rank}").write_bytes(pickle.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
