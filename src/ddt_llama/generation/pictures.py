"""Images as a user gives them, made into the one tensor that the tokenizer reads."""

import io
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.images import open_image

ImageInput = str | Path | bytes | PIL.Image.Image | Tensor
# Right and down, in pixels, of the views of a picture; the first is the picture itself.
SHIFTS = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


def read_images(images: ImageInput | Sequence[ImageInput], size: int) -> Float[Tensor, "b 3 h w"]:
    """Return a batch in [-1, 1] of `size` pixels a side.

    Files, bytes and PIL images are resized and centre-cropped; tensors (`3 h w` or `b 3 h w`) must
    have the size already. Raises UserError (BrokenImage for files).
    """
    single = isinstance(images, str | Path | bytes | PIL.Image.Image)
    if single or (isinstance(images, Tensor) and images.ndim != 4):
        images = [images]
    if len(images) == 0:
        raise UserError("no image was given; give at least one")
    if isinstance(images, Tensor):
        return _checked(images, size)
    return torch.stack([_read(image, size) for image in images])


def views(images: Float[Tensor, "b 3 h w"], count: int) -> Float[Tensor, "b_count 3 h w"]:
    """Return `count` views of each image in turn, shifted by a pixel, the edges repeated.

    To a reader they are one picture, to the tokenizer others: their codes fail in different places.
    """
    height, width = images.shape[2:]
    wider = F.pad(images, (1, 1, 1, 1), mode="replicate")
    shifted = [
        wider[:, :, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        for right, down in SHIFTS[:count]
    ]
    return torch.stack(shifted, dim=1).flatten(0, 1)


def _read(image: ImageInput, size: int) -> Tensor:
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise UserError(f"an image tensor has shape {tuple(image.shape)}; it must be (3, h, w)")
        return _checked(image[None], size)[0]
    if isinstance(image, PIL.Image.Image):
        return open_image(_png(image), size)
    if isinstance(image, str | Path | bytes):
        return open_image(image, size)
    raise UserError(
        f"an image is {type(image).__name__}; allowed are a path, bytes, a PIL image or a tensor"
    )


def _png(image: PIL.Image.Image) -> bytes:
    """Write a PIL image to bytes, so that it goes the same checked way as a file."""
    image = PIL.ImageOps.exif_transpose(image)  # PNG does not keep which side is up
    buffer = io.BytesIO()
    plain = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else None
    (plain or image.convert("RGB")).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def _checked(images: Tensor, size: int) -> Tensor:
    if tuple(images.shape[1:]) != (3, size, size):
        raise UserError(
            f"image tensors have shape {tuple(images.shape[1:])}; this model reads "
            f"(3, {size}, {size}): resize them, or give files"
        )
    images = images.detach().float()
    if not bool((images.abs() <= 1.001).all()):
        raise UserError("an image tensor has values outside [-1, 1]; scale it: x / 127.5 - 1")
    return images
