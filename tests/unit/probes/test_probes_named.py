"""Probes by name: the sources that models give, quick runs, and going on."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError, load_json
from ddt_llama.generation import Model
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes import sources as module
from ddt_llama.probes.base import kept
from ddt_llama.probes.learn import Plan
from ddt_llama.probes.named import PROBES, carry_out
from ddt_llama.probes.sources import sources_of
from ddt_llama.tokenizer import SpatialTokenizer, SpatialTokenizerConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from stand_in import StandIn

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


class ByColour(StandIn):
    """One code a channel, its mean in eight steps; a language model reads them in `order`."""

    num_tokens, codebook_size, image_size = 3, 8, 32

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def encode(self, images: Tensor) -> Tensor:
        return (images.mean((2, 3)) * 4 + 4).long().clamp(0, 7)

    def to_language(self, codes: Tensor) -> Tensor:
        return codes[:, self.order]


def test_models_give_codes_in_language_order_and_their_captions() -> None:
    codes, texts = sources_of([with_text("x")], 40, 8)
    assert (codes.name, codes.alphabet, codes.bits) == ("x", 8, 16 * 3)
    assert (len(codes.train), len(codes.held_out), codes.mean_length) == (32, 8, 16.0)
    # 16 codes are fewer symbols than two captions have.
    assert (texts.name, len(texts.train)) == ("captions", 32 * 2)
    assert 0 < len(texts.held_out) <= 8 * 2  # those that do not stand in training
    assert texts.bits is None
    model = with_text("x")
    assert model.text is not None
    told = model.text.decode(cast(Any, texts.train[0].tolist()))
    assert any(word in told for word in ("circle", "square", "triangle", "star", "cross", "ring"))
    assert [one.name for one in sources_of([spatial("a"), spatial("b")], 20, 4)] == ["a", "b"]


def test_a_tokenizer_with_a_coarse_end_gives_its_codes_in_that_order_too() -> None:
    tokenizer = ByColour(order=[1, 0, 2])
    native, coarse, fine = sources_of([Model(tokenizer, name="x")], 20, 4)
    assert [one.name for one in (native, coarse, fine)] == [
        "x",
        "x coarse to fine",
        "x fine to coarse",
    ]
    assert torch.equal(fine.train[0], coarse.train[0].flip(0))
    row = native.train[0]
    assert torch.equal(coarse.train[0], row[torch.tensor([2, 0, 1])])
    flipped = Model(ByColour(order=[2, 1, 0]), name="x")
    assert [one.name for one in sources_of([flipped], 20, 4)] == ["x", "x fine to coarse"]


def test_a_probe_that_measured_nothing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("no")

    monkeypatch.setitem(PROBES, "shuffle", PROBES["shuffle"]._replace(action=refuse))
    with pytest.raises(UserError, match="no"):
        carry_out("shuffle", [spatial("a")], tmp_path / "p")
    assert not (tmp_path / "p").exists()

    def begin(_: Any, __: Any, folder: Path) -> Any:
        return kept(folder / "parts" / "x.json", refuse)

    monkeypatch.setitem(PROBES, "shuffle", PROBES["shuffle"]._replace(action=begin))
    with pytest.raises(UserError, match="no"):
        carry_out("shuffle", [spatial("a")], tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(UserError, match="files are named after it"):
        carry_out("shuffle", [spatial("a/b")], tmp_path / "p")
    for name in ("captions", " ", "a\nb"):
        with pytest.raises(UserError, match="would name other figures"):
            carry_out("shuffle", [spatial(name)], tmp_path / "p")
    with pytest.raises(UserError, match="a and b have the same tokenizers"):
        carry_out("shuffle", [spatial("a"), spatial("b")], tmp_path / "p")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(PROBES, "shuffle", PROBES["shuffle"]._replace(action=stop))
    with pytest.raises(KeyboardInterrupt):
        carry_out("shuffle", [spatial("a")], tmp_path / "p")
    assert not (tmp_path / "p").exists()  # other settings may begin there


def test_every_probe_has_a_module_of_its_name_that_says_what_is_asked() -> None:
    for name in PROBES:
        asks = import_module(f"ddt_llama.probes.{name}")
        assert asks.__doc__
        assert asks.LEGEND


def test_a_quick_probe_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEED", 5)
    plan = replace(Plan((0, 1)), pictures=48, held_out=16)
    short = replace(plan, course=plan.quick().course)
    monkeypatch.setattr(Plan, "quick", lambda plan: short)
    monkeypatch.setitem(PROBES, "shuffle", PROBES["shuffle"]._replace(plan=plan))
    first = carry_out("shuffle", [spatial("a")], tmp_path / "p", quick=True)
    assert first.verdict.startswith("(Quick")
    kept = load_json(tmp_path / "p" / "figures.json")
    assert kept["a.native"] == first.figures["a.native"].value
    assert (tmp_path / "p" / "a-2-seeds.png").is_file()
    page = (tmp_path / "p" / "README.md").read_text()
    assert "No model has a language" in page
    assert "Does the order of the tokens matter?" in page
    lesson = tmp_path / "p" / "lessons" / "a-fixed-1"
    trained = (lesson / "result.json").stat().st_mtime_ns
    elsewhere = spatial("a")  # on a machine whose encoder would find a few other codes
    monkeypatch.setattr(elsewhere.tokenizer, "encode", lambda images: 1 / 0)
    again = carry_out("shuffle", [elsewhere], tmp_path / "p", quick=True)
    assert again.figures == first.figures
    assert (lesson / "result.json").stat().st_mtime_ns == trained
    with pytest.raises(UserError, match="another probe"):
        carry_out("shuffle", [spatial("b")], tmp_path / "p", quick=True)
    further = spatial("a")  # of the same name, but trained on
    next(cast(Any, further.tokenizer).parameters()).data += 0.1
    with pytest.raises(UserError, match="weights"):
        carry_out("shuffle", [further], tmp_path / "p", quick=True)
    slower = spatial("a")  # of a release that decodes in other steps
    slower.settings = replace(slower.settings, steps=slower.settings.steps + 1)
    with pytest.raises(UserError, match="settings"):
        carry_out("shuffle", [slower], tmp_path / "p", quick=True)
    other = spatial("a")  # of the same weights, but not the same settings
    network = cast(Any, other.tokenizer)
    network.config = replace(network.config, image_size=network.config.image_size * 2)
    with pytest.raises(UserError, match="settings"):
        carry_out("shuffle", [other], tmp_path / "p", quick=True)


def test_a_quick_lesson_is_a_thirtieth() -> None:
    plan = Plan()
    short = plan.quick()
    assert short.course.train.steps * 30 == plan.course.train.steps
    assert short.course.train.optim.warmup < short.course.train.steps
    assert (short.pictures, short.held_out) < (plan.pictures, plan.held_out)
    assert len(short.seeds) == 2  # the fewest that have an interval
