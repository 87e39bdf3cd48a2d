"""Carry a recipe out: open the data, build the model, train by the one loop, write the release.

The run folder is complete in itself: RUN/parts keeps what the run began with (tokenizer, text side,
weights of `start`, their trainings), so that it goes on without them; RUN/release is the model with
averaged weights, rewritten whenever the loop ends.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.checkpoint import load_into, load_tensors
from ddt_llama.config import UserError, check_folder, replace_file, save_json, to_dict
from ddt_llama.generation.history import NEW, History, Training, history_of
from ddt_llama.generation.model import Model
from ddt_llama.generation.release import RELEASES, find
from ddt_llama.language import TextTokenizer, Vocabulary
from ddt_llama.recipes.cost import document_flops, learning_flops
from ddt_llama.recipes.data import image_stream
from ddt_llama.recipes.drafts import texts
from ddt_llama.recipes.language import Coder, LanguageRecipe, document_stream
from ddt_llama.recipes.samples import DrawingSamples
from ddt_llama.recipes.tokenizer import ReconstructionSamples, SpatialRecipe, TokenizerRecipe
from ddt_llama.runs import Run
from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer, Tokenizer
from ddt_llama.tokenizer import load as load_tokenizer
from ddt_llama.tokenizer.quantizer import keep_codes
from ddt_llama.training.language import NextToken
from ddt_llama.training.loop import train

RELEASE = "release"
OLD = ".release.old"
FINISHED = "FINISHED"  # an empty file that says to scripts: all steps are done
PARTS = "parts"
LENGTHS_OF = 64  # documents, whose mean length stands for that of all


class Trained(NamedTuple):
    """Where a training stands and what it left."""

    folder: Path
    release: Path
    step: int
    finished: bool


def run(recipe: TokenizerRecipe | SpatialRecipe | LanguageRecipe, out: Path) -> Trained:
    """Train `recipe` in the run folder `out`, or go on with the training that is there.

    Raises UserError for data, models and places that cannot be used, before anything is written.
    """
    recipe.data.check()
    check_folder(out)
    if distributed.is_main() and (out / OLD).exists() and not (out / RELEASE).exists():
        os.replace(out / OLD, out / RELEASE)  # killed between the two renames of `write_release`
    if recipe.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        choice = "install ddt-llama[train] or add --train.tensorboard false"
        raise UserError(f"tensorboard is not installed; {choice}")
    if (out / FINISHED).is_file() and (done := newest_step(out)) >= recipe.train.steps:
        Run.create_or_resume(out, recipe).close()  # refuse another recipe
        return Trained(out, out / RELEASE, done, True)
    if isinstance(recipe, LanguageRecipe):
        trained = _run_language(recipe, out)
    else:
        trained = _run_tokenizer(recipe, out)
    if distributed.is_main() and trained.finished:
        replace_file(out / FINISHED, b"")
    distributed.teardown()
    return trained


def newest_step(out: Path) -> int:
    """Return the step of the newest complete training state of a run, 0 where there is none."""
    complete = sorted((out / "checkpoints").glob("step-*/COMPLETE"))
    return int(complete[-1].parent.name.removeprefix("step-")) if complete else 0


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


def _run_tokenizer(recipe: TokenizerRecipe | SpatialRecipe, out: Path) -> Trained:
    device = distributed.setup()
    size = recipe.tokenizer.image_size
    stream = image_stream(recipe.data, size, recipe.train.batch, device)
    samples = ReconstructionSamples(recipe)
    parts = out / PARTS / "tokenizer"
    begun = (parts / "config.json").is_file()
    model = _tokenizer_model(recipe, parts if begun else None).to(device)
    objective = recipe.loss(samples.measured.to(device))
    past = NEW
    if begun:
        past = history_of(out / PARTS)
    elif recipe.start is not None:
        past = history_of(release_of(recipe.start, "start")).of("tokenizer")
    elif recipe.starts_from_weights:
        past = History()
    with Run.create_or_resume(out, recipe) as folder:
        (out / FINISHED).unlink(missing_ok=True)  # of fewer steps
        if not begun and recipe.starts_from_weights and distributed.is_main():
            save_json(out / PARTS / "config.json", to_dict(past))
            model.save(parts)
        outcome = train(model, objective, stream, recipe.train, folder, sample=samples)
        seen = outcome.step * recipe.train.samples_a_step
        own = Training("tokenizer", recipe.name, seen, seen * learning_flops(recipe, model))
        with outcome.ema.swapped():
            whole = Model(model.eval(), name=recipe.name)
            whole.history = past + History((own,))
            release = write_release(whole, out)
    return Trained(out, release, outcome.step, outcome.finished)


def _tokenizer_model(
    recipe: TokenizerRecipe | SpatialRecipe, begun: Path | None
) -> TimestepTokenizer | SpatialTokenizer:
    """Build the network of a recipe, with the weights that `begun` holds or the recipe names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        model = recipe.build(begun is None)
    folder = begun
    if folder is None and recipe.start is not None:
        folder = release_of(recipe.start, "start") / "tokenizer"
    if folder is not None:
        source = folder / "model.safetensors"
        tensors = load_tensors(source)
        grow_codebook(tensors, recipe.tokenizer.quantizer.codebook_size)
        load_into(model, tensors, source)
    recipe.equip(model)
    if recipe.keep_codes:
        keep_codes(model)
    return model


def grow_codebook(tensors: dict[str, Tensor], size: int) -> None:
    """Add codes of zeros up to `size`; the quantizer fills them from the first batches."""
    for name in ("quantizer.codebook", "quantizer.lengths"):
        known = tensors.get(name)
        if known is not None and len(known) < size:
            added = known.new_zeros(size - len(known), *known.shape[1:])
            tensors[name] = torch.cat([known, added])


def _run_language(recipe: LanguageRecipe, out: Path) -> Trained:
    device = distributed.setup()
    begun = (out / PARTS / "language" / "vocabulary.json").is_file()
    if begun:
        tokenizer_folder = out / PARTS / "tokenizer"
    else:
        source = recipe.tokenizer or recipe.start or ""
        what = "tokenizer" if recipe.tokenizer else "start"
        tokenizer_folder = release_of(source, what) / "tokenizer"
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    known = out / PARTS / "language"
    # Runs that began under earlier versions kept no model there.
    language_start = known if (known / "config.json").is_file() else _language_start(recipe)
    if begun:
        text, vocabulary = TextTokenizer.load(known), Vocabulary.load(known)
    else:
        text, vocabulary = _text_side(recipe, language_start, tokenizer)
    model = _language_model(recipe, language_start, vocabulary, tokenizer).to(device)
    coder = Coder(tokenizer.to(device).requires_grad_(False), device, recipe.train.bf16)
    most = int(model.config.max_position_embeddings)
    stream = document_stream(recipe, coder, vocabulary, text, most)
    samples = DrawingSamples(recipe, tokenizer, vocabulary, text)
    if begun:
        past = history_of(out / PARTS)
    else:
        past = history_of(tokenizer_folder.parent).of("tokenizer") + _written(language_start)
    with Run.create_or_resume(out, recipe) as folder:
        (out / FINISHED).unlink(missing_ok=True)  # of fewer steps
        if not begun and distributed.is_main():
            save_json(out / PARTS / "config.json", to_dict(past))
            tokenizer.save(out / PARTS / "tokenizer")
            _keep_language(known, recipe, model, text, vocabulary)
        length = mean_length(stream, recipe.train.batch)
        outcome = train(
            model,
            NextToken(vocabulary, recipe.text_weight),
            stream,
            recipe.train,
            folder,
            sample=samples,
        )
        seen = outcome.step * recipe.train.samples_a_step
        own = Training("language", recipe.name, seen, seen * document_flops(model, length))
        with outcome.ema.swapped():
            whole = samples.model(model.eval(), recipe.name)
            whole.history = past + History((own,))
            release = write_release(whole, out)
    return Trained(out, release, outcome.step, outcome.finished)


def mean_length(stream: Callable[[int], tuple[Tensor, ...]], batch: int) -> float:
    """Return the mean ids of the first 64 documents of a stream, padding left out."""
    parts = max(1, LENGTHS_OF * distributed.world_size() // batch)
    lengths = torch.cat([stream(step)[2].sum(1) for step in range(parts)])
    return float(lengths.float().mean())


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


def write_release(model: Model, out: Path) -> Path:
    """Write RUN/release beside the old one and put it in its place; returns its path.

    A kill between the two renames leaves it as RUN/.release.old, which the next start puts back.
    """
    final, partial, old = out / RELEASE, out / ".release.partial", out / OLD
    if not distributed.is_main():
        return final
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)
    return final
