"""Vector quantizer on the unit sphere, its codebook an exponential moving average.

Source: van den Oord et al. 2017 (appendix A.1) for the moving average; cosine distance as in
Selftok, and its rule that a code used too little is replaced by an encoder output of the batch, at
every step (there: below 0.2 of an even share). Counts and sums are reduced over ranks, and
replacements drawn from all ranks' outputs by one seed, so that any number of ranks keeps the same
codebook.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range

# One code is replaced for so many features of a batch, at most.
REPLACED_PER_FEATURES = 8

# Whose cosines exist at once. On a CPU those of 64 stay in the cache (experiments/0017).
VECTORS_AT_ONCE = {"cpu": 64}
GROUP = 128  # codes
MOST_VECTORS = 16_384  # anywhere else


@dataclass(frozen=True)
class QuantizerConfig:
    """`decay` of the moving average; a code under `dead_share` of an even share is replaced.

    Where a few codes carry most positions (an empty background), the useful rest lies far below an
    even share: a small `dead_share` lets it live. `rate` is what one nat of a code's length
    (-log of its share) costs against squared distance when pictures are encoded: of codes nearly
    as near the commonest is taken, which a language model learns sooner (see `cheapest`).
    """

    codebook_size: int = 1024
    code_dim: int = 8
    decay: float = 0.99
    dead_share: float = 0.2
    rate: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes and shares that cannot be."""
        check_range(self, 1, math.inf, "codebook_size", "code_dim")
        check_range(self, 0, 1, "decay", "dead_share")
        check_range(self, 0, math.inf, "rate")


class Quantized(NamedTuple):
    """`values` carry the straight-through gradient; `commitment` is a scalar, 0 to 4."""

    values: Float[Tensor, "b k e"]
    codes: Int[Tensor, "b k"]
    commitment: Float[Tensor, ""]


class Quantizer(nn.Module):
    """Nearest code by cosine; the codebook moves by `update`, never by gradient."""

    codebook: Tensor
    filled: Tensor
    lengths: Tensor
    counts: Tensor
    sums: Tensor
    usage: Tensor

    def __init__(self, config: QuantizerConfig, num_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.frozen = False  # codes keep their meaning, and are those of `encode`
        size, dim = config.codebook_size, config.code_dim
        codebook = F.normalize(torch.randn(size, dim), dim=-1)
        self.register_buffer("codebook", codebook)
        # False until the first training batch has filled the codebook with its own features.
        self.register_buffer("filled", torch.zeros((), dtype=torch.bool))
        self.register_buffer("lengths", torch.zeros(size))  # of codes, in nats
        self.register_buffer("counts", torch.zeros(size), persistent=False)
        self.register_buffer("sums", torch.zeros(size, dim), persistent=False)
        # How often each position uses each code, decayed: the source of the usage metrics.
        self.register_buffer("usage", torch.zeros(num_tokens, size), persistent=False)

    def nearest(self, unit: Float[Tensor, "*b e"]) -> Int[Tensor, "*b"]:
        """Return the index of the code with the largest cosine."""
        return self._best(unit)

    def cheapest(self, unit: Float[Tensor, "*b e"]) -> Int[Tensor, "*b"]:
        """Return the code with the least squared distance + `rate` x length.

        Entropy-constrained vector quantization (Chou, Lookabaugh and Gray 1989), at encoding only:
        training assigns the nearest code, or rare ones would soon die out.
        """
        return self._best(unit, self.config.rate / 2 * self.lengths)

    def _best(
        self, unit: Float[Tensor, "*b e"], cost: Float[Tensor, " v"] | None = None
    ) -> Int[Tensor, "*b"]:
        """Return the index of the code with the largest cosine less `cost`; of equals the first.

        The largest of a group is found in vectors, an index is not: so the group is looked for
        first, and then the place in it (three times as fast on a CPU).
        """
        rows, codes = unit.reshape(-1, unit.shape[-1]), self.codebook
        groups = -(-len(codes) // GROUP)
        table = codes.new_full((groups * GROUP, codes.shape[1] + 1), -torch.inf)
        table[:, :-1] = 0
        table[: len(codes), :-1] = codes
        table[: len(codes), -1] = 0 if cost is None else -cost  # what a row's last number, 1, adds
        rows, table = F.pad(rows, (0, 1), value=1.0), table.t().contiguous()
        best = []
        # In bf16 near cosines tie and share a code: that alone can collapse the codebook.
        with torch.autocast(unit.device.type, enabled=False):
            for part in rows.split(VECTORS_AT_ONCE.get(unit.device.type, MOST_VECTORS)):
                gain = (part @ table).unflatten(-1, (groups, GROUP))
                group = gain.amax(dim=-1).argmax(dim=-1)
                inside = gain[torch.arange(len(part), device=unit.device), group].argmax(dim=-1)
                best.append(group * GROUP + inside)
        return torch.cat(best).view(unit.shape[:-1])

    def weigh(self, counts: Float[Tensor, " v"]) -> None:
        """Take the lengths of codes from how often each was used.

        None is longer than that of a code used a hundredth of an even share.
        """
        share = counts / counts.sum()
        self.lengths.copy_(-share.clamp_min(0.01 / len(counts)).log())

    def look_up(self, codes: Int[Tensor, "*b"]) -> Float[Tensor, "*b e"]:
        """Return the unit vectors of the codes."""
        return self.codebook[codes]

    def values(self, codes: Int[Tensor, "b k"] | Float[Tensor, "b k e"]) -> Float[Tensor, "b k e"]:
        """Look up codes that are to be decoded; vectors in their place pass as they are.

        Raises UserError for another shape, or a code that does not exist.
        """
        vectors = codes.is_floating_point()
        row = (len(self.usage), self.config.code_dim)[: 2 if vectors else 1]
        if tuple(codes.shape[1:]) != row:
            wanted = ", ".join(map(str, ("b", *row)))
            raise UserError(f"decode got codes of shape {tuple(codes.shape)}; expected ({wanted})")
        if vectors:
            return codes
        top = self.config.codebook_size - 1
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= top:
            raise UserError(f"decode got a code outside 0..{top}")
        return self.look_up(codes)

    def forward(
        self,
        features: Float[Tensor, "b k e"],
        rounding: float = 1.0,
        slips: Float[Tensor, "b k e"] | None = None,
    ) -> Quantized:
        """Round features to codes; `rounding` < 1 goes only that share of the way (warm-up).

        Where it is frozen, to the codes that `encode` gives, all the way, and the commitment is 0;
        with `slips`, to those of unit features moved by them: mostly other codes nearby.
        """
        unit = F.normalize(features.float(), dim=-1)
        if self.frozen:
            moved = unit if slips is None else F.normalize(unit + slips, dim=-1)
            codes = self.cheapest(moved.detach())
            return Quantized(self.look_up(codes), codes, unit.new_zeros(()))
        codes = self.nearest(unit.detach())
        target = self.look_up(codes)
        commitment = (unit - target).square().sum(-1).mean()
        return Quantized(unit + rounding * (target - unit).detach(), codes, commitment)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "b k e"], codes: Int[Tensor, "b k"], seed: int) -> int:
        """Move the codebook towards a training batch; return how many dead codes were replaced.

        `seed` draws the replacements; it must be equal on all ranks and new at every step.
        """
        config = self.config
        decay = config.decay
        unit = F.normalize(features.float(), dim=-1).flatten(0, -2)
        flat = codes.flatten()
        counts = torch.bincount(flat, minlength=config.codebook_size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, flat, unit)
        counts, sums = distributed.all_reduce_sum(counts), distributed.all_reduce_sum(sums)
        self.count_usage(codes)
        even_share = counts.sum() / config.codebook_size
        if self.filled and not self.counts.any():  # a release: goes on from its codebook
            self.counts.copy_(self.codebook.any(-1) * even_share)
            self.sums.copy_(self.codebook * even_share)
        # At the very first step every code is dead, and so drawn from data.
        self.counts.mul_(decay).add_(counts * self.filled, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums * self.filled, alpha=1 - decay)
        dead = (self.counts < config.dead_share * even_share) | ~self.filled
        if self.filled:  # few at once, or copies of one feature would fight for its place
            most = max(1, len(unit) * distributed.world_size() // REPLACED_PER_FEATURES)
            dead &= dead.cumsum(0) <= most
        self.filled.fill_(True)
        replaced = int(dead.sum())
        if replaced:
            self.sums[dead] = self._worst_served(unit, flat, replaced, seed) * even_share
            self.counts[dead] = even_share
        self.weigh(self.counts)
        self.codebook.copy_(F.normalize(self.sums, dim=-1))
        return replaced

    def _worst_served(
        self, unit: Float[Tensor, "n e"], codes: Int[Tensor, " n"], count: int, seed: int
    ) -> Float[Tensor, "count e"]:
        """Draw features of all ranks, in proportion to their squared distance from their code.

        Drawn alike (as Selftok does) most would come from what is common, such as an empty
        background, and be served already. This is the rule of k-means++.
        """
        distance = (unit - self.codebook[codes]).square().sum(-1)
        everyone, distance = distributed.all_gather(unit), distributed.all_gather(distance)
        generator = torch.Generator().manual_seed(seed)
        # A cumulative sum: torch.multinomial refuses to draw more often than there are features.
        total = distance.double().cpu().clamp_min(1e-12).cumsum(0)
        draws = torch.rand(count, generator=generator, dtype=torch.float64) * total[-1]
        picks = torch.searchsorted(total, draws).clamp_max(len(everyone) - 1)
        return everyone[picks.to(unit.device)]

    @torch.no_grad()
    def count_usage(self, codes: Int[Tensor, "b k"]) -> None:
        """Count the codes of a training batch for `metrics`."""
        positions = torch.arange(codes.shape[1], device=codes.device) * self.config.codebook_size
        hits = torch.bincount((codes + positions).flatten(), minlength=self.usage.numel())
        hits = hits.view_as(self.usage).float()
        self.usage.mul_(self.config.decay).add_(distributed.all_reduce_sum(hits))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return shares of use over recent batches.

        `used`: share of the codes seen; `perplexity`: exp of the entropy of all codes;
        `position_perplexity`: the mean of that at each position.
        """

        def perplexity(hits: Tensor) -> Tensor:
            p = hits / hits.sum(-1, keepdim=True).clamp_min(1e-9)
            return torch.exp(-(p * p.clamp_min(1e-9).log()).sum(-1))

        return {
            "used": float((self.usage.sum(0) > 0.5).float().mean()),
            "perplexity": float(perplexity(self.usage.sum(0))),
            "position_perplexity": float(perplexity(self.usage).mean()),
        }


def keep_codes(tokenizer: Any) -> None:
    """Leave encoder and codebook as they are in training, so that codes keep their meaning."""
    tokenizer.encoder.requires_grad_(False)
    tokenizer.quantizer.frozen = True
