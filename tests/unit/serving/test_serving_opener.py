"""Pictures are opened in processes that are ended when they take too long, or break."""

import asyncio
import io
import os
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_server import png

from ddt_llama.data.images import BrokenImage, open_image
from ddt_llama.serving.limits import Limits
from ddt_llama.serving.opener import OPENED, PROCESSES, REFUSED, Opener, opened

SIZE = 16


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    opener = Opener(SIZE, Limits(decode_seconds=1.0, max_pixels=1.0))
    yield opener
    opener.close()


def test_it_opens_as_everything_else_does(opener: Opener) -> None:
    async def all_of_them() -> list[torch.Tensor]:
        return await asyncio.gather(*(opener.open(png(value, 40)) for value in range(0, 250, 25)))

    for value, image in zip(range(0, 250, 25), asyncio.run(all_of_them()), strict=True):
        assert torch.equal(image, open_image(png(value, 40), SIZE))


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_what_hangs_or_dies_is_replaced(opener: Opener, how: signal.Signals) -> None:
    before = []
    for _ in range(PROCESSES):
        process, connection = opener._free.get()
        before.append(process.pid)
        os.kill(process.pid, how)
        opener._free.put((process, connection))
    for _ in range(PROCESSES):
        message = "longer than 1 s" if how is signal.SIGSTOP else "cannot be decoded"
        with pytest.raises(BrokenImage, match=message):
            asyncio.run(opener.open(png()))
    assert asyncio.run(opener.open(png())).shape == (3, SIZE, SIZE)
    after = [opener._free.get() for _ in range(PROCESSES)]
    for one in after:
        opener._free.put(one)
    assert not {process.pid for process, _ in after} & set(before)


def test_it_has_limits_of_its_own(opener: Opener) -> None:
    content = io.BytesIO()
    PIL.Image.new("L", (1001, 1000)).save(content, format="PNG")
    with pytest.raises(BrokenImage, match="1001 x 1000, at most 1000000 pixels"):
        asyncio.run(opener.open(content.getvalue()))


def picture(kind: str) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(content, format=kind)
    return content.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


@given(
    start=st.sampled_from(PICTURES),
    cuts=st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=8)), max_size=6),
    end=st.integers(0, 4000),
)
@settings(max_examples=400, deadline=2000)
def test_harmed_pictures_are_opened_or_refused_and_nothing_else(
    start: bytes, cuts: list[tuple[int, bytes]], end: int
) -> None:
    data = bytearray(start)
    for place, new in cuts:
        place %= len(data)
        data[place : place + len(new)] = new
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = opened(bytes(data[: max(end, 1)]), SIZE, 1_000_000)
    assert answer[:1] in (OPENED, REFUSED)
    if answer[:1] == OPENED:
        assert len(answer) == 1 + 3 * SIZE * SIZE
    else:
        assert 0 < len(answer.decode()) < 200
