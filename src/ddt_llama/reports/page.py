"""The plain page that reports and demonstrations share: one style sheet, a few pieces of HTML.

Every piece escapes the text it is given. A page has no script and no address outside itself,
follows the reader's light or dark setting and fits a phone.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ddt_llama.reports.pictures import data_uri

STYLE = """
:root { color-scheme: light dark; --back: #fdfdfc; --ink: #1d1f21; --soft: #62676d;
  --line: #dfe1e3; --panel: #f3f4f4; --good: #1a7f43; --bad: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --ink: #e6e7e8; --soft: #9aa1a8;
  --line: #32363a; --panel: #1f2225; --good: #5cc489; --bad: #ef8577; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1040px; background: var(--back);
  color: var(--ink); font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 19px; margin: 44px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 4px 0 14px; max-width: 68ch; }
.soft { color: var(--soft); font-size: 14px; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 3px;
  background: var(--panel); outline: 1px solid var(--line); outline-offset: -1px; }
figure { margin: 0; } figcaption { padding-top: 6px; font-size: 14px; line-height: 1.35; }
.grid { display: grid; gap: 18px 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(192px, 44%), 1fr)); }
.wide { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); }
.plots { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.plots svg { width: 100%; height: auto; display: block; }
.row { display: grid; gap: 4px; margin: 0 0 4px; max-width: 900px;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.row span { display: block; font-size: 13px; color: var(--soft); text-align: center; }
.edit { display: grid; gap: 12px; margin: 0 0 18px; align-items: center; max-width: 640px;
  grid-template-columns: minmax(0, 1fr) minmax(0, 0.9fr) minmax(0, 1fr); }
.edit div { text-align: center; }
.ask { display: grid; gap: 14px; grid-template-columns: 128px minmax(0, 1fr); }
.ask p { margin: 0 0 4px; }
.facts { display: grid; gap: 10px 14px; margin-top: 14px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  font-variant-numeric: tabular-nums; }
.facts span { display: block; font-size: 13px; line-height: 1.3; color: var(--soft); }
figcaption .soft { white-space: nowrap; }
.scroll { overflow-x: auto; margin-bottom: 20px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td:first-child, td.n, th { overflow-wrap: normal; white-space: nowrap; }
td.n, th.n { text-align: right; }
td.n .soft { font-size: 12px; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--soft); }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); padding: 12px; overflow-x: auto; border-radius: 3px; }
@media (max-width: 520px) { body { padding: 14px 12px 48px; } h1 { font-size: 22px; }
  .ask { grid-template-columns: 96px minmax(0, 1fr); } th, td { padding-right: 12px; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document with this title and these parts of its body."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, note: str, content: str) -> str:
    """Return a titled section, or nothing where there is no content to show."""
    if not content:
        return ""
    soft = f'<p class="soft">{escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{soft}{content}\n</section>"


def image(path: Path, words: str) -> str:
    """Return the picture at `path` inlined, described by `words` for those who cannot see it."""
    return f'<img src="{data_uri(path)}" alt="{escape(words)}" loading="lazy">'


def figure(path: Path, caption: str, note: str = "") -> str:
    """Return a picture with its caption and, softer, a note."""
    soft = f' <span class="soft">{escape(note)}</span>' if note else ""
    words = f"{escape(caption)}{soft}"
    return f"<figure>{image(path, caption)}<figcaption>{words}</figcaption></figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    """Return a table; cells are HTML, columns from `numbers_from` on are set right."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        marks = ["" if i < numbers_from else ' class="n"' for i in range(len(texts))]
        return "".join(
            f"<{tag}{mark}>{text}</{tag}>" for mark, text in zip(marks, texts, strict=True)
        )

    lines = [f"<tr>{cells('td', row)}</tr>" for row in rows]
    if not lines:
        return ""
    head = f"<tr>{cells('th', [escape(h) for h in heads])}</tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
