"""Scaled dot-product attention in the shape convention of the house.

Every attention of the tokenizers goes through `attend`, so a faster kernel has one home.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def split_heads(x: Float[Tensor, "b l d"], num_heads: int) -> Float[Tensor, "b h l e"]:
    """Cut the width into heads."""
    return rearrange(x, "b l (h e) -> b h l e", h=num_heads)


def merge_heads(x: Float[Tensor, "b h l e"]) -> Float[Tensor, "b l d"]:
    """Undo `split_heads`."""
    return rearrange(x, "b h l e -> b l (h e)")


def attend(
    query: Float[Tensor, "b h q e"],
    key: Float[Tensor, "b h l e"],
    value: Float[Tensor, "b h l e"],
    mask: Bool[Tensor, "b_or_1 1 q_or_1 l"] | None = None,
) -> Float[Tensor, "b q d"]:
    """Return softmax(QK^T / sqrt(e)) V with heads merged; `mask` is True where looking is allowed.

    Each query must be allowed at least one key. On a CPU that trains, plain matrix products are
    used: the backward pass of the fused kernel is four times slower there (torch 2.13, bf16).
    """
    if query.device.type == "cpu" and torch.is_grad_enabled():
        return merge_heads(attend_by_products(query, key, value, mask))
    return merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def attend_by_products(
    query: Float[Tensor, "b h q e"],
    key: Float[Tensor, "b h l e"],
    value: Float[Tensor, "b h l e"],
    mask: Bool[Tensor, "b_or_1 1 q_or_1 l"] | None = None,
) -> Float[Tensor, "b h q e"]:
    """Return the same attention by two batched matrix products and a softmax."""
    b, h, _, e = query.shape
    flat_q, flat_k, flat_v = (x.reshape(b * h, -1, e) for x in (query, key, value))
    scale = e**-0.5
    if mask is None:
        scores = torch.bmm(flat_q * scale, flat_k.transpose(1, 2))
    else:
        bias = torch.zeros_like(mask, dtype=flat_q.dtype).masked_fill(~mask, float("-inf"))
        bias = bias.expand(b, h, *bias.shape[2:]).reshape(b * h, *bias.shape[2:])
        scores = torch.baddbmm(bias, flat_q, flat_k.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1, dtype=scores.dtype), flat_v).view(b, h, -1, e)
