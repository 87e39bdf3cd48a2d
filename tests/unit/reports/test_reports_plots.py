"""Reading metrics.jsonl and drawing it."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageColor

from ddt_llama.config import UserError
from ddt_llama.reports import plots
from ddt_llama.reports.plots import (
    COLOURS,
    POINTS,
    panels,
    plot,
    read_metrics,
    save_intervals,
    save_plot,
    thin,
)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "metrics.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def test_metrics_are_read_by_quantity(tmp_path: Path) -> None:
    path = write(tmp_path, {"step": 1, "loss": 3.0, "time": 9}, {"step": 2, "loss": 2, "lr": 0.1})
    assert read_metrics(path) == {"loss": ([1, 2], [3.0, 2.0]), "lr": ([2], [0.1])}


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": float(s)} for s in (1, 2, 3)]
    again = [{"step": s, "loss": 10.0 * s} for s in (2, 3, 4)]
    assert read_metrics(write(tmp_path, *rows, *again))["loss"] == (
        [1, 2, 3, 4],
        [1.0, 20.0, 30.0, 40.0],
    )


def test_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    rows = ['{"step": 1, "loss": NaN}', {"step": 2, "note": "a", "done": True, "x": None}]
    assert read_metrics(write(tmp_path, *rows)) == {}


def test_a_cut_last_line_is_skipped_and_any_other_is_named(tmp_path: Path) -> None:
    good = {"step": 1, "loss": 1.0}
    assert read_metrics(write(tmp_path, good, '{"step": 2, "lo')) == {"loss": ([1], [1.0])}
    with pytest.raises(UserError, match="line 1"):
        read_metrics(write(tmp_path, '{"step": 2, "lo', good))
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_thinning_keeps_short_curves_and_the_mean_of_long_ones() -> None:
    assert thin([1.0, 2.0], [5.0, 6.0]) == ([1.0, 2.0], [5.0, 6.0])
    steps = [float(s) for s in range(4 * POINTS)]
    x, y = thin(steps, [s * 2 for s in steps])
    assert len(x) == POINTS
    assert sum(x) / POINTS == pytest.approx(sum(steps) / len(steps))
    assert y == pytest.approx([2 * s for s in x])


def test_plot_is_one_svg_in_the_ink_of_the_page() -> None:
    svg = plot({"a": ([0.0, 1.0], [1.0, 3.0]), "b": ([0.0, 1.0], [2.0, 2.0])}, "loss & more")
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.tag.endswith("svg")
    assert "currentColor" in svg
    assert "#010203" not in svg
    texts = {"".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("text")}
    assert {"a", "b", "loss & more"} <= texts


def test_plots_of_one_page_share_no_ids() -> None:
    curve = ([0.0, 1.0], [1.0, 2.0])
    found = [re.findall(r'\bid="([^"]+)"', plot({"x": curve}, title)) for title in ("a", "b")]
    assert found[0]
    assert not set(found[0]) & set(found[1])


def test_plot_of_the_same_curves_is_the_same_text() -> None:
    curves = {"x": ([0.0, 1.0], [1.0, 2.0])}
    assert plot(curves, "t") == plot(curves, "t")


def test_save_plot_writes_a_png(tmp_path: Path) -> None:
    save_plot(tmp_path / "plot.png", {"x": ([0.0, 1.0], [1.0, 2.0])}, "x")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors() or []) > 2
    assert [f.name for f in tmp_path.iterdir()] == ["plot.png"]


def test_axes_bear_names_and_no_two_curves_look_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save_png", lambda path, figure: drawn.append(figure))
    curves = {f"curve {n}": ([0.0, 1.0], [1.0, float(n)]) for n in range(1, len(COLOURS) + 3)}
    bands = {name: ([0.5, 0.5], [9.0, 9.0]) for name in curves}
    save_plot(tmp_path / "p.png", curves, "t", "sequences seen", "bits a token", bands)
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sequences seen", "bits a token")
    save_plot(tmp_path / "q.png", {"wide": ([0.0, 1.0], [0.01, 1.0])}, "t")
    assert drawn[1].axes[0].get_yscale() == "linear"
    measured = {"a": ([1.0, 9.0], [1.0, 3.0]), "b": ([1.0, 9.0], [2.0, 5.0])}
    said = {"b": ([1.0, 9.0], [2.5, 4.0])}
    save_plot(tmp_path / "r.png", measured, "t", log="xy", laws=said)
    assert (drawn[2].axes[0].get_xscale(), drawn[2].axes[0].get_yscale()) == ("log", "log")
    _, curve, law = drawn[2].axes[0].lines
    assert list(law.get_ydata()) == [2.5, 4.0]
    assert law.get_color() == curve.get_color()
    assert law.get_linewidth() < curve.get_linewidth()
    save_plot(tmp_path / "s.png", measured, "t", log="x")
    assert (drawn[3].axes[0].get_xscale(), drawn[3].axes[0].get_yscale()) == ("log", "linear")
    first, second = axes.lines[:2]
    assert first.get_linestyle() != second.get_linestyle()  # also where there is no colour
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(curves) == len(axes.collections)


def test_a_legend_covers_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save_png", lambda path, figure: drawn.append(figure))
    curves = {f"order number {n}": ([0.0, 1.0], [1.0, 2.0]) for n in range(5)}
    save_plot(tmp_path / "p.png", curves, "t")
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(curves)
    assert legend.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0
    assert legend.get_window_extent().y0 >= 0  # and is not cut off


def test_intervals_are_rows_of_dots_beside_a_line_at_zero(tmp_path: Path) -> None:
    rows = {"wide": (-1.0, -1.5, -0.5), "narrow": (1.0, 0.9, 1.1)}
    save_intervals(tmp_path / "plot.png", rows, "x")
    pixels = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    y, x = (pixels == ImageColor.getrgb(COLOURS[0])).all(-1).nonzero()
    above = y < (y.min() + y.max()) / 2
    assert np.ptp(x[above]) > 3 * np.ptp(x[~above])  # the first row stands above
    assert x[above].max() < x[~above].min()
    heights = [np.ptp(y[part]) for part in (above, ~above)]
    assert min(heights) > 5  # of the dots: a line alone is thinner
    between = pixels[:, x[above].max() + 2 : x[~above].min() - 1]
    assert ((between < 160).all(-1).mean(0) > 0.5).any()  # the line at zero


def test_panels_group_by_beginning_and_size_with_the_loss_first() -> None:
    def curve(size: float) -> tuple[list[float], list[float]]:
        return [0.0, 1.0], [0.0, size]

    curves = {
        "codebook.used": curve(1.0),
        "codebook.perplexity": curve(900.0),
        "error/own": curve(0.2),
        "error/wrong": curve(0.7),
        "loss": curve(0.3),
    }
    assert {title: list(some) for title, some in panels(curves).items()} == {
        "loss": ["loss"],
        "codebook": ["used"],
        "codebook (2)": ["perplexity"],
        "error": ["own", "wrong"],
    }


def test_a_panel_holds_no_more_curves_than_colours() -> None:
    count = len(COLOURS) + 1
    curves = {f"entropy.{i}": ([0.0], [1.0]) for i in range(count)}
    assert [len(some) for some in panels(curves).values()] == [len(COLOURS), 1]


def test_long_names_stay_on_the_page_and_few_places_have_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save_png", lambda path, figure: drawn.append(figure))
    name = "PSNR in dB of one step from the coarse half of the tokens"
    curve = ([8.0, 16.0, 128.0], [0.1, 0.2, 0.3])
    save_plot(tmp_path / "p.png", {"": curve}, f"nano: {name}, 3 seeds", "tokens an image", name)
    rows = {"as it is": (0.0, -1.0, 1.0), f"other (base: {name})": (1.0, 0.0, 2.0)}
    save_intervals(tmp_path / "q.png", rows, f"nano: {name}, more than its base")
    for figure in drawn:
        figure.draw_without_rendering()
        for text in figure.findobj(Text):
            if len(text.get_text()) > 8:  # no number of a tick
                extent = text.get_window_extent()
                assert 0 <= extent.x0 <= extent.x1 <= figure.bbox.x1, text
                assert 0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, text
    assert drawn[0].axes[0].get_xticks().tolist() == curve[0]
