"""Open real pictures as a list of samples: decoded, captioned, broken ones counted and skipped.

Stands between `records` (what lies on disk) and `stream` (the order of training). A source is
indexed: `source[i]` depends on the data and on i alone, so a stream resumes exactly.
"""

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from ddt_llama.config import UserError, check_range
from ddt_llama.data.images import MIN_SIDE, BrokenImage, Fit, decode, from_bytes8
from ddt_llama.data.layouts import open_records
from ddt_llama.data.records import Record, Records
from ddt_llama.data.samples import (
    EditSample,
    Form,
    Kind,
    QuestionSample,
    Sample,
    form_of,
    kind_of,
)
from ddt_llama.distributed import usable_cores

LOG = logging.getLogger(__name__)
CACHE_BYTES = 2 * 1024**3

Pixels = UInt8[np.ndarray, "3 h w"]
Codes = Integer[np.ndarray, " k"]


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A row before it is a sample: its key, its place, its pictures or their codes, its texts."""

    key: str
    place: int
    pictures: tuple[Pixels | Codes, ...]
    texts: Any


@dataclass(frozen=True)
class Reading:
    """Say how pictures are read and how many broken ones are borne.

    The run stops when more than max(`broken_allowed`, `broken_share` of the source) rows were
    skipped by one process. `cache_bytes` bounds the decoded pictures kept in memory (where a
    DataLoader reads in several processes, by all of them together); `cache_dir` is where
    `datasets` keeps its Arrow files (default: its own cache). `held_out` is the share of data not
    divided into splits that "val" gets and "train" lacks. `workers` 0 decodes on all cores (on one
    in a process of a DataLoader).
    """

    fit: Fit = "crop"
    min_side: int = MIN_SIDE
    broken_share: float = 0.05
    broken_allowed: int = 10
    cache_bytes: int = CACHE_BYTES
    cache_dir: str | None = None
    held_out: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        check_range(self, 0, 1, "broken_share")
        check_range(self, 0, math.inf, "min_side", "broken_allowed", "cache_bytes", "workers")


S = TypeVar("S")
T = TypeVar("T")


class ImageSource(Generic[S]):
    """A list of samples, read when asked for; made by `open_source`.

    A row that cannot be used is noted in `skipped` and the next usable row stands in for it, so
    that `source[i]` never depends on what was read before.
    """

    def __init__(
        self, records: Records, form: Form[S], image_size: int, name: str, options: Reading
    ) -> None:
        """Keep the records; nothing is decoded yet."""
        self.name = name
        self.layout = records.layout
        self.codes = records.codes  # whose these are, where the rows hold codes
        self.image_size = image_size
        self._records = records
        self.form = form
        self._options = options
        self._cache: dict[int, Row] = {}
        self._reader = get_worker_info()  # none in the main process
        self._cache_left = options.cache_bytes // (self._reader.num_workers if self._reader else 1)
        self._broken: dict[int, Skipped] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Return the number of rows, unusable ones included."""
        return self._records.count

    def __getitem__(self, index: int) -> S:
        """Return one sample; raises UserError when too many rows are broken."""
        return self.batch([index])[0]

    def __iter__(self) -> Iterator[S]:
        """Yield all samples in the order of the data."""
        return (self[index] for index in range(len(self)))

    def batch(self, indices: Sequence[int]) -> list[S]:
        """Return the samples of `indices`, decoded in parallel where they are not yet cached."""
        rows = self._rows([self._checked(index) for index in indices])
        if not rows:
            return []
        images = iter(_tensors([one for row in rows for one in row.pictures]))
        make = self.form.make
        return [
            make(row.key, row.place, [next(images) for _ in row.pictures], row.texts)
            for row in rows
        ]

    def rows(self, indices: Sequence[int]) -> list[Row | Skipped]:
        """Return what each row holds, or why it cannot be used; no other one stands in for it."""
        return self._in_parallel(self._row_or_reason, [self._checked(index) for index in indices])

    def list_keys(self) -> Sequence[str]:
        """Return the key of every row; no picture is read."""
        return self._records.list_keys()

    def texts(self, count: int) -> Iterator[str]:
        """Yield every text of the first `count` rows; no picture is decoded."""
        for index in range(min(count, len(self))):
            with contextlib.suppress(BrokenImage):
                yield from self.form.texts(self.form.parse(self._records.read(index))[1])

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Return the rows skipped so far, in the order of the data."""
        with self._lock:
            return tuple(self._broken[index] for index in sorted(self._broken))

    def readable(self) -> list[int]:
        """Decode every row once; return the indices of the usable ones."""
        for start in range(0, len(self), 256):
            self._rows(list(range(start, min(start + 256, len(self)))))
        return [index for index in range(len(self)) if index not in self._broken]

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, given index {index}")
        return index % len(self)

    def _rows(self, indices: list[int]) -> list[Row]:
        read_many = self._records.read_many
        if read_many is None:
            return self._in_parallel(self._usable, indices)
        found = []
        for index, record in zip(indices, read_many(indices), strict=True):
            try:
                found.append(self._parsed(index, record))
            except BrokenImage:
                found.append(self._usable(index))
        return found

    def _in_parallel(self, read: Callable[[int], T], indices: list[int]) -> list[T]:
        cold = sum(index not in self._cache for index in indices)
        if cold < 2 or self._workers == 1:
            return [read(index) for index in indices]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        return list(self._pool.map(read, indices))

    @property
    def _workers(self) -> int:
        return self._options.workers or (1 if self._reader else min(8, usable_cores()))

    def _row_or_reason(self, index: int) -> Row | Skipped:
        try:
            return self._decoded(index)
        except BrokenImage as error:
            return Skipped(error.key, error.reason)

    def _usable(self, index: int) -> Row:
        """Return the row, or the next usable one after it, around the end."""
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            row = self._cache.get(place)
            if row is not None:
                return row
            if place in self._broken:
                continue
            try:
                return self._decoded(place)
            except BrokenImage as error:
                self._skip(place, Skipped(error.key, error.reason))
        raise UserError(f"data: none of the {len(self)} rows of {self.name} can be used")

    def _decoded(self, index: int) -> Row:
        row = self._parsed(index, self._records.read(index))
        if self.codes is not None:
            return row
        size = sum(one.nbytes for one in row.pictures)
        with self._lock:
            if size <= self._cache_left and index not in self._cache:
                self._cache[index] = row
                self._cache_left -= size
        return row

    def _parsed(self, index: int, record: Record) -> Row:
        pictures, texts = self.form.parse(record)
        options = self._options
        read = tuple(
            one
            if isinstance(one, np.ndarray)
            else decode(
                one, self.image_size, name=record.key, fit=options.fit, min_side=options.min_side
            )
            for one in pictures
        )
        return Row(record.key, index, read, texts)

    def _skip(self, index: int, what: Skipped) -> None:
        with self._lock:
            known = index in self._broken
            self._broken[index] = what
            count = len(self._broken)
        if not known:
            LOG.warning("skipped %s: %s", what.key, what.reason)
        allowed = max(self._options.broken_allowed, int(self._options.broken_share * len(self)))
        if count > min(allowed, len(self) - 1):
            first = "; ".join(f"{one.key}: {one.reason}" for one in self.skipped[:3])
            raise UserError(
                f"data: {count} of the {len(self)} rows of {self.name} cannot be used, allowed are "
                f"{min(allowed, len(self) - 1)}; the first are {first}"
            )


@overload
def open_source(
    path: str | Path,
    *,
    image_size: int,
    split: str = ...,
    kind: Literal["image"] = ...,
    caption_column: str | None = ...,
    image_column: str | None = ...,
    options: Reading = ...,
    codes: bool = ...,
) -> ImageSource[Sample]: ...
@overload
def open_source(
    path: str | Path,
    *,
    image_size: int,
    split: str = ...,
    kind: Literal["edit"],
    caption_column: str | None = ...,
    image_column: str | None = ...,
    options: Reading = ...,
    codes: bool = ...,
) -> ImageSource[EditSample]: ...
@overload
def open_source(
    path: str | Path,
    *,
    image_size: int,
    split: str = ...,
    kind: Literal["question"],
    caption_column: str | None = ...,
    image_column: str | None = ...,
    options: Reading = ...,
    codes: bool = ...,
) -> ImageSource[QuestionSample]: ...
def open_source(
    path: str | Path,
    *,
    image_size: int,
    split: str = "train",
    kind: Kind = "image",
    caption_column: str | None = None,
    image_column: str | None = None,
    options: Reading = Reading(),
    codes: bool = False,
) -> ImageSource[Any]:
    """Open a folder of pictures, WebDataset shards, Parquet files or a data set on disk.

    `path` may hold a pattern ("natural64/natural64-open-*.tar.gz"); among shards named after splits
    those of `split` are taken. `kind` says what is wanted: pictures with captions from any data,
    edits (source, instruction, target), or questions with answers. With `codes` what `ddt encode`
    wrote is taken, too, and samples hold codes. Raises UserError where the path holds nothing of
    the kind.
    """
    records = _opened(path, split, image_column, options)
    if records.codes is not None and not codes:
        raise UserError(
            f"data: {path} holds codes of {records.codes}, and pictures are needed here; only a "
            "language model trains on codes: give the pictures"
        )
    if not records.count:
        raise UserError(f"data: {path} is empty; give at least one picture")
    first = _first_records(records)
    if kind != "image" and first and not any(kind_of(record) == kind for record in first):
        raise UserError(
            f"data: {path} holds samples of kind {kind_of(first[0])!r}, not {kind!r}; "
            "give other data or ask for another kind"
        )
    names = sorted({name for record in first for name in record.fields})
    if caption_column is not None and first and caption_column not in names:
        raise UserError(
            f"caption column: given {caption_column!r}, the columns of {path} are "
            f"{', '.join(names) or 'none'}"
        )
    return ImageSource(records, form_of(kind, caption_column), image_size, str(path), options)


def detect_kind(
    path: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    options: Reading = Reading(),
) -> Kind:
    """Return what most of the first rows at `path` hold: "image", "edit" or "question"."""
    records = _opened(path, split, image_column, options)
    counts: Counter[Kind] = Counter(kind_of(record) for record in _first_records(records))
    return counts.most_common(1)[0][0] if counts else "image"


def _opened(path: str | Path, split: str, image_column: str | None, options: Reading) -> Records:
    return open_records(
        path,
        split,
        image_column=image_column,
        cache_dir=options.cache_dir,
        held_out=options.held_out,
    )


def _tensors(pictures: Sequence[Pixels | Codes]) -> Tensor:
    """Return pictures in [-1, 1], or codes, joined along a new first axis."""
    joined = np.stack(pictures)
    if joined.ndim == 4:
        return from_bytes8(joined)
    return torch.from_numpy(joined.astype(np.int64))


def _first_records(records: Records) -> list[Record]:
    """Return up to twenty rows, those that cannot be read left out (reading will name them)."""
    found = []
    for index in range(min(records.count, 20)):
        with contextlib.suppress(BrokenImage):
            found.append(records.read(index))
    return found
