"""What do the fast paths of training and decoding buy over the plain way?

Each fast path and the plain way that its test compares it with, in turns in one process, forward
and backward where it is trained. Writes metrics.json: seconds of both and their ratio, medians over
the rounds with lowest and highest. (Drawing is timed by `ddt bench`.)

    python scripts/speed_study.py --out experiments/0011-speed
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from ddt_llama.config import save_json
from ddt_llama.generation.kernels import Product, RmsNorm
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, collate, documents, render
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.shapes.render import render as render_scenes
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer
from ddt_llama.training.language import NextToken, head_loss

STEPS = 8  # of decoding
TOKENS = 64  # that the engine decodes for one image: so often are its products and norms made
GUIDED = 16  # rows of eight images with guidance


class Pair(NamedTuple):
    """Two ways to the same result."""

    plain: Callable[[], Tensor]
    fast: Callable[[], Tensor]
    tolerance: float = 1e-2  # of bf16


def step_of(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """Return the loss of one forward and backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()
    value.backward()
    return value.detach()


def language_pairs(rows: int) -> dict[str, Pair]:
    """Return the language model's step, its head and its attention, with random codes."""
    recipe = recipe_named("nano_pretrain")
    tokenizer = recipe_named("nano_tokenizer")
    assert isinstance(recipe, LanguageRecipe)
    assert isinstance(tokenizer, TokenizerRecipe)
    source = ShapesSource()
    text = TextTokenizer.train([source[i].text for i in range(2000)], recipe.text_vocab)
    sizes = tokenizer.tokenizer.quantizer.codebook_size, tokenizer.tokenizer.num_tokens
    vocabulary = Vocabulary(text.size, *sizes)
    model: Any = backbone.build(recipe.backbone, vocabulary)
    codes = torch.randint(sizes[0], (rows, sizes[1]), generator=torch.Generator().manual_seed(0))
    made = [documents.text_to_image(source[i].text, row) for i, row in enumerate(codes.tolist())]
    batch = collate([render(one, vocabulary, text) for one in made], vocabulary.pad)
    objective = NextToken(vocabulary)
    objective.parts_to_compile(model)[1].compile()  # the softmax of the head
    wanted = batch.labels[batch.labels != documents.IGNORED]
    hidden = torch.randn(len(wanted), recipe.backbone.dim, requires_grad=True)

    def attention(kind: str, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.set_attn_implementation(kind)
            return step_of(model, loss)

        return run

    def ours() -> Tensor:
        return objective(model, tuple(batch), 0)[0]

    def theirs() -> Tensor:
        output = model(batch.ids, attention_mask=batch.attention_mask, labels=batch.labels)
        return output.loss

    def whole_head() -> Tensor:
        return F.cross_entropy(model.get_output_embeddings()(hidden).float(), wanted)

    return {
        "language.step": Pair(attention("sdpa", theirs), attention("eager", ours)),
        "language.attention": Pair(attention("sdpa", ours), attention("eager", ours)),
        "language.head": Pair(
            lambda: step_of(model, whole_head),
            lambda: step_of(model, lambda: head_loss(model, hidden, wanted)[0]),
        ),
    }


@torch.no_grad()
def decoder_pair(images: int) -> Pair:
    """Return decoding by several steps, the token stream run once or at every step."""
    recipe = recipe_named("nano_tokenizer")
    assert isinstance(recipe, TokenizerRecipe)
    torch.manual_seed(0)
    model = TimestepTokenizer(recipe.tokenizer).eval()
    decoder, config = model.decoder, recipe.tokenizer
    values = torch.randn(images, config.num_tokens, config.quantizer.code_dim)
    noisy = torch.randn(images, config.grid**2, config.patch_dim)
    kept = torch.ones(images, config.num_tokens, dtype=torch.bool)
    t = torch.full((images,), 0.5)

    @torch.no_grad()
    def plain() -> Tensor:
        return torch.stack(
            [decoder(noisy, t, decoder.remember(values, kept), kept) for _ in range(STEPS)]
        )

    @torch.no_grad()
    def fast() -> Tensor:
        memory = decoder.remember(values, kept)
        return torch.stack([decoder(noisy, t, memory, kept) for _ in range(STEPS)])

    return Pair(plain, fast)


@torch.no_grad()
def search_pair(images: int) -> Pair:
    """Return the search for codes, all vectors at once and a few at a time."""
    recipe = recipe_named("nano_tokenizer")
    assert isinstance(recipe, TokenizerRecipe)
    torch.manual_seed(0)
    quantizer = TimestepTokenizer(recipe.tokenizer).quantizer
    quantizer.weigh(torch.rand(len(quantizer.codebook)))
    shape = images, recipe.tokenizer.num_tokens, quantizer.config.code_dim
    unit = F.normalize(torch.randn(shape), dim=-1)
    cost = quantizer.config.rate / 2 * quantizer.lengths
    return Pair(
        lambda: (unit @ quantizer.codebook.t() - cost).argmax(-1),
        lambda: quantizer.cheapest(unit),
    )


@torch.no_grad()
def engine_pairs() -> dict[str, Pair]:
    """Return what eight images cost in products and norms of the decode step, torch's and ours."""
    shape, eps = backbone.nano(), 1e-5
    torch.manual_seed(0)
    x, scale = torch.randn(GUIDED, 1, shape.dim), torch.rand(shape.dim)
    weight = torch.randn(2 * shape.mlp_dim, shape.dim)
    product, norm = Product(weight, None), RmsNorm(scale, eps)
    repeats = range(TOKENS * shape.depth)

    @torch.inference_mode()
    def often(call: Callable[[], Tensor]) -> Tensor:
        for _ in repeats:
            made = call()
        return made

    return {
        "engine.product": Pair(
            lambda: often(lambda: F.linear(x, weight)), lambda: often(lambda: product(x))
        ),
        "engine.norm": Pair(
            lambda: often(lambda: F.rms_norm(x, (shape.dim,), scale, eps)),
            lambda: often(lambda: norm(x)),
        ),
    }


def renderer_pair(count: int) -> Pair:
    """Return scenes rendered one at a time and together."""
    scenes = [ShapesSource().scene(index) for index in range(count)]
    return Pair(
        lambda: torch.cat([render_scenes([scene], 64) for scene in scenes]),
        lambda: render_scenes(scenes, 64),
    )


def timed(call: Callable[[], Tensor]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(out: Path, rounds: int = 9, rows: int = 32) -> None:
    """Measure every pair with `rows` documents, pictures or scenes."""
    pairs = language_pairs(rows)
    pairs |= engine_pairs()
    pairs |= {
        "decoder.token_stream": decoder_pair(rows),
        "quantizer.search": search_pair(rows),
        "shapes.render": renderer_pair(rows),
    }
    figures: dict[str, float] = {"rows": rows, "threads": torch.get_num_threads()}
    for name, pair in pairs.items():
        torch.testing.assert_close(pair.fast(), pair.plain(), rtol=pair.tolerance, atol=1e-3)
        times = [(timed(pair.plain), timed(pair.fast)) for _ in range(rounds)]
        slow, quick = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [plain / fast for plain, fast in times]
        figures |= {
            f"{name}.plain_seconds": slow,
            f"{name}.fast_seconds": quick,
            f"{name}.ratio": statistics.median(ratios),
            f"{name}.ratio.low": min(ratios),
            f"{name}.ratio.high": max(ratios),
        }
        print(f"{name:22} {slow:.3f} s  {quick:.3f} s  {figures[f'{name}.ratio']:.2f} times")
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "metrics.json", figures)


if __name__ == "__main__":
    tyro.cli(main)
