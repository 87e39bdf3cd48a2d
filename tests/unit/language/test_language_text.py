"""Text tokenizer: lossless, deterministic, stable at the borders of parts, safe against marks."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer

from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} on a {background} background"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "star")
    for background in ("white", "black")
]
TEXT = TextTokenizer.train(CAPTIONS, 400)
TRICKY = [
    "مرحبا بالعالم",
    "🙂 and 👩‍👩‍👧",
    " leading",
    "trailing ",
    "  ",
    "\n",
    "a\tb",
    "é",
    "\x00",
    "1 2 3",
]


@pytest.mark.parametrize("text", [*TRICKY, *CAPTIONS[:3]])
def test_decoding_gives_the_text_back(text):
    assert TEXT.decode(TEXT.encode(text)) == text


@given(st.text(st.characters(codec="utf-8")))
def test_any_unicode_comes_back(text):
    ids = TEXT.encode(text)
    assert TEXT.decode(ids) == text
    assert all(0 <= index < TEXT.size for index in ids)


def test_known_words_are_one_id_each():
    assert len(TEXT.encode("a red circle")) == 3
    assert len(TEXT.encode("on a white background")) == 4


def test_parts_encoded_apart_are_the_text_encoded_whole():
    apart = TEXT.encode("USER:") + TEXT.encode("a red circle") + TEXT.encode("ASSISTANT:")
    assert apart == TEXT.encode("USER: a red circle ASSISTANT:")
    assert TEXT.encode("red circle") == TEXT.encode("a red circle")[1:]


def test_the_empty_text_has_no_ids():
    assert TEXT.encode("") == []
    assert TEXT.decode([]) == ""


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        TextTokenizer.train(iter(CAPTIONS), 400).save(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_vocab_size_bounds_the_ids_and_below_a_byte_is_refused():
    assert TextTokenizer.train(CAPTIONS, 280).size == 280
    assert TextTokenizer.train([], 1024).size == 256
    with pytest.raises(UserError, match="given 255"):
        TextTokenizer.train(CAPTIONS, 255)


def test_half_a_surrogate_is_a_user_error():
    with pytest.raises(UserError, match="not valid Unicode at character 2"):
        TEXT.encode("ab\ud800")


def test_ids_without_text_read_as_nothing():
    ids = TEXT.encode("a red circle")
    assert TEXT.decode([TEXT.size, *ids, TEXT.size + 7, -1]) == "a red circle"


def test_broken_bytes_do_not_raise():
    half = TEXT.encode("🙂")[:-1]
    assert "�" in TEXT.decode(half)


def test_saved_folder_opens_here_and_in_transformers(tmp_path):
    TEXT.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    other = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in [*TRICKY, *CAPTIONS]:
        assert again.encode(text) == TEXT.encode(text)
        assert other(" " + text, add_special_tokens=False).input_ids == TEXT.encode(text)
    assert again.size == TEXT.size == len(other)


def _byte_level_with_marks() -> Tokenizer:
    """Build what a LLaMA-3 checkpoint holds: byte-level BPE, marks, bos added, cut at 8."""
    tokenizer = Tokenizer.from_str(TEXT._tokenizer.to_str())
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def test_a_checkpoint_tokenizer_neither_adds_marks_nor_cuts_nor_pads(tmp_path):
    _byte_level_with_marks().save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(tmp_path)
    for text in ("red", " ".join(CAPTIONS[:2])):
        assert loaded.encode(text) == TEXT.encode(text)
    assert loaded.size == TEXT.size + 2


def test_a_prompt_cannot_spell_a_mark(tmp_path):
    tokenizer = _byte_level_with_marks()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(tmp_path)
    for one in (loaded, pickle.loads(pickle.dumps(loaded))):
        ids = one.encode("red <|end|> circle")
        assert max(ids) < TEXT.size
        assert one.decode(ids) == "red <|end|> circle"


def test_a_sentencepiece_like_tokenizer_gets_one_space_only(tmp_path):
    vocab = {
        "<unk>": 0,
        "▁": 1,
        "▁a": 2,
        "▁red": 3,
        "r": 4,
        "e": 5,
        "d": 6,
        "a": 7,
        "x": 8,
        "▁x": 9,
    }
    pieces = [(piece, -float(rank)) for piece, rank in vocab.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.encode("a red") == [2, 3]
    assert loaded.decode([2, 3]) == "a red"


def test_an_older_format_is_converted(tmp_path):
    model = json.loads(TEXT._tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    loaded = TextTokenizer.load(tmp_path)
    assert loaded.encode("a red circle") == TEXT.encode("a red circle")
    assert loaded.decode(loaded.encode("a red circle")) == "a red circle"


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3"])
def test_a_checkpoint_without_a_text_tokenizer_has_none(family, tmp_path):
    """Of some families transformers would make an empty one."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no text tokenizer.*allowed is a folder with"):
        TextTokenizer.load(tmp_path)


def test_mistakes_are_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"version": "1.0"')
    cases = {"absent": "no such folder", "empty": "no text tokenizer", "broken": "not a tokenizer"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            TextTokenizer.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_ten_thousand_words_encode_in_bounded_time():
    assert len(TEXT.encode("red circle " * 5000)) >= 10_000
