"""The UCI Adult data: who earns more than 50,000 dollars a year, with sex and race as groups."""

from __future__ import annotations

import csv
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUMERIC = ("age", "education_num", "capital_gain", "capital_loss", "hours_per_week")
CATEGORICAL = ("workclass", "marital_status", "occupation", "relationship", "native_country")
GROUPS = ("sex", "race")
MISSING = "?"


@dataclass(frozen=True, eq=False)
class Split:
    """One half of the data, the training or the test rows, in their original order.

    Attributes:
        features: ``(n, d)``, float32. What a model may look at.
        targets: ``(n,)``, float32, 1 where the yearly income exceeds 50,000 dollars, else 0.
        groups: attribute name to ``(n,)`` int64 codes, whose meaning ``Adult.group_names`` tells.
    """

    features: Tensor
    targets: Tensor
    groups: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.targets.shape[0]

    def take(self, indices: Tensor | Sequence[int]) -> Split:
        """The rows at ``indices``, in that order: one batch, or a smaller data set."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Split(
            features=self.features[rows],
            targets=self.targets[rows],
            groups={name: codes[rows] for name, codes in self.groups.items()},
        )


@dataclass(frozen=True, eq=False)
class Adult:
    """The UCI Adult data, split as its authors split it.

    Attributes:
        train: 32,561 rows.
        test: 16,281 rows.
        feature_names: the ``d`` columns of ``features``: ``"age"``, ``"occupation = Sales"``, ...
        group_names: attribute name to the meaning of its codes, in order:
            ``group_names["sex"] == ("Female", "Male")``.
    """

    train: Split
    test: Split
    feature_names: tuple[str, ...]
    group_names: Mapping[str, tuple[str, ...]]


def load_adult() -> Adult:
    """Read the bundled UCI Adult data into tensors.

    Features are five numbers (``age``, ``education_num``, ``capital_gain``, ``capital_loss``,
    ``hours_per_week``), shifted and scaled to mean 0 and standard deviation 1 *on the training
    rows*, then one 0/1 column per value of ``workclass``, ``marital_status``, ``occupation``,
    ``relationship`` and ``native_country`` that occurs in the training rows. A missing value is a
    value of its own, named ``missing``.

    Left out of the features, on purpose:

    - ``sex`` and ``race``. They are the groups: a model that must not treat groups differently is
      usually not shown them. This alone does not make it fair. ``relationship`` (``Husband``,
      ``Wife``) all but spells out the sex, and stays, as such proxies do in practice.
    - ``education``, which repeats ``education_num`` in words, and ``fnlwgt``, a survey weight,
      which describes the sample and not the person.

    Group codes follow the alphabetical order of the values, and are the same in both splits.

    Returns:
        The two splits with the names of features and of group codes. About 0.3 seconds on one slow
        core; each call reads the file again, so that no caller sees another's changes.
    """
    columns = read_columns()
    is_train = np.array([split == "train" for split in columns["split"]])

    blocks: list[NDArray[np.float32]] = []
    feature_names: list[str] = []
    for name in NUMERIC:
        values = np.array(columns[name], dtype=np.float64)
        center, scale = values[is_train].mean(), values[is_train].std()
        blocks.append(((values - center) / scale).astype(np.float32)[:, None])
        feature_names.append(name)
    for name in CATEGORICAL:
        codes, values_seen = encode(columns[name], is_train)
        blocks.append((codes[:, None] == np.arange(len(values_seen))).astype(np.float32))
        shown = ("missing" if value == MISSING else value for value in values_seen)
        feature_names.extend(f"{name} = {value}" for value in shown)

    features = np.concatenate(blocks, axis=1)
    targets = np.array([income == ">50K" for income in columns["income"]], dtype=np.float32)
    group_codes: dict[str, NDArray[np.int64]] = {}
    group_names: dict[str, tuple[str, ...]] = {}
    for name in GROUPS:
        group_codes[name], group_names[name] = encode(columns[name], is_train)

    def split(rows: NDArray[np.bool_]) -> Split:
        return Split(
            features=torch.from_numpy(features[rows]),
            targets=torch.from_numpy(targets[rows]),
            groups={name: torch.from_numpy(codes[rows]) for name, codes in group_codes.items()},
        )

    return Adult(
        train=split(is_train),
        test=split(~is_train),
        feature_names=tuple(feature_names),
        group_names=group_names,
    )


def read_columns() -> dict[str, tuple[str, ...]]:
    """The file as strings, column by column."""
    packed = resources.files("fairopt.datasets").joinpath("adult.csv.xz").read_bytes()
    rows = csv.reader(lzma.decompress(packed).decode("ascii").splitlines())
    header = next(rows)
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def encode(
    values: Sequence[str], is_train: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Codes in the alphabetical order of the training values; -1 for a value unseen in training."""
    seen = sorted({value for value, train in zip(values, is_train, strict=True) if train})
    code_of = {value: code for code, value in enumerate(seen)}
    return np.array([code_of.get(value, -1) for value in values], dtype=np.int64), tuple(seen)
