"""The speed bench: its plain loop is the engine's slow twin, and its figures are what they say."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.evaluation.bench import PROMPTS, bench_documents, bench_draw, counted, plain_codes
from ddt_llama.generation import Model
from ddt_llama.generation.engine import Codes
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
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
    assert model.engine is not None
    prompts: Sequence[list[int]] = [[256, 5, 9, 259], [256, 7, 259]]
    twins = [[256, 259]] * 2
    slow = plain_codes(model, prompts, twins, 2.0, [4, 5])
    tasks = [Codes(tuple(p), (256, 259), 2.0, seed=4 + i) for i, p in enumerate(prompts)]
    assert torch.equal(slow, torch.stack(model.engine.write(tasks)))
    assert not torch.equal(slow, plain_codes(model, prompts, twins, 2.0, [4, 6]))


def test_figures_are_consistent(model: Model) -> None:
    figures = bench_draw(model, batches=(1, 3), rounds=2)
    assert {key.rsplit(".", 1)[0] for key in figures} == {
        f"draw.{name}"
        for name in ("ratio", "engine_seconds", "plain_seconds", "image_seconds", "same_codes")
    }
    for size in (1, 3):
        assert figures[f"draw.same_codes.{size}"].value == 1.0
        ratio = figures[f"draw.ratio.{size}"]
        assert 0 < ratio.low <= ratio.value <= ratio.high
        plain, engine = (figures[f"draw.{name}_seconds.{size}"] for name in ("plain", "engine"))
        assert plain.low / engine.high <= ratio.value <= plain.high / engine.low


def test_one_round_has_no_interval(model: Model) -> None:
    ratio = bench_documents(model, rounds=1)
    assert (ratio.low, ratio.high) == (-math.inf, math.inf)


def test_codes_enter_laid_out_documents_faster_than_these_are_laid_out(model: Model) -> None:
    ratio = bench_documents(model, rounds=4)
    assert 1 < ratio.low <= ratio.value <= ratio.high


def test_wrong_batches_and_models_are_refused(model: Model) -> None:
    for batches, rounds in (((0,), 1), ((len(PROMPTS) + 1,), 1), ((), 1), ((1,), 0)):
        with pytest.raises(UserError, match="allowed are batches"):
            bench_draw(model, batches=batches, rounds=rounds)
    with pytest.raises(UserError, match="no language model"):
        bench_draw(Model(FlatTokenizer()), rounds=1)


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
