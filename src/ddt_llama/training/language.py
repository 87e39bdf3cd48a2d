"""The objective of the language model: next-token prediction, one cross-entropy for text and codes.

Stage 1 and stage 2 differ only in the documents and in which ids are supervised. Only supervised
positions pass through the head, which is most of the work where the vocabulary is large.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddt_llama.config import UserError
from ddt_llama.language.documents import IGNORED, KINDS
from ddt_llama.language.vocabulary import Vocabulary

# On a CPU time grows with every padded id, so short documents are not padded to the longest.
CPU_PARTS = 4


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy over the supervised ids of a batch, in float32.

    A batch is `(ids, labels, attention_mask)` as `collate` gives it, or with the `kind_indices` of
    its documents as a fourth part. Figures: `loss.text` (text and marks), `loss.code`, `accuracy`,
    and `loss.<kind>` where kinds are given.
    """

    vocabulary: Vocabulary

    def __call__(
        self, model: Any, batch: tuple[Tensor, ...], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and the figures. Raises UserError where nothing is supervised."""
        if batch[0].device.type == "cpu":
            batch = by_length(batch)
        ids, labels = batch[0], batch[1]
        targets = labels[:, 1:]
        supervised = targets != IGNORED
        wanted = targets[supervised]
        if not len(wanted):
            raise UserError("batch without a supervised id; raise the length or check the data")
        logits = supervised_logits(model, ids, supervised)
        each = F.cross_entropy(logits, wanted, reduction="none")
        with torch.no_grad():
            code = self.vocabulary.is_code(wanted)
            figures = {
                "accuracy": (logits.argmax(-1) == wanted).float().mean(),
                "loss.text": _mean(each, ~code),
                "loss.code": _mean(each, code),
            }
            if len(batch) > 3:
                kinds = batch[3][:, None].expand_as(targets)[supervised]
                figures |= {f"loss.{n}": _mean(each, kinds == k) for k, n in enumerate(KINDS)}
        return each.mean(), figures

    def before_step(self, model: Any, step: int) -> None:
        """On a CPU compute attention by plain matrix products.

        The backward pass of the fused kernel in bfloat16 is four to six times slower there (torch
        2.13); a step of the nano model takes 0.68 of its time without it.
        """
        if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")

    def parts_to_compile(self, model: Any) -> list[nn.Module]:
        """Compile the decoder; what follows has a new shape at every step."""
        return [model.base_model]


def supervised_logits(
    model: Any, ids: Int[Tensor, "b l"], supervised: Tensor
) -> Float[Tensor, "n v"]:
    """Return float32 logits for the id after each position where `supervised` (b, l-1) is true.

    `model` is any causal LM of transformers. Its attention mask is left out: batches are padded on
    the right, so no real id sees padding, and attention takes its fast causal path. On a CPU the
    rows go through in parts, each only as long as its last supervised id.
    """
    parts = CPU_PARTS if ids.device.type == "cpu" else 1
    hidden = []
    for rows, wanted in zip(ids.chunk(parts), supervised.chunk(parts), strict=True):
        ends = wanted.any(0).nonzero()
        length = int(ends[-1]) + 1 if parts > 1 and len(ends) else wanted.shape[1]
        decoded = model.base_model(input_ids=rows[:, :length], use_cache=False).last_hidden_state
        hidden.append(decoded[wanted[:, :length]])
    logits = model.get_output_embeddings()(torch.cat(hidden)).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def by_length(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sort the rows of a batch by their last supervised id; no figure depends on their order."""
    places = torch.arange(batch[1].shape[1], device=batch[1].device)
    order = ((batch[1] != IGNORED) * places).amax(1).argsort(stable=True)
    return tuple(part[order] for part in batch)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values; nan, which no log line counts, where there is none."""
    return values[chosen].mean()
