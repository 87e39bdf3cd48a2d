"""The objective of a model that is to draw without guidance: pictures under their own text and not.

A stage behind the instructions. A frozen copy of the model, as it was at the start, says what was
likely before; codes of a picture are to become likelier under their text, and less likely under the
text of another. All other documents are learned from by next-token prediction as before. Source:
condition contrastive alignment (Chen, Su, Sun, Zhu, arXiv 2410.09347) and its authors' code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.language.batches import Batch
from ddt_llama.language.documents import IGNORED
from ddt_llama.training.language import (
    EMPTY,
    NextToken,
    by_length,
    head_loss,
    mean_of,
    supervised_hidden,
    surprises,
)


@dataclass(frozen=True)
class AlignmentConfig:
    """How hard pictures are bound to their text.

    `beta` is what a nat of a whole picture counts: a small one moves far before it is content.
    `weight` (the paper's lambda) is how many times as much a picture under another's text counts as
    one under its own: a larger one acts like a larger guidance scale. The authors' commands have
    0.02 and 50 to 1,000, for classes and at rates of 1e-5 and 2e-5; by 0.02 and 100 at 1e-4 nano
    forgets how to draw (experiments/0054). `kinds` are the documents that are aligned; of all
    others, and of these without text, the next token is learned.
    """

    beta: float = 0.1
    weight: float = 1.0
    kinds: tuple[Literal["draw", "edit"], ...] = ("draw", "edit")

    def __post_init__(self) -> None:
        """Refuse what aligns nothing."""
        check_range(self, 0, math.inf, "weight")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta: given {self.beta}, allowed is more than 0")
        if not self.kinds:
            raise UserError("kinds: none given, allowed are draw and edit")


@dataclass(frozen=True)
class Alignment:
    """Mean next-token loss of all else, plus the mean contrast of the documents that come twice.

    With r = log p(x|c) - log p_ref(x|c), summed over the codes x of a picture, a picture counts
    -log s(beta r) under its text c and -weight log s(-beta r) under another's (s: the logistic
    function), both divided by max(weight, 1): the form of the authors' code; their paper has no
    divisor. At the start the contrast is (1 + weight) log 2 / max(weight, 1).

    Differs from the paper: documents without text, which guidance needs, and those whose neighbour
    says the same learn by the next token, because all else does here; in the paper's code by
    -log s(beta r), twice.

    Figures: those of `NextToken`, of documents under their own text; `loss.contrast`; `r.own` and
    `r.other`, the mean r of either kind.
    """

    usual: NextToken
    reference: Any  # a model of the same kind that nobody trains
    config: AlignmentConfig

    def __call__(
        self, model: Any, batch: tuple[Any, ...], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and the figures. Raises UserError where there is nothing to learn."""
        rows = Batch(*batch)
        if rows.ids.device.type == "cpu":
            rows = by_length(rows)
        assert rows.contrast is not None
        targets, sides = rows.labels[:, 1:], rows.contrast[:, 1:]
        code = self.usual.vocabulary.in_image(targets)
        supervised = (targets != IGNORED) & (code | (sides == 0))
        places = supervised.nonzero(as_tuple=True)
        wanted, side = targets[places], sides[places]
        hidden = supervised_hidden(model, rows.ids, supervised, rows.positions)

        twice = side.nonzero(as_tuple=True)
        numbers = _numbers(rows)[places][twice]
        now = surprises(model, hidden[twice], wanted[twice])
        before = self._before(rows, supervised & (sides != 0), wanted[twice])
        r = now.new_zeros(rows.ids.numel() + 1).index_add(0, numbers, before - now)
        signs = torch.zeros_like(r).index_copy(0, numbers, side[twice].to(r.dtype))
        values, slopes = contrast(r, signs, self.config.beta, self.config.weight)
        pairs = distributed.all_reduce_sum((signs > 0).sum()) / distributed.world_size()
        share = 1 / (max(self.config.weight, 1.0) * (pairs if pairs else 1.0))

        weights, total = self.usual.weights(wanted, side == 0)
        if not total and not pairs:
            raise UserError(EMPTY)
        weights = weights / (total if total else 1.0)
        # r falls with the cross-entropy of each code, so that these get its gradient.
        weights = weights.index_copy(0, twice[0], -slopes[numbers] * share)
        straight, each, right = head_loss(model, hidden, wanted, weights)
        with torch.no_grad():
            aligned = values.sum() * share
            value = aligned + (weights * each).where(side == 0, 0).sum()
            own = (side >= 0).nonzero(as_tuple=True)
            seen = tuple(place[own] for place in places)
            figures = self.usual.figures(rows, seen, each[own], right[own])
            figures["loss.contrast"] = aligned
            figures |= {"r.own": mean_of(r, signs > 0), "r.other": mean_of(r, signs < 0)}
        return straight + (value - straight).detach(), figures

    @torch.no_grad()
    def _before(self, rows: Batch, chosen: Tensor, wanted: Tensor) -> Float[Tensor, " n"]:
        """Return the cross-entropies of the `chosen` places (b, l-1) by the reference."""
        kept = chosen.any(1).nonzero().flatten()
        if not len(kept):
            return torch.zeros(0, device=chosen.device)
        positions = None if rows.positions is None else rows.positions[kept]
        hidden = supervised_hidden(self.reference, rows.ids[kept], chosen[kept], positions)
        return surprises(self.reference, hidden, wanted)

    def before_step(self, model: Any, step: int) -> None:
        """Choose how attention is computed, of both alike."""
        self.usual.before_step(model, step)
        self.usual.before_step(self.reference, step)

    def parts_to_compile(self, model: Any) -> list[nn.Module]:
        """Compile the decoder of the reference, too."""
        return [*self.usual.parts_to_compile(model), self.reference.base_model]


def contrast(
    r: Float[Tensor, " n"], signs: Float[Tensor, " n"], beta: float, weight: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return what pictures count and its slope in r: `signs` 1 own text, -1 another's, 0 nothing.

    -w log s(sign beta r) with w = 1 or `weight`, and -w sign beta s(-sign beta r).
    """
    w = (signs > 0) + weight * (signs < 0)
    bound = signs * beta * r
    return -w * F.logsigmoid(bound), -w * signs * beta * torch.sigmoid(-bound)


def _numbers(rows: Batch) -> Int[Tensor, "b l"]:
    """Number the documents of a batch, all ids of one alike; less than one more than ids."""
    if rows.positions is None:
        return torch.arange(len(rows.ids), device=rows.ids.device)[:, None].expand_as(rows.ids)
    return (rows.positions == 0).flatten().cumsum(0).view_as(rows.ids)
