"""A small language model that learns to draw: descriptions, each before the codes of its picture.

Minutes must do: scenes of one or two objects on a grid, told completely and in few words, and heads
that look back (experiments/0020). What has been learned is told by bits a code, descriptions being
given, and by what of unseen scenes is there when the model draws them.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

from ddt_llama.evaluation.pictures import ScenePictures
from ddt_llama.evaluation.reconstruction import device_of
from ddt_llama.language import Vocabulary
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes.base import SEED
from ddt_llama.probes.sequences import Sequences
from ddt_llama.probes.sources import encoded
from ddt_llama.shapes.captions import description
from ddt_llama.shapes.scene import Scene, Split
from ddt_llama.shapes.verify import read
from ddt_llama.tokenizer import Tokenizer

OBJECTS, GRID = 2, 8  # at most so many, on so many cells along a side
TEMPERATURE = 0.5  # one slip spoils a picture: at 1 fewer can be read (experiments/0041)


def described(
    tokenizer: Tokenizer,
    text: TextTokenizer,
    name: str,
    count: int,
    held_out: int,
    folder: Path | None = None,
) -> Sequences:
    """Return scenes as ids of a description, a mark and codes; of the last those that are new.

    Symbols below `text.size` are text, the mark is `text.size`. Of what is held out the
    descriptions and their marks are given. So simple scenes recur: of the last `held_out` of the
    `count` those that are among the others are left out, the same for every tokenizer. Codes are
    kept in `folder`, if given.
    """
    pictures = easy(count, tokenizer.image_size, "train")
    codes = tokenizer.to_language(encoded(tokenizer, pictures, name, folder))
    scenes = pictures.scenes(0, count)
    begun = beginnings(text, scenes)
    first = text.size + 1
    pairs = [torch.cat([one, first + row]) for one, row in zip(begun, codes, strict=True)]
    known = set(scenes[:-held_out])
    kept = tuple(
        pair
        for pair, scene in zip(pairs[-held_out:], scenes[-held_out:], strict=True)
        if scene not in known
    )
    return Sequences(
        name,
        first + tokenizer.codebook_size,
        tuple(pairs[:-held_out]),
        kept,
        told=tuple(len(row) - tokenizer.num_tokens for row in kept),
    )


def easy(count: int, size: int, split: Split) -> ScenePictures:
    """Return scenes that minutes of training can draw."""
    return ScenePictures(count, size, split, SEED, max_objects=OBJECTS, grid=GRID)


def beginnings(text: TextTokenizer, scenes: Sequence[Scene]) -> list[Int[Tensor, " _"]]:
    """Return the ids of the descriptions of scenes, each with the mark behind it."""
    return [torch.tensor([*text.encode(description(scene)), text.size]) for scene in scenes]


@torch.no_grad()
def drawn(
    pupil: Any,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    text: TextTokenizer,
    count: int,
    steps: int,
) -> float:
    """Return what a pupil draws of `count` unseen scenes that are described to it: see `there`."""
    scenes = easy(count, tokenizer.image_size, "heldout").scenes(0, count)
    told = [vocabulary.to_ids(one) for one in beginnings(text, scenes)]
    first = text.size + 1
    symbols = write(pupil, vocabulary, told, first, tokenizer.num_tokens, SEED)
    codes = tokenizer.from_language(symbols - first).to(device_of(tokenizer))
    found = read(tokenizer.decode(codes, steps=steps, seed=SEED))
    return float(np.mean([there(*pair) for pair in zip(found, scenes, strict=True)]))


def there(found: Scene | None, wanted: Scene) -> float:
    """Return the share of the wanted objects that a picture shows, by colour and shape."""
    shown, asked = (
        Counter((item.colour, item.shape) for item in (scene.objects if scene else ()))
        for scene in (found, wanted)
    )
    return (shown & asked).total() / asked.total()


def write(
    pupil: Any,
    vocabulary: Vocabulary,
    told: Sequence[Int[Tensor, " _"]],
    first: int,
    count: int,
    seed: int,
) -> Int[Tensor, "n k"]:
    """Draw `count` symbols from `first` on behind each beginning, at `TEMPERATURE`.

    Beginnings of one length are written together; a row does not depend on the others.
    """
    device = next(pupil.parameters()).device
    written = torch.zeros(len(told), count, dtype=torch.long)
    lowest = int(vocabulary.to_ids(torch.tensor(first)))
    for length in sorted({len(one) for one in told}):
        rows = [place for place, one in enumerate(told) if len(one) == length]
        generators = [Generator().manual_seed(seed * 1_000_003 + row) for row in rows]
        ids = torch.stack([told[row] for row in rows])
        ids = torch.cat([torch.full((len(rows), 1), vocabulary.bos), ids], dim=1).to(device)
        cache = None
        for step in range(count):
            out = pupil(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1, lowest:].float() / TEMPERATURE
            chances = logits.softmax(-1).cpu()
            picks = torch.stack(
                [
                    torch.multinomial(p, 1, generator=g)
                    for p, g in zip(chances, generators, strict=True)
                ]
            )
            written[rows, step] = first + picks[:, 0]
            ids = (lowest + picks).to(device)
    return written
