"""Probes by name: the sources that models give, quick runs, and going on."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ddt_llama.config import UserError, load_json
from ddt_llama.generation import Model
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes import named
from ddt_llama.probes.learn import Plan
from ddt_llama.probes.named import Data, carry_out, shortened, sources_of
from ddt_llama.tokenizer import SpatialTokenizer, SpatialTokenizerConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig

TINY = SpatialTokenizerConfig(
    image_size=32,
    widths=(4, 4, 4, 8),
    blocks=(0, 0, 0, 0),
    groups=2,
    quantizer=QuantizerConfig(codebook_size=8, code_dim=2),
)


def spatial(name: str) -> Model:
    torch.manual_seed(0)
    return Model(SpatialTokenizer(TINY).eval(), name=name)


def with_text(name: str) -> Model:
    model = spatial(name)
    model.text = TextTokenizer.train(["a red circle", "two blue squares"] * 50, 280)
    return model


def test_models_give_codes_in_language_order_and_their_captions() -> None:
    codes, texts = sources_of([with_text("x")], Data(40, 8))
    assert (codes.name, codes.alphabet, codes.bits) == ("x", 8, 16 * 3)
    assert (len(codes.train), len(codes.held_out), codes.mean_length) == (32, 8, 16.0)
    assert (texts.name, len(texts.train), len(texts.held_out)) == ("captions", 32, 8)
    assert texts.bits is None
    model = with_text("x")
    assert model.text is not None
    told = model.text.decode(cast(Any, texts.train[0].tolist()))
    assert any(word in told for word in ("circle", "square", "triangle", "star", "cross", "ring"))
    assert [one.name for one in sources_of([spatial("a"), spatial("b")], Data(20, 4))] == ["a", "b"]


def test_a_quick_probe_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "QUICK", Data(48, 16))
    monkeypatch.setattr(named, "SEED", 5)
    seeds = Plan((0, 1))
    monkeypatch.setitem(named.PROBES, "shuffle", (seeds, named.PROBES["shuffle"][1]))
    first = carry_out("shuffle", [spatial("a")], tmp_path / "p", quick=True)
    assert first.verdict.startswith("(Quick")
    kept = load_json(tmp_path / "p" / "figures.json")
    assert kept["a.native"] == first.figures["a.native"].value
    assert (tmp_path / "p" / "a-bits-a-token.png").is_file()
    lesson = tmp_path / "p" / "lessons" / "a-fixed-1"
    trained = (lesson / "result.json").stat().st_mtime_ns
    again = carry_out("shuffle", [spatial("a")], tmp_path / "p", quick=True)
    assert again.figures == first.figures
    assert (lesson / "result.json").stat().st_mtime_ns == trained
    with pytest.raises(UserError, match="another probe"):
        carry_out("shuffle", [spatial("b")], tmp_path / "p", quick=True)


def test_a_quick_lesson_is_a_thirtieth() -> None:
    lesson = Plan().lesson
    short = shortened(lesson)
    assert short.train.steps * 30 == lesson.train.steps
    assert short.train.optim.warmup < short.train.steps
