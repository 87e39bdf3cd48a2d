"""Find out what lies at a path: picture files, shards, Parquet files, a data set on disk.

The first step of `open_source`. Chooses files by split and lists folders of pictures with their
KEY.txt and KEY.json siblings; rows of everything else are read by `records`.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddt_llama.config import UserError
from ddt_llama.data.codes import CodeFacts, common_facts, refuse_gaps
from ddt_llama.data.images import SUFFIXES, BrokenImage, image_files
from ddt_llama.data.order import permuted
from ddt_llama.data.records import (
    SPLITS,
    Record,
    Records,
    merged,
    read_codes,
    read_disk,
    read_metadata,
    read_parquet,
    read_shards,
    role_of,
    stored_splits,
)

LOG = logging.getLogger(__name__)
Layout = Literal["shards", "parquet", "disk", "folder"]
FILES: dict[Layout, re.Pattern[str]] = {
    "shards": re.compile(r"\.(tar|tar\.gz|tgz)$"),
    "parquet": re.compile(r"\.parquet$"),
}
HELD_OUT_KEY = (0x68656C64,)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_LIMIT = 1_000_000


def open_records(
    path: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    cache_dir: str | Path | None = None,
    held_out: float = 0.0,
) -> Records:
    """Open the data at `path` (a folder, a file, or a pattern such as "pack/open-*.tar.gz").

    Files named after splits (NAME-train-00000.tar.gz) and folders train, val, test divide the data;
    `split="all"` takes everything. Data that are not divided are all "train", unless `held_out`
    gives this share of the rows, chosen once and for all, to "val". Raises UserError where nothing
    readable is there.
    """
    if split not in SPLITS:
        raise UserError(f"split: given {split!r}, allowed are {', '.join(SPLITS)}")
    if not 0 <= held_out < 1:
        raise UserError(f"held_out: given {held_out}, allowed is a share from 0 to below 1")
    try:
        layout, places = _find(str(path))
        divided = _is_divided(layout, places)
        taken = split if divided else "all"
        if not divided and split not in ("train", "all") and not (held_out and split == "val"):
            raise UserError(
                f"data: {path} is not divided into splits, so there is no {split!r}; name files "
                f"NAME-{split}-00000.tar.gz, make a folder {split}, or set held_out"
            )
        if layout == "disk":
            records = read_disk(places[0], taken, image_column)
        elif layout == "folder":
            records = _joined(
                [_read_folder(one, cache_dir) for one in _folders_of(places[0], taken)]
            )
        elif layout == "shards":
            records = read_shards(_split_files(places, taken, str(path)), cache_dir)
        else:
            files = _split_files(places, taken, str(path))
            facts = common_facts(files)
            if facts is None:
                records = read_parquet(files, str(path), image_column, cache_dir)
            else:
                refuse_gaps(Path(path).expanduser())
                records = read_codes(files, facts, cache_dir)
    except OSError as error:
        raise UserError(f"data: {path} cannot be read ({error.strerror or error})") from error
    if divided or not held_out or split == "all":
        return records
    return _part(records, split, held_out)


def has_split(path: str | Path, split: str, held_out: float = 0.0) -> bool:
    """Say whether `open_records` finds `split` at `path`; raises UserError where nothing is."""
    layout, places = _find(str(path))
    if not _is_divided(layout, places):
        return split in ("train", "all") or (split == "val" and held_out > 0)
    if split == "all":
        return True
    if layout == "disk":
        return any(word in stored_splits(places[0]) for word in SPLITS[split])
    if layout == "folder":
        return split in _split_folders(places[0])
    return any(split in _splits_named(item.name) for item in places)


def codes_at(path: str) -> CodeFacts | None:
    """Return whose codes lie at `path`, None for pictures; UserError where nothing is."""
    layout, places = _find(path)
    return common_facts(places) if layout == "parquet" else None


def extent(path: str) -> str:
    """Say how much lies at `path`, in words that change where a file is gone or is another.

    Of a folder of pictures their number alone: to look at each would take too long.
    """
    layout, places = _find(path)
    if layout == "folder":
        return f"{sum(len(pictures) for _, pictures in _groups(places[0]))} pictures"
    files = places if layout != "disk" else [one for one in places[0].rglob("*") if one.is_file()]
    return f"{len(files)} files of {sum(one.stat().st_size for one in files)} bytes"


def _find(path: str) -> tuple[Layout, list[Path]]:
    """Return how the data are laid out, and the files or the one folder that hold them."""
    place = Path(path).expanduser()
    if place.is_dir():
        inside = {item.name for item in place.iterdir()}
        if "dataset_dict.json" in inside or {"state.json", "dataset_info.json"} <= inside:
            return "disk", [place]
        files = sorted(item for item in place.iterdir() if item.is_file())
        for layout, suffix in FILES.items():
            chosen = [item for item in files if suffix.search(item.name.lower())]
            if chosen := [item for item in chosen if item.name not in METADATA]:
                if any(item.suffix.lower() in SUFFIXES for item in files):
                    LOG.warning("data: %s: pictures beside the %s are not read", path, layout)
                return layout, chosen
        return "folder", [place]
    files = [place] if place.exists() else sorted(map(Path, glob.glob(str(place))))
    if not files:
        raise UserError(f"data: {path} does not exist; give a folder, shards or Parquet files")
    for layout, suffix in FILES.items():
        if all(item.is_file() and suffix.search(item.name.lower()) for item in files):
            return layout, files
    raise UserError(
        f"data: {path} is none of .tar, .tar.gz, .tgz, .parquet; "
        "give files of one of these kinds, or a folder of pictures"
    )


def _splits_named(name: str) -> set[str]:
    words = set(re.split(r"[-_.]", name.lower()))
    return {split for split in ("train", "val", "test") if words.intersection(SPLITS[split])}


def _is_divided(layout: Layout, places: Sequence[Path]) -> bool:
    if layout == "disk":
        return (places[0] / "dataset_dict.json").is_file()
    if layout == "folder":
        return bool(_split_folders(places[0]))
    return any(_splits_named(item.name) for item in places)


def _split_files(files: Sequence[Path], split: str, path: str) -> Sequence[Path]:
    if split == "all":
        return files
    chosen = [item for item in files if split in _splits_named(item.name)]
    if beside := [item.name for item in files if not _splits_named(item.name)]:
        LOG.warning("data: %s: in no split: %s", path, ", ".join(beside[:5]))
    if not chosen:
        given = ", ".join(item.name for item in files[:5])
        raise UserError(
            f"data: {path} has no files of split {split!r} (found: {given}); "
            f"name them NAME-{split}-00000.tar.gz or choose another split"
        )
    return chosen


def _split_folders(folder: Path) -> dict[str, Path]:
    inside = {item.name.lower(): item for item in folder.iterdir() if item.is_dir()}
    return {
        split: inside[word]
        for split in ("train", "val", "test")
        for word in SPLITS[split]
        if word in inside
    }


def _folders_of(folder: Path, split: str) -> list[Path]:
    """Return the folders of a split; of all the whole one, or each that has a table of its own."""
    inside = _split_folders(folder)
    if split == "all":
        tables = [one / name for one in inside.values() for name in METADATA]
        return [*inside.values()] if any(table.is_file() for table in tables) else [folder]
    if split not in inside:
        given = ", ".join(item.name for item in inside.values())
        raise UserError(
            f"data: {folder} has no folder for split {split!r} (folders: {given}); "
            f"make {folder / split} or choose another split"
        )
    _tell_left_out(folder, inside.values())
    return [inside[split]]


def _tell_left_out(folder: Path, divided: Iterable[Path]) -> None:
    """Warn of folders and pictures beside those of the splits, which no split gives."""
    beside = {
        item.name
        for item in folder.iterdir()
        if not item.name.startswith(".") and (item.is_dir() or item.suffix.lower() in SUFFIXES)
    }
    beside -= {one.name for one in divided}
    if beside:
        LOG.warning("data: %s: in no split: %s", folder, ", ".join(sorted(beside)[:5]))


def _joined(parts: Sequence[Records]) -> Records:
    """Return the rows of several behind each other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.count for part in parts)])

    def read(index: int) -> Record:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[number].read(index - int(starts[number]))

    def keys() -> list[str]:
        return [key for part in parts for key in part.list_keys()]

    return Records(int(starts[-1]), read, parts[0].layout, keys)


def _part(records: Records, split: str, held_out: float) -> Records:
    """Return the rows that `split` gets of data that are not divided; one row is in both."""
    if records.count < 2:
        return records
    count = min(max(1, round(held_out * records.count)), records.count - 1)
    order = permuted(np.arange(records.count), records.count, HELD_OUT_KEY)
    rows = np.sort(order[:count] if split == "val" else order[count:])

    def keys() -> list[str]:
        every = records.list_keys()
        return [every[int(row)] for row in rows]

    def read_many(indices: Sequence[int]) -> list[Record]:
        assert records.read_many is not None
        return records.read_many(rows[list(indices)].tolist())

    return replace(
        records,
        count=len(rows),
        read=lambda index: records.read(int(rows[index])),
        list_keys=keys,
        read_many=read_many if records.read_many is not None else None,
    )


def _read_folder(folder: Path, cache_dir: str | Path | None) -> Records:
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

    return Records(len(groups), read, "folder", lambda: [key for key, _ in groups])


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
            try:
                if sibling.stat().st_size > TEXT_LIMIT:
                    raise BrokenImage(key, f"{sibling.name} is longer than {TEXT_LIMIT} bytes")
                text = sibling.read_text(encoding="utf-8-sig")
                texts[suffix] = json.loads(text) if suffix == ".json" else text
            except OSError as error:
                reason = error.strerror
                raise BrokenImage(key, f"{sibling.name} cannot be read ({reason})") from error
            except (ValueError, RecursionError) as error:
                raise BrokenImage(key, f"{sibling.name} is not valid ({error})") from error
    return merged(texts.get(".txt"), texts.get(".json"))
