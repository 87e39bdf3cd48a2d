"""Prompts in words of other programs have the ids of `render`; marks and codes have names."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ddt_llama.config import UserError
from ddt_llama.language import Document, TextTokenizer, Vocabulary, documents, render
from ddt_llama.language.backbone import BackboneConfig, Language, build
from ddt_llama.language.plain import named, save, spell

WORDS = ["a red circle", "how many? USER: ASSISTANT:", "Plan a picture: a ring"] * 2
TEXT = TextTokenizer.train(WORDS, 300)
VOCABULARY = Vocabulary(TEXT.size + 5, codebook_size=16, num_tokens=4)  # 5 padded rows
NAMED = named(TEXT, VOCABULARY)
A, B = (3, 1, 4, 15), (3, 2, 4, 0)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
images = st.tuples(*[st.integers(0, 15)] * 4)


def spaced(text: str) -> str:
    return f" {text}" if text else ""


def image(codes: tuple[int, ...], source: tuple[int, ...] = ()) -> str:
    names = [f"<img_{code:05d}>" for code in codes]
    for place, (code, there) in enumerate(zip(codes, source, strict=False)):
        if code == there:
            names[place] = "<|same|>"
    return "".join(["<|begin_image|>", *names, "<|end_image|>"])


def whole_documents(a, b, s, t) -> dict[str, tuple[Document, str]]:
    """Return a document of each kind from the same parts, and how it is to be written."""
    s_, t_, end = spaced(s), spaced(t), "<|eos|>"
    asked = f" USER:{image(a)}"
    again = documents.ask(a, s, t, [(t, s)])
    return {
        "text_to_image": (documents.text_to_image(s, a), f"{s_}{image(a)}{end}"),
        "image_to_text": (documents.image_to_text(a, s), f"{image(a)}{s_}{end}"),
        "image_only": (documents.image_only(a), f"{image(a)}{end}"),
        "text_only": (documents.text_only(s), f"{s_}{end}"),
        "draw": (documents.draw(s, a), f" USER:{s_} ASSISTANT:{image(a)}{end}"),
        "edit": (
            documents.edit(a, s, b),
            f" USER:{s_}{image(a)} ASSISTANT:{image(b, a)}{end}",
        ),
        "ask": (documents.ask(a, s, t), f"{asked}{s_} ASSISTANT:{t_}{end}"),
        "describe": (
            documents.describe(a, s),
            f"{asked} Describe the picture. ASSISTANT:{s_}{end}",
        ),
        "plan": (documents.plan(s, t), f" USER: Plan a picture:{s_} ASSISTANT:{t_}{end}"),
        "further": (
            again,
            f"{asked}{s_} ASSISTANT:{t_}{end} USER:{t_} ASSISTANT:{s_}{end}",
        ),
    }


KINDS = sorted(whole_documents(A, B, "", ""))


def test_every_kind_of_document_is_there():
    assert {*KINDS} == {*documents.KINDS, "further"}


@pytest.mark.parametrize("kind", KINDS)
@given(images, images, texts, texts)
def test_a_document_in_words_has_the_ids_of_render(kind, a, b, s, t):
    document, written = whole_documents(a, b, s, t)[kind]
    assert NAMED.encode(written).ids == render(document, VOCABULARY, TEXT).ids


@pytest.mark.parametrize("kind", KINDS)
@given(images, images, texts, texts)
def test_ids_are_spelled_so_that_they_are_read_back(kind, a, b, s, t):
    document, written = whole_documents(a, b, s, t)[kind]
    assert spell(NAMED, render(document, VOCABULARY, TEXT).ids) == written


def test_prompts_are_the_beginnings():
    prompts = {
        " USER: a red circle ASSISTANT:<|begin_image|>": documents.draw("a red circle", None),
        f" USER: add a ring{image(A)} ASSISTANT:<|begin_image|>": documents.edit(
            A, "add a ring", None
        ),
        f" USER:{image(A)} how many? ASSISTANT:": documents.ask(A, "how many?", None),
        " a red circle<|begin_image|>": documents.text_to_image("a red circle", None),
        " USER: ASSISTANT:<|begin_image|>": documents.without_text(documents.draw("x", None)),
    }
    for written, document in prompts.items():
        assert NAMED.encode(written).ids == render(document, VOCABULARY, TEXT).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plain")
    model = build(BackboneConfig(dim=32, depth=1, num_heads=2, num_kv_heads=1), VOCABULARY)
    save(place, Language(model, VOCABULARY, TEXT), torch.bfloat16)
    return place


def test_transformers_opens_the_folder_and_knows_every_row(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY.size
    assert None not in tokenizer.convert_ids_to_tokens(range(VOCABULARY.size))
    for mark in ("bos", "eos", "pad"):
        there = getattr(tokenizer, f"{mark}_token_id"), getattr(model.config, f"{mark}_token_id")
        assert there == (getattr(VOCABULARY, mark),) * 2
    given = tokenizer(["", " a red circle"], return_tensors="pt", padding=True)
    assert [*given] == ["input_ids", "attention_mask"]
    assert given.input_ids[0, -1] == VOCABULARY.bos
    assert (given.input_ids[0, :-1] == VOCABULARY.pad).all()
    assert model(**given).logits.shape[-1] == VOCABULARY.size


def test_transformers_reads_and_writes_as_the_tokenizer_does(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for _, written in whole_documents(A, B, "مرحبا 🙂", " a\n  b ").values():
        ids = tokenizer(written).input_ids
        assert ids == NAMED.encode(written).ids
        assert tokenizer.decode(ids) == f"<|bos|>{written}"
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert shown == written.replace("<|eos|>", "")


def test_rotary_positions_are_told_in_older_words_too(tmp_path: Path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    for rope in (scaled, {"rope_type": "default", "rope_theta": 500_000.0}):
        config = LlamaConfig(
            vocab_size=VOCABULARY.size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            rope_parameters=dict(rope),
        )
        model = AutoModelForCausalLM.from_config(config)
        save(tmp_path, Language(model, VOCABULARY, TEXT), torch.float32)
        told = json.loads((tmp_path / "config.json").read_text())
        assert told["rope_theta"] == 500_000.0
        without = {name: value for name, value in rope.items() if name != "rope_theta"}
        assert told["rope_scaling"] == (without if rope is scaled else None)
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def with_tokens(*special: str, plain: str = "") -> TextTokenizer:
    """Return `TEXT` as a checkpoint holds it: special tokens behind the others."""
    tokenizer = Tokenizer.from_str(TEXT.to_json())
    tokenizer.add_special_tokens(list(special))
    if plain:
        tokenizer.add_tokens([plain])
    return TextTokenizer(tokenizer)


def test_a_prompt_spells_no_special_token_of_the_checkpoint_but_its_plain_ones():
    text = with_tokens("<|end|>", "<|pad|>", plain="<tool>")
    vocabulary = Vocabulary(text.size, codebook_size=16, num_tokens=4)
    tokenizer = named(text, vocabulary)
    for words in ("red <|end|>", "a <tool> circle", "<tool>"):
        ids = tokenizer.encode(f" {words}").ids
        assert ids == [vocabulary.bos, *text.encode(words)]
        assert spell(tokenizer, ids) == f" {words}"
    assert tokenizer.id_to_token(TEXT.size) == "<|end|>"
    assert tokenizer.token_to_id("<|pad|>") == vocabulary.pad


def sentencepiece_like(prepend: bool) -> TextTokenizer:
    """Return a BPE over ▁, which puts a space before a text by itself, as LLaMA 2 does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    words = [f"{text} {text}" for text in WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    if prepend:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return TextTokenizer(tokenizer)


@pytest.mark.parametrize("prepend", [True, False])
def test_a_tokenizer_that_adds_a_space_by_itself_adds_one_no_more(prepend: bool):
    text = sentencepiece_like(prepend)
    assert text.decode(text.encode("a ring")) == "a ring"
    vocabulary = Vocabulary(text.size, codebook_size=16, num_tokens=4)
    tokenizer = named(text, vocabulary)
    for document, written in whole_documents(A, B, "how many", "a red ring").values():
        ids = render(document, vocabulary, text).ids
        if document.kind != "describe":  # letters that it does not know
            assert tokenizer.encode(written).ids == ids
            assert spell(tokenizer, ids) == written


def test_what_cannot_be_given_image_tokens_is_refused():
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁x", -1.0), ("x", -2.0)], unk_id=0))
    cases = {
        "kind Unigram": TextTokenizer(pieces),
        "a token <img_00003> already": with_tokens(plain="<img_00003>"),
    }
    for message, text in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            named(text, Vocabulary(text.size, codebook_size=16, num_tokens=4))
        assert "\n" not in str(caught.value)


def test_ids_that_no_text_is_read_as_are_refused():
    letters = [NAMED.token_to_id(letter) for letter in "re"]
    with pytest.raises(UserError, match="does not read 're' as the ids"):
        spell(NAMED, [VOCABULARY.bos, *letters])
