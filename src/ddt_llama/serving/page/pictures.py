"""Pictures in the page: how they are sent to it, shown large, coloured, and those to begin with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio
import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.data.images import save_png, to_pil
from ddt_llama.shapes.prompts import edit_suite, question_suite
from ddt_llama.shapes.render import render

LARGE = 384  # pixels of a side that is shown, at least, in whole multiples of the picture's own
GAIN = 3.0  # of differences, so that small ones are seen
SEED = 7  # of the pictures to begin with
MARK = torch.tensor([1.0, -0.75, -0.2])  # colour of a difference
Examples = list[tuple[str, str]]  # a file, and what is said about it


class Picture(gradio.Image):
    """A picture that people send; it comes as a file that nobody has opened yet."""

    def preprocess(self, payload: Any) -> Path | None:
        """Return the file; Gradio's own way would have Pillow open it in this process."""
        return None if payload is None or not payload.path else Path(payload.path)


def sent(label: str, value: str | None = None, **more: Any) -> Picture:
    """Lay out a place for a picture that people send."""
    return Picture(
        value,
        label=label,
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=more.pop("height", 320),
        **more,
    )


def shown(label: str, **more: Any) -> gradio.Image:
    """Lay out a place for a picture that is made here."""
    more = {"height": 320, "buttons": ["download", "fullscreen"], **more}
    return gradio.Image(label=label, format="png", interactive=False, **more)


def large(image: Float[Tensor, "3 h w"]) -> PIL.Image.Image:
    """Return a picture in [-1, 1] with every pixel a square of several."""
    (small,) = to_pil(image[None])
    return small.resize((small.width * factor(image), small.height * factor(image)), 0)


def factor(image: Float[Tensor, "3 h w"]) -> int:
    """Return how many times `large` is larger."""
    return max(1, -(-LARGE // image.shape[-1]))


def difference(
    image: Float[Tensor, "*b 3 h w"], other: Float[Tensor, "*b 3 h w"]
) -> Float[Tensor, "*b h w"]:
    """Return how far apart the pixels of two pictures are: 0 to 1, the mean of three colours."""
    return (image - other).abs().mean(-3) / 2


def marked(image: Float[Tensor, "3 h w"], amount: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """Return a picture in faint grey, coloured where `amount` (0 to 1) is more than nothing."""
    faint = (0.45 * image.mean(0, keepdim=True) + 0.45).expand(3, -1, -1)
    share = (amount * GAIN).clamp(0, 1).sqrt()[None]
    return faint * (1 - share) + MARK[:, None, None] * share


def owners(
    amounts: Float[Tensor, "g h w"],
) -> tuple[Int[Tensor, "h w"], Float[Tensor, "3 h w"]]:
    """Return for each pixel which of g changes matters most to it, and a map of that.

    Red is the first of the changes, violet the last; what hardly anything changes is dark.
    """
    strongest, owner = amounts.max(0)
    hues = owner.float() / max(1, len(amounts) - 1) * 0.8 * 6
    offsets = torch.tensor([5.0, 3.0, 1.0])[:, None, None]
    ramp = (hues[None] + offsets) % 6
    colours = 1 - torch.minimum(ramp, 4 - ramp).clamp(0, 1)
    light = (strongest * GAIN).clamp(0, 1).sqrt()[None]
    return owner, colours * light * 2 - 1


def edit_examples(folder: Path, size: int, count: int) -> Examples:
    """Write pictures of the shapes world into a folder; return them with what to change."""
    suite = edit_suite(count, SEED)
    return _examples(
        folder,
        "edit",
        render([one.source for one in suite], size),
        [one.instruction for one in suite],
    )


def question_examples(folder: Path, size: int, count: int) -> Examples:
    """Write pictures of the shapes world into a folder; return them with what to ask."""
    suite = question_suite(count, SEED)
    return _examples(
        folder,
        "ask",
        render([scene for scene, _ in suite], size),
        [one.question for _, one in suite],
    )


def _examples(folder: Path, name: str, images: Tensor, words: Sequence[str]) -> Examples:
    places = [folder / f"{name}-{number}.png" for number in range(1, len(words) + 1)]
    for image, place in zip(images, places, strict=True):
        save_png(image, place)
    return [(str(place), text) for place, text in zip(places, words, strict=True)]
