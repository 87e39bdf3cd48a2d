"""Shards of codes give back what was put in, say whose they are, and show what is missing."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddt_llama.config import UserError, to_dict
from ddt_llama.data.codes import (
    MANIFEST,
    CodeFacts,
    CodeRows,
    Shard,
    add_to_manifest,
    begin_manifest,
    mend_manifest,
    read_manifest,
)
from ddt_llama.data.sources import ImageSource, Reading, detect_kind, open_source

FACTS = CodeFacts("mine", "0123456789abcdef", num_tokens=3, codebook_size=70_000, image_size=8)
CAPTIONS = [{"caption": "one"}, {"caption": None}, {"caption": "three"}]


def codes(first: int, rows: int = 3) -> np.ndarray:
    return np.arange(first, first + 3 * rows).reshape(rows, 3)


def written(
    path: Path,
    texts: list[Mapping[str, Any]] = CAPTIONS,
    roles: Mapping[str, np.ndarray] | None = None,
    facts: CodeFacts = FACTS,
) -> Path:
    rows = CodeRows(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{path.stem}/{row}" for row in range(len(texts))]
    rows.add(names, ["0" * 16] * len(texts), texts, roles or {"image": codes(69_980)})
    rows.write(path)
    return path


def opened(path: Path, tmp_path: Path, kind: Any = "image", **others: Any) -> ImageSource[Any]:
    options = Reading(cache_dir=str(tmp_path / "arrow"), **others.pop("reading", {}))
    return open_source(path, image_size=8, kind=kind, codes=True, options=options, **others)


def test_pictures_come_back_as_their_codes(tmp_path: Path) -> None:
    source = opened(written(tmp_path / "codes-00000.parquet"), tmp_path)
    assert source.codes == FACTS
    assert [one.caption for one in source] == ["one", None, "three"]
    assert [one.key for one in source.batch([2, 0])] == ["codes-00000/2", "codes-00000/0"]
    assert (
        torch.stack([one.image for one in source.batch([1, 1])]).tolist()
        == [[69_983, 69_984, 69_985]] * 2
    )
    assert source[1].image.dtype == torch.int64
    assert list(source.texts(3)) == ["one", "three"]
    assert source.list_keys()[1] == "codes-00000/1"


def test_edits_and_questions_come_back(tmp_path: Path) -> None:
    edit = {"instruction": "grow", "src_caption": None, "tgt_caption": "a tree"}
    both = {"source": codes(0, 1), "target": codes(9, 1)}
    path = written(tmp_path / "edits" / "codes-00000.parquet", [edit], both)
    assert detect_kind(path, options=Reading(cache_dir=str(tmp_path / "arrow"))) == "edit"
    found = opened(path, tmp_path, "edit")[0]
    assert (found.source.tolist(), found.target.tolist()) == ([0, 1, 2], [9, 10, 11])
    texts = found.instruction, found.source_caption, found.target_caption
    assert texts == ("grow", None, "a tree")
    alone = opened(path, tmp_path)[0]  # the picture that an edit makes, with its caption
    assert (alone.image.tolist(), alone.caption) == ([9, 10, 11], "a tree")
    asked = [{"qa": [["how many?", "two"], ["red?", "no"]]}]
    path = written(tmp_path / "asked" / "codes-00000.parquet", asked, {"image": codes(0, 1)})
    assert opened(path, tmp_path, "question")[0].pairs == (("how many?", "two"), ("red?", "no"))


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_any_reader_of_parquet_opens_them(tmp_path: Path, size: int, dtype: str) -> None:
    from datasets import load_dataset

    facts = replace(FACTS, codebook_size=size)
    folder = tmp_path / "codes"
    for number in range(2):
        written(folder / f"codes-{number:05d}.parquet", roles={"image": codes(9)}, facts=facts)
    begin_manifest(folder, {"rows": 6})
    (folder / ".lock").touch()
    table = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["codes"].feature.dtype == dtype
    assert [list(row) for row in table["codes"]] == codes(9).tolist() * 2
    assert table["caption"][:3] == ["one", None, "three"]


def test_splits_and_held_out_rows_are_those_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "divided"
    written(folder / "train-00000.parquet")
    written(folder / "val-00000.parquet", CAPTIONS[:1], {"image": codes(0, 1)})
    assert len(opened(folder, tmp_path, split="train")) == 3
    assert opened(folder, tmp_path, split="val")[0].image.tolist() == [0, 1, 2]
    whole = written(tmp_path / "whole" / "codes-00000.parquet")
    parts = [
        opened(whole, tmp_path, split=split, reading={"held_out": 0.34})
        for split in ("train", "val")
    ]
    assert [len(part) for part in parts] == [2, 1]
    together = [sample.key for part in parts for sample in part.batch(range(len(part)))]
    assert sorted(together) == [f"codes-00000/{row}" for row in range(3)]
    assert sorted(key for part in parts for key in part.list_keys()) == sorted(together)


def test_codes_are_refused_where_pictures_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path / "codes-00000.parquet")
    with pytest.raises(UserError, match=r"holds codes of mine \(0123456789abcdef\), and pictures"):
        open_source(path, image_size=8)


def test_codes_of_two_tokenizers_in_one_folder_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "codes-00000.parquet")
    written(tmp_path / "codes-00001.parquet", facts=replace(FACTS, fingerprint="f" * 16))
    with pytest.raises(UserError, match=r"several tokenizers .*0000.parquet: mine \(0123.*ffff"):
        opened(tmp_path, tmp_path)


def manifest_of(folder: Path, rows: int) -> None:
    begin_manifest(folder, {**to_dict(FACTS), "rows": rows, "shard_rows": 3})


def test_a_manifest_survives_a_kill_while_a_line_is_written(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    manifest_of(tmp_path, 9)
    shards = [Shard(0, "a.parquet", 3, 10), Shard(1, "", 0, 0, (("x.png", "broken"),) * 3)]
    for shard in shards:
        add_to_manifest(tmp_path, shard)
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"number": 2, "fil')
    found = read_manifest(tmp_path)
    assert found is not None
    assert found[1] == dict(enumerate(shards))
    torn = (tmp_path / MANIFEST).read_bytes()
    assert torn.endswith(b'"fil')  # who reads leaves it: another process may be writing
    mend_manifest(tmp_path)
    add_to_manifest(tmp_path, replace(shards[0], bytes=11))  # made again
    found = read_manifest(tmp_path)
    assert found is not None
    assert found[0]["rows"] == 9
    assert found[1] == {0: replace(shards[0], bytes=11), 1: shards[1]}
    (tmp_path / MANIFEST).write_text("[]\n\n\n{\n")
    with pytest.raises(UserError, match="damaged, or no manifest"):
        read_manifest(tmp_path)


def test_training_sees_that_shards_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    path = written(folder / "codes-00000.parquet")
    manifest_of(folder, 6)
    add_to_manifest(folder, Shard(0, path.name, 3, path.stat().st_size))
    with pytest.raises(UserError, match="1 of 2 shards are there; the same ddt encode"):
        opened(folder, tmp_path)
    second = written(folder / "codes-00001.parquet")
    add_to_manifest(folder, Shard(1, second.name, 3, second.stat().st_size))
    assert len(opened(folder, tmp_path)) == 6
    path.unlink()
    with pytest.raises(UserError, match=r"codes-00000.parquet is gone or was changed"):
        opened(folder, tmp_path)
    second.write_bytes(b"")
    with pytest.raises(UserError, match=r"codes-00001.parquet cannot be read as Parquet"):
        opened(folder, tmp_path)


def test_a_shard_says_itself_whose_codes_it_holds(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = written(tmp_path / "codes-00000.parquet")
    told = pyarrow.parquet.read_metadata(path).metadata[b"ddt_llama"]
    assert json.loads(told)["fingerprint"] == FACTS.fingerprint
    assert not list(tmp_path.glob(".*"))
