"""The page of ddt serve, used in a browser as a person would: every tab, a phone, the dark, keys.

Screenshots are kept in $DDT_SCREENSHOTS, or in pytest's own folder.
"""

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import pytest

import ddt_llama

pytest.importorskip("gradio", reason="the page needs ddt-llama[page]")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
Page, expect = playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no executable chromium")
WAIT = 30_000  # milliseconds, on a busy machine
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start what `ddt demo --open` starts; the browser that it opens writes the address down."""
    folder = tmp_path_factory.mktemp("browser")
    browser, opened = folder / "browser", folder / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part\nmv {opened}.part {opened}\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "ddt_llama", "demo", "--open"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    own = {**os.environ, "BROWSER": str(browser)}
    with subprocess.Popen(command, **pipes, env=own) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving nano at http://127.0.0.1:")
            assert process.stdout.readline() == "Ctrl-C ends it\n"
            yield line.split()[-1]
            assert opened.read_text().strip() == line.split()[-1]
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
            assert process.returncode == 0
            assert said == ""
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def model() -> ddt_llama.Model:
    return ddt_llama.load("nano")


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Open the page; whatever the browser complains of, or asks of others, fails the test."""
    complaints: list[str] = []
    contexts = []

    def heard(message: Any) -> None:
        if message.type == "error":
            complaints.append(message.text)

    def asked(request: Any) -> None:
        if urlsplit(request.url).hostname not in ("127.0.0.1", None):
            complaints.append(request.url)

    def opened(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("console", heard)
        page.on("request", asked)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def shot(tmp_path: Path) -> Any:
    folder = Path(os.environ.get("DDT_SCREENSHOTS", tmp_path))

    def taken(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        page.screenshot(path=folder / f"page-{name}.png", full_page=True, animations="disabled")

    return taken


def pictures(page: Page, place: str) -> list[PIL.Image.Image]:
    """Return the pictures that are shown at a place of the page, as they were sent to it."""
    images = page.locator(f"{place} img")
    expect(images.first).to_be_visible(timeout=WAIT)
    sources = [image.get_attribute("src") for image in images.all()]
    answers = [page.request.get(source) for source in sources]
    return [PIL.Image.open(io.BytesIO(answer.body())).convert("RGB") for answer in answers]


def small(picture: PIL.Image.Image, side: int = 64) -> bytes:
    return picture.resize((side, side), PIL.Image.Resampling.NEAREST).tobytes()


def changed(page: Page, place: str, act: Any) -> bytes:
    """Act, and return the first picture at a place once it is another one."""
    image = page.locator(f"{place} img").first
    before = image.get_attribute("src") or ""
    act()
    expect(image).not_to_have_attribute("src", before, timeout=WAIT)
    return pictures(page, place)[0].tobytes()


def fits(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_draw_then_edit_then_ask(visit: Any, shot: Any, model: ddt_llama.Model) -> None:
    page = visit()
    page.get_by_label("number input for Pictures").fill("2")
    page.get_by_label("Seed").first.fill("7")
    prompt = page.get_by_label("Prompt")
    prompt.fill("two green stars")
    prompt.press("Enter")
    forming = page.get_by_text(re.compile(r"^\d+ of 64 tokens written$"))
    expect(forming).to_be_visible(timeout=WAIT)
    shot(page, "forming")
    expect(page.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    own = model.draw("two green stars", num=2, seed=7)
    assert [one.tobytes() for one in pictures(page, "#drawn")] == [one.tobytes() for one in own]
    shot(page, "draw")

    page.get_by_role("button", name="Edit it").click()
    expect(page.get_by_role("tab", name="Edit")).to_have_attribute("aria-selected", "true")
    what = page.get_by_label("What to change")
    what.fill("make the background white")
    page.get_by_role("button", name="Edit", exact=True).click()
    before, after = pictures(page, "#compared")
    edited = model.edit(own[0], "make the background white", seed=1)[0]
    assert [small(before), small(after)] == [own[0].tobytes(), edited.tobytes()]
    shot(page, "edit")

    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("button", name="Ask about it").click()
    question = page.get_by_label("Question")
    question.fill("how many stars are there?")
    question.press("Enter")
    answer = page.locator("#answer textarea")
    expect(answer).to_have_value(model.ask(own[0], "how many stars are there?"), timeout=WAIT)
    shot(page, "ask")
    page.get_by_role("button", name="Describe").click()
    expect(answer).to_have_value(model.describe(own[0]), timeout=WAIT)


def metric(page: Page, name: str) -> float:
    found = re.search(
        rf"^{re.escape(name)} (\S+)$", page.request.get(f"{page.url}metrics").text(), re.M
    )
    return float(found[1]) if found else 0.0


GIVEN_UP = 'ddt_requests_given_up_total{reason="client"}'


def stop_in_time(page: Page, begin: str) -> None:
    """Begin something and stop it; begin again where a quick machine was done before."""
    before, stop = metric(page, GIVEN_UP), page.get_by_role("button", name="Stop")
    for _ in range(20):
        page.get_by_role("button", name=begin, exact=True).click()
        with contextlib.suppress(playwright.TimeoutError):
            stop.click(timeout=2000)
        expect(stop).to_be_disabled(timeout=WAIT)
        page.wait_for_timeout(200)  # the worker looks once a step who is still there
        if metric(page, GIVEN_UP) > before:
            break
    check_given_up(page, before + 1)


def check_given_up(page: Page, times: float) -> None:
    """Have requests been given up so many times?"""
    end = time.monotonic() + 10
    while metric(page, GIVEN_UP) < times and time.monotonic() < end:
        page.wait_for_timeout(50)
    assert metric(page, GIVEN_UP) == times


def test_what_is_being_made_can_be_stopped(visit: Any, shot: Any) -> None:
    page = visit()
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    page.get_by_label("number input for Pictures").fill("8")
    stop_in_time(page, "Draw")
    assert metric(page, "ddt_batch_rows") == 0
    expect(page.locator("#draw-status")).to_have_text("Stopped.")
    shot(page, "stopped")
    page.get_by_role("tab", name="Edit").click()
    stop_in_time(page, "Edit")
    assert metric(page, "ddt_batch_rows") == 0
    expect(page.locator("#edit-status")).to_have_text("Stopped.")
    page.get_by_role("button", name="Edit", exact=True).click()
    pictures(page, "#compared")
    expect(stop).to_be_disabled()
    page.get_by_role("tab", name="Ask").click()
    stop_in_time(page, "Describe")
    expect(page.locator("#answer textarea")).to_have_value("Stopped.")
    page.get_by_role("tab", name="Inside").click()
    pictures(page, "#change")  # the last of what is made by itself
    stop_in_time(page, "Make the map")
    page.get_by_role("button", name="Make the map").click()
    pictures(page, "#map")
    expect(stop).to_be_disabled()


def test_others_go_on_and_who_leaves_gives_up(visit: Any) -> None:
    page, other = visit(), visit()
    before = metric(other, GIVEN_UP)
    for one in (page, other):
        one.get_by_label("number input for Pictures").fill("8")
    other.get_by_role("button", name="Draw", exact=True).click()
    stop_in_time(page, "Draw")
    expect(other.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    page.get_by_role("button", name="Draw", exact=True).click()
    forming = page.get_by_text(re.compile(r"of 64 tokens written$"))
    forming.wait_for()  # looks at every frame, where `expect` looks once a second at last
    page.close()
    check_given_up(other, before + 2)
    assert metric(other, "ddt_batch_rows") == 0


def test_another_seed_draws_something_else(visit: Any) -> None:
    page = visit()
    page.get_by_label("number input for Pictures").fill("1")
    prompt = page.get_by_label("Prompt")
    prompt.press("Enter")
    expect(page.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    expect(page.get_by_text("seed 1", exact=True)).to_be_visible()
    page.get_by_role("button", name="New seed").click()
    seed = page.get_by_label("Seed").first
    expect(seed).not_to_have_value("1", timeout=WAIT)
    expect(page.get_by_text(f"seed {seed.input_value()}", exact=True)).to_be_visible()


def test_a_chosen_picture_goes_on(visit: Any, shot: Any, model: ddt_llama.Model) -> None:
    page = visit(viewport=PHONE)
    page.get_by_label("number input for Pictures").fill("2")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    page.get_by_label("Thumbnail 2 of 2").click()
    expect(page.get_by_label("Fullscreen")).to_be_visible()
    assert page.get_by_label("Share").count() == 0  # it would send the picture elsewhere
    shot(page, "chosen-phone")
    page.get_by_role("button", name="Ask about it").click()
    picture = page.get_by_role("tabpanel").filter(visible=True).get_by_role("img", name="Picture")
    second = model.draw("a red circle above a blue square", num=2, seed=1)[1]
    answer = page.request.get(picture.get_attribute("src"))
    assert PIL.Image.open(io.BytesIO(answer.body())).tobytes() == second.tobytes()


def compared(page: Page) -> Any:
    """Edit the first example and return the line between before and after."""
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="Edit", exact=True).click()
    pictures(page, "#compared")
    return page.locator("#compared .inner")


def test_the_line_moves_by_keyboard(visit: Any) -> None:
    page = visit()
    handle = compared(page)
    there = handle.bounding_box()["x"]
    line = page.get_by_role("slider", name="Place of the line")
    line.focus()
    moved = "() => document.querySelector('#compared .inner').getBoundingClientRect().x"
    for key, value, further in (
        ("ArrowRight", "51", f"> {there} + 2"),
        ("End", "100", f"> {there} + 100"),
        ("Home", "0", f"< {there} - 100"),
    ):
        page.keyboard.press(key)
        expect(line).to_have_value(value)
        page.wait_for_function(f"{moved} {further}")


def test_the_slider_compares(visit: Any) -> None:
    page = visit()
    handle = compared(page)
    there = handle.bounding_box()
    top = page.evaluate("scrollY")
    page.mouse.move(there["x"] - 60, 300)
    page.mouse.wheel(0, 50)  # scrolls the page, also over the pictures
    page.wait_for_function(f"scrollY > {top} + 10")
    there = handle.bounding_box()
    page.mouse.move(there["x"] + there["width"] / 2, there["y"] + there["height"] / 2)
    page.mouse.down()
    page.mouse.move(there["x"] + 100, there["y"], steps=3)
    page.mouse.up()
    assert handle.bounding_box()["x"] > there["x"] + 50


@pytest.mark.slow
def test_inside(visit: Any, shot: Any, tmp_path: Path, model: ddt_llama.Model) -> None:
    page = visit()
    page.get_by_role("tab", name="Inside").click()
    few = page.locator("#few-told")
    expect(few).to_contain_text("32 of 64 tokens: PSNR", timeout=WAIT)

    picture = model.draw("a red circle above a blue square", seed=1)[0]
    picture.save(tmp_path / "own.png")

    def send() -> None:
        page.get_by_label("Remove Image").first.click()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "own.png")

    changed(page, "#few", send)
    count = page.locator("#count input[type=range]")
    count.focus()
    coarse = changed(page, "#few", lambda: count.press("Home"))
    expect(few).to_contain_text("1 of 64 tokens", timeout=WAIT)
    assert coarse != changed(page, "#few", lambda: page.get_by_label("Thumbnail 2 of 6").click())
    expect(few).to_contain_text("4 of 64 tokens", timeout=WAIT)
    assert coarse != changed(page, "#few", lambda: count.press("End"))
    (whole,) = model.reconstruct(picture)
    assert small(pictures(page, "#few")[0]) == whole.tobytes()

    last = page.locator("#last input[type=range]")
    last.focus()
    expect(page.locator("#mixed img")).to_be_visible()
    changed(page, "#mixed", lambda: last.press("End"))
    changed(page, "#mixed", lambda: last.press("Home"))
    number = page.get_by_label("number input for To token")
    changed(page, "#mixed", lambda: (number.fill("32"), number.press("Enter")))

    page.get_by_role("button", name="Make the map").click()
    chart = page.locator("#map img")
    expect(chart).to_be_visible(timeout=WAIT)
    token = page.get_by_label("number input for Token", exact=True)
    expect(token).to_have_value("32")
    where = chart.bounding_box()
    changed(
        page,
        "#lacking",
        lambda: chart.click(position={"x": where["width"] * 0.5, "y": where["height"] * 0.45}),
    )
    assert token.input_value() != "32"
    range_of_token = page.locator("#token input[type=range]")
    range_of_token.focus()
    changed(page, "#change", lambda: range_of_token.press("ArrowRight"))
    changed(page, "#change", lambda: range_of_token.press("ArrowLeft"))
    shot(page, "inside")


def test_on_a_phone_in_the_dark_by_keyboard(visit: Any, shot: Any) -> None:
    page = visit(viewport=PHONE, color_scheme="dark", has_touch=True)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", colour)[:3])) < 60
    prompt = page.get_by_label("Prompt")
    prompt.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("a red circle")
    page.keyboard.press("Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.innerText") == "Draw":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    assert fits(page)
    shot(page, "draw-phone")
    for name in ("Edit", "Ask", "Inside"):
        page.get_by_role("tab", name=name).press("Enter")
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        if name == "Inside":
            expect(page.locator("#lacking img")).to_be_visible(timeout=WAIT)
            page.wait_for_timeout(300)
        assert fits(page), name
        shot(page, f"{name.lower()}-phone")


def told_once(page: Page, words: str) -> None:
    """Expect one line of a mistake, and close it."""
    told = page.locator(".toast-body")
    expect(told).to_contain_text(words, timeout=WAIT)
    page.wait_for_timeout(500)
    assert told.inner_text().count(words) == 1
    assert len(told.inner_text().split("\n")) == 3  # its kind, a cross, the line
    told.get_by_label("Close").click()
    expect(told).to_have_count(0)


def test_mistakes_are_told_in_a_line(visit: Any, shot: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".toast-body")).to_be_visible(timeout=WAIT)
    shot(page, "mistake")
    told_once(page, "Say what to draw first.")
    page.get_by_role("button", name="Edit it").click()
    told_once(page, "Draw a picture first.")
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question").fill("")
    page.get_by_role("button", name="Ask", exact=True).click()
    told_once(page, "Say what to ask first.")
    page.get_by_label("Remove Image").click()
    page.get_by_role("button", name="Describe").click()
    told_once(page, "Give a picture first.")


def test_what_can_be_tried_fills_the_places(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="two green stars").click()
    expect(page.get_by_label("Prompt")).to_have_value("two green stars", timeout=WAIT)
    for tab, words in (("Edit", "What to change"), ("Ask", "Question")):
        page.get_by_role("tab", name=tab).click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        offered = [row.inner_text().strip() for row in panel.get_by_role("row").all()[1:]]
        panel.get_by_role("row", name=offered[0]).click()
        expect(page.get_by_label(words)).to_have_value(offered[0], timeout=WAIT)
        picture = panel.get_by_role("img", name="Picture")
        first = picture.get_attribute("src")
        cells = [panel.get_by_test_id(f"dataset-cell-{row}-0") for row in (0, 1)]
        cells[0].focus()
        page.keyboard.press("ArrowDown")
        expect(cells[1]).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_label(words)).to_have_value(offered[1], timeout=WAIT)
        assert picture.get_attribute("src") != first


def test_everything_has_a_name_and_shows_its_focus(visit: Any) -> None:
    """Go through all tabs by keyboard: a name for each stop, and an outline around it."""
    page = visit()
    page.get_by_label("number input for Pictures").fill("1")
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_text("Done.", exact=True)).to_be_visible(timeout=WAIT)
    for tab in ("Draw", "Edit", "Ask", "Inside"):
        page.get_by_role("tab", name=tab).press("Enter")
        if tab == "Edit":
            compared(page)
        if tab == "Inside":
            for place in ("#few", "#mixed", "#lacking"):
                expect(page.locator(f"{place} img")).to_be_visible(timeout=WAIT)
        page.get_by_role("tab", name=tab).focus()
        stops = 0
        while stops < 80:
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            stops += 1
            seen = page.locator(":focus")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            told = seen.aria_snapshot()
            assert re.search(r'"[^"]+"|: \S', told) or "img" in told, told
        assert 5 < stops < 80
        for status in page.locator("[id$=-status]:visible, #few-told:visible").all():
            assert status.get_attribute("aria-live") == "polite"
        for image in page.get_by_role("tabpanel").filter(visible=True).locator("img").all():
            assert image.get_attribute("alt")


SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize("tab", ["Edit", "Ask", "Inside"])
def test_a_broken_picture_is_told_of_once_and_taken_away(
    visit: Any, shot: Any, tmp_path: Path, tab: str
) -> None:
    page = visit()
    page.get_by_role("tab", name=tab).click()
    if tab == "Inside":
        expect(page.locator("#lacking img")).to_be_visible(timeout=WAIT)
    PIL.Image.new("L", (5000, 5000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "drawing.svg").write_text(SVG)
    panel = page.get_by_role("tabpanel").filter(visible=True)
    sent = panel.locator("input[type=file]").first
    for file, words in (("text.png", "Not a"), ("large.png", "Too"), ("drawing.svg", "Not a")):
        if panel.get_by_label("Remove Image").count() == 2 - (tab != "Inside"):
            panel.get_by_label("Remove Image").first.click()
        sent.set_input_files(tmp_path / file)
        expect(page.locator(".toast-body")).to_be_visible(timeout=WAIT)
        shot(page, f"broken-{tab.lower()}")
        told_once(page, words)
        expect(panel.get_by_text("Drop Image Here")).to_be_visible()
    if tab == "Inside":
        expect(page.locator("#few-told")).to_have_text("")
        expect(page.locator("#few img, #lacking img, #mixed img")).to_have_count(0)


def test_a_page_that_nobody_touches_asks_for_nothing(visit: Any, tmp_path: Path) -> None:
    page = visit()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url) if "queue/join" in one.url else None)
    page.get_by_role("tab", name="Inside").click()
    lacking = page.locator("#lacking img")
    expect(lacking).to_be_visible(timeout=WAIT)
    before = lacking.get_attribute("src") or ""
    PIL.Image.new("CMYK", (80, 60), (0, 200, 200, 0)).save(tmp_path / "print.jpg")
    page.get_by_label("Remove Image").first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "print.jpg")
    expect(lacking).not_to_have_attribute("src", before, timeout=WAIT)
    page.wait_for_timeout(1000)
    asked.clear()
    page.wait_for_timeout(2000)
    assert asked == []
