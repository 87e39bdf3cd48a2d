"""Products and norms of the decode step against torch's own, in every layout a CPU may get."""

import pytest
import torch
from torch.nn import functional as F

from ddt_llama.generation import kernels
from ddt_llama.generation.kernels import Layout, Product, RmsNorm


@pytest.mark.parametrize("layout", ["transposed", "packed", "plain"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_a_linear_layer_in_every_layout(
    layout: Layout, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "packed" and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this build of torch has no oneDNN, so it never packs")
    monkeypatch.setattr(kernels, "layout_for", lambda weight: layout)
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16), torch.randn(24) if biased else None
    product = Product(weight, bias)
    for shape in ((2, 16), (2, 1, 16), (3, 5, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(product(x), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    if bias is not None:  # the bias itself stays as it is
        torch.testing.assert_close(product(x), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_the_layout_is_plain_where_the_fast_ones_do_not_work() -> None:
    assert kernels.layout_for(torch.zeros(2, 2, dtype=torch.float16)) == "plain"
    assert kernels.layout_for(torch.zeros(2, 2, dtype=torch.bfloat16)) in ("packed", "plain")
    assert kernels.layout_for(torch.zeros(2, 2, device="meta")) == "plain"
    assert kernels.layout_for(torch.zeros(2, 2)) in ("transposed", "packed", "plain")


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_norm_is_that_of_torch_also_where_eps_rules(size: float) -> None:
    torch.manual_seed(0)
    x, scale = size * torch.randn(3, 2, 32), torch.randn(32)
    before = x.clone()
    norm = RmsNorm(scale, 1e-5)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), scale, 1e-5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x, before)  # what is normalised is not written to
    assert torch.equal(norm(torch.zeros(1, 32)), torch.zeros(1, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_torch_up_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(3, 32).to(dtype), torch.randn(32).to(dtype)
    weight, bias = torch.randn(24, 32).to(dtype), torch.randn(24).to(dtype)
    told = RmsNorm(scale, 1e-5)(x)
    assert told.dtype == dtype
    torch.testing.assert_close(told, F.rms_norm(x, (32,), scale, 1e-5))
    torch.testing.assert_close(Product(weight, bias)(x), F.linear(x, weight, bias))
