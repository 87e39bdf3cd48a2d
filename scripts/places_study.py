"""Does a tokenizer give an object back at the places where its language model will draw it?

Every object of the shapes world stands alone on every ground, in the middle of a cell of a grid
(`data.grid`) and anywhere; what is encoded and decoded in one step is read back by the verifier.
Shares of scenes that are read exactly, in all, by shape and size, and of every pair of colour and
shape.

    python scripts/places_study.py small --out experiments/0026-places --grid 8
"""

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from ddt_llama.evaluation.intervals import flat, proportion
from ddt_llama.generation.release import load
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MARGIN,
    SHAPES,
    SIZES,
    Object,
    Scene,
    coordinate,
)
from ddt_llama.shapes.verify import matches, read

BATCH = 64


def lone_objects(grid: int | None, each: int, seed: int = 0) -> list[Scene]:
    """Return every object alone on every ground, `each` times, where `grid` allows it."""
    rng = Random(seed)
    scenes = []
    looks = product(range(len(SHAPES)), range(len(COLOURS)), range(len(SIZES)))
    for (shape, colour, size), ground in product(looks, range(len(BACKGROUNDS))):
        border = SIZES[size][1] + MARGIN
        for _ in range(each):
            x, y = (coordinate(rng, border, 1 - border, grid) for _ in range(2))
            assert x is not None
            assert y is not None
            scenes.append(Scene(ground, (Object(shape, colour, size, x, y),)))
    return scenes


@torch.no_grad()
def main(
    model: Annotated[str, tyro.conf.Positional], out: Path, grid: int = 8, each: int = 2
) -> None:
    """Measure a model and write places.json."""
    tokenizer = load(model).tokenizer
    figures = {}
    for place, where in (("grid", grid), ("anywhere", None)):
        scenes = lone_objects(where, each)
        images = render(scenes, tokenizer.image_size)
        exact: dict[str, list[bool]] = defaultdict(list)
        starts = range(0, len(scenes), BATCH)
        for start in tqdm(starts, desc=place):
            part = images[start : start + BATCH]
            found = read(tokenizer.decode(tokenizer.encode(part), steps=1).float())
            for scene, seen in zip(scenes[start : start + BATCH], found, strict=True):
                (item,) = scene.objects
                right, shape = matches(seen, scene), SHAPES[item.shape]
                exact["all"].append(right)
                exact[f"{SIZES[item.size][0]} {shape}"].append(right)
                exact[f"{COLOURS[item.colour][0]} {shape}"].append(right)
        figures |= {f"{place}.{name}": proportion(one) for name, one in exact.items()}
    for name, figure in figures.items():
        if name.split(".")[1].split()[0] in ("all", *dict(SIZES)):
            print(f"{name:24s} {100 * figure.value:5.1f} %")
    out.mkdir(parents=True, exist_ok=True)
    (out / "places.json").write_text(json.dumps(flat(figures), indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
