"""The tabs Edit and Ask: a picture that is sent, and words about it."""

from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import gradio
from jaxtyping import Float
from torch import Tensor

from ddt_llama.generation.work import Program
from ddt_llama.serving.page.asking import (
    STOPPED,
    Stop,
    checked,
    done,
    drawing,
    opened,
    running,
    sent,
    told,
)
from ddt_llama.serving.page.pictures import Files, large, place_of, tries
from ddt_llama.serving.served import Served

Answers = AsyncIterator[tuple[Any, gradio.Button]]
MOVE = "at => ({__type__: 'update', slider_position: at})"  # in the browser: the line, to `at` %


def edit_tab(served: Served, files: Files) -> gradio.Image:
    """Lay out the tab Edit; return the place of its picture."""
    own = served.model.settings.for_edits()
    gradio.Markdown("Give a picture and say what to change. Pull the line to compare.")
    with gradio.Row():
        with gradio.Column(min_width=240):
            picture = place_of("Picture", files.edits[1][0])
            text = gradio.Textbox(
                files.edits[1][1], label="What to change", max_length=served.limits.max_prompt
            )
            with gradio.Row():
                seed = gradio.Number(1, label="Seed", precision=0, minimum=0, min_width=80)
                guidance = gradio.Slider(
                    0,
                    max(8.0, own.guidance_scale),
                    own.guidance_scale,
                    step=0.1,
                    label="Guidance",
                    min_width=120,
                )
            with gradio.Row():
                go = gradio.Button("Edit", variant="primary", size="md", min_width=100)
                stop = Stop()
            status = gradio.Markdown("", elem_id="edit-status")
        with gradio.Column(min_width=240):
            compared = gradio.ImageSlider(
                label="Before | after",
                format="png",
                interactive=False,
                max_height=480,
                elem_id="compared",
            )
            # The line itself can be pulled by mouse and finger only.
            line = gradio.Slider(
                0,
                100,
                50,
                step=1,
                label="Place of the line, in %",
                visible=False,
                elem_id="line",
                buttons=[],
            )
            tries(files.edits, [picture, text])

    async def run(
        visitor: gradio.Request, file: str | None, text: str, seed: int | None, guidance: float
    ) -> AsyncIterator[tuple[Any, str, gradio.Button]]:
        ending = stop.begin(visitor)
        with told():
            checked(served, text, "what to change")
            chosen, options = drawing(served, prompt=text, seed=seed, guidance_scale=guidance)
            yield gradio.skip(), "Reading the picture and writing another ...", running()
            before = await opened(served, file)
            program = served.model.programs.edit(before, text, 1, chosen, options)
            try:
                (after,) = await done(served, program, ending)
            except CancelledError:
                yield gradio.skip(), STOPPED, running()
                return
            pair = files.kept(large(before)), files.kept(large(after))
            yield pair, "Done.", running()

    editing = gradio.on(
        [go.click, text.submit],
        run,
        [picture, text, seed, guidance],
        [compared, status, stop.button],
        show_progress_on=compared,
    )
    stop.ends(editing)
    editing.success(lambda: gradio.Slider(visible=True), None, line, show_progress="hidden")
    sent(served, picture)
    line.input(None, line, compared, js=MOVE)
    return picture


def ask_tab(served: Served, files: Files) -> gradio.Image:
    """Lay out the tab Ask; return the place of its picture."""
    gradio.Markdown("Give a picture and ask about it, or have it described.")
    with gradio.Row():
        with gradio.Column(min_width=240):
            picture = place_of("Picture", files.questions[1][0])
        with gradio.Column(min_width=240):
            text = gradio.Textbox(
                files.questions[1][1], label="Question", max_length=served.limits.max_prompt
            )
            with gradio.Row():
                go = gradio.Button("Ask", variant="primary", size="md", min_width=100)
                describe = gradio.Button("Describe", size="md", min_width=100)
                stop = Stop()
            answer = gradio.Textbox(label="Answer", interactive=False, elem_id="answer", lines=2)
            tries(files.questions, [picture, text])

    async def answered(
        visitor: gradio.Request,
        file: str | None,
        program: Callable[[Float[Tensor, "3 h w"]], Program[list[str]]],
    ) -> Answers:
        ending = stop.begin(visitor)
        yield gradio.skip(), running()
        image = await opened(served, file)
        try:
            (words,) = await done(served, program(image), ending)
        except CancelledError:
            words = STOPPED
        yield words, running()

    async def ask(visitor: gradio.Request, file: str | None, text: str) -> Answers:
        with told():
            checked(served, text, "what to ask")
            program = partial(served.model.programs.ask, questions=text)
            async for shown in answered(visitor, file, program):
                yield shown

    async def tell(visitor: gradio.Request, file: str | None) -> Answers:
        with told():
            async for shown in answered(visitor, file, served.model.programs.describe):
                yield shown

    places: list[Any] = [answer, stop.button]
    own: Any = {"show_progress_on": answer}
    asking = gradio.on([go.click, text.submit], ask, [picture, text], places, **own)
    stop.ends(asking, describe.click(tell, picture, places, **own))
    sent(served, picture)
    return picture
