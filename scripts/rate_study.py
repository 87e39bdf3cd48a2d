"""What does it cost a picture, and save a language model, to take the commoner of two near codes?

For each rate of the quantizer (`QuantizerConfig.rate`): PSNR and exact scenes at one decoding step,
the share of codes in use, their entropy (where a token stands for a patch that of empty patches and
of all others, too), and the share of the codes that the precision of the encoder decides (bfloat16
instead of float32), on held-out scenes. Backgrounds alone account for log 4 = 1.39 nats of an empty
patch. With `--pictures` PSNR and entropy of the validation split of real ones, too.

    python scripts/rate_study.py nano --out DIR --scenes 1024 --decoded 256
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from ddt_llama.data.sources import open_source
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.pictures import SourcePictures
from ddt_llama.generation.release import load
from ddt_llama.shapes.render import render
from ddt_llama.shapes.verify import matches, read
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer

SEED = 1_000_003  # of the scenes shown in training, on which nothing is trained
BATCH = 64


def entropy(codes: torch.Tensor, size: int) -> float:
    """Return the entropy of codes drawn alike, in nats."""
    share = torch.bincount(codes, minlength=size).double() / len(codes)
    return -float((share * share.clamp_min(1e-30).log()).sum())


@torch.no_grad()
def main(
    tokenizer: Annotated[str, tyro.conf.Positional],
    out: Path,
    rates: tuple[float, ...] = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02),
    scenes: int = 2048,
    decoded: int = 512,
    pictures: str | None = None,
) -> None:
    """Measure every rate and write rates.json; the first scenes and pictures are decoded."""
    model = load(tokenizer).tokenizer
    assert isinstance(model, TimestepTokenizer)
    source = ShapesSource(SEED, split="heldout")
    shown = [source.scene(index) for index in range(scenes)]
    images = render(shown, model.image_size)
    patches = model.to_patches(images).unflatten(-1, (-1, 3))
    # A token of the language order may stand for a patch; an empty patch has one colour all over.
    empty = (patches.std(2).amax(-1) < 1e-4).flatten()
    real = None
    if pictures is not None:
        source = open_source(pictures, image_size=model.image_size, split="val")
        real = SourcePictures(source, model.image_size, decoded).images(0, decoded)
    rows = []
    for rate in tqdm(rates):
        model.quantizer.config = replace(model.quantizer.config, rate=rate)
        codes = torch.cat([model.encode(part) for part in images.split(BATCH)])
        with torch.autocast("cpu", torch.bfloat16):
            rough = torch.cat([model.encode(part) for part in images.split(BATCH)])
        words = model.to_language(codes).flatten()
        made = torch.cat(
            [model.decode(part, steps=1).float() for part in codes[:decoded].split(BATCH)]
        )
        pairs = zip(read(made), shown[:decoded], strict=True)
        row = {
            "rate": rate,
            "psnr": float(psnr(made, images[:decoded]).mean()),
            "exact": sum(matches(found, scene) for found, scene in pairs) / decoded,
            "used": len(codes.unique()) / model.codebook_size,
            "nats": entropy(words, model.codebook_size),
            "changed.bf16": float((rough != codes).float().mean()),
        }
        if len(empty) == len(words):
            row["nats.empty"] = entropy(words[empty], model.codebook_size)
            row["nats.other"] = entropy(words[~empty], model.codebook_size)
        if real is not None:
            found = torch.cat([model.encode(part) for part in real.split(BATCH)])
            made = torch.cat([model.decode(part, steps=1).float() for part in found.split(BATCH)])
            row["pictures.psnr"] = float(psnr(made, real).mean())
            row["pictures.nats"] = entropy(found.flatten(), model.codebook_size)
        rows.append(row)
        print(row)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rates.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
