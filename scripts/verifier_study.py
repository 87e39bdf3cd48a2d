"""Measure the verifier of the shapes world: how often it is right, silent, or wrong.

Every score of the shapes world is read by it, so its own errors are measured first: on clean
renders, on damaged ones, on pictures of other scenes, and on pictures half-way between two scenes.
Writes metrics.jsonl, plot.png and README.md; run from the repository root.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib import pyplot
from PIL import Image
from scipy import ndimage

from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Object,
    Scene,
    fits,
    generator,
    sample_scene,
)
from ddt_llama.shapes.verify import matches, read

SEED = 0x5EED_0003
SIZE = 64
CHUNK = 250
Damage = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass
class Row:
    """One measured condition: shares of pictures read exactly, refused, and read wrongly."""

    group: str
    name: str
    value: float
    pictures: int
    exact: float
    refused: float
    wrong: float
    psnr: float | None = None


def noise(images: torch.Tensor, seed: int, *, sigma: float) -> torch.Tensor:
    """Add Gaussian noise; sigma on the scale [0, 1]."""
    draw = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 2 * sigma * draw).clamp(-1, 1)


def blur(images: torch.Tensor, seed: int, *, radius: float) -> torch.Tensor:
    """Blur with a Gaussian whose standard deviation is `radius` pixels."""
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, radius, radius)))


def blur_noise(images: torch.Tensor, seed: int, *, radius: float) -> torch.Tensor:
    """Blur, then add noise of sigma 0.05."""
    return noise(blur(images, seed, radius=radius), seed, sigma=0.05)


def shift(images: torch.Tensor, seed: int, *, pixels: float) -> torch.Tensor:
    """Shift along both axes, in a direction drawn per picture; the border repeats."""
    signs = np.random.default_rng(seed).choice((-1, 1), (len(images), 2))
    moved = [
        ndimage.shift(picture, (0, pixels * a, pixels * b), order=1, mode="nearest")
        for picture, (a, b) in zip(images.numpy(), signs, strict=True)
    ]
    return torch.from_numpy(np.stack(moved))


def jpeg(images: torch.Tensor, seed: int, *, quality: float) -> torch.Tensor:
    """Save and load as JPEG."""
    loaded = []
    for picture in images:
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        loaded.append(np.asarray(Image.open(file), dtype=np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(loaded)).permute(0, 3, 1, 2)


def warp(images: torch.Tensor, seed: int, *, pixels: float) -> torch.Tensor:
    """Bend smoothly: displacements of that standard deviation, correlated over four pixels."""
    rng = np.random.default_rng(seed)
    steps = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"))
    bent = []
    for picture in images.numpy():
        field = ndimage.gaussian_filter(rng.standard_normal((2, SIZE, SIZE)), (0, 4, 4))
        places = steps + pixels * field / field.std()
        bent.append(
            np.stack([ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in picture])
        )
    return torch.from_numpy(np.stack(bent)).float()


def fade(images: torch.Tensor, seed: int, *, share: float) -> torch.Tensor:
    """Mix that share of each picture's mean colour into it."""
    return images + share * (images.mean((2, 3), keepdim=True) - images)


DAMAGES: dict[str, tuple[str, Callable[..., torch.Tensor], Sequence[float]]] = {
    "noise, sigma": ("sigma", noise, (0.02, 0.05, 0.08, 0.11, 0.16, 0.22)),
    "blur, pixels": ("radius", blur, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)),
    "blur, pixels, with noise 0.05": ("radius", blur_noise, (0.5, 1.0, 1.5, 2.0)),
    "shift, pixels": ("pixels", shift, (0.5, 1.0, 2.0, 3.0)),
    "JPEG, quality": ("quality", jpeg, (90, 75, 50, 30, 15)),
    "warp, pixels": ("pixels", warp, (0.25, 0.5, 1.0, 1.5)),
    "fading, share": ("share", fade, (0.05, 0.1, 0.2)),
}


def measure(scenes: Sequence[Scene], group: str, value: float, damage: Damage | None) -> Row:
    """Read the damaged pictures of the scenes back; places may be off by three pixels."""
    exact = refused = 0
    errors = []
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start : start + CHUNK]
        clean = render(part, SIZE)
        images = clean if damage is None else damage(clean, start)
        errors.append((images - clean).square().mean((1, 2, 3)))
        found = read(images)
        exact += sum(matches(a, b) for a, b in zip(part, found, strict=True))
        refused += sum(b is None for b in found)
    total = len(scenes)
    error = torch.cat(errors).mean().item()
    psnr = 10 * np.log10(4 / error) if error > 0 else None
    wrong = max(0, total - exact - refused) / total
    return Row(group, group, value, total, exact / total, refused / total, wrong, psnr)


def changed(scene: Scene, index: int) -> dict[str, Scene]:
    """Return scenes that differ from this one in one thing; each where it is possible."""
    rng = generator(SEED, index, 9)
    place = int(rng.random() * len(scene.objects))
    item = scene.objects[place]
    others = [o for o in scene.objects if o is not item]

    def swap(new: Object) -> Scene:
        return replace(scene, objects=tuple(new if o is item else o for o in scene.objects))

    found = {
        "background": replace(scene, background=(scene.background + 1) % len(BACKGROUNDS)),
        "colour": swap(replace(item, colour=(item.colour + 1 + index % 7) % len(COLOURS))),
        "shape": swap(replace(item, shape=(item.shape + 1 + index % 5) % len(SHAPES))),
    }
    larger = replace(item, size=1 - item.size)
    if fits(larger, others):
        found["size"] = swap(larger)
    for dx, dy in ((5, 0), (-5, 0), (0, 5), (0, -5)):
        moved = replace(item, x=item.x + dx / SIZE, y=item.y + dy / SIZE)
        if fits(moved, others):
            found["moved by 5 pixels"] = swap(moved)
    if others:
        found["one missing"] = replace(scene, objects=tuple(others))
    for _ in range(50):
        new = Object(int(rng.random() * 6), int(rng.random() * 8), 0, rng.random(), rng.random())
        if len(scene.objects) < 6 and fits(new, scene.objects):
            found["one more"] = replace(scene, objects=(*scene.objects, new))
            break
    return found


def false_accepts(scenes: Sequence[Scene], group: str, damage: Damage | None) -> list[Row]:
    """Count pictures of a changed scene that are accepted as pictures of the scene itself."""
    pairs: dict[str, list[tuple[Scene, Scene]]] = {}
    for index, scene in enumerate(scenes):
        for name, other in changed(scene, index).items():
            pairs.setdefault(name, []).append((scene, other))
    rows = []
    for name, both in pairs.items():
        images = render([other for _, other in both], SIZE)
        found = read(images if damage is None else damage(images, 1))
        accepted = sum(matches(a, b) for (a, _), b in zip(both, found, strict=True))
        right = sum(matches(a, b) for (_, a), b in zip(both, found, strict=True))
        refused = sum(b is None for b in found)
        total = len(both)
        rows.append(Row(group, name, 0, total, right / total, refused / total, accepted / total))
    return rows


def blends(scenes: Sequence[Scene], share: float) -> list[Row]:
    """Read mixtures of two pictures that differ in one thing.

    exact: read as the scene of the larger share; wrong: as any other scene.
    """
    pairs: dict[str, list[tuple[Scene, Scene]]] = {}
    for index, scene in enumerate(scenes):
        for name, other in changed(scene, index).items():
            pairs.setdefault(name, []).append((scene, other))
    rows = []
    for name, both in pairs.items():
        first, second = render([a for a, _ in both], SIZE), render([b for _, b in both], SIZE)
        found = read((1 - share) * first + share * second)
        total = len(both)
        exact = sum(matches(a, b) for (a, _), b in zip(both, found, strict=True))
        refused = sum(b is None for b in found)
        shares = (exact / total, refused / total, (total - exact - refused) / total)
        rows.append(Row("blend", f"{name}, {share:.0%}", share, total, *shares))
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Plot exact and wrong shares against the strength of each damage."""
    matplotlib.use("Agg")
    names = list(DAMAGES)
    figure, axes = pyplot.subplots(2, 4, figsize=(11, 5), sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        chosen = [row for row in rows if row.group == name]
        axis.plot([r.value for r in chosen], [r.exact for r in chosen], "o-", label="exact")
        axis.plot([r.value for r in chosen], [r.wrong for r in chosen], "x--", label="wrong")
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.03, 1.03)
    axes.flat[0].legend(fontsize=8)
    axes.flat[-1].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=60)


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    lines = [
        "| condition | value | pictures | PSNR dB | exact % | refused % | wrong % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "" if row.psnr is None else f"{row.psnr:.1f}"
        value = f"{row.value:g}" if row.value else ""
        shares = " | ".join(f"{100 * x:.2f}" for x in (row.exact, row.refused, row.wrong))
        lines.append(f"| {row.name} | {value} | {row.pictures} | {psnr} | {shares} |")
    return "\n".join(lines)


def verdict(rows: Sequence[Row], accepts: Sequence[Row], speed: float) -> str:
    """Say in a few sentences what the tables show."""
    clean, crowded = rows[:2]
    mild = [
        row
        for row in rows[2:]
        if row.psnr is not None and row.psnr >= 22 and not row.group.startswith("shift")
    ]
    worst = max(mild, key=lambda row: row.wrong)
    least = min(mild, key=lambda row: row.exact)
    accepted = sum(round(row.wrong * row.pictures) for row in accepts)
    return "\n".join(
        (
            f"* Clean: {100 * clean.exact:.2f} % of {clean.pictures} scenes exact with 1 to 4 "
            f"objects, {100 * crowded.exact:.2f} % of {crowded.pictures} with 5 and 6.",
            f"* Damage that leaves 22 dB or more: at most {100 * worst.wrong:.2f} % wrong "
            f"({worst.name} {worst.value:g}); exact falls to {100 * least.exact:.2f} % "
            f"({least.name} {least.value:g}), almost all of the loss being refusals. "
            "Under such damage an exact share is too low rather than too high; but a picture that "
            "is one third another scene may still be accepted (last table).",
            f"* Other scenes accepted: {accepted} of {sum(row.pictures for row in accepts)}.",
            f"* Speed: {speed:.0f} scenes a second made, drawn and read on one core.",
        )
    )


def main(
    out: Path = Path("experiments/0003-verifier"), clean: int = 10_000, damaged: int = 1_000
) -> None:
    """Run the study on `clean` clean pictures and `damaged` pictures a condition."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    few = [sample_scene(SEED, i, max_objects=4) for i in range(clean)]
    many = [sample_scene(SEED + 1, i, min_objects=5, max_objects=6) for i in range(clean // 2)]
    rows = [measure(few, "clean, 1 to 4 objects", 0, None)]
    speed = clean / (time.perf_counter() - started)
    rows.append(measure(many, "clean, 5 and 6 objects", 0, None))
    few = few[:damaged]
    for name, (argument, damage, values) in DAMAGES.items():
        rows += [
            measure(few, name, value, partial(damage, **{argument: value})) for value in values
        ]
    accepts = false_accepts(few, "false accepts, clean", None)
    hard = partial(blur_noise, radius=1.0)
    hard_accepts = false_accepts(few, "false accepts, blur 1 and noise 0.05", hard)
    mixed = [row for share in (0.3, 0.5) for row in blends(few, share)]
    out.mkdir(parents=True, exist_ok=True)
    everything = [*rows, *accepts, *hard_accepts, *mixed]
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps(vars(row)) + "\n" for row in everything), encoding="utf-8"
    )
    draw(rows, out / "plot.png")
    parts = {
        "CLEAN_AND_DAMAGED": table(rows),
        "ACCEPTS": table(accepts),
        "HARD_ACCEPTS": table(hard_accepts),
        "BLENDS": table(mixed),
        "VERDICT": verdict(rows, [*accepts, *hard_accepts], speed),
    }
    text = (Path(__file__).parent / "verifier_study.md").read_text(encoding="utf-8")
    for name, content in parts.items():
        text = text.replace("{" + name + "}", content)
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
