"""What do the same bits buy elsewhere? A tokenizer beside a palette image and a JPEG.

PSNR on a validation split, against the images, of a trained tokenizer (and on as many pictures that
it was trained on, to see what it learned by heart); of the best JPEG whose scan fits into as many
bits (headers and tables are not counted, so it is favoured; it may be made smaller first); of the
best palette image of as many bits, palette included; and of a 16-colour palette image at full size,
with the bits that it takes. Writes metrics.json and sheet.png.

    python scripts/codec_study.py RUN ../shared/data/emoji64 --out experiments/0002-emoji
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from ddt_llama.config import save_json
from ddt_llama.data.images import save_png, to_pil
from ddt_llama.data.samples import Sample
from ddt_llama.data.sources import ImageSource, open_source
from ddt_llama.generation.release import load
from ddt_llama.reports.pictures import sheet
from ddt_llama.tokenizer import Tokenizer

SIDES = (64, 56, 48, 40, 32, 24, 20, 16, 12, 10, 8, 6, 4)
COLOURS = (2, 4, 8, 16)


def scan_bits(data: bytes) -> int:
    """Return the bits behind the last header of a baseline JPEG."""
    start = data.index(b"\xff\xda")
    return 8 * (len(data) - start - 2 - int.from_bytes(data[start + 2 : start + 4]) - 2)


def smaller(image: Image.Image, side: int) -> Image.Image:
    """Scale a square picture down."""
    return image if side == image.width else image.resize((side, side), Image.Resampling.LANCZOS)


def back(image: Image.Image, side: int) -> Image.Image:
    """Scale a square picture up again, in full colour."""
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def quality(made: Image.Image, image: Image.Image) -> float:
    """Return the PSNR in dB."""
    error = np.asarray(made, dtype=np.float64) - np.asarray(image, dtype=np.float64)
    return 10 * math.log10(255**2 / max(1e-9, float((error**2).mean())))


def best_jpeg(image: Image.Image, bits: int) -> Image.Image:
    """Return the best JPEG over sizes and qualities that fits."""
    found = [back(smaller(image, 1), image.width)]
    for side in SIDES:
        low, high = 1, 95
        while low <= high:  # the largest quality that fits
            middle = (low + high) // 2
            buffer = io.BytesIO()
            smaller(image, side).save(buffer, "JPEG", quality=middle, optimize=False)
            if scan_bits(buffer.getvalue()) <= bits:
                found.append(back(Image.open(buffer), image.width))
                low = middle + 1
            else:
                high = middle - 1
    return max(found, key=lambda made: quality(made, image))


def best_palette(image: Image.Image, bits: int) -> Image.Image:
    """Return the best palette image over sizes and numbers of colours that fits."""
    found = [back(smaller(image, 1), image.width)]
    for side in SIDES:
        for count in COLOURS:
            if 24 * count + side * side * math.log2(count) <= bits:
                found.append(back(smaller(image, side).quantize(count), image.width))
    return max(found, key=lambda made: quality(made, image))


def rebuilt(
    tokenizer: Tokenizer, source: ImageSource[Sample], indices: Sequence[int], steps: int
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return rows of a source, and what their codes give."""
    images = torch.stack([sample.image for sample in source.batch(indices)])
    return to_pil(images), to_pil(tokenizer.decode(tokenizer.encode(images), steps=steps))


def main(
    run: Annotated[Path, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    out: Path,
    split: str = "val",
    steps: int = 1,
    shown: int = 12,
) -> None:
    """Measure every picture of the split."""
    tokenizer = load(run).tokenizer
    size = tokenizer.image_size
    bits = int(tokenizer.num_tokens * math.log2(tokenizer.codebook_size))
    source = open_source(data, image_size=size, split=split, kind="image")
    seen = open_source(data, image_size=size, split="train", kind="image")
    rows: dict[str, list[Image.Image]] = {"tokens": [], "jpeg": [], "palette": [], "palette16": []}
    originals: list[Image.Image] = []
    learned: list[float] = []
    count = len(source)
    for start in tqdm(range(0, count, 32), desc="pictures", unit_scale=32):
        indices = range(start, min(count, start + 32))
        part, made = rebuilt(tokenizer, source, indices, steps)
        originals += part
        rows["tokens"] += made
        # As many rows of the training split, spread over all of it.
        spread = [index * len(seen) // count for index in indices]
        learned += map(quality, *reversed(rebuilt(tokenizer, seen, spread, steps)))
        rows["jpeg"] += [best_jpeg(image, bits) for image in part]
        rows["palette"] += [best_palette(image, bits) for image in part]
        rows["palette16"] += [back(image.quantize(16), size) for image in part]
    figures: dict[str, float] = {"pictures": len(originals), "bits": bits}
    figures["palette16.bits"] = 16 * 24 + 4 * size * size
    measured = {
        name: [quality(one, image) for one, image in zip(made, originals, strict=True)]
        for name, made in rows.items()
    }
    for name, values in {**measured, "tokens.seen": learned}.items():
        deviation = float(np.std(values, ddof=1) / len(values) ** 0.5)
        figures[f"psnr.{name}"] = float(np.mean(values))
        figures[f"psnr.{name}.low"] = figures[f"psnr.{name}"] - 1.96 * deviation
        figures[f"psnr.{name}.high"] = figures[f"psnr.{name}"] + 1.96 * deviation
        print(f"{name:10} {figures[f'psnr.{name}']:.2f} dB")
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "metrics.json", figures)
    step = max(1, len(originals) // shown)
    shown_rows = [originals, *rows.values()]
    save_png(
        sheet([one for row in shown_rows for one in row[::step][:shown]], shown), out / "sheet.png"
    )


if __name__ == "__main__":
    tyro.cli(main)
