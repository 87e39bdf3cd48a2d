"""What accelerators can do, as their makers say: the measure of how well a training uses them."""

from typing import NamedTuple


class Accelerator(NamedTuple):
    """Dense products in bfloat16 (FLOPs/s), memory (bytes), and how fast it is read (bytes/s)."""

    flops: float
    memory: float
    bandwidth: float


# Without sparsity, which doubles what data sheets of NVIDIA print. Sources: data sheets of A100
# 80 GB, H100 and H200 SXM; of the Ascend 910B, of which there are several, figures differ
# (280 to 376 TFLOPs/s): these are of the B3, as most often quoted.
ACCELERATORS = {
    "h200": Accelerator(989e12, 141e9, 4.8e12),
    "h100": Accelerator(989e12, 80e9, 3.35e12),
    "a100": Accelerator(312e12, 80e9, 2.04e12),
    "910b": Accelerator(313e12, 64e9, 1.6e12),
}


def peak_of(device_name: str) -> float | None:
    """Return the FLOPs/s of an accelerator by the name that its driver gives it; None if unknown.

    >>> peak_of("NVIDIA H200")
    989000000000000.0
    """
    name = device_name.lower()
    if "pcie" in name or "nvl" in name:  # slower ones of the same name
        return None
    return next((one.flops for short, one in ACCELERATORS.items() if short in name), None)
