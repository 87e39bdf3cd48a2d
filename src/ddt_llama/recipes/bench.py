"""The table of `ddt bench`: every fast path of this project against the plain way, in one run.

Seeing and drawing are timed in `evaluation/bench.py`; a step of training is added here, against the
products of matrices it consists of, at the speed that this machine multiplies large ones.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ddt_llama import distributed
from ddt_llama.config import UserError
from ddt_llama.evaluation import bench, large, writing
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.race import ROUNDS, Race, run
from ddt_llama.generation.model import Model
from ddt_llama.language import batches, documents
from ddt_llama.recipes.formulas import document_flops
from ddt_llama.recipes.named import recipe_named
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import sample_scene
from ddt_llama.training.language import NextToken
from ddt_llama.training.optim import OptimConfig, Optimizer

SIDE = 2048  # of the matrices whose product is the measure
ROWS = 32  # documents, or pictures, of a step
TOKENIZER = "nano_tokenizer"  # whose training is timed
LARGE = "base_tokenizer"  # of 256 px
PREFIX = "bench."
QUICK = (1, 8)  # batches of a quick run, and of previews


def measure(model: Model, *, quick: bool = False, rounds: int | None = None) -> dict[str, Figure]:
    """Return all lines, as `bench.NAME`: medians of ratios with the extremes, over `rounds`.

    A quick run takes one round and batches of 1 and 8: it proves that every line is measured.
    Raises UserError for a model without a language model.
    """
    if model.engine is None:
        raise UserError(f"model {model.name} has no language model; give one that draws")
    rounds = rounds or (1 if quick else ROUNDS)
    parts: list[Callable[[], Mapping[str, Figure]]] = [
        lambda: bench.encoding(model, rounds),
        lambda: bench.decoding(model, rounds),
        *(_drawing(model, size, rounds) for size in (QUICK if quick else bench.BATCHES)),
        *(_previewing(model, size, rounds) for size in QUICK),
        lambda: bench.reading(model, rounds),
        lambda: writing.narrowing(model, rounds),
        lambda: bench.command(model, rounds),
        lambda: bench.laying_out(model, rounds),
        lambda: bench.world(model, rounds),
        lambda: learning_language(model, rounds),
        lambda: learning_pictures(model, rounds),
    ]
    if model.device.type == "cuda":
        parts += [lambda: large.writing(model.device, rounds), lambda: _large(model, rounds)]
    return {f"{PREFIX}{name}": figure for part in parts for name, figure in part().items()}


def learning_language(model: Model, rounds: int) -> dict[str, Figure]:
    """Time a step of the language model on 32 drawings: `train.language.vs_products`."""
    vocabulary, text = model.vocabulary, model.text
    assert vocabulary is not None
    assert text is not None
    language: Any = copy.deepcopy(model.language).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(
        vocabulary.codebook_size, (ROWS, vocabulary.num_tokens), generator=generator
    )
    drawn = [
        documents.draw(bench.PROMPTS[i % len(bench.PROMPTS)], row)
        for i, row in enumerate(codes.tolist())
    ]
    rendered = [documents.render(one, vocabulary, text) for one in drawn]
    parts = batches.collate(rendered, vocabulary.pad)
    batch = tuple(None if part is None else part.to(model.device) for part in parts)
    length = sum(len(one.ids) for one in rendered) / ROWS
    step = _step(language, NextToken(vocabulary), batch)
    flops = ROWS * document_flops(language, length)
    return _against_products("train.language", step, flops, model.device, rounds)


def learning_pictures(model: Model, rounds: int) -> dict[str, Figure]:
    """Time a step of the recipe nano_tokenizer on 32 scenes: `train.tokenizer.vs_products`."""
    recipe: Any = recipe_named(TOKENIZER)
    tokenizer = recipe.build(begins=True).to(model.device).train()
    drawn = [sample_scene(1, index) for index in range(ROWS)]
    images = render(drawn, recipe.tokenizer.image_size, model.device)
    step = _step(tokenizer, recipe.loss(images[:2]), images)
    flops = len(images) * recipe.learning_flops(tokenizer)
    return _against_products("train.tokenizer", step, flops, model.device, rounds)


def _large(model: Model, rounds: int) -> Mapping[str, Figure]:
    recipe: Any = recipe_named(LARGE)
    return large.round_trip(recipe.build().to(model.device).eval(), model.device, rounds)


def _drawing(model: Model, size: int, rounds: int) -> Callable[[], Mapping[str, Figure]]:
    return lambda: bench.drawing(model, size, rounds)


def _previewing(model: Model, size: int, rounds: int) -> Callable[[], Mapping[str, Figure]]:
    return lambda: writing.previewing(model, size, rounds)


def _step(model: Any, objective: Any, batch: Any) -> Callable[[], None]:
    """Return one step of training: forward, backward, the update of AdamW."""
    optimizer, device = Optimizer(model, OptimConfig(), steps=1000), _device(model)

    def step() -> None:
        with distributed.autocast(device, True):
            loss, _ = objective(model, batch, 0)
        loss.backward()
        optimizer.step(0)
        optimizer.zero_grad()

    return step


def _against_products(
    name: str, step: Callable[[], None], flops: float, device: torch.device, rounds: int
) -> dict[str, Figure]:
    """Return the share of a step that is products, at their best speed, and the step's seconds."""
    dtype = torch.bfloat16 if distributed.has_bf16(device) else torch.float32
    matrix = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    count = max(1, round(flops / (2 * SIDE**3)))
    share = flops / (count * 2 * SIDE**3)

    def products() -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    race = Race(
        {"step": step, "products": products},
        {f"{name}.vs_products": ("products", "step")},
        {f"{name}.seconds": "step"},
    )
    figures = run(race, device, rounds, f"take steps of {name}")
    whole = figures[f"{name}.vs_products"]
    bounds = (share * whole.value, share * whole.low, share * whole.high)
    return figures | {f"{name}.vs_products": Figure(*bounds)}


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def shown(figures: Mapping[str, Figure]) -> Sequence[tuple[str, str]]:
    """Return what the lines of the table say, by the ends of their names."""
    return [(end, told) for end, told in MEANING if any(name.endswith(end) for name in figures)]


MEANING = (
    ("vs_plain", "times as fast as two full forwards a token, without a cache"),
    ("vs_transformers", "times as fast as transformers' generate with its guidance"),
    ("vs_bandwidth", "of the speed at which this machine can read the weights (a copy)"),
    ("vs_recorded", "times as fast as steps that are recorded, but not compiled"),
    ("vs_float32", "times as fast a token as with weights of float32"),
    ("bytes", "of the bytes of weights that float32 reads a token"),
    ("vs_no_preview", "of the speed of drawing without a preview every eight tokens"),
    ("vs_all_steps", "times as fast as one step of decoding a token"),
    ("db_less", "dB of PSNR below that"),
    ("vs_each_step", "times as fast as running the token stream at every step"),
    ("vs_bare", "of the speed of the bare forward pass, pixels at hand"),
    ("vs_laid_out", "times as fast as laying documents out with their codes"),
    ("vs_products", "of the speed of its matrix products alone"),
    ("same_codes", "of codes are those of the plain way"),
)
