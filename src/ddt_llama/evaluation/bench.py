"""How fast drawing is: the decode engine against the plain loop, side by side in one run.

Beside it the time of the whole command `ddt draw`, the pace of the renderer of scenes, and what
laying documents out before their codes are known saves.

The plain loop is what one writes first: for every token a full forward of the prompt with all codes
so far, and another of its twin without text, through transformers and without a cache. Both draw
with the same numbers, so the codes themselves are compared too.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddt_llama.config import UserError
from ddt_llama.evaluation.intervals import Figure, proportion
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.engine import Codes, Engine, decoder_of
from ddt_llama.generation.model import Model
from ddt_llama.generation.sampling import FULL, choose, guide, uniforms
from ddt_llama.language import batches, documents
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import sample_scene

PROMPTS = (
    "a large red circle on a white background",
    "two small blue squares",
    "a green triangle left of a yellow ring",
    "a small purple star",
    "a large orange cross above a small red square",
    "three yellow circles",
    "a blue ring below a large green star",
    "a small white triangle on a dark background",
)
SCALE = 3.0
RENDERED = 1024
ROUNDS = 6  # the least for which lowest to highest covers a median with 95 % (1 - 2 / 2^6)


def bench_draw(
    model: Model, *, batches: Sequence[int] = (1, 8), rounds: int = ROUNDS
) -> dict[str, Figure]:
    """Time engine and plain loop in turns, for each batch size, with guidance.

    Keys, N the batch size: `draw.ratio.N` plain / engine; `draw.engine_seconds.N` and
    `draw.plain_seconds.N` for the codes of the whole batch; `draw.image_seconds.N` for one image of
    `Model.draw` at the release's settings, pixels included; `draw.same_codes.N` the share of codes
    on which both agree. Values are medians over `rounds`; bounds are the lowest and highest. Raises
    UserError for a batch larger than the number of prompts.
    """
    if not batches or not all(1 <= size <= len(PROMPTS) for size in batches) or rounds < 1:
        raise UserError(
            f"batches {tuple(batches)}, rounds {rounds}: allowed are batches of 1 to "
            f"{len(PROMPTS)} images and 1 or more rounds"
        )
    figures: dict[str, Figure] = {}
    for size in batches:
        figures |= _bench_batch(model, size, rounds)
    return figures


def bench_process(model: Model, rounds: int = ROUNDS) -> Figure:
    """Time the command `ddt draw` for one image, start and imports included, in seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder, picture = Path(place, "model"), Path(place, "drawn.png")
        model.save(folder)
        command = [sys.executable, "-m", "ddt_llama", "draw", str(folder), PROMPTS[0]]
        command += ["--out", str(picture)]

        def whole() -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        return _median([_seconds(whole, model.device) for _ in range(rounds)])


def bench_render(model: Model, rounds: int = ROUNDS) -> Figure:
    """Count the scenes of four objects that are drawn in a second, at the size of the model."""
    scenes = [sample_scene(0, index, min_objects=4) for index in range(RENDERED)]

    def whole() -> None:
        render(scenes, model.tokenizer.image_size, model.device)

    whole()
    return _median([RENDERED / _seconds(whole, model.device) for _ in range(rounds)])


def bench_documents(model: Model, rounds: int = ROUNDS) -> Figure:
    """Time laying documents out with their codes / putting codes into what is laid out already."""
    vocabulary, text = _vocabulary(model), _text(model)
    prompts = PROMPTS * 4
    codes = torch.arange(len(prompts) * vocabulary.num_tokens) % vocabulary.codebook_size
    codes = codes.view(len(prompts), vocabulary.num_tokens)

    def laid_out(rows: Sequence[Sequence[int]]) -> batches.Batch:
        drawn = [documents.draw(*pair) for pair in zip(prompts, rows, strict=True)]
        return batches.collate(
            [documents.render(one, vocabulary, text) for one in drawn], vocabulary.pad
        )

    blank, none = laid_out(torch.zeros_like(codes).tolist()), torch.zeros(0, dtype=torch.int64)

    def whole() -> None:
        laid_out(codes.tolist())

    def late() -> None:
        batches.with_codes(blank, codes, none, vocabulary)

    cpu = codes.device
    return _median([_seconds(whole, cpu) / _seconds(late, cpu) for _ in range(rounds)])


def plain_codes(
    model: Model,
    prompts: Sequence[Sequence[int]],
    twins: Sequence[Sequence[int]],
    scale: float,
    seeds: Sequence[int],
) -> Int[Tensor, "b k"]:
    """Draw codes (language order) with two full forwards a token and no cache."""
    vocabulary, device = _vocabulary(model), model.device
    count = vocabulary.num_tokens
    chance = uniforms(seeds, count, device)
    codes = torch.empty(len(prompts), 0, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for step in range(count):
            conditional, unconditional = (
                _last_logits(model, rows, codes)[:, vocabulary.code_offset : vocabulary.size]
                for rows in (prompts, twins)
            )
            chosen = choose(guide(conditional, unconditional, scale), FULL, chance[step])
            codes = torch.cat((codes, chosen[:, None]), dim=1)
    return codes.clone()


def _bench_batch(model: Model, size: int, rounds: int) -> dict[str, Figure]:
    vocabulary, text = _vocabulary(model), _text(model)
    constructor = documents.draw if model.stage == "instruct" else documents.text_to_image
    requests = [constructor(prompt, None) for prompt in PROMPTS[:size]]
    prompts = [documents.render(request, vocabulary, text).ids for request in requests]
    twins = [
        documents.render(documents.without_text(request), vocabulary, text).ids
        for request in requests
    ]
    seeds = list(range(size))
    engine = model.engine or Engine(decoder_of(model.language), vocabulary, text.size)

    tasks = [
        Codes(tuple(prompt), tuple(twin), SCALE, seed=seed)
        for prompt, twin, seed in zip(prompts, twins, seeds, strict=True)
    ]

    def fast() -> Tensor:
        return torch.stack(engine.write(tasks))

    def plain() -> Tensor:
        return plain_codes(model, prompts, twins, SCALE, seeds)

    def whole() -> object:
        return model.draw(PROMPTS[:size])

    agree = (fast() == plain()).flatten().tolist()  # and all is warm
    whole()
    times: dict[str, list[float]] = {"engine": [], "plain": [], "image": []}
    for _ in watch(range(rounds), f"draw {size} at a time"):
        for name, call in (("engine", fast), ("plain", plain), ("image", whole)):
            times[name].append(_seconds(call, model.device))
    ratios = [slow / quick for slow, quick in zip(times["plain"], times["engine"], strict=True)]
    return {
        f"draw.ratio.{size}": _median(ratios),
        f"draw.engine_seconds.{size}": _median(times["engine"]),
        f"draw.plain_seconds.{size}": _median(times["plain"]),
        f"draw.image_seconds.{size}": _median([seconds / size for seconds in times["image"]]),
        f"draw.same_codes.{size}": proportion(agree),
    }


def _last_logits(model: Model, prompts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Run left-padded prompts and all codes so far through the whole transformers module."""
    vocabulary = _vocabulary(model)
    length = max(map(len, prompts))
    rows = [[vocabulary.pad] * (length - len(row)) + list(row) for row in prompts]
    lengths = torch.tensor([len(row) for row in prompts], device=model.device)
    ids = torch.cat(
        (torch.tensor(rows, device=model.device), codes + vocabulary.code_offset), dim=1
    )
    positions = torch.arange(ids.shape[1], device=model.device) - (length - lengths)[:, None]
    output = model.language(
        input_ids=ids,
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0),
        use_cache=False,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _vocabulary(model: Model) -> Vocabulary:
    if model.vocabulary is None:
        raise UserError(f"model {model.name} has no language model; give one that draws")
    return model.vocabulary


def _text(model: Model) -> TextTokenizer:
    if model.text is None:
        raise UserError(f"model {model.name} has no text tokenizer; give a whole model")
    return model.text


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _median(values: Sequence[float]) -> Figure:
    """Return the median between the lowest and the highest; one value knows nothing of those."""
    if len(values) == 1:
        return Figure(values[0], -math.inf, math.inf)
    return Figure(statistics.median(values), min(values), max(values))


def counted(action: Callable[[], Any]) -> float:
    """Return the FLOPs of the matrix products and convolutions of a call.

    Attention is taken apart into products: fused kernels of a CPU are not counted.
    """
    kernel, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with kernel, counter:
        action()
    return float(counter.get_total_flops())
