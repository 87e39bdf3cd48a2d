"""Edits of scenes: an instruction, the scene it starts from and a scene that obeys it.

An edit is a pure function of (scene, seed, index). Its instruction names one object without
ambiguity, and its target is a valid scene in which nothing else has changed (but see `grid` of
`edit`). Other answers to the same instruction are judged in `judge`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor, hypot
from random import Random
from typing import Literal

from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MARGIN,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    coordinate,
    fits,
    generator,
    is_heldout,
)
from ddt_llama.shapes.words import ZONE_EDGES, ZONES, Mention, refer, zone

EditKind = Literal["recolour", "remove", "add", "move", "resize", "background"]
EDIT_KINDS: tuple[EditKind, ...] = ("recolour", "remove", "add", "move", "resize", "background")
# New places keep this far from the border of their zone, so that it can be told from the picture.
ZONE_BORDER = 0.03
# A shift that nobody minds (see `judge.PLACE_TOLERANCE`); in widths of the canvas.
NEAR = 2.5 / 64
# A shorter move might not be seen as one.
_SHORTEST_MOVE = 9 / 64
# Smaller is chosen more: a background can always be changed, one object of one not removed.
_PRIORITY = {"recolour": 1, "remove": 0.8, "add": 1, "move": 1, "resize": 1, "background": 1.6}
_SPOT_TRIES = 16
_EDIT_TRIES = 8
_SPOT_GAP = 0.03


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction, the scene before it and one scene after it.

    before: the object that changes, None for "add" and "background"; after: what it becomes, None
    for "remove" and "background".
    """

    source: Scene
    instruction: str
    target: Scene
    kind: EditKind
    before: Object | None = None
    after: Object | None = None


def edit(
    scene: Scene,
    seed: int,
    index: int,
    *,
    kind: EditKind | None = None,
    heldout: bool = False,
    max_objects: int = MAX_OBJECTS,
    grid: int | None = None,
) -> Edit | None:
    """Choose an edit of the scene; of one kind, if given. None where nothing fits.

    The target has at most `max_objects` objects and holds a combination kept out of training
    exactly where `heldout` says so. Without `kind` and `heldout`, every training scene has an edit.
    With `grid`, objects are added in and moved to the middle of cells of a grid x grid canvas, and
    one that is repainted or resized goes to the nearest middle or, where that is more than
    `NEAR` away, to the nearest border of a cell, across and down alike.
    """
    rng = generator(seed, index, 3)
    order = sorted(EDIT_KINDS, key=lambda kind: rng.random() * _PRIORITY[kind])
    kinds: list[EditKind] = order if kind is None else [kind]
    for chosen in kinds:
        for _ in range(_EDIT_TRIES):
            made = _MAKE[chosen](rng, scene, grid)
            if (
                made is not None
                and is_heldout(made.target) == heldout
                and len(made.target.objects) <= max_objects
            ):
                return made
    return None


def _chosen(rng: Random, scene: Scene) -> tuple[Object, Mention] | None:
    items = list(scene.objects)
    rng.shuffle(items)
    for item in items:
        phrase = refer(rng, scene, item)
        if phrase is not None:
            return item, phrase
    return None


def _with(scene: Scene, before: Object | None, after: Object | None) -> Scene:
    kept = [after if item is before else item for item in scene.objects]
    if before is None:
        kept.append(after)
    return replace(scene, objects=tuple(item for item in kept if item is not None))


def _others(scene: Scene, item: Object) -> list[Object]:
    return [other for other in scene.objects if other is not item]


def _in_place(scene: Scene, item: Object, after: Object, grid: int | None) -> Object | None:
    """Put what an object becomes where it stood, or near there on the grid; None: no room."""
    if grid is not None:
        after = replace(after, x=_snapped(item.x, grid), y=_snapped(item.y, grid))
    stays = zone(after.x, after.y) == zone(item.x, item.y)
    return after if stays and fits(after, _others(scene, item)) else None


def _snapped(place: float, grid: int) -> float:
    middle = (floor(place * grid) + 0.5) / grid
    return middle if abs(place - middle) <= NEAR else round(place * grid) / grid


def _recolour(rng: Random, scene: Scene, grid: int | None) -> Edit | None:
    chosen = _chosen(rng, scene)
    if chosen is None:
        return None
    item, phrase = chosen
    colour = rng.choice([c for c in range(len(COLOURS)) if c != item.colour])
    after = _in_place(scene, item, replace(item, colour=colour), grid)
    if after is None:
        return None
    name = COLOURS[colour][0]
    wording = rng.choice(("make {} {}", "paint {} {}", "change the colour of {} to {}"))
    instruction = wording.format(phrase.definite, name)
    return Edit(scene, instruction, _with(scene, item, after), "recolour", item, after)


def _remove(rng: Random, scene: Scene, _grid: int | None) -> Edit | None:
    chosen = _chosen(rng, scene)
    if chosen is None or len(scene.objects) == 1:
        return None
    item, phrase = chosen
    instruction = rng.choice(("remove {}", "delete {}", "take away {}")).format(phrase.definite)
    return Edit(scene, instruction, _with(scene, item, None), "remove", item)


def _spot(
    rng: Random, place: int, item: Object, others: list[Object], grid: int | None
) -> tuple[float, float] | None:
    """Find room for the object well inside a zone."""
    row, column = divmod(place, 3)
    across, down = _band(column, item.radius + MARGIN), _band(row, item.radius + MARGIN)
    circles = [(o.x, o.y, item.radius + o.radius + _SPOT_GAP) for o in others]
    for _ in range(_SPOT_TRIES):
        x, y = coordinate(rng, *across, grid), coordinate(rng, *down, grid)
        if x is None or y is None:
            return None
        if all((x - u) * (x - u) + (y - v) * (y - v) >= gap * gap for u, v, gap in circles):
            return x, y
    return None


def _band(part: int, reach: float) -> tuple[float, float]:
    """Return from where to where a centre may lie in a third of the canvas."""
    edges = (0.0, *ZONE_EDGES, 1.0)
    low = max(reach, edges[part] + (ZONE_BORDER if part else 0))
    high = min(1 - reach, edges[part + 1] - (ZONE_BORDER if part < 2 else 0))
    return low, high


def _add(rng: Random, scene: Scene, grid: int | None) -> Edit | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    draw = rng.random
    new = Object(int(draw() * len(SHAPES)), int(draw() * len(COLOURS)), int(draw() * 2), 0.0, 0.0)
    place = int(draw() * len(ZONES))
    spot = _spot(rng, place, new, list(scene.objects), grid)
    if spot is None:
        return None
    after = replace(new, x=spot[0], y=spot[1])
    phrase = Mention.of(new)
    wording = rng.choice(("add {} at the {}", "put {} at the {}"))
    instruction = wording.format(phrase.text, ZONES[place])
    return Edit(scene, instruction, _with(scene, None, after), "add", None, after)


def _move(rng: Random, scene: Scene, grid: int | None) -> Edit | None:
    chosen = _chosen(rng, scene)
    if chosen is None:
        return None
    item, phrase = chosen
    place = rng.choice([z for z in range(len(ZONES)) if z != zone(item.x, item.y)])
    spot = _spot(rng, place, item, _others(scene, item), grid)
    if spot is None or hypot(spot[0] - item.x, spot[1] - item.y) < _SHORTEST_MOVE:
        return None
    after = replace(item, x=spot[0], y=spot[1])
    instruction = f"move {phrase.definite} to the {ZONES[place]}"
    return Edit(scene, instruction, _with(scene, item, after), "move", item, after)


def _resize(rng: Random, scene: Scene, grid: int | None) -> Edit | None:
    chosen = _chosen(rng, scene)
    if chosen is None:
        return None
    item, phrase = chosen
    after = _in_place(scene, item, replace(item, size=1 - item.size), grid)
    if after is None:
        return None
    words = (SIZES[after.size][0], ("smaller", "larger")[after.size])
    instruction = f"make {phrase.definite} {rng.choice(words)}"
    return Edit(scene, instruction, _with(scene, item, after), "resize", item, after)


def _background(rng: Random, scene: Scene, _grid: int | None) -> Edit:
    ground = rng.choice([b for b in range(len(BACKGROUNDS)) if b != scene.background])
    wording = rng.choice(("change the background to {}", "make the background {}"))
    instruction = wording.format(BACKGROUNDS[ground][0])
    return Edit(scene, instruction, replace(scene, background=ground), "background")


_MAKE: dict[EditKind, Callable[[Random, Scene, int | None], Edit | None]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "resize": _resize,
    "background": _background,
}
