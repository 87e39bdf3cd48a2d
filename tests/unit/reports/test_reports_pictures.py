"""Sheets and data URIs."""

import base64
from pathlib import Path

import pytest
from PIL import Image

from ddt_llama.config import UserError
from ddt_llama.reports.pictures import GAP, MAT, data_uri, sheet

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_sheet_lays_row_by_row_with_a_mat_between() -> None:
    result = sheet([plain(RED), plain(BLUE), plain(GREEN)], 2)
    assert result.size == (8 + GAP, 8 + GAP)
    assert result.getpixel((0, 0)) == RED
    assert result.getpixel((4 + GAP, 3)) == BLUE
    assert result.getpixel((3, 4 + GAP)) == GREEN
    assert result.getpixel((4, 0)) == MAT
    assert result.getpixel((4 + GAP, 4 + GAP)) == MAT


def test_sheet_enlarges_pixels_to_squares() -> None:
    picture = plain(RED, (2, 1))
    picture.putpixel((1, 0), BLUE)
    result = sheet([picture], 5, scale=3)
    assert result.size == (6, 3)
    assert {result.getpixel((x, y)) for x in range(3) for y in range(3)} == {RED}
    assert {result.getpixel((x, y)) for x in range(3, 6) for y in range(3)} == {BLUE}


def test_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="0 pictures"):
        sheet([], 2)
    with pytest.raises(UserError, match="got 0 and 1"):
        sheet([plain(RED)], 0)


def test_data_uri_holds_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    plain(RED).save(path)
    head, _, content = data_uri(path).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == path.read_bytes()


def test_data_uri_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        data_uri(tmp_path / "gone.png")
    with pytest.raises(UserError, match="not a picture"):
        data_uri(tmp_path / "weights.bin")
