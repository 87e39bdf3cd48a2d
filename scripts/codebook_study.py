"""What does rounding to codes cost, and what would a larger codebook give?

For each tokenizer: PSNR and exact scenes on held-out scenes at one decoding step, with its own
codes, with codebooks that spherical k-means has grown to larger sizes and without rounding. Nothing
else is trained, so a network that learns beside a larger codebook does better than its row. Appends
to metrics.jsonl, so that trials can be measured one by one.

    python scripts/codebook_study.py NAME=RUN ... --out experiments/0007-codebook
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from ddt_llama.evaluation.metrics import psnr
from ddt_llama.generation.release import load
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Scene
from ddt_llama.shapes.verify import matches, read
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer

SEED = 1_000_003  # of the scenes shown in training, on which nothing is trained
LEARN_SEED = 2_000_003  # of the scenes whose features the larger codebooks are made of
BATCH = 128


@torch.no_grad()
def unit_features(model: TimestepTokenizer, images: torch.Tensor) -> torch.Tensor:
    """Return what the quantizer rounds, of unit length: `b k e`."""
    return F.normalize(model.encoder(model.to_patches(images)).float(), dim=-1)


def nearest(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the code of each feature, a part at a time: the products need memory."""
    return torch.cat([(part @ codebook.T).argmax(-1) for part in features.split(16_384)])


def grown(codebook: torch.Tensor, features: torch.Tensor, size: int) -> torch.Tensor:
    """Add the worst-served features as codes (k-means++), then two rounds of k-means."""
    distance = 1 - torch.cat([(part @ codebook.T).amax(1) for part in features.split(16_384)])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(distance.clamp_min(1e-9), size - len(codebook), generator=generator)
    codebook = torch.cat([codebook, features[chosen]])
    for _ in range(2):
        sums = torch.zeros_like(codebook).index_add_(0, nearest(features, codebook), features)
        codebook = torch.where(sums.any(-1, keepdim=True), F.normalize(sums, dim=-1), codebook)
    return codebook


@torch.no_grad()
def measure(
    model: TimestepTokenizer,
    images: torch.Tensor,
    scenes: list[Scene],
    codebook: torch.Tensor | None,
) -> dict[str, float]:
    """Return PSNR, exact scenes and rounding error; no codebook: features as they are."""
    outputs, errors = [], []
    for part in images.split(BATCH):
        features = unit_features(model, part)
        values = features
        if codebook is not None:
            values = codebook[nearest(features.flatten(0, 1), codebook)].view_as(features)
        errors.append((features - values).square().sum(-1).mean(1))
        outputs.append(model.decode(values, steps=1))
    back = torch.cat(outputs)
    right = [matches(found, scene) for found, scene in zip(read(back), scenes, strict=True)]
    return {
        "psnr": float(psnr(back, images).mean()),
        "exact": sum(right) / len(right),
        "rounding": float(torch.cat(errors).mean()),
    }


def main(
    runs: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Path,
    sizes: tuple[int, ...] = (8192, 16_384, 32_768),
    scenes: int = 1024,
    learn: int = 12_000,
) -> None:
    """Measure runs given as NAME=FOLDER; codebooks grow on the features of `learn` scenes."""
    source = ShapesSource(SEED, 4, "heldout")
    drawn = [source.scene(index) for index in range(scenes)]
    images = render(drawn, 64)
    out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        name, _, folder = run.partition("=")
        model = load(folder).tokenizer
        assert isinstance(model, TimestepTokenizer)
        codebook = model.quantizer.codebook
        books: dict[str, torch.Tensor | None] = {"own": codebook, "not rounded": None}
        if wanted := [size for size in sizes if size > len(codebook)]:
            learned = ShapesSource(LEARN_SEED, 4)
            parts = [
                unit_features(
                    model, render([learned.scene(start + i) for i in range(BATCH)], 64)
                ).flatten(0, 1)
                for start in tqdm(range(0, learn, BATCH), desc="features", leave=False)
            ]
            books |= {f"k-means {n}": grown(codebook, torch.cat(parts), n) for n in wanted}
        for kind, book in books.items():
            row = {"trial": name, "codes": kind, **measure(model, images, drawn, book)}
            print(f"{name}, {kind}: {row['psnr']:.2f} dB, {row['exact']:.1%} exact")
            with (out / "metrics.jsonl").open("a") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
