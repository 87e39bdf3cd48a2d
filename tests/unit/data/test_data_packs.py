"""The real packs, read for real; skipped where they are not at hand (DDT_DATA)."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.data.sources import ImageSource, Reading, detect_kind, open_source
from ddt_llama.data.stream import Stream

PACKS = Path(os.environ.get("DDT_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    return Reading(cache_dir=str(tmp_path_factory.mktemp("arrow")))


def pack(name: str) -> Path:
    if not (PACKS / name).is_dir():
        pytest.skip(f"no data pack {name} in {PACKS}; set DDT_DATA")
    return PACKS / name


@pytest.fixture(scope="module")
def emoji(options: Reading) -> ImageSource:
    return open_source(pack("emoji64"), image_size=64, split="val", options=options)


def test_emoji_are_all_readable_and_captioned(emoji: ImageSource) -> None:
    assert emoji.readable() == list(range(616))
    assert emoji.skipped == ()
    samples = emoji.batch(range(len(emoji)))
    assert len({sample.caption for sample in samples}) == 616
    assert all("emoji of" in sample.caption for sample in samples)
    images = torch.stack([sample.image for sample in samples])
    assert images.shape == (616, 3, 64, 64)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images[:, :, 0, 0].median() == 1, "backgrounds are white"
    assert images.std() > 0.3


def test_emoji_from_memory_are_read_faster_than_from_files(
    emoji: ImageSource, options: Reading
) -> None:
    """Measured 7 times faster with one thread: 18,000 and 2,500 a second."""
    cold = open_source(
        pack("emoji64"), image_size=64, split="val", options=replace(options, cache_bytes=0)
    )
    emoji.readable()

    def seconds(source: ImageSource) -> float:
        stream = Stream([source], 64)
        started = time.perf_counter()
        for step in range(30):
            stream(step)
        return time.perf_counter() - started

    assert seconds(cold) > 2 * seconds(emoji)
    pairs = zip(Stream([cold], 64)(5), Stream([emoji], 64)(5), strict=True)
    assert all(torch.equal(one.image, other.image) for one, other in pairs)


def test_the_natural_pack_by_pattern(options: Reading) -> None:
    path = pack("natural64") / "natural64-open-*.tar.gz"
    source = open_source(path, image_size=64, split="val", options=options)
    assert len(source) == 1158
    samples = source.batch(range(200))
    assert all(sample.caption for sample in samples)
    assert source.skipped == ()
    labels = open_source(path, image_size=64, split="val", caption_column="label", options=options)
    assert (samples[3].caption, labels[3].caption) == ("a photo of a revolver", "revolver")


def test_larger_pictures_are_reduced(options: Reading) -> None:
    source = open_source(pack("sample256"), image_size=64, split="val", options=options)
    assert source.batch(range(8))[7].image.shape == (3, 64, 64)
    with pytest.raises(UserError, match="no files of split 'train'"):
        open_source(pack("sample256"), image_size=64, options=options)


def test_the_edit_pack(options: Reading) -> None:
    assert detect_kind(pack("edit64"), "val", options=options) == "edit"
    source = open_source(pack("edit64"), image_size=64, split="val", kind="edit", options=options)
    assert len(source) == 689
    samples = source.batch(range(100))
    assert all(sample.instruction and sample.target_caption for sample in samples)
    assert all(not torch.equal(sample.source, sample.target) for sample in samples)


@pytest.mark.parametrize(("name", "count"), [("easyvqa", 1000), ("nlvr", 990)])
def test_the_question_packs(options: Reading, name: str, count: int) -> None:
    path = pack("vqa64") / f"vqa64-{name}-*.tar.gz"
    assert detect_kind(path, "val", options=options) == "question"
    source = open_source(path, image_size=64, split="val", kind="question", options=options)
    assert len(source) == count
    for sample in source.batch(range(50)):
        assert sample.pairs
        assert all(question and answer for question, answer in sample.pairs)
        assert sample.image.shape == (3, 64, 64)
