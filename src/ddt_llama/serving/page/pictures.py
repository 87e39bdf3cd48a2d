"""Pictures in the page: how they are sent to it, shown large, coloured, and those to begin with."""

import hashlib
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio
import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddt_llama.config import replace_file
from ddt_llama.data.images import to_pil
from ddt_llama.shapes.prompts import edit_suite, question_suite
from ddt_llama.shapes.render import render

EXAMPLES = 5
LARGE = 384  # pixels of a side that is shown, at least, in whole multiples of the picture's own
GAIN = 3.0  # of differences, so that small ones are seen
SEED = 7  # of the pictures to begin with
MARK = torch.tensor([1.0, -0.75, -0.2])  # colour of a difference
Examples = list[tuple[str, str]]  # a file, and what is said about it


class Files:
    """The folder of the page's pictures: those to begin with, sent and made."""

    def __init__(self, folder: Path, size: int) -> None:
        """Write the pictures to begin with, of `size` pixels a side, into the folder."""
        self.folder = folder
        edits = edit_suite(EXAMPLES, SEED)
        self.edits = self._examples(
            render([one.source for one in edits], size), [one.instruction for one in edits]
        )
        questions = question_suite(EXAMPLES, SEED)
        self.questions = self._examples(
            render([scene for scene, _ in questions], size), [one.question for _, one in questions]
        )
        self._first = set(folder.rglob("*"))

    def kept(self, picture: PIL.Image.Image) -> str:
        """Write a picture, unless it is there, and return where.

        Gradio would write it again each time, also while a browser is reading it.
        """
        content = io.BytesIO()
        picture.save(content, format="PNG")
        name = hashlib.blake2b(content.getvalue(), digest_size=16).hexdigest()
        place = self.folder / f"{name}.png"
        if not place.exists():
            replace_file(place, content.getvalue())
        return str(place)

    def size(self) -> int:
        """Return how many bytes lie in the folder."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def forget(self, seconds: float) -> None:
        """Remove what was sent and made longer ago than so many seconds."""
        now = time.time()
        for file in set(self.folder.rglob("*")) - self._first:
            if file.is_file() and now - file.stat().st_mtime > seconds:
                file.unlink()

    def _examples(self, images: Tensor, words: Sequence[str]) -> Examples:
        places = [self.kept(picture) for picture in to_pil(images)]
        return list(zip(places, words, strict=True))


def place_of(label: str, value: str | None = None, **more: Any) -> gradio.Image:
    """Lay out a place for a picture that people send; it is given on as a file, unopened."""
    more = {"height": 320, **more}
    place = gradio.Image(
        value,
        label=label,
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        **more,
    )
    # Gradio's own has Pillow open it in this process. Functions may set the place's value, but not
    # update it (not even by gradio.skip()): Gradio would make it anew, with its own.
    place.preprocess = _unopened
    return place


def _unopened(payload: Any) -> str | None:
    return None if payload is None else payload.path


def tries(samples: Sequence[Sequence[str]], places: Sequence[Any]) -> None:
    """Lay out what can be tried: chosen, a sample fills the places.

    Gradio's Examples fill them by an address that goes around its queue, which is not there.
    """
    offered = gradio.Dataset(
        components=list(places),
        samples=[list(one) for one in samples],
        type="index",
        label="Try",
    )

    def chosen(place: int) -> Any:
        return samples[place] if len(places) > 1 else samples[place][0]

    offered.click(chosen, offered, list(places), show_progress="hidden")


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
