"""A small language model that learns to draw: captions, each followed by the codes of its picture.

What it has learned is told by bits a code, captions being given, and by prompts that it draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Generator, Tensor

from ddt_llama.evaluation.reconstruction import device_of
from ddt_llama.language import Vocabulary
from ddt_llama.language.text import TextTokenizer
from ddt_llama.probes.base import SEED
from ddt_llama.probes.sequences import Sequences
from ddt_llama.probes.sources import captions_of, encoded
from ddt_llama.shapes.prompts import CATEGORIES, heldout_prompts
from ddt_llama.shapes.verify import read
from ddt_llama.tokenizer import Tokenizer


def captioned(
    tokenizer: Tokenizer, text: TextTokenizer, name: str, count: int, held_out: int
) -> Sequences:
    """Return `count` scenes as ids of a caption, a mark and codes, the last ones held out.

    Symbols below `text.size` are text, the mark is `text.size`. Of what is held out the captions
    and their marks are given.
    """
    codes = tokenizer.to_language(encoded(tokenizer, count, name))
    captions = [torch.tensor([*one, text.size]) for one in captions_of(text, count)]
    first = text.size + 1
    pairs = [torch.cat([one, first + row]) for one, row in zip(captions, codes, strict=True)]
    return Sequences(
        name,
        first + tokenizer.codebook_size,
        tuple(pairs[:-held_out]),
        tuple(pairs[-held_out:]),
        told=tuple(map(len, captions[-held_out:])),
    )


@torch.no_grad()
def obeyed(
    pupil: Any,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    text: TextTokenizer,
    prompts: int,
    steps: int,
) -> float:
    """Return the share of held-out prompts that a pupil obeys, mean of six categories.

    `prompts` a category, one picture each, decoded in `steps`.
    """
    shares = []
    for number, category in enumerate(CATEGORIES):
        asked = heldout_prompts(category, prompts, SEED)
        told = [
            vocabulary.to_ids(torch.tensor([*text.encode(prompt), text.size]))
            for prompt, _ in asked
        ]
        first = text.size + 1
        symbols = write(pupil, vocabulary, told, first, tokenizer.num_tokens, SEED + number)
        codes = tokenizer.from_language(symbols - first).to(device_of(tokenizer))
        images = tokenizer.decode(codes, steps=steps, seed=SEED)
        found = zip(read(images), asked, strict=True)
        shares.append(np.mean([demand.satisfied(scene) for scene, (_, demand) in found]))
    return float(np.mean(shares))


def write(
    pupil: Any,
    vocabulary: Vocabulary,
    told: Sequence[Int[Tensor, " _"]],
    first: int,
    count: int,
    seed: int,
) -> Int[Tensor, "n k"]:
    """Draw `count` symbols from `first` on behind each beginning, at temperature 1.

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
            chances = out.logits[:, -1, lowest:].float().softmax(-1).cpu()
            picks = torch.stack(
                [
                    torch.multinomial(p, 1, generator=g)
                    for p, g in zip(chances, generators, strict=True)
                ]
            )
            written[rows, step] = first + picks[:, 0]
            ids = (lowest + picks).to(device)
    return written
