"""The recipes that exist, by name."""

import difflib
from collections.abc import Callable

from ddt_llama.config import UserError
from ddt_llama.recipes import finetuning, paper, renderer, rivals, sizes
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.renderer import RendererRecipe
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe

Recipe = TokenizerRecipe | SpatialRecipe | RendererRecipe | LanguageRecipe
_RECIPES: tuple[Callable[[], Recipe], ...] = (
    sizes.nano_tokenizer,
    sizes.nano_pretrain,
    sizes.nano_instruct,
    sizes.small_tokenizer,
    sizes.small_pretrain,
    sizes.small_instruct,
    sizes.base_tokenizer,
    sizes.base_pretrain,
    sizes.base_instruct,
    renderer.nano_renderer,
    renderer.small_renderer,
    paper.paper_tokenizer,
    paper.paper_pretrain,
    paper.paper_instruct,
    paper.paper_gemma_pretrain,
    paper.paper_gemma_instruct,
    paper.selftok_tokenizer_512,
    paper.selftok_tokenizer_1024,
    rivals.spatial_nano,
    rivals.spatial_small,
    rivals.spatial_base,
    finetuning.lora,
    finetuning.guidance_free,
)
BY_NAME = {function.__name__: function for function in _RECIPES}
NAMES = tuple(BY_NAME)


def recipe_named(name: str) -> Recipe:
    """Return the recipe of that name; UserError lists what exists, near names first."""
    if name in BY_NAME:
        return BY_NAME[name]()
    near = difflib.get_close_matches(name, NAMES, 3)
    others = [known for known in NAMES if known not in near]
    raise UserError(f"unknown recipe {name!r}; the recipes are: {', '.join([*near, *others])}")


def first_sentence(name: str) -> str:
    """Return what a recipe is, in one sentence."""
    return (BY_NAME[name].__doc__ or "").strip().splitlines()[0]
