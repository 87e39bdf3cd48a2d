"""The objective of the language model: next-token prediction, one cross-entropy for text and codes.

Stage 1 and stage 2 differ only in the documents and in which ids are supervised. Only supervised
positions pass through the head, which is most of the work where the vocabulary is large.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.config import UserError
from ddt_llama.language.batches import Batch
from ddt_llama.language.documents import IGNORED, KINDS
from ddt_llama.language.vocabulary import Vocabulary

# On a CPU time grows with every padded id, so short documents are not padded to the longest.
CPU_PARTS = 4
# Rows whose logits exist at once: few on a CPU, whose cache they are to stay in. On a GPU as many
# as hold so many logits, so that few parts are launched.
CPU_ROWS = 512
GPU_LOGITS = 2**27
EMPTY = "batch without a supervised id; raise the length or check the data"


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy over the supervised ids of a pass, of all processes together, in float32.

    `text_weight`: what an id of text or a mark counts where a code counts 1. An answer has few ids
    beside the codes of a picture: where all count alike it is hardly learned. `packed`: several
    documents share a row.

    Figures: `loss.text` (text and marks), `loss.code`, `accuracy` (that no id is likelier than the
    right one), `loss.<kind>`, `tokens` (ids of this process) and `padding` (the share of places
    that hold none).
    """

    vocabulary: Vocabulary
    text_weight: float = 1.0
    packed: bool = False

    def __call__(
        self, model: Any, batch: tuple[Any, ...], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and the figures. Raises UserError where nothing is supervised."""
        rows = Batch(*batch)
        if rows.ids.device.type == "cpu":
            rows = by_length(rows)
        targets = rows.labels[:, 1:]
        supervised = targets != IGNORED
        places = supervised.nonzero(as_tuple=True)
        wanted = targets[places]
        weights, total = self.weights(wanted)
        if not total:
            raise UserError(EMPTY)
        hidden = supervised_hidden(model, rows.ids, supervised, rows.positions)
        loss, each, right = head_loss(model, hidden, wanted, weights / total)
        return loss, self.figures(rows, places, each, right)

    def weights(
        self, wanted: Int[Tensor, " n"], counted: Bool[Tensor, " n"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what each wanted id counts (none: all are `counted`), and what they do together.

        Every process averages gradients with the others: its share of all ids is what counts.
        """
        code = self.vocabulary.in_image(wanted)
        weights = code + self.text_weight * ~code
        weights = weights if counted is None else weights * counted
        return weights, distributed.all_reduce_sum(weights.sum()) / distributed.world_size()

    @torch.no_grad()
    def figures(
        self, rows: Batch, places: tuple[Tensor, ...], each: Tensor, right: Tensor
    ) -> dict[str, Tensor]:
        """Return what to log of the targets at `places`: their losses, and if none is likelier."""
        code = self.vocabulary.in_image(rows.labels[:, 1:][places])
        figures = {
            "accuracy": right.float().mean(),
            "loss.text": mean_of(each, ~code),
            "loss.code": mean_of(each, code),
            "tokens": rows.attention_mask.sum(),
            "padding": 1 - rows.attention_mask.float().mean(),
        }
        if rows.kinds is not None:
            kinds = rows.kinds[places]
            figures |= {f"loss.{n}": mean_of(each, kinds == k) for k, n in enumerate(KINDS)}
        return figures

    def before_step(self, model: Any, step: int) -> None:
        """Choose how attention is computed.

        On a CPU by plain matrix products: the backward pass of the fused kernel in bfloat16 is four
        to six times slower there (torch 2.13); a step of the nano model takes 0.68 of its time
        without it. Of packed rows on a GPU by flex attention, which passes over what a document
        does not see.
        """
        used = model.config._attn_implementation
        if model.device.type == "cpu":
            if used == "sdpa":
                model.set_attn_implementation("eager")
        elif self.packed and model._supports_flex_attn and used != "flex_attention":
            model.set_attn_implementation("flex_attention")

    def parts_to_compile(self, model: Any) -> list[nn.Module]:
        """Compile the decoder and the softmax; the rest has a new shape at every step."""
        return [model.base_model, _scaled_softmax]


def supervised_hidden(
    model: Any,
    ids: Int[Tensor, "b l"],
    supervised: Tensor,
    positions: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "n d"]:
    """Return what the head reads at each position where `supervised` (b, l-1) is true.

    `model` is any causal LM of transformers. Its attention mask is left out: batches are padded on
    the right, so no real id sees padding, and attention takes its fast causal path; of packed rows
    the `positions` say where a document begins. On a CPU the rows go through in parts, each only as
    long as its last supervised id.
    """
    parts = CPU_PARTS if ids.device.type == "cpu" else 1
    taken = ids.chunk(parts)
    told = [None] * len(taken) if positions is None else positions.chunk(parts)
    hidden = []
    for rows, wanted, counted in zip(taken, supervised.chunk(parts), told, strict=True):
        places = wanted.nonzero(as_tuple=True)  # before the device has much to do: it waits for it
        length = wanted.shape[1]
        if parts > 1 and len(places[1]):
            length = int(places[1].max()) + 1
        where = {} if counted is None else {"position_ids": counted[:, :length]}
        decoded = model.base_model(input_ids=rows[:, :length], use_cache=False, **where)
        hidden.append(decoded.last_hidden_state[places])
    return torch.cat(hidden)


def head_loss(
    model: Any,
    hidden: Float[Tensor, "n d"],
    wanted: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the sum of weighted cross-entropies, each one (no gradient), and if none is likelier.

    Without `weights` the sum is the mean.
    A head without bias and soft cap goes through in parts (`LinearCrossEntropy`).
    """
    if weights is None:
        weights = hidden.new_full((len(hidden),), 1 / len(hidden), dtype=torch.float32)
    head = model.get_output_embeddings()
    if soft_cap(model) is None and getattr(head, "bias", None) is None:
        return cast(Any, LinearCrossEntropy.apply(hidden, head.weight, wanted, weights))
    logits = scores(model, hidden)
    each = F.cross_entropy(logits, wanted, reduction="none")
    return (weights * each).sum(), each.detach(), logits.argmax(-1) == wanted


def soft_cap(model: Any) -> float | None:
    """Return the size that logits do not exceed (Gemma 2), None where there is none."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def scores(model: Any, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
    """Return the logits of what the head reads."""
    logits, cap = model.get_output_embeddings()(hidden).float(), soft_cap(model)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def surprises(
    model: Any, hidden: Float[Tensor, "n d"], wanted: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the cross-entropy of each wanted id, a part of the rows at a time; no gradient."""
    at_once = rows_at_once(hidden.device, model.get_output_embeddings().weight)
    parts = zip(hidden.split(at_once), wanted.split(at_once), strict=True)
    each = [F.cross_entropy(scores(model, one), ids, reduction="none") for one, ids in parts]
    return torch.cat(each)


def rows_at_once(device: torch.device, table: Tensor) -> int:
    """Return of how many rows the logits exist at once."""
    return CPU_ROWS if device.type == "cpu" else max(CPU_ROWS, GPU_LOGITS // len(table))


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise UserError for a model that does more behind its head than training would.

    Granite and Cohere, for instance, scale their logits: trained without it they would be drawn
    from at another temperature.
    """
    ids = torch.arange(4, device=model.device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    own = scores(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own, whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
        raise UserError(
            f"start: a {model.config.model_type} model changes its logits behind the head, which "
            "training here does not; choose one that does not, such as a Llama, Qwen or Gemma"
        )


class _ScaledSoftmax(nn.Module):
    """Softmax of each row times its scale, in the dtype of the logits; largest logit, log sum exp.

    A module because modules can be compiled, which makes one pass of four.
    """

    def forward(
        self, logits: Float[Tensor, "n v"], scale: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n v"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        exact = logits.float()
        highest = exact.amax(-1)
        powers = (exact - highest[:, None]).exp()
        total = powers.sum(-1)
        return (powers * (scale / total)[:, None]).to(logits.dtype), highest, highest + total.log()


_scaled_softmax = _ScaledSoftmax()


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, a part of the rows at a time; never all logits at once.

    The gradient of a part is taken while its logits are at hand, which saves memory (rows x
    vocabulary, the largest thing in a step) and on a CPU time. Logits are rounded to the precision
    of the products and summed in float32. The idea is that of Liger Kernel (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, wanted: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted sum, each row's loss, and whether no id is likelier."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        table = weight.to(dtype or weight.dtype)
        each = hidden.new_empty(len(hidden), dtype=torch.float32)
        right = torch.empty_like(wanted, dtype=torch.bool)
        hidden_grad = torch.empty_like(hidden)
        learns = ctx.needs_input_grad[1]  # not where a head is frozen: a third of the work
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        with torch.autocast(device, enabled=False):
            at_once = rows_at_once(hidden.device, weight)
            for start in range(0, len(hidden), at_once):
                part = slice(start, start + at_once)
                rows, scale = hidden[part].to(table.dtype), weights[part].float()
                logits = rows @ table.t()
                slope, highest, total = _scaled_softmax(logits, scale)
                at = torch.arange(len(rows), device=rows.device), wanted[part]
                found = logits[at].float()
                right[part] = found == highest
                each[part] = total - found
                slope[at] = (scale * torch.expm1(found - total)).to(table.dtype)
                hidden_grad[part] = slope @ table
                if weight_grad is not None:
                    weight_grad += slope.t() @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.mark_non_differentiable(each, right)
        ctx.weight_dtype = weight.dtype
        return (weights * each).sum(), each, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Scale the gradients that the forward pass has left."""
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = (weight_grad * grads[0]).to(ctx.weight_dtype)
        return hidden_grad * grads[0], weight_grad, None, None


def by_length(batch: Batch) -> Batch:
    """Sort the rows of a batch by their last supervised id; no figure depends on their order."""
    places = torch.arange(batch.labels.shape[1], device=batch.labels.device)
    order = ((batch.labels != IGNORED) * places).amax(1).argsort(stable=True)
    return Batch._make(None if part is None else part[order] for part in batch)


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen values; nan, which no log line counts, where there is none."""
    return values.where(chosen, 0).sum() / chosen.sum()
