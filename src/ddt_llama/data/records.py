"""Read rows of shards, Parquet files and Hugging Face data sets: keys, encoded pictures, texts.

Below `layouts`, which finds the files, and `sources`, which decodes. Reading is done by the
`datasets` library (Apache Arrow, memory-mapped, so random access costs no memory), by its
builders directly: nothing is fetched, counted or executed, and its own decoder stays off.
"""

import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from ddt_llama.config import UserError, load_json
from ddt_llama.data.codes import COLUMNS, CodeFacts
from ddt_llama.data.images import SUFFIXES, BrokenImage

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
    "all": (),
}
KEYS = ("key", "__key__", "id")  # columns of tables that name a row
# Names of the two pictures of an edit in public data sets (InstructPix2Pix, MagicBrush, ours).
EDIT_COLUMNS = (
    ("src", "tgt"),
    ("source", "target"),
    ("source_img", "target_img"),
    ("source_image", "target_image"),
    ("original_image", "edited_image"),
    ("input_image", "edited_image"),
)


Stored = bytes | Path | Integer[np.ndarray, " k"]  # a picture: its file, or its codes


@dataclass(frozen=True)
class Record:
    """One row: its key, its pictures ("image", or "source" and "target"), its fields."""

    key: str
    pictures: Mapping[str, Stored]
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Records:
    """A row-addressable data set; `read` may raise BrokenImage for a row without a picture.

    `list_keys` gives the key of every row without reading pictures. `codes`: whose codes the rows
    hold in place of pictures; `read_many` is then the faster way to several.
    """

    count: int
    read: Callable[[int], Record]
    layout: str
    list_keys: Callable[[], Sequence[str]]
    codes: CodeFacts | None = None
    read_many: Callable[[Sequence[int]], list[Record]] | None = None


def read_shards(files: Sequence[Path], cache_dir: str | Path | None) -> Records:
    """Read WebDataset shards: KEY.webp (or KEY.src.webp, KEY.tgt.webp), KEY.txt, KEY.json."""
    with _reading(files[0], "WebDataset shards"):
        from datasets import Features, Image, Json, Value
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        # The builder guesses types from the first five rows and drops JSON fields that come later;
        # told the columns, it neither guesses nor drops.
        kinds = {
            "picture": lambda: Image(decode=False),
            "json": Json,
            "txt": lambda: Value("string"),
        }
        names = list(dict.fromkeys(name for item in files for name in _shard_columns(item)))
        if not any(_kind(name) == "picture" for name in names):
            raise UserError(
                f"data: {files[0]} holds no pictures; a WebDataset shard holds KEY.webp (or "
                f"{', '.join(SUFFIXES)}), KEY.txt, KEY.json"
            )
        columns = {name: kinds[_kind(name)]() for name in names}
        builder = WebDataset(
            cache_dir=str(cache_dir) if cache_dir else None,
            data_files={"train": [glob.escape(str(item.resolve())) for item in files]},
            features=Features(columns | {"__key__": Value("string")}),
        )
        builder.download_and_prepare()
        table: Any = builder.as_dataset(split="train")
    pictures = [name for name in columns if _kind(name) == "picture"]

    def read(index: int) -> Record:
        row = table[index]
        found = {
            role_of(name): row[name]["bytes"]
            for name in pictures
            if row[name] is not None and row[name]["bytes"] is not None
        }
        return Record(row["__key__"], found, merged(row.get("txt"), row.get("json")))

    return Records(len(table), read, "webdataset", lambda: table.data["__key__"].to_pylist())


def _shard_columns(shard: Path) -> list[str]:
    """Return the columns of a shard that we read, from the names of its first thousand files."""
    names = []
    with tarfile.open(shard) as archive:
        for _, member in zip(range(1000), archive, strict=False):
            _, _, extension = os.path.basename(member.name).partition(".")
            if member.isfile() and _kind(extension) and extension not in names:
                names.append(extension)
    return names


def _kind(extension: str) -> str:
    parts = extension.lower().split(".")
    if "." + parts[-1] in SUFFIXES and (len(parts) == 1 or parts[:-1] in (["src"], ["tgt"])):
        return "picture"
    return extension if extension in ("txt", "json") else ""


def role_of(name: str) -> str:
    """Return which picture of a row "webp", "src.webp" or "tgt.webp" is."""
    return {"src": "source", "tgt": "target"}.get(name.lower().split(".")[0], "image")


def read_parquet(
    files: Sequence[Path], path: str, image_column: str | None, cache_dir: str | Path | None
) -> Records:
    """Read Parquet files with a column of encoded pictures."""
    return _from_table(_parquet_table(files, cache_dir), path, image_column, "parquet")


def read_codes(files: Sequence[Path], facts: CodeFacts, cache_dir: str | Path | None) -> Records:
    """Read Parquet shards of codes; they are mapped into memory."""
    table = _parquet_table(files, cache_dir).with_format("arrow")
    roles = {column: role for role, column in COLUMNS.items() if column in table.column_names}
    texts = [one for one in table.column_names if one not in (*roles, "key", "hash")]

    def read_many(indices: Sequence[int]) -> list[Record]:
        part: Any = table[list(indices)].combine_chunks()
        columns = {name: part[name].to_pylist() for name in ("key", *texts)}
        codes = {
            role: part[column].chunk(0).flatten().to_numpy().reshape(-1, facts.num_tokens)
            for column, role in roles.items()
        }
        return [
            Record(
                columns["key"][row],
                {role: values[row] for role, values in codes.items()},
                {name: columns[name][row] for name in texts},
            )
            for row in range(len(part))
        ]

    def keys() -> list[str]:
        return table.data["key"].to_pylist()

    return Records(len(table), lambda i: read_many([i])[0], "codes", keys, facts, read_many)


def _parquet_table(files: Sequence[Path], cache_dir: str | Path | None) -> Any:
    with _reading(files[0], "Parquet"):
        from datasets.packaged_modules.parquet.parquet import Parquet

        builder = Parquet(
            cache_dir=str(cache_dir) if cache_dir else None,
            data_files={"train": [glob.escape(str(item.resolve())) for item in files]},
        )
        builder.download_and_prepare()
        return builder.as_dataset(split="train")


def stored_splits(folder: Path) -> tuple[str, ...]:
    """Return the names of the splits of a data set written by `save_to_disk`."""
    return tuple(map(str, load_json(folder / "dataset_dict.json").get("splits", ())))


def read_disk(folder: Path, split: str, image_column: str | None) -> Records:
    """Read one split of a data set written by `save_to_disk`."""
    with _reading(folder, "a data set of save_to_disk"):
        from datasets import Dataset, concatenate_datasets, load_from_disk

        table: Any = load_from_disk(str(folder))
        if split == "all" and not isinstance(table, Dataset):
            table = concatenate_datasets(list(table.values()))
    if not isinstance(table, Dataset):
        chosen = [word for word in SPLITS[split] if word in table]
        if not chosen:
            raise UserError(
                f"data: {folder} has no split {split!r}; its splits are {', '.join(table)}"
            )
        table = table[chosen[0]]
    return _from_table(table, str(folder), image_column, "disk")


def _from_table(
    table: Any, path: str, image_column: str | None, layout: str, root: Path | None = None
) -> Records:
    """Read rows of a `datasets.Dataset`; files are opened only beneath `root`."""
    from datasets import Image

    roles = _picture_columns(table, path, image_column)
    for name, feature in table.features.items():
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))

    def read(index: int) -> Record:
        row = table[index]
        key = key_of(index, row, _stored_name(row[next(iter(roles))]))
        pictures = {role: _stored(row[name], key, root) for name, role in roles.items()}
        return Record(key, pictures, {k: v for k, v in row.items() if k not in roles})

    def keys() -> list[str]:
        pictures = next(iter(roles))
        named = [name for name in KEYS if name in table.column_names]
        columns = table.select_columns([*named, pictures]).with_format("arrow")[:]
        own = {name: columns[name].to_pylist() for name in named}
        files = _stored_names(columns[pictures])
        return [
            key_of(index, {name: own[name][index] for name in named}, file)
            for index, file in enumerate(files)
        ]

    return Records(len(table), read, layout, keys)


def key_of(index: int, row: Mapping[str, Any], file: str | None) -> str:
    """Return the key of a row: its own, the name of its file, or its number."""
    own = next((str(row[name]) for name in KEYS if row.get(name) is not None), None)
    return own or file or f"row {index}"


def _picture_columns(table: Any, path: str, image_column: str | None) -> dict[str, str]:
    from datasets import Image

    features = table.features
    if image_column is not None:
        if image_column not in features:
            raise UserError(
                f"image column: given {image_column!r}, the columns of {path} are "
                f"{', '.join(features)}"
            )
        return {image_column: "image"}
    for source, target in EDIT_COLUMNS:
        if source in features and target in features:
            return {source: "source", target: "target"}
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    named = [name for name in ("image", "img", "picture", "jpg", "png", "webp") if name in features]
    if not typed and not named:
        raise UserError(
            f"data: {path} has no column of pictures (columns: {', '.join(features)}); "
            "name it with --data.image-column"
        )
    return {(typed or named)[0]: "image"}


def _stored(value: Any, key: str, root: Path | None) -> bytes | Path:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        if root is not None and value.get("path"):
            place = Path(value["path"])
            if place.resolve().is_relative_to(root.resolve()):
                return place
    raise BrokenImage(key, "no picture is stored in this row")


def _stored_name(value: Any) -> str | None:
    return value.get("path") if isinstance(value, dict) else None


def _stored_names(column: Any) -> list[str | None]:
    """Return what `_stored_name` does of a whole column, without its pictures."""
    from pyarrow import types

    kind = column.type
    if not types.is_struct(kind) or kind.get_field_index("path") < 0:
        return [None] * len(column)
    return [name for part in column.chunks for name in part.field("path").to_pylist()]


def read_metadata(folder: Path, metadata: Path, cache_dir: str | Path | None) -> Records:
    """Read a picture folder whose captions stand in a metadata file (`imagefolder`)."""
    with _reading(metadata, "image folder metadata"):
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

        builder = ImageFolder(
            cache_dir=str(cache_dir) if cache_dir else None,
            data_files={"train": [glob.escape(str(metadata.resolve()))]},
            drop_labels=True,
        )
        builder.download_and_prepare()
        table = builder.as_dataset(split="train")
    return _from_table(table, str(folder), None, "folder", root=folder)


def merged(text: str | None, extra: Any) -> dict[str, Any]:
    """Return the fields of a JSON object, with the .txt caption above them."""
    fields = dict(extra) if isinstance(extra, dict) else {}
    if isinstance(extra, str):
        fields["text"] = extra
    return fields | ({"txt": text} if text is not None else {})


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever `datasets` raises about the files into one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"data: reading {what} needs the datasets package; pip install 'ddt-llama[train]'"
        ) from error
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"data: {path} cannot be read as {what} ({reason})") from error
