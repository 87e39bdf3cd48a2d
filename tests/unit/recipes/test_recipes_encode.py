"""Encoding can be stopped and shared out: the shards are always the same."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddt_llama.config import UserError
from ddt_llama.data.codes import MANIFEST, Shard, read_manifest
from ddt_llama.data.sources import Reading, open_source
from ddt_llama.generation import load
from ddt_llama.generation.model import Model
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.encode import (
    Advance,
    Encoded,
    ShardEncoder,
    encode_pictures,
    in_this_process,
)
from ddt_llama.tokenizer import SpatialTokenizer
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.tokenizer.spatial import SpatialTokenizerConfig


@pytest.fixture
def model(tmp_path: Path) -> Model:
    config = SpatialTokenizerConfig(
        image_size=16,
        widths=(8, 8, 8),
        blocks=(1, 1, 1),
        groups=4,
        quantizer=QuantizerConfig(codebook_size=64, code_dim=8),
    )
    torch.manual_seed(0)
    made = Model(SpatialTokenizer(config).eval(), name="small")
    made.save(tmp_path / "model")
    return load(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Ten pictures of noise; the fourth is broken."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(10):
        noise = torch.randint(256, (20, 20, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    (folder / "3.png").write_bytes(b"\x89PNG and no more")
    return DataConfig((str(folder),), cache_dir=str(tmp_path / "arrow"), held_out=0)


def encoded(tmp_path: Path, data: DataConfig, out: str, **others: Any) -> Encoded:
    sizes = {"shard_rows": 4, "batch": 2} | others
    return encode_pictures(str(tmp_path / "model"), data, tmp_path / out, **sizes)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_codes_are_those_of_each_picture_alone(
    tmp_path: Path, model: Model, data: DataConfig
) -> None:
    done = encoded(tmp_path, data, "out")
    assert (done.rows, done.skipped, done.fresh) == (9, 1, 9)
    assert sorted(shards(tmp_path / "out")) == [f"codes-0000{n}.parquet" for n in range(3)]
    reading = Reading(cache_dir=str(tmp_path / "arrow"))
    source = open_source(tmp_path / "out", image_size=16, codes=True, options=reading)
    assert [one.key for one in source] == [f"{n}.png" for n in range(10) if n != 3]
    assert [one.caption for one in source] == [f"number {n}" for n in range(10) if n != 3]
    for sample in source:
        alone = model.encode(str(Path(data.paths[0]) / sample.key))[0]
        assert sample.image.tolist() == alone.tolist()
    found = read_manifest(tmp_path / "out")
    assert found is not None
    assert found[0]["codes"]["fingerprint"] == model.tokenizer.fingerprint()
    ((key, reason),) = found[1][0].skipped
    assert key == "3.png"
    assert "cannot be" in reason or "not a picture" in reason


def test_rows_that_repeat_a_row_are_left_out(
    tmp_path: Path, model: Model, data: DataConfig
) -> None:
    """The same key with another picture or text is another row."""
    rows = []
    for key, number, text in (("a", 0, "x"), ("a", 1, "x"), ("a", 0, "y"), ("a", 0, "x")):
        rows.append({"key": key, "caption": text})
        rows[-1]["image"] = (Path(data.paths[0]) / f"{number}.png").read_bytes()
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    features = Features({"key": Value("string"), "caption": Value("string"), "image": Picture()})
    table = Dataset.from_list(
        [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows], features
    )
    table.to_parquet(tmp_path / "rows.parquet")
    done = encoded(tmp_path, replace(data, paths=(str(tmp_path / "rows.parquet"),)), "out")
    assert (done.rows, done.skipped) == (3, 1)
    lines = (tmp_path / "out" / MANIFEST).read_text().splitlines()
    told = ["a", "the same as row 0 (key, pictures and texts)"]
    assert json.loads(lines[1])["skipped"] == [told]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, model: Model, data: DataConfig) -> None:
    encoded(tmp_path, data, "whole")
    asked: list[list[int]] = []

    def killed(encoder: ShardEncoder, numbers: Sequence[int], advance: Advance) -> Iterator[Shard]:
        asked.append(list(numbers))
        yield encoder(1, advance)
        encoder(0, advance)  # written, and not in the manifest yet
        raise KeyboardInterrupt

    def counted(encoder: ShardEncoder, numbers: Sequence[int], advance: Advance) -> Iterator[Shard]:
        asked.append(list(numbers))
        return in_this_process(encoder, numbers, advance)

    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path, data, "parts", engine=killed)
    done = encoded(tmp_path, data, "parts", engine=counted)
    assert asked == [[0, 1, 2], [0, 2]]
    assert (done.rows, done.skipped, done.fresh) == (9, 1, 5)
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    (tmp_path / "parts" / "codes-00002.parquet").unlink()  # a lost one is made again
    encoded(tmp_path, data, "parts", engine=counted)
    assert asked[2:] == [[2]]
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")


def test_a_folder_holds_one_encoding(tmp_path: Path, model: Model, data: DataConfig) -> None:
    encoded(tmp_path, data, "out")
    before = shards(tmp_path / "out")
    with pytest.raises(UserError, match="shard_rows was 4, now 5"):
        encoded(tmp_path, data, "out", shard_rows=5)
    (Path(data.paths[0]) / "10.png").write_bytes((Path(data.paths[0]) / "0.png").read_bytes())
    with pytest.raises(UserError, match="rows was 10, now 11"):
        encoded(tmp_path, data, "out")
    (Path(data.paths[0]) / "10.png").unlink()
    tokenizer: Any = model.tokenizer
    tokenizer.quantizer.codebook.neg_()
    model.save(tmp_path / "model")
    with pytest.raises(UserError, match=r"codes\.fingerprint was"):
        encoded(tmp_path, data, "out")
    assert shards(tmp_path / "out") == before
    with pytest.raises(UserError, match="holds other things"):
        encode_pictures(str(tmp_path / "model"), data, Path(data.paths[0]))
    assert not (Path(data.paths[0]) / ".lock").exists()
    again = replace(data, paths=(str(tmp_path / "out"),))
    with pytest.raises(UserError, match="holds codes of small"):
        encoded(tmp_path, again, "again")


def test_too_many_broken_pictures_stop_it(tmp_path: Path, model: Model, data: DataConfig) -> None:
    """What is encoded stays, and with more allowed it goes on."""
    folder = Path(data.paths[0])
    for number in range(11, 31):
        (folder / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"11 of the 30 rows .* cannot be used, allowed are 10"):
        encoded(tmp_path, data, "out", shard_rows=1)
    kept = shards(tmp_path / "out")
    assert kept
    done = encoded(tmp_path, replace(data, broken_share=0.8), "out", shard_rows=1)
    assert (done.rows, done.skipped) == (9, 21)
    assert kept.items() <= shards(tmp_path / "out").items()


def test_one_process_encodes_into_a_folder(tmp_path: Path, model: Model, data: DataConfig) -> None:
    def meddling(
        encoder: ShardEncoder, numbers: Sequence[int], advance: Advance
    ) -> Iterator[Shard]:
        with pytest.raises(UserError, match="another process encodes here"):
            encoded(tmp_path, data, "out")
        return in_this_process(encoder, numbers, advance)

    assert encoded(tmp_path, data, "out", engine=meddling).rows == 9
