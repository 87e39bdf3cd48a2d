"""The page as it is seen: its tabs, its words, its colours."""

import gradio
from gradio.themes import Base, Default

from ddt_llama.serving.page import draw, edit, inside_tab
from ddt_llama.serving.page.pictures import Files
from ddt_llama.serving.served import Served

ABOUT = """# ddt-llama
One model that **draws**, **edits**, **answers** and shows its **inside**. A picture is a sentence
of {tokens} tokens, one for each step of the noise that destroys it; a LLaMA reads and writes them
like words. Model **{name}**: {size} x {size} pixels, {tokens} tokens of {codes:,} kinds."""
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.dark { --color-accent: var(--primary-400); }
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
[role="tab"]:focus-visible { outline-offset: -2px; }
/* Mistakes are told in a line of their own; Gradio also marks places with them, even after Stop. */
[data-testid="status-tracker"] :is(.error, .clear-status) { display: none; }
img { image-rendering: pixelated; }
.image-frame img, .image-frame { width: 100%; height: 100%; object-fit: contain; }
/* Names and buttons stand above pictures, not on them. */
.block:has(> [data-testid="block-label"]) { padding-top: 27px !important; }
.block > [data-testid="block-label"] ~ :not([data-testid="image"]) > .top-panel { top: -27px; }
.grid-wrap { max-height: none !important; overflow: visible !important; min-height: 0 !important; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
/* Who scrolls the page over the compared pictures would zoom into them, and get no further. */
#compared .content { pointer-events: none; }
#compared .icon-wrap { color: var(--background-fill-primary) !important; }
.caption-label { font-size: 11px !important; padding: 0 6px !important; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 8px !important; }
  /* What is drawn comes directly below the button that draws it. */
  #words { display: contents; }
  #drawing { order: 1; }
  #more { order: 2; }
}
"""
# For those who do not see the page: names of pictures, and what happens told when it does.
NAMES = """() => new MutationObserver(() => {
  for (const block of document.querySelectorAll('.block')) {
    const label = block.querySelector(':scope > [data-testid="block-label"]');
    if (label) block.querySelectorAll('img').forEach((image, place) => {
      const names = label.innerText.trim().split(' | ');
      image.alt ||= names[place] ?? names[0];
    });
  }
  for (const image of document.querySelectorAll('tr img'))
    image.alt ||= image.closest('tr').innerText.trim();
  for (const status of document.querySelectorAll('#draw-status, #edit-status, #few-told'))
    status.ariaLive = 'polite';
}).observe(document.body, {childList: true, subtree: true})"""


def theme() -> Base:
    """Return colours and fonts; only fonts of the reader's machine, none is loaded."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    own = Default(
        primary_hue="indigo", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace")
    )
    return own.set(  # Gradio's own greys and blues are too pale to be read by everybody
        body_text_color_subdued="*neutral_500",
        color_accent="*primary_600",
        button_medium_padding="*spacing_md *spacing_md",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def page(served: Served, files: Files) -> gradio.Blocks:
    """Return the page of a model that is being served; `files` are its pictures."""
    tokenizer = served.model.tokenizer
    size = tokenizer.image_size
    with gradio.Blocks(title="ddt-llama", analytics_enabled=False) as blocks:
        gradio.Markdown(
            ABOUT.format(
                tokens=tokenizer.num_tokens,
                name=served.model.name,
                size=size,
                codes=tokenizer.codebook_size,
            )
        )
        with gradio.Tabs() as tabs:
            with gradio.Tab("Draw", id="draw"):
                drawn = draw.Drawn(served, files)
            with gradio.Tab("Edit", id="edit"):
                edited = edit.edit_tab(served, files)
            with gradio.Tab("Ask", id="ask"):
                asked = edit.ask_tab(served, files)
            with gradio.Tab("Inside", id="inside") as own:
                seen = inside_tab.tab(served, files, own)
        drawn.lead_to(tabs, {"edit": edited, "ask": asked, "inside": seen})
    return blocks
