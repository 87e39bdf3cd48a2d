"""The speed bench: its plain loop is the engine's slow twin, and its figures are what they say."""

import importlib.util
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError
from ddt_llama.evaluation import large, writing
from ddt_llama.evaluation.bench import (
    Requests,
    decoding,
    drawing,
    generated_codes,
    laying_out,
    plain_codes,
    requests,
)
from ddt_llama.evaluation.flops import counted
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.large import LLAMA_3
from ddt_llama.evaluation.race import Race, median, run
from ddt_llama.evaluation.writing import narrowing, previewing
from ddt_llama.generation import Model
from ddt_llama.generation.batch import write
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.recipes.bench import learning_language, measure
from stand_in import StandIn


class FlatTokenizer(StandIn):
    """Every image is the grey of its first code."""

    num_tokens, codebook_size, image_size = 6, 32, 8
    refines = prefixes = False

    def encode(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3)).mul(31).long()[:, None].repeat(1, 6)

    def decode(self, codes: Tensor, *, steps: int = 8, seed: Any = 0, **_: Any) -> Tensor:
        return (codes[:, :1, None, None] / 31).repeat(1, 3, 8, 8)

    def code_vectors(self) -> Tensor:
        return torch.eye(self.codebook_size)


@pytest.fixture(scope="module")
def model() -> Model:
    vocabulary = Vocabulary(256, FlatTokenizer.codebook_size, FlatTokenizer.num_tokens)
    shape = BackboneConfig(dim=32, depth=2, num_heads=2, num_kv_heads=2, mlp_dim=48, init_std=0.3)
    text = TextTokenizer.train(["a red circle"], 256)
    return Model(FlatTokenizer(), backbone.build(shape, vocabulary).eval(), vocabulary, text)


def test_the_plain_loop_draws_what_the_engine_draws(model: Model) -> None:
    asked = Requests([[256, 5, 9, 259], [256, 7, 259]], [[256, 259]] * 2, [4, 5])
    slow = plain_codes(model, asked)
    assert model.engine is not None
    assert torch.equal(slow, torch.stack(write(model.engine, asked.tasks())))
    assert not torch.equal(slow, plain_codes(model, replace(asked, seeds=[4, 6])))


def test_transformers_draws_codes_too(model: Model) -> None:
    codes = generated_codes(model, requests(model, 3))
    assert codes.shape == (3, 6)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 32


def test_figures_are_consistent(model: Model) -> None:
    figures = drawing(model, 3, rounds=2)
    names = {"vs_plain", "vs_transformers", "seconds", "same_codes"}
    assert set(figures) == {f"draw.b3.{name}" for name in names} | {"token.b3.vs_bandwidth"}
    assert figures["draw.b3.same_codes"].value == 1.0
    for name in ("draw.b3.vs_plain", "token.b3.vs_bandwidth"):
        assert 0 < figures[name].low <= figures[name].value <= figures[name].high
    assert decoding(model, 1) == {}  # nothing to refine


def test_weights_in_fewer_bits_are_timed_and_weighed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "has_bf16", lambda device: True)
    monkeypatch.setattr(writing, "LARGE", BackboneConfig(dim=64, depth=1, mlp_dim=96))
    figures = narrowing(model, 2)
    kinds = {"bfloat16": 0.5}
    if importlib.util.find_spec("torchao"):
        kinds["int8"] = 0.25
    names = {"float32.b1.seconds", "float32.b8.seconds"}
    for kind in kinds:
        names |= {f"{kind}.b{n}.{what}" for n in (1, 8) for what in ("vs_float32", "seconds")}
        names |= {f"{kind}.bytes"}
    assert set(figures) == {f"{of}.{name}" for of in ("weights", "weights.large") for name in names}
    for kind, share in kinds.items():  # and a scale of four bytes a row
        assert share <= figures[f"weights.large.{kind}.bytes"].value < share + 0.02
        ratio = figures[f"weights.{kind}.b8.vs_float32"]
        assert 0 < ratio.low <= ratio.value <= ratio.high
    monkeypatch.setattr(distributed, "has_bf16", lambda device: False)
    assert all(".float32." in name for name in narrowing(model, 1))


def test_a_preview_costs_what_it_takes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of six tokens, looked at every two: each is shown when two and four are there."""
    monkeypatch.setattr(writing, "EVERY", 2)
    shown = []

    def slow(codes: Tensor, seeds: Any) -> Tensor:
        shown.append((tuple(codes.shape), list(seeds)))
        time.sleep(0.2)
        return codes

    monkeypatch.setattr(model, "unfinished", slow)
    figure = previewing(model, 2, 1)["draw.b2.vs_no_preview"]
    assert shown == [((2, 2), [0, 1]), ((2, 4), [0, 1])] * 2  # once to warm up
    assert figure.value < 0.9


def test_a_ratio_is_of_one_round_and_one_round_has_no_interval() -> None:
    waits = {"slow": iter((0.0, 0.05, 0.02)), "fast": iter((0.0, 0.01, 0.01))}
    ways = {name: partial(lambda one: time.sleep(next(one)), wait) for name, wait in waits.items()}
    race = Race(ways, {"ratio": ("slow", "fast")}, {"seconds": "fast"})
    figures = run(race, torch.device("cpu"), 2, "sleep")
    assert figures["ratio"].low < 3 < figures["ratio"].high
    assert figures["seconds"].low >= 0.01
    assert median([2.0]) == Figure(2.0, -math.inf, math.inf)


def test_codes_enter_laid_out_documents_faster_than_these_are_laid_out(model: Model) -> None:
    assert laying_out(model, 5)["documents.late_codes.vs_laid_out"].value > 1


def test_a_step_of_training_is_less_than_all_products(model: Model) -> None:
    ratio = learning_language(model, 3)["train.language.vs_products"]
    assert 0 < ratio.value < 1
    before = {name: one.clone() for name, one in model.language.state_dict().items()}
    learning_language(model, 1)  # a copy learns, the model stays
    assert all(torch.equal(one, before[n]) for n, one in model.language.state_dict().items())


def test_a_tokenizer_alone_draws_nothing() -> None:
    with pytest.raises(UserError, match="no language model"):
        measure(Model(FlatTokenizer()), quick=True)


def test_large_models_and_pictures_are_timed_by_their_shapes() -> None:
    vocabulary = Vocabulary(text_size=95, codebook_size=64, num_tokens=8)
    sizes = {"wide": BackboneConfig(dim=64, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=96)}
    figures = large.writing(torch.device("cpu"), 2, sizes, vocabulary)
    assert set(figures) == {"wide.image_seconds", "wide.token.vs_bandwidth"}
    assert all(0 < figure.low <= figure.value <= figure.high for figure in figures.values())
    told = large.round_trip(FlatTokenizer(), torch.device("cpu"), 2)
    assert list(told) == [f"tokenizer_8.round_trip.s{steps}.seconds" for steps in (1, 8)]


def test_models_of_the_bench_have_the_weights_that_they_are_named_for() -> None:
    counts = [backbone.count_parameters(one, LLAMA_3) for one in large.SIZES.values()]
    rows = LLAMA_3.codebook_size * 2048, 2 * LLAMA_3.codebook_size * 4096
    billions = [(count - added) / 1e9 for count, added in zip(counts, rows, strict=True)]
    assert billions == pytest.approx([1.24, 8.03], abs=0.01)  # as they are published


def test_flops_of_products_attention_and_convolutions_are_counted() -> None:
    linear, conv = torch.nn.Linear(7, 11), torch.nn.Conv2d(3, 5, 3, padding=1)
    for module in (linear, conv):
        module.requires_grad_(False)
    x, q, k = torch.zeros(2, 13, 7), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 9, 8)
    assert counted(lambda: linear(x)) == 2 * (2 * 13) * 7 * 11
    attend = torch.nn.functional.scaled_dot_product_attention
    assert counted(lambda: attend(q, k, k)) == 2 * 2 * (2 * 3 * 5 * 9 * 8)
    assert counted(lambda: conv(torch.zeros(2, 3, 6, 6))) == 2 * 2 * 36 * (3 * 9) * 5
    assert counted(lambda: torch.zeros(4) + 1) == 0
