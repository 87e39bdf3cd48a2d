"""The MMDiT decoder: noisy patches and the tokens visible at t, to the clean image.

Source: DDT-LLaMA figure 2 (SD3's MMDiT, quantised tokens enter the token stream through one
linear layer). Hidden tokens are masked; in a joint stream, and where a fine end stays hidden, they
are zeroed, too.

Differs from the paper by default: the token stream sees neither x_t nor t, and a token attends
only to itself and to finer tokens, which are visible whenever it is ("static"). Its keys and
values then do not change from step to step: computed once an image, reused by every step and by
several noise draws of one image in training. `token_stream="joint"` is SD3's own rule.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ddt_llama.layers import Stream, TimestepEmbedding, attend, grid_positions, sincos
from ddt_llama.tokenizer.encoder import Start, check_width, initial_queries, tie_queries_to_keys

TokenStream = Literal["static", "joint"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; `positions` of the tokens start as `EncoderConfig.queries` do.

    `gate_start` 0 is adaLN-zero, the paper's. Small trainings start with open gates (1): what the
    tokens say then reaches the picture from the first step on (experiments/0004).
    """

    dim: int = 160
    depth: int = 5
    num_heads: int = 5
    mlp_ratio: float = 4.0
    token_stream: TokenStream = "static"
    positions: Start = "spatial"
    gate_start: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that no attention has."""
        check_width(self)


class Memory(NamedTuple):
    """What the image stream reads of the tokens: a (key, value) pair `b h k e` a block."""

    pairs: list[tuple[Tensor, Tensor]]

    def repeat(self, draws: int) -> "Memory":
        """Return the memory with each row repeated for several noise draws of one image."""
        return Memory(
            [(k.repeat_interleave(draws, 0), v.repeat_interleave(draws, 0)) for k, v in self.pairs]
        )


class DecoderBlock(nn.Module):
    """One joint block: adaLN on the image stream, plain norms on the token stream.

    In the last block nothing reads the tokens any more but through their keys and values.
    """

    def __init__(self, config: DecoderConfig, *, last: bool) -> None:
        super().__init__()
        sizes = (config.dim, config.num_heads, config.mlp_ratio)
        self.image = Stream(*sizes, conditional=True, gate_start=config.gate_start)
        self.token = Stream(*sizes, conditional=False, keys_only=last)
        if config.positions != "normal":
            tie_queries_to_keys([self.image, self.token])

    def remember(
        self, token: Float[Tensor, "b k d"], mask: Bool[Tensor, "b_or_1 1 k k"]
    ) -> tuple[Float[Tensor, "b k d"], tuple[Tensor, Tensor]]:
        """Advance a static token stream; return it and its keys and values."""
        q, k, v = self.token.project(token, None)
        if not self.token.keys_only:
            token = self.token.finish(token, attend(q, k, v, mask), None, None)
        return token, (k, v)

    def denoise(
        self,
        image: Float[Tensor, "b n d"],
        condition: Float[Tensor, "b_or_1 d"],
        memory: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 1 l"],
    ) -> Float[Tensor, "b n d"]:
        """Advance the image stream; patches see all patches and the tokens in `mask`."""
        attention, mlp = self.image.modulations(condition)
        q, k, v = self.image.project(image, attention)
        keys, values = torch.cat([k, memory[0]], dim=2), torch.cat([v, memory[1]], dim=2)
        return self.image.finish(image, attend(q, keys, values, mask), attention, mlp)

    def joint(
        self,
        image: Float[Tensor, "b n d"],
        token: Float[Tensor, "b k d"],
        condition: Float[Tensor, "b_or_1 d"],
        mask: Bool[Tensor, "b 1 1 l"],
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k d"]]:
        """Advance both streams, every one seeing both (SD3's rule)."""
        attention, mlp = self.image.modulations(condition)
        q, k, v = self.image.project(image, attention)
        token_q, token_k, token_v = self.token.project(token, None)
        keys, values = torch.cat([k, token_k], dim=2), torch.cat([v, token_v], dim=2)
        image = self.image.finish(image, attend(q, keys, values, mask), attention, mlp)
        if not self.token.keys_only:
            token = self.token.finish(token, attend(token_q, keys, values, mask), None, None)
        return image, token


class Decoder(nn.Module):
    """Noisy patches `b n p` at t, with tokens, to the network's output `b n p`."""

    def __init__(
        self, config: DecoderConfig, *, patch_dim: int, grid: int, num_tokens: int, code_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_in = nn.Linear(patch_dim, config.dim)
        positions = sincos(grid_positions(grid, grid), config.dim, extent=grid)
        self.register_buffer("positions", positions)
        self.code_in = nn.Linear(code_dim, config.dim)
        start = initial_queries(num_tokens, grid, config.dim, config.positions)
        self.token_positions = nn.Parameter(start)
        self.timestep = TimestepEmbedding(config.dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, last=i + 1 == config.depth) for i in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(config.dim, 2 * config.dim)
        self.patch_out = nn.Linear(config.dim, patch_dim)
        for linear in (self.modulation_out, self.patch_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def embed(
        self, values: Float[Tensor, "b k e"], visible: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b k d"]:
        """Return the token stream's input; tokens outside `visible` are zeroed."""
        token = self.code_in(values)
        return (token + self.token_positions.to(token.dtype)) * visible[..., None]

    def remember(self, values: Float[Tensor, "b k e"], kept: Bool[Tensor, "b k"]) -> Memory:
        """Run a static token stream once; `kept` is False for a fine end that stays hidden."""
        token = self.embed(values, kept)
        k = token.shape[1]
        causal = torch.ones(k, k, dtype=torch.bool, device=token.device).tril()
        # A hidden token still looks at itself, or its softmax would be over nothing.
        own = torch.eye(k, dtype=torch.bool, device=token.device)
        mask = ((causal & kept[:, None, :]) | own)[:, None]
        pairs = []
        for block in cast(list[DecoderBlock], self.blocks):
            token, pair = block.remember(token, mask)
            pairs.append(pair)
        return Memory(pairs)

    def read(
        self, values: Float[Tensor, "b k e"], kept: Bool[Tensor, "b k"]
    ) -> "Memory | Float[Tensor, 'b k e']":
        """Return what every pass over an image reads: of a static token stream it is run once."""
        return self.remember(values, kept) if self.config.token_stream == "static" else values

    def forward(
        self,
        noisy: Float[Tensor, "b n p"],
        t: Float[Tensor, " b_or_1"],
        tokens: "Memory | Float[Tensor, 'b k e']",
        visible: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b n p"]:
        """Return the network's output for the noisy patches, at a time each or one for all.

        `tokens` is the `Memory` of a static token stream, or the quantised values of a joint one.
        """
        image = self.patch_in(noisy)
        # The residual stream stays in the precision of the products (bf16 under autocast).
        image = image + self.positions.to(image.dtype)
        condition = self.timestep(t)
        everywhere = visible.new_ones(len(noisy), noisy.shape[1])
        mask = torch.cat([everywhere, visible], dim=1)[:, None, None]
        blocks = cast(list[DecoderBlock], self.blocks)
        if isinstance(tokens, Memory):
            for block, pair in zip(blocks, tokens.pairs, strict=True):
                image = block.denoise(image, condition, pair, mask)
        else:
            token = self.embed(tokens, visible)
            for block in blocks:
                image, token = block.joint(image, token, condition, mask)
        shift, scale = self.modulation_out(F.silu(condition))[:, None].chunk(2, -1)
        return self.patch_out(self.norm_out(image) * (1 + scale) + shift)
