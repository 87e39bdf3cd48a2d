"""Which token is visible when, and in which order the language model reads them.

This is the idea of the paper in one file: at time t the decoder sees the first k(t) tokens, so
token k must restore what the noise between its time and the last one destroyed. Index 0 is the
finest token (the paper's V_1, visible at every t > 0), the last index the coarsest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddt_llama.config import UserError

# "raster": by the place where a token starts (`token_places`), row by row.
LanguageOrder = Literal["coarse_to_fine", "fine_to_coarse", "raster"]

# Selftok's five pieces: the share of the tokens revealed in each fifth of t.
SELFTOK_PIECES = (192 / 512, 184 / 512, 72 / 512, 48 / 512, 16 / 512)


@dataclass(frozen=True)
class TokenSchedule:
    """k(t): linear, or piecewise linear with `pieces` shares over equal parts of [0, 1].

    Raises UserError for fewer than one token, or pieces that are negative or do not sum to 1.
    """

    num_tokens: int
    pieces: tuple[float, ...] = (1.0,)
    language_order: LanguageOrder = "coarse_to_fine"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise UserError(f"num_tokens is {self.num_tokens}; it must be at least 1")
        if not self.pieces or min(self.pieces) < 0 or abs(sum(self.pieces) - 1) > 1e-6:
            raise UserError(f"pieces {self.pieces} must be at least 0 and sum to 1")

    def num_visible(self, t: Float[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """Return k(t), the number of tokens visible at t: 0 at t = 0, all at t = 1.

        Differs from the paper: t is continuous, so its integer step becomes the ceiling of
        K(t), with K piecewise linear from 0 to T; on the paper's grid t = i / T both agree.
        """
        share = torch.zeros_like(t)
        for i, piece in enumerate(self.pieces):
            share = share + piece * (t * len(self.pieces) - i).clamp(0, 1)
        # The small slack keeps grid points such as 3/10 from rounding up to the next token.
        return (share * self.num_tokens - 1e-4).ceil().clamp(0, self.num_tokens).long()

    def window(
        self, t: Float[Tensor, "*b"], first: Int[Tensor, "*#b"] | int = 0
    ) -> Bool[Tensor, "*b k"]:
        """Return which tokens are visible at t: indices first <= i < k(t).

        `first` > 0 hides the fine end, so that a coarse prefix can be decoded (FlexTok's nested
        dropout, seen from the other side).
        """
        index = torch.arange(self.num_tokens, device=t.device)
        lower = first[..., None] if isinstance(first, Tensor) else first
        return (index >= lower) & (index < self.num_visible(t)[..., None])

    def probability_visible(self, t: Float[Tensor, " draws"]) -> Float[Tensor, " k"]:
        """Return, for a sample of the timestep density, how often each token is visible."""
        counts = torch.bincount(self.num_visible(t), minlength=self.num_tokens + 1)
        return counts.flip(0).cumsum(0).flip(0)[1:] / t.numel()

    def to_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Reorder codes to the language model's order."""
        return codes[:, self._written_order().to(codes.device)]

    def from_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Undo `to_language`."""
        return codes[:, self._written_order().argsort().to(codes.device)]

    def _written_order(self) -> Int[Tensor, " k"]:
        """Return the index of the token that the language model writes first, second, ..."""
        if self.language_order == "raster":
            return raster_order(self.num_tokens)
        indices = torch.arange(self.num_tokens)
        return indices.flip(0) if self.language_order == "coarse_to_fine" else indices


def token_places(num_tokens: int) -> Float[Tensor, "k 2"]:
    """Return the place (row, column) in [0, 1] at which each token starts, where it has one.

    The places are the centres of equal cells, in the rows x columns nearest to a square that hold
    all tokens (without a rest where no side is more than twice the other). The coarse end of the
    sequence (the last indices) is spread over the whole picture (`spread_out`). So a coarse prefix
    starts as a coarse picture, not as a corner of one.
    """
    root = math.isqrt(num_tokens)
    exact = (r for r in range(root, 0, -1) if num_tokens % r == 0 and num_tokens <= 2 * r * r)
    rows = next(exact, root)
    columns = -(-num_tokens // rows)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    cells = (grid + 0.5) / torch.tensor([rows, columns])
    return spread_out(cells, num_tokens).flip(0)


def token_squares(num_tokens: int) -> Float[Tensor, "k 3"]:
    """Return the square (row, column of its middle, side) at which a token of a pyramid starts.

    The last index is the whole picture, the four before it are its quarters, then come sixteenths,
    and so on; of the finest squares there are as many as tokens are left, spread over the picture.
    """
    squares: list[Tensor] = []
    left, level = num_tokens, 0
    while left:
        side = 2**level
        grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        middles = spread_out((grid + 0.5).view(-1, 2) / side, min(left, side * side))
        squares.append(torch.cat([middles, torch.full((len(middles), 1), 1 / side)], dim=1))
        left, level = left - len(middles), level + 1
    return torch.cat(squares).flip(0)


def spread_out(cells: Float[Tensor, "n 2"], count: int) -> Float[Tensor, "count 2"]:
    """Return the first `count` of the cells so that every beginning is spread evenly.

    Each time the free cell nearest to the next point of the R2 sequence (Roberts 2018).
    """
    free = torch.ones(len(cells), dtype=torch.bool)
    order = []
    for i in range(count):
        point = (0.5 + i * torch.tensor([0.7548776662466927, 0.5698402909980532])) % 1
        nearest = (cells - point).square().sum(1).masked_fill(~free, float("inf")).argmin()
        free[nearest] = False
        order.append(cells[nearest])
    return torch.stack(order)


@cache
def raster_order(num_tokens: int) -> Int[Tensor, " k"]:
    """Return the indices of the tokens row by row of the places where they start."""
    row, column = token_places(num_tokens).unbind(-1)
    return (row * 2 * num_tokens + column).argsort()


def step_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return one seed a row: row i of a batch started with one seed gets seed + i.

    Raises UserError if a list of seeds has another length than the batch.
    """
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds were given for {count} images; give one each, or one")
    return list(seed)
