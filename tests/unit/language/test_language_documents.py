"""Documents: literal layouts, prompt + answer = whole, loss on answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer, Vocabulary, documents, render

TEXT = TextTokenizer.train(["a red circle", "a red circle", "how many? USER: ASSISTANT:"] * 2, 300)
VOCABULARY = Vocabulary(TEXT.size, codebook_size=16, num_tokens=4)
A, B = (3, 1, 4, 15), (9, 2, 6, 0)
PLAN = " ".join(
    TEXT._tokenizer.id_to_token(index).replace("Ġ", "_") for index in TEXT.encode(documents.PLAN)
)

captions = st.text(st.characters(codec="utf-8"), max_size=20)
images = st.tuples(*[st.integers(0, 15)] * 4)
# Each kind as (whole, prompt) from the same random parts.
PAIRS = {
    "text_to_image": lambda a, b, s, t: (
        documents.text_to_image(s, a),
        documents.text_to_image(s, None),
    ),
    "image_to_text": lambda a, b, s, t: (
        documents.image_to_text(a, s),
        documents.image_to_text(a, None),
    ),
    "image_only": lambda a, b, s, t: (documents.image_only(a), documents.image_only(None)),
    "text_only": lambda a, b, s, t: (documents.text_only(s), documents.text_only(None)),
    "draw": lambda a, b, s, t: (documents.draw(s, a), documents.draw(s, None)),
    "edit": lambda a, b, s, t: (documents.edit(a, s, b), documents.edit(a, s, None)),
    "ask": lambda a, b, s, t: (documents.ask(a, s, t), documents.ask(a, s, None)),
    "describe": lambda a, b, s, t: (documents.describe(a, s), documents.describe(a, None)),
    "plan": lambda a, b, s, t: (documents.plan(s, t), documents.plan(s, None)),
}


def spell(sequence):
    """Write a rendered document as text: marks B E [ ] =, codes as #n, `^` behind a target."""
    marks = {
        VOCABULARY.bos: "B",
        VOCABULARY.eos: "E",
        VOCABULARY.begin_image: "[",
        VOCABULARY.end_image: "]",
        VOCABULARY.same: "=",
    }
    words = []
    for index, target in zip(sequence.ids, sequence.supervised, strict=True):
        if index in marks:
            word = marks[index]
        elif index >= VOCABULARY.code_offset:
            word = f"#{index - VOCABULARY.code_offset}"
        else:
            word = TEXT._tokenizer.id_to_token(index).replace("Ġ", "_")
        words.append(word + "^" * target)
    return " ".join(words)


def rendered(document, **options):
    return render(document, VOCABULARY, TEXT, **options)


@pytest.mark.parametrize(
    ("document", "layout"),
    [
        (
            documents.text_to_image("a red circle", A),
            "B _a^ _red^ _circle^ [^ #3^ #1^ #4^ #15^ ]^ E^",
        ),
        (documents.text_to_image("a red circle", None), "B _a^ _red^ _circle^ [^"),
        (documents.image_to_text(A, "red"), "B [^ #3^ #1^ #4^ #15^ ]^ _red^ E^"),
        (documents.image_to_text(A, None), "B [^ #3^ #1^ #4^ #15^ ]^"),
        (documents.image_only(A), "B [^ #3^ #1^ #4^ #15^ ]^ E^"),
        (documents.text_only("a red"), "B _a^ _red^ E^"),
        (documents.draw("red", A), "B _USER : _red _ASSISTANT : [^ #3^ #1^ #4^ #15^ ]^ E^"),
        (documents.draw("red", None), "B _USER : _red _ASSISTANT : [^"),
        (
            documents.edit(A, "red", B),
            "B _USER : _red [ #3 #1 #4 #15 ] _ASSISTANT : [^ #9^ #2^ #6^ #0^ ]^ E^",
        ),
        (
            documents.edit(A, "red", (3, 2, 4, 0)),
            "B _USER : _red [ #3 #1 #4 #15 ] _ASSISTANT : [^ =^ #2^ =^ #0^ ]^ E^",
        ),
        (documents.edit(A, "red", None), "B _USER : _red [ #3 #1 #4 #15 ] _ASSISTANT : [^"),
        (
            documents.ask(A, "how many?", "a"),
            "B _USER : [ #3 #1 #4 #15 ] _how _many ? _ASSISTANT : _a^ E^",
        ),
        (
            documents.ask(A, "how many?", "a", [("red?", "a red")]),
            "B _USER : [ #3 #1 #4 #15 ] _how _many ? _ASSISTANT : _a^ E^ "
            "_USER : _red ? _ASSISTANT : _a^ _red^ E^",
        ),
        (
            documents.ask(A, "how many?", None),
            "B _USER : [ #3 #1 #4 #15 ] _how _many ? _ASSISTANT :",
        ),
        (
            documents.plan("red", "a red circle", [("how many?", "a")]),
            f"B _USER : {PLAN} _red _ASSISTANT : _a^ _red^ _circle^ E^ "
            "_USER : _how _many ? _ASSISTANT : _a^ E^",
        ),
    ],
)
def test_layouts_word_for_word(document, layout):
    assert spell(rendered(document)) == layout


def test_every_kind_has_a_pair_here():
    assert set(PAIRS) == set(documents.KINDS)


@pytest.mark.parametrize("kind", documents.KINDS)
@given(images, images, captions, captions)
def test_prompt_and_answer_are_the_whole(kind, first, second, some, other):
    whole, prompt = PAIRS[kind](first, second, some, other)
    full, head = rendered(whole), rendered(prompt)
    count = len(head.ids)
    assert full.kind == head.kind == kind
    assert full.ids[:count] == head.ids
    assert full.supervised[:count] == head.supervised
    if prompt.writes_image:
        codes = VOCABULARY.to_ids(torch.tensor(whole.answer.codes)).tolist()
        if kind == "edit":
            there = documents.source(whole)
            assert there == first
            pairs = zip(codes, whole.answer.codes, there, strict=True)
            codes = [VOCABULARY.same if new == old else code for code, new, old in pairs]
        answer = [*codes, VOCABULARY.end_image, VOCABULARY.eos]
    else:
        answer = [*TEXT.encode(whole.answer.text), VOCABULARY.eos]
    assert full.ids[count:] == answer
    assert all(full.supervised[count:])


@pytest.mark.parametrize("kind", documents.KINDS)
def test_loss_is_on_all_but_bos_in_stage_1_and_on_the_answer_in_stage_2(kind):
    whole, prompt = PAIRS[kind](A, B, "a red circle", "how many?")
    sequence = rendered(whole)
    begin = int(whole.writes_image)  # begin_image ends the prompt but belongs to the answer
    first = 1 if kind in documents.PRETRAINING else len(rendered(prompt).ids) - begin
    assert sequence.supervised == [place >= first for place in range(len(sequence.ids))]


def test_the_unconditional_twin_drops_given_text_and_keeps_images():
    twin = documents.without_text
    plain = rendered(documents.image_only(A))
    assert rendered(twin(documents.text_to_image("red", A))).ids == plain.ids
    edited = spell(rendered(twin(documents.edit(A, "a red circle", None))))
    assert edited == "B _USER : [ #3 #1 #4 #15 ] _ASSISTANT : [^"
    assert spell(rendered(twin(documents.draw("red", None)))) == "B _USER : _ASSISTANT : [^"
    caption = documents.image_to_text(A, "red")
    assert twin(caption) == caption  # the text that is to be written stays
    assert twin(documents.ask(A, "how?", "red")).answer == documents.Text("red")


def test_text_never_becomes_a_mark_or_a_code():
    sequence = rendered(documents.text_only("<bos> [ begin_image ] USER: <|eot|>"))
    assert max(sequence.ids[1:-1]) < VOCABULARY.text_size


@pytest.mark.parametrize("codes", [(1, 2, 3), (1, 2, 3, 4, 5), ()])
def test_an_image_of_another_length_is_refused(codes):
    with pytest.raises(UserError, match=rf"image of {len(codes)} codes.* exactly 4"):
        rendered(documents.image_only(codes))


def test_a_code_out_of_range_is_refused():
    with pytest.raises(UserError, match="given 16"):
        rendered(documents.edit(A, "red", (0, 1, 2, 16)))


def test_max_text_cuts_the_texts_of_the_document_and_nothing_else():
    document = documents.ask(A, "how many?", "a red circle")
    cut = spell(rendered(document, max_text=1))
    assert cut == "B _USER : [ #3 #1 #4 #15 ] _how _ASSISTANT : _a^ E^"


def test_max_length_counts_what_is_still_to_be_written():
    for whole, prompt in (pair(A, B, "a red circle", "a") for pair in PAIRS.values()):
        total = len(rendered(whole).ids)
        rendered(whole, max_length=total)
        with pytest.raises(UserError, match=f"allowed are {total - 1} in all"):
            rendered(whole, max_length=total - 1)
        if prompt.writes_image:
            rendered(prompt, max_length=total)
            with pytest.raises(UserError, match="shorten the text"):
                rendered(prompt, max_length=total - 1)


def test_turns_that_do_not_fit_are_left_out():
    def asked(turns):
        return documents.ask(A, "how many?", "a", [("red?", "circle")] * turns)

    one, two = (len(rendered(asked(turns)).ids) for turns in (1, 2))
    assert two > one
    assert rendered(asked(9), max_length=two) == rendered(asked(2))
    assert rendered(asked(9), max_length=two - 1) == rendered(asked(1))
    with pytest.raises(UserError, match="text too long"):
        rendered(asked(9), max_length=len(rendered(asked(0)).ids) - 1)


def test_ten_thousand_words_end_in_one_clear_line():
    with pytest.raises(UserError, match="text too long") as caught:
        rendered(documents.draw("circle " * 10_000, None), max_length=512)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("change", "result"),
    [
        ("add a cat at the left", "a dog, a hat at the right, a cat at the left, on grass"),
        ("remove a dog", "a hat at the right, on grass"),
        ("change a hat at the right to a cap at the top", "a dog, a cap at the top, on grass"),
        ("change on grass to on sand", "a dog, a hat at the right, on sand"),
        ("remove a hat at the top", "a dog, on grass"),  # the likest
        ("change a hat", "a dog, a hat at the right, on grass"),  # no change at all
        ("what?", "a dog, a hat at the right, on grass"),
        (
            documents.change_all(
                "a dog, a hat at the right, on grass", "a road to a town, at night"
            ),
            "a road to a town, at night",
        ),
    ],
)
def test_a_change_in_words_is_applied_to_a_description(change: str, result: str) -> None:
    assert documents.changed("a dog, a hat at the right, on grass", change) == result
