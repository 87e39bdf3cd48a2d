"""Read a model that diffusers saved in a local folder: config.json beside safetensors.

Border of the tokenizer: every mistake in such a folder becomes one line that names the remedy.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddt_llama.config import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """Return the folder's config.json; UserError unless it describes a `class_name`."""
    wanted = f"a diffusers {class_name} (config.json and {WEIGHTS})"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the local folder of {wanted}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        inner = [path.parent.name for path in folder.glob("*/config.json")]
        hint = f"; did you mean one of its folders {', '.join(sorted(inner))}?" if inner else ""
        raise UserError(f"{folder}: holds no config.json; give {wanted}{hint}") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: config.json is unreadable ({reason}); give {wanted}") from None
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != class_name:
        raise UserError(f"{folder}: config.json is that of {found!r}; give {wanted}")
    return config


def open_weights(folder: Path) -> Callable[[str], Tensor]:
    """Return a function from a weight's name to the weight, read from disk when it is called.

    Reads one file or the shards of an index. Raises UserError, now or in the function, where a
    file is absent or cut short, or lacks the name.
    """
    index = folder / f"{WEIGHTS}.index.json"
    shards = sorted(folder.glob("*.safetensors")) if index.is_file() else [folder / WEIGHTS]
    homes: dict[str, Any] = {}
    for path in shards:
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
            raise UserError(f"{path}: cannot be read ({reason}); fetch it again") from None
        homes.update(dict.fromkeys(file.keys(), file))

    def read(name: str) -> Tensor:
        if name not in homes:
            raise UserError(f"{folder}: the weights lack {name}; fetch them again")
        return homes[name].get_tensor(name)

    return read
