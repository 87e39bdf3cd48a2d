"""The tab Inside: pictures from few tokens to all, tokens swapped, what each of them changes."""

from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from typing import Any

import gradio
import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.data.images import to_pil
from ddt_llama.evaluation.metrics import psnr
from ddt_llama.evaluation.reconstruction import useful_levels
from ddt_llama.serving.page import inside
from ddt_llama.serving.page.asking import Stop, done, opened, running, sent, told
from ddt_llama.serving.page.pictures import (
    Files,
    difference,
    factor,
    large,
    marked,
    owners,
    place_of,
    shown,
)
from ddt_llama.serving.served import Served

FEW = """### From few tokens to all
The decoder sees the first tokens only, the coarsest ones; the others are hidden from it."""
SWAP = """### Tokens swapped between two pictures
A range of A's tokens is replaced by those of B, at the same places."""
WHICH = """### Which token changed what
One token is hidden, and the picture is rebuilt without it. On the map each pixel has the colour of
the token that matters most to it, from red (token 1, the coarsest) to violet (the finest); what
hardly depends on any single one is dark. Click on the map to choose that token."""
QUICK: Any = {"show_progress": "hidden", "trigger_mode": "always_last"}
Owners = list[list[int]]


class InsideTab:
    """The tab of one server."""

    def __init__(self, served: Served, files: Files, tab: gradio.Tab) -> None:
        """Lay it out."""
        self.served, self.files = served, files
        self.tokens = served.model.tokenizer.num_tokens
        self.steps = served.model.settings.steps
        gradio.Markdown(
            f"Every picture is {self.tokens} tokens, numbered from 1, the coarsest, to "
            f"{self.tokens}, the finest. Upload your own, or look into these two."
        )
        with gradio.Row():
            self.a = place_of("Picture A", files.edits[1][0], min_width=150, height=220)
            b = place_of("Picture B", files.edits[3][0], min_width=150, height=220)
        self.good_a = sent(served, self.a, tab.select)
        self.good_b = sent(served, b, tab.select)
        self._few()
        self._swap()
        self._which()

    def _number(self, value: int, label: str, **more: Any) -> gradio.Slider:
        return gradio.Slider(1, self.tokens, value, step=1, precision=0, label=label, **more)

    def _few(self) -> None:
        gradio.Markdown(FEW)
        with gradio.Row():
            with gradio.Column(min_width=240):
                count = self._number(self.tokens // 2, "Tokens shown", elem_id="count")
                strip = gradio.Gallery(
                    label="A from more and more tokens",
                    format="png",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                )
            with gradio.Column(min_width=240):
                few = shown("A from these tokens", elem_id="few")
                told_of = gradio.Markdown("", elem_id="few-told")
        begun = [self.good_a.change, count.change]
        gradio.on(begun, self.few, [self.good_a, count], [few, told_of], **QUICK)
        self.good_a.change(self.strip, self.good_a, strip, **QUICK)
        strip.select(_number, None, count, show_progress="hidden")

    def _swap(self) -> None:
        gradio.Markdown(SWAP)
        with gradio.Row():
            with gradio.Column(min_width=240):
                first = self._number(1, "From token", elem_id="first")
                last = self._number(self.tokens // 2, "To token", elem_id="last")
            with gradio.Column(min_width=240), gradio.Row():
                mixed = shown("A with B's", min_width=120, height=260, elem_id="mixed")
                changed = shown("Changed", min_width=120, height=260)
        gradio.on(
            [self.good_a.change, self.good_b.change, first.change, last.change],
            self.swap,
            [self.good_a, self.good_b, first, last],
            [mixed, changed],
            **QUICK,
        )

    def _which(self) -> None:
        gradio.Markdown(WHICH)
        found = gradio.State([])
        with gradio.Row():
            with gradio.Column(min_width=240):
                with gradio.Row():
                    go = gradio.Button("Make the map", variant="primary", size="md")
                    self.stop = Stop()
                chart = shown("Map of A: which token matters most", elem_id="map")
            with gradio.Column(min_width=240):
                token = self._number(self.tokens // 2, "Token", elem_id="token")
                with gradio.Row():
                    small: Any = {"min_width": 120, "height": 260}
                    lacking = shown("A without it", elem_id="lacking", **small)
                    change = shown("Changed", elem_id="change", **small)
        places = [chart, found, self.stop.button]
        self.stop.ends(go.click(self.map, self.good_a, places, show_progress_on=chart))
        self.good_a.change(lambda: (None, []), None, [chart, found], show_progress="hidden")
        gradio.on(
            [self.good_a.change, token.change],
            self.lacking,
            [self.good_a, token],
            [lacking, change],
            **QUICK,
        )

        def choose(found: Owners, event: gradio.SelectData) -> Any:
            x, y = event.index
            return self.chosen(found, x, y)

        chart.select(choose, found, token, show_progress="hidden")

    def _kept(self, image: Float[Tensor, "3 h w"]) -> str:
        return self.files.kept(large(image))

    async def few(self, file: str | None, count: int) -> tuple[Any, str]:
        """Show A from its first `count` tokens."""
        if file is None:
            return None, ""
        with told():
            image = await opened(self.served, file)
            (made,) = await done(self.served, inside.from_first(image, [count], self.steps))
            near = float(psnr(made[None], image[None]))
            return self._kept(made), f"{count} of {self.tokens} tokens: PSNR {near:.1f} dB"

    async def strip(self, file: str | None) -> list[tuple[str, str]]:
        """Show A from more and more of its tokens."""
        if file is None:
            return []
        with told():
            image = await opened(self.served, file)
            levels = useful_levels(self.served.model.tokenizer)
            made = await done(self.served, inside.from_first(image, levels, self.steps))
            return [
                (self.files.kept(to_pil(one[None])[0]), str(count))
                for one, count in zip(made, levels, strict=True)
            ]

    async def swap(
        self, file: str | None, other: str | None, first: int, last: int
    ) -> tuple[Any, Any]:
        """Show A with some tokens of B, and what is other in A then."""
        if file is None or other is None or first > last:
            return None, None
        with told():
            pair = torch.stack([await opened(self.served, one) for one in (file, other)])
            a, _, mixed = await done(self.served, inside.swapped(pair, first, last, self.steps))
            return self._kept(mixed), self._kept(marked(a, difference(a, mixed)))

    async def lacking(self, file: str | None, token: int) -> tuple[Any, Any]:
        """Show A without a token, and what is other in A then."""
        if file is None:
            return None, None
        with told():
            image = await opened(self.served, file)
            program = inside.without(image, [range(token, token + 1)], self.steps)
            whole, made = await done(self.served, program)
            return self._kept(made), self._kept(marked(whole, difference(whole, made)))

    async def map(
        self, visitor: gradio.Request, file: str | None
    ) -> AsyncIterator[tuple[Any, Any, gradio.Button]]:
        """Show for each pixel of A which token matters most to it."""
        ending = self.stop.begin(visitor)
        with told():
            yield gradio.skip(), gradio.skip(), running()
            image = await opened(self.served, file)
            groups = inside.groups(self.tokens)
            program = inside.without(image, groups, self.steps)
            try:
                whole, *made = await done(self.served, program, ending)
            except CancelledError:
                return
            owner, picture = owners(difference(torch.stack(made), whole))
            firsts = torch.tensor([group[0] for group in groups])
            yield self._kept(picture), firsts[owner].tolist(), running()

    def chosen(self, found: Owners, x: int, y: int) -> Any:
        """Return the token of the pixel at a place of the map that is shown."""
        if not found:
            return gradio.skip()
        size = len(found)
        scale = factor(torch.empty(3, size, size))
        return found[min(y // scale, size - 1)][min(x // scale, size - 1)]


def _number(event: gradio.SelectData) -> int:
    """Return the number of tokens that a picture of the strip is named by."""
    return int(event.value["caption"])


def tab(served: Served, files: Files, own: gradio.Tab) -> gradio.Image:
    """Lay out the tab Inside; return the place of its first picture."""
    return InsideTab(served, files, own).a
