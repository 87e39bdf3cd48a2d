"""What a training begins with: its weights, its vocabulary, what it was before.

Below `jobs`. Refuses models and checkpoints that cannot be trained on, and writes nothing.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddt_llama.checkpoint import load_into, load_tensors
from ddt_llama.config import UserError, from_dict
from ddt_llama.generation.history import NEW, History, history_of
from ddt_llama.generation.model import Model
from ddt_llama.generation.release import RELEASES, description, find
from ddt_llama.generation.settings import Settings
from ddt_llama.language import TextTokenizer, Vocabulary, lora, render
from ddt_llama.language.documents import ask, edit, plan
from ddt_llama.recipes.drafts import texts
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe
from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer, Tokenizer
from ddt_llama.tokenizer.quantizer import keep_codes
from ddt_llama.training.sharding import is_sharded

RELEASE = "release"


def release_of(path: str | Path, what: str) -> Path:
    """Return the release folder of a run, of a name such as "nano", or `path` where it is one.

    Raises UserError that names the command to make one.
    """
    place = find(path) if str(path) in RELEASES else Path(path)
    for folder in (place / RELEASE, place):
        if (folder / "tokenizer" / "config.json").is_file():
            return folder
    raise UserError(
        f"{what}: {str(path) or 'nothing'} is no run or release with an image tokenizer; train it "
        f"first (ddt train ..._tokenizer) or give its folder with --{what}"
    )


def described_as(release: Path, tokenizer: Tokenizer) -> Model:
    """Return a model of this tokenizer alone that says of itself what `release` says."""
    told = description(release)
    settings = from_dict(Settings, told.get("generation", {}), "generation.")
    stage, name = told.get("stage", "instruct"), str(told.get("name", release.name))
    model = Model(tokenizer, settings=settings, stage=stage, name=name)
    model.history = history_of(release)
    return model


def tokenizer_model(
    recipe: TokenizerRecipe | SpatialRecipe, begun: Path | None
) -> TimestepTokenizer | SpatialTokenizer:
    """Build the network of a recipe, with the weights that `begun` holds or the recipe names."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.train.seed)  # and no GPU's
        model = recipe.build(begun is None)
    folder = begun
    if folder is None and recipe.start is not None:
        folder = release_of(recipe.start, "start") / "tokenizer"
    if folder is not None:
        source = folder / "model.safetensors"
        tensors = load_tensors(source)
        if recipe.keep_codes:
            refuse_larger_codebook(tensors, recipe.tokenizer.quantizer.codebook_size)
        grow_codebook(tensors, recipe.tokenizer.quantizer.codebook_size)
        load_into(model, tensors, source)
    recipe.equip(model)
    if recipe.keep_codes:
        keep_codes(model)
    return model


def refuse_larger_codebook(tensors: Mapping[str, Tensor], size: int) -> None:
    """Raise UserError where kept codes would have to grow: nothing would fill the new ones."""
    known = tensors.get("quantizer.codebook")
    if known is not None and len(known) < size:
        raise UserError(
            f"keep_codes: codebook_size {size} given, there are {len(known)} codes to keep; give "
            "that size, or leave keep_codes out"
        )


def grow_codebook(tensors: dict[str, Tensor], size: int) -> None:
    """Add codes of zeros up to `size`; the quantizer fills them from the first batches."""
    for name in ("quantizer.codebook", "quantizer.lengths"):
        known = tensors.get(name)
        if known is not None and len(known) < size:
            added = known.new_zeros(size - len(known), *known.shape[1:])
            tensors[name] = torch.cat([known, added])


def language_start(recipe: LanguageRecipe) -> Path | None:
    """Return the language folder to start from, None for a new model."""
    if recipe.start is None:
        if recipe.stage == "instruct":
            raise UserError("start: stage instruct goes on from a pretrained run; give --start RUN")
        return None
    start = find(recipe.start) if recipe.start in RELEASES else Path(recipe.start)
    for folder in (start / RELEASE / "language", start / "language", start):
        if (folder / "config.json").is_file():
            return folder
    remedy = "train it first (ddt train ..._pretrain) or give its folder with --start"
    if recipe.stage == "pretrain":
        remedy = (
            "give the local Hugging Face folder of a causal LM with --start (or put it there), or "
            "begin with random weights: --start none"
        )
    raise UserError(f"start: {start} is no run, release or language model; {remedy}")


def history_at(start: Path | None) -> History:
    """Return the trainings of a language model to start from: unknown of a foreign one."""
    if start is None:
        return NEW
    ours = (start / "vocabulary.json").is_file()
    return history_of(start.parent).of("language") if ours else History()


def text_side(
    recipe: LanguageRecipe, start: Path | None, tokenizer: Tokenizer
) -> tuple[TextTokenizer, Vocabulary]:
    """Return text tokenizer and vocabulary: those of `start`, or new ones for the data."""
    size, count = tokenizer.codebook_size, tokenizer.num_tokens
    if start is None and recipe.text is not None:
        text = TextTokenizer.load(recipe.text)
        return text, Vocabulary(text.size, size, count)
    if start is None:
        known = texts(recipe.data, tokenizer.image_size, recipe.text_samples)
        text = TextTokenizer.train(known, recipe.text_vocab)
        return text, Vocabulary(text.size, size, count)
    text = TextTokenizer.load(start)
    if not (start / "vocabulary.json").is_file():
        from ddt_llama.language import backbone

        rows = backbone.text_rows(start)
        if text.size > rows:
            raise UserError(
                f"start: {start} has a text tokenizer of {text.size} ids and an embedding of "
                f"{rows} rows; give a folder whose parts belong together"
            )
        return text, Vocabulary(rows, size, count)
    vocabulary = Vocabulary.load(start)
    if (vocabulary.codebook_size, vocabulary.num_tokens) != (size, count):
        raise UserError(
            f"start: {start} was trained on {vocabulary.num_tokens} codes of "
            f"{vocabulary.codebook_size}, the tokenizer gives {count} of {size}; take both from "
            "the same run"
        )
    return text, vocabulary


def language_model(
    recipe: LanguageRecipe,
    start: Path | None,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    tokenizer: Tokenizer,
) -> tuple[Any, Any]:
    """Return the model and, where that is empty because it will be in shards, its weights."""
    from ddt_llama.language import backbone, streaming
    from ddt_llama.language.codes import place_codes
    from ddt_llama.language.heads import look_back

    seed = recipe.train.seed
    if start is None:
        model = backbone.build(recipe.backbone, vocabulary, seed=seed)
        if recipe.code_start == "codebook":
            place_codes(model, vocabulary, tokenizer.code_vectors(), seed)
        if recipe.look_back:
            look_back(model, seed)
        return model, None
    if is_sharded(recipe.train.shard):
        return streaming.open_empty(start, vocabulary, text)
    if not (start / "vocabulary.json").is_file():
        return backbone.grow(start, vocabulary, seed=seed), None
    return backbone.load(start).model, None


def positions(model: Any) -> int:
    """Return how many ids a model can read; UserError where its config does not say."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        raise UserError(
            f"start: a {config.model_type} model does not say how many positions it has "
            "(max_position_embeddings); choose one that does, such as a Llama, Qwen or Gemma"
        )
    return int(most)


def check_room(most: int, max_text: int, vocabulary: Vocabulary, text: TextTokenizer) -> None:
    """Raise UserError for a model of `most` positions where some document would find no room."""
    blank = [0] * vocabulary.num_tokens
    texts_of = {"edit": 1, "ask": 2, "plan": 2}
    longest = {
        kind: len(render(document, vocabulary, text).ids) + texts_of[kind] * max_text
        for kind, document in (
            ("edit", edit(blank, "", blank)),
            ("ask", ask(blank, "", "")),
            ("plan", plan("", "")),
        )
    }
    kind = max(longest, key=longest.__getitem__)
    if most < longest[kind]:
        raise UserError(
            f"backbone.max_positions: given {most}; a document of kind {kind!r} may have "
            f"{longest[kind]} ids, with pictures of {vocabulary.num_tokens} codes and texts of up "
            f"to {max_text}; give --backbone.max-positions {longest[kind]} or more (of a model to "
            "start from it is fixed: choose another), or a smaller --max-text"
        )


def reference(recipe: LanguageRecipe, model: Any) -> Any:
    """Return a frozen copy of what an alignment starts from, None for other trainings."""
    if recipe.alignment is None:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def put_beside(
    recipe: LanguageRecipe, start: Path | None, model: Any, vocabulary: Vocabulary
) -> int | None:
    """Freeze a model that LoRA is to teach, with its adapters in place; return what they count.

    Raises UserError where rows that were drawn at random would stay so.
    """
    if recipe.lora is None:
        return None
    ours = start is None or (start / "vocabulary.json").is_file()
    if not recipe.lora.rows and not ours:
        new = vocabulary.size - vocabulary.text_size
        raise UserError(
            f"lora.rows: {start} has just got {new} random rows for marks and codes, which have to "
            "learn, too; add --lora.rows true"
        )
    numbers = lora.count(model, recipe.lora, vocabulary)
    lora.adapt(model, recipe.lora, vocabulary, recipe.train.seed)
    return numbers
