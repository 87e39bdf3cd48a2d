"""Pictures: against a slow twin that counts sub-pixels inside polygons and discs."""

import math

import numpy as np
import pytest
import torch

from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    sample_scene,
)

FINE = 16


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Say which points lie inside; units of the radius, y downwards."""
    if shape == "circle":
        return x**2 + y**2 < 0.86**2
    if shape == "ring":
        return (x**2 + y**2 < 0.91**2) & (x**2 + y**2 > 0.51**2)
    if shape == "cross":
        tall = (abs(x) < 0.3) & (abs(y) < 0.92)
        return tall | ((abs(y) < 0.3) & (abs(x) < 0.92))
    if shape == "square":
        return (abs(x) < 0.7) & (abs(y) < 0.7)
    reach = {"triangle": [1.0], "star": [1.0, 0.5]}[shape]
    number = {"triangle": 3, "star": 10}[shape]
    corners = [
        (reach[k % len(reach)] * math.sin(a), -reach[k % len(reach)] * math.cos(a))
        for k, a in enumerate(2 * math.pi * k / number for k in range(number))
    ]
    odd = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        crosses = (ay > y) != (by > y)
        odd ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay + 1e-12) + ax)
    return odd


def slow_twin(scene: Scene, size: int) -> np.ndarray:
    steps = (np.arange(size * FINE) + 0.5) / (size * FINE)
    x, y = np.meshgrid(steps, steps)
    canvas = np.empty((size * FINE, size * FINE, 3))
    canvas[:] = np.array(BACKGROUNDS[scene.background][1])
    for o in scene.objects:
        radius = SIZES[o.size][1]
        hit = inside(SHAPES[o.shape], (x - o.x) / radius, (y - o.y) / radius)
        canvas[hit] = COLOURS[o.colour][1]
    return canvas.reshape(size, FINE, size, FINE, 3).mean((1, 3)) / 127.5 - 1


@pytest.mark.parametrize("size", [48, 64])
def test_pictures_agree_with_counting_sub_pixels(size: int):
    scenes = [
        Scene(k % 4, (Object(k, k, 0, 0.27, 0.3), Object(k, k + 1, 1, 0.7, 0.633)))
        for k in range(6)
    ]
    for scene, picture in zip(scenes, render(scenes, size), strict=True):
        error = np.abs(picture.permute(1, 2, 0).numpy() - slow_twin(scene, size))
        # Distance-based coverage differs from area only at corners.
        assert error.mean() < 0.004
        assert error.max() < 0.6


def test_a_picture_does_not_depend_on_its_batch():
    scenes = [sample_scene(0, i, max_objects=6) for i in range(300)]
    together = render(scenes, 32)
    assert together.shape == (300, 3, 32, 32)
    assert together.abs().max() <= 1
    for i in (0, 127, 128, 299):
        assert torch.allclose(render([scenes[i]], 32)[0], together[i], atol=1e-6)


def test_order_of_objects_does_not_matter():
    scene = sample_scene(2, 1, min_objects=4)
    turned = Scene(scene.background, scene.objects[::-1])
    assert torch.allclose(render([scene]), render([turned]), atol=1e-6)


def test_colours_are_exact_inside_and_outside():
    scene = Scene(3, (Object(1, 5, 1, 0.5, 0.5),))
    picture = (render([scene])[0] + 1) * 127.5
    assert picture[:, 32, 32].round().tolist() == list(COLOURS[5][1])
    assert picture[:, 2, 2].round().tolist() == list(BACKGROUNDS[3][1])


def test_a_shift_by_whole_pixels_shifts_the_picture():
    left, right = (Scene(0, (Object(3, 0, 0, x / 64, 0.5),)) for x in (20.3, 25.3))
    a, b = render([left, right])
    assert torch.allclose(a.roll(5, dims=2), b, atol=1e-4)


def test_sizes_of_all_shapes_are_told_apart_by_area():
    areas = torch.tensor(
        [
            [
                (render([Scene(1, (Object(s, 3, size, 0.5, 0.5),))], 256)[0, 0] > 0).sum().item()
                for s in range(6)
            ]
            for size in (0, 1)
        ]
    ).float()
    small, large = areas
    assert (large / small > 2).all()
    assert large.min() > 1.2 * small.max()
    assert large.max() < 2 * large.min()


def test_no_scenes_give_no_pictures():
    assert render([], 16).shape == (0, 3, 16, 16)
