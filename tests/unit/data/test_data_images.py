"""Decoding: what is accepted becomes the right pixels, what is not is refused by name."""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.data.images import (
    BrokenImage,
    decode,
    from_bytes8,
    open_image,
    save_png,
    to_bytes8,
    to_pil,
)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def photo(width: int = 96, height: int = 64) -> PIL.Image.Image:
    """Smooth colours with some texture, so that every filter and codec has work to do."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + y / 17), np.cos(x / 5), np.sin(y / 7)]
    return PIL.Image.fromarray(np.stack([127 + 120 * wave for wave in waves], -1).astype(np.uint8))


def chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def png_header(width: int, height: int) -> bytes:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def value(tensor: torch.Tensor) -> list[int]:
    """The colour of a picture of one colour, 0..255."""
    pixels = to_bytes8(tensor)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


# --- right pixels ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}),
])  # fmt: skip
def test_lossless_formats_at_size_are_exact(kind: str, options: dict[str, object]) -> None:
    picture = photo(64, 64)
    image = open_image(encoded(picture, kind, **options), 64)
    assert image.dtype == torch.float32
    assert image.shape == (3, 64, 64)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255 * 2 - 1
    assert (image.double() - expected).abs().max() < 1e-6
    assert image.min() >= -1
    assert image.max() <= 1


def test_jpeg_is_close() -> None:
    image = open_image(encoded(photo(64, 64), "JPEG", quality=95), 64)
    exact = open_image(encoded(photo(64, 64)), 64)
    assert (image - exact).abs().mean() < 0.05


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (97, 64), (301, 200)])
def test_crop_is_the_centre_of_the_resized_picture(width: int, height: int) -> None:
    """Against the slow twin: resize everything, then cut; odd remainders fall between pixels."""
    size = 32
    image = open_image(encoded(photo(width, height)), size)
    scale = size / min(width, height)
    inner = (round(width * scale), round(height * scale))
    whole = photo(width, height).resize(inner, PIL.Image.Resampling.LANCZOS)
    left, top = (inner[0] - size) // 2, (inner[1] - size) // 2
    cut = np.array(whole.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
    error = np.abs(to_bytes8(image).astype(int) - cut)
    exact = (width - height) * size / min(width, height) % 2 == 0
    assert error.max() <= 1 if exact else error.mean() < 6


def test_resizing_is_antialiased() -> None:
    """A one-pixel checkerboard is grey from afar; a filter without antialiasing keeps extremes."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = open_image(encoded(PIL.Image.fromarray(board)), 32)
    assert small.abs().max() < 0.05


def test_resizing_keeps_flat_colour() -> None:
    assert value(open_image(encoded(PIL.Image.new("RGB", (200, 90), (10, 200, 37))), 64)) == [
        10, 200, 37,
    ]  # fmt: skip


def test_small_pictures_are_enlarged() -> None:
    assert open_image(encoded(photo(20, 30)), 64).shape == (3, 64, 64)


def test_pad_keeps_the_whole_picture_on_white() -> None:
    image = open_image(encoded(PIL.Image.new("RGB", (256, 64), (255, 0, 0))), 64, fit="pad")
    pixels = to_bytes8(image)
    assert (pixels[:, :24] == 255).all()
    assert (pixels[:, 40:] == 255).all()
    assert (pixels[:, 24:40] == np.array([255, 0, 0])[:, None, None]).all()


def test_transparency_lies_over_white() -> None:
    clear = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    half = PIL.Image.new("RGBA", (64, 64), (0, 0, 255, 128))
    assert value(open_image(encoded(clear), 64)) == [255, 255, 255]
    assert value(open_image(encoded(half), 64)) == [127, 127, 255]
    assert value(open_image(encoded(clear, "WEBP", lossless=True), 64)) == [255, 255, 255]


def test_transparency_is_laid_over_before_resizing() -> None:
    """The hidden colour of clear pixels must not bleed into the edge."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:, :32] = (255, 255, 255, 255)
    picture[:, 32:] = (0, 255, 0, 0)
    assert value(open_image(encoded(PIL.Image.fromarray(picture)), 16)) == [255, 255, 255]


def test_palettes_with_and_without_transparency() -> None:
    palette = PIL.Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert value(open_image(encoded(palette), 64)) == [9, 99, 199]
    assert value(open_image(encoded(palette, transparency=1), 64)) == [255, 255, 255]
    assert value(open_image(encoded(palette, transparency=0), 64)) == [9, 99, 199]
    assert value(open_image(encoded(palette, transparency=b"\x00\x80"), 64)) == [132, 177, 227]


@pytest.mark.parametrize(("given", "expected"), [
    (0, 0), (65535, 255), (32768, 128), (257 * 77, 77), (300, 1),
])  # fmt: skip
def test_16_bit_grey_is_scaled(given: int, expected: int) -> None:
    grey = PIL.Image.fromarray(np.full((64, 64), given, np.uint16))
    assert value(open_image(encoded(grey), 64)) == [expected] * 3


def test_16_bit_grey_keeps_its_transparent_value() -> None:
    grey = np.full((64, 64), 1000, np.uint16)
    image = open_image(encoded(PIL.Image.fromarray(grey), transparency=1000), 64)
    assert value(image) == [255, 255, 255]


def test_16_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">HHH", 65535, 257 * 128, 0) * 64
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row * 64))
        + chunk(b"IEND", b"")
    )
    assert value(open_image(data, 64)) == [255, 128, 0]


def test_grey_one_bit_and_grey_with_alpha() -> None:
    assert value(open_image(encoded(PIL.Image.new("L", (64, 64), 50)), 64)) == [50] * 3
    assert value(open_image(encoded(PIL.Image.new("1", (64, 64), 1)), 64)) == [255] * 3
    assert value(open_image(encoded(PIL.Image.new("LA", (64, 64), (0, 0))), 64)) == [255] * 3


def test_cmyk_jpeg() -> None:
    cyan = PIL.Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    red, green, blue = value(open_image(encoded(cyan, "JPEG", quality=100), 64))
    assert red < 10
    assert min(green, blue) > 245


def test_exif_orientation_is_applied() -> None:
    """Orientation 6: the camera was turned, the first row belongs on the right-hand side."""
    picture = PIL.Image.new("RGB", (64, 64), "black")
    picture.paste((255, 255, 255), (0, 0, 64, 32))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = open_image(encoded(picture, "JPEG", exif=exif, quality=95), 64)
    assert image[:, :, 40:].min() > 0.8
    assert image[:, :, :24].max() < -0.8


def test_odd_tags_make_a_picture_broken_and_nothing_worse() -> None:
    """A resolution stored as text beside an orientation: Pillow cannot write it back."""
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0")
    entries += struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    with pytest.raises(BrokenImage, match="cannot be decoded"):
        open_image(encoded(PIL.Image.new("RGB", (64, 64)), "JPEG", exif=exif), 64)


def test_an_animation_gives_its_first_frame() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [PIL.Image.new("RGB", (64, 64), colour) for colour in colours]
    many = {"save_all": True, "append_images": frames[1:]}
    assert value(open_image(encoded(frames[0], "GIF", **many), 64)) == [255, 0, 0]
    assert value(open_image(encoded(frames[0], "WEBP", lossless=True, **many), 64)) == [255, 0, 0]
    assert value(open_image(encoded(frames[0], "PNG", **many), 64)) == [255, 0, 0]


def test_large_jpegs_decoded_in_part_look_like_the_whole() -> None:
    """The reduced decoding is an optimisation: below one grey level on average."""
    data = encoded(photo(1200, 900), "JPEG", quality=90)
    slow = open_image(encoded(PIL.Image.open(io.BytesIO(data)), "BMP"), 32)
    assert (open_image(data, 32) - slow).abs().mean() * 127.5 < 1


def test_large_jpegs_padded_keep_their_longer_side_sharp() -> None:
    data = encoded(photo(3000, 300), "JPEG", quality=90)
    slow = open_image(encoded(PIL.Image.open(io.BytesIO(data)), "BMP"), 128, fit="pad")
    assert (open_image(data, 128, fit="pad") - slow).abs().mean() * 127.5 < 1


def test_reading_by_path_and_by_bytes_agree(tmp_path: Path) -> None:
    data = encoded(photo())
    path = tmp_path / "wrong name.jpg"
    path.write_bytes(data)
    assert torch.equal(open_image(path, 32), open_image(data, 32))
    assert torch.equal(open_image(str(path), 32), open_image(data, 32))


# --- bad input -------------------------------------------------------------------------------


def refusal(source: bytes | Path, size: int = 64) -> str:
    """The one line that a user sees."""
    with pytest.raises(BrokenImage) as caught:
        open_image(source, size)
    assert "\n" not in str(caught.value)
    assert str(caught.value) == f"{caught.value.key}: {caught.value.reason}"
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def test_a_picture_of_30000_by_30000_is_refused_by_its_header() -> None:
    """The file is 80 bytes: whoever tries to decode it fails differently, or takes 2.7 GB."""
    assert "too large" in refusal(png_header(30_000, 30_000))
    assert "too large: 9000 x 9000" in refusal(png_header(9_000, 9_000))
    assert "too large" in refusal(png_header(2**31 - 1, 2**31 - 1))


def test_the_pixel_bound_is_inclusive() -> None:
    data = encoded(photo(40, 50))
    assert open_image(data, 32, max_pixels=2000).shape == (3, 32, 32)
    with pytest.raises(BrokenImage, match="too large: 40 x 50, at most 1999 pixels"):
        open_image(data, 32, max_pixels=1999)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_files_cut_short_are_refused(kind: str, share: float) -> None:
    data = encoded(photo(200, 200), kind)
    refusal(data[: int(len(data) * share)])


def test_a_jpeg_without_its_last_lines_is_refused() -> None:
    data = encoded(photo(200, 200), "JPEG", quality=95)
    assert "cut short" in refusal(data[: -len(data) // 50])


def test_a_jpeg_cut_short_is_refused_even_where_another_library_allowed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(photo(200, 200), "JPEG")
    assert "cut short" in refusal(data[: len(data) // 2])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 200), (200, 15)])
def test_tiny_pictures_are_refused_with_their_size(width: int, height: int) -> None:
    assert f"too small: {width} x {height}, at least 16" in refusal(encoded(photo(width, height)))
    assert open_image(encoded(photo(width, height)), 8, min_side=1).shape == (3, 8, 8)


def test_what_is_not_a_picture_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("milk, bread, apples\n" * 100)
    assert refusal(text) == f"{text}: not a picture (allowed: PNG, JPEG, WEBP, GIF, BMP)"
    assert "empty file" in refusal(b"")
    assert "no such file" in refusal(tmp_path / "absent.png")
    assert "not a file" in refusal(tmp_path)


def test_other_formats_are_refused_whatever_their_name(tmp_path: Path) -> None:
    """The allow-list bounds what decoders an unknown file can reach."""
    for kind in ("TIFF", "PPM", "ICO"):
        path = tmp_path / f"{kind}.png"
        path.write_bytes(encoded(photo(64, 64), kind))
        assert "not a picture" in refusal(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_noise_never_escapes_as_another_error(kind: str) -> None:
    """Flipped bytes give a picture or a refusal, never a foreign error."""
    generator = np.random.default_rng(0)
    data = np.frombuffer(encoded(photo(64, 48), kind), np.uint8)
    for _ in range(60):
        broken = data.copy()
        places = generator.integers(0, min(len(data), 400), 5)
        broken[places] = generator.integers(0, 256, 5)
        with contextlib.suppress(BrokenImage):
            assert open_image(broken.tobytes(), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [0, -3, 5000])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"image size: given {size}"):
        decode(encoded(photo()), size)


# --- out again -------------------------------------------------------------------------------


def test_every_8_bit_value_survives_the_round_trip() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    assert (to_bytes8(from_bytes8(values)) == values).all()


def test_values_outside_are_clipped() -> None:
    wild = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).expand(3, 1, 5)
    assert to_bytes8(wild)[0, 0].tolist() == [0, 0, 128, 255, 255]


def test_to_pil_keeps_axes() -> None:
    images = torch.full((2, 3, 4, 5), -1.0)
    images[1, 0, 2, 3] = 1.0
    first, second = to_pil(images)
    assert first.size == (5, 4)
    assert second.getpixel((3, 2)) == (255, 0, 0)
    assert second.getpixel((2, 3)) == (0, 0, 0)


def test_save_png_round_trip(tmp_path: Path) -> None:
    image = open_image(encoded(photo(64, 64)), 64)
    path = save_png(image, tmp_path / "new" / "picture.png")
    assert torch.equal(open_image(path, 64), image)
    assert [one.name for one in path.parent.iterdir()] == ["picture.png"]


def test_save_png_leaves_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "picture.png"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        save_png(torch.zeros(3, 8, 8), path)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["picture.png"]


def test_save_png_to_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_png(torch.zeros(3, 8, 8), tmp_path / "file" / "picture.png")
