"""Bytes of a pass on tensors without contents: closed forms, and what any batch must obey."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ddt_llama import distributed
from ddt_llama.config import load_json, override
from ddt_llama.language import Vocabulary
from ddt_llama.recipes import LanguageRecipe, recipe_named
from ddt_llama.recipes.cost import cost_of, longest_document, tokenizer_of, vocabulary_of
from ddt_llama.recipes.memory import (
    CHUNK,
    Held,
    _products,
    _Watch,
    batches,
    encoding,
    passed,
    sizes_of,
)
from ddt_llama.recipes.plan import between
from ddt_llama.tokenizer.latents import VaeLatents
from ddt_llama.training.muon import orthogonal

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "plan_memory.py"
SMALL = {
    "tokenizer.encoder.dim": 80,
    "tokenizer.encoder.depth": 1,
    "tokenizer.decoder.dim": 80,
    "tokenizer.decoder.depth": 2,
}


def tokenizer(**fields: Any) -> Any:
    return override(recipe_named("nano_tokenizer"), {**SMALL, **fields})


def language(**fields: Any) -> LanguageRecipe:
    found = override(recipe_named("nano_pretrain"), {"backbone.depth": 2, **fields})
    assert isinstance(found, LanguageRecipe)
    return found


def total(moments: Any) -> float:
    return max(sum(moment) for moment in moments)


def test_a_linear_map_and_a_square_hold_what_they_must() -> None:
    """Output and its square; then their gradients, each as soon as it is needed."""
    rows, dim = 32, 64
    with FakeTensorMode():
        model = nn.Linear(dim, dim, bias=False)
        x = torch.zeros(rows, dim)
        with _Watch(model, rows=0, last=0) as watch:
            loss = model(x).square().sum()
            watch.turn_page()
            loss.backward()
            watch.turn_page()
    forward, to_gradient, end = watch.pages
    assert forward == Held(activations=2 * 4 * rows * dim + 4)  # and the loss
    assert sum(to_gradient) >= 4 * (rows * dim + dim * dim)
    assert end == Held(activations=end.activations, gradients_outside=4 * dim * dim)
    assert end.activations <= 4 * rows * dim + 8


@pytest.mark.parametrize("name", ["nano_tokenizer", "nano_pretrain", "spatial_nano"])
def test_parameters_are_those_of_the_cost(name: str) -> None:
    recipe = recipe_named(name)
    sizes, known = sizes_of(recipe), cost_of(recipe).parameters
    codebook = known.get("codebook (by moving average)", 0)
    assert sizes.parameters == sizes.trained == sum(known.values()) - codebook
    assert sizes.largest <= sizes.blocks
    assert 0 < sizes.muon < sizes.trained
    assert sizes.buffers >= 4 * codebook


def test_of_a_renderer_only_its_own_weights_learn() -> None:
    recipe = recipe_named("nano_renderer")
    sizes, known = sizes_of(recipe), cost_of(recipe).parameters
    assert sizes.trained == known["renderer"]
    assert sizes.parameters == known["encoder"] + known["decoder"] + known["renderer"]
    end = passed(recipe, 2, kind="cuda", recompute="none", bf16=True).moments[-1]
    assert end.gradients + end.gradients_outside == 4 * sizes.trained


def test_gradients_are_all_there_at_the_end_of_a_pass() -> None:
    for recipe in (tokenizer(), language()):
        sizes = sizes_of(recipe)
        end = passed(recipe, 4, kind="cpu", recompute="none", bf16=False).moments[-1]
        assert end.gradients == 4 * sizes.blocks
        assert end.gradients_outside == 4 * sizes.outside


@pytest.mark.parametrize("recipe", [tokenizer(), language()], ids=["tokenizer", "language"])
def test_what_is_computed_again_is_not_held(recipe: Any) -> None:
    none, selective, blocks = (
        total(passed(recipe, 16, kind="cuda", recompute=kind, bf16=True).moments)
        for kind in ("none", "selective", "blocks")
    )
    assert blocks < selective < none


def test_bfloat16_halves_what_products_need_and_copies_weights() -> None:
    recipe = language()
    exact, low = (
        passed(recipe, 8, kind="cuda", recompute="none", bf16=bf16).moments
        for bf16 in (False, True)
    )
    assert max(moment.copies for moment in exact) == 0
    # Norms are kept in float32, all matrices are copied.
    matrices = sizes_of(recipe).muon
    assert max(moment.copies for moment in low) >= 2 * matrices
    assert max(m.activations for m in low) < max(m.activations for m in exact)


def test_a_gpu_keeps_no_matrix_of_attention() -> None:
    """Sixteen times the patches: on a CPU attention's squares outgrow all the rest."""
    held = {}
    for kind in ("cpu", "cuda"):
        few, many = (
            total(passed(recipe, 2, kind=kind, recompute="none", bf16=False).moments)
            for recipe in (tokenizer(), tokenizer(**{"tokenizer.image_size": 256}))
        )
        held[kind] = many / few
    assert held["cuda"] < 16 < held["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [tokenizer(), language()], ids=["tokenizer", "language"])
def test_any_batch_lies_on_the_lines_between_known_ones(recipe: Any) -> None:
    known = [
        passed(recipe, batch, kind="cuda", recompute="none", bf16=True) for batch in batches(recipe)
    ]
    _, one, two, more = batches(recipe)
    for batch in (one // 2, (one + two) // 2, (two + more) // 2, 2 * more):
        true = total(passed(recipe, batch, kind="cuda", recompute="none", bf16=True).moments)
        assert total(between(known, batch)) == pytest.approx(true, rel=0.05)


def test_the_longest_document_is_counted_in_marks_text_and_codes() -> None:
    vocabulary = Vocabulary(100, 64, 16)
    only = language(**{"mix.plan": 0.0, "mix.text_only": 1.0, "max_text": 20})
    assert longest_document(only, vocabulary) == 1 + 20 + 1 + 16 + 2  # BOS caption [ codes ] EOS
    padded = language(**{"mix.plan": 0.0, "max_text": 20, "pad_multiple": 32})
    assert longest_document(padded, vocabulary) == 64
    instructions = override(recipe_named("nano_instruct"), {"max_text": 20})
    assert isinstance(instructions, LanguageRecipe)
    # BOS USER: [ codes ] question ASSISTANT: answer EOS
    assert longest_document(instructions, vocabulary) == 1 + 1 + 18 + 20 + 1 + 20 + 1


def test_pictures_on_their_way_to_codes_are_counted() -> None:
    recipe = language()
    picture = 4 * 3 * 64**2
    assert encoding(recipe, "cuda") > CHUNK["cuda"] * picture
    assert encoding(recipe, "cuda") > 4 * encoding(recipe, "cpu")
    frozen = sizes_of(tokenizer_of(recipe))
    assert sizes_of(recipe).frozen == 4 * frozen.parameters + frozen.buffers


def test_a_vae_that_is_not_there_is_the_one_of_sd3() -> None:
    fields = {"tokenizer.encoder.depth": 1, "tokenizer.decoder.depth": 1}
    recipe: Any = override(recipe_named("paper_tokenizer"), fields)
    assert isinstance(recipe.tokenizer.latents, VaeLatents)
    assert sizes_of(recipe).frozen == 4 * 83_819_683  # diffusers' own count of its parameters
    held = total(passed(recipe, 1, kind="cuda", recompute="none", bf16=True).moments)
    assert held > 4 * 128 * 256**2  # one map of its first stage


def test_muons_products_are_counted_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "has_bf16", lambda device: False)
    shapes = [(8, 16)] * 3 + [(4, 4)]
    assert _products(shapes) == 3 * (3 * 8 * 16 + 2 * 8 * 8)
    with FakeTensorMode():
        matrices = [torch.zeros(256, 1024) for _ in range(20)]
        with _Watch(nn.Linear(1, 1), rows=0, last=0) as watch:
            orthogonal(matrices)
            watch.turn_page()
    counted = 4 * _products([(256, 1024)] * 20)
    assert sum(watch.pages[0]) == pytest.approx(counted, rel=0.05)


def test_vocabularies_are_those_of_the_tokenizer_of_the_size() -> None:
    recipe = language()
    network = tokenizer_of(recipe).build()
    assert vocabulary_of(recipe).num_tokens == network.num_tokens


# Of about 0.5, 1.7 and 3.4 GB; the others are in experiments/0051.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", ["spatial, small", "tokenizer, middle", "AdamW, few documents"])
def test_a_training_takes_what_was_planned(case: str, tmp_path: Path) -> None:
    if not Path("/proc/self/statm").is_file():
        pytest.skip("this system does not say what a process holds")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--case", case, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert 0.85 < load_json(out)[case]["ratio"] < 1.15


def test_what_is_frozen_or_not_averaged_holds_less() -> None:
    whole = recipe_named("lora")
    assert isinstance(whole, LanguageRecipe)
    adapted, all_of_it = sizes_of(whole), sizes_of(override(whole, {"lora": None}))
    learning = cost_of(whole).parameters["adapter"]
    assert adapted.trained == adapted.averaged == learning < all_of_it.trained / 10
    assert adapted.parameters == all_of_it.parameters + learning
    assert sizes_of(override(whole, {"train.ema": 0.0})).averaged == 0
