"""Recipes by name: complete, JSON-able, changeable, and a clear list where a name is wrong."""

import json

import pytest

from ddt_llama.config import UserError, from_dict, override, to_dict
from ddt_llama.recipes import NAMES, LanguageRecipe, Mix, recipe_named
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.named import first_sentence


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_json_and_knows_its_name(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.name == name
    assert from_dict(type(recipe), json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert first_sentence(name).endswith((".", ":"))


@pytest.mark.parametrize("size", ["nano", "small", "base", "paper"])
def test_the_second_stage_goes_on_from_the_first(size: str) -> None:
    first, second = recipe_named(f"{size}_pretrain"), recipe_named(f"{size}_instruct")
    assert isinstance(first, LanguageRecipe)
    assert isinstance(second, LanguageRecipe)
    assert second.start == f"runs/{size}_pretrain"
    assert first.tokenizer == f"runs/{size}_tokenizer"
    assert second.backbone == first.backbone
    assert second.train.optim.lr <= first.train.optim.lr
    assert (first.mix.draw, second.mix.text_to_image) == (0, 0)


def test_an_unknown_name_lists_what_exists_near_names_first() -> None:
    with pytest.raises(UserError) as caught:
        recipe_named("nano_tokeniser")
    message = str(caught.value)
    assert "'nano_tokeniser'" in message
    assert message.index("nano_tokenizer") < message.index("paper_tokenizer")
    assert all(name in message for name in NAMES)


def test_any_field_can_be_changed_by_its_dotted_name() -> None:
    recipe = override(
        recipe_named("nano_instruct"),
        {"mix.draw": "2", "data.paths": "a,b", "train.optim.lr": "1e-5", "start": "elsewhere"},
    )
    assert isinstance(recipe, LanguageRecipe)
    assert (recipe.mix.draw, recipe.data.paths) == (2.0, ("a", "b"))
    assert (recipe.train.optim.lr, recipe.start) == (1e-5, "elsewhere")


@pytest.mark.parametrize(
    "changes",
    [
        {"data.paths": "[]"},
        {"data.weights": "1,2"},
        {"data.max_objects": "7"},
        {"data.scenes": "0"},
        {"drop_text": "1.5"},
        {"max_text": "0"},
        {"stage": "third"},
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(changes)).rpartition(".")[2]):
        override(recipe_named("nano_pretrain"), changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.patch": "0"},
        {"tokenizer.pieces": "[]"},
        {"tokenizer.encoder.num_heads": "7"},
        {"tokenizer.decoder.dim": "0"},
        {"tokenizer.quantizer.codebook_size": "0"},
        {"tokenizer.quantizer.decay": "1.5"},
        {"objective.probe_every": "0"},
        {"objective.draws": "0"},
        {"objective.drop_tokens": "1.5"},
        {"objective.commitment": "-1"},
        {"train.optim.betas": "1.5,0.9"},
        {"train.optim.lr": "inf"},
        {"data.broken_share": "2"},
    ],
)
def test_a_tokenizer_out_of_range_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"given|at least|sum to 1") as error:
        override(recipe_named("nano_tokenizer"), changes)
    assert "\n" not in str(error.value)


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="mix"):
        Mix()
    with pytest.raises(UserError, match="mix"):
        Mix(draw=-1.0, ask=1.0)


def test_without_weights_all_paths_count_alike() -> None:
    assert DataConfig(paths=("shapes", "a")).shares == (1.0, 1.0)
    assert DataConfig(paths=("shapes", "a"), weights=(3, 1)).shares == (3, 1)
