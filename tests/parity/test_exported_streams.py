"""What transformers' own `generate` writes with an exported folder: the ids of our engine.

At temperature 0, prompts given as text, in batches of different lengths, with and without guidance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_engine import BACKBONES, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddt_llama
from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Answer, Codes, Engine, decoder_of
from ddt_llama.generation.sampling import GREEDY
from ddt_llama.language import TextTokenizer, Vocabulary, documents, plain, render
from ddt_llama.language.backbone import Language
from ddt_llama.recipes.export import export
from ddt_llama.shapes.render import render as draw
from ddt_llama.shapes.scene import sample_scene

TEXT = TextTokenizer.train([], 256)  # every byte an id
VOCABULARY = Vocabulary(text_size=259, codebook_size=64, num_tokens=8)
WORDS = ["a red circle", "two stars", "a green ring to the left of a blue square"]
EMPTY = " USER: ASSISTANT:<|begin_image|>"


class Exported:
    """A folder as somebody opens it who knows nothing of this project."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.first = self.tokenizer.convert_tokens_to_ids("<img_00000>")

    def write(self, prompts: Sequence[str], length: int, suppressed: range, **options: Any) -> Any:
        given = self.tokenizer(prompts, return_tensors="pt", padding=True)
        ids = self.model.generate(
            **given,
            do_sample=False,
            max_new_tokens=length,
            suppress_tokens=list(suppressed),
            **options,
        )
        return ids[:, given.input_ids.shape[1] :]

    def codes(self, prompts: Sequence[str], length: int, scale: float) -> Tensor:
        empty = self.tokenizer([EMPTY] * len(prompts), return_tensors="pt").input_ids
        guided = {"guidance_scale": scale, "negative_prompt_ids": empty}
        return self.write(prompts, length, range(self.first), **guided) - self.first


def drawn(engine: Engine, text: TextTokenizer, scale: float) -> Tensor:
    """Draw by our engine what `WORDS` say."""
    asked = [documents.draw(words, None) for words in WORDS]
    empty = documents.without_text(asked[0])
    twin = tuple(render(empty, engine.vocabulary, text).ids)
    rows = [tuple(render(one, engine.vocabulary, text).ids) for one in asked]
    return torch.stack(write(engine, [Codes(row, twin, scale, GREEDY) for row in rows]))


PROMPTS = [f" USER: {words} ASSISTANT:<|begin_image|>" for words in WORDS]


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_random_model_of_any_family_writes_the_same_codes(name: str, tmp_path: Path) -> None:
    family, fields = BACKBONES[name]
    model = tiny(family, **fields, vocab_size=VOCABULARY.size)
    plain.save(tmp_path, Language(model, VOCABULARY, TEXT), torch.float32)
    engine = Engine(decoder_of(model), VOCABULARY, TEXT.size)
    exported = Exported(tmp_path)
    streams = {scale: drawn(engine, TEXT, scale) for scale in (1.0, 3.0)}
    for scale, expected in streams.items():
        assert torch.equal(exported.codes(PROMPTS, VOCABULARY.num_tokens, scale), expected)
    if name != "mistral-window":  # which sees no words behind the marks
        assert not torch.equal(streams[1.0], streams[3.0])


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(export("nano", tmp_path_factory.mktemp("nano") / "plain", "float16"))


@pytest.fixture(scope="module")
def ours() -> Any:
    return ddt_llama.load("nano")


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_nano_draws_the_same_codes(scale: float, nano: Exported, ours: Any) -> None:
    expected = drawn(ours.engine, ours.text, scale)
    assert torch.equal(nano.codes(PROMPTS, ours.vocabulary.num_tokens, scale), expected)


@pytest.fixture(scope="module")
def shown(ours: Any) -> tuple[list[int], str]:
    """Codes of a picture in the order of the language model, and as text."""
    codes = ours.tokenizer.to_language(ours.encode(draw([sample_scene(9, 1)], 64)))[0].tolist()
    names = "".join(f"<img_{code:05d}>" for code in codes)
    return codes, f"<|begin_image|>{names}<|end_image|>"


def test_nano_edits_the_same(nano: Exported, ours: Any, shown: tuple[list[int], str]) -> None:
    codes, image = shown
    told = "add a small red star at the top left"
    asked = render(documents.edit(codes, told, None), ours.vocabulary, ours.text)
    task = Codes(tuple(asked.ids), sampling=GREEDY, source=tuple(codes))
    expected = write(ours.engine, [task])[0].tolist()
    prompt = f" USER: {told}{image} ASSISTANT:<|begin_image|>"
    written = nano.write([prompt], len(codes), range(nano.first - 1))[0] - nano.first
    pairs = list(zip(written.tolist(), codes, strict=True))
    assert [there if code < 0 else code for code, there in pairs] == expected != codes
    assert (written == -1).any()


def test_nano_answers_the_same(nano: Exported, ours: Any, shown: tuple[list[int], str]) -> None:
    codes, image = shown
    questions = ["what colour is the background?", "how many shapes are there?"]
    rows = [
        render(documents.ask(codes, question, None), ours.vocabulary, ours.text).ids
        for question in questions
    ]
    written = write(ours.engine, [Answer((tuple(row),)) for row in rows])
    answers = [f" {ours.text.decode(ids.tolist())}" for ids in written]
    prompts = [f" USER:{image} {question} ASSISTANT:" for question in questions]
    told = nano.write(prompts, 96, range(0))
    assert nano.tokenizer.batch_decode(told, skip_special_tokens=True) == answers
    assert all(answers)
