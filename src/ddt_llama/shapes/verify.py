"""Reads a picture back into a scene by image analysis alone; every score of the world rests on it.

Background from the commonest colour; objects as connected regions off the background; shape, size
and sub-pixel place of each by laying the renderer's own shapes over it; colour from the pixels the
shape covers. A region that no shape explains makes the picture unreadable: it is never guessed.
How it errs under noise, blur and shifts is measured in experiments/0003-verifier.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, MAX_OBJECTS, SIZES, Object, Scene
from ddt_llama.shapes.templates import Templates, templates

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

_COLOURS = np.array([rgb for _, rgb in COLOURS], dtype=np.float32) / 255
_BACKGROUNDS = np.array([rgb for _, rgb in BACKGROUNDS], dtype=np.float32) / 255

# A measured colour further than this from every palette entry is none of them, and so is one that
# is not clearly nearest to one. The palette's nearest two are 0.40 apart (of the range 0 to 1).
COLOUR_TOLERANCE = 0.22
_COLOUR_RATIO = 0.6
# Share of a shape's energy that the picture may leave unexplained, noise not counted.
_MISFIT = 0.2
# By how much (of the same energy) the best shape must beat the best other one, and by how much of
# what it leaves unexplained: where the best shape fits badly, a close second is as likely.
_ADVANTAGE = 0.012
_ADVANTAGE_OF_MISFIT = 0.3
# Share of a colour over the background from which a pixel belongs to an object, and from which a
# region is looked at though none of its pixels does (a thin shape, blurred).
_SOLID = 0.5
_FAINT = 0.3
# Strength and bulk (in areas of the smallest shape) from which a faint blot is no mere noise.
_GHOST = 0.15
_GHOST_BULK = 0.3
# Regions with less than this share of the smallest shape's area are specks, not objects.
_SPECK = 0.25
_SMALLEST_AREA = 1.3 * SIZES[0][1] ** 2


def read(images: Float[Tensor, "b 3 h w"]) -> list[Scene | None]:
    """Read each picture, square and in [-1, 1], back into its scene.

    None where the background is no palette colour or some region is no clear object. Objects come
    in reading order. A plain background gives a scene without objects.
    """
    pictures = images.detach().float().clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1)
    return [_read_one(picture) for picture in pictures.cpu().numpy()]


@dataclass(frozen=True)
class Blob:
    """A region off the background that is no clear object: its colour, and its centre in 0..1."""

    colour: int
    x: float
    y: float
    shape: None = None
    size: None = None


def glimpse(images: Float[Tensor, "b 3 h w"]) -> list[list[Object | Blob] | None]:
    """Tell what stands in each picture, also where `read` refuses it: objects, and blobs.

    None where the background is no palette colour.
    """
    pictures = images.detach().float().clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1)
    return [_glimpse_one(picture) for picture in pictures.cpu().numpy()]


@dataclass(frozen=True)
class _Picture:
    """A picture as offsets from its background (`h w 3`), and the noise on its plain parts."""

    background: int
    offset: Array
    noise: float


@dataclass(frozen=True)
class _Fit:
    """The best shape at a place: kind, centre in pixels, window and coverage.

    gain: by how much it lowers the squared error; advantage: by how much more than any other kind.
    """

    kind: int
    x: float
    y: float
    window: tuple[slice, slice]
    cover: Array
    gain: float
    advantage: float


def _read_one(picture: Array) -> Scene | None:
    ground = _background(picture)
    if ground is None:
        return None
    regions = _regions_of(ground)
    if _has_ghosts(ground, regions):
        return None
    objects: list[Object] = []
    for found in _explained(ground, regions):
        if found is None or len(objects) + len(found) > MAX_OBJECTS:
            return None
        objects += found
    return Scene(ground.background, tuple(sorted(objects, key=lambda item: (item.y, item.x))))


def _glimpse_one(picture: Array) -> list[Object | Blob] | None:
    ground = _background(picture)
    if ground is None:
        return None
    regions = _regions_of(ground)
    seen: list[Object | Blob] = []
    for (colour, mask), found in zip(regions, _explained(ground, regions), strict=True):
        row, column = np.argwhere(mask).mean(0)
        size = picture.shape[0]
        seen += found or [Blob(colour, float(column + 0.5) / size, float(row + 0.5) / size)]
    return seen


def _regions_of(ground: _Picture) -> list[tuple[int, Mask]]:
    size = ground.offset.shape[0]
    return _regions(*_unmix(_smooth(ground.offset, 0.7 * size / 64), ground.background))


def _explained(ground: _Picture, regions: list[tuple[int, Mask]]) -> Iterator[list[Object] | None]:
    """Yield the objects of each region, None for one that is none."""
    size = ground.offset.shape[0]
    owner = _owners(regions, size)
    for number, (colour, mask) in enumerate(regions, start=1):
        yield _read_region(ground, mask, owner == number, colour, templates(size))


def _smooth(values: Array, sigma: float) -> Array:
    """Blur along the first two axes."""
    calm = np.empty_like(values)
    ndimage.gaussian_filter(values, sigma, output=calm, axes=(0, 1))
    return calm


def _label(mask: Mask) -> tuple[NDArray[np.int32], int]:
    labels = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=labels)
    return labels, int(labels.max())


def _background(picture: Array) -> _Picture | None:
    distance = np.linalg.norm(picture[:, :, None] - _BACKGROUNDS, axis=-1)
    near = distance < 0.25
    background = int(near.sum((0, 1)).argmax())
    plain = picture[near[:, :, background]]
    # Even six large objects leave more than half of the canvas free.
    if len(plain) < 0.4 * picture.shape[0] * picture.shape[1]:
        return None
    middle = np.array(np.median(plain, axis=0), dtype=np.float32)
    if np.linalg.norm(middle - _BACKGROUNDS[background]) > COLOUR_TOLERANCE / 2:
        return None
    noise = float(1.4826 * np.median(np.abs(plain - middle)))
    return _Picture(background, picture - middle, noise)


def _unmix(offset: Array, background: int) -> tuple[NDArray[np.int64], Array]:
    """Explain each pixel as background mixed with one colour; return colour and its share."""
    directions = _COLOURS - _BACKGROUNDS[background]
    lengths = np.square(directions).sum(1)
    along = offset @ (directions / lengths[:, None]).T
    share = along.clip(0, 1)
    # |offset - share direction|^2 without its first term, which is the same for all colours.
    misfit = share * (share - 2 * along) * lengths
    colour = misfit.argmin(-1)
    return colour, np.take_along_axis(share, colour[..., None], -1)[..., 0]


def _regions(colour: NDArray[np.int64], alpha: Array) -> list[tuple[int, Mask]]:
    """Return the connected regions off the background with the colour of each, specks dropped."""
    speck = _SPECK * _SMALLEST_AREA * alpha.size
    found = []
    for mask in _masks(alpha):
        votes = np.bincount(colour[mask], weights=alpha[mask], minlength=len(COLOURS))
        strong = np.flatnonzero(votes > speck)
        if len(strong) > 1:
            # Two objects that blur has joined, unless one "colour" is only the other's fringe.
            parts = [(int(c), mask & (colour == c)) for c in strong]
            found += [(c, part) for c, part in parts if _is_solid(part, speck)]
        elif len(strong) == 1:
            found.append((int(strong[0]), mask))
    return found


def _masks(alpha: Array) -> Iterator[Mask]:
    solid, count = _label(alpha > _SOLID)
    for number in range(1, count + 1):
        yield solid == number
    faint, count = _label(alpha > _FAINT)
    for number in range(1, count + 1):
        mask = faint == number
        if not (solid[mask] > 0).any():
            yield mask


def _has_ghosts(picture: _Picture, regions: list[tuple[int, Mask]]) -> bool:
    """Say whether something wide and faint lies outside all regions: no object, nor nothing."""
    size = picture.offset.shape[0]
    calm = _smooth(picture.offset, 1.5 * size / 64)
    _, alpha = _unmix(calm, picture.background)
    known = np.zeros(alpha.shape, dtype=np.bool_)
    for _, mask in regions:
        known |= mask
    labels, count = _label(alpha > _GHOST)
    touched = set(labels[known].tolist())
    sums = np.bincount(labels.ravel(), weights=alpha.ravel(), minlength=count + 1)
    limit = _GHOST_BULK * _SMALLEST_AREA * size * size
    return any(
        bool(sums[number] > limit) for number in range(1, count + 1) if number not in touched
    )


def _is_solid(part: Mask, speck: float) -> bool:
    return bool(ndimage.binary_erosion(part).sum() > 0.3 * speck)


def _owners(regions: list[tuple[int, Mask]], size: int) -> NDArray[np.int64]:
    """Give each pixel of the picture to the region nearest to it, numbered from one."""
    seeds = np.zeros((size, size), dtype=np.int64)
    for number, (_, mask) in enumerate(regions, start=1):
        seeds[mask] = number
    nearest = np.zeros((2, size, size), dtype=np.int32)
    ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True, indices=nearest
    )
    return seeds[nearest[0], nearest[1]]


def _read_region(
    picture: _Picture, region: Mask, mine: Mask, colour: int, shapes: Templates
) -> list[Object] | None:
    """Explain one region by one object, or by several of one colour that touch; None if unclear.

    mine: the pixels that are nearer to this region than to any other.
    """
    direction = _COLOURS[colour] - _BACKGROUNDS[picture.background]
    scale = float(np.square(direction).sum())
    size = picture.offset.shape[0]
    sigma, speck = 0.7 * size / 64, _SPECK * _SMALLEST_AREA * size * size
    pad = shapes.side // 2 + 2
    crop = _around(region)
    alpha = np.pad((picture.offset[crop] @ direction / scale).clip(-0.5, 1.5) * mine[crop], pad)
    offset = np.pad(picture.offset[crop], ((pad, pad), (pad, pad), (0, 0)))
    fits: list[_Fit] = []
    while (bulk := _smooth(alpha, sigma))[bulk > _FAINT].sum() > speck:
        fit = _fit(alpha, bulk > _FAINT, shapes)
        if fit is None or fit.gain <= 0 or len(fits) == MAX_OBJECTS:
            return None
        fits.append(fit)
        alpha[fit.window] -= fit.cover
    noise = picture.noise / scale**0.5
    for fit in fits:
        named = _name_colour(offset[fit.window], fit.cover, picture.background)
        if named != colour or not _is_clear(fit, alpha[fit.window], noise):
            return None
    origin = np.array([crop[1].start - pad, crop[0].start - pad])
    return [_object(fit, colour, origin, size) for fit in fits] or None


def _object(fit: _Fit, colour: int, origin: NDArray[np.int64], size: int) -> Object:
    shape, which = divmod(fit.kind, len(SIZES))
    x, y = (float(origin[0]) + fit.x) / size, (float(origin[1]) + fit.y) / size
    return Object(shape, colour, which, x, y)


def _around(region: Mask) -> tuple[slice, slice]:
    """Return the box around a region, with room for the soft edge of its object."""
    rows, columns = np.nonzero(region)
    top, left = max(int(rows.min()) - 4, 0), max(int(columns.min()) - 4, 0)
    return slice(top, int(rows.max()) + 5), slice(left, int(columns.max()) + 5)


def _is_clear(fit: _Fit, rest: Array, noise: float) -> bool:
    energy = float(np.square(fit.cover).sum())
    near = np.zeros(fit.cover.shape, dtype=np.bool_)
    ndimage.binary_dilation(fit.cover > 0.05, iterations=2, output=near)
    misfit = float(np.square(rest[near]).sum()) - near.sum() * noise**2
    needed = max(_ADVANTAGE * energy, _ADVANTAGE_OF_MISFIT * misfit)
    return bool(misfit < _MISFIT * energy and fit.advantage > needed)


def _fit(alpha: Array, bulk: Mask, shapes: Templates) -> _Fit | None:
    """Lay every shape near the region's centre and return the one that explains most of it."""
    rows, columns = np.nonzero(bulk)
    # In a region too wide for one object every place may be a centre.
    wide = max(np.ptp(rows), np.ptp(columns)) > shapes.side - 2
    weights = alpha[rows, columns]
    if wide:
        low = (int(rows.min()) + 2, int(columns.min()) + 2)
        high = (int(rows.max()) - 2, int(columns.max()) - 2)
    else:
        middle = (
            round(float((rows * weights).sum() / weights.sum())),
            round(float((columns * weights).sum() / weights.sum())),
        )
        low, high = (middle[0] - 1, middle[1] - 1), (middle[0] + 1, middle[1] + 1)
    half = shapes.side // 2
    spots = [
        (row, column)
        for row in range(max(low[0], half), min(high[0], alpha.shape[0] - half - 1) + 1)
        for column in range(max(low[1], half), min(high[1], alpha.shape[1] - half - 1) + 1)
    ]
    if not spots:
        return None
    windows = np.stack(
        [alpha[r - half : r + half + 1, c - half : c + half + 1].ravel() for r, c in spots]
    )
    # Laying a shape T over alpha lowers the squared error by 2 T.alpha - T.T.
    gains = 2 * shapes.flat @ windows.T - shapes.energy[:, None]
    best, spot = np.unravel_index(int(gains.argmax()), gains.shape)
    kind = int(shapes.kind[best])
    row, column = spots[int(spot)]
    gain = float(gains[best, spot])
    return _Fit(
        kind=kind,
        x=column + 0.5 + float(shapes.offset[best, 0]),
        y=row + 0.5 + float(shapes.offset[best, 1]),
        window=(slice(row - half, row + half + 1), slice(column - half, column + half + 1)),
        cover=shapes.flat[best].reshape(shapes.side, shapes.side),
        gain=gain,
        advantage=gain - float(gains[shapes.kind != kind].max()),
    )


def _name_colour(part: Array, cover: Array, background: int) -> int | None:
    """Measure the colour under the shape by least squares and name it."""
    weights = np.where(cover > 0.5, cover, 0)
    mean = (part * weights[..., None]).sum((0, 1)) / np.square(weights).sum()
    distance = np.linalg.norm(_COLOURS - _BACKGROUNDS[background] - mean, axis=1)
    named, second = (int(place) for place in distance.argsort()[:2])
    limit = min(COLOUR_TOLERANCE, _COLOUR_RATIO * float(distance[second]))
    return named if distance[named] < limit else None


def matches(a: Scene | None, b: Scene | None, tolerance: float = 3 / 64) -> bool:
    """Say whether two scenes are the same: background, objects, and places within the tolerance.

    Each object of one must stand within `tolerance` (a fraction of the canvas, along each axis) of
    one of the same shape, colour and size of the other, one to one. Nothing matches None.
    """
    if a is None or b is None or a.background != b.background:
        return False
    left = list(b.objects)
    for item in a.objects:
        twins = [
            other
            for other in left
            if (item.shape, item.colour, item.size) == (other.shape, other.colour, other.size)
            and abs(item.x - other.x) <= tolerance
            and abs(item.y - other.y) <= tolerance
        ]
        if not twins:
            return False
        # Objects of a valid scene are further apart than twice the tolerance: no choice to regret.
        left.remove(twins[0])
    return not left
