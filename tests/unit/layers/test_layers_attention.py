"""Attention by matrix products is the fused kernel's equal, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddt_llama.layers import attend, merge_heads, split_heads
from ddt_llama.layers.attention import attend_by_products

B, H, Q, L, E = 3, 2, 5, 7, 4


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, Q, E), (B, H, L, E), (B, H, L, E))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def masks() -> dict[str, Tensor | None]:
    keys = torch.rand(B, 1, 1, L, generator=torch.Generator().manual_seed(1)) < 0.5
    keys[..., 0] = True
    return {
        "none": None,
        "keys of a row": keys,
        "pairs": torch.ones(1, 1, Q, L, dtype=torch.bool).tril(),
        "pairs of a row": keys | torch.eye(Q, L, dtype=torch.bool),
    }


def out_and_gradients(attention, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    out = attention(*tensors, mask)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, slope)]


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
def test_products_equal_the_fused_kernel(name: str, dtype: torch.dtype, tolerance: float):
    mask = masks()[name]
    got = out_and_gradients(attend_by_products, inputs(dtype), mask)
    exact = out_and_gradients(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        [x.detach().double().requires_grad_() for x in inputs(dtype)],
        mask,
    )
    for ours, theirs in zip(got, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_a_forbidden_key_has_no_influence():
    q, k, v = inputs()
    mask = torch.arange(L).expand(1, 1, 1, L) < 4
    expected = attend_by_products(q, k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(attend_by_products(q, k, v, mask), expected)


def test_training_and_inference_take_different_ways_to_one_result(monkeypatch):
    q, k, v = inputs()
    training = attend(q, k, v)
    fused = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **n: fused.append(1) or kernel(*a, **n)
    )
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), training)
    assert fused
    assert training.shape == (B, Q, H * E)


def test_heads_are_consecutive_slices_of_the_width():
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert torch.equal(heads[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), x)
