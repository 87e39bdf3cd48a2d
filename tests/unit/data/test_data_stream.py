"""The order of training: every row once a pass, the same on any number of processes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_llama.config import UserError
from ddt_llama.data.order import permuted
from ddt_llama.data.stream import BLOCK, Stream, quotas

seeds = st.integers(0, 2**63 - 1)


class Endless:
    """A source too long to be stored; its sample is its row."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def named(name: str, length: int) -> list[str]:
    return [f"{name}{row}" for row in range(length)]


def first(stream: Stream, steps: int) -> list:
    return [sample for step in range(steps) for sample in stream(step)]


@given(length=st.integers(1, 5000), seed=seeds, epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_bijection(length: int, seed: int, epoch: int) -> None:
    image = permuted(np.arange(length), length, (seed, 1, 0, epoch))
    assert sorted(image.tolist()) == list(range(length))


def test_permuted_takes_each_row_to_each_place_equally_often() -> None:
    """Chi-square over 4,000 keys: 36 cells minus 11 constraints, 99.99 % quantile 65."""
    length, keys = 6, 4000
    positions, key = np.tile(np.arange(length), keys), np.repeat(np.arange(keys), length)
    counts = np.zeros((length, length))
    np.add.at(counts, (positions, permuted(positions, length, (key, 1, 0, 0))), 1)
    expected = keys / length
    assert ((counts - expected) ** 2 / expected).sum() < 65


def test_permuted_with_an_array_as_key_is_each_key_alone() -> None:
    keys = np.repeat(np.array([5, 0, 2**40]), 7)
    alone = [permuted(np.arange(7), 7, (9, key)) for key in (5, 0, 2**40)]
    assert np.array_equal(permuted(np.tile(np.arange(7), 3), 7, (9, keys)), np.concatenate(alone))


def test_permuted_does_not_depend_on_the_numpy_version() -> None:
    """Frozen values: a resumed run under a newer numpy must see the same samples."""
    assert permuted(np.arange(8), 18966, (0, 1, 0, 0)).tolist() == [
        9734, 6173, 49, 5301, 2628, 10766, 10543, 2416,
    ]  # fmt: skip


def test_neighbours_are_scattered_at_any_length() -> None:
    rows = permuted(np.arange(2000), 2**40, (5, 1, 0, 0)).astype(float)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.1
    assert abs(rows.mean() / 2**39 - 1) < 0.05


@given(length=st.integers(1, 300), batch=st.integers(1, 40), seed=seeds)
@settings(max_examples=12, deadline=None)
def test_every_row_comes_once_in_each_pass(length: int, batch: int, seed: int) -> None:
    stream = Stream([Endless(length)], batch, seed=seed)
    samples = first(stream, -(-2 * length // batch))
    assert sorted(samples[:length]) == list(range(length))
    assert sorted(samples[length : 2 * length]) == list(range(length))


def test_passes_and_seeds_differ() -> None:
    stream = Stream([Endless(100)], 100, seed=3)
    assert stream(0) != stream(1)
    assert stream(0) != Stream([Endless(100)], 100, seed=4)(0)
    assert stream(0) == Stream([Endless(100)], 100, seed=3)(0)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=seeds,
    step=st.integers(0, 10**9),
    world=st.sampled_from([1, 2, 3, 4]),
    share=st.integers(1, 7),
)
@settings(max_examples=25, deadline=None)
def test_ranks_together_are_the_single_process(
    lengths: list[int], seed: int, step: int, world: int, share: int
) -> None:
    sources = [named(chr(97 + number), length) for number, length in enumerate(lengths)]
    batch = share * world
    ranks = [
        Stream(sources, batch, seed=seed, rank=rank, world_size=world)(step)
        for rank in range(world)
    ]
    assert [sample for part in ranks for sample in part] == Stream(sources, batch, seed=seed)(step)


@given(seed=seeds, step=st.integers(0, 10**9), world=st.sampled_from([1, 2, 3]))
@settings(max_examples=20, deadline=None)
def test_the_next_of_the_same_source_in_the_whole_step(seed: int, step: int, world: int) -> None:
    sources = [named(name, length) for name, length in (("a", 50), ("b", 20), ("c", 1))]
    weights, batch = [3, 2, 0.1], 12
    options = {"seed": seed, "weights": weights}
    pairs = [
        pair
        for rank in range(world)
        for pair in Stream(sources, batch, rank=rank, world_size=world, **options).with_next(step)
    ]
    alone = Stream(sources, batch, **options)
    assert [own for own, _ in pairs] == alone(step)
    for name in "abc":
        samples = [sample for sample in alone(step) if sample[0] == name]
        assert [pair for pair in pairs if pair[0][0] == name] == list(
            zip(samples, samples[1:] + samples[:1], strict=True)
        )


def test_no_more_is_read_than_what_is_given() -> None:
    asked: list[int] = []

    class Source(Endless):
        def batch(self, indices: Sequence[int]) -> list[int]:
            asked.extend(indices)
            return list(indices)

    pairs = Stream([Source(1000)], 12, rank=1, world_size=3).with_next(0)
    assert sorted(asked) == sorted({row for pair in pairs for row in pair})
    assert len(asked) == 5


@given(seed=seeds, batch=st.integers(1, 64), start=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_resume_continues_exactly(seed: int, batch: int, start: int) -> None:
    """A new stream, asked in any order, gives what the first one gave in order."""
    sources = [Endless(37), Endless(1000)]
    whole = [Stream(sources, batch, seed=seed, weights=[1, 3])(start + k) for k in range(4)]
    again = Stream(sources, batch, seed=seed, weights=[1, 3])
    assert [again(start + k) for k in (3, 1, 0, 2)] == [whole[k] for k in (3, 1, 0, 2)]


def test_batch_size_does_not_change_the_order() -> None:
    sources = [named("a", 30), named("b", 500)]
    small = first(Stream(sources, 10, seed=1, weights=[1, 2]), 60)
    assert small == first(Stream(sources, 60, seed=1, weights=[1, 2]), 10)


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5), seed=seeds,
    block=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_weights_hold_in_every_thousand(weights: list[float], seed: int, block: int) -> None:
    stream = Stream([Endless(17)] * len(weights), BLOCK, seed=seed, weights=weights)
    counts = np.bincount(stream.draws(block).sources, minlength=len(weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - BLOCK * weight / sum(weights)) <= len(weights)


@given(seed=seeds, lengths=st.tuples(st.integers(1, 400), st.integers(1, 400)))
@settings(max_examples=20, deadline=None)
def test_a_mixture_repeats_no_row_within_a_pass(seed: int, lengths: tuple[int, int]) -> None:
    """Also across the borders of blocks, where the count of a source is carried over."""
    stream = Stream([Endless(lengths[0]), Endless(lengths[1])], 250, seed=seed, weights=[0.3, 0.7])
    draws = [stream.draws(step) for step in range(13)]
    for number, length in enumerate(lengths):
        rows = np.concatenate([one.rows[one.sources == number] for one in draws])
        for start in range(0, len(rows) - length + 1, length):
            assert sorted(rows[start : start + length].tolist()) == list(range(length))


def test_default_weights_pass_through_all_sources_alike() -> None:
    stream = Stream([named("a", 100), named("b", 300)], 1000)
    counts = Counter(sample[0] for sample in stream(0))
    assert counts == {"a": 250, "b": 750}


def test_quotas_by_largest_remainder() -> None:
    assert quotas([1, 1, 1], 3) == (334, 333, 333)
    assert quotas([0.7, 0.2, 0.1], 3) == (700, 200, 100)
    assert quotas([0, 5], 2) == (0, 1000)
    assert quotas([1e-12, 1], 2) == (1, 999), "a positive weight is never rounded away"


@pytest.mark.parametrize(
    "weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]]
)
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights: given"):
        Stream([Endless(3), Endless(3)], 4, weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 6, "world_size": 4}, "multiple of the number of processes"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 4, "seed": -1}, "seed: given -1"),
        ({"batch_size": 4, "seed": 2**63}, "seed: given"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stream([Endless(3)], **options)


def test_an_empty_source_and_a_negative_step_are_refused() -> None:
    with pytest.raises(UserError, match="lengths"):
        Stream([Endless(3), Endless(0)], 4)
    with pytest.raises(UserError, match="step: given -1"):
        Stream([Endless(3)], 4)(-1)


def test_a_source_with_batch_is_asked_once_for_its_rows() -> None:
    class Batching(Endless):
        asked: list[int]

        def batch(self, indices: Sequence[int]) -> list[int]:
            self.asked = list(indices)
            return [-index for index in indices]

    batching = Batching(50)
    samples = Stream([batching, Endless(50)], 40, weights=[1, 1])(7)
    draws = Stream([batching, Endless(50)], 40, weights=[1, 1]).draws(7)
    signs = np.where(draws.sources == 0, -1, 1)
    assert samples == (signs * draws.rows).tolist()
    assert batching.asked == draws.rows[draws.sources == 0].tolist()
