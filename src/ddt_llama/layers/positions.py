"""Fixed sine-cosine positions over any number of axes (the 1-D and 2-D tables of the paper)."""

import torch
from jaxtyping import Float
from torch import Tensor


def grid_positions(*sizes: int) -> Float[Tensor, "n axes"]:
    """Return the coordinates of a grid's cells in raster order, the last axis fastest."""
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))


def sincos(
    positions: Float[Tensor, "n axes"], dim: int, max_period: float = 10_000.0
) -> Float[Tensor, "n {dim}"]:
    """Return sine-cosine embeddings: `dim` is shared equally between the axes.

    Raises ValueError unless `dim` is a multiple of twice the number of axes.
    """
    axes = positions.shape[1]
    if dim % (2 * axes):
        raise ValueError(
            f"dim {dim} is not a multiple of {2 * axes} (sine and cosine of each axis)"
        )
    half = dim // (2 * axes)
    frequencies = max_period ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).reshape(len(positions), dim)
