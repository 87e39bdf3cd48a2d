"""Put samples into the order of training: shuffled epochs, mixtures, shards.

Between `sources` and the training loop. A stream is a pure function of a step: nothing is counted
or saved while it runs, so a run that was stopped continues with exactly the samples that it would
have seen, on any number of processes.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from ddt_llama.config import UserError
from ddt_llama.data.order import Indices, permuted

# Weights hold exactly within every run of this many samples, so they are kept to one in a thousand.
BLOCK = 1000
MAX_SEED = 2**63

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Indexed(Protocol[T_co]):
    """Anything with a length and samples by index: a source, a list, a synthetic world.

    The length may be as large as 2**62: orders are computed, not stored. A source with a method
    `batch(indices)` is asked for several samples at once.
    """

    def __len__(self) -> int:
        """Return how many samples there are."""
        ...

    def __getitem__(self, index: int, /) -> T_co:
        """Return one sample."""
        ...


@runtime_checkable
class Batched(Protocol[T]):
    """A source that reads several samples faster together."""

    def batch(self, indices: Sequence[int]) -> list[T]:
        """Return the samples of `indices`, in that order."""
        ...


class Draws(NamedTuple):
    """For each sample of a step: which source, and which of its rows."""

    sources: Indices
    rows: Indices


class Stream(Generic[T]):
    """Call with a step for the list of this process's samples of that step.

    `batch_size` counts the samples of one step on all processes together; concatenated in order of
    rank, the lists are that of a single process. Of every thousand consecutive samples,
    `weights[c]` parts come from source c (default: in proportion to the lengths, so that all are
    passed through alike). A source is shuffled anew for each pass over it, and no row comes twice
    in a pass. Raises UserError for sizes and weights that cannot be.
    """

    def __init__(
        self,
        sources: Sequence[Indexed[T]],
        batch_size: int,
        *,
        seed: int = 0,
        weights: Sequence[int | float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the arguments; nothing is read yet."""
        lengths = [len(source) for source in sources]
        if not lengths or min(lengths) < 1:
            raise UserError(f"stream: given sources of lengths {lengths}, give at least one sample")
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise UserError(
                f"stream: given batch size {batch_size} as rank {rank} of {world_size}, "
                "the batch size must be a positive multiple of the number of processes"
            )
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"seed: given {seed}, allowed are 0 to {MAX_SEED - 1}")
        self.sources = list(sources)
        self.batch_size = batch_size
        self.seed = seed
        self.quotas = quotas(weights if weights is not None else lengths, len(lengths))
        self._lengths = lengths
        self._local = batch_size // world_size
        self._first = rank * self._local

    def __call__(self, step: int) -> list[T]:
        """Return the samples of `step` (0, 1, 2, ...) that belong to this process."""
        return self._read(self.draws(step))

    def with_next(self, step: int) -> list[tuple[T, T]]:
        """Return the same samples, each with the next one of its source in the whole of the step.

        Behind the last the first comes again, so that one that is alone comes with itself.
        """
        start = step * self.batch_size
        sources = self.at(np.arange(start, start + self.batch_size, dtype=np.int64)).sources
        after = np.empty_like(sources)
        for number in np.unique(sources):
            places = np.flatnonzero(sources == number)
            after[places] = np.roll(places, -1)
        own = np.arange(self._first, self._first + self._local)
        wanted = np.union1d(own, after[own])
        found = dict(zip(wanted.tolist(), self._read(self.at(start + wanted)), strict=True))
        return [(found[place], found[after[place]]) for place in own.tolist()]

    def draws(self, step: int) -> Draws:
        """Return source and row of each of this process's samples, without reading them."""
        if step < 0:
            raise UserError(f"step: given {step}, allowed is 0 or more")
        start = step * self.batch_size + self._first
        numbers = np.arange(start, start + self._local, dtype=np.int64)
        return self.at(numbers)

    def at(self, numbers: Indices) -> Draws:
        """Return source and row of the samples with these global numbers."""
        sources, positions = np.empty_like(numbers), np.empty_like(numbers)
        blocks = numbers // BLOCK
        for block in np.unique(blocks).tolist():
            here = blocks == block
            source, count = _block(self.seed, block, self.quotas)
            inside = numbers[here] - block * BLOCK
            sources[here] = source[inside]
            positions[here] = block * np.asarray(self.quotas)[source[inside]] + count[inside]
        rows = np.empty_like(numbers)
        for number in np.unique(sources).tolist():
            here = sources == number
            rows[here] = self._rows(number, positions[here])
        return Draws(sources, rows)

    def _read(self, draws: Draws) -> list[T]:
        found: dict[int, T] = {}
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(draws.sources == number).tolist()
            rows = draws.rows[places].tolist()
            found.update(zip(places, _read(source, rows), strict=True))
        return [found[place] for place in range(len(draws.rows))]

    def _rows(self, number: int, positions: Indices) -> Indices:
        length = self._lengths[number]
        epochs = positions // length
        return permuted(positions % length, length, (self.seed, 1, number, epochs))


def quotas(weights: Sequence[int | float], count: int) -> tuple[int, ...]:
    """Return how many of `BLOCK` samples each source gives, nearest to its weight.

    Largest remainders; a source of positive weight gives at least one. Raises UserError where
    weights are negative, not finite, all zero, or not one for each source.
    """
    if (
        len(weights) != count
        or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
        or sum(weights) <= 0
    ):
        raise UserError(
            f"weights: given {list(weights)} for {count} sources, allowed is one number of 0 or "
            "more for each, not all 0"
        )
    positive = sum(weight > 0 for weight in weights)
    if positive > BLOCK:
        raise UserError(f"weights: given {positive} sources, allowed are {BLOCK} at most")
    # Fractions, so that equal weights always round alike.
    total = sum(Fraction(weight) for weight in weights)
    exact = [Fraction(weight) * BLOCK / total for weight in weights]
    parts = [max(math.floor(share), int(share > 0)) for share in exact]
    while (missing := BLOCK - sum(parts)) != 0:
        sign = 1 if missing > 0 else -1
        able = [c for c in range(count) if exact[c] > 0 and (sign > 0 or parts[c] > 1)]
        chosen = max(able, key=lambda c: sign * (exact[c] - parts[c]))
        parts[chosen] += sign
    return tuple(parts)


@lru_cache(maxsize=8)
def _block(seed: int, block: int, parts: tuple[int, ...]) -> tuple[Indices, Indices]:
    """Return, for each place in a block, its source and how many of that source come before it."""
    tickets = permuted(np.arange(BLOCK, dtype=np.int64), BLOCK, (seed, 0, block))
    source = np.searchsorted(np.cumsum(parts), tickets, side="right")
    count = np.empty_like(source)
    for number, part in enumerate(parts):
        count[source == number] = np.arange(part)
    return source, count


def _read(source: Indexed[T], rows: list[int]) -> list[T]:
    if isinstance(source, Batched):
        return source.batch(rows)
    return [source[row] for row in rows]
