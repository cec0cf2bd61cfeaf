"""Numbering the combinations of many attributes that occur, compiled.

The codes of a sample, each in as few bits as the largest needs, fill one or more words of 64 bits.
Equal words are found by hashing, in O(n) per word; sorting them would cost several times as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairopt.compiled import compiled

__all__ = ["number"]

Array = NDArray[Any]

MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with about as many ones as zeros


def number(codes: Sequence[Array], sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Number the distinct combinations in the order in which they first occur.

    Args:
        codes: for each attribute n integers in 0..size - 1; at least one attribute.
        sizes: one for each.

    Returns:
        The number of each sample's combination, int32 ``(n,)``; for each combination the first
        sample that has it, int64 ``(K,)``; and how many have it, int64 ``(K,)``.
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
    return index, first, counts


@compiled()
def pack(codes, shift, words):  # type: ignore[no-untyped-def]
    """words |= codes << shift."""
    for i in range(codes.shape[0]):
        words[i] |= np.uint64(codes[i]) << shift


@compiled()
def slot_of(words, i, mask):  # type: ignore[no-untyped-def]
    """Where the search for the words of a sample begins."""
    h = np.uint64(0)
    for w in range(words.shape[1]):
        h = (h ^ words[i, w]) * MIX
        h ^= h >> np.uint64(29)
    return np.int64((h >> np.uint64(7)) & mask)


@compiled()
def distinct(words, index):  # type: ignore[no-untyped-def]
    """Number equal rows of ``words``; the first of each and how many there are."""
    n, width = words.shape
    capacity = 1024
    table = np.full(capacity, -1, np.int32)
    first, counts = np.empty(256, np.int64), np.zeros(256, np.int64)
    found = 0
    for i in range(n):
        mask = np.uint64(capacity - 1)
        slot = slot_of(words, i, mask)
        while True:
            k = table[slot]
            if k < 0:
                break
            equal = True
            for w in range(width):
                equal &= words[i, w] == words[first[k], w]
            if equal:
                break
            slot = (slot + 1) & (capacity - 1)
        if k < 0:
            k = np.int32(found)
            if found == first.shape[0]:
                more, counted = np.empty(2 * found, np.int64), np.zeros(2 * found, np.int64)
                more[:found], counted[:found] = first, counts
                first, counts = more, counted
            first[found] = i
            table[slot] = k
            found += 1
            if 2 * found > capacity:
                capacity *= 4
                table = np.full(capacity, -1, np.int32)
                for j in range(found):
                    slot = slot_of(words, first[j], np.uint64(capacity - 1))
                    while table[slot] >= 0:
                        slot = (slot + 1) & (capacity - 1)
                    table[slot] = j
        index[i] = k
        counts[k] += 1
    return first[:found].copy(), counts[:found].copy()
