"""Complete descriptions of trainings, as functions; `run` carries one out.

`recipe_named` finds a recipe by name; variants are made by `config.override` or `replace`.
"""

from ddt_llama.recipes.language import LanguageRecipe, Mix
from ddt_llama.recipes.named import NAMES, Recipe, recipe_named
from ddt_llama.recipes.renderer import RendererRecipe
from ddt_llama.recipes.run import Trained, run
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe

__all__ = [
    "NAMES",
    "LanguageRecipe",
    "Mix",
    "Recipe",
    "RendererRecipe",
    "SpatialRecipe",
    "TokenizerRecipe",
    "Trained",
    "recipe_named",
    "run",
]
