"""Batches that keep the group proportions of the whole data set.

A parity guarantee that holds on every batch says something about the pooled predictions only if the
groups have the same proportions in every batch; and a group that is missing from a batch is not
constrained there at all. ``StratifiedBatchSampler`` arranges both as well as whole samples allow.

All samples are laid out in one row, stratum after stratum, N of them in all, for K full batches of
size b and a remainder of size r < b.

1.  The remainder takes the positions ⌊(j·N + o)/r⌋ for j = 0..r−1, with any offset 0 ≤ o < N.
2.  The other K·b positions, counted anew from 0, go to full batch (position mod K).

Strata are laid out in the order of a reflected (Gray) code of the attributes, in the order in which
the attributes were given. That each run of positions gives every batch its exact share, rounded
down or up, is proved on the documentation's page "Training in batches".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from fairopt.errors import ProblemError

INTEGER_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_SEED = 2**63 - 1
GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Stratum:
    """The samples that agree on every attribute.

    Attributes:
        codes: attribute name to the group code they share.
        count: how many samples of the data set there are.
        smallest: the fewest samples of this stratum that any batch can contain.
        largest: the most.
    """

    codes: Mapping[str, int]
    count: int
    smallest: int
    largest: int

    def __str__(self) -> str:
        return ", ".join(f"{name} = {code}" for name, code in self.codes.items())


class StratifiedBatchSampler(Sampler[list[int]]):
    """Index lists for ``DataLoader(batch_sampler=...)`` that keep the group proportions.

    Strata are the combinations of all attributes that occur in the data. With ``N`` samples, of
    which ``N_s`` in stratum ``s``, a batch of ``b`` samples contains ``⌊N_s·b/N⌋`` or ``⌈N_s·b/N⌉``
    samples of ``s``. Guaranteed for every batch, the shorter last one included:

    - each stratum, and each group of the *first* attribute, is less than 1 sample from its exact
      share;
    - each group of a later attribute is less than ``runs[attribute][code]`` samples from its share,
      a small number, at most the number of combinations of the attributes before it. So name the
      attribute first whose proportions matter most.

    Every sample occurs exactly once per epoch; only ``drop_last=True`` leaves some out, as many as
    ``dropped_per_epoch`` says, other ones in each shuffled epoch, and those too in proportion. A
    stratum with fewer samples than batches is spread evenly over the epoch and listed in ``rare``.

    Args:
        groups: integer or bool tensor ``(N,)``, or a mapping from attribute name to such tensors.
        batch_size: samples per batch, at least 1. The last batch has the remainder.
        shuffle: draw which samples meet in a batch anew in every epoch. If false, each epoch is
            the same and each batch is sorted; proportions hold all the same.
        drop_last: leave out the remainder when ``batch_size`` does not divide ``N``.
        seed: the same seed and epoch give the same batches, on any machine with the same version of
            numpy. If ``None``, a seed is drawn from torch's default generator, so that
            ``torch.manual_seed`` decides.

    Attributes:
        seed: the seed in use.
        epoch: the number of the epoch that the next iteration yields. Each iteration moves it on by
            one, so shuffling never silently repeats; ``set_epoch`` overrides it.
        strata: all strata with their counts.
        rare: those strata that cannot be in every batch, having fewer samples than there are
            batches, and those that the shorter last batch may miss.
        runs: attribute name to code to the number of runs ``c`` of the guarantee above.
        dropped_per_epoch: the number of samples that an epoch leaves out.

    Raises:
        ProblemError: groups that are no integers, of different lengths, negative, empty or not
            one-dimensional; a batch size below 1; nothing left after ``drop_last``.

    Example:
        >>> groups = torch.tensor([0, 1, 1, 1] * 4)
        >>> [sum(groups[batch].tolist()) for batch in StratifiedBatchSampler(groups, 4)]
        [3, 3, 3, 3]
    """

    def __init__(
        self,
        groups: Tensor | Mapping[str, Tensor],
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        codes = checked_groups(groups)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ProblemError(
                f"batch_size must be an integer of at least 1, not {batch_size!r}; "
                "choose how many samples a batch holds"
            )
        if seed is None:
            seed = int(torch.randint(LARGEST_SEED, ()).item())
        elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise ProblemError(
                f"seed must be an integer from 0 to 2**63 - 1 or None, not {seed!r}; "
                "pass None to let torch.manual_seed decide"
            )

        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = seed
        self.epoch = 0

        self._ranks, keys = gray_ranks(codes)
        self._size = int(self._ranks.size)
        self._full_batches, self._remainder = divmod(self._size, batch_size)
        if self.drop_last and self._full_batches == 0:
            raise ProblemError(
                f"drop_last=True leaves no batch: there are {self._size} samples, fewer than "
                f"batch_size = {batch_size}; lower batch_size or keep the last batch"
            )

        counts = np.bincount(self._ranks, minlength=len(keys)).tolist()
        sizes = [batch_size] * (self._full_batches > 0)
        if self._remainder and not self.drop_last:
            sizes.append(self._remainder)
        self.strata: tuple[Stratum, ...] = tuple(
            Stratum(
                codes=dict(zip(codes, key, strict=True)),
                count=count,
                smallest=min(count * size // self._size for size in sizes),
                largest=max(-(-count * size // self._size) for size in sizes),
            )
            for key, count in zip(keys, counts, strict=True)
        )
        self.runs: Mapping[str, Mapping[int, int]] = {
            name: count_runs([key[position] for key in keys]) for position, name in enumerate(codes)
        }

    @property
    def rare(self) -> tuple[Stratum, ...]:
        """The strata of which some batch has, or may have, no sample."""
        return tuple(stratum for stratum in self.strata if stratum.smallest == 0)

    @property
    def dropped_per_epoch(self) -> int:
        """The number of samples that an epoch leaves out: 0 unless ``drop_last``."""
        return self._remainder if self.drop_last else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, as when training resumes.

        Processes that train together call it with one number, and have equal seeds, so that all
        see the same batches and can share them out: process ``p`` of ``w`` takes batches
        ``p, p + w, ...``.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ProblemError(
                f"epoch must be an integer of at least 0, not {epoch!r}; count epochs from 0"
            )
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        has_remainder = self._remainder > 0 and not self.drop_last
        return self._full_batches + has_remainder

    def __iter__(self) -> Iterator[list[int]]:
        # A generator function on purpose: its body starts with the first batch asked for. A
        # DataLoader with workers makes two iterators per epoch and uses one; only that one may
        # move the epoch on, or the batches would depend on the number of workers.
        generator = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        self.epoch += 1
        full, remainder = self._arrange(generator)
        for batch in full:
            yield batch.tolist()
        if remainder.size and not self.drop_last:
            yield remainder.tolist()

    def _arrange(
        self, generator: np.random.Generator | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Full batches ``(K, b)`` and the remainder ``(r,)``, by the module header's two steps."""
        n, k, r = self._size, self._full_batches, self._remainder
        if generator is None:
            row = np.argsort(self._ranks, kind="stable")
        else:
            row = generator.permutation(n)
            row = row[np.argsort(self._ranks[row], kind="stable")]

        taken = np.zeros(n, dtype=np.bool_)
        if r:
            offset = n // 2 if generator is None else int(generator.integers(n))
            taken[(np.arange(r, dtype=np.int64) * n + offset) // r] = True
        remainder = row[taken]
        full = row[~taken].reshape(self.batch_size, k).T if k else row[:0].reshape(0, 1)

        # A rare stratum now sits in neighbouring batches. Sorting batches by the fractional part of
        # their multiple of the golden ratio puts neighbours far apart, and any few of them evenly.
        shift = 0 if generator is None else int(generator.integers(max(k, 1)))
        full = full[np.roll(np.argsort(np.arange(k) * GOLDEN_RATIO % 1.0), shift)]
        if generator is None:
            return np.sort(full, axis=1), np.sort(remainder)
        return generator.permuted(full, axis=1), generator.permutation(remainder)


def checked_groups(groups: Tensor | Mapping[str, Tensor]) -> dict[str, NDArray[np.int64]]:
    """Each attribute's codes as an int64 array, or the error that says what is wrong with them."""
    named = groups if isinstance(groups, Mapping) else {"group": groups}
    if not named:
        raise ProblemError(
            "groups is an empty mapping; expected at least one attribute, as in {'sex': codes}"
        )
    codes: dict[str, NDArray[np.int64]] = {}
    for name, values in named.items():
        if not isinstance(values, Tensor):
            raise ProblemError(
                f"groups[{name!r}] must be a tensor of integers or bools, not "
                f"{type(values).__name__}; wrap it with torch.as_tensor"
            )
        if values.dtype not in INTEGER_TYPES:
            raise ProblemError(
                f"groups[{name!r}] must hold integers or bools, not {values.dtype}; "
                "code the groups 0, 1, 2, ... and convert with .long()"
            )
        if values.dim() != 1 or values.numel() == 0:
            raise ProblemError(
                f"groups[{name!r}] must have shape (N,) with N of at least 1, not "
                f"{tuple(values.shape)}; pass one code per sample of the data set"
            )
        array = values.detach().cpu().numpy().astype(np.int64)
        if array.min() < 0:
            raise ProblemError(
                f"groups[{name!r}] has the negative code {array.min()} at sample "
                f"{array.argmin()}; code the groups 0, 1, 2, ..."
            )
        codes[name] = array
    lengths = {name: array.size for name, array in codes.items()}
    if len(set(lengths.values())) > 1:
        raise ProblemError(
            f"all attributes must have one code per sample, but their lengths differ: {lengths}; "
            "take them from the same rows"
        )
    return codes


def gray_ranks(
    codes: Mapping[str, NDArray[np.int64]],
) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
    """Each sample's stratum as a rank in reflected order, and the codes of each rank.

    Attribute after attribute, each occupied prefix is split by the next attribute's values,
    ascending in even prefixes and descending in odd ones. Ranks are renumbered without gaps each
    time, so that they never overflow however many attributes there are.
    """
    ranks = np.zeros(next(iter(codes.values())).size, dtype=np.int64)
    for values in codes.values():
        levels, level = np.unique(values, return_inverse=True)
        reflected = np.where(ranks % 2 == 0, level, levels.size - 1 - level)
        _, ranks = np.unique(ranks * levels.size + reflected, return_inverse=True)
    _, first = np.unique(ranks, return_index=True)
    keys = zip(*(values[first].tolist() for values in codes.values()), strict=True)
    return ranks.astype(np.int64), list(keys)


def count_runs(sequence: list[int]) -> dict[int, int]:
    """How many unbroken runs each value forms in a sequence."""
    runs: dict[int, int] = {}
    for position, value in enumerate(sequence):
        starts = position == 0 or sequence[position - 1] != value
        runs[value] = runs.get(value, 0) + starts
    return dict(sorted(runs.items()))
