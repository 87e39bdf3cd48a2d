"""How much padding packed rows leave on the real packs; skipped where they are not at hand."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddt_llama import load
from ddt_llama.language.batches import pack
from ddt_llama.recipes import LanguageRecipe, recipe_named
from ddt_llama.recipes.data import SHAPES, DataConfig
from ddt_llama.recipes.language import INSTRUCT, PRETRAIN, unencoded_documents

PACKS = Path(os.environ.get("DDT_DATA", Path(__file__).parents[4] / "shared" / "data"))
PARTS = (
    "natural64/*-train-00000.tar.gz",
    "emoji64/*-train-00003.tar.gz",
    "edit64/*-train-00001.tar.gz",
)


@pytest.mark.slow
@pytest.mark.parametrize("mix", [PRETRAIN, INSTRUCT], ids=["pretrain", "instruct"])
@torch.no_grad()
def test_less_than_three_in_a_hundred_places_of_packed_rows_are_padding(mix):
    if missing := [part for part in PARTS if not list(PACKS.glob(part))]:
        pytest.skip(f"no data {missing[0]} in {PACKS}; set DDT_DATA")
    nano = load("nano")
    recipe = recipe_named("nano_pretrain")
    assert isinstance(recipe, LanguageRecipe)
    assert nano.vocabulary is not None
    assert nano.text is not None
    data = DataConfig((SHAPES, *(str(PACKS / part) for part in PARTS)))
    recipe = replace(recipe, mix=mix, data=data, train=replace(recipe.train, batch=128))
    stream = unencoded_documents(recipe, 64, nano.vocabulary, nano.text, 512, False)
    batches = [stream(step).batch for step in range(8)]

    def padding(length: int, multiple: int = 1) -> float:
        rows = [pack(one, nano.vocabulary.pad, length, multiple) for one in batches]
        places = sum(one.ids.numel() for one in rows)
        return 1 - sum(int(one.attention_mask.sum()) for one in rows) / places

    alone = 1 - sum(int(one.attention_mask.sum()) for one in batches) / sum(
        one.ids.numel() for one in batches
    )
    assert alone > 0.3
    print(f"a document a row {alone:.3f}", {n: round(padding(n), 4) for n in (512, 1024, 2048)})
    assert padding(1024) < 0.03
    assert padding(2048, 64) < 0.03
