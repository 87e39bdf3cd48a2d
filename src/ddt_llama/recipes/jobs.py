"""What a recipe trains, opened and built: network, data, loss, and what came before it.

Opening refuses data and models that cannot be used, and writes nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.checkpoint import load_into, load_tensors
from ddt_llama.config import UserError
from ddt_llama.data.layouts import codes_at
from ddt_llama.generation.history import NEW, History, Part, history_of
from ddt_llama.generation.model import Model
from ddt_llama.generation.release import RELEASES, find
from ddt_llama.language import Batch, TextTokenizer, Vocabulary, lora, render
from ddt_llama.language.documents import ask, edit, plan
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes.data import SHAPES, image_stream
from ddt_llama.recipes.drafts import texts
from ddt_llama.recipes.formulas import document_flops
from ddt_llama.recipes.language import Coder, LanguageRecipe, document_stream
from ddt_llama.recipes.samples import DrawingSamples
from ddt_llama.recipes.tokenizer import ReconstructionSamples, SpatialRecipe, TokenizerRecipe
from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer, Tokenizer
from ddt_llama.tokenizer import load as load_tokenizer
from ddt_llama.tokenizer.quantizer import keep_codes
from ddt_llama.training.language import NextToken, check_head
from ddt_llama.training.loop import Objective, Sampler
from ddt_llama.training.prefetch import Stream

RELEASE = "release"
ADAPTER = "adapter"
LENGTHS_OF = 64  # documents, whose mean length stands for that of all


class Job(NamedTuple):
    """One training, ready to begin or to go on."""

    part: Part
    model: nn.Module  # on its device
    objective: Objective
    stream: Stream
    samples: Sampler
    past: History
    keep: Callable[[Path], None] | None  # write into a folder what it begins with; None: is there
    flops: Callable[[], float]  # of learning from one sample
    release: Callable[[], Model]  # the whole model, to be saved
    adapter: Callable[[Path, Model], None] | None = None  # write what was learned beside it, alone


def open_job(recipe: TokenizerRecipe | SpatialRecipe | LanguageRecipe, parts: Path) -> Job:
    """Open what `recipe` trains; `parts` holds what it began with, where it has begun.

    Raises UserError for data, models and places that cannot be used.
    """
    if isinstance(recipe, LanguageRecipe):
        return _language_job(recipe, parts)
    return _tokenizer_job(recipe, parts)


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


def _tokenizer_job(recipe: TokenizerRecipe | SpatialRecipe, parts: Path) -> Job:
    device = distributed.setup()
    size = recipe.tokenizer.image_size
    stream = image_stream(recipe.data, size, recipe.train.batch, device)
    samples = ReconstructionSamples(recipe)
    folder = parts / "tokenizer"
    begun = (folder / "config.json").is_file()
    model = _tokenizer_model(recipe, folder if begun else None).to(device)
    past = NEW
    if begun:
        past = history_of(parts)
    elif recipe.start is not None:
        past = history_of(release_of(recipe.start, "start")).of("tokenizer")
    elif recipe.starts_from_weights:
        past = History()

    def keep(to: Path) -> None:
        model.save(to / "tokenizer")

    return Job(
        part="tokenizer",
        model=model,
        objective=recipe.loss(samples.measured.to(device)),
        stream=stream,
        samples=samples,
        past=past,
        keep=keep if recipe.starts_from_weights and not begun else None,
        flops=lambda: recipe.learning_flops(model),
        release=lambda: Model(model.eval(), name=recipe.name),
    )


def _tokenizer_model(
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


def _language_job(recipe: LanguageRecipe, parts: Path) -> Job:
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
    refuse_other_codes(recipe, tokenizer)
    # A new model is not kept there: it is built from the recipe again.
    kept = begun and (known / "config.json").is_file()
    start = known if kept else _language_start(recipe)
    if begun:
        text, vocabulary = TextTokenizer.load(known), Vocabulary.load(known)
        past = history_of(parts)
    else:
        text, vocabulary = _text_side(recipe, start, tokenizer)
        past = history_of(tokenizer_folder.parent).of("tokenizer") + _written(start)
    model = _language_model(recipe, start, vocabulary, tokenizer).to(device)
    coder = Coder(tokenizer.to(device).requires_grad_(False), device)
    most = positions(model)
    check_room(most, recipe.max_text, vocabulary, text)
    if start is not None:
        check_head(model)
    beside = None
    if recipe.lora is not None:
        _check_rows(recipe.lora, start, vocabulary)
        beside = lora.count(model, recipe.lora, vocabulary)
        lora.adapt(model, recipe.lora, vocabulary, recipe.train.seed)
    stream = document_stream(recipe, coder, vocabulary, text, most)
    samples = DrawingSamples(recipe, tokenizer, vocabulary, text)

    def keep(to: Path) -> None:
        tokenizer.save(to / "tokenizer")
        with lora.without(model):
            _keep_language(to / "language", recipe, model, text, vocabulary)

    def flops() -> float:
        with lora.without(model):
            return document_flops(model, mean_length(stream, recipe.train.batch), beside)

    def save_adapter(to: Path, whole: Model) -> None:
        lora.save(to, model, Path(recipe.start or "").name, whole.described())

    return Job(
        part="language",
        model=model,
        objective=NextToken(vocabulary, recipe.text_weight, recipe.pack > 0),
        stream=stream,
        samples=samples,
        past=past,
        keep=None if begun else keep,
        flops=flops,
        release=lambda: samples.model(model.eval(), recipe.name),
        adapter=None if recipe.lora is None else save_adapter,
    )


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


def _written(start: Path | None) -> History:
    """Return the trainings of a language model to start from: unknown of a foreign one."""
    if start is None:
        return NEW
    ours = (start / "vocabulary.json").is_file()
    return history_of(start.parent).of("language") if ours else History()


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


def _language_start(recipe: LanguageRecipe) -> Path | None:
    """Return the language folder to start from, None for a new model."""
    if recipe.start is None:
        if recipe.stage == "instruct":
            raise UserError("start: stage instruct goes on from a pretrained run; give --start RUN")
        return None
    start = find(recipe.start) if recipe.start in RELEASES else Path(recipe.start)
    for folder in (start / RELEASE / "language", start / "language", start):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"start: {start} is no run, release or language model; train it first "
        "(ddt train ..._pretrain) or give its folder with --start"
    )


def _text_side(
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

        return text, Vocabulary(backbone.text_rows(start), size, count)
    vocabulary = Vocabulary.load(start)
    if (vocabulary.codebook_size, vocabulary.num_tokens) != (size, count):
        raise UserError(
            f"start: {start} was trained on {vocabulary.num_tokens} codes of "
            f"{vocabulary.codebook_size}, the tokenizer gives {count} of {size}; take both from "
            "the same run"
        )
    return text, vocabulary


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


def _check_rows(config: LoraConfig, start: Path | None, vocabulary: Vocabulary) -> None:
    """Raise UserError where rows that were drawn at random would stay so."""
    if not config.rows and start is not None and not (start / "vocabulary.json").is_file():
        new = vocabulary.size - vocabulary.text_size
        raise UserError(
            f"lora.rows: {start} has just got {new} random rows for marks and codes, which have to "
            "learn, too; add --lora.rows true"
        )


def _language_model(
    recipe: LanguageRecipe, start: Path | None, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> Any:
    from ddt_llama.language import backbone
    from ddt_llama.language.codes import place_codes
    from ddt_llama.language.heads import look_back

    seed = recipe.train.seed
    if start is None:
        model = backbone.build(recipe.backbone, vocabulary, seed=seed)
        if recipe.code_start == "codebook":
            place_codes(model, vocabulary, tokenizer.code_vectors(), seed)
        if recipe.look_back:
            look_back(model, seed)
        return model
    if not (start / "vocabulary.json").is_file():
        return backbone.grow(start, vocabulary, seed=seed)
    return backbone.load(start).model
