"""Positions: raster order, a product that peaks at home, no column that stands still."""

import math

import pytest
import torch

from ddt_llama.layers import grid_positions, sincos


def test_the_last_axis_runs_fastest():
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("sizes", [(32,), (8, 8), (4, 8), (16, 16), (2, 4, 4)])
def test_products_peak_at_equal_positions_and_every_column_varies(sizes: tuple[int, ...]):
    dim = 16 * len(sizes)
    table = sincos(grid_positions(*sizes), dim, extent=float(max(sizes)))
    products = table @ table.t()
    # sin^2 + cos^2 = 1 for each frequency and axis, so the peak is exactly dim / 2
    torch.testing.assert_close(products.diagonal(), torch.full((len(table),), dim / 2))
    products.fill_diagonal_(-math.inf)
    assert products.max() < dim / 2 - 0.05
    constant = table.amax(0) - table.amin(0) < 0.25
    assert constant.sum() == len(sizes)  # the sine of two cells, zero in every cell


def test_wavelengths_go_from_two_cells_to_twice_the_extent():
    table = sincos(torch.tensor([[1.0]]), 6, extent=16.0)
    angles = torch.tensor([math.pi, math.pi / 4, math.pi / 16])
    torch.testing.assert_close(table[0], torch.cat([angles.sin(), angles.cos()]))


def test_axes_share_the_width_equally_and_do_not_mix():
    here, below = torch.tensor([[3.0, 5.0]]), torch.tensor([[4.0, 5.0]])
    changed = (sincos(here, 16, 8.0) - sincos(below, 16, 8.0))[0].abs() > 1e-4
    # the sine of the shortest wavelength, two cells, is zero in every cell
    assert changed.tolist() == [False] + [True] * 7 + [False] * 8
    one_axis = sincos(torch.tensor([[3.0]]), 8, 8.0)
    torch.testing.assert_close(sincos(here, 16, 8.0)[:, :8], one_axis)


@pytest.mark.parametrize(("axes", "dim"), [(1, 7), (2, 10), (3, 20)])
def test_a_width_that_leaves_a_rest_is_refused(axes: int, dim: int):
    with pytest.raises(ValueError, match=f"multiple of {2 * axes}"):
        sincos(torch.zeros(4, axes), dim, extent=8.0)
