"""The bundled data: counts that can be checked against the source, and nothing leaked."""

from __future__ import annotations

import copy

import pytest
import torch

from fairopt.datasets import Adult, load_adult


@pytest.fixture(scope="module")
def adult() -> Adult:
    return load_adult()


def test_sizes_and_types(adult: Adult) -> None:
    assert (len(adult.train), len(adult.test)) == (32_561, 16_281)
    for split in (adult.train, adult.test):
        n = len(split)
        assert split.features.shape == (n, len(adult.feature_names))
        assert split.features.dtype == split.targets.dtype == torch.float32
        assert torch.isfinite(split.features).all()
        assert split.targets.shape == (n,)
        assert set(split.targets.unique().tolist()) == {0.0, 1.0}
        for name, codes in split.groups.items():
            assert codes.dtype == torch.int64
            assert codes.shape == (n,)
            assert codes.unique().tolist() == list(range(len(adult.group_names[name])))


def test_known_counts(adult: Adult) -> None:
    assert adult.group_names == {
        "sex": ("Female", "Male"),
        "race": ("Amer-Indian-Eskimo", "Asian-Pac-Islander", "Black", "Other", "White"),
    }
    assert adult.train.groups["sex"].bincount().tolist() == [10_771, 21_790]
    assert adult.train.groups["race"].bincount().tolist() == [311, 1_039, 3_124, 271, 27_816]
    assert adult.test.groups["race"].bincount().tolist() == [159, 480, 1_561, 135, 13_946]
    assert int(adult.train.targets.sum()) == 7_841
    assert int(adult.test.targets.sum()) == 3_846


def test_numbers_are_standardised_on_the_training_rows(adult: Adult) -> None:
    numbers = [name for name in adult.feature_names if " = " not in name]
    assert numbers == ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
    train = adult.train.features[:, : len(numbers)].double()
    torch.testing.assert_close(train.mean(0), torch.zeros(5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0), torch.ones(5).double(), atol=1e-4, rtol=0)
    test_mean = adult.test.features[:, : len(numbers)].mean(0)
    assert (test_mean.abs() > 1e-4).all(), "the test rows must not be centred on themselves"


def test_one_hot_blocks_sum_to_one(adult: Adult) -> None:
    prefixes = {name.split(" = ")[0] for name in adult.feature_names if " = " in name}
    assert "occupation = missing" in adult.feature_names
    for prefix in prefixes:
        columns = [j for j, name in enumerate(adult.feature_names) if name.startswith(prefix)]
        assert torch.equal(adult.train.features[:, columns].sum(1), torch.ones(32_561))
        assert (adult.test.features[:, columns].sum(1) <= 1).all()


def test_groups_are_not_among_the_features(adult: Adult) -> None:
    for name in adult.feature_names:
        assert name.split(" = ")[0] not in {"sex", "race", "income", "fnlwgt", "split"}


def test_take_keeps_rows_together(adult: Adult) -> None:
    part = adult.test.take([5, 2, 5])
    assert len(part) == 3
    assert torch.equal(part.features[1], adult.test.features[2])
    assert part.targets.tolist() == adult.test.targets[[5, 2, 5]].tolist()
    assert part.groups["race"].tolist() == adult.test.groups["race"][[5, 2, 5]].tolist()


def test_loads_are_independent(adult: Adult) -> None:
    again = load_adult()
    kept = copy.deepcopy(again.train.features[0])
    again.train.features[0] = 7.0
    assert torch.equal(adult.train.features[0], kept)
