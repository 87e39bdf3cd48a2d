"""Orders are permutations, each the one that its name says."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ddt_llama.probes.orders import ORDERS, places


@given(st.sampled_from(ORDERS), st.integers(1, 70), st.integers(0, 5), st.integers(0, 10_000))
def test_every_order_reads_every_place_once(order, length, seed, number) -> None:
    found = places(order, length, seed, number)
    assert sorted(found.tolist()) == list(range(length))


def test_orders_are_what_their_names_say() -> None:
    assert places("native", 5).tolist() == [0, 1, 2, 3, 4]
    assert places("reversed", 5).tolist() == [4, 3, 2, 1, 0]
    assert places("stride-2", 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert places("stride-3", 7).tolist() == [0, 3, 6, 1, 4, 2, 5]


def test_one_permutation_is_the_same_for_all_and_a_fresh_one_for_none() -> None:
    fixed = {tuple(places("fixed", 20, 3, number).tolist()) for number in range(9)}
    fresh = {tuple(places("fresh", 20, 3, number).tolist()) for number in range(9)}
    assert (len(fixed), len(fresh)) == (1, 9)
    assert not torch.equal(places("fixed", 20, 3), places("fixed", 20, 4))
    long, short = places("fixed", 20, 3), places("fixed", 7, 3)
    assert short.tolist() == [place for place in long.tolist() if place < 7]
    assert not torch.equal(places("fresh", 20, 3, 1), places("fresh", 20, 4, 1))
