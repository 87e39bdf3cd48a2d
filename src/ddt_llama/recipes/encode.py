"""Pictures to shards of codes, once, so that language models train on them without pictures.

The rows of a source are cut into runs; each run becomes one shard (`ShardEncoder`), whichever
process does it and whenever, and a line of the manifest, by which an encoding that was stopped goes
on. Nothing but the order of those lines depends on how the work was shared out.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Integer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from ddt_llama.config import UserError, check_folder, check_range, to_dict
from ddt_llama.data.codes import (
    SUFFIX,
    CodeFacts,
    CodeRows,
    Shard,
    add_to_manifest,
    begin_manifest,
    has_manifest,
    is_whole,
    mend_manifest,
    read_manifest,
    row_hash,
)
from ddt_llama.data.images import from_bytes8
from ddt_llama.data.samples import Kind
from ddt_llama.data.sources import ImageSource, Row, Skipped, detect_kind
from ddt_llama.generation import load
from ddt_llama.generation.model import Model
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.drafts import open_form
from ddt_llama.recipes.language import CHUNK
from ddt_llama.runs import changed_fields, lock_folder

Advance = Callable[[int], None]
SHARD_ROWS = 10_000
SAME = "the same as row {} (key, pictures and texts)"


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, and into what: where any of it differs, so do the shards.

    `shard_rows` rows of the source make one file. `codes`, `kind` and `rows` are found out.
    """

    codes: CodeFacts
    data: DataConfig
    split: str
    kind: Kind
    rows: int
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        """Refuse shards of nothing."""
        check_range(self, 1, 2**31, "shard_rows")

    @property
    def shards(self) -> int:
        """How many runs of rows there are."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, number: int) -> range:
        """Return the rows of the source that shard `number` is made of."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))


@dataclass(frozen=True)
class Work:
    """All that a process needs to know to encode shards.

    `model` is a name or a folder. `earlier` maps each row whose key came before to the row where it
    came first.
    """

    model: str
    config: EncodeConfig
    folder: Path
    batch: int | None = None
    earlier: Mapping[int, int] = field(default_factory=dict)


class Part(NamedTuple):
    """A batch of rows, encoded: by row, and codes by the role of their pictures."""

    keys: list[str]
    hashes: list[str]
    texts: list[Mapping[str, Any]]
    codes: Mapping[str, Integer[np.ndarray, "n k"]]


class ShardEncoder:
    """Encode one run of rows after the other, in this process."""

    def __init__(
        self, work: Work, model: Model | None = None, source: ImageSource[Any] | None = None
    ) -> None:
        """Open model and pictures, where they are not given."""
        self.work = work
        self.model = model or load(work.model)
        size = self.model.tokenizer.image_size
        config, device = work.config, self.model.device
        self.source = source or opened(config.data, config.split, config.kind, size, device)
        # What the tokenizer stands on, a VAE, is opened here and not by every thread at once.
        self.model.encode(torch.zeros(1, 3, size, size))
        self.batch = work.batch or CHUNK[self.model.device.type]

    def __call__(self, number: int, advance: Advance = lambda rows: None) -> Shard:
        """Write shard `number` and return its line; `advance` is told of rows that are done."""
        config = self.work.config
        collected, skipped = CodeRows(config.codes), []
        for part, unused in self._parts(config.rows_of(number)):
            skipped += [(one.key, one.reason) for one in unused]
            if part is not None:
                collected.add(*part)
            advance(len(unused) + (len(part.keys) if part else 0))
        stem = "codes" if config.split == "all" else config.split  # a split is known by its files
        name = f"{stem}-{number:05d}{SUFFIX}" if collected.keys else ""
        size = collected.write(self.work.folder / name) if name else 0
        return Shard(number, name, len(collected.keys), size, tuple(skipped))

    def _parts(self, places: range) -> Iterator[tuple[Part | None, list[Skipped]]]:
        """Yield batches in their order, by threads that read, each, and encode.

        One for each core of a CPU, which decodes and computes alone: cores that share a product
        wait for the one that decodes (experiments/0052). Two of a GPU: while one computes the other
        has its pictures decoded, on all cores.
        """
        cores = torch.get_num_threads()
        on_cpu = self.model.device.type == "cpu"
        starts = range(0, len(places), self.batch)
        parts = [places[start : start + self.batch] for start in starts]
        pool = ThreadPoolExecutor(
            cores if on_cpu else 2, "encode", torch.set_num_threads, (1 if on_cpu else cores,)
        )
        try:
            yield from pool.map(self._part, parts)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)

    def _part(self, places: Sequence[int]) -> tuple[Part | None, list[Skipped]]:
        rows, skipped = self._usable(places)
        return self._encode(rows) if rows else None, skipped

    def _usable(self, places: Sequence[int]) -> tuple[list[Row], list[Skipped]]:
        rows: list[Row] = []
        skipped: list[Skipped] = []
        for row in self.source.rows(places):
            if isinstance(row, Skipped):
                skipped.append(row)
            elif (before := self._copy_of(row)) is not None:
                skipped.append(Skipped(row.key, SAME.format(before)))
            else:
                rows.append(row)
        return rows, skipped

    def _copy_of(self, row: Row) -> int | None:
        """Return the first row of the same key, where it holds the same."""
        before = self.work.earlier.get(row.place)
        if before is None:
            return None
        (first,) = self.source.rows([before])
        same = isinstance(first, Row) and self._hash(first) == self._hash(row)
        return before if same else None

    def _hash(self, row: Row) -> str:
        return row_hash(row.pictures, self.source.form.columns(row.texts))

    def _encode(self, rows: Sequence[Row]) -> Part:
        form = self.source.form
        pixels = np.stack([one for row in rows for one in row.pictures])
        # Always as many at once, so that codes do not depend on what stands beside them.
        images = torch.zeros(len(form.roles) * self.batch, *pixels.shape[1:])
        images[: len(pixels)] = from_bytes8(pixels)
        codes = self.model.encode(images)[: len(pixels)].cpu().numpy()
        return Part(
            [row.key for row in rows],
            [self._hash(row) for row in rows],
            [form.columns(row.texts) for row in rows],
            {role: codes[place :: len(form.roles)] for place, role in enumerate(form.roles)},
        )


# Who encodes: from work, numbers of shards and a report of rows that are done to their lines.
Engine = Callable[[ShardEncoder, Sequence[int], Advance], Iterator[Shard]]


def in_this_process(
    encoder: ShardEncoder, numbers: Sequence[int], advance: Advance
) -> Iterator[Shard]:
    """Encode shards one after the other."""
    for number in numbers:
        yield encoder(number, advance)


class Encoded(NamedTuple):
    """What an encoding left: rows encoded and skipped, in all.

    This start of it encoded `fresh` of them in `seconds`.
    """

    rows: int
    skipped: int
    fresh: int
    seconds: float


def encode_pictures(
    model: str,
    data: DataConfig,
    folder: Path,
    *,
    split: str = "all",
    batch: int | None = None,
    shard_rows: int = SHARD_ROWS,
    engine: Engine = in_this_process,
) -> Encoded:
    """Write the codes of every usable row of `data`, or go on where an earlier start stopped.

    `data` names one path and how it is read. A row that holds the same as the first one of its key
    is left out. Raises UserError for a folder that holds something else, where another process
    encodes into it, and where more rows are broken than `data` allows; what is written stays.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch: given {batch}, allowed is 1 or more")
    check_folder(folder)
    data.check()
    whole = load(model)
    (path,) = data.paths
    kind = detect_kind(path, split, image_column=data.image_column, options=data.reading)
    source = opened(data, split, kind, whole.tokenizer.image_size, whole.device)
    config = EncodeConfig(facts_of(whole), data, split, kind, len(source), shard_rows)
    work = Work(model, config, folder, batch, earlier_rows(source.list_keys()))
    begun(folder, config)  # refuses before anything is written
    with contextlib.closing(lock_folder(folder, "encodes")):
        if has_manifest(folder):
            mend_manifest(folder)
        done = begun(folder, config)
        if not has_manifest(folder):
            begin_manifest(folder, to_dict(config))
        encoder = ShardEncoder(work, whole, source)
        left = [number for number in range(config.shards) if number not in done]
        began = time.perf_counter()
        fresh = 0
        with progress(sum(len(config.rows_of(number)) for number in left)) as advance:
            for shard in engine(encoder, left, advance):
                add_to_manifest(folder, shard)
                done[shard.number] = shard
                fresh += shard.rows
                refuse_too_many(config, done)
    rows = sum(shard.rows for shard in done.values())
    skipped = sum(len(shard.skipped) for shard in done.values())
    return Encoded(rows, skipped, fresh, time.perf_counter() - began)


def facts_of(model: Model) -> CodeFacts:
    """Return what shards say of the tokenizer that made them."""
    tokenizer = model.tokenizer
    sizes = tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.image_size
    return CodeFacts(model.name, tokenizer.fingerprint(), *sizes)


def opened(
    data: DataConfig, split: str, kind: Kind, image_size: int, device: torch.device
) -> ImageSource[Any]:
    """Open the pictures that are to be encoded on `device`; none is kept in memory.

    For a CPU each thread decodes its own, for a GPU all cores do.
    """
    workers = int(device.type == "cpu")
    (path,), reading = data.paths, replace(data.reading, cache_bytes=0, workers=workers)
    source = open_form(data, path, image_size, kind, split, reading)
    if source.codes is not None:
        raise UserError(f"data: {path} holds codes of {source.codes} already; give pictures")
    return source


def begun(folder: Path, config: EncodeConfig) -> dict[int, Shard]:
    """Return the shards of this encoding that are in `folder`, none where it has not begun.

    Raises UserError where another one was begun, or other things lie there.
    """
    known = read_manifest(folder)
    if known is None:
        inside = folder.iterdir() if folder.is_dir() else ()
        if others := [item.name for item in inside if not item.name.startswith(".")]:
            raise UserError(f"{folder}: holds other things ({others[0]}); choose another folder")
        return {}
    if changed := changed_fields(known[0], config):
        raise UserError(
            f"{folder}: something else is encoded here ({'; '.join(changed)}); choose another "
            "folder"
        )
    return {number: shard for number, shard in known[1].items() if is_whole(folder, shard)}


def earlier_rows(keys: Sequence[str]) -> dict[int, int]:
    """Return for each row whose key came before the row where it came first.

    >>> earlier_rows(["a", "b", "a"])
    {2: 0}
    """
    first: dict[str, int] = {}
    places = (first.setdefault(key, row) for row, key in enumerate(keys))
    return {row: place for row, place in enumerate(places) if place != row}


@contextlib.contextmanager
def progress(rows: int) -> Iterator[Advance]:
    """Give a function that is told of rows that are done, and show them where a terminal is."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("rows", total=rows)
        yield lambda done: bar.advance(task, done)


def refuse_too_many(config: EncodeConfig, done: Mapping[int, Shard]) -> None:
    """Raise UserError where more rows are broken than is allowed of all."""
    broken = [
        f"{key}: {reason}"
        for shard in done.values()
        for key, reason in shard.skipped
        if not reason.startswith(SAME.partition("{")[0])
    ]
    reading = config.data.reading
    allowed = max(reading.broken_allowed, int(reading.broken_share * config.rows))
    if len(broken) > allowed:
        raise UserError(
            f"data: {len(broken)} of the {config.rows} rows of {config.data.paths[0]} cannot be "
            f"used, allowed are {allowed}; the first are {'; '.join(broken[:3])}. More are allowed "
            "with --data.broken-share; what is encoded stays"
        )
