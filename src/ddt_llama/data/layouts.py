"""Find out what lies at a path: picture files, shards, Parquet files, a data set on disk.

The first step of `open_source`. Chooses files by split and lists folders of pictures with their
KEY.txt and KEY.json siblings; rows of everything else are read by `records`.
"""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddt_llama.config import UserError
from ddt_llama.data.images import SUFFIXES, BrokenImage, image_files
from ddt_llama.data.records import (
    SPLITS,
    Record,
    Records,
    merged,
    read_disk,
    read_metadata,
    read_parquet,
    read_shards,
    role_of,
    split_words,
)

SHARD = re.compile(r"\.(tar|tar\.gz|tgz)$")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_LIMIT = 1_000_000


def open_records(
    path: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    cache_dir: str | Path | None = None,
) -> Records:
    """Open the data at `path` (a folder, a file, or a pattern such as "pack/open-*.tar.gz").

    Among several files the ones named after `split` are taken (NAME-train-00000.tar.gz); files
    that name no split belong to "train". Raises UserError where nothing readable is there.
    """
    text = str(path)
    place = Path(path).expanduser()
    if not place.exists():
        if not glob.has_magic(text):
            raise UserError(f"data: {text} does not exist; give a folder, shards or Parquet files")
        files = sorted(Path(name) for name in glob.glob(os.path.expanduser(text)))
        return _from_files(_of_split(files, split, text), text, image_column, cache_dir)
    if place.is_file():
        return _from_files([place], text, image_column, cache_dir)
    if any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return read_disk(place, split, image_column)
    files = sorted(item for item in place.iterdir() if item.is_file())
    for kind in (_is_shard, _is_parquet):
        chosen = [item for item in files if kind(item)]
        if chosen:
            return _from_files(_of_split(chosen, split, text), text, image_column, cache_dir)
    return _from_folder(_split_folder(place, split), cache_dir)


def _is_shard(path: Path) -> bool:
    return SHARD.search(path.name.lower()) is not None


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and path.name not in METADATA


def _of_split(files: Sequence[Path], split: str, path: str) -> list[Path]:
    wanted = split_words(split)
    known = {word for words in SPLITS.values() for word in words}
    named = {item: known.intersection(re.split(r"[-_.]", item.name.lower())) for item in files}
    chosen = [item for item in files if named[item].intersection(wanted)]
    if split == "train":
        chosen = chosen or [item for item in files if not named[item]]
    if not chosen:
        given = ", ".join(item.name for item in files[:5]) or "no files"
        raise UserError(
            f"data: {path} has no files of split {split!r} (found: {given}); "
            f"name them NAME-{split}-00000.tar.gz or choose another split"
        )
    return chosen


def _split_folder(folder: Path, split: str) -> Path:
    words = split_words(split)
    inside = {item.name.lower(): item for item in folder.iterdir() if item.is_dir()}
    for word in words:
        if word in inside:
            return inside[word]
    marked = {word for others in SPLITS.values() for word in others}.intersection(inside)
    if split != "train" or marked:
        given = ", ".join(sorted(inside)[:5]) or "none"
        raise UserError(
            f"data: {folder} has no folder for split {split!r} (folders: {given}); "
            f"make {folder / split} or choose another split"
        )
    return folder


def _from_files(
    files: Sequence[Path], path: str, image_column: str | None, cache_dir: str | Path | None
) -> Records:
    if all(_is_shard(item) for item in files):
        return read_shards(files, cache_dir)
    if all(_is_parquet(item) for item in files):
        return read_parquet(files, path, image_column, cache_dir)
    raise UserError(
        f"data: {path} is none of .tar, .tar.gz, .tgz, .parquet; "
        "give one kind of these, or a folder of pictures"
    )


def _from_folder(folder: Path, cache_dir: str | Path | None) -> Records:
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if metadata:
        return read_metadata(folder, metadata[0], cache_dir)
    groups = list(_groups(folder))
    if not groups:
        raise UserError(
            f"data: {folder} holds no pictures; allowed are {', '.join(SUFFIXES)}, "
            ".tar, .tar.gz and .parquet files"
        )

    def read(index: int) -> Record:
        key, pictures = groups[index]
        return Record(key, pictures, _siblings(folder / key, key))

    return Records(len(groups), read, "folder")


def _groups(folder: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    """Yield key and pictures; KEY.src.png and KEY.tgt.png are one edit."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    pairs: dict[str, dict[str, Path]] = {}
    for path in sorted(image_files(files)):
        name = path.relative_to(folder).as_posix()
        stem, _, part = path.stem.rpartition(".")
        if stem and part in ("src", "tgt"):
            key = path.with_name(stem).relative_to(folder).as_posix()
            pairs.setdefault(key, {})[role_of(part)] = path
        else:
            pairs[name] = {"image": path}
    yield from pairs.items()


def _siblings(path: Path, key: str) -> dict[str, Any]:
    stem = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    texts = {}
    for suffix in (".txt", ".json"):
        sibling = stem.with_name(stem.name + suffix)
        if sibling.is_file():
            if sibling.stat().st_size > TEXT_LIMIT:
                raise BrokenImage(key, f"{sibling.name} is longer than {TEXT_LIMIT} bytes")
            try:
                text = sibling.read_text(encoding="utf-8-sig")
                texts[suffix] = json.loads(text) if suffix == ".json" else text
            except ValueError as error:
                raise BrokenImage(key, f"{sibling.name} is not valid ({error})") from error
    return merged(texts.get(".txt"), texts.get(".json"))
