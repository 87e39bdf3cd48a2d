"""The tab Draw: words to pictures, which form while their tokens arrive."""

from collections.abc import AsyncIterator
from typing import Any

import gradio
import PIL.Image
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.serving.jobs import Preview
from ddt_llama.serving.page.asking import drawing, followed, told
from ddt_llama.serving.served import Served

EXAMPLES = (
    "a red circle above a blue square",
    "two green stars",
    "a large yellow triangle on a black background",
    "a purple ring to the left of a white heart",
)
MOST = 8  # pictures at once
PREVIEWS = 7  # of each picture while it is written

Shown = list[tuple[PIL.Image.Image, str]]


def tab(served: Served) -> gradio.Gallery:
    """Lay the tab out; return the gallery of what was drawn."""
    settings = served.model.settings
    gradio.Markdown("Say what to draw. The same words, seed and guidance draw the same picture.")
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            prompt = gradio.Textbox(
                EXAMPLES[0], label="Prompt", max_length=served.limits.max_prompt, lines=1
            )
            with gradio.Row():
                seed = gradio.Number(1, label="Seed", precision=0, minimum=0, min_width=100)
                count = gradio.Slider(1, MOST, 4, step=1, label="Pictures", min_width=140)
            guidance = gradio.Slider(
                0,
                max(8.0, settings.guidance_scale),
                settings.guidance_scale,
                step=0.1,
                label="Guidance",
                info="1: the plain model; more follows the words more closely",
            )
            with gradio.Row():
                go = gradio.Button("Draw", variant="primary", min_width=100)
                again = gradio.Button("Another seed", min_width=100)
        with gradio.Column(scale=3, min_width=280):
            gallery = gradio.Gallery(
                label="Drawn", format="png", columns=4, object_fit="contain", elem_id="drawn"
            )
            status = gradio.Markdown("", elem_id="draw-status")
    gradio.Examples([[one] for one in EXAMPLES], [prompt], label="Try")

    async def run(*given: Any) -> AsyncIterator[tuple[Shown, str]]:
        with told():
            async for shown in drawn(served, *given):
                yield shown

    asked = {"fn": run, "inputs": [prompt, seed, guidance, count], "outputs": [gallery, status]}
    gradio.on([go.click, prompt.submit], **asked, show_progress="hidden")
    again.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)").then(
        **asked, show_progress="hidden"
    )
    return gallery


async def drawn(
    served: Served, prompt: str, seed: int | None, guidance: float, count: int
) -> AsyncIterator[tuple[Shown, str]]:
    """Draw; give what there is of the pictures each time that there is more."""
    first, options = drawing(served, prompt=prompt, seed=seed, guidance_scale=guidance, n=count)
    size = served.model.tokenizer.image_size
    pictures = [PIL.Image.new("RGB", (size, size), (128, 128, 128))] * count
    labels = [f"seed {first + place}" for place in range(count)]
    yield list(zip(pictures, labels, strict=True)), "Reading and planning ..."
    program = served.model.programs.draw(prompt, count, first, options)
    tokens = served.model.tokenizer.num_tokens
    async for made in followed(served, program, PREVIEWS):
        if isinstance(made, Preview):
            (pictures[made.place],) = to_pil(made.image[None])
            written = tokens * (made.index + 1) // (PREVIEWS + 1)
            yield list(zip(pictures, labels, strict=True)), f"{written} of {tokens} tokens written"
        else:
            assert isinstance(made, Tensor)
            yield list(zip(to_pil(made), labels, strict=True)), "Done."
