"""PSNR and SSIM against closed forms and against scipy's Gaussian filter."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ddt_llama.evaluation.metrics import PSNR_LIMIT, psnr, ssim


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


@pytest.mark.parametrize("offset", [0.2, 0.02, -0.1])
def test_psnr_of_a_constant_offset_is_twenty_log_of_range_over_offset(offset: float) -> None:
    reference = picture()
    expected = 20 * math.log10(2 / abs(offset))
    assert psnr(reference + offset, reference).tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_psnr_is_an_image_at_a_time() -> None:
    reference = picture()
    images = torch.stack([reference[0] + 0.2, reference[1] + 0.02])
    assert psnr(images, reference).tolist() == pytest.approx([20, 40], abs=1e-4)


def test_psnr_of_black_against_white_is_zero_and_of_a_copy_the_limit() -> None:
    white = torch.ones(1, 3, 8, 8)
    assert psnr(-white, white).item() == 0.0
    assert psnr(white, white).item() == pytest.approx(PSNR_LIMIT)


def test_psnr_clamps_the_image_as_saving_does() -> None:
    white = torch.ones(1, 3, 8, 8)
    assert psnr(white * 1.5, white).item() == pytest.approx(PSNR_LIMIT)


def test_ssim_of_a_copy_is_one_and_falls_with_noise() -> None:
    reference = picture()
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    scores = [ssim(reference + s * noise, reference).mean().item() for s in (0.0, 0.1, 0.4)]
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores[0] > scores[1] > scores[2]


def test_ssim_is_that_of_eight_bit_images() -> None:
    reference = picture()
    image = (reference * 0.7 + 0.1).clamp(-1, 1)
    expected = [_ssim_of_bytes(a, b) for a, b in zip(image, reference, strict=True)]
    assert ssim(image, reference).tolist() == pytest.approx(expected, abs=2e-4)


def test_ssim_of_no_images_is_empty() -> None:
    assert ssim(torch.zeros(0, 3, 24, 24), torch.zeros(0, 3, 24, 24)).shape == (0,)


def _ssim_of_bytes(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Wang et al. 2004 on [0, 255], straight from the paper, interior pixels only."""
    x = (image.double().numpy() + 1) * 127.5
    y = (reference.double().numpy() + 1) * 127.5

    def smooth(plane: np.ndarray) -> np.ndarray:
        return gaussian_filter(plane, sigma=(0, 1.5, 1.5), radius=(0, 5, 5))

    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(scores[:, 5:-5, 5:-5].mean())
