"""The sequences that models give to be learned: codes of the same scenes, and their captions."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ddt_llama.checkpoint import load_tensors, save_tensors
from ddt_llama.config import UserError
from ddt_llama.evaluation.pictures import ScenePictures, batches
from ddt_llama.evaluation.reconstruction import device_of
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes.base import SEED
from ddt_llama.probes.sequences import Sequences, of_codes, of_texts
from ddt_llama.shapes.captions import caption
from ddt_llama.tokenizer import Tokenizer

ENCODED_AT_ONCE = 64
TIMESTEPS = ("coarse to fine", "fine to coarse")  # orders, behind the name of a model
CAPTIONS = 6  # of some ten ids each, for every 64 codes of a picture


def sources_of(
    models: Sequence[Model], pictures: int, held_out: int, folder: Path | None = None
) -> list[Sequences]:
    """Return the codes of the same scenes from every model, and their captions as ids of text.

    Codes come in the order that the model's language model reads. Where the tokenizer has a coarse
    end they come in the order of its timesteps, too, from either end (the paper's language model
    writes from the fine one). Captions are those of more scenes, so that their symbols are about as
    many: packed into rows as long they are seen as often.
    """
    sources = []
    for model in models:
        tokenizer = model.tokenizer
        scenes = scenes_to_learn(pictures, tokenizer.image_size)
        codes = encoded(tokenizer, scenes, model.name, folder)
        orders = {model.name: tokenizer.to_language(codes)}
        timesteps = dict(zip(TIMESTEPS, (codes.flip(1), codes), strict=True))
        for told, rows in timesteps.items() if tokenizer.prefixes else ():
            if not torch.equal(orders[model.name], rows):
                orders[f"{model.name} {told}"] = rows
        for name, rows in orders.items():
            sources.append(of_codes(name, rows, tokenizer.codebook_size, held_out))
    if any(model.text is not None for model in models):
        text = text_of(models)
        codes_a_picture = max(model.tokenizer.num_tokens for model in models)
        each = math.ceil(CAPTIONS * codes_a_picture / 64)
        texts = captions_of(text, each * pictures)
        sources.append(of_texts("captions", texts, text.size, each * held_out))
    return sources


def text_of(models: Sequence[Model]) -> TextTokenizer:
    """Return the text tokenizer of the first model that has one; UserError where none has."""
    text = next((model.text for model in models if model.text is not None), None)
    if text is None:
        names = ", ".join(model.name for model in models)
        raise UserError(
            f"this probe needs text, and there is no language model in {names}; give one that has"
        )
    return text


def captions_of(text: TextTokenizer, count: int) -> list[list[int]]:
    """Return the ids of one caption of each of `scenes_to_learn`."""
    scenes = scenes_to_learn(count).scenes(0, count)
    return [text.encode(caption(scene, SEED, number)) for number, scene in enumerate(scenes)]


def scenes_to_learn(count: int, size: int = 64) -> ScenePictures:
    """Return the scenes that sequences come from."""
    return ScenePictures(count, size, "train", SEED)


def encoded(
    tokenizer: Tokenizer, pictures: ScenePictures, name: str, folder: Path | None = None
) -> Int[Tensor, "n k"]:
    """Return the codes of pictures, column 0 the finest.

    Kept in the `folder` of a probe, if given: it goes on with them, on another machine, too, where
    the last bits of an encoder differ and a few near codes with them.
    """
    kept = None if folder is None else folder / "codes" / f"{name}.safetensors"
    if kept is not None and kept.is_file():
        return load_tensors(kept)["codes"].long()
    parts = []
    for start, stop in watch(list(batches(len(pictures), ENCODED_AT_ONCE)), f"encode by {name}"):
        images = pictures.images(start, stop).to(device_of(tokenizer))
        parts.append(tokenizer.encode(images).cpu())
    codes = torch.cat(parts)
    if kept is not None:
        save_tensors(kept, {"codes": codes.int()})
    return codes
