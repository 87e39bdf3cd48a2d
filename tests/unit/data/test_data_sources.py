"""Every layout gives the same samples; what cannot be read is named, skipped and bounded."""

import csv
import gc
import gzip
import io
import json
import logging
import socket
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.data.images import to_bytes8
from ddt_llama.data.layouts import extent, has_split
from ddt_llama.data.sources import ImageSource, Reading, Skipped, detect_kind, open_source
from ddt_llama.evaluation.pictures import SourcePictures


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data never leaves the machine."""

    def refuse(self: object, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def options(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    return Reading(cache_dir=str(tmp_path_factory.mktemp("arrow")))


def png(shade: int, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(image: torch.Tensor) -> int:
    return int(to_bytes8(image)[0, 0, 0])


def folder(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def shard(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def captioned(count: int, start: int = 0) -> dict[str, bytes | str]:
    return {
        name: content
        for k in range(start, start + count)
        for name, content in ((f"p{k:03}.png", png(k)), (f"p{k:03}.txt", f"grey {k}\n"))
    }


def rows(source: ImageSource[Any]) -> list[tuple[int, str | None]]:
    return [(shade(sample.image), sample.caption) for sample in source]


EXPECTED = [(k, f"grey {k}") for k in range(5)]


# --- layouts ---------------------------------------------------------------------------------


def test_all_of_divided_folders_keeps_the_captions_of_their_tables(
    tmp_path: Path, options: Reading
) -> None:
    for split, k in (("train", 0), ("val", 2)):
        lines = [{"file_name": f"p{n}.png", "text": f"grey {n}"} for n in (k, k + 1)]
        table = "\n".join(map(json.dumps, lines))
        files = {f"p{k}.png": png(k), f"p{k + 1}.png": png(k + 1), "metadata.jsonl": table}
        folder(tmp_path / split, files)
    source = open_source(tmp_path, image_size=32, split="all", options=options)
    assert rows(source) == EXPECTED[:4]
    assert rows(open_source(tmp_path, image_size=32, options=options)) == EXPECTED[:2]


def test_what_belongs_to_no_split_is_told(
    tmp_path: Path, options: Reading, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path / "a" / "train", captioned(2))
    folder(tmp_path / "a" / "cats", captioned(2))
    (tmp_path / "a" / "README.md").touch()  # nobody misses it
    assert len(open_source(tmp_path / "a", image_size=32, options=options)) == 2
    for name in ("x-train-0.tar", "x-extra-0.tar"):
        shard(tmp_path / "b" / name, captioned(2))
    folder(tmp_path / "b", {"cover.png": png(0)})
    assert len(open_source(tmp_path / "b", image_size=32, options=options)) == 2
    told = [record.getMessage() for record in caplog.records]
    assert f"data: {tmp_path / 'a'}: in no split: cats" in told
    assert f"data: {tmp_path / 'b'}: in no split: x-extra-0.tar" in told
    assert f"data: {tmp_path / 'b'}: pictures beside the shards are not read" in told


def test_shards_may_differ_in_what_they_hold(tmp_path: Path, options: Reading) -> None:
    """The first has no captions and PNG, the second captions and BMP."""
    bmp = io.BytesIO()
    PIL.Image.open(io.BytesIO(png(7))).save(bmp, "BMP")
    shard(tmp_path / "a-0.tar", {"p0.png": png(0), "p1.png": png(1)})
    shard(tmp_path / "a-1.tar", {"p7.bmp": bmp.getvalue(), "p7.txt": "grey 7"})
    source = open_source(tmp_path, image_size=32, options=options)
    assert rows(source) == [(0, None), (1, None), (7, "grey 7")]


def test_folder_with_text_siblings(tmp_path: Path, options: Reading) -> None:
    source = open_source(folder(tmp_path, captioned(5)), image_size=32, options=options)
    assert rows(source) == EXPECTED
    assert source[3].key == "p003.png"
    assert source[3].image.shape == (3, 32, 32)


def test_folder_with_json_siblings_subfolders_and_other_files(
    tmp_path: Path, options: Reading
) -> None:
    files = {
        "a/one.PNG": png(1), "a/one.json": json.dumps({"caption": " first "}),
        "b/two.png": png(2), "b/two.json": json.dumps("second"), "b/two.txt": "",
        "b/three.v2.png": png(3), "b/three.v2.txt": "\ufefftérz 三",
        "four.png": png(4), "README.md": "not a picture", ".hidden.png": b"junk",
        ".git/five.png": b"junk",
    }  # fmt: skip
    source = open_source(folder(tmp_path, files), image_size=32, options=options)
    assert [(sample.key, sample.caption) for sample in source] == [
        ("a/one.PNG", "first"), ("b/three.v2.png", "térz 三"), ("b/two.png", "second"),
        ("four.png", None),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_metadata(tmp_path: Path, options: Reading, kind: str) -> None:
    root = folder(tmp_path, {f"train/{k}.png": png(k) for k in range(5)})
    lines = [{"file_name": f"{k}.png", "text": f"grey {k}"} for k in range(5)]
    with open(root / "train" / f"metadata.{kind}", "w", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(line) + "\n" for line in lines)
        else:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(lines)
    assert rows(open_source(root, image_size=32, options=options)) == EXPECTED
    gc.collect()  # datasets leaves the csv file open; let it be found here, not in another test


@pytest.mark.parametrize("name", ["pack.tar", "pack.tar.gz", "pack.tgz"])
def test_one_shard(tmp_path: Path, options: Reading, name: str) -> None:
    path = shard(tmp_path / name, captioned(5))
    source = open_source(path, image_size=32, options=options)
    assert rows(source) == EXPECTED
    assert source[2].key == "p002"


def test_shards_are_chosen_by_split_and_pattern(tmp_path: Path, options: Reading) -> None:
    shard(tmp_path / "open-train-00000.tar.gz", captioned(3))
    shard(tmp_path / "open-train-00001.tar.gz", captioned(2, 3))
    shard(tmp_path / "open-val-00000.tar.gz", captioned(1, 40))
    shard(tmp_path / "closed-train-00000.tar.gz", captioned(4, 90))

    def shades(path: Path, split: str) -> list[int]:
        source = open_source(path, image_size=32, split=split, options=options)
        return [row[0] for row in rows(source)]

    assert shades(tmp_path, "train") == [90, 91, 92, 93, 0, 1, 2, 3, 4]
    assert shades(tmp_path, "val") == [40]
    assert shades(tmp_path / "open-*.tar.gz", "train") == [0, 1, 2, 3, 4]
    assert sorted(shades(tmp_path, "all")) == [0, 1, 2, 3, 4, 40, 90, 91, 92, 93]
    with pytest.raises(UserError, match=r"no files of split 'test' \(found: closed-train"):
        shades(tmp_path, "test")
    with pytest.raises(UserError, match="split: given 'foo', allowed are train, val, test, all"):
        shades(tmp_path, "foo")


def test_shards_whose_json_differs_from_row_to_row(tmp_path: Path, options: Reading) -> None:
    """The library's own guess, from five rows, would drop "caption" here or fail on the types."""
    files: dict[str, bytes | str] = {}
    for k in range(8):
        extra = {"n": k} if k < 6 else {"n": "many", "caption": f"late {k}"}
        files |= {f"k{k}.png": png(k), f"k{k}.json": json.dumps(extra)}
    source = open_source(shard(tmp_path / "a.tar", files), image_size=32, options=options)
    assert [sample.caption for sample in source] == [None] * 6 + ["late 6", "late 7"]
    by_name = open_source(
        tmp_path / "a.tar", image_size=32, caption_column="caption", options=options
    )
    assert by_name[7].caption == "late 7"


def test_shards_with_mixed_picture_formats_and_capitals(tmp_path: Path, options: Reading) -> None:
    files = {"a.png": png(1), "a.txt": "a", "b.JPG": png(2), "b.txt": "b", "c.d/c.webp": png(3)}
    source = open_source(shard(tmp_path / "a.tar", files), image_size=32, options=options)
    assert rows(source) == [(1, "a"), (2, "b"), (3, None)]


def test_a_shard_that_changed_is_read_again(tmp_path: Path, options: Reading) -> None:
    path = shard(tmp_path / "pack.tar", captioned(2))
    assert len(open_source(path, image_size=32, options=options)) == 2
    shard(path, captioned(4, 10))
    assert [row[0] for row in rows(open_source(path, image_size=32, options=options))] == [
        10, 11, 12, 13,
    ]  # fmt: skip


def table(captions: str = "caption") -> Any:
    from datasets import Dataset, Image

    return Dataset.from_dict(
        {
            "id": list(range(5)),
            "image": [{"bytes": png(k), "path": None} for k in range(5)],
            captions: [f"grey {k}" for k in range(5)],
            "other": [[f"b {k}", "c"] for k in range(5)],
        }
    ).cast_column("image", Image())


def test_parquet(tmp_path: Path, options: Reading) -> None:
    table().to_parquet(tmp_path / "rows-train.parquet")
    source = open_source(tmp_path, image_size=32, options=options)
    assert rows(source) == EXPECTED
    assert source[0].key == "0"
    other = open_source(tmp_path, image_size=32, caption_column="other", options=options)
    assert other[4].caption == "b 4"


def test_a_caption_that_cannot_be_read_costs_its_row_only(
    tmp_path: Path, options: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read anything, so the refusal is played."""
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.txt").write_text("x")
    read = Path.read_text

    def refuse(self: Path, *args: Any, **options: Any) -> str:
        if self.name == "2.txt":
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    source = open_source(tmp_path, image_size=32, options=options)
    assert len(list(source.batch(range(4)))) == 4
    assert [one.reason for one in source.skipped] == ["2.txt cannot be read (Permission denied)"]


def test_parquet_with_plain_bytes(tmp_path: Path, options: Reading) -> None:
    from datasets import Dataset

    plain = Dataset.from_dict({"photo": [png(k) for k in range(5)], "text": ["x"] * 5})
    plain.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"no column of pictures \(columns: photo, text\)"):
        open_source(tmp_path, image_size=32, options=options)
    source = open_source(tmp_path, image_size=32, image_column="photo", options=options)
    assert rows(source) == [(k, "x") for k in range(5)]
    with pytest.raises(UserError, match=r"given 'foto', the columns of .* are photo, text"):
        open_source(tmp_path, image_size=32, image_column="foto", options=options)


def test_data_set_on_disk(tmp_path: Path, options: Reading) -> None:
    from datasets import DatasetDict

    table("text").save_to_disk(tmp_path / "one")
    assert rows(open_source(tmp_path / "one", image_size=32, options=options)) == EXPECTED
    whole = DatasetDict({"train": table().select([0, 1]), "validation": table().select([2])})
    whole.save_to_disk(tmp_path / "many")
    many = tmp_path / "many"
    assert rows(open_source(many, image_size=32, options=options)) == EXPECTED[:2]
    val = open_source(many, image_size=32, split="val", options=options)
    assert rows(val) == EXPECTED[2:3]
    everything = open_source(many, image_size=32, split="all", options=options)
    assert rows(everything) == EXPECTED[:3]
    with pytest.raises(UserError, match="no split 'test'; its splits are train, validation"):
        open_source(many, image_size=32, split="test", options=options)


def test_a_row_that_names_a_file_outside_is_not_followed(tmp_path: Path, options: Reading) -> None:
    from datasets import Dataset

    folder(tmp_path, {"secret.png": png(1)})
    made = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2}
    Dataset.from_dict(made).to_parquet(tmp_path / "pack" / "rows.parquet")
    source = open_source(tmp_path / "pack", image_size=32, options=options)
    with pytest.raises(UserError, match="no picture is stored in this row"):
        source[0]


# --- splits of data that have none -----------------------------------------------------------


def test_folders_named_after_splits(tmp_path: Path, options: Reading) -> None:
    root = folder(tmp_path, {"train/a.png": png(1), "validation/b.png": png(2)})
    assert rows(open_source(root, image_size=32, options=options)) == [(1, None)]
    assert rows(open_source(root, image_size=32, split="val", options=options)) == [(2, None)]
    with pytest.raises(UserError, match=r"no folder for split 'test' \(folders: train, validation"):
        open_source(root, image_size=32, split="test", options=options)


def test_data_without_splits_are_never_given_as_validation(
    tmp_path: Path, options: Reading
) -> None:
    """Measuring on training pictures by mistake is worse than stopping."""
    root = folder(tmp_path, captioned(3))
    with pytest.raises(UserError, match="not divided into splits, so there is no 'val'"):
        open_source(root, image_size=32, split="val", options=options)


def test_a_split_is_known_without_reading(tmp_path: Path, options: Reading) -> None:
    plain = folder(tmp_path / "plain", captioned(3))
    assert [has_split(plain, s) for s in ("train", "val", "test", "all")] == [1, 0, 0, 1]
    assert has_split(plain, "val", held_out=0.1)
    divided = folder(tmp_path / "divided", {"train/a.png": png(1), "validation/b.png": png(2)})
    assert [has_split(divided, s) for s in ("train", "val", "test")] == [True, True, False]
    shard(tmp_path / "packs" / "x-train-0.tar", captioned(1))
    (tmp_path / "packs" / "x-test-0.tar").write_bytes(b"damaged")
    assert [has_split(tmp_path / "packs", s) for s in ("train", "val", "test")] == [1, 0, 1]
    table().train_test_split(2, seed=0).save_to_disk(tmp_path / "disk")
    assert [has_split(tmp_path / "disk", s) for s in ("train", "val", "test")] == [1, 0, 1]
    with pytest.raises(UserError, match="does not exist"):
        has_split(tmp_path / "none", "val")


def test_one_row_is_in_both_parts(tmp_path: Path) -> None:
    root = folder(tmp_path, captioned(1))
    for split in ("train", "val"):
        source = open_source(root, image_size=32, split=split, options=Reading(held_out=0.2))
        assert rows(source) == [(0, "grey 0")]


def test_rows_of_one_name_are_different_rows(tmp_path: Path, options: Reading) -> None:
    """Shards number their samples from nought, each of them."""
    for number in range(2):
        files = {"0.png": png(10 + number), "0.txt": f"grey {10 + number}"}
        shard(tmp_path / f"{number}.tar", files)
    source = open_source(tmp_path, image_size=32, options=options)
    assert len({sample.key for sample in source}) == 1
    assert [sample.row for sample in source] == [0, 1]
    assert len(SourcePictures(source, 32)) == 2


def test_texts_are_read_without_their_pictures(tmp_path: Path, options: Reading) -> None:
    files = {**captioned(3), "p001.png": b"no picture", "p002.txt": "more"}
    source = open_source(folder(tmp_path, files), image_size=32, options=options)
    assert list(source.texts(9)) == ["grey 0", "grey 1", "more"]
    assert list(source.texts(1)) == ["grey 0"]
    assert not source.skipped


def test_held_out_divides_once_and_for_all(tmp_path: Path) -> None:
    root = folder(tmp_path, captioned(40))
    options = Reading(held_out=0.2)

    def shades(split: str) -> list[int]:
        source = open_source(root, image_size=32, split=split, options=options)
        return [row[0] for row in rows(source)]

    train, val = shades("train"), shades("val")
    assert len(val) == 8
    assert sorted(train + val) == list(range(40)) == shades("all")
    assert shades("val") == val


# --- edits and questions ---------------------------------------------------------------------


def edit_files() -> dict[str, bytes | str]:
    extra = json.dumps({"src_caption": "dark", "tgt_caption": "light"})
    return {
        "e0.src.png": png(10), "e0.tgt.png": png(20), "e0.txt": "lighten", "e0.json": extra,
        "e1.src.png": png(30), "e1.tgt.png": png(40), "e1.txt": "lighten more",
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["shard", "folder"])
def test_edits(tmp_path: Path, options: Reading, layout: str) -> None:
    files = edit_files()
    path = shard(tmp_path / "e.tar", files) if layout == "shard" else folder(tmp_path, files)
    assert detect_kind(path, options=options) == "edit"
    source = open_source(path, image_size=32, kind="edit", options=options)
    first, second = source
    assert (shade(first.source), shade(first.target)) == (10, 20)
    assert (first.key, first.instruction) == ("e0", "lighten")
    assert (first.source_caption, first.target_caption) == ("dark", "light")
    assert (second.instruction, second.target_caption) == ("lighten more", None)
    plain = open_source(path, image_size=32, options=options)
    assert rows(plain) == [(20, "light"), (40, None)], "the wanted pictures, as pictures"


def test_an_edit_with_a_part_missing_is_skipped(tmp_path: Path, options: Reading) -> None:
    files = edit_files()
    del files["e1.tgt.png"]
    path = shard(tmp_path / "e.tar", files)
    source = open_source(path, image_size=32, kind="edit", options=options)
    assert [sample.key for sample in source] == ["e0", "e0"]
    assert source.skipped == (Skipped("e1", "no target picture"),)


def test_questions_in_every_form(tmp_path: Path, options: Reading) -> None:
    files = {
        "a.png": png(1), "a.txt": "Q: what colour? A: dark grey\nQ: is it red? A: no",
        "b.png": png(2), "b.json": json.dumps({"qa": [["how many?", "one"], ["bad"]]}),
        "c.png": png(3), "c.json": json.dumps({"question": "big?", "answer": "yes"}),
    }  # fmt: skip
    path = folder(tmp_path, files)
    assert detect_kind(path, options=options) == "question"
    pairs = [sample.pairs for sample in open_source(path, image_size=32, kind="question")]
    assert pairs == [
        (("what colour?", "dark grey"), ("is it red?", "no")),
        (("how many?", "one"),),
        (("big?", "yes"),),
    ]
    plain = open_source(path, image_size=32)
    assert [sample.caption for sample in plain] == [None] * 3, "questions are no captions"


def test_asking_for_a_kind_that_is_not_there(tmp_path: Path, options: Reading) -> None:
    root = folder(tmp_path, captioned(3))
    with pytest.raises(UserError, match="holds samples of kind 'image', not 'edit'"):
        open_source(root, image_size=32, kind="edit", options=options)


# --- broken pictures -------------------------------------------------------------------------


def spoiled(root: Path, good: int, broken: int) -> Path:
    """Broken files first, so that a good one always follows."""
    folder(root, captioned(good))
    return folder(root, {f"broken{k:03}.png": png(9)[:60] for k in range(broken)})


def test_broken_pictures_are_named_counted_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "a.png": "this is a text", "b.png": png(7), "c.png": png(1, (1, 1)),
        "d.jpg": b"", "e.png": png(8), "f.png": png(9), "f.txt": b"\xff\xfe\xfa",
    }  # fmt: skip
    source = open_source(folder(tmp_path, files), image_size=32)
    with caplog.at_level(logging.WARNING):
        shades = [shade(sample.image) for sample in source]
    assert shades == [7, 7, 8, 8, 8, 7], "the next usable one stands in, around the end"
    assert [one.key for one in source.skipped] == ["a.png", "c.png", "d.jpg", "f.png"]
    reasons = [one.reason.split(" (")[0] for one in source.skipped]
    assert reasons == [
        "not a picture", "too small: 1 x 1, at least 16 on each side", "empty file",
        "f.txt is not valid",
    ]  # fmt: skip
    assert len(caplog.records) == 4, "each is said once"
    assert "skipped a.png: not a picture" in caplog.text
    assert source.readable() == [1, 4]


def test_what_stands_in_does_not_depend_on_what_was_read_before(tmp_path: Path) -> None:
    path = spoiled(tmp_path, 6, 3)
    forward = [sample.key for sample in open_source(path, image_size=32)]
    source = open_source(path, image_size=32)
    backward = [source[index].key for index in reversed(range(9))][::-1]
    together = [sample.key for sample in open_source(path, image_size=32).batch(range(9))]
    assert forward == backward == together


def test_the_run_stops_above_the_share(tmp_path: Path) -> None:
    source = open_source(spoiled(tmp_path, 97, 6), image_size=32, options=Reading(broken_allowed=0))
    with pytest.raises(UserError) as caught:
        source.readable()
    message = str(caught.value)
    assert "of the 103 rows" in message
    assert "allowed are 5" in message
    assert message.count("broken00") == 3, "the first few are named"
    assert "\n" not in message


def test_the_run_goes_on_at_the_share(tmp_path: Path) -> None:
    source = open_source(spoiled(tmp_path, 97, 5), image_size=32, options=Reading(broken_allowed=0))
    assert len(source.readable()) == 97
    assert len(source.skipped) == 5


def test_a_few_broken_ones_are_borne_in_small_folders(tmp_path: Path) -> None:
    source = open_source(spoiled(tmp_path, 3, 10), image_size=32)
    assert len(source.readable()) == 3
    with pytest.raises(UserError, match="11 of the 14 rows"):
        open_source(spoiled(tmp_path, 3, 11), image_size=32).readable()


def test_a_folder_of_broken_pictures_alone_stops(tmp_path: Path) -> None:
    source = open_source(spoiled(tmp_path, 0, 3), image_size=32)
    with pytest.raises(UserError, match=r"3 of the 3 rows of .* cannot be used, allowed are 2"):
        source[0]


@pytest.mark.parametrize("content", [{}, {"notes.md": "x", "sub/more.csv": "a,b"}])
def test_folders_without_pictures_are_refused(tmp_path: Path, content: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"holds no pictures; allowed are \.png, \.jpg"):
        open_source(folder(tmp_path, content), image_size=32)


def test_paths_that_hold_no_data_are_refused(tmp_path: Path, options: Reading) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "absent", image_size=32)
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "absent*.tar", image_size=32)
    folder(tmp_path, {"a.zip": b"x", "cut.tar": b"x" * 600})
    with pytest.raises(UserError, match=r"none of \.tar, \.tar\.gz, \.tgz, \.parquet"):
        open_source(tmp_path / "a.zip", image_size=32)
    with pytest.raises(UserError, match=r"cut\.tar cannot be read as WebDataset shards"):
        open_source(tmp_path / "cut.tar", image_size=32, options=options)
    with pytest.raises(UserError, match="holds no pictures; a WebDataset shard holds"):
        open_source(shard(tmp_path / "t.tar", {"a.txt": "x"}), image_size=32, options=options)


def test_a_shard_cut_short_is_refused(tmp_path: Path, options: Reading) -> None:
    data = gzip.compress(shard(tmp_path / "a.tar", captioned(50)).read_bytes())
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=r"cut\.tar\.gz cannot be read as WebDataset shards") as one:
        open_source(path, image_size=32, options=options)
    assert "\n" not in str(one.value)


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path, options: Reading) -> None:
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(folder(tmp_path, {"a.parquet": "x"}), image_size=32, options=options)


@pytest.mark.parametrize(
    "wrong",
    [{"broken_share": 2.0}, {"min_side": -1}, {"workers": -2}],
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: given"):
        Reading(**wrong)


# --- access and memory -----------------------------------------------------------------------


def test_indices(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, captioned(4)), image_size=32)
    assert len(source) == 4
    assert source[-1].key == "p003.png"
    assert [sample.key for sample in source.batch((2, 0, 2))] == [
        "p002.png", "p000.png", "p002.png",
    ]  # fmt: skip
    assert source.batch([]) == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            source[index]


def test_decoded_pictures_are_read_once(tmp_path: Path) -> None:
    root = folder(tmp_path, captioned(4))
    source = open_source(root, image_size=32)
    before = rows(source)
    for path in root.iterdir():
        path.unlink()
    assert rows(source) == before


def test_the_memory_of_decoded_pictures_is_bounded(tmp_path: Path) -> None:
    """Room for two pictures of 3 x 32 x 32: the files of the others must still be there."""
    root = folder(tmp_path, captioned(4))
    options = Reading(cache_bytes=2 * 3 * 32 * 32 + 100, broken_allowed=4)
    source = open_source(root, image_size=32, options=options)
    assert len(rows(source)) == 4
    for path in root.iterdir():
        path.unlink()
    assert {sample.key for sample in source} == {"p000.png", "p001.png"}


def test_samples_do_not_share_memory_with_the_cache(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path, captioned(2)), image_size=32)
    source[0].image.fill_(1.0)
    assert shade(source[0].image) == 0


def test_padding_instead_of_cropping(tmp_path: Path) -> None:
    root = folder(tmp_path, {"wide.png": png(0, (64, 16))})
    source = open_source(root, image_size=32, options=Reading(fit="pad"))
    assert to_bytes8(source[0].image)[0, :, 16].tolist() == [255] * 12 + [0] * 8 + [255] * 12


def test_the_extent_of_data_changes_with_their_files(tmp_path: Path) -> None:
    tables, disk, folder = (tmp_path / name for name in ("tables", "disk", "folder"))
    for place in (tables, disk, folder):
        place.mkdir()
    for number in range(2):
        (tables / f"{number}.parquet").write_bytes(b"123")
        (folder / f"{number}.png").write_bytes(b"123")
        (folder / f"{number}.txt").write_text("a caption")
    for name in ("state.json", "dataset_info.json", "data.arrow"):
        (disk / name).write_bytes(b"12")
    assert [extent(str(place)) for place in (tables, disk, folder)] == [
        "2 files of 6 bytes",
        "3 files of 6 bytes",
        "2 pictures",
    ]
    (tables / "1.parquet").write_bytes(b"1234")
    assert extent(str(tables)) == "2 files of 7 bytes"
