"""How much of a batch is padding, and what does packing save on this machine?

For both stages' mixtures over the data sets given (the shapes world is "shapes"): the share of
places without an id by the length of packed rows, and how long nano's language model learns from
such a batch, as a share of the time that it takes a document a row.

    python scripts/padding_study.py shapes my_images my_edits --out padding.json
"""

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
from ddt_llama.generation.model import Model
from ddt_llama.language import Batch
from ddt_llama.language.batches import pack
from ddt_llama.probes.base import told
from ddt_llama.recipes import LanguageRecipe, recipe_named
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.language import INSTRUCT, PRETRAIN, unencoded_documents
from ddt_llama.training.language import NextToken

STAGES = {"pretrain": PRETRAIN, "instruct": INSTRUCT}
LENGTHS = (256, 512, 1024, 2048)


def batches_of(model: Model, stage: str, data: DataConfig, batch: int, count: int) -> list[Batch]:
    """Return batches of documents whose codes are all the same."""
    recipe = recipe_named("nano_pretrain")
    assert isinstance(recipe, LanguageRecipe)
    assert model.vocabulary is not None
    assert model.text is not None
    train = replace(recipe.train, batch=batch)
    recipe = replace(recipe, mix=STAGES[stage], data=data, train=train)
    size = model.tokenizer.image_size
    stream = unencoded_documents(recipe, size, model.vocabulary, model.text, 512, False)
    return [stream(step).batch for step in range(count)]


def seconds(language: Any, objective: NextToken, batch: Batch) -> float:
    """Return how long a forward and backward pass takes in bfloat16."""
    began = time.perf_counter()
    language.zero_grad()
    with torch.autocast(language.device.type, torch.bfloat16):
        loss, _ = objective(language, batch, 0)
    loss.backward()
    return time.perf_counter() - began


def main(
    data: Positional[tuple[str, ...]],
    model: str = "nano",
    batch: int = 128,
    batches: int = 20,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Count and time; write figures to `out` (JSON)."""
    opened = load(model)
    assert opened.vocabulary is not None
    language: Any = opened.language.train().requires_grad_(True)
    objective = NextToken(opened.vocabulary)
    objective.before_step(language, 0)
    figures: dict[str, Figure] = {}
    for stage in STAGES:
        alone = batches_of(opened, stage, DataConfig(data), batch, batches)
        rows = {
            length: [pack(one, opened.vocabulary.pad, length) for one in alone]
            for length in LENGTHS
        }
        rows = {0: alone, **rows}
        for length, packed in rows.items():
            shares = [float(1 - one.attention_mask.float().mean()) for one in packed]
            figures[f"{stage}.padding.{length}"] = mean(shares)
        took: dict[int, list[float]] = {length: [] for length in rows}
        for _ in range(rounds + 1):
            for length, packed in rows.items():  # by turns, the same documents
                took[length].append(sum(seconds(language, objective, one) for one in packed[:2]))
        for length in LENGTHS:
            ratios = [a / b for a, b in zip(took[length][1:], took[0][1:], strict=True)]
            figures[f"{stage}.seconds.{length}"] = mean(ratios)
    for name, figure in figures.items():
        print(f"{name}: {told(figure, 4)}")
    if out is not None:
        save_json(out, flat(figures))


if __name__ == "__main__":
    tyro.cli(main)
