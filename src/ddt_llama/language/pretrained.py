"""Opening a Hugging Face checkpoint: local files, safetensors only, quiet, and all of it or none.

Stands under `backbone`, which grows and loads models. What transformers would only warn about
(missing weights drawn at random) is an error here, and its warnings and bars are not shown.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ddt_llama.config import UserError, load_json
from ddt_llama.language.text import one_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json of a checkpoint. Raises UserError where it is absent or unknown."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a checkpoint")
    load_json(folder / CONFIG_FILE)  # says plainly what is wrong with the file
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # by what is wrong: ValueError, KeyError, TypeError, its own
        raise UserError(
            f"{folder / CONFIG_FILE}: not a config of transformers ({one_line(error)})"
        ) from None


def open_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal LM in evaluation mode, from safetensors only, every weight of it.

    Raises UserError where weights are absent, pickled, truncated or of another model.
    """
    weight_files(folder)
    return open_whole(AutoModelForCausalLM, folder, dtype=dtype)


def open_whole(opener: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint by a class of transformers: safetensors of this folder, every weight.

    Raises UserError where weights are absent, damaged or of another model.
    """
    try:
        with quiet():
            model, report = opener.from_pretrained(
                str(folder),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: its weights cannot be loaded ({one_line(error)})") from None
    if report["missing_keys"]:  # transformers would draw them at random
        names = sorted(report["missing_keys"])
        raise UserError(
            f"{folder}: {len(names)} weights are missing, such as {names[0]}; "
            "the file belongs to another model"
        )
    return model


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights; UserError where they are absent, pickled or truncated."""
    if (folder / WEIGHTS_FILE).is_file():
        files = {WEIGHTS_FILE}
    elif (folder / INDEX_FILE).is_file():
        index = load_json(folder / INDEX_FILE)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX_FILE}: no weight_map in it; restore the file")
        files = {str(name) for name in places.values()}
    else:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f"only {pickled[0].name}, a pickle, which can run code" if pickled else "none"
        raise UserError(f"{folder}: weights found: {found}; allowed is {WEIGHTS_FILE}")
    paths = [folder / name for name in sorted(files)]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise UserError(f"{path}: no such file; the folder is incomplete, fetch it again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: truncated or not safetensors ({one_line(error)}); fetch it again"
            ) from None
    return paths


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing: what matters of its reports is raised here as an error."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
