"""Judges of edits: was the change made, and was everything else left alone?

Used by evaluation on scenes that the verifier has read back, and on the pictures themselves. The
target scene of an edit is one right answer of several; these predicates accept all of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddt_llama.shapes.edits import ZONE_BORDER, Edit
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Object, Scene
from ddt_llama.shapes.words import ZONE_EDGES, zone

# How far an object may stand from where it was and still count as not moved.
PLACE_TOLERANCE = 3 / 64


def _near(item: Object, other: Object, tolerance: float) -> bool:
    return abs(item.x - other.x) <= tolerance and abs(item.y - other.y) <= tolerance


def _alike(item: Object, other: Object) -> bool:
    return (item.shape, item.colour, item.size) == (other.shape, other.colour, other.size)


def _obeys(made: Edit, item: Object, tolerance: float) -> bool:
    """Say whether this object is what the instruction asked for."""
    after = made.after
    if after is None or not _alike(item, after):
        return False
    if made.kind not in ("add", "move"):
        return _near(item, after, tolerance)
    reach = (-ZONE_BORDER, ZONE_BORDER)
    return any(
        zone(item.x + dx, item.y + dy) == zone(after.x, after.y) for dx in reach for dy in reach
    )


def _unmatched(made: Edit, result: Scene, tolerance: float) -> tuple[list[Object], list[Object]]:
    """Pair each object that should stay with one of the result; return what is lost and left."""
    left = list(result.objects)
    lost = []
    for item in made.source.objects:
        if item is made.before:
            continue
        twin = next((o for o in left if _alike(item, o) and _near(item, o, tolerance)), None)
        if twin is None:
            lost.append(item)
        else:
            left.remove(twin)
    return lost, left


def change_done(made: Edit, result: Scene | None, tolerance: float = PLACE_TOLERANCE) -> bool:
    """Say whether the result shows what was asked, whatever became of the rest.

    Added and moved objects may stand anywhere in the named part of the canvas. An unreadable result
    (None) is never accepted.
    """
    if result is None:
        return False
    if made.kind == "background":
        return result.background == made.target.background
    _, left = _unmatched(made, result, tolerance)
    before = made.before
    gone = before is None or not any(
        _alike(before, o) and _near(before, o, tolerance) for o in left
    )
    return gone and (made.kind == "remove" or any(_obeys(made, item, tolerance) for item in left))


def _may_remain(made: Edit, item: Object, tolerance: float) -> bool:
    """Say whether a leftover can be the object spoken of, obedient or not."""
    if made.before is None:
        return made.kind == "add"
    if made.kind == "move":
        return _alike(item, made.before)
    return _near(item, made.before, tolerance)


def rest_untouched(made: Edit, result: Scene | None, tolerance: float = PLACE_TOLERANCE) -> bool:
    """Say whether all that the instruction does not speak of is as before, and nothing is new."""
    if result is None or (
        made.kind != "background" and result.background != made.source.background
    ):
        return False
    lost, left = _unmatched(made, result, tolerance)
    return not lost and len(left) <= 1 and all(_may_remain(made, item, tolerance) for item in left)


def changed_region(made: Edit, size: int) -> Float[Tensor, "{size} {size}"]:
    """Return 1 where the instruction allows the picture to change, 0 where it must stay.

    That is where source and target scene differ, one pixel wider; an added or moved object may
    also stand anywhere else in the named part of the canvas, but not upon the others.
    """
    source, target = render([made.source, made.target], size)
    changed = (source - target).abs().amax(0) > 0.01
    if made.after is not None and made.kind in ("add", "move"):
        steps = (torch.arange(size) + 0.5) / size
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        place = zone(made.after.x, made.after.y)
        changed |= _in_zone(place, x, y, made.after.radius + ZONE_BORDER)
        for item in made.source.objects:
            if item is not made.before:
                changed &= torch.hypot(x - item.x, y - item.y) > item.radius
    return nn.functional.max_pool2d(changed[None].float(), 3, stride=1, padding=1)[0]


def _in_zone(place: int, x: Tensor, y: Tensor, reach: float) -> Tensor:
    edges = (0.0, *ZONE_EDGES, 1.0)
    row, column = divmod(place, 3)
    return (
        (x >= edges[column] - reach)
        & (x <= edges[column + 1] + reach)
        & (y >= edges[row] - reach)
        & (y <= edges[row + 1] + reach)
    )


def untouched_error(
    made: Edit, before: Float[Tensor, "3 h w"], after: Float[Tensor, "3 h w"]
) -> float:
    """Return the mean absolute difference of two pictures where nothing should change, in [0, 1].

    Pictures in [-1, 1], square. 0 where the instruction leaves no pixel that must stay.
    """
    keep = 1 - changed_region(made, before.shape[-1]).to(before.device)
    difference = (before - after).abs().mean(0) / 2
    return float((difference * keep).sum() / keep.sum().clamp(min=1))
