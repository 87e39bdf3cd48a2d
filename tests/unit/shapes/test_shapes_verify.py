"""The verifier: exact on clean pictures, robust to small damage, never generous."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Object, Scene, sample_scene
from ddt_llama.shapes.verify import Blob, glimpse, matches, read


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def noisy(images: torch.Tensor, psnr: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 2 * 10 ** (-psnr / 20) * noise).clamp(-1, 1)


def exact(scenes: list[Scene], images: torch.Tensor) -> int:
    return sum(matches(a, b) for a, b in zip(scenes, read(images), strict=True))


def test_clean_pictures_are_read_exactly():
    scenes = [sample_scene(11, i, max_objects=6) for i in range(150)]
    found = read(render(scenes))
    assert all(matches(a, b) for a, b in zip(scenes, found, strict=True))
    for scene, other in zip(scenes, found, strict=True):
        assert other is not None
        # Sub-pixel places: a tenth of a pixel or so.
        assert matches(scene, other, tolerance=0.3 / 64)


@pytest.mark.parametrize("size", [96, 128])
def test_other_sizes_are_read_exactly(size: int):
    scenes = [sample_scene(12, i) for i in range(12)]
    assert exact(scenes, render(scenes, size)) == 12


def test_small_damage_does_no_harm():
    scenes = [sample_scene(13, i) for i in range(40)]
    images = render(scenes)
    assert exact(scenes, noisy(images, 24)) >= 39
    assert exact(scenes, blurred(images, 1.0)) >= 39
    assert exact(scenes, noisy(blurred(images, 0.8), 26)) >= 39


def test_heavy_damage_is_refused_not_guessed():
    scenes = [sample_scene(14, i) for i in range(40)]
    images = render(scenes)
    for ruined in (noisy(images, 14), blurred(images, 2.5), torch.rand(40, 3, 64, 64) * 2 - 1):
        wrong = [
            b is not None and not matches(a, b) for a, b in zip(scenes, read(ruined), strict=True)
        ]
        assert sum(wrong) <= 1


def test_one_wrong_attribute_is_seen():
    scene = Scene(0, (Object(0, 1, 0, 0.3, 0.3), Object(3, 4, 1, 0.7, 0.6)))
    item = scene.objects[0]
    wrong = [
        replace(scene, background=1),
        replace(scene, objects=scene.objects[:1]),
        replace(scene, objects=(*scene.objects, Object(2, 2, 0, 0.2, 0.8))),
        *(
            replace(scene, objects=(replace(item, **change), scene.objects[1]))
            for change in ({"shape": 5}, {"colour": 2}, {"size": 1}, {"x": 0.36}, {"y": 0.24})
        ),
    ]
    assert matches(scene, read(render([scene]))[0])
    for other, found in zip(wrong, read(render(wrong)), strict=True):
        assert matches(other, found)
        assert not matches(scene, found)


def test_what_is_no_object_makes_a_picture_unreadable():
    scene = Scene(0, (Object(0, 1, 0, 0.25, 0.25),))
    clean = render([scene])
    stain = clean.clone()
    stain[:, :, 40:52, 36:56] = torch.tensor([0.0, -0.2, 0.1])[None, :, None, None]
    between = render([scene])
    ink = torch.tensor([220, 20, 30]) * 0.5 + torch.tensor([130, 20, 170]) * 0.5
    between[:, :, 40:52, 40:52] = (ink / 127.5 - 1)[None, :, None, None]
    bar = clean.clone()
    bar[:, :, 40:44, 10:54] = torch.tensor([220 / 127.5 - 1, -0.84, -0.76])[None, :, None, None]
    ground = torch.zeros_like(clean) + torch.tensor([-0.4, 0.1, 0.3])[None, :, None, None]
    assert read(torch.cat([stain, between, bar, ground])) == [None] * 4


def test_a_glimpse_tells_what_is_there_where_reading_refuses():
    scene = Scene(0, (Object(0, 1, 0, 0.25, 0.25),))
    clean = render([scene])
    stain = clean.clone()
    red = render([Scene(0, (Object(0, 0, 1, 0.7, 0.7),))])[0, :, 44, 44]
    stain[:, :, 40:44, 10:54] = red[None, :, None, None]  # a bar is no shape
    ground = torch.zeros_like(clean) + torch.tensor([-0.4, 0.1, 0.3])[None, :, None, None]
    assert read(torch.cat([stain, ground])) == [None, None]
    whole, found, nothing = glimpse(torch.cat([clean, stain, ground]))
    assert whole == list(read(clean)[0].objects)
    assert nothing is None
    assert found[0] == whole[0]
    blob = found[1]
    assert isinstance(blob, Blob)
    assert (blob.colour, blob.shape, blob.size) == (0, None, None)
    assert (blob.x, blob.y) == pytest.approx((0.5, 42 / 64), abs=0.01)
    assert glimpse(torch.ones(1, 3, 64, 64)) == [[]]
    scenes = [sample_scene(11, i, max_objects=6) for i in range(20)]
    seen = glimpse(render(scenes))
    for one, other in zip(seen, read(render(scenes)), strict=True):
        assert sorted(one, key=lambda item: (item.y, item.x)) == list(other.objects)


def test_an_empty_canvas_is_a_scene_without_objects():
    assert read(torch.ones(1, 3, 64, 64)) == [Scene(0, ())]


def test_objects_that_blur_joins_are_parted():
    scene = Scene(1, (Object(4, 3, 1, 0.3, 0.5), Object(4, 3, 1, 0.3 + 0.295, 0.5)))
    assert matches(scene, read(render([scene]))[0])
    assert matches(scene, read(blurred(render([scene]), 0.8))[0])


def test_matching_is_one_to_one_and_symmetric():
    twice = Scene(0, (Object(0, 0, 0, 0.3, 0.3), Object(0, 0, 0, 0.7, 0.7)))
    once = Scene(0, twice.objects[:1])
    assert matches(twice, Scene(0, twice.objects[::-1]))
    assert not matches(twice, once)
    assert not matches(once, twice)
    assert not matches(once, None)
    assert not matches(None, None)
    near = Scene(0, (replace(once.objects[0], x=0.3 + 2.9 / 64),))
    far = Scene(0, (replace(once.objects[0], x=0.3 + 3.1 / 64),))
    assert matches(once, near)
    assert not matches(once, far)


def test_reading_does_not_depend_on_the_batch():
    images = noisy(render([sample_scene(15, i) for i in range(6)]), 22)
    assert read(images) == [read(image[None])[0] for image in images]
    assert np.isfinite(images.numpy()).all()
