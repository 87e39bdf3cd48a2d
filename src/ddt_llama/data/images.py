"""Turn picture files into tensors and back, refusing what is broken, huge or tiny.

First stage of the pipeline and the only decoder of pictures in the project: every source, command
and benchmark reads through `open_image`, so that all of them see the same pixels. Pillow stays at
this edge; inside, images are float32 `b 3 h w` in [-1, 1].
"""

import io
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ddt_llama.config import UserError, replace_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# Below Pillow's own bound (89 M), so that ours is the one that speaks. A phone's 50 M photo passes.
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024
MIN_SIDE = 16
FILTER = PIL.Image.Resampling.LANCZOS
# A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as this many pixels per output pixel remain;
# against decoding in full, the difference is below one grey level on average.
JPEG_REDUCTION_GAP = 4

# What Pillow raises for broken pictures; the last two for odd tags of good ones.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    EOFError,
    TypeError,
    AttributeError,
)

Fit = Literal["crop", "pad"]


class BrokenImage(UserError):
    """Say which picture cannot be used, and why (`key`, `reason`)."""

    def __init__(self, key: str, reason: str) -> None:
        """Keep both parts, so that a source can list them."""
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


def open_image(
    source: str | Path | bytes,
    size: int,
    *,
    fit: Fit = "crop",
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Float[Tensor, "3 h w"]:
    """Read one picture as a square of `size` pixels in [-1, 1].

    PNG, JPEG, WebP, GIF and BMP, recognised by content, not by name; of an animation the first
    frame. Transparency is laid over white, 16-bit grey is scaled to 8 bits, the EXIF orientation is
    applied, colour profiles are ignored. The shorter side is resized to `size` by Pillow's Lanczos
    (antialiased, in 8 bits) and the centre cut out; with `fit="pad"` the longer side is resized and
    the rest is white. Raises BrokenImage with the reason.
    """
    return from_bytes8(decode(source, size, fit=fit, min_side=min_side, max_pixels=max_pixels))


def decode(
    source: str | Path | bytes,
    size: int,
    *,
    name: str | None = None,
    fit: Fit = "crop",
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "3 h w"]:
    """Read one picture like `open_image`, as 8-bit values; `name` is its name in errors."""
    if not 1 <= size <= 4096:
        raise UserError(f"image size: given {size}, allowed 1 to 4096 pixels")
    name = name or ("image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else _read_file(Path(source), name)
    image = _open(data, name, max_pixels)
    if min(image.size) < min_side:
        raise BrokenImage(name, f"too small: {_by(image.size)}, at least {min_side} on each side")
    if image.format == "JPEG":
        gap = size * JPEG_REDUCTION_GAP
        # `draft` keeps the shorter side at least this long; padding looks at the longer one.
        kept = gap if fit == "crop" else -(-gap * min(image.size) // max(image.size))
        image.draft(None, (kept, kept))
    # A process-wide switch that some libraries turn on; it would fill what is missing with grey.
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
        PIL.ImageOps.exif_transpose(image, in_place=True)
        image = _to_rgb(image)
    except DAMAGE as error:
        raise BrokenImage(name, f"cannot be decoded, perhaps cut short ({_line(error)})") from error
    return np.array(_fitted(image, size, fit)).transpose(2, 0, 1).copy()


def from_bytes8(pixels: UInt8[np.ndarray, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Map 0..255 to [-1, 1]."""
    return torch.from_numpy(pixels).float().div_(127.5).sub_(1.0)


def to_bytes8(images: Float[Tensor, "*b 3 h w"]) -> UInt8[np.ndarray, "*b 3 h w"]:
    """Map [-1, 1] to 0..255, rounded; values outside are clipped. Inverse of `from_bytes8`."""
    scaled = images.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).cpu().numpy()


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[PIL.Image.Image]:
    """Return Pillow images for a batch in [-1, 1]."""
    return [
        PIL.Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        for picture in to_bytes8(images)
    ]


def save_png(images: Float[Tensor, "3 h w"] | PIL.Image.Image, path: str | Path) -> Path:
    """Write one picture in [-1, 1] as a PNG, whole or not at all.

    Raises UserError where the place cannot be written.
    """
    picture = images if isinstance(images, PIL.Image.Image) else to_pil(images[None])[0]
    content = io.BytesIO()
    picture.save(content, format="PNG")
    replace_file(path, content.getvalue())
    return Path(path)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Keep the paths that are named like a picture, in order."""
    return [path for path in paths if path.suffix.lower() in SUFFIXES]


def _read_file(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():
            raise BrokenImage(name, "no such file" if not path.exists() else "not a file")
        if path.stat().st_size > MAX_BYTES:
            raise BrokenImage(name, f"larger than {MAX_BYTES >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise BrokenImage(name, f"cannot be read ({error.strerror})") from error


def _open(data: bytes, name: str, max_pixels: int) -> PIL.Image.Image:
    """Read the header alone and refuse by it."""
    if not data:
        raise BrokenImage(name, "empty file")
    bomb = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except bomb as error:
        raise BrokenImage(name, f"too large, at most {max_pixels} pixels") from error
    except PIL.UnidentifiedImageError as error:
        raise BrokenImage(name, f"not a picture (allowed: {', '.join(FORMATS)})") from error
    except DAMAGE as error:
        raise BrokenImage(name, f"broken header ({_line(error)})") from error
    if image.width * image.height > max_pixels:
        raise BrokenImage(name, f"too large: {_by(image.size)}, at most {max_pixels} pixels")
    return image


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):
        image = _grey16_to_grey8(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _grey16_to_grey8(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion would clip instead."""
    values = np.asarray(image).astype(np.int64)
    grey = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(PIL.Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _fitted(image: PIL.Image.Image, size: int, fit: Fit) -> PIL.Image.Image:
    width, height = image.size
    if fit == "pad":
        scale = size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        page = PIL.Image.new("RGB", (size, size), "white")
        small = image if image.size == inner else image.resize(inner, FILTER)
        page.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return page
    if (width, height) == (size, size):
        return image
    # Resizing the centre square alone equals resizing all and cropping, without resampling the
    # rest of a long strip. An odd remainder gives half-pixel offsets, which `box` takes exactly.
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), FILTER, box=(left, top, left + side, top + side))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
