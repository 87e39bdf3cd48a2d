"""The suite text on a language model that knows nothing, and on one that knows everything."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ddt_llama.config import UserError
from ddt_llama.evaluation.suites import suite_named
from ddt_llama.evaluation.text import TextSuite, surprises
from ddt_llama.generation import Model
from ddt_llama.language import Vocabulary
from ddt_llama.language.text import TextTokenizer
from stand_in import StandIn

TEXT = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
VOCABULARY = Vocabulary(TEXT.size, StandIn.codebook_size, StandIn.num_tokens)


class Foresight(nn.Module):
    """Gives the next id the logit `sure` and all others 0."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.sure = sure

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        following = input_ids.roll(-1, 1)
        hot = nn.functional.one_hot(following, VOCABULARY.size)
        return SimpleNamespace(logits=self.sure * hot.float())


def model(sure: float) -> Model:
    return Model(StandIn(), lambda: Foresight(sure), VOCABULARY, TEXT, engine=None)


def test_one_that_knows_nothing_pays_for_every_id() -> None:
    figures = TextSuite(captions=10).run(model(0.0))
    assert figures["text.perplexity"].value == pytest.approx(VOCABULARY.size, rel=1e-4)
    (nats,) = surprises(model(0.0), ["a red circle"])
    assert nats == pytest.approx([math.log(VOCABULARY.size)] * len(nats), rel=1e-4)
    assert len(nats) >= len(TEXT.encode("a red circle"))


def test_one_that_knows_everything_pays_nothing_padding_included() -> None:
    figures = TextSuite(captions=10).run(model(50.0))
    assert figures["text.perplexity"].value == pytest.approx(1)
    assert figures["text.bits_a_character"].value == pytest.approx(0, abs=1e-6)


def test_a_character_counts_alike_however_text_becomes_ids() -> None:
    (nats,) = surprises(model(0.0), ["a red circle"])
    one = suite_named("text", {"captions": 3, "batch_size": 2})
    assert isinstance(one, TextSuite)
    assert 0 < one.run(model(0.0))["text.bits_a_character"].value < sum(nats)


def test_a_tokenizer_alone_has_no_text() -> None:
    with pytest.raises(UserError):
        TextSuite(captions=1).run(Model(StandIn()))
    with pytest.raises(UserError, match="captions: given 0"):
        TextSuite(captions=0)
