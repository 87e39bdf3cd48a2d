"""Pictures to one file of codes: what other programs train on without pictures."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ddt_llama.config import UserError, replace_file
from ddt_llama.generation.model import Model
from ddt_llama.recipes.data import DataConfig


def encode_pictures(
    model: Model, data: DataConfig, out: Path, *, split: str = "all", batch: int = 64
) -> tuple[int, int]:
    """Write codes (index 0 finest), keys and captions of every usable picture, all or nothing.

    `data` names one path and how it is read.
    `.safetensors`: tensor "codes" (n, k), and keys and captions as JSON in the metadata;
    `.parquet`: columns key, caption, codes. Returns how many were written and skipped.
    """
    if batch < 1:
        raise UserError(f"batch: given {batch}, allowed is 1 or more")
    if out.suffix.lower() not in _WRITERS:
        raise UserError(f"{out}: allowed are names that end in {' or '.join(_WRITERS)}")
    data.check()
    (path,) = data.paths
    source = data.open_images(path, model.tokenizer.image_size, split)
    keys: list[str] = []
    captions: list[str | None] = []
    parts: list[torch.Tensor] = []
    rows = source.readable()
    for start in range(0, len(rows), batch):
        samples = source.batch(rows[start : start + batch])
        keys += [sample.key for sample in samples]
        captions += [sample.caption for sample in samples]
        parts.append(model.encode(torch.stack([sample.image for sample in samples])).cpu())
    codes = torch.cat(parts).to(torch.int32)
    replace_file(out, _WRITERS[out.suffix.lower()](codes.numpy(), keys, captions))
    return len(keys), len(source.skipped)


def _safetensors(codes: np.ndarray, keys: list[str], captions: list[str | None]) -> bytes:
    from safetensors.numpy import save

    return save({"codes": codes}, {"keys": json.dumps(keys), "captions": json.dumps(captions)})


def _parquet(codes: np.ndarray, keys: list[str], captions: list[str | None]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install 'ddt-llama[train]'") from None
    table = pyarrow.table(
        {"key": keys, "caption": pyarrow.array(captions, pyarrow.string()), "codes": list(codes)}
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[np.ndarray, list[str], list[str | None]], bytes]] = {
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}
