"""Scenes of the shapes world: what may stand on the canvas, and how a scene is drawn at random.

First step of the synthetic pipeline (scene -> picture, caption, question, edit). A scene is a pure
function of (seed, index). Some (colour, shape, count) combinations are held out of training, so
that evaluation can ask for compositions the model has never seen.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, hypot
from random import Random
from typing import Literal

from ddt_llama.config import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Every two entries of COLOURS and BACKGROUNDS together are at least 100 apart in RGB, so that a
# blurred or noisy reconstruction still names its colours.
COLOURS = (
    ("red", (220, 20, 30)),
    ("green", (20, 150, 40)),
    ("blue", (25, 60, 235)),
    ("yellow", (255, 235, 20)),
    ("purple", (130, 20, 170)),
    ("orange", (255, 125, 0)),
    ("cyan", (0, 210, 230)),
    ("pink", (255, 140, 200)),
)
BACKGROUNDS = (
    ("white", (255, 255, 255)),
    ("black", (10, 10, 10)),
    ("grey", (140, 140, 140)),
    ("brown", (120, 70, 20)),
)
# Name and radius of the circle around the shape, as a fraction of the canvas.
SIZES = (("small", 0.10), ("large", 0.155))
MAX_OBJECTS = 6
MARGIN = 0.01
# A 3 x 3 grid of large objects (the fallback of `place`) still keeps this gap.
GAP = 0.02

Split = Literal["train", "heldout"]

_ROOMY_GAP = 0.04
_TRIES = 20
_RESTARTS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Object:
    """One shape: indices into SHAPES, COLOURS and SIZES; centre (x, y) in [0, 1], y downwards."""

    shape: int
    colour: int
    size: int
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Radius of the circle around the shape, as a fraction of the canvas."""
        return SIZES[self.size][1]


@dataclass(frozen=True, slots=True)
class Scene:
    """A background (index into BACKGROUNDS) and one to six objects that do not touch."""

    background: int
    objects: tuple[Object, ...]


def generator(seed: int, index: int, stream: int = 0) -> Random:
    """Return the generator of item `index` under `seed`; streams of one item are independent.

    The three integers are mixed by splitmix64, so neighbouring indices are unrelated.
    """
    state = 0
    for word in (seed, index, stream):
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return Random(state)


def is_heldout_group(colour: int, shape: int, count: int) -> bool:
    """Say whether exactly `count` objects of this colour and shape are kept out of training.

    The rule is (colour + 2 shape + 3 count) % 10 == 0: each pair misses at most one count of 1..6,
    about a tenth of all combinations, and every colour, shape and count stays in training.
    """
    return (colour + 2 * shape + 3 * count) % 10 == 0


def groups(objects: Iterable[Object]) -> Counter[tuple[int, int]]:
    """Count the objects of each (colour, shape)."""
    return Counter((item.colour, item.shape) for item in objects)


def is_heldout(scene: Scene) -> bool:
    """Say whether the scene holds a (colour, shape, count) combination kept out of training."""
    return _kinds_heldout([(item.colour, item.shape) for item in scene.objects])


def _kinds_heldout(kinds: list[tuple[int, int]]) -> bool:
    return any(is_heldout_group(*kind, kinds.count(kind)) for kind in kinds)


def fits(item: Object, others: Sequence[Object], gap: float = GAP) -> bool:
    """Say whether the object lies inside the canvas and keeps its gap from all others."""
    reach = item.radius + MARGIN
    inside = reach <= item.x <= 1 - reach and reach <= item.y <= 1 - reach
    return inside and all(
        hypot(item.x - other.x, item.y - other.y) >= item.radius + other.radius + gap
        for other in others
    )


def is_valid(scene: Scene) -> bool:
    """Say whether the scene has 1 to 6 objects, all inside the canvas and apart."""
    items = scene.objects
    return 1 <= len(items) <= MAX_OBJECTS and all(
        fits(item, items[:place]) for place, item in enumerate(items)
    )


def sample_scene(
    seed: int,
    index: int,
    *,
    max_objects: int = 4,
    min_objects: int = 1,
    split: Split = "train",
    grid: int | None = None,
    even: bool = False,
) -> Scene:
    """Draw scene `index` of `seed`: a pure function of its arguments.

    The number of objects is uniform in [min_objects, max_objects]. In half of the scenes some
    objects repeat a colour and shape, so that there is something to count. Split "train" never
    holds a held-out combination, "heldout" always holds one. With `grid`, centres lie in the middle
    of cells of a grid x grid canvas, except where so many objects have no room there.

    A scene that is in the wrong split is drawn anew. Pairs of colour and shape that never stand
    alone in training so become four times rarer than others; with `even`, the first such pair gets
    another member in the place of some object, where that makes a training scene of it.
    """
    if not 1 <= min_objects <= max_objects <= MAX_OBJECTS:
        raise UserError(
            f"min_objects={min_objects} and max_objects={max_objects} given; "
            f"allowed is 1 <= min <= max <= {MAX_OBJECTS}; choose numbers in that range"
        )
    rng = generator(seed, index)
    count = min_objects + int(rng.random() * (max_objects - min_objects + 1))
    wanted = split == "heldout"
    kinds = _sample_kinds(rng, count)
    while _kinds_heldout(kinds) != wanted:
        fuller = _one_more(kinds) if even and not wanted else kinds
        kinds = _sample_kinds(rng, count) if _kinds_heldout(fuller) != wanted else fuller
    sizes = [int(rng.random() * len(SIZES)) for _ in kinds]
    background = int(rng.random() * len(BACKGROUNDS))
    spots = _place(rng, [SIZES[size][1] for size in sizes], grid)
    return Scene(
        background,
        tuple(
            Object(shape, colour, size, x, y)
            for (colour, shape), size, (x, y) in zip(kinds, sizes, spots, strict=True)
        ),
    )


def _sample_kinds(rng: Random, count: int) -> list[tuple[int, int]]:
    draw = rng.random
    kinds = [(int(draw() * len(COLOURS)), int(draw() * len(SHAPES))) for _ in range(count)]
    if count > 1 and draw() < 0.5:
        repeats = 2 + int(draw() * (count - 1))
        kinds[:repeats] = [kinds[0]] * repeats
    return kinds


def _one_more(kinds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give the first held-out group of a scene the place of the last object that is none of it."""
    short = next(kind for kind in kinds if is_heldout_group(*kind, kinds.count(kind)))
    others = [place for place, kind in enumerate(kinds) if kind != short]
    return [short if place in others[-1:] else kind for place, kind in enumerate(kinds)]


def coordinate(rng: Random, low: float, high: float, grid: int | None = None) -> float | None:
    """Draw a number in [low, high]; with `grid`, the middle of a cell, None where none lies there.

    The cells divide [0, 1] into `grid` parts.
    """
    if grid is None:
        return low + (high - low) * rng.random()
    first, last = ceil(low * grid - 0.5), floor(high * grid - 0.5)
    return None if last < first else (first + int(rng.random() * (last - first + 1)) + 0.5) / grid


def _place(rng: Random, radii: list[float], grid: int | None) -> list[tuple[float, float]]:
    """Place circles by rejection, large ones first; where that fails, each in a cell of its own.

    The cells are a shuffled 3 x 3 grid: it always fits, and is needed for crowded scenes only.
    """
    order = sorted(range(len(radii)), key=lambda place: -radii[place])
    for _ in range(_RESTARTS):
        spots = _reject(rng, [radii[place] for place in order], grid)
        if spots is not None:
            break
    else:
        cells = [((2 * i + 1) / 6, (2 * j + 1) / 6) for i in range(3) for j in range(3)]
        rng.shuffle(cells)
        spots = []
        for place, (x, y) in zip(order, cells, strict=False):
            slack = 1 / 6 - MARGIN - radii[place]
            spots.append((x + slack * (2 * rng.random() - 1), y + slack * (2 * rng.random() - 1)))
    placed = dict(zip(order, spots, strict=True))
    return [placed[place] for place in range(len(radii))]


def _reject(rng: Random, radii: list[float], grid: int | None) -> list[tuple[float, float]] | None:
    placed: list[tuple[float, float, float]] = []
    for radius in radii:
        low = radius + MARGIN
        for _ in range(_TRIES):
            x, y = coordinate(rng, low, 1 - low, grid), coordinate(rng, low, 1 - low, grid)
            if x is None or y is None:
                return None
            for u, v, reach in placed:
                if (x - u) * (x - u) + (y - v) * (y - v) < (radius + reach) * (radius + reach):
                    break
            else:
                placed.append((x, y, radius + _ROOMY_GAP))
                break
        else:
            return None
    return [(x, y) for x, y, _ in placed]
