"""Vocabulary: text | marks | codes tile the ids without gap or overlap, and refuse strangers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddt_llama.config import UserError
from ddt_llama.language import Vocabulary
from ddt_llama.language.vocabulary import MARKS

sizes = st.integers(1, 300)


@given(sizes, sizes, sizes)
def test_ids_are_tiled_by_text_marks_and_codes(text_size, codebook_size, num_tokens):
    vocabulary = Vocabulary(text_size, codebook_size, num_tokens)
    ids = torch.arange(vocabulary.size)
    marks = [getattr(vocabulary, name) for name in MARKS]
    is_mark = torch.isin(ids, torch.tensor(marks))
    is_text = ids < vocabulary.text_size
    kinds = is_text.int() + is_mark.int() + vocabulary.is_code(ids).int()
    assert (kinds == 1).all()
    assert vocabulary.is_code(ids).sum() == codebook_size
    in_image = vocabulary.is_code(ids) | (ids == vocabulary.same)
    assert torch.equal(vocabulary.in_image(ids), in_image)
    assert len(set(marks)) == len(MARKS)
    assert vocabulary.size == text_size + len(MARKS) + codebook_size


@given(sizes, sizes)
def test_codes_and_ids_are_inverse(text_size, codebook_size):
    vocabulary = Vocabulary(text_size, codebook_size, 4)
    codes = torch.arange(codebook_size).reshape(1, -1)
    ids = vocabulary.to_ids(codes)
    assert vocabulary.is_code(ids).all()
    assert ids.min() == vocabulary.code_offset
    assert torch.equal(vocabulary.to_codes(ids), codes)


@pytest.mark.parametrize("code", [-1, 16, 10**9])
def test_a_code_outside_the_codebook_is_named(code):
    with pytest.raises(UserError, match=rf"given {code}, allowed are 0 to 15"):
        Vocabulary(10, 16, 4).to_ids(torch.tensor([0, code, 3]))


def test_an_id_that_is_no_code_is_named():
    vocabulary = Vocabulary(10, 16, 4)
    for wrong in (vocabulary.same, vocabulary.size):
        with pytest.raises(UserError, match=f"given {wrong}, allowed are 16 to 31"):
            vocabulary.to_codes(torch.tensor([20, wrong]))


def test_ids_beyond_the_vocabulary_are_no_codes():
    vocabulary = Vocabulary(10, 16, 4)
    assert not vocabulary.is_code(torch.tensor([-1, vocabulary.size])).any()


def test_no_codes_are_no_ids():
    assert Vocabulary(10, 16, 4).to_ids(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("field", ["text_size", "codebook_size", "num_tokens"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(UserError, match=f"{field}: given 0"):
        Vocabulary(**{"text_size": 1, "codebook_size": 1, "num_tokens": 1, field: 0})


def test_save_and_load_are_inverse(tmp_path):
    vocabulary = Vocabulary(513, 4096, 64)
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "allowed are the fields"),
        ('{"text_size": 3, "codebook_size": 4}', "missing num_tokens"),
        ('{"text_size": "x", "codebook_size": 4, "num_tokens": 4}', "text_size"),
        ('{"text_size": 0, "codebook_size": 4, "num_tokens": 4}', "text_size: given 0"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Vocabulary.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"vocabulary\.json: no such file"):
        Vocabulary.load(tmp_path)
