"""Distances between images: PSNR and SSIM, one number an image.

Images are floats in [-1, 1], so the peak-to-peak range is 2. Both are taken against the input image
itself (never against the round trip of an autoencoder) and averaged over images by the caller.
"""

import torch
from jaxtyping import Float
from torch import Tensor

DATA_RANGE = 2.0
PSNR_LIMIT = 100.0  # dB; an exact copy would be infinite, which no mean and no JSON file can hold


def psnr(
    images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b"]:
    """Measure peak signal-to-noise ratio in dB for each image: 10 log10(2^2 / MSE), at most 100.

    `images` are clamped to [-1, 1] first, as they are when saved. The mean of these numbers is the
    mean of dB over images, not the dB of the mean error.
    """
    difference = images.clamp(-1, 1).double() - reference.double()
    error = difference.square().flatten(1).mean(1)
    floor = DATA_RANGE**2 / 10 ** (PSNR_LIMIT / 10)
    return (10 * torch.log10(DATA_RANGE**2 / error.clamp_min(floor))).float()


def ssim(
    images: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b"]:
    """Measure structural similarity for each image (Wang et al. 2004, 11x11 Gaussian, sigma 1.5).

    Computed on [0, 2] with data range 2, which equals the usual [0, 255] definition: SSIM's
    luminance term is not invariant to a shift, so [-1, 1] itself would give other numbers.
    Images need more than 11 pixels a side. Computed by torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if images.shape[0] == 0:
        return images.new_zeros(0)
    scores = structural_similarity_index_measure(
        images.clamp(-1, 1).float() + 1,
        reference.float() + 1,
        data_range=DATA_RANGE,
        reduction="none",
    )
    assert isinstance(scores, Tensor)
    return scores.reshape(-1)
