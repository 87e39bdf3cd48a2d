"""The two-stream encoder: patches and learned queries, weights of their own, one attention.

Source: DDT-LLaMA figure 2; from Selftok 2-D sine-cosine positions on patches, and that patches do
not see the queries, so that their stream reads the image alone. Only the queries' outputs are kept.

Differs from the paper by default: queries start at places of the image (`EncoderConfig.queries`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddt_llama.config import UserError, check_range
from ddt_llama.layers import Stream, attend, grid_positions, sincos
from ddt_llama.tokenizer.schedule import token_places, token_squares

Start = Literal["spatial", "pyramid", "normal"]  # of queries, and of positions in the decoder

# Variance, times the width, of the tied weights: logits of about 8 at a token's own position.
TIED_GAIN = 1.5


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; `queries` says how the learned queries start.

    "spatial": each query starts at the place of one cell (`token_places`), and queries and keys
    start with equal weights, so that attention starts local; training is free to leave it.
    "pyramid": the same with squares (`token_squares`), the coarsest of which is the whole picture.
    "normal": queries and weights start at random, as in the paper.
    """

    dim: int = 160
    depth: int = 3
    num_heads: int = 5
    mlp_ratio: float = 4.0
    queries: Start = "spatial"

    def __post_init__(self) -> None:
        """Refuse sizes that no attention has."""
        check_width(self)


def check_width(config: Any) -> None:
    """Raise UserError for sizes of a stream that no attention and no 2-D table of sines has."""
    check_range(config, 1, math.inf, "dim", "depth", "num_heads")
    check_range(config, 0, math.inf, "mlp_ratio")
    if config.dim % config.num_heads or config.dim % 4:
        raise UserError(
            f"dim: given {config.dim}, allowed are multiples of num_heads = {config.num_heads} "
            "and of 4 (sine and cosine on two axes)"
        )


def initial_queries(num_tokens: int, grid: int, dim: int, kind: str) -> Float[Tensor, "k d"]:
    """Return the start of one embedding a token; see `EncoderConfig.queries`."""
    noise = 0.02 * torch.randn(num_tokens, dim)
    if kind == "normal":
        return noise
    with torch.device("cpu"):  # places are searched for, which the meta device cannot do
        if kind == "pyramid":
            places = torch.stack([mean_position(s, grid, dim) for s in token_squares(num_tokens)])
        else:
            places = sincos(token_places(num_tokens) * grid - 0.5, dim, extent=grid)
    return places.to(noise.device) + noise


def mean_position(square: Float[Tensor, " 3"], grid: int, dim: int) -> Float[Tensor, " d"]:
    """Return the mean of the positions in a square (middle, side), as long as one of them."""
    middle, side = square[:2], float(square[2])
    count = max(1, round(side * grid))
    within = ((grid_positions(count, count) + 0.5) / count - 0.5) * side
    mean = sincos((middle + within) * grid - 0.5, dim, extent=grid).mean(0)
    return mean * (dim / 2) ** 0.5 / mean.norm()


def tie_queries_to_keys(streams: list[Stream]) -> None:
    """Start all queries and keys of a joint attention with one weight.

    Then tokens look first at what lies at their own position (the mimetic initialisation of
    Trockman and Kolter 2023, carried over to two streams).
    """
    dim = streams[0].qkv.in_features
    shared = torch.randn(dim, dim) * (TIED_GAIN / dim) ** 0.5
    for stream in streams:
        stream.qkv.weight.data[:dim] = shared
        stream.qkv.weight.data[dim : 2 * dim] = shared


class EncoderBlock(nn.Module):
    """Patches attend to patches; queries attend to patches and queries.

    In the last block nothing reads the patches any more but through their keys and values.
    """

    def __init__(self, config: EncoderConfig, *, last: bool) -> None:
        super().__init__()
        sizes = (config.dim, config.num_heads, config.mlp_ratio)
        self.image = Stream(*sizes, conditional=False, keys_only=last)
        self.token = Stream(*sizes, conditional=False)
        if config.queries != "normal":
            tie_queries_to_keys([self.image, self.token])

    def forward(
        self, image: Float[Tensor, "b n d"], token: Float[Tensor, "b k d"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k d"]]:
        """Return both streams after one joint attention and their MLPs."""
        image_q, image_k, image_v = self.image.project(image, None)
        token_q, token_k, token_v = self.token.project(token, None)
        keys = torch.cat([image_k, token_k], dim=2)
        values = torch.cat([image_v, token_v], dim=2)
        if not self.image.keys_only:
            image = self.image.finish(image, attend(image_q, image_k, image_v), None, None)
        token = self.token.finish(token, attend(token_q, keys, values), None, None)
        return image, token


class Encoder(nn.Module):
    """Patches `b n p` to token features `b k e`."""

    def __init__(
        self, config: EncoderConfig, *, patch_dim: int, grid: int, num_tokens: int, code_dim: int
    ) -> None:
        super().__init__()
        self.patch_in = nn.Linear(patch_dim, config.dim)
        positions = sincos(grid_positions(grid, grid), config.dim, extent=grid)
        self.register_buffer("positions", positions)
        self.queries = nn.Parameter(initial_queries(num_tokens, grid, config.dim, config.queries))
        self.blocks = nn.ModuleList(
            EncoderBlock(config, last=i + 1 == config.depth) for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.code_out = nn.Linear(config.dim, code_dim)

    def forward(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b k e"]:
        """Return the continuous features that the quantizer rounds."""
        image = self.patch_in(patches)
        # The residual stream stays in the precision of the products (bf16 under autocast).
        image = image + self.positions.to(image.dtype)
        token = self.queries.to(image.dtype).expand(len(patches), -1, -1)
        for block in self.blocks:
            image, token = block(image, token)
        return self.code_out(self.norm(token))
