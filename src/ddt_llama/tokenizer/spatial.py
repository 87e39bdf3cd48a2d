"""The rival: a VQ-VAE, whose codes each stand for one square of the image.

Convolutions carry an image to a grid of features, a quarter of the area at every stage; each is
rounded to the nearest code, and convolutions carry the codes back. In raster order the grid is the
sequence that Chameleon, LlamaGen and Emu3 give to their language models. Source: van den Oord et
al. 2017 (arXiv 1711.00937); residual blocks with group normalisation as in VQGAN (Esser et al.
2021, arXiv 2012.09841); the quantizer is the one of the DDT tokenizer.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ddt_llama.checkpoint import save_release
from ddt_llama.config import UserError, check_range, to_dict
from ddt_llama.tokenizer.base import codes_fingerprint, open_network, visible_mask
from ddt_llama.tokenizer.quantizer import Quantized, Quantizer, QuantizerConfig

KIND = "spatial"


@dataclass(frozen=True)
class SpatialTokenizerConfig:
    """Everything that determines the network.

    `widths` are the channels at each resolution, from that of the image down; each is half the one
    before, so that a grid cell is 2^(len(widths) - 1) pixels wide. `blocks` are residual blocks at
    each resolution, in the encoder and as many in the decoder; `groups` of channels are normalised
    together. Raises UserError where sizes do not divide.
    """

    image_size: int = 64
    widths: tuple[int, ...] = (16, 48, 96, 224)
    blocks: tuple[int, ...] = (1, 1, 1, 2)
    groups: int = 8
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that leave a rest."""
        check_range(self, 1, math.inf, "groups", "image_size")
        if len(self.widths) != len(self.blocks):
            raise UserError(
                f"blocks: given {len(self.blocks)} numbers for {len(self.widths)} widths; give one "
                "for each"
            )
        if not self.widths or min(self.widths) < 1 or min(self.blocks) < 0:
            raise UserError(
                f"widths {self.widths}, blocks {self.blocks}: allowed are widths of 1 or more and "
                "0 or more blocks"
            )
        if odd := [width for width in self.widths if width % self.groups]:
            raise UserError(f"widths: {odd[0]} is not a multiple of groups {self.groups}")
        if self.image_size % self.cell:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of {self.cell}, the pixels that "
                f"{len(self.widths)} widths make one cell of; choose sizes that divide"
            )

    @property
    def cell(self) -> int:
        """Pixels along one side of what a code stands for."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.image_size // self.cell


class Rebuilt(NamedTuple):
    """What one training pass returns; `features` are the encoder's, before the quantizer."""

    output: Float[Tensor, "b 3 h w"]
    features: Float[Tensor, "b k e"]
    quantized: Quantized


class SpatialTokenizer(nn.Module):
    """Images `b 3 h w` in [-1, 1] to codes `b k` in raster order and back, in one pass each."""

    refines = False  # more steps, seeds and guidance change nothing
    prefixes = False  # a picture needs all its codes
    renders = False

    def __init__(self, config: SpatialTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.grid**2
        self.codebook_size = config.quantizer.codebook_size
        self.image_size = config.image_size
        self.quantizer = Quantizer(config.quantizer, self.num_tokens)
        sizes = config.widths, config.blocks, config.groups, config.quantizer.code_dim
        self.encoder, self.decoder = _encoder(*sizes), _decoder(*sizes)
        self.critic: nn.Module | None = None  # in training only; no folder holds it

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k e"]:
        """Return the features of all cells in raster order; UserError for another size."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[-2:]) != (size, size):
            raise UserError(
                f"got images of shape {tuple(images.shape)}; this tokenizer reads "
                f"(b, 3, {size}, {size}): resize and crop them first"
            )
        grid = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return rearrange(grid, "b e y x -> b (y x) e")

    def rebuild(self, values: Float[Tensor, "b k e"]) -> Float[Tensor, "b 3 h w"]:
        """Return the images that rounded features stand for, not clamped."""
        grid = rearrange(values, "b (y x) e -> b e y x", y=self.config.grid)
        return self.decoder(grid.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Float[Tensor, "b 3 h w"], rounding: float = 1.0) -> Rebuilt:
        """Encode, round and decode; the gradient passes the rounding straight through."""
        features = self.features(images)
        quantized = self.quantizer(features, rounding)
        return Rebuilt(self.rebuild(quantized.values), features, quantized)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b k"]:
        """Return the codes of images of the tokenizer's own size, in raster order."""
        features = F.normalize(self.features(images).float(), dim=-1)
        return self.quantizer.cheapest(features)

    def encode_grid(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b y x"]:
        """Return the codes where they stand in the image."""
        return rearrange(self.encode(images), "b (y x) -> b y x", y=self.config.grid)

    @torch.no_grad()
    def decode(
        self,
        codes: Int[Tensor, "b k"] | Float[Tensor, "b k e"],
        *,
        steps: int = 1,
        visible: int | Bool[Tensor, " k"] | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [-1, 1].

        `codes`: integers, or vectors in their place (features that were not rounded). One pass
        whatever `steps`, `seed` and `guidance_scale` are. `visible`: which codes to use; in place
        of the others stands a zero vector, of which nothing was learned. Raises UserError for a
        number less than all: which squares should those be?
        """
        if isinstance(visible, int) and visible != self.num_tokens:
            raise UserError(
                f"visible is {visible}; a spatial tokenizer decodes all {self.num_tokens} codes "
                "only: leave it out"
            )
        values = self.quantizer.values(codes)
        kept = visible_mask(visible, self.num_tokens).to(values.device)
        return self.rebuild(values * kept[:, None]).float().clamp(-1, 1)

    def fingerprint(self) -> str:
        """Return letters for encoder and codebook; those who share them share codes."""
        return codes_fingerprint(self, self.config, ())

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; float16 halves the file."""
        kept = {n: t for n, t in self.state_dict().items() if not n.startswith("critic.")}
        save_release(folder, kept, {"kind": KIND, **to_dict(self.config)}, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "SpatialTokenizer":
        """Open what `save` wrote, in eval mode; UserError for a wrong or damaged folder."""
        return open_network(folder, KIND, SpatialTokenizerConfig, cls)

    def code_vectors(self) -> Float[Tensor, "v e"]:
        """Return the codebook."""
        return self.quantizer.codebook

    def to_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Return the codes as they are: a language model reads them in raster order."""
        return codes

    def from_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Undo `to_language`."""
        return codes


class ResidualBlock(nn.Module):
    """x + two convolutions of 3 x 3, each behind a group normalisation and SiLU.

    The second begins at zero, and so the block as the identity.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = (nn.GroupNorm(groups, width) for _ in range(2))
        self.conv_in, self.conv_out = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        for begins_at_zero in self.conv_out.parameters():
            nn.init.zeros_(begins_at_zero)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return `x` with what the convolutions add."""
        hidden = self.conv_in(F.silu(self.norm_in(x)))
        return x + self.conv_out(F.silu(self.norm_out(hidden)))


class Doubling(nn.Module):
    """Twice the height and the width, by nearest neighbours.

    torch 2.13 compiles the gradient of `interpolate` in bfloat16 on a CPU to zeros, before some
    layers: the encoder would learn nothing, without a word.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return `x` with each number four times."""
        if torch.compiler.is_compiling():
            return x.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return F.interpolate(x, scale_factor=2)  # plain, it is the faster one


def _encoder(
    widths: Sequence[int], blocks: Sequence[int], groups: int, code_dim: int
) -> nn.Sequential:
    """Return image -> grid of features, the widths from left to right."""
    parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for place, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        if place:
            parts.append(nn.Conv2d(widths[place - 1], width, 3, stride=2, padding=1))
        parts += [ResidualBlock(width, groups) for _ in range(count)]
    parts += [nn.GroupNorm(groups, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], code_dim, 1)]
    return _named("patch_in", parts, "code_out")


def _decoder(
    widths: Sequence[int], blocks: Sequence[int], groups: int, code_dim: int
) -> nn.Sequential:
    """Return grid of vectors -> image, the widths from right to left."""
    parts: list[nn.Module] = [nn.Conv2d(code_dim, widths[-1], 3, padding=1)]
    for place in reversed(range(len(widths))):
        parts += [ResidualBlock(widths[place], groups) for _ in range(blocks[place])]
        if place:
            parts.append(Doubling())
            parts.append(nn.Conv2d(widths[place], widths[place - 1], 3, padding=1))
    parts += [nn.GroupNorm(groups, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 3, 3, padding=1)]
    return _named("code_in", parts, "patch_out")


def _named(first: str, parts: Sequence[nn.Module], last: str) -> nn.Sequential:
    """Chain parts, the ends with the names that they have in every tokenizer."""
    names = [first, *map(str, range(1, len(parts) - 1)), last]
    return nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
