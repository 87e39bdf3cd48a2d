"""In how many bits the weights of a language model are held while it writes: 32, 16 or 8.

A token costs at least the reading of all weights once. bfloat16 halves them. int8 quarters those of
the matrix products: integers with a scale a row, made by torchao, multiplied with bfloat16
activations (weight-only). What is read and kept for each row, keys and values, is bfloat16 then.
"""

import importlib
import importlib.util
import logging
import warnings
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ddt_llama import distributed
from ddt_llama.config import UserError

Weights = Literal["float32", "bfloat16", "int8"]
FEW = 8  # rows up to which torch's own product of integers is faster than to widen them first
VECTOR = 32  # columns; that product reads whole vectors of them


def check(weights: str | None, device: torch.device) -> None:
    """Raise UserError for weights that are unknown, or that this machine cannot use."""
    if weights is not None and weights not in get_args(Weights):
        allowed = ", ".join(get_args(Weights))
        raise UserError(f"weights: {weights!r}; allowed are {allowed}, or leave it out")
    if weights in ("bfloat16", "int8") and not distributed.has_bf16(device):
        raise UserError(
            f"weights: {weights} computes in bfloat16, which this {device.type} has no fast "
            "instructions for; give float32, or leave it out"
        )
    if weights == "int8" and importlib.util.find_spec("torchao") is None:
        raise UserError("weights: int8 needs torchao; install ddt-llama[int8]")


def dtype_of(weights: Weights | None, device: torch.device) -> torch.dtype | None:
    """Return what is computed in; None for what the release holds. A CPU computes in float32."""
    if weights is None:
        return torch.float32 if device.type == "cpu" else None
    return torch.float32 if weights == "float32" else torch.bfloat16


class Int8Linear(nn.Module):
    """x -> x W^T + bias, W in 8 bits: a linear layer, or a product of the decode step."""

    def __init__(self, weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None) -> None:
        """Round `weight` to the integers of each row, -127 to 127 of its largest."""
        super().__init__()
        n, k = weight.shape
        layer = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        _quantise(layer)
        self.weight: Any = layer.weight
        self.bias = bias
        self.scales: Tensor | None = None
        if weight.device.type == "cpu" and k % VECTOR == 0:
            self.scales = self.weight.scale.flatten().to(weight.dtype)

    @property
    def bytes(self) -> int:
        """What is read of the weight for a product: integers and scales."""
        return self.weight.qdata.nbytes + self.weight.scale.nbytes

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... n"]:
        """Multiply the last axis."""
        rows = x.numel() // x.shape[-1]
        if self.scales is None or rows > FEW:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(rows, -1)
        product = torch.ops.aten._weight_int8pack_mm(flat, self.weight.qdata, self.scales)
        product = product.unflatten(0, x.shape[:-1])
        return product if self.bias is None else product.add_(self.bias)


def hold(module: nn.Module, weights: Weights) -> nn.Module:
    """Change a module of transformers to hold its weights so, and return it."""
    module.to(dtype_of(weights, torch.device("cpu")))
    if weights == "int8":
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    bias = None if child.bias is None else child.bias.detach()
                    setattr(parent, name, Int8Linear(child.weight, bias))
    return module


def _quantise(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree"):  # complain of what is not used here
            logging.getLogger(name).setLevel(logging.ERROR)
        torchao: Any = importlib.import_module("torchao.quantization")
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
