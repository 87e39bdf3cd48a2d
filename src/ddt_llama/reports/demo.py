"""The page of `make demo`: what a model drew, rebuilt, edited and answered, pictures first.

Reads one folder: results.json (the dataclass `Demo`, written by `save_demo`) and the pictures that
it names. Measures nothing itself; figures and timings are in the JSON.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ddt_llama.config import from_dict, load_json, replace_file, save_json, to_dict
from ddt_llama.reports.figures import tables
from ddt_llama.reports.page import figure, image, page, section, table

RESULTS = "results.json"
PAGE = "index.html"


@dataclass(frozen=True)
class Drawn:
    """A picture drawn from a prompt. Paths of pictures are relative to the results folder.

    `right` is the verifier's word on it; None where nothing could check it.
    """

    prompt: str
    image: str
    seed: int = 0
    right: bool | None = None


@dataclass(frozen=True)
class Level:
    """A reconstruction from so many tokens, counted from the coarse end; `psnr` in dB."""

    tokens: int
    image: str
    psnr: float | None = None


@dataclass(frozen=True)
class Reconstructed:
    """An original and what its codes give back, from few tokens to all."""

    original: str
    levels: tuple[Level, ...]
    name: str = ""


@dataclass(frozen=True)
class Edited:
    """An edit. `done` is the verifier's word on it; None where nothing could check it."""

    source: str
    instruction: str
    result: str
    done: bool | None = None


@dataclass(frozen=True)
class Asked:
    """A question about a picture. `expected` is None where the right answer is not known."""

    image: str
    question: str
    answer: str
    expected: str | None = None

    @property
    def right(self) -> bool | None:
        """Say whether the answer is the expected one, capitals and outer spaces aside."""
        if self.expected is None:
            return None
        return self.answer.strip().casefold() == self.expected.strip().casefold()


@dataclass(frozen=True)
class Demo:
    """Everything that the page shows. `timings` are seconds, `figures` flat dotted keys."""

    model: str
    about: str
    drawn: tuple[Drawn, ...] = ()
    reconstructed: tuple[Reconstructed, ...] = ()
    edited: tuple[Edited, ...] = ()
    asked: tuple[Asked, ...] = ()
    figures: dict[str, float | None] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


def save_demo(folder: Path, demo: Demo) -> Path:
    """Write `demo` as results.json in `folder`, all or nothing, and return its path."""
    path = folder / RESULTS
    save_json(path, to_dict(demo))
    return path


def load_demo(folder: Path) -> Demo:
    """Read results.json from `folder`; UserError where it is absent or of another form."""
    return from_dict(Demo, load_json(folder / RESULTS))


def demo_page(folder: Path) -> str:
    """Return the HTML page of a results folder, its pictures inlined.

    Raises UserError where results.json or a picture that it names is missing.
    """
    demo = load_demo(folder)
    return page(
        f"{demo.model}: drawn, rebuilt, edited, asked",
        [
            f"<header><h1>{escape(demo.model)}</h1><p>{escape(demo.about)}</p></header>",
            section("Drawn", "From the sentence below each picture.", _drawn(folder, demo)),
            section(
                "Reconstructed",
                "The original, then the same picture decoded from its first tokens only, "
                "coarsest first. Small numbers: PSNR in dB against the original.",
                _reconstructed(folder, demo),
            ),
            section("Edited", "Source, instruction, result.", _edited(folder, demo)),
            section("Asked", "Answers of the model, as written.", _asked(folder, demo)),
            section(
                "Figures",
                "Measured on the few pictures of this page, so the 95 % intervals are wide.",
                tables(demo.figures) if demo.figures else "",
            ),
            section("Timings", "On the machine that made this page.", _timings(demo)),
        ],
    )


def write_demo_page(folder: Path) -> Path:
    """Write index.html beside results.json, all or nothing, and return its path."""
    path = folder / PAGE
    replace_file(path, demo_page(folder).encode())
    return path


def _drawn(folder: Path, demo: Demo) -> str:
    said = {None: "", True: ", right", False: ", not what was asked"}
    items = [
        figure(folder / d.image, d.prompt, f"seed {d.seed}{said[d.right]}") for d in demo.drawn
    ]
    return f'<div class="grid">{"".join(items)}</div>' if items else ""


def _reconstructed(folder: Path, demo: Demo) -> str:
    rows: list[str] = []
    heads: list[str] = []
    for item in demo.reconstructed:
        columns = ["original", *(str(level.tokens) for level in item.levels)]
        style = f'class="row" style="--columns:{len(columns)}"'
        if columns != heads:  # pictures of another model or size may have other levels
            heads = columns
            labels = "".join(f"<span>{escape(head)}</span>" for head in heads)
            rows.append(f"<div {style}>{labels}</div>")
        name = item.name or "original"
        cells = [f"<div>{image(folder / item.original, name)}</div>"]
        for level in item.levels:
            words = f"{name} from {level.tokens} tokens"
            note = "" if level.psnr is None else f"<span>{level.psnr:.1f}</span>"
            cells.append(f"<div>{image(folder / level.image, words)}{note}</div>")
        rows.append(f"<div {style}>{''.join(cells)}</div>")
    return "\n".join(rows)


def _edited(folder: Path, demo: Demo) -> str:
    rows = [
        f'<div class="edit">{image(folder / e.source, "source")}'
        f"<div>{escape(e.instruction)}{_verdict(e.done, 'done', 'not done')}</div>"
        f"{image(folder / e.result, 'result')}</div>"
        for e in demo.edited
    ]
    return "\n".join(rows)


def _asked(folder: Path, demo: Demo) -> str:
    items = []
    for a in demo.asked:
        wrong = f"wrong, it is {a.expected}"
        items.append(
            f'<div class="ask">{image(folder / a.image, a.question)}<div>'
            f"<p>{escape(a.question)}</p><p><strong>{escape(a.answer)}</strong></p>"
            f"{_verdict(a.right, 'right', wrong)}</div></div>"
        )
    return f'<div class="wide">{"".join(items)}</div>' if items else ""


def _verdict(good: bool | None, yes: str, no: str) -> str:
    if good is None:
        return ""
    return f'<p class="{"good" if good else "bad"}">{escape(yes if good else no)}</p>'


def _timings(demo: Demo) -> str:
    rows = [[escape(name), f"{seconds:.2f} s"] for name, seconds in demo.timings.items()]
    return table(["what", "time"], rows)
