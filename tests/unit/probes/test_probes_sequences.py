"""Sources whose entropy is known."""

import math

import pytest
import torch
from known import iid, markov, markov_bits

from ddt_llama.config import UserError
from ddt_llama.probes.sequences import of_codes, of_texts, packed


def counted_bits(rows: torch.Tensor, alphabet: int) -> float:
    """Return the entropy of a symbol given the one before, from counts."""
    pairs = torch.bincount((rows[:, :-1] * alphabet + rows[:, 1:]).flatten(), minlength=alphabet**2)
    p = pairs.double().view(alphabet, alphabet) / pairs.sum()
    given = p / p.sum(1, keepdim=True)
    return float(-(p * given.clamp_min(1e-12).log2()).sum())


def test_sources_have_the_entropy_that_is_told() -> None:
    chain = torch.stack(markov(4000, 30, 6, 1, stay=0.8).train)
    assert counted_bits(chain, 6) == pytest.approx(markov_bits(6, 0.8), abs=0.02)
    free = torch.stack(iid(4000, 30, 6, 1).train)
    assert counted_bits(free, 6) == pytest.approx(math.log2(6), abs=0.01)


def test_codes_and_texts_are_divided() -> None:
    codes = of_codes("x", torch.arange(40).view(10, 4) % 8, 8, held_out=3)
    assert (len(codes.train), len(codes.held_out), codes.bits) == (7, 3, 12.0)
    texts = of_texts("t", [[1], [2, 3], [4, 5, 6]], 9, held_out=1)
    assert (len(texts.train), texts.mean_length, texts.bits) == (2, 3.0, None)
    other = of_texts("t", [[1], [2, 3], [4, 5, 7]], 9, held_out=1)
    assert texts.fingerprint() != other.fingerprint()
    assert texts.fingerprint() == of_texts("u", [[1], [2, 3], [4, 5, 6]], 9, 1).fingerprint()


def test_texts_that_stand_in_training_are_not_held_out() -> None:
    texts = of_texts("t", [[1], [2, 3], [4], [2, 3], [1, 2]], 9, held_out=3)
    assert [row.tolist() for row in texts.held_out] == [[4], [1, 2]]
    with pytest.raises(UserError, match="none held out"):
        of_texts("t", [[1], [2], [2], [1]], 9, held_out=2)


def test_texts_are_packed_behind_each_other_with_a_mark_between() -> None:
    texts = of_texts("t", [[1, 1], [2], [3, 3, 3], [4, 4], [0, 0], [4]], 5, held_out=3)
    rows = packed(texts, 4)
    assert rows.alphabet == 6
    assert [row.tolist() for row in rows.train] == [[1, 1, 5, 2], [5, 3, 3, 3]]
    assert [row.tolist() for row in rows.held_out] == [[4, 4, 5, 0], [0, 5, 4, 5]]
    assert rows.even
    assert not texts.even


def test_nothing_to_learn_or_to_hold_out_is_refused() -> None:
    for held_out in (0, 10):
        with pytest.raises(UserError, match="leave some of each"):
            of_codes("x", torch.zeros(10, 2, dtype=torch.long), 4, held_out)
        with pytest.raises(UserError, match="leave some of each"):
            of_texts("x", [[1]] * 10, 4, held_out)
