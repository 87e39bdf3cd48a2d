"""What a recipe costs before it is run: parameters by part, FLOPs an image, memory.

By formula, on the meta device, so that `paper` can be asked about on a laptop. A FLOP is a
multiplication or an addition; only matrix products count. The tests hold the formulas against
torch's counter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddt_llama.language import Vocabulary, backbone
from ddt_llama.recipes.language import LanguageRecipe
from ddt_llama.recipes.named import Recipe, recipe_named
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe
from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer, TimestepTokenizerConfig

STEPS = 8  # of decoding, as `draw` does
TEXT = 24  # ids of a usual caption with its marks
BACKWARD = 2  # times the forward pass
FLOAT32 = 4
# Of training, a parameter: gradient, two moments of AdamW, weight average.
STATES = 4
BFLOAT16 = 2


@dataclass(frozen=True)
class Cost:
    """Parameters by part, FLOPs by use, bytes by purpose; shares of another recipe's figures.

    `learn` are the FLOPs of learning from one image or document.
    """

    parameters: dict[str, int]
    flops: dict[str, float]
    memory: dict[str, float]
    learn: float
    beside: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line a figure."""
        total = sum(self.parameters.values())
        rows = [("parameters", f"{quantity(total)}")]
        rows += [(f"  {name}", quantity(count)) for name, count in self.parameters.items()]
        rows += [(f"FLOPs, {name}", quantity(count)) for name, count in self.flops.items()]
        rows += [(f"memory, {name}", f"{quantity(size)}B") for name, size in self.memory.items()]
        rows += [(name, f"{100 * share:.1f} %") for name, share in self.beside.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def quantity(value: float) -> str:
    """Return a number with a unit prefix.

    >>> quantity(5_120_000)
    '5.12 M'
    """
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def cost_of(recipe: Recipe) -> Cost:
    """Return what a recipe costs; needs neither data nor memory."""
    if isinstance(recipe, LanguageRecipe):
        return language_cost(recipe)
    return spatial_cost(recipe) if isinstance(recipe, SpatialRecipe) else tokenizer_cost(recipe)


def bits(recipe: TokenizerRecipe | SpatialRecipe) -> float:
    """Return the bits of the codes of one image."""
    with torch.device("meta"):
        return recipe.build(begins=False).num_tokens * math.log2(
            recipe.tokenizer.quantizer.codebook_size
        )


def tokenizer_cost(recipe: TokenizerRecipe) -> Cost:
    """Return the cost of an image tokenizer."""
    model = on_meta(recipe.tokenizer)
    draws, batch = recipe.objective.draws, recipe.train.batch
    encode, once, step = encoder_flops(model), token_stream_flops(model), decoder_flops(model)
    static = recipe.tokenizer.decoder.token_stream == "static"
    learn = learning_flops(recipe, model)
    parts: dict[str, nn.Module] = {"encoder": model.encoder, "decoder": model.decoder}
    parameters = {name: _count(part) for name, part in parts.items()}
    parameters["codebook (by moving average)"] = model.quantizer.codebook.numel()
    trained = sum(_count(part) for part in parts.values())
    return Cost(
        parameters,
        {
            "encode an image": encode,
            f"decode an image in {STEPS} steps": STEPS * step + (once if static else STEPS * once),
            f"train on an image ({draws} draws)": learn,
        },
        {
            "weights": FLOAT32 * sum(parameters.values()),
            "gradients, optimizer, average": FLOAT32 * STATES * trained,
            f"activations of {batch} images (estimate)": batch * _activations(model, draws),
        },
        learn,
    )


def spatial_cost(recipe: SpatialRecipe) -> Cost:
    """Return the cost of a spatial tokenizer, beside that of the recipe it is compared with."""
    with torch.device("meta"):
        model = recipe.build(begins=False)
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    parameters = {name: _count(part) for name, part in parts.items()}
    trained = sum(parameters.values())
    parameters["codebook (by moving average)"] = model.quantizer.codebook.numel()
    encode, decode, kept = spatial_flops(model)
    learn = learning_flops(recipe, model)
    batch = recipe.train.batch
    shares: dict[str, float] = {}
    if recipe.rival is not None:
        rival = recipe_named(recipe.rival)
        assert isinstance(rival, TokenizerRecipe)
        other = tokenizer_cost(rival)
        shares = {
            f"bits an image, of {rival.name}'s": bits(recipe) / bits(rival),
            f"parameters, of {rival.name}'s": sum(parameters.values())
            / sum(other.parameters.values()),
            f"FLOPs in training, of {rival.name}'s": learn / other.learn,
        }
    return Cost(
        parameters,
        {"encode an image": encode, "decode an image": decode, "train on an image": learn},
        {
            "weights": FLOAT32 * sum(parameters.values()),
            "gradients, optimizer, average": FLOAT32 * STATES * trained,
            f"activations of {batch} images (estimate)": BFLOAT16 * batch * kept,
        },
        learn,
        shares,
    )


def learning_flops(recipe: TokenizerRecipe | SpatialRecipe, model: Any) -> float:
    """Return the FLOPs of learning from one image; codes that are kept need no backward pass."""
    if isinstance(recipe, SpatialRecipe):
        encode, decode, _ = spatial_flops(model)
    else:
        draws, static = recipe.objective.draws, model.config.decoder.token_stream == "static"
        encode, once = encoder_flops(model), token_stream_flops(model)
        decode = (once if static else draws * once) + draws * decoder_flops(model)
    return (1 + BACKWARD) * decode + encode * (1 if recipe.keep_codes else 1 + BACKWARD)


def spatial_flops(model: SpatialTokenizer) -> tuple[int, int, int]:
    """Return the FLOPs of encoding and of decoding one image, and the numbers that layers put out.

    Every convolution is counted at the size of its output; each of the numbers it puts out is kept
    for the backward pass, and so are those of normalisation and SiLU around it.
    """
    side, kept, counted = model.image_size, 0, []
    for part in (model.encoder, model.decoder):
        flops = 0
        for layer in part.modules():
            if isinstance(layer, nn.Upsample):
                side *= 2
            if isinstance(layer, nn.Conv2d):
                side //= layer.stride[0]
                flops += 2 * side * side * layer.weight.numel()
                kept += 3 * side * side * layer.out_channels
        counted.append(flops)
    encode, decode = counted
    config = model.config.quantizer
    return encode + 2 * model.num_tokens * config.code_dim * config.codebook_size, decode, kept


def on_meta(config: TimestepTokenizerConfig) -> TimestepTokenizer:
    """Return the network without its weights."""
    with torch.device("meta"):
        return TimestepTokenizer(config)


def encoder_flops(model: TimestepTokenizer) -> int:
    """Return the FLOPs of encoding one image."""
    n, k = model.config.grid**2, model.num_tokens
    linears = sum(_linear_flops(name, one, n, k) for name, one in _linears(model.encoder))
    dim, attention = model.config.encoder.dim, 0
    for block in _blocks(model.encoder):
        attention += 0 if block.image.keys_only else 4 * n * n * dim
        attention += 4 * k * (n + k) * dim
    return linears + attention + 2 * k * model.config.quantizer.code_dim * model.codebook_size


def token_stream_flops(model: TimestepTokenizer) -> int:
    """Return the FLOPs of the decoder's token stream: once an image if static, else once a step."""
    n, k = model.config.grid**2, model.num_tokens
    linears = sum(
        _linear_flops(name, one, n, k) for name, one in _linears(model.decoder) if _of_tokens(name)
    )
    static = model.config.decoder.token_stream == "static"
    seen = k if static else n + k
    heads = sum(not block.token.keys_only for block in _blocks(model.decoder))
    return linears + heads * 4 * k * seen * model.config.decoder.dim


def decoder_flops(model: TimestepTokenizer) -> int:
    """Return the FLOPs of the decoder's image stream for one noise draw or step."""
    n, k = model.config.grid**2, model.num_tokens
    linears = sum(
        _linear_flops(name, one, n, k)
        for name, one in _linears(model.decoder)
        if not _of_tokens(name)
    )
    return linears + len(_blocks(model.decoder)) * 4 * n * (n + k) * model.config.decoder.dim


def _linears(part: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, one) for name, one in part.named_modules() if isinstance(one, nn.Linear))


def _blocks(part: Any) -> list[Any]:
    return list(part.blocks)


def _of_tokens(name: str) -> bool:
    return ".token." in name or name in ("code_in", "code_out")


def _linear_flops(name: str, linear: nn.Linear, patches: int, tokens: int) -> int:
    """Count one linear map: once an image where it sees the timestep, else once a position."""
    once = "modulation" in name or name.startswith("timestep")
    rows = 1 if once else tokens if _of_tokens(name) else patches
    return 2 * rows * linear.in_features * linear.out_features


def _activations(model: TimestepTokenizer, draws: int) -> float:
    """Estimate the bytes that one image leaves for the backward pass, in bfloat16.

    A block keeps about 8 vectors a position beside the MLP's two hidden ones; attention keeps no
    matrix (it is computed again).
    """
    n, k, config = model.config.grid**2, model.num_tokens, model.config
    encoder, decoder = config.encoder, config.decoder
    in_encoder = (n + k) * encoder.depth * encoder.dim * (8 + 2 * encoder.mlp_ratio)
    copies = 1 if decoder.token_stream == "static" else draws
    positions = draws * n + copies * k
    in_decoder = positions * decoder.depth * decoder.dim * (8 + 2 * decoder.mlp_ratio)
    return BFLOAT16 * (in_encoder + in_decoder)


def language_cost(recipe: LanguageRecipe) -> Cost:
    """Return the cost of a language model over the tokenizer of its size.

    `draw` counts the two rows of guidance; a document is a caption of 24 ids and an image.
    """
    config, vocabulary = recipe.backbone, vocabulary_of(recipe)
    model = backbone.build(config, vocabulary, device="meta")
    total = _count(model)
    rows = vocabulary.size * config.dim * (1 if config.tied else 2)
    length = TEXT + vocabulary.num_tokens
    token = backbone.flops_per_token(config, vocabulary, (length + 1) // 2)
    batch, learn = recipe.train.batch, document_flops(model, length)
    kept = config.depth * (8 * config.dim + 3 * config.mlp_dim) * BFLOAT16
    logits = 3 * FLOAT32 * vocabulary.size
    return Cost(
        {"embedding and head": rows, "layers": total - rows},
        {
            "draw an image": 2 * length * token,
            "train on a document": learn,
        },
        {
            "weights": FLOAT32 * total,
            "gradients, optimizer, average": FLOAT32 * STATES * total,
            f"activations of {batch} documents (estimate)": batch * length * (kept + logits),
        },
        learn,
    )


def document_flops(model: Any, length: float) -> float:
    """Return the FLOPs of learning from a document of `length` ids, by any causal LM.

    Forward and backward two and four for each weight and id (the lookup of embeddings is none), as
    Kaplan et al. (2020) count, and attention to the ids before. The head is counted at every id,
    though training computes it at supervised ones alone.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = _count(model) - (0 if head is table else table.numel())
    config = model.config
    attention = 4 * config.num_hidden_layers * config.hidden_size * (length + 1) / 2
    return (1 + BACKWARD) * length * (2 * weights + attention)


def vocabulary_of(recipe: LanguageRecipe) -> Vocabulary:
    """Return the vocabulary over the tokenizer recipe of the same size."""
    size = recipe.name.partition("_")[0]
    tokenizer = recipe_named(f"{size}_tokenizer")
    assert isinstance(tokenizer, TokenizerRecipe)
    config = tokenizer.tokenizer
    return Vocabulary(recipe.text_vocab, config.quantizer.codebook_size, config.num_tokens)


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
