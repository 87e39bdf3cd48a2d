"""What a recipe trains, opened and built: network, data, loss, and what came before it.

Opening refuses data and models that cannot be used, and writes nothing.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ddt_llama import distributed
from ddt_llama.config import UserError, save_json
from ddt_llama.data.layouts import codes_at
from ddt_llama.generation.history import NEW, History, Part, history_of
from ddt_llama.generation.model import Model
from ddt_llama.language import Batch, TextTokenizer, Vocabulary, lora
from ddt_llama.language.lora import Adapter
from ddt_llama.recipes.data import SHAPES, image_stream
from ddt_llama.recipes.formulas import document_flops, timestep_learning_flops
from ddt_llama.recipes.language import Coder, LanguageRecipe, document_stream
from ddt_llama.recipes.named import Recipe
from ddt_llama.recipes.renderer import RendererRecipe
from ddt_llama.recipes.samples import DrawingSamples
from ddt_llama.recipes.starts import (
    check_room,
    described_as,
    history_at,
    language_model,
    language_start,
    positions,
    put_beside,
    reference,
    release_of,
    text_side,
    tokenizer_model,
)
from ddt_llama.recipes.tokenizer import ReconstructionSamples, SpatialRecipe, TokenizerRecipe
from ddt_llama.tokenizer import Tokenizer
from ddt_llama.tokenizer import load as load_tokenizer
from ddt_llama.training.language import check_head
from ddt_llama.training.loop import Objective, Sampler
from ddt_llama.training.prefetch import Stream
from ddt_llama.training.sharding import gather, is_sharded

ADAPTER = "adapter"
LENGTHS_OF = 64  # documents, whose mean length stands for that of all


class Job(NamedTuple):
    """One training, ready to begin or to go on."""

    part: Part
    model: nn.Module  # on its device, or empty: on the meta device
    objective: Objective
    stream: Stream
    samples: Sampler
    past: History
    # Write into a folder what it begins with; None: is there. All processes take part.
    keep: Callable[[Path], None] | None
    flops: Callable[[], float]  # of learning from one sample
    release: Callable[[Path, History], None]  # write the release; all take part
    fill: Callable[[], None] | None = None  # read the weights of an empty model once it has shards


def open_job(recipe: Recipe, parts: Path) -> Job:
    """Open what `recipe` trains; `parts` holds what it began with, where it has begun.

    Raises UserError for data, models and places that cannot be used.
    """
    if isinstance(recipe, LanguageRecipe):
        return _language_job(recipe, parts)
    if isinstance(recipe, RendererRecipe):
        return _renderer_job(recipe, parts)
    return _tokenizer_job(recipe, parts)


def _tokenizer_job(recipe: TokenizerRecipe | SpatialRecipe, parts: Path) -> Job:
    device = distributed.setup()
    size = recipe.tokenizer.image_size
    stream = image_stream(recipe.data, size, recipe.train.batch, device)
    samples = ReconstructionSamples(recipe.data, size)
    folder = parts / "tokenizer"
    begun = (folder / "config.json").is_file()
    model = tokenizer_model(recipe, folder if begun else None).to(device)
    past = NEW
    if begun:
        past = history_of(parts)
    elif recipe.start is not None:
        past = history_of(release_of(recipe.start, "start")).of("tokenizer")
    elif recipe.starts_from_weights:
        past = History()

    def keep(to: Path) -> None:
        distributed.on_main(lambda: model.save(to / "tokenizer"))

    def release(to: Path, history: History) -> None:
        if is_sharded(recipe.train.shard):
            gather(model)
        distributed.on_main(lambda: _save(Model(model.eval(), name=recipe.name), history, to))

    return Job(
        part="tokenizer",
        model=model,
        objective=recipe.loss(samples.measured.to(device)),
        stream=stream,
        samples=samples,
        past=past,
        keep=keep if recipe.starts_from_weights and not begun else None,
        flops=lambda: recipe.learning_flops(model),
        release=release,
    )


def _renderer_job(recipe: RendererRecipe, parts: Path) -> Job:
    device = distributed.setup()
    begun = (parts / "tokenizer" / "config.json").is_file()
    start = parts if begun else release_of(recipe.start, "start")
    model = recipe.open(start).to(device)
    samples = ReconstructionSamples(recipe.data, model.image_size, (0,), shown_steps=0)

    def keep(to: Path) -> None:
        def write() -> None:
            _copy_language(start, to)
            save_json(to / "config.json", described_as(start, model).described())
            model.save(to / "tokenizer")  # last: it says that the run has begun

        distributed.on_main(write)

    def release(to: Path, history: History) -> None:
        if is_sharded(recipe.train.shard):
            gather(model)

        def write() -> None:
            whole = described_as(parts, model.eval())
            whole.name, whole.settings = recipe.name, replace(whole.settings, steps=0)
            whole.history = history
            beside = to.with_name(f".{to.name}.parts")
            try:
                whole.save(to, written=_copy_language(parts, beside))
            finally:
                shutil.rmtree(beside, ignore_errors=True)

        distributed.on_main(write)

    return Job(
        part="tokenizer",
        model=model,
        objective=recipe.loss(samples.measured),
        stream=image_stream(recipe.data, model.image_size, recipe.train.batch, device),
        samples=samples,
        past=history_of(start),
        keep=None if begun else keep,
        flops=lambda: timestep_learning_flops(model, 1, keep_codes=True),
        release=release,
    )


def _copy_language(release: Path, to: Path) -> Path | None:
    """Copy the language folder of a release, and return it; None where there is none."""
    if not (release / "language").is_dir():
        return None
    return Path(shutil.copytree(release / "language", to / "language", dirs_exist_ok=True))


def _save(model: Model, history: History, to: Path) -> None:
    """Write the release of a model with these trainings."""
    model.history = history
    model.save(to)


def _language_job(recipe: LanguageRecipe, parts: Path) -> Job:
    from ddt_llama.language import streaming

    device = distributed.setup()
    known = parts / "language"
    begun = (known / "vocabulary.json").is_file()
    if begun:
        tokenizer_folder = parts / "tokenizer"
    else:
        source = recipe.tokenizer or recipe.start or ""
        what = "tokenizer" if recipe.tokenizer else "start"
        tokenizer_folder = release_of(source, what) / "tokenizer"
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    # Opens what it stands on, a VAE: what is wrong there is said before a run begins.
    tokenizer.encode(torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size))
    refuse_other_codes(recipe, tokenizer)
    # A new model is not kept there: it is built from the recipe again.
    kept = begun and (known / "config.json").is_file()
    start = known if kept else language_start(recipe)
    if begun:
        text, vocabulary = TextTokenizer.load(known), Vocabulary.load(known)
        past = history_of(parts)
    else:
        text, vocabulary = text_side(recipe, start, tokenizer)
        past = history_of(tokenizer_folder.parent).of("tokenizer") + history_at(start)
    model, weights = language_model(recipe, start, vocabulary, text, tokenizer)
    model = model if weights else model.to(device)
    coder = Coder(tokenizer.to(device).requires_grad_(False), device)
    most = positions(model)
    check_room(most, recipe.max_text, vocabulary, text)
    if start is not None:
        check_head(streaming.without_layers(model) if weights else model)
    objective = recipe.loss(vocabulary, reference(recipe, model))
    beside = put_beside(recipe, start, model, vocabulary)
    stream = document_stream(recipe, coder, vocabulary, text, most)
    samples = DrawingSamples(recipe, tokenizer, vocabulary, text)

    def keep(to: Path) -> None:
        folder, seed = to / "language", recipe.train.seed
        distributed.on_main(lambda: tokenizer.save(to / "tokenizer"))
        with lora.without(model):
            if weights is not None:
                streaming.copy_grown(weights, folder, model, vocabulary, text, seed)
                return
            distributed.on_main(lambda: _keep_language(folder, recipe, model, text, vocabulary))

    def fill() -> None:
        with lora.without(model):
            streaming.fill(model, known)
        lora.begin(model, recipe.train.seed)

    def flops() -> float:
        with lora.without(model):
            length = mean_length(stream, recipe.train.batch) / (1 + recipe.twice)
            return document_flops(model, length, beside, recipe.twice)

    return Job(
        part="language",
        model=model,
        objective=objective,
        stream=stream,
        samples=samples,
        past=past,
        keep=None if begun else keep,
        flops=flops,
        release=partial(_release_language, recipe, samples, model),
        fill=fill if weights else None,
    )


def _release_language(
    recipe: LanguageRecipe, samples: DrawingSamples, model: Any, to: Path, history: History
) -> None:
    """Write the release, with what LoRA has learned merged into it, and beside it that alone.

    Of a model in shards the language folder comes first, file by file.
    """
    from ddt_llama.language import streaming

    whole = samples.model(lambda: model.eval(), recipe.name)
    whole.history = history
    beside, written = to.with_name(ADAPTER), to.with_name(f".{to.name}.language")
    if recipe.lora is not None:
        lora.save(beside, model, Path(recipe.start or "").name, whole.described())

    def write() -> None:
        with lora.merged(model):
            whole.save(to)

    if not is_sharded(recipe.train.shard):
        distributed.on_main(write)
        return
    learned = distributed.on_main(lambda: Adapter.read(beside)) if recipe.lora else None
    try:
        with lora.without(model):
            streaming.save_shards(written, model, samples.vocabulary, samples.text, learned)
        distributed.on_main(lambda: whole.save(to, written=written))
    finally:  # not moved: the disk is full
        if distributed.is_main():
            shutil.rmtree(written, ignore_errors=True)


def refuse_other_codes(recipe: LanguageRecipe, tokenizer: Tokenizer) -> None:
    """Raise UserError where data hold the codes of another tokenizer."""
    for path in recipe.data.paths:
        found = None if path == SHAPES else codes_at(path)
        if found is not None and found.fingerprint != (own := tokenizer.fingerprint()):
            raise UserError(
                f"data: {path} holds codes of {found}, and this training has the tokenizer "
                f"{recipe.tokenizer or recipe.start} ({own}); give the one of the codes with "
                "--tokenizer, or encode the pictures with this one (ddt encode)"
            )


def mean_length(stream: Callable[[int], Batch], batch: int) -> float:
    """Return the mean ids of a document over the first batches of a stream (64 documents or so)."""
    parts = max(1, LENGTHS_OF * distributed.world_size() // batch)
    ids = sum(int(stream(step).attention_mask.sum()) for step in range(parts))
    return ids * distributed.world_size() / (parts * batch)


def _keep_language(
    folder: Path, recipe: LanguageRecipe, model: Any, text: TextTokenizer, vocabulary: Vocabulary
) -> None:
    """Keep the text side, and the model where it came from elsewhere; the vocabulary comes last."""
    if recipe.start is not None:
        from ddt_llama.language import backbone

        backbone.save(folder, model, vocabulary, text)
        return
    text.save(folder)
    vocabulary.save(folder)
