"""Harmed pictures for the opener of uploads, for as long as one likes: nothing but yes or no.

Takes pictures of every format and mode, changes, cuts, doubles and splices their bytes, and opens
what comes of it as `ddt serve` does. Ends with 1 and keeps the bytes where anything but a picture
or a refusal came back, or where that took longer than a second.

    python scripts/fuzz_images.py --minutes 10
"""

import io
import random
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import tyro

from ddt_llama.serving.opener import OPENED, REFUSED, opened

SIZE, MAX_PIXELS, SLOWEST = 64, 1_000_000, 1.0
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("L", "RGB"),  # not allowed
    "ICO": ("RGBA",),  # not allowed
}


def begun() -> list[bytes]:
    """Return good pictures, plain and of odd kinds."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 33, 3), dtype=np.uint8)
    noise[:20] = 90
    picture, found = PIL.Image.fromarray(noise), []
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for kind, modes in MODES.items():
        for mode in modes:
            own = PIL.Image.new("I;16", (33, 40), 999) if mode == "I;16" else picture.convert(mode)
            moving = {"save_all": True, "append_images": [own] * 2}
            for more in ({}, {"exif": exif}, moving if kind in ("PNG", "GIF", "WEBP") else {}):
                content = io.BytesIO()
                own.save(content, format=kind, **more)
                found.append(content.getvalue())
    content = io.BytesIO()
    picture.save(content, format="JPEG", progressive=True, icc_profile=b"profile" * 9)
    return [*dict.fromkeys([*found, content.getvalue()])]


def harmed(chance: random.Random, pictures: list[bytes]) -> bytes:
    """Return one of the pictures with something done to it."""
    data = bytearray(chance.choice(pictures))
    for _ in range(chance.choice((1, 1, 2, 4, 16, 64))):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 2, 4, 32))
        near = chance.random() < 0.5
        place = min(place, chance.randrange(120)) if near else place  # headers
        kind = chance.randrange(6)
        if kind == 0:
            data[place : place + length] = chance.randbytes(length)
        elif kind == 1:
            data[place : place + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + 16 * length]
        elif kind == 4 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        else:
            other = chance.choice(pictures)
            start = chance.randrange(len(other))
            data[place : place + length] = other[start : start + 8 * length]
        if not data:
            break
    if chance.random() < 0.2:
        del data[chance.randrange(len(data) + 1) :]
    return bytes(data)


def main(minutes: float = 10.0, seed: int = 0, keep: Path = Path("harmed.bin")) -> int:
    """Open harmed pictures for some minutes; the seed decides which."""
    warnings.simplefilter("ignore")  # as the processes of the server do
    pictures, chance, told = begun(), random.Random(seed), Counter[str]()
    assert sum(opened(one, SIZE, MAX_PIXELS)[:1] == OPENED for one in pictures) > 30
    end, slowest = time.monotonic() + 60 * minutes, 0.0
    while time.monotonic() < end:
        data = harmed(chance, pictures)
        keep.write_bytes(data)  # what ends this process is there afterwards
        start = time.process_time()
        try:
            answer = opened(data, SIZE, MAX_PIXELS)
        except BaseException as error:
            print(f"raised {type(error).__name__}: {error}; the bytes are in {keep}")
            return 1
        seconds = time.process_time() - start
        slowest = max(slowest, seconds)
        whole = answer[:1] == OPENED and len(answer) == 1 + 3 * SIZE * SIZE
        if seconds > SLOWEST or not (whole or answer[:1] == REFUSED):
            print(f"{seconds:.2f} s, {answer[:80]!r}; the bytes are in {keep}")
            return 1
        told["opened" if whole else answer[1:].decode().partition(" (")[0].partition(":")[0]] += 1
    keep.unlink()
    print(f"{told.total()} pictures, none took longer than {slowest:.3f} s; {told.most_common()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
