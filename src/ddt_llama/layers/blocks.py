"""The halves of MMDiT blocks: each stream owns its weights, both share one attention.

Source: Esser et al. 2024 (SD3, section 4) for the two-stream block, Peebles and Xie 2023 (DiT)
for adaLN-zero. A `Stream` is one modality's half; encoder and decoder join two of them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddt_llama.layers.attention import split_heads


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer, each `b 1 d`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, modulation: Modulation | None) -> Tensor:
    """Return x (1 + scale) + shift, or x where there is no condition."""
    if modulation is None:
        return x
    return torch.addcmul(modulation.shift, x, 1 + modulation.scale)


class MLP(nn.Module):
    """Two linear maps with exact GELU between them: on CPUs three times faster than tanh."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Map each position on its own."""
        return self.down(F.gelu(self.up(x)))


class TimestepEmbedding(nn.Module):
    """Embed t in [0, 1]: sinusoids of 1000 t, then two linear maps (as in SD3)."""

    frequencies: Tensor

    def __init__(self, dim: int, num_frequencies: int = 256) -> None:
        super().__init__()
        half = num_frequencies // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.up = nn.Linear(num_frequencies, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return one vector a timestep."""
        angles = 1000.0 * t[:, None] * self.frequencies
        return self.down(F.silu(self.up(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class Stream(nn.Module):
    """One modality's half of a joint block: norm, query-key-value, output, MLP.

    With `conditional`, adaLN from a condition vector: shift, scale and gate for the attention and
    for the MLP. All start at zero (adaLN-zero: the block starts as the identity), except that the
    gates start at `gate_start`. With `keys_only` the stream ends here: others read its keys and
    values, and nothing of its own goes on (the last block's side stream, as in SD3).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        conditional: bool,
        gate_start: float = 0.0,
        keys_only: bool = False,
    ) -> None:
        super().__init__()
        self.gate_start, self.keys_only = gate_start, keys_only
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.modulation = nn.Linear(dim, 6 * dim) if conditional else None
        # Without a condition the norms carry their own scale and shift.
        self.norm_attention = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not conditional)
        self.reset_linear(self.qkv)
        if not keys_only:
            self.out = nn.Linear(dim, dim)
            self.norm_mlp = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not conditional)
            self.mlp = MLP(dim, int(dim * mlp_ratio))
            self.reset_linear(self.out, self.mlp.up, self.mlp.down)
        self.reset_modulation()

    def reset_linear(self, *linears: nn.Linear) -> None:
        """Start with Xavier weights and zero biases."""
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def reset_modulation(self) -> None:
        """Start with a modulation of zero, but for the gates' start."""
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
            _, _, attention_gate, _, _, mlp_gate = self.modulation.bias.data.chunk(6)
            attention_gate.fill_(self.gate_start)
            mlp_gate.fill_(self.gate_start)

    def modulations(
        self, condition: Float[Tensor, "b d"] | None
    ) -> tuple[Modulation | None, Modulation | None]:
        """Return the modulation of the attention and of the MLP; None without a condition."""
        if self.modulation is None or condition is None:
            return None, None
        six = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        return Modulation(*six[:3]), Modulation(*six[3:])

    def project(
        self, x: Float[Tensor, "b l d"], modulation: Modulation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, each `b h l e`."""
        q, k, v = self.qkv(modulate(self.norm_attention(x), modulation)).chunk(3, dim=-1)
        return (
            split_heads(q, self.num_heads),
            split_heads(k, self.num_heads),
            split_heads(v, self.num_heads),
        )

    def finish(
        self,
        x: Float[Tensor, "b l d"],
        attended: Float[Tensor, "b l d"],
        attention: Modulation | None,
        mlp: Modulation | None,
    ) -> Float[Tensor, "b l d"]:
        """Add the attention's result and the MLP's to the residual stream, gated."""
        update = self.out(attended)
        x = x + (update if attention is None else attention.gate * update)
        update = self.mlp(modulate(self.norm_mlp(x), mlp))
        return x + (update if mlp is None else mlp.gate * update)
