"""Pictures for pages: sheets of many, and data URIs so that a page needs no other file."""

import base64
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ddt_llama.config import UserError

GAP = 2
MAT = (128, 128, 128)  # between pictures; a grey that neither a white nor a dark scene blends into


def sheet(images: Sequence[Image.Image], columns: int, *, scale: int = 1) -> Image.Image:
    """Lay pictures on a grid of `columns`, row by row, in cells of the largest width and height.

    `scale` enlarges each pixel to a square of that side. Raises UserError where there is nothing to
    lay or no column to lay it in.
    """
    if not images:
        raise UserError("a sheet of 0 pictures was asked for; give at least 1")
    if columns < 1 or scale < 1:
        raise UserError(f"a sheet needs columns and scale of 1 or more, got {columns} and {scale}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images) * scale
    height = max(image.height for image in images) * scale
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    canvas = Image.new("RGB", size, MAT)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        big = image.convert("RGB").resize(
            (image.width * scale, image.height * scale), Image.Resampling.NEAREST
        )
        canvas.paste(big, (column * (width + GAP), row * (height + GAP)))
    return canvas


def data_uri(path: Path) -> str:
    """Return a picture file as a `data:` address, its bytes unchanged."""
    kind = mimetypes.guess_type(path.name)[0]
    if kind is None or not kind.startswith("image/"):
        raise UserError(f"{path}: not a picture by its name; allowed are .png, .jpg, .gif, .webp")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it again") from None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
