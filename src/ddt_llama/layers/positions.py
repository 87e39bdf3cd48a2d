"""Fixed sine-cosine positions over any number of axes (the 1-D and 2-D tables of the paper)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError


def grid_positions(*sizes: int) -> Float[Tensor, "n axes"]:
    """Return the coordinates of a grid's cells in raster order, the last axis fastest."""
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))


def sincos(positions: Float[Tensor, "n axes"], dim: int, extent: float) -> Float[Tensor, "n {dim}"]:
    """Return sine-cosine embeddings; `dim` is shared equally between the axes.

    Wavelengths rise geometrically from two cells to twice the `extent` (the length of the longest
    axis, in cells), so that the numbers vary over the grid and the product of two embeddings peaks
    where their positions agree. With the usual longest wavelength of 10,000 cells most
    numbers are constant on a grid of 8 x 8, and attention starts without a sense of place.
    Raises UserError unless `dim` is a multiple of twice the number of axes.
    """
    axes = positions.shape[1]
    if dim % (2 * axes):
        raise UserError(f"dim {dim}: must be a multiple of {2 * axes}, sine and cosine an axis")
    half = dim // (2 * axes)
    shares = torch.arange(half, dtype=torch.float32) / max(1, half - 1)
    frequencies = math.pi * max(extent, 1.0) ** -shares
    angles = positions[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(len(positions), dim)
