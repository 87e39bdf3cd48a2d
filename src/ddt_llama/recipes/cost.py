"""What a recipe costs before it is run, and how its rival's tokenizer compares."""

from dataclasses import replace

import torch

from ddt_llama.config import UserError
from ddt_llama.generation.release import RELEASES
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, documents, lora, render
from ddt_llama.recipes.formulas import BFLOAT16, FLOAT32, STATES, Cost, count, document_flops
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.named import Recipe, recipe_named
from ddt_llama.recipes.renderer import RendererRecipe
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe

TEXT = 24  # ids of a usual caption with its marks


def cost_of(recipe: Recipe) -> Cost:
    """Return what a recipe costs, beside its rival where it has one; needs no data, no memory."""
    if isinstance(recipe, LanguageRecipe):
        return language_cost(as_started(recipe))
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


def as_started(recipe: LanguageRecipe) -> LanguageRecipe:
    """Return a recipe that fine-tunes with the sizes of what it starts from; others as they are.

    Raises UserError where the sizes of a start are not known here.
    """
    if recipe.lora is None and recipe.alignment is None:
        return recipe
    if recipe.start not in RELEASES:
        raise UserError(f"start: given {recipe.start}; costs are known for {', '.join(RELEASES)}")
    known = recipe_named(f"{recipe.start}_pretrain")
    assert isinstance(known, LanguageRecipe)
    return replace(recipe, backbone=known.backbone, text_vocab=known.text_vocab)


def language_cost(recipe: LanguageRecipe) -> Cost:
    """Return the cost of a language model over the tokenizer of its size, or of `start`'s.

    `draw` counts the two rows of guidance, one where a model is aligned to need none; a document is
    a caption of 24 ids and an image.
    """
    config, vocabulary = recipe.backbone, vocabulary_of(recipe)
    model = backbone.build(config, vocabulary, device="meta")
    total = count(model)
    rows = vocabulary.size * config.dim * (1 if config.tied else 2)
    length = TEXT + vocabulary.num_tokens
    token = backbone.flops_per_token(config, vocabulary, (length + 1) // 2)
    beside = None if recipe.lora is None else lora.count(model, recipe.lora, vocabulary)
    batch, learn = recipe.train.batch, document_flops(model, length, beside, recipe.twice)
    kept = config.depth * (8 * config.dim + 3 * config.mlp_dim) * BFLOAT16
    logits = 3 * FLOAT32 * vocabulary.size
    adapter = {} if beside is None else {"adapter": beside}
    documents = batch * (1 + recipe.twice)
    return Cost(
        {"embedding and head": rows, "layers": total - rows, **adapter},
        {
            "draw an image": (1 if recipe.alignment else 2) * length * token,
            "train on a document": learn,
        },
        {
            "weights": FLOAT32 * (total + (beside or 0)),
            **({"frozen copy": FLOAT32 * total} if recipe.alignment else {}),
            "gradients, optimizer, average": FLOAT32 * STATES * (beside or total),
            f"activations of {batch} documents (estimate)": documents * length * (kept + logits),
        },
        learn,
    )


def vocabulary_of(recipe: LanguageRecipe) -> Vocabulary:
    """Return the vocabulary over the tokenizer recipe of the same size."""
    with torch.device("meta"):
        network = tokenizer_of(recipe).build(begins=False)
    return Vocabulary(recipe.text_vocab, network.codebook_size, network.num_tokens)


def tokenizer_of(recipe: LanguageRecipe) -> TokenizerRecipe | SpatialRecipe:
    """Return the tokenizer recipe of the same size, or of the size of `start`."""
    size = recipe.start if recipe.start in RELEASES else recipe.name.partition("_")[0]
    tokenizer = recipe_named(f"{size}_tokenizer")
    assert not isinstance(tokenizer, LanguageRecipe | RendererRecipe)
    return tokenizer


def longest_document(recipe: LanguageRecipe, vocabulary: Vocabulary) -> int:
    """Return the ids of the longest document of a recipe, with texts of `max_text` ids."""
    codes, text = [0] * vocabulary.num_tokens, "word " * recipe.max_text
    kinds = {
        "text_to_image": documents.text_to_image(text, codes),
        "image_to_text": documents.image_to_text(codes, text),
        "image_only": documents.image_only(codes),
        "text_only": documents.text_only(text),
        "draw": documents.draw(text, codes),
        "edit": documents.edit(codes, text, codes),
        "ask": documents.ask(codes, text, text),
        "describe": documents.describe(codes, text),
        "plan": documents.plan(text, text),
    }
    words = _Words()
    longest = max(
        len(render(document, vocabulary, words, max_text=recipe.max_text).ids)
        for name, document in kinds.items()
        if getattr(recipe.mix, name)
    )
    padded = -(-longest // recipe.pad_multiple) * recipe.pad_multiple
    return min(padded, recipe.backbone.max_positions)


class _Words(TextTokenizer):
    """One id a word, whichever."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())
