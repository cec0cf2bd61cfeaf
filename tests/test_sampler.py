"""The sampler's guarantee, batch by batch, on data sets that Hypothesis draws."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fairopt.errors import ProblemError
from fairopt.sampler import StratifiedBatchSampler, Stratum


@st.composite
def data_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to three attributes, many strata, some of them tiny."""
    n = draw(st.integers(1, 200))
    names = draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = {}
    for name in names:
        levels = draw(st.integers(1, 6))
        tilt = torch.rand(levels, generator=generator) ** 3 + 1e-3
        groups[name] = torch.multinomial(tilt, n, replacement=True, generator=generator) * 3
    return groups


def check_counts(groups: dict[str, Tensor], batches: list[list[int]], runs) -> None:  # type: ignore[no-untyped-def]
    n = len(next(iter(groups.values())))
    first = next(iter(groups))
    rows = list(zip(*(codes.tolist() for codes in groups.values()), strict=True))
    strata = Counter(rows)
    for batch in batches:
        found = Counter(rows[i] for i in batch)
        for stratum, count in strata.items():
            share = Fraction(count * len(batch), n)
            assert math.floor(share) <= found[stratum] <= math.ceil(share)
        for position, name in enumerate(groups):
            marginal = Counter(row[position] for row in rows)
            found_marginal = Counter(rows[i][position] for i in batch)
            for code, count in marginal.items():
                share = Fraction(count * len(batch), n)
                assert abs(found_marginal[code] - share) < runs[name][code]
                if name == first:
                    assert runs[name][code] == 1
                    assert math.floor(share) <= found_marginal[code] <= math.ceil(share)


@given(data_sets(), st.integers(1, 250), st.booleans(), st.integers(0, 2**63 - 1))
def test_every_batch_keeps_the_proportions(
    groups: dict[str, Tensor], batch_size: int, shuffle: bool, seed: int
) -> None:
    n = len(groups["a"])
    sampler = StratifiedBatchSampler(groups, batch_size, shuffle=shuffle, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == math.ceil(n / batch_size)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(sampler) - 1)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    check_counts(groups, batches, sampler.runs)

    rows = list(zip(*(codes.tolist() for codes in groups.values()), strict=True))
    for stratum in sampler.strata:
        key = tuple(stratum.codes.values())
        assert stratum.count == rows.count(key)
        found = [sum(rows[i] == key for i in batch) for batch in batches]
        assert stratum.smallest <= min(found)
        assert max(found) <= stratum.largest
    assert all(stratum.smallest == 0 for stratum in sampler.rare)
    certain = [stratum for stratum in sampler.strata if stratum.count < len(sampler)]
    assert all(stratum in sampler.rare for stratum in certain)


@given(data_sets(), st.integers(1, 60), st.booleans())
def test_dropping_the_last_batch_drops_no_more(
    groups: dict[str, Tensor], batch_size: int, shuffle: bool
) -> None:
    n = len(groups["a"])
    if n < batch_size:
        with pytest.raises(ProblemError, match="leaves no batch"):
            StratifiedBatchSampler(groups, batch_size, drop_last=True)
        return
    sampler = StratifiedBatchSampler(groups, batch_size, shuffle=shuffle, drop_last=True, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == n // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    seen = [i for batch in batches for i in batch]
    assert len(set(seen)) == len(seen) == n - sampler.dropped_per_epoch
    check_counts(groups, batches, sampler.runs)


@given(st.integers(1, 5), st.lists(st.integers(2, 7), min_size=1, max_size=4))
def test_crossed_attributes_need_few_runs(seed: int, levels: list[int]) -> None:
    """All combinations occupied: the reflected order halves the runs of a later attribute."""
    grid = torch.cartesian_prod(*(torch.arange(size) for size in levels)).reshape(-1, len(levels))
    groups = {f"attribute {j}": grid[:, j] for j in range(len(levels))}
    sampler = StratifiedBatchSampler(groups, 4, seed=seed)
    before = 1
    for name, size in zip(groups, levels, strict=True):
        assert sum(sampler.runs[name].values()) == before * (size - 1) + 1
        before *= size


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batches", [17, 32, 63, 64, 100, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 17])
def test_rare_strata_are_spread_over_the_epoch(shuffle: bool, batches: int, count: int) -> None:
    groups = torch.zeros(batches * 20, dtype=torch.int64)
    groups[:count] = 1
    sampler = StratifiedBatchSampler(groups, 20, shuffle=shuffle, seed=1)
    found = [int(groups[batch].sum()) for batch in sampler]
    assert max(found) == 1
    if count < batches:
        assert [str(stratum) for stratum in sampler.rare] == ["group = 1"]
    where = [k for k, hits in enumerate(found) if hits]
    gaps = [b - a for a, b in zip(where, [*where[1:], where[0] + batches], strict=True)]
    # Multiples of the golden ratio leave no gap above 1.618**2 times the even one.
    assert max(gaps) <= 2.62 * batches / count + 2


def test_seeds_and_epochs() -> None:
    groups = {"sex": torch.arange(103) % 2, "race": torch.arange(103) % 7}

    def epochs(sampler: StratifiedBatchSampler, count: int) -> list[list[list[int]]]:
        return [list(sampler) for _ in range(count)]

    first = epochs(StratifiedBatchSampler(groups, 10, seed=5), 3)
    assert first == epochs(StratifiedBatchSampler(groups, 10, seed=5), 3)
    assert first != epochs(StratifiedBatchSampler(groups, 10, seed=6), 3)
    assert first[0] != first[1] != first[2]

    sampler = StratifiedBatchSampler(groups, 10, seed=5)
    sampler.set_epoch(2)
    assert list(sampler) == first[2]
    assert sampler.epoch == 3
    sampler.set_epoch(0)
    abandoned, started, second = iter(sampler), iter(sampler), iter(sampler)
    assert [list(started), list(second)] == first[:2]
    assert list(abandoned) == first[2]

    fixed = StratifiedBatchSampler(groups, 10, shuffle=False)
    assert list(fixed) == list(fixed)
    assert all(batch == sorted(batch) for batch in fixed)


def test_the_default_seed_follows_torch() -> None:
    groups = torch.arange(50) % 3
    torch.manual_seed(7)
    first = StratifiedBatchSampler(groups, 8)
    torch.manual_seed(7)
    second = StratifiedBatchSampler(groups, 8)
    other = StratifiedBatchSampler(groups, 8)
    assert first.seed == second.seed != other.seed
    assert list(first) == list(second) != list(other)


def test_pairs_of_samples_meet_at_random() -> None:
    """Each sample visits each full batch about equally often, so no sample is favoured."""
    groups = torch.arange(24) % 2
    sampler = StratifiedBatchSampler(groups, 5, seed=0)
    visits = torch.zeros(24, 5)
    for _ in range(2000):
        for k, batch in enumerate(sampler):
            visits[batch, k] += 1
    expected = torch.tensor([5.0, 5, 5, 5, 4]) / 24 * 2000
    assert ((visits - expected).abs() < 6 * expected.sqrt()).all()


def test_pickle_and_copy_continue_where_they_were() -> None:
    sampler = StratifiedBatchSampler({"a": torch.arange(30) % 4}, 7, seed=1)
    list(sampler)
    clones = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)]
    expected = list(sampler)
    assert [list(clone) for clone in clones] == [expected, expected]
    assert clones[0].strata == sampler.strata


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_in_a_data_loader(workers: int, persistent: bool) -> None:
    groups = torch.arange(101) % 3 == 0
    sampler = StratifiedBatchSampler(groups, 16, seed=4)
    loader = DataLoader(
        TensorDataset(torch.arange(101), groups),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=persistent,
    )
    assert len(loader) == 7
    epochs = [[indices.tolist() for indices, _ in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    again = StratifiedBatchSampler(groups, 16, seed=4)
    assert epochs == [list(again), list(again)]


def test_strata_name_themselves() -> None:
    groups = {"sex": torch.tensor([1, 0, 1, 1]), "race": torch.tensor([2, 0, 2, 0])}
    sampler = StratifiedBatchSampler(groups, 2, seed=0)
    assert sampler.strata == (
        Stratum({"sex": 0, "race": 0}, count=1, smallest=0, largest=1),
        Stratum({"sex": 1, "race": 2}, count=2, smallest=1, largest=1),
        Stratum({"sex": 1, "race": 0}, count=1, smallest=0, largest=1),
    )
    assert [str(stratum) for stratum in sampler.rare] == ["sex = 0, race = 0", "sex = 1, race = 0"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32])
def test_any_integer_type_gives_the_same_batches(dtype: torch.dtype) -> None:
    codes = torch.arange(40) % 2
    expected = list(StratifiedBatchSampler(codes, 6, seed=2))
    assert list(StratifiedBatchSampler(codes.to(dtype), 6, seed=2)) == expected


@pytest.mark.parametrize(
    ("groups", "batch_size", "seed", "message"),
    [
        (torch.zeros(4), 2, 0, r"integers or bools, not torch.float32"),
        ([0, 1], 2, 0, r"must be a tensor of integers or bools, not list"),
        ({"sex": torch.zeros(4, 1).long()}, 2, 0, r"'sex'.*shape \(N,\).*\(4, 1\)"),
        (torch.zeros(0).long(), 2, 0, r"at least 1, not \(0,\)"),
        (torch.tensor([0, 2, -3]), 2, 0, r"negative code -3 at sample 2"),
        ({}, 2, 0, r"empty mapping"),
        ({"a": torch.zeros(3).long(), "b": torch.zeros(4).long()}, 2, 0, r"'a': 3, 'b': 4"),
        (torch.zeros(4).long(), 0, 0, r"batch_size must be .* not 0"),
        (torch.zeros(4).long(), 2.0, 0, r"batch_size must be .* not 2.0"),
        (torch.zeros(4).long(), True, 0, r"batch_size must be .* not True"),
        (torch.zeros(4).long(), 2, -1, r"seed must be .* not -1"),
        (torch.zeros(4).long(), 2, "x", r"seed must be .* not 'x'"),
    ],
)
def test_bad_input_says_what_is_wrong(
    groups: object, batch_size: object, seed: object, message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        StratifiedBatchSampler(groups, batch_size, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [-1, 1.5, True])
def test_bad_epoch(epoch: object) -> None:
    sampler = StratifiedBatchSampler(torch.zeros(4).long(), 2)
    with pytest.raises(ProblemError, match="epoch must be"):
        sampler.set_epoch(epoch)  # type: ignore[arg-type]
