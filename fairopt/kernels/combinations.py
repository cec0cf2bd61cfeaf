"""Numbering the combinations of many attributes that occur, and their classes, compiled.

The codes of a sample, each in as few bits as the largest needs, fill one or more words of 64 bits.
Equal words are found by hashing, in O(n) per word; sorting them would cost several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairopt.kernels.compilation import compiled

Array = NDArray[Any]

MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with about as many ones as zeros


def number(codes: Sequence[Array], sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Number the distinct combinations in the order in which they first occur.

    Args:
        codes: for each attribute n integers in 0..size - 1; at least one attribute.
        sizes: one for each.

    Returns:
        The number of each sample's combination, int32 ``(n,)``; the combinations, int32 ``(K, A)``;
        and how many samples have each, int64 ``(K,)``.
    """
    n = len(codes[0])
    word: list[int] = []
    place: list[tuple[int, int]] = []
    used = 0
    for size in sizes:
        bits = max(1, (size - 1).bit_length())
        if not word or used + bits > 64:
            word.append(bits)
            used = 0
        place.append((len(word) - 1, used))
        used += bits
    words = np.zeros((n, len(word)), np.uint64)
    for each, (column, shift) in zip(codes, place, strict=True):
        pack(each, np.uint64(shift), words[:, column])
    index = np.empty(n, np.int32)
    first, counts = distinct(words, index)
    combinations = np.empty((len(first), len(codes)), np.int32)
    for a, each in enumerate(codes):
        pick(each, first, combinations[:, a])
    return index, combinations, counts


@compiled()
def ends(codes):  # type: ignore[no-untyped-def]
    """The smallest and the largest code."""
    low = high = np.int64(codes[0])
    for code in codes:
        low, high = min(low, np.int64(code)), max(high, np.int64(code))
    return low, high


@compiled()
def pack(codes, shift, words):  # type: ignore[no-untyped-def]
    """words |= codes << shift."""
    for i in range(codes.shape[0]):
        words[i] |= np.uint64(codes[i]) << shift


@compiled()
def pick(codes, first, out):  # type: ignore[no-untyped-def]
    """out = codes[first]."""
    for k in range(out.shape[0]):
        out[k] = codes[first[k]]


@compiled()
def slot_of(words, i, mask):  # type: ignore[no-untyped-def]
    """Where the search for row i begins."""
    h = np.uint64(0)
    for w in range(words.shape[1]):
        h = (h ^ words[i, w]) * MIX
        h ^= h >> np.uint64(29)
    return np.int64((h >> np.uint64(7)) & mask)


@compiled()
def longer(array):  # type: ignore[no-untyped-def]
    """The array with as much room again, behind."""
    out = np.empty((2 * array.shape[0], array.shape[1]), array.dtype)
    out[: array.shape[0]] = array
    return out


@compiled()
def distinct(words, index):  # type: ignore[no-untyped-def]
    """Number equal rows of ``words``: for each the first sample that has it, and how many do.

    The distinct rows are kept together, so that comparing stays within the cache.
    """
    n, width = words.shape
    capacity = 1024
    table = np.full(capacity, -1, np.int32)
    keys = np.empty((256, width), np.uint64)
    told = np.empty((256, 2), np.int64)  # first sample, number of samples
    found = 0
    for i in range(n):
        slot = slot_of(words, i, np.uint64(capacity - 1))
        while True:
            k = table[slot]
            if k < 0:
                break
            equal = True
            for w in range(width):
                equal &= words[i, w] == keys[k, w]
            if equal:
                break
            slot = (slot + 1) & (capacity - 1)
        if k < 0:
            k = np.int32(found)
            if found == keys.shape[0]:
                keys, told = longer(keys), longer(told)
            for w in range(width):
                keys[found, w] = words[i, w]
            told[found, 0], told[found, 1] = i, 0
            table[slot] = k
            found += 1
            if 2 * found > capacity:
                capacity *= 4
                table = np.full(capacity, -1, np.int32)
                for j in range(found):
                    slot = slot_of(keys, j, np.uint64(capacity - 1))
                    while table[slot] >= 0:
                        slot = (slot + 1) & (capacity - 1)
                    table[slot] = j
        index[i] = k
        told[k, 1] += 1
    return told[:found, 0].copy(), told[:found, 1].copy()


@compiled()
def members(combinations, end, axis, size, start, out):  # type: ignore[no-untyped-def]
    """In which class of each partition each combination is.

    Args:
        end: ``(F + 1,)``, where the axes of each partition end.
        axis: columns of ``combinations``; the classes are their product, in row-major order.
        size: number of codes of each column of ``combinations``.
        start: the first class of each partition.
    """
    for k in range(out.shape[0]):
        for f in range(out.shape[1]):
            place = 0
            for t in range(end[f], end[f + 1]):
                place = place * size[axis[t]] + combinations[k, axis[t]]
            out[k, f] = start[f] + place


@compiled()
def class_sums(member, values, out):  # type: ignore[no-untyped-def]
    """Add up values of the cells over the classes: ``(K, F)`` and ``(K,)`` to ``(S,)``."""
    out[:] = 0.0
    F = member.shape[1]
    for k in range(member.shape[0]):
        v = values[k]
        for f in range(F):
            out[member[k, f]] += v
