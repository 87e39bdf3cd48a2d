"""How fast are batches of a language model made of shards of codes, and how much is padding?

Encodes a data set (once), then feeds a device that only waits: told are documents a second when
nothing else is done, the share of the time that a device waits which learns from 20,000 pictures a
second, and the share of padding by the length of packed rows.

    python scripts/feed_speed.py nano my_images --rounds 5
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tyro.conf import Positional

from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import Figure, flat, mean
from ddt_llama.generation import load
from ddt_llama.probes.base import told
from ddt_llama.recipes import LanguageRecipe, recipe_named
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.encode import encode_pictures
from ddt_llama.recipes.language import PRETRAIN, Coder, document_stream
from ddt_llama.training.prefetch import Batches, Stream

RATE = 20_000  # pictures that the device learns from in a second
STEPS = 40
ROWS = (0, 512, 1024, 2048)  # ids of packed rows; 0: a document a row


def stream_of(model: Any, codes: Path, batch: int, pack: int) -> Stream:
    """Return the batches of stage 1 on shards of codes."""
    recipe = recipe_named("nano_pretrain")
    assert isinstance(recipe, LanguageRecipe)
    recipe = replace(
        recipe,
        mix=PRETRAIN,
        pack=pack,
        train=replace(recipe.train, batch=batch),
        data=DataConfig((str(codes),)),
    )
    coder = Coder(model.tokenizer, torch.device("cpu"))
    return document_stream(recipe, coder, model.vocabulary, model.text, 512)


def alone(stream: Stream, batch: int) -> float:
    """Return documents a second of one thread that does nothing else."""
    began = time.perf_counter()
    for step in range(STEPS):
        stream(step)
    return STEPS * batch / (time.perf_counter() - began)


def waited(stream: Stream, batch: int) -> float:
    """Return the share of its time that a device of `RATE` waits for batches."""
    with Batches(stream, torch.device("cpu"), ahead=4) as batches:
        for step in range(4):  # what is read ahead of the first step
            batches.take(step)
        time.sleep(1)
        batches.waited, began = 0.0, time.perf_counter()
        for step in range(4, 4 + STEPS):
            batches.take(step)
            time.sleep(batch / RATE)
        return batches.waited / (time.perf_counter() - began)


def padding(stream: Stream) -> list[float]:
    """Return the share of places that hold no id, batch by batch."""
    return [float(1 - stream(step).attention_mask.float().mean()) for step in range(STEPS)]


def main(
    model: Positional[str],
    data: Positional[str],
    rounds: int = 5,
    batch: int = 512,
    out: Path | None = None,
) -> None:
    """Time rounds; write figures to `out` (JSON)."""
    opened = load(model)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        encode_pictures(model, DataConfig((data,)), Path(folder))
        packed = stream_of(opened, Path(folder), batch, ROWS[-2])
        alone(packed, batch)  # warms files and memory up
        figures["feed.documents_per_second"] = mean([alone(packed, batch) for _ in range(rounds)])
        figures["feed.waited"] = mean([waited(packed, batch) for _ in range(rounds)])
        for length in ROWS:
            shares = padding(stream_of(opened, Path(folder), batch, length))
            figures[f"feed.padding.{length}"] = mean(shares)
    for name, figure in figures.items():
        print(f"{name}: {told(figure, 4)}")
    if out is not None:
        save_json(out, flat(figures))


if __name__ == "__main__":
    tyro.cli(main)
