"""The page of a run and the page of a demonstration: complete, self-contained, escaped."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ddt_llama.config import UserError, save_json
from ddt_llama.reports.demo import (
    Asked,
    Demo,
    Drawn,
    Edited,
    Level,
    Reconstructed,
    demo_page,
    load_demo,
    save_demo,
    write_demo_page,
)
from ddt_llama.reports.figures import cell, tables
from ddt_llama.reports.pictures import data_uri
from ddt_llama.reports.report import report, report_page

VOID = {"meta", "link", "img", "br", "path", "use"}


class Reader(HTMLParser):
    """Collects tags, addresses and text, and checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and (not self.open or self.open[-1] != "style"):
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)


def assert_self_contained(page: str) -> None:
    reader = Reader(page)
    outside = [a for a in reader.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert "script" not in reader.tags
    style = re.findall(r"url\(([^)]*)\)|@import", page)
    assert all(address.startswith("#") for address in style)


def picture(folder: Path, name: str, colour: tuple[int, int, int] = (200, 10, 10)) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(folder / name)
    return name


@pytest.fixture
def results(tmp_path: Path) -> Path:
    demo = Demo(
        model="tiny",
        about="One model.",
        drawn=(Drawn("a <b>red</b> circle", picture(tmp_path, "drawn.png"), 7),),
        reconstructed=(
            Reconstructed(
                picture(tmp_path, "original.png", (1, 2, 3)),
                (Level(1, picture(tmp_path, "one.png"), 14.25), Level(32, "drawn.png")),
            ),
        ),
        edited=(
            Edited("drawn.png", "make it blue", picture(tmp_path, "blue.png", (0, 0, 255)), True),
            Edited("drawn.png", "remove it", "blue.png", False),
        ),
        asked=(
            Asked("drawn.png", "what colour?", "Red ", "red"),
            Asked("drawn.png", "how many?", "two", "one"),
            Asked("drawn.png", "why?", "so", None),
        ),
        figures={"shapes.overall": 0.875, "shapes.overall.low": 0.85, "shapes.overall.high": 0.9},
        timings={"draw": 1.5},
    )
    save_demo(tmp_path, demo)
    return tmp_path


def test_demo_survives_the_file(results: Path) -> None:
    demo = load_demo(results)
    assert demo.reconstructed[0].levels[0] == Level(1, "one.png", 14.25)
    assert [a.right for a in demo.asked] == [True, False, None]
    save_demo(results, demo)
    assert load_demo(results) == demo


def test_demo_page_shows_everything_and_needs_nothing_else(results: Path) -> None:
    page = demo_page(results)
    assert_self_contained(page)
    text = Reader(page).text
    order = ["Drawn", "Reconstructed", "original", "1", "32", "14.2", "Edited", "make it blue"]
    order += ["done", "not done", "Asked", "right", "wrong, it is one", "Figures", "0.875"]
    order += ["0.850 to 0.900", "Timings", "1.50 s"]
    place = 0
    for word in order:
        place = text.index(word, place)
    for name in ("drawn.png", "original.png", "one.png", "blue.png"):
        assert data_uri(results / name) in page


def test_demo_page_escapes_what_it_is_given(results: Path) -> None:
    page = demo_page(results)
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page
    assert "<b>red" not in page


def test_demo_page_leaves_out_empty_sections(tmp_path: Path) -> None:
    save_demo(tmp_path, Demo("tiny", "Nothing yet."))
    text = Reader(demo_page(tmp_path)).text
    assert "Nothing yet." in text
    assert "Drawn" not in text.removeprefix("tiny: drawn")


def test_demo_page_names_a_missing_picture_and_writes_nothing(results: Path) -> None:
    (results / "blue.png").unlink()
    with pytest.raises(UserError, match=r"blue\.png"):
        write_demo_page(results)
    assert not (results / "index.html").exists()


def test_demo_of_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        demo_page(tmp_path)
    save_json(tmp_path / "results.json", {"model": "a", "about": "b", "pictures": []})
    with pytest.raises(UserError, match="pictures"):
        demo_page(tmp_path)


def test_figure_cells_show_intervals_only_where_measured() -> None:
    figures = {"n": 1000.0, "n.low": 1000.0, "n.high": 1000.0, "gone": None}
    assert cell(figures, "n") == "1000"
    assert cell(figures, "gone") == "–"
    assert cell({"a.psnr.8": 28.123, "a.psnr.8.low": 28, "a.psnr.8.high": 28.3}, "a.psnr.8") == (
        '28.12<br><span class="soft">28.00 to 28.30</span>'
    )


def test_numbered_figures_become_columns_in_order() -> None:
    figures = {f"reconstruction.psnr.{n}": float(n) for n in (16, 1, 4)}
    text = Reader(tables(figures | {"codebook.used": 0.5})).text
    assert text == (
        "reconstruction steps 1 4 16 PSNR (dB) 1.00 4.00 16.00 "
        "figure value 95 % interval codebook.used 0.500"
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "nano-1"
    folder.mkdir()
    rows = [{"step": s, "loss": 1 / (1 + s), "codebook.used": s / 9} for s in range(10)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_json(folder / "config.json", {"optim": {"lr": 0.001}, "name": "<nano>"})
    for step in (900, 1000, 20):
        picture(folder / "samples", f"step-{step}.png", (step % 256, 0, 0))
    save_json(folder / "evaluation" / "reconstruction.json", {"reconstruction.psnr.4": 27.5})
    return folder


def test_report_shows_samples_curves_and_configuration(run_folder: Path) -> None:
    page = report_page(run_folder)
    assert_self_contained(page)
    reader = Reader(page)
    assert reader.tags.count("svg") == 2
    for word in ("nano-1", "step 9", "optim.lr", "0.001", "<nano>", "27.50", "codebook.used"):
        assert word in reader.text
    newest = [reader.text.index(f"step-{step}.png") for step in (1000, 900, 20)]
    assert newest == sorted(newest)


def test_report_is_written_beside_the_run(run_folder: Path) -> None:
    path = report(run_folder)
    assert path == run_folder / "report.html"
    assert path.read_text() == report_page(run_folder)


def test_report_of_a_run_with_nothing_measured(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Nothing was measured yet" in Reader(report_page(tmp_path)).text


def test_report_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        report(tmp_path / "absent")
