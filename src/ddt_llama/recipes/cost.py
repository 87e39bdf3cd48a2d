"""What a recipe costs before it is run, and how its rival's tokenizer compares."""

from dataclasses import replace

import torch

from ddt_llama.language import Vocabulary, backbone
from ddt_llama.recipes.formulas import BFLOAT16, FLOAT32, STATES, Cost, count, document_flops
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.named import Recipe, recipe_named
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe

TEXT = 24  # ids of a usual caption with its marks


def cost_of(recipe: Recipe) -> Cost:
    """Return what a recipe costs, beside its rival where it has one; needs no data, no memory."""
    if isinstance(recipe, LanguageRecipe):
        return language_cost(recipe)
    own = recipe.cost()
    if recipe.rival is None:
        return own
    rival = cost_of(recipe_named(recipe.rival))
    assert own.bits is not None
    assert rival.bits is not None
    return replace(
        own,
        beside={
            f"bits an image, of {recipe.rival}'s": own.bits / rival.bits,
            f"parameters, of {recipe.rival}'s": sum(own.parameters.values())
            / sum(rival.parameters.values()),
            f"FLOPs in training, of {recipe.rival}'s": own.learn / rival.learn,
        },
    )


def language_cost(recipe: LanguageRecipe) -> Cost:
    """Return the cost of a language model over the tokenizer of its size.

    `draw` counts the two rows of guidance; a document is a caption of 24 ids and an image.
    """
    config, vocabulary = recipe.backbone, vocabulary_of(recipe)
    model = backbone.build(config, vocabulary, device="meta")
    total = count(model)
    rows = vocabulary.size * config.dim * (1 if config.tied else 2)
    length = TEXT + vocabulary.num_tokens
    token = backbone.flops_per_token(config, vocabulary, (length + 1) // 2)
    batch, learn = recipe.train.batch, document_flops(model, length)
    kept = config.depth * (8 * config.dim + 3 * config.mlp_dim) * BFLOAT16
    logits = 3 * FLOAT32 * vocabulary.size
    return Cost(
        {"embedding and head": rows, "layers": total - rows},
        {
            "draw an image": 2 * length * token,
            "train on a document": learn,
        },
        {
            "weights": FLOAT32 * total,
            "gradients, optimizer, average": FLOAT32 * STATES * total,
            f"activations of {batch} documents (estimate)": batch * length * (kept + logits),
        },
        learn,
    )


def vocabulary_of(recipe: LanguageRecipe) -> Vocabulary:
    """Return the vocabulary over the tokenizer recipe of the same size."""
    with torch.device("meta"):
        network = tokenizer_of(recipe).build(begins=False)
    return Vocabulary(recipe.text_vocab, network.codebook_size, network.num_tokens)


def tokenizer_of(recipe: LanguageRecipe) -> TokenizerRecipe | SpatialRecipe:
    """Return the tokenizer recipe of the same size."""
    tokenizer = recipe_named(f"{recipe.name.partition('_')[0]}_tokenizer")
    assert not isinstance(tokenizer, LanguageRecipe)
    return tokenizer
