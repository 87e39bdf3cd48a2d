"""Permutations that are computed instead of stored.

Below `stream` (a new order for each pass) and `layouts` (which rows are held out).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 6

Indices = Int64[np.ndarray, " n"]


def permuted(positions: Indices, length: int, key: Sequence[int | Indices]) -> Indices:
    """Return where a permutation of 0..length-1, chosen by `key`, takes each position.

    A part of the key may be an array, one number for each position: so many permutations at once.
    A Feistel network over the next power of four, walked until it lands inside: no memory at any
    length, and the same numbers under every version of numpy, which its own generators do not
    promise. Source: Black and Rogaway, Ciphers with arbitrary finite domains (2002).
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    base = np.zeros(len(positions), np.uint64)
    for part in key:
        base = _mixed(base ^ np.asarray(part).astype(np.uint64))
    rounds = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    salts = _mixed((base[None] + rounds[:, None]).ravel()).reshape(ROUNDS, -1)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for salt in salts[:, outside]:
            left, right = right, left ^ (_mixed(right ^ salt) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= np.uint64(length)]
    return values.astype(np.int64)


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scramble 64-bit integers (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
