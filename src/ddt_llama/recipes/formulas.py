"""What networks cost: parameters by part, FLOPs by use, memory, of each kind in its own way.

By formula, for networks on the meta device, so that `paper` can be asked about on a laptop. A FLOP
is a multiplication or an addition; only matrix products count. The tests hold the formulas against
torch's counter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ddt_llama.tokenizer import SpatialTokenizer, TimestepTokenizer
from ddt_llama.tokenizer.spatial import Doubling

STEPS = 8  # of decoding, as `draw` does
BACKWARD = 2  # times the forward pass
FLOAT32 = 4
# Of training, a parameter: gradient, two moments of AdamW, weight average.
STATES = 4
BFLOAT16 = 2


@dataclass(frozen=True)
class Cost:
    """Parameters by part, FLOPs by use, bytes by purpose; shares of another recipe's figures.

    `learn` are the FLOPs of learning from one image or document, `bits` those of an image's codes.
    """

    parameters: dict[str, int]
    flops: dict[str, float]
    memory: dict[str, float]
    learn: float
    bits: float | None = None
    beside: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line a figure."""
        total = sum(self.parameters.values())
        rows = [("parameters", f"{quantity(total)}")]
        rows += [(f"  {name}", quantity(count)) for name, count in self.parameters.items()]
        rows += [] if self.bits is None else [("bits an image", f"{self.bits:,.0f}")]
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


def bits(model: TimestepTokenizer | SpatialTokenizer) -> float:
    """Return the bits of the codes of one image."""
    return model.num_tokens * math.log2(model.codebook_size)


def learning(decode: float, encode: float, keep_codes: bool) -> float:
    """Return the FLOPs of learning from one image; codes that are kept need no backward pass."""
    return (1 + BACKWARD) * decode + encode * (1 if keep_codes else 1 + BACKWARD)


def parts_of(model: TimestepTokenizer | SpatialTokenizer) -> dict[str, int]:
    """Return the parameters of encoder, decoder and codebook."""
    return {
        "encoder": count(model.encoder),
        "decoder": count(model.decoder),
        "codebook (by moving average)": model.quantizer.codebook.numel(),
    }


def memory_of(parameters: int, trained: int, activations: float, batch: int) -> dict[str, float]:
    """Return bytes by purpose; `activations` are those of one image."""
    return {
        "weights": FLOAT32 * parameters,
        "gradients, optimizer, average": FLOAT32 * STATES * trained,
        f"activations of {batch} images (estimate)": batch * activations,
    }


def timestep_cost(model: TimestepTokenizer, draws: int, batch: int, keep_codes: bool) -> Cost:
    """Return the cost of a tokenizer whose tokens are tied to timesteps."""
    static = model.config.decoder.token_stream == "static"
    once, step = token_stream_flops(model), decoder_flops(model)
    learn = timestep_learning_flops(model, draws, keep_codes)
    parameters = parts_of(model)
    trained = parameters["encoder"] + parameters["decoder"]
    return Cost(
        parameters,
        {
            "encode an image": encoder_flops(model),
            f"decode an image in {STEPS} steps": STEPS * step + (once if static else STEPS * once),
            f"train on an image ({draws} draws)": learn,
        },
        memory_of(sum(parameters.values()), trained, _activations(model, draws), batch),
        learn,
        bits(model),
    )


def renderer_cost(model: TimestepTokenizer, batch: int) -> Cost:
    """Return the cost of a tokenizer whose renderer learns, and nothing else."""
    learn = timestep_learning_flops(model, 1, keep_codes=True)
    parameters = parts_of(model) | {"renderer": count(model.add_renderer())}
    return Cost(
        parameters,
        {
            "encode an image": encoder_flops(model),
            "decode an image in one pass": token_stream_flops(model) + decoder_flops(model),
            "train on an image": learn,
        },
        memory_of(sum(parameters.values()), parameters["renderer"], _activations(model, 1), batch),
        learn,
        bits(model),
    )


def timestep_learning_flops(model: TimestepTokenizer, draws: int, keep_codes: bool) -> float:
    """Return the FLOPs of learning from one image, of which `draws` noisy ones are decoded."""
    static = model.config.decoder.token_stream == "static"
    streams = token_stream_flops(model) * (1 if static else draws)
    return learning(streams + draws * decoder_flops(model), encoder_flops(model), keep_codes)


def spatial_cost(model: SpatialTokenizer, batch: int, keep_codes: bool) -> Cost:
    """Return the cost of a spatial tokenizer, without those who judge its pictures in training."""
    encode, decode, kept = spatial_flops(model)
    learn = learning(decode, encode, keep_codes)
    parameters = parts_of(model)
    trained = parameters["encoder"] + parameters["decoder"]
    return Cost(
        parameters,
        {"encode an image": encode, "decode an image": decode, "train on an image": learn},
        memory_of(sum(parameters.values()), trained, BFLOAT16 * kept, batch),
        learn,
        bits(model),
    )


def spatial_flops(model: SpatialTokenizer) -> tuple[int, int, int]:
    """Return the FLOPs of encoding and of decoding one image, and the numbers that layers put out.

    Every convolution is counted at the size of its output; each of the numbers it puts out is kept
    for the backward pass, and so are those of normalisation and SiLU around it.
    """
    side, kept, counted = model.image_size, 0, []
    for part in (model.encoder, model.decoder):
        flops = 0
        for layer in part.modules():
            if isinstance(layer, Doubling):
                side *= 2
            if isinstance(layer, nn.Conv2d):
                side //= layer.stride[0]
                flops += 2 * side * side * layer.weight.numel()
                kept += 3 * side * side * layer.out_channels
        counted.append(flops)
    encode, decode = counted
    config = model.config.quantizer
    return encode + 2 * model.num_tokens * config.code_dim * config.codebook_size, decode, kept


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


def document_flops(
    model: Any, length: float, beside: int | None = None, twice: float = 0.0
) -> float:
    """Return the FLOPs of learning from a document of `length` ids, by any causal LM.

    Where so many weights learn `beside` the model, its own are frozen and need no gradient. A share
    `twice` of the documents comes a second time, and both times a frozen copy reads it, too.

    Forward and backward two and four for each weight and id (the lookup of embeddings is none), as
    Kaplan et al. (2020) count, and attention to the ids before. The head is counted at every id,
    though training computes it at supervised ones alone.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = count(model) - (0 if head is table else table.numel())
    config, heads = model.config, model.config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * config.num_hidden_layers * heads * width * (length + 1) / 2
    learning, frozen = (weights, 0) if beside is None else (beside, weights)
    whole = (1 + BACKWARD) * length * (2 * learning + attention)
    whole += (1 + BACKWARD / 2) * length * 2 * frozen
    return (1 + twice) * whole + 2 * twice * length * (2 * weights + attention)


def count(part: nn.Module) -> int:
    """Return the parameters of a network."""
    return sum(parameter.numel() for parameter in part.parameters())
