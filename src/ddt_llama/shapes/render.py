"""Pictures of scenes: batched anti-aliased signed-distance functions in torch, on any device.

Each object is drawn on the patch around it only, all objects of one shape in one call, and added to
the canvases by one scatter; objects of a valid scene do not overlap, so adding is painting.
Distances of the basic shapes: I. Quilez, "2D distance functions".
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SIZES, Scene

# Small enough for the patches of one chunk to stay in a core's cache.
_CHUNK = 128

Plane = Float[Tensor, "*shape"]


def _circle(x: Plane, y: Plane) -> Plane:
    return torch.hypot(x, y) - 0.86


def _square(x: Plane, y: Plane) -> Plane:
    return torch.maximum(x.abs(), y.abs()) - 0.70


def _triangle(x: Plane, y: Plane) -> Plane:
    return torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - 0.5


def _star(x: Plane, y: Plane) -> Plane:
    # Two reflections fold the five arms onto one; the rest is the distance to one edge.
    cos, sin, inner = 0.8090170, 0.5877853, 0.5
    x, y = x.abs(), -y
    fold = 2 * (cos * x - sin * y).clamp(min=0)
    x, y = x - cos * fold, y + sin * fold
    fold = 2 * (-cos * x - sin * y).clamp(min=0)
    x, y = (x + cos * fold).abs(), y + sin * fold - 1
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
    side = torch.sign(y * edge_x - x * edge_y)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * side


def _cross(x: Plane, y: Plane) -> Plane:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 0.92)


def _ring(x: Plane, y: Plane) -> Plane:
    return (torch.hypot(x, y) - 0.71).abs() - 0.2


# In the order of SHAPES; coordinates in units of the object's radius, y downwards.
_DISTANCES: tuple[Callable[[Plane, Plane], Plane], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _cross,
    _ring,
)


def coverage(shape: int, dx: Plane, dy: Plane, radius: float) -> Plane:
    """Return the share of each pixel that the shape covers, in [0, 1].

    dx, dy: offset of the pixel's centre from the shape's centre in pixels; radius in pixels.
    """
    return (0.5 - radius * _DISTANCES[shape](dx / radius, dy / radius)).clamp(0, 1)


def render(
    scenes: Sequence[Scene], size: int = 64, device: str | torch.device = "cpu"
) -> Float[Tensor, "b 3 {size} {size}"]:
    """Draw the scenes as images in [-1, 1], `size` pixels on a side."""
    chunks = [
        _render_chunk(scenes[start : start + _CHUNK], size, torch.device(device))
        for start in range(0, len(scenes), _CHUNK)
    ]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, size, size, device=device)


def _palette(entries: Sequence[tuple[str, tuple[int, int, int]]], device: torch.device) -> Tensor:
    return torch.tensor([rgb for _, rgb in entries], device=device) / 127.5 - 1


def _render_chunk(scenes: Sequence[Scene], size: int, device: torch.device) -> Tensor:
    colours, backgrounds = _palette(COLOURS, device), _palette(BACKGROUNDS, device)
    ground = torch.tensor([scene.background for scene in scenes], device=device)
    canvas = backgrounds[ground][:, :, None].repeat(1, 1, size * size)
    alike: dict[tuple[int, int], list[tuple[int, int, float, float]]] = {}
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            entry = (row, item.colour, item.x * size, item.y * size)
            alike.setdefault((item.shape, item.size), []).append(entry)
    for (shape, kind), entries in sorted(alike.items()):
        radius = SIZES[kind][1] * size
        row, colour, x, y = torch.tensor(entries, dtype=torch.float64, device=device).unbind(1)
        row, colour = row.long(), colour.long()
        index, alpha = _patches(shape, radius, x, y, size)
        tint = colours[colour] - backgrounds[ground[row]]
        channel = (row[:, None] * 3 + torch.arange(3, device=device)) * size * size
        canvas.view(-1).scatter_add_(
            0,
            (channel[:, :, None] + index[:, None]).view(-1),
            (tint[:, :, None] * alpha[:, None]).view(-1),
        )
    return canvas.view(-1, 3, size, size).clamp_(-1, 1)


def _patches(shape: int, radius: float, x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return pixel index in the canvas and coverage, both `object pixel`, of each patch."""
    side = min(2 * ceil(radius + 0.5) + 1, size)
    steps = torch.arange(side, device=x.device)
    left = ((x - side / 2).round().long()).clamp(0, size - side)
    top = ((y - side / 2).round().long()).clamp(0, size - side)
    columns, rows = left[:, None] + steps, top[:, None] + steps
    dx = (columns + 0.5 - x[:, None]).float()[:, None, :].expand(-1, side, -1)
    dy = (rows + 0.5 - y[:, None]).float()[:, :, None].expand(-1, -1, side)
    index = rows[:, :, None] * size + columns[:, None, :]
    return index.flatten(1), coverage(shape, dx, dy, radius).flatten(1)
