"""How fast seeing and drawing are: each fast path against the plain way, side by side in one run.

The plain loop is what one writes first: for every token a full forward of the prompt with all codes
so far, and another of its twin without text, through transformers and without a cache. The other
rival is transformers' own `generate`, with its cache and its processor for guidance. Reading all
weights once, at the speed of a copy, is what a token costs at least.

`recipes/bench.py` adds training, and makes the table of `ddt bench`.
"""

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.intervals import Figure, mean, proportion
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.race import Race, median, run, seconds
from ddt_llama.generation.batch import write
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
SEEN = 32  # pictures that are encoded or decoded at once
STEPS = (1, 2, 4, 8, 16)
FAST = 4  # steps of decoding that count as the fast way, where there is no renderer
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Requests:
    """Prompts of drawings with their twins and seeds, as ids."""

    prompts: list[list[int]]
    twins: list[list[int]]
    seeds: list[int]

    def tasks(self) -> list[Codes]:
        """Return them as the engine takes them."""
        rows = zip(self.prompts, self.twins, self.seeds, strict=True)
        return [Codes(tuple(one), tuple(twin), SCALE, seed=seed) for one, twin, seed in rows]


def requests(model: Model, count: int) -> Requests:
    """Return the first prompts, again and again if need be."""
    vocabulary, text = _vocabulary(model), _text(model)
    constructor = documents.draw if model.stage == "instruct" else documents.text_to_image
    asked = [constructor(PROMPTS[i % len(PROMPTS)], None) for i in range(count)]
    bare = [documents.without_text(one) for one in asked]
    rows = [[documents.render(one, vocabulary, text).ids for one in each] for each in (asked, bare)]
    return Requests(rows[0], rows[1], list(range(count)))


def drawing(model: Model, size: int, rounds: int) -> dict[str, Figure]:
    """Time the engine, the plain loop and transformers, with guidance, for images of a batch.

    Keys, N the batch size: `draw.bN.vs_plain`, `draw.bN.vs_transformers`, `token.bN.vs_bandwidth`
    (the share of the bound that a token reaches), `draw.bN.seconds` for the codes of the batch, and
    `draw.bN.same_codes`, the share of codes on which engine and plain loop agree.
    """
    asked = requests(model, size)
    engine, tasks, tokens = _engine(model), asked.tasks(), _vocabulary(model).num_tokens
    copy = copying(_bytes_a_token(model), model.device)

    def ours() -> Tensor:
        return torch.stack(write(engine, tasks, together=size))

    def bound() -> None:
        for _ in range(tokens):
            copy()

    name = f"draw.b{size}"
    race = Race(
        ways={
            "engine": ours,
            "plain": lambda: plain_codes(model, asked),
            "transformers": lambda: generated_codes(model, asked),
            "bandwidth": bound,
        },
        ratios={
            f"{name}.vs_plain": ("plain", "engine"),
            f"{name}.vs_transformers": ("transformers", "engine"),
            f"token.b{size}.vs_bandwidth": ("bandwidth", "engine"),
        },
        seconds={f"{name}.seconds": "engine"},
    )
    figures = run(race, model.device, rounds, f"draw {size} at a time")
    agree = (ours() == plain_codes(model, asked)).flatten().tolist()
    return figures | {f"{name}.same_codes": proportion(agree)}


def reading(model: Model, rounds: int) -> dict[str, Figure]:
    """Time reading eight prompts against reading all weights once: `prefill.b8.vs_bandwidth`."""
    asked, engine = requests(model, len(PROMPTS)), _engine(model)
    longest = max(map(len, asked.prompts))
    pad = _vocabulary(model).pad
    rows = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in asked.prompts]
    ids, lengths = torch.tensor(rows, device=model.device), [len(one) for one in asked.prompts]

    @torch.inference_mode()
    def ours() -> object:
        return engine.decoder.read(ids, lengths)

    copy = copying(_bytes_a_token(model), model.device)
    race = Race(
        {"read": ours, "bandwidth": copy},
        {"prefill.b8.vs_bandwidth": ("bandwidth", "read")},
        {"prefill.b8.seconds": "read"},
    )
    return run(race, model.device, rounds, "read prompts")


def encoding(model: Model, rounds: int) -> dict[str, Figure]:
    """Time encoding pictures as files hold them, against the bare forward pass of their pixels.

    Key: `encode.vs_bare`, 1 where reading them costs nothing.
    """
    images = scenes(model)
    files = [_file(picture) for picture in to_pil(images.cpu())]
    race = Race(
        {"encode": lambda: model.encode(files), "bare": lambda: model.tokenizer.encode(images)},
        {"encode.vs_bare": ("bare", "encode")},
        {"encode.seconds": "encode"},
    )
    return run(race, model.device, rounds, f"encode {len(images)} pictures")


def decoding(model: Model, rounds: int) -> dict[str, Figure]:
    """Time decoding by fewer steps against as many as there are tokens.

    Keys: `decode.sN.vs_all_steps` and `decode.sN.db_less` (what the pictures lose by it, in dB of
    PSNR), `decode.fast.*` for the renderer where there is one and four steps elsewhere,
    `decode.kept_tokens.vs_each_step`: the token stream run once an image, not once a step.
    """
    tokenizer: Any = model.tokenizer
    if not tokenizer.refines:
        return {}
    images, most = scenes(model), tokenizer.num_tokens
    codes, seeds = model.encode(images), list(range(len(images)))
    counts = [count for count in STEPS if count < most]
    if tokenizer.renders:
        counts.insert(0, 0)

    def by(count: int) -> Callable[[], Tensor]:
        return lambda: model.decode(codes, seeds, count)

    names = {count: f"decode.s{count}" if count else "decode.renderer" for count in counts}
    race = Race(
        {"all": by(most), **{name: by(count) for count, name in names.items()}},
        {f"{name}.vs_all_steps": ("all", name) for name in names.values()},
        {"decode.all_steps.seconds": "all"} | {f"{name}.seconds": name for name in names.values()},
    )
    figures = run(race, model.device, rounds, f"decode {len(images)} pictures")
    best = psnr(by(most)(), images.cpu())
    for count, name in names.items():
        figures[f"{name}.db_less"] = mean((best - psnr(by(count)(), images.cpu())).tolist())
    fast = names.get(0) or names.get(FAST) or next(iter(names.values()))
    for what in ("vs_all_steps", "db_less"):
        figures[f"decode.fast.{what}"] = figures[f"{fast}.{what}"]
    return figures | keeping(tokenizer, codes, rounds)


def keeping(tokenizer: Any, codes: Int[Tensor, "b k"], rounds: int) -> dict[str, Figure]:
    """Time eight steps with the token stream run once, and run at every step."""
    config, decoder, device = tokenizer.config, tokenizer.decoder, codes.device
    if getattr(config.decoder, "token_stream", None) != "static":
        return {}
    values = tokenizer.quantizer.values(codes)
    noisy = torch.randn(len(codes), config.grid**2, config.patch_dim, device=device)
    kept = torch.ones(len(codes), config.num_tokens, dtype=torch.bool, device=device)
    t = torch.full((len(codes),), 0.5, device=device)

    @torch.inference_mode()
    def once() -> None:
        memory = decoder.remember(values, kept)
        for _ in range(8):
            decoder(noisy, t, memory, kept)

    @torch.inference_mode()
    def each() -> None:
        for _ in range(8):
            decoder(noisy, t, decoder.remember(values, kept), kept)

    race = Race(
        {"once": once, "each": each}, {"decode.kept_tokens.vs_each_step": ("each", "once")}, {}
    )
    return run(race, device, rounds, "run the token stream")


def command(model: Model, rounds: int) -> dict[str, Figure]:
    """Time the command `ddt draw` for one image, start and imports included, in seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder, picture = Path(place, "model"), Path(place, "drawn.png")
        model.save(folder)
        words = [sys.executable, "-m", "ddt_llama", "draw", str(folder), PROMPTS[0]]
        words += ["--out", str(picture)]

        def whole() -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

        return {
            "draw.command.seconds": median([seconds(whole, model.device) for _ in range(rounds)])
        }


def world(model: Model, rounds: int) -> dict[str, Figure]:
    """Count the scenes of four objects that are drawn in a second, at the size of the model."""
    drawn = [sample_scene(0, index, min_objects=4) for index in range(RENDERED)]

    def whole() -> None:
        render(drawn, model.tokenizer.image_size, model.device)

    whole()
    rates = [RENDERED / seconds(whole, model.device) for _ in range(rounds)]
    return {"render.images_per_second": median(rates)}


def laying_out(model: Model, rounds: int) -> dict[str, Figure]:
    """Time putting codes into documents laid out before: `documents.late_codes.vs_laid_out`."""
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

    race = Race(
        {"whole": whole, "late": late}, {"documents.late_codes.vs_laid_out": ("whole", "late")}, {}
    )
    return run(race, codes.device, rounds, "lay documents out")


def plain_codes(model: Model, asked: Requests) -> Int[Tensor, "b k"]:
    """Draw codes (language order) with two full forwards a token and no cache."""
    vocabulary, device = _vocabulary(model), model.device
    count = vocabulary.num_tokens
    chance = uniforms(asked.seeds, count, device)
    codes = torch.empty(len(asked.prompts), 0, dtype=torch.int64, device=device)
    with torch.inference_mode():
        for step in range(count):
            conditional, unconditional = (
                _last_logits(model, rows, codes)[:, vocabulary.code_offset : vocabulary.size]
                for rows in (asked.prompts, asked.twins)
            )
            chosen = choose(guide(conditional, unconditional, SCALE), FULL, chance[step])
            codes = torch.cat((codes, chosen[:, None]), dim=1)
    return codes.clone()


def generated_codes(model: Model, asked: Requests) -> Int[Tensor, "b k"]:
    """Draw codes (language order) by transformers' `generate`, by chance of its own."""
    vocabulary, device, language = _vocabulary(model), model.device, model.language
    (ids, mask), (empty, empty_mask) = (
        _padded(rows, vocabulary.pad, device) for rows in (asked.prompts, asked.twins)
    )
    generate: Any = language.generate
    written = generate(
        input_ids=ids,
        attention_mask=mask,
        negative_prompt_ids=empty,
        negative_prompt_attention_mask=empty_mask,
        guidance_scale=SCALE,
        do_sample=True,
        top_k=0,
        max_new_tokens=vocabulary.num_tokens,
        suppress_tokens=list(range(vocabulary.code_offset)),
        pad_token_id=vocabulary.pad,
    )
    return written[:, ids.shape[1] :] - vocabulary.code_offset


def scenes(model: Model) -> Float[Tensor, "b 3 h w"]:
    """Return pictures to be seen, of the size of the model."""
    drawn = [sample_scene(1, index) for index in range(SEEN)]
    return render(drawn, model.tokenizer.image_size, model.device)


def _last_logits(model: Model, prompts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Run left-padded prompts and all codes so far through the whole transformers module."""
    vocabulary = _vocabulary(model)
    rows, mask = _padded(prompts, vocabulary.pad, model.device)
    ids = torch.cat((rows, codes + vocabulary.code_offset), dim=1)
    mask = torch.cat((mask, torch.ones_like(codes)), dim=1)
    output = model.language(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of prompts that are padded at their beginnings."""
    length = max(map(len, prompts))
    ids = [[pad] * (length - len(row)) + list(row) for row in prompts]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _file(picture: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def copying(size: int, device: torch.device) -> Callable[[], object]:
    """Return what moves `size` bytes, half of them read and half of them written."""
    there = torch.ones(max(1, size // 2), dtype=torch.uint8, device=device)
    here = torch.empty_like(there)
    return lambda: here.copy_(there)


def _bytes_a_token(model: Model) -> int:
    """Return the bytes of the weights that are read for a token of an image."""
    language: Any = model.language
    tables = {id(language.get_input_embeddings().weight), id(language.lm_head.weight)}
    inner = sum(one.numel() for one in language.parameters() if id(one) not in tables)
    vocabulary = _vocabulary(model)
    head = (vocabulary.size - vocabulary.code_offset) * language.lm_head.weight.shape[1]
    return (inner + head) * language.lm_head.weight.element_size()


def _engine(model: Model) -> Engine:
    return model.engine or Engine(decoder_of(model.language), _vocabulary(model), _text(model).size)


def _vocabulary(model: Model) -> Vocabulary:
    if model.vocabulary is None:
        raise UserError(f"model {model.name} has no language model; give one that draws")
    return model.vocabulary


def _text(model: Model) -> TextTokenizer:
    if model.text is None:
        raise UserError(f"model {model.name} has no text tokenizer; give a whole model")
    return model.text
