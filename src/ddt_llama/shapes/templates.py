"""Templates of every shape and size, for the verifier to lay over a picture.

Each is the coverage of one shape and size, at quarter-pixel offsets and several amounts of blur, on
a small window. They are made by the renderer's own distance functions, once for each image size.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ddt_llama.shapes.render import coverage
from ddt_llama.shapes.scene import SHAPES, SIZES

Array = NDArray[np.float32]

_OFFSETS = (-0.375, -0.125, 0.125, 0.375)
# Standard deviation of the blur in pixels at 64 x 64; scaled with the image.
_BLURS = (0.0, 0.8, 1.5)


@dataclass(frozen=True)
class Templates:
    """All templates of one image size, a row each.

    flat: `template pixel` coverage; energy: sum of its squares; kind: shape * 2 + size; offset:
    (x, y) of the shape's centre from the centre of the window's middle pixel, in pixels.
    """

    side: int
    flat: Array
    energy: Array
    kind: NDArray[np.int64]
    offset: Array


@cache
def templates(size: int) -> Templates:
    """Make the templates for images of `size` pixels."""
    reach = ceil(SIZES[-1][1] * size + 2)
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    rows, kinds, offsets = [], [], []
    for shape in range(len(SHAPES)):
        for which, (_, radius) in enumerate(SIZES):
            for y in _OFFSETS:
                for x in _OFFSETS:
                    dy, dx = torch.meshgrid(steps - y, steps - x, indexing="ij")
                    sharp = coverage(shape, dx, dy, radius * size).numpy()
                    for blur in _BLURS:
                        rows.append(ndimage.gaussian_filter(sharp, blur * size / 64).ravel())
                        kinds.append(shape * len(SIZES) + which)
                        offsets.append((x, y))
    flat = np.stack(rows).astype(np.float32)
    return Templates(
        side=2 * reach + 1,
        flat=flat,
        energy=np.square(flat).sum(1),
        kind=np.array(kinds),
        offset=np.array(offsets, dtype=np.float32),
    )
