"""Codes of pictures on disk: Parquet shards that say whose codes they are, and their manifest.

What `ddt encode` writes, and what a language model learns from without pictures. A shard has the
columns key, hash, the texts of its rows, and `codes` (of edits `source_codes` and `target_codes`;
index 0 finest, as the tokenizer gives them); `datasets` and any reader of Parquet open it. The
manifest has one JSON object a line: first what was encoded, then each shard as it was finished.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from ddt_llama.config import UserError, from_dict, let_others_read, replace_file, to_dict

MANIFEST = "manifest.jsonl"
SUFFIX = ".parquet"
FACTS = b"ddt_llama"  # the key of a shard's own description, in the footer of the file
# Columns of codes, by what they are codes of.
COLUMNS = {"image": "codes", "source": "source_codes", "target": "target_codes"}


@dataclass(frozen=True)
class CodeFacts:
    """Whose codes these are: `tokenizer` is its name, `fingerprint` stands for its weights."""

    tokenizer: str
    fingerprint: str
    num_tokens: int
    codebook_size: int
    image_size: int

    @property
    def dtype(self) -> str:
        """The narrowest integers that hold the codes."""
        return "uint16" if self.codebook_size <= 2**16 else "uint32"

    def __str__(self) -> str:
        """Name the tokenizer so that two of one name differ."""
        return f"{self.tokenizer} ({self.fingerprint})"


@dataclass(frozen=True)
class Shard:
    """A line of the manifest: one run of rows of the source, and the file of those it could use.

    `file` is "" where no row could be used; `skipped` are pairs of key and reason.
    """

    number: int
    file: str
    rows: int
    bytes: int
    skipped: tuple[tuple[str, str], ...] = field(default=())


class CodeRows:
    """Rows of one shard before they are written."""

    def __init__(self, facts: CodeFacts) -> None:
        """Begin with no row."""
        self.facts = facts
        self.keys: list[str] = []
        self.hashes: list[str] = []
        self.texts: dict[str, list[Any]] = {}
        self.codes: dict[str, list[Integer[np.ndarray, "n k"]]] = {}

    def add(
        self,
        keys: Sequence[str],
        hashes: Sequence[str],
        texts: Sequence[Mapping[str, Any]],
        codes: Mapping[str, Integer[np.ndarray, "n k"]],
    ) -> None:
        """Append rows; `texts` by column, the same columns in each row; `codes` by role."""
        self.keys += keys
        self.hashes += hashes
        for row in texts:
            for name, value in row.items():
                self.texts.setdefault(name, []).append(value)
        for role, values in codes.items():
            self.codes.setdefault(role, []).append(values)

    def write(self, path: Path) -> int:
        """Write the file, all or nothing; return its size in bytes."""
        pyarrow, parquet = _pyarrow()
        narrow = pyarrow.from_numpy_dtype(self.facts.dtype)
        columns = {"key": pyarrow.array(self.keys), "hash": pyarrow.array(self.hashes)}
        for name, values in self.texts.items():
            kind = TEXT_COLUMNS[name]
            columns[name] = pyarrow.array(values, _arrow(kind, pyarrow))
        for role, parts in self.codes.items():
            flat = np.concatenate(parts).astype(self.facts.dtype)
            whole = pyarrow.array(flat.reshape(-1), narrow)
            columns[COLUMNS[role]] = pyarrow.FixedSizeListArray.from_arrays(whole, flat.shape[1])
        facts = {FACTS: json.dumps(to_dict(self.facts)).encode()}
        table = pyarrow.table(columns).replace_schema_metadata(facts)
        partial = path.with_name(f".{path.name}.partial")
        with _writing(path):
            parquet.write_table(table, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            let_others_read(partial)
            os.replace(partial, path)
            return path.stat().st_size


# Columns of texts and what they hold: a text, or a list of pairs.
TEXT_COLUMNS = {
    "caption": "text",
    "instruction": "text",
    "src_caption": "text",
    "tgt_caption": "text",
    "qa": "pairs",
}


def row_hash(pixels: Sequence[Integer[np.ndarray, "3 h w"]], texts: Mapping[str, Any]) -> str:
    """Return 16 letters for what a row holds: its pictures as the tokenizer sees them, and texts.

    >>> row_hash([np.zeros((3, 1, 1), np.uint8)], {"caption": "night"})
    '4f0b141a812985e2'
    """
    digest = hashlib.blake2b(json.dumps(texts, sort_keys=True).encode(), digest_size=8)
    for picture in pixels:
        digest.update(picture.tobytes())
    return digest.hexdigest()


def has_manifest(folder: Path) -> bool:
    """Say whether an encoding was begun in `folder`."""
    return (folder / MANIFEST).is_file()


def begin_manifest(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the first line of the manifest of a new folder."""
    _append(folder / MANIFEST, header, mode="w")


def add_to_manifest(folder: Path, shard: Shard) -> None:
    """Add the line of a shard that has been written."""
    _append(folder / MANIFEST, to_dict(shard))


def mend_manifest(folder: Path) -> None:
    """Drop a last line that a kill cut short, which the next one would continue.

    For the process alone that encodes: others may read while it writes.
    """
    path = folder / MANIFEST
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        replace_file(path, whole + b"\n")


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[int, Shard]] | None:
    """Return the first line and the shards by number, None where nothing was begun.

    A last line that a kill cut short is left out; of two lines of one shard the later one counts.
    Raises UserError for a manifest that is none.
    """
    path = folder / MANIFEST
    if not has_manifest(folder):
        return None
    lines = path.read_bytes().split(b"\n")
    try:
        found = [json.loads(line) for line in lines[:-1] if line]
        header, shards = found[0], [from_dict(Shard, line) for line in found[1:]]
    except (ValueError, IndexError):
        raise UserError(
            f"{path}: damaged, or no manifest of codes; encode into another folder"
        ) from None
    return header, {shard.number: shard for shard in shards}


def is_whole(folder: Path, shard: Shard) -> bool:
    """Say whether the file of a shard is there, of the size that it was written with."""
    path = folder / shard.file
    return not shard.file or (path.is_file() and path.stat().st_size == shard.bytes)


def facts_of(path: Path) -> CodeFacts | None:
    """Return whose codes a Parquet file holds, None where it holds none of ours.

    Raises UserError for a file that cannot be read.
    """
    pyarrow, parquet = _pyarrow()
    try:
        metadata = parquet.read_metadata(path).metadata or {}
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data: {path} cannot be read as Parquet ({reason})") from None
    told = metadata.get(FACTS)
    return None if told is None else from_dict(CodeFacts, json.loads(told))


def common_facts(files: Sequence[Path]) -> CodeFacts | None:
    """Return whose codes the files hold, None for none; UserError where they differ."""
    found = {file: facts_of(file) for file in files}
    kinds = list(dict.fromkeys(found.values()))
    if len(kinds) > 1:
        first = {kind: next(file for file in files if found[file] == kind) for kind in kinds}
        told = "; ".join(f"{file.name}: {kind or 'no codes'}" for kind, file in first.items())
        raise UserError(f"data: {files[0].parent} holds codes of several tokenizers ({told})")
    return kinds[0]


def refuse_gaps(folder: Path) -> None:
    """Raise UserError where a folder lacks shards of what was to be encoded into it."""
    known = read_manifest(folder)
    if known is None:
        return
    header, shards = known
    remedy = "the same ddt encode as before goes on with it"
    planned = -(-header["rows"] // header["shard_rows"])
    if len(shards) < planned:
        raise UserError(f"data: {folder}: {len(shards)} of {planned} shards are there; {remedy}")
    for shard in shards.values():
        if not is_whole(folder, shard):
            raise UserError(f"data: {folder / shard.file} is gone or was changed; {remedy}")


def _append(path: Path, line: Mapping[str, Any], mode: str = "a") -> None:
    with _writing(path), path.open(mode, encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _arrow(kind: str, pyarrow: Any) -> Any:
    text = pyarrow.string()
    return text if kind == "text" else pyarrow.list_(pyarrow.list_(text))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'ddt-llama[train]'") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be written ({reason}); free the disk and start again"
        ) from None
