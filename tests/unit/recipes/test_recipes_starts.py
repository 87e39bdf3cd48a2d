"""What a training refuses before it begins."""

from types import SimpleNamespace

import pytest
from transformers import BloomConfig, LlamaConfig

from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer, Vocabulary, render
from ddt_llama.language.documents import ask, edit
from ddt_llama.recipes.starts import check_room, positions


def test_models_say_how_many_positions_they_have() -> None:
    assert positions(SimpleNamespace(config=LlamaConfig(max_position_embeddings=77))) == 77
    with pytest.raises(UserError, match="a bloom model does not say how many positions"):
        positions(SimpleNamespace(config=BloomConfig()))


def test_the_longest_document_of_all_kinds_finds_room() -> None:
    text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    vocabulary = Vocabulary(text.size, 50, 64)
    blank = [0] * 64
    two_pictures = len(render(edit(blank, "", blank), vocabulary, text).ids) + 20
    check_room(two_pictures, 20, vocabulary, text)  # short texts: an edit is the longest
    with pytest.raises(UserError, match=f"kind 'edit' may have {two_pictures} ids"):
        check_room(two_pictures - 1, 20, vocabulary, text)
    two_texts = len(render(ask(blank, "", ""), vocabulary, text).ids) + 2 * 300
    check_room(two_texts, 300, vocabulary, text)
    with pytest.raises(UserError, match=f"kind 'ask' may have {two_texts} ids"):
        check_room(two_texts - 1, 300, vocabulary, text)
