"""The page as it is seen: its tabs, its words, its colours."""

from pathlib import Path
from typing import Any

import gradio
from gradio.themes import Base

from ddt_llama.serving.page import draw
from ddt_llama.serving.served import Served

ABOUT = """# ddt-llama
One model that **draws**, **edits**, **answers** and shows its **inside**. A picture is a sentence of
{tokens} tokens, one for each step of the noise that destroys it; a LLaMA reads and writes them like words.
Model **{name}**: {size} x {size} pixels, {tokens} tokens of {codes} kinds."""
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
img { image-rendering: pixelated; }
"""


def theme() -> Base:
    """Return colours and fonts; only fonts of the reader's machine, none is loaded."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    return gradio.themes.Default(
        primary_hue="indigo", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace")
    )


def page(served: Served, **more: Any) -> gradio.Blocks:
    """Return the page of a model that is being served."""
    tokenizer = served.model.tokenizer
    with gradio.Blocks(title="ddt-llama", analytics_enabled=False, **more) as blocks:
        gradio.Markdown(
            ABOUT.format(
                tokens=tokenizer.num_tokens,
                name=served.model.name,
                size=tokenizer.image_size,
                codes=tokenizer.codebook_size,
            )
        )
        with gradio.Tabs():
            with gradio.Tab("Draw", id="draw"):
                draw.tab(served)
    return blocks
