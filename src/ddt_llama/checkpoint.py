"""Store tensors for others to open: a release is `config.json` beside `model.safetensors`.

What a training needs to go on is kept by `states`. Nothing here is pickled.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddt_llama.config import UserError, let_others_read, save_json

SHORT_ROW = 64  # numbers: below that a scale a row gains little, and codes need their precision
ROW_SCALE = ".row_scale"  # beside a matrix stored in 8 bits: what one unit is worth in each row
Tensors = Mapping[str, Tensor]


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which then stands in place of `folder`: all or nothing.

    A kill between the two renames leaves the old one as `.NAME.old`; see `put_back`.
    """
    folder = folder.absolute()
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    put_back(folder)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put the old folder back where a kill came between the two renames of `replaced`."""
    if _beside(folder, "old").exists() and not folder.exists():
        os.replace(_beside(folder, "old"), folder)


def _beside(folder: Path, end: str) -> Path:
    return folder.with_name(f".{folder.name}.{end}")


def save_release(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`; floats are stored as `dtype` if given.

    bfloat16 or float16 halve the file; `load_tensors` gives float32 back.
    """
    folder = Path(folder)
    save_tensors(folder / "model.safetensors", tensors, dtype)
    save_json(folder / "config.json", config)


def save_tensors(
    path: str | os.PathLike[str], tensors: Tensors, dtype: torch.dtype | None = None
) -> None:
    """Write one safetensors file, all or nothing; floats are stored as `dtype` if given.

    torch.int8 stores matrices in 8 bits with a scale a row (an error of at most 0.4 % of the row's
    largest number), and everything else in float16, codebooks and other short rows too.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_storable(tensors, dtype), partial, metadata={"format": "pt"})
        let_others_read(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); choose another place") from None


def load_tensors(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Read a safetensors file; floating tensors are cast to `dtype` (None: as stored).

    Matrices stored in 8 bits come back as floating numbers. Raises UserError for an absent,
    truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .safetensors file")
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        reason = "truncated or not a safetensors file"
        raise UserError(f"{path}: {reason} ({error}); download or save it again") from None
    for name in [name for name in tensors if name.endswith(ROW_SCALE)]:
        scale, matrix = tensors.pop(name), name.removesuffix(ROW_SCALE)
        if matrix not in tensors:
            raise UserError(f"{path}: {name} without its matrix; download or save it again")
        tensors[matrix] = tensors[matrix] * scale
    return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}


def load_into(module: nn.Module, tensors: Tensors, source: str | os.PathLike[str]) -> None:
    """Copy `tensors` into `module`; `source` names the file in errors.

    Raises UserError that names the first missing, unknown or wrongly shaped tensors, before any
    value is changed.
    """
    own = module.state_dict()
    differences = [f"{name} missing" for name in own if name not in tensors]
    differences += [f"{name} unknown" for name in tensors if name not in own]
    differences += [
        f"{name} is {list(tensor.shape)}, expected {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        told = "; ".join(differences[:3])
        raise UserError(f"{source}: does not fit this model: {told}{more}; use its own config")
    module.load_state_dict(dict(tensors))


def _storable(tensors: Tensors, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return contiguous CPU tensors of which no two share memory (safetensors refuses those)."""
    if dtype is torch.int8:
        return _storable(_in_eight_bits(tensors))
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        plain = _cast(tensor.detach(), dtype).cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        if address in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(address)
        stored[name] = plain
    return stored


def _in_eight_bits(tensors: Tensors) -> dict[str, Tensor]:
    stored = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor[0].numel() < SHORT_ROW:
            stored[name] = _cast(tensor, torch.float16)
            continue
        rows = tensor.detach().float()
        scale = rows.abs().amax(dim=tuple(range(1, rows.ndim)), keepdim=True).clamp_min(1e-30) / 127
        stored[name] = (rows / scale).round().to(torch.int8)
        stored[name + ROW_SCALE] = scale
    return stored


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
