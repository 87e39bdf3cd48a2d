"""The tab Draw: words to pictures, which form while their tokens arrive."""

from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import gradio
import PIL.Image
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.serving.jobs import Preview
from ddt_llama.serving.page.asking import (
    NOTHING,
    STOPPED,
    Ending,
    Stop,
    checked,
    drawing,
    followed,
    mistake,
    running,
    told,
)
from ddt_llama.serving.page.pictures import Files, tries
from ddt_llama.serving.served import Served
from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SHAPES

EXAMPLES = (
    "a red circle above a blue square",
    "two green stars",
    "a large yellow triangle on a black background",
    "a purple ring to the left of a yellow cross",
)
KNOWN = (
    f"The bundled model knows nothing but {', '.join(SHAPES)}, small and large, in "
    f"{', '.join(name for name, _ in COLOURS)}, on "
    f"{', '.join(name for name, _ in BACKGROUNDS[:-1])} or {BACKGROUNDS[-1][0]}."
)
WAYS = {"edit": "Edit it", "ask": "Ask about it", "inside": "Look inside"}
EMPTY = "Press Draw, and pictures form here while their tokens arrive."
GREY = (128, 128, 128)
MOST = 8  # pictures at once
AGAIN = "again"  # id of the button that draws with another seed
PREVIEWS = 7  # of each picture while it is written

Shown = list[tuple[str, str]]


class Drawn:
    """The tab of one server, and what was drawn in it."""

    def __init__(self, served: Served, files: Files) -> None:
        """Lay it out."""
        self.served, self.files = served, files
        gradio.Markdown("Say what to draw. Same words, seed and guidance, same picture.")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=240, elem_id="words"):
                prompt = gradio.Textbox(
                    EXAMPLES[0],
                    label="Prompt",
                    info=KNOWN if served.model.name == "nano" else None,
                    max_length=served.limits.max_prompt,
                    lines=1,
                )
                with gradio.Row():
                    go = gradio.Button("Draw", variant="primary", size="md", min_width=80)
                    again = gradio.Button("New seed", size="md", elem_id=AGAIN, min_width=80)
                    self.stop = Stop()
                with gradio.Column(elem_id="more"):
                    tries([[one] for one in EXAMPLES], [prompt])
                    seed, guidance, count = self._settings()
            with gradio.Column(scale=3, min_width=240, elem_id="drawing"):
                self.gallery = gradio.Gallery(
                    show_label=False,
                    format="png",
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],  # none shares elsewhere
                    elem_id="drawn",
                )
                status = gradio.Markdown(EMPTY, elem_id="draw-status")
                self.chosen = gradio.State(0)
                with gradio.Row():
                    self.ways = {
                        name: gradio.Button(label, size="sm", min_width=90)
                        for name, label in WAYS.items()
                    }
        self.gallery.select(_place, None, self.chosen, show_progress="hidden")
        drawing = gradio.on(
            [go.click, again.click, prompt.submit],
            self.run,
            [prompt, seed, guidance, count],
            [self.gallery, status, seed, self.stop.button],
            show_progress="hidden",
        )
        self.stop.ends(drawing)

    def _settings(self) -> tuple[gradio.Number, gradio.Slider, gradio.Slider]:
        own = self.served.model.settings.guidance_scale
        with gradio.Row():
            seed = gradio.Number(1, label="Seed", precision=0, minimum=0, min_width=80)
            count = gradio.Slider(1, MOST, 4, step=1, precision=0, label="Pictures", min_width=120)
        guidance = gradio.Slider(
            0,
            max(8.0, own),
            own,
            step=0.1,
            label="Guidance",
            info="1: the plain model; more follows the words more closely",
        )
        return seed, guidance, count

    async def run(
        self,
        event: gradio.EventData,
        visitor: gradio.Request,
        prompt: str,
        seed: int | None,
        guidance: float,
        count: int,
    ) -> AsyncIterator[tuple[Any, str, Any, gradio.Button]]:
        """Draw, and show it."""
        if event.target is not None and event.target.elem_id == AGAIN:
            seed = None
        ending = self.stop.begin(visitor)
        asked = drawn(self.served, self.files, prompt, seed, guidance, count, ending)
        with told():
            try:
                async for shown in asked:
                    yield *shown, running()
            except CancelledError:
                yield gradio.skip(), STOPPED, gradio.skip(), running()

    def lead_to(self, tabs: gradio.Tabs, places: Mapping[str, gradio.Image]) -> None:
        """Let the chosen picture be taken to the other tabs."""

        def taken(gallery: Sequence[tuple[str, str]] | None, place: int, name: str) -> Any:
            if not gallery:
                raise mistake("Draw a picture first.", NOTHING)
            return gallery[min(place, len(gallery) - 1)][0], gradio.Tabs(selected=name)

        for name, button in self.ways.items():
            button.click(
                partial(taken, name=name),
                [self.gallery, self.chosen],
                [places[name], tabs],
                show_progress="hidden",
            )


def _place(event: gradio.SelectData) -> int:
    return int(event.index)


async def drawn(
    served: Served,
    files: Files,
    prompt: str,
    seed: int | None,
    guidance: float,
    count: int,
    ending: Ending,
) -> AsyncIterator[tuple[Shown, str, int]]:
    """Draw; give what there is of the pictures each time that there is more, and the first seed."""
    checked(served, prompt, "what to draw")
    first, options = drawing(served, prompt=prompt, seed=seed, guidance_scale=guidance, n=count)
    size = served.model.tokenizer.image_size
    pictures = [files.kept(PIL.Image.new("RGB", (size, size), GREY))] * count
    labels = [f"seed {first + place}" for place in range(count)]
    yield list(zip(pictures, labels, strict=True)), "Reading and planning ...", first
    program = served.model.programs.draw(prompt, count, first, options)
    tokens = served.model.tokenizer.num_tokens
    async for made in followed(served, program, PREVIEWS, ending):
        if isinstance(made, Preview):
            pictures[made.place] = files.kept(to_pil(made.image[None])[0])
            written = tokens * (made.index + 1) // (PREVIEWS + 1)
            status = f"{written} of {tokens} tokens written"
        else:
            assert isinstance(made, Tensor)
            pictures = [files.kept(picture) for picture in to_pil(made)]
            status = "Done."
        yield list(zip(pictures, labels, strict=True)), status, first
