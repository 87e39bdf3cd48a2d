"""What a call computes, counted while it runs."""

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(action: Callable[[], Any]) -> float:
    """Return the FLOPs of the matrix products and convolutions of a call.

    Attention is taken apart into products: fused kernels of a CPU are not counted.
    """
    kernel, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with kernel, counter:
        action()
    return float(counter.get_total_flops())
