"""The two operations of the decode step that pay to be told how: products and norms of few rows.

Both are the same arithmetic as torch's own, up to rounding, for float32 and bfloat16 on a CPU;
elsewhere they are torch's own.

A product is made with the same weight thousands of times, so the weight is laid out once. Which
layout is fastest depends on the processor (experiments/0018): on an Intel with AMX the transposed
weight, which MKL multiplies with 2 to 16 rows up to 4.7 times as fast as oneDNN's packed one; on an
AMD the packed one, 1.5 to 4 times as fast as `F.linear` at 4 to 320 rows. Weights of bfloat16 are
packed on both.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["transposed", "packed", "plain"]
ROWS_HINT = 16  # what the packing is laid out for; 2 and 16 measured alike


class Product:
    """x -> x W^T + bias for a weight that no longer changes."""

    def __init__(self, weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None) -> None:
        """Lay `weight` out as this processor likes it."""
        self.bias = bias
        self.layout = layout_for(weight)
        self.weight = weight
        if self.layout == "transposed":
            self.weight = weight.t().contiguous()
        elif self.layout == "packed":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)

    @property
    def bytes(self) -> int:
        """What is read of the weight for a product; what is packed does not tell it itself."""
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        """Multiply the last axis."""
        if self.layout == "transposed":
            product = x @ self.weight
            return product if self.bias is None else product.add_(self.bias)
        if self.layout == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class RmsNorm:
    """x -> scale * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, scale: Float[Tensor, " k"], eps: float) -> None:
        """Move the mean's divisor into `scale`: x / sqrt(sum + k eps) * (scale sqrt(k))."""
        self.scale, self.eps = scale, eps
        self.lean = _on_cpu(scale)
        if self.lean:
            width = scale.shape[0]
            self._grown = scale.float() * math.sqrt(width)
            self._floor = self._grown.new_tensor(math.sqrt(width * eps))

    def __call__(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        """Normalise; three small operations, where torch's on a CPU are a dozen."""
        if self.lean:
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            return (x / torch.hypot(length, self._floor)).mul_(self._grown).to(x.dtype)
        return F.rms_norm(x, self.scale.shape, self.scale, self.eps)


def layout_for(weight: Tensor) -> Layout:
    """Choose how the weight of a product is kept; the operators of "packed" need oneDNN."""
    if not _on_cpu(weight):
        return "plain"
    wide = weight.dtype == torch.float32
    if wide and torch.cpu._is_amx_tile_supported() and torch.backends.mkl.is_available():
        return "transposed"
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "plain"
    if torch.backends.mkldnn.is_available() and (
        wide or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return "packed"
    return "plain"


def _on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
