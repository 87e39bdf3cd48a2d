"""A language model that no process ever holds whole: opened empty, copied and saved file by file.

For trainings in shards. `backbone` does the same with whole models (`grow`, `load`, `save`), and
the weights are the same bit by bit. Here one tensor is read, and one file written, at a time.
"""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ddt_llama import distributed
from ddt_llama.checkpoint import save_tensors
from ddt_llama.config import UserError, save_json
from ddt_llama.language.backbone import (
    FILE_SIZE,
    check_parts,
    fill_new_rows,
    marks_of,
    set_marks,
    vocabulary_tables,
)
from ddt_llama.language.lora import Adapter
from ddt_llama.language.pretrained import INDEX_FILE, quiet, read_config, weight_files
from ddt_llama.language.text import TextTokenizer, one_line
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.states import read_tensors


@dataclass(frozen=True)
class Source:
    """The weights of a checkpoint, by name: in which file, and of what shape and dtype."""

    folder: Path
    files: Mapping[str, Path]
    tensors: Mapping[str, Tensor]  # on the meta device

    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises UserError where the disk does not give it."""
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = f"cannot be read ({one_line(error)})"
            raise UserError(f"{self.files[name]}: {reason}; fetch it again") from None


def open_empty(
    folder: Path, vocabulary: Vocabulary, text: TextTokenizer
) -> tuple[PreTrainedModel, Source]:
    """Build the model of a folder, grown to `vocabulary`, its parameters on the meta device.

    Buffers are what they are in a whole model. Also returns the weights that belong to it.
    Raises UserError where files are absent or damaged, or hold other weights than the model has.
    """
    settings = read_config(folder)
    settings.get_text_config().vocab_size = vocabulary.size
    set_marks(settings, vocabulary)
    check_parts(folder, vocabulary.size, vocabulary, text)
    with quiet(), register_module_parameter_registration_hook(_on_meta):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, trust_remote_code=False
        )
    model.generation_config = GenerationConfig(**marks_of(vocabulary))
    return model.eval(), _source(folder, model, vocabulary)


def without_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Build an untrained model of a few rows like `model`, of its embedding, last norm and head."""
    settings = copy.deepcopy(model.config)
    inner = settings.get_text_config()
    inner.num_hidden_layers, inner.vocab_size, inner.pad_token_id = 0, 8, None
    if getattr(inner, "layer_types", None) is not None:
        inner.layer_types = []
    with quiet():
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model, a tensor of two names under the first of them."""
    kept = model.state_dict().keys()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if name in kept}


def fill(model: nn.Module, folder: Path) -> None:
    """Read the weights of a model in shards, of each what this process holds; all take part.

    `folder` holds no other safetensors than those of the model (`copy_grown`, `backbone.save`).
    """
    read_tensors(folder, weights_of(model))


def copy_grown(
    source: Source,
    folder: Path,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    seed: int,
) -> None:
    """Write a language folder of the weights of `source`, with new rows as `backbone.grow` adds.

    Tensors keep the dtype they are stored in; grown ones become float32. All processes take part,
    the main one reads and writes.
    """
    tables = _tables(model)
    wanted, generator = weights_of(model), torch.Generator().manual_seed(seed)

    def is_grown(name: str) -> bool:
        return source.tensors[name].shape != wanted[name].shape

    def read(name: str) -> Tensor:
        stored = source.read(name)
        if not is_grown(name):
            return stored
        table = torch.empty(wanted[name].shape)
        table[: len(stored)] = stored
        fill_new_rows(table, len(stored), generator)
        return table

    # Embedding before head, as in `backbone.grow`, because both draw from one generator.
    names = sorted(wanted, key=lambda name: tables.index(name) if name in tables else len(tables))
    sizes = {
        name: torch.empty_like(wanted[name], device="meta") if is_grown(name) else stored
        for name, stored in ((name, source.tensors[name]) for name in names)
    }
    _write(folder, model, sizes, lambda name: distributed.on_main(lambda: read(name)))
    distributed.on_main(lambda: _finish(folder, vocabulary, text))


def save_shards(
    folder: Path,
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    adapter: Adapter | None = None,
) -> None:
    """Write the language folder of a model in shards; all processes take part, the main one writes.

    It holds one file (`FILE_SIZE`) at a time, and merges `adapter`, which nobody else needs, into
    it. Raises UserError in the main process where the folder cannot be written; the others then end
    with exit code 2.
    """
    weights = weights_of(model)

    def whole(name: str) -> Tensor | None:
        tensor = distributed.gathered(weights[name])
        if tensor is None or adapter is None:
            return tensor
        return adapter.merged(name, tensor)

    sizes = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in weights.items()
    }
    _write(folder, model, sizes, whole)
    distributed.on_main(lambda: _finish(folder, vocabulary, text))


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:  # or None
    """Put a new parameter on the meta device; one that is there stays itself, as tied ones must."""
    if parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def _tables(model: PreTrainedModel) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(table)] for table in vocabulary_tables(model)]


def _source(folder: Path, model: PreTrainedModel, vocabulary: Vocabulary) -> Source:
    """Find the weights of a model; tables may lack the rows that growing adds."""
    files: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (an open file is no mapping)
                part = file.get_slice(name)
                dtype = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                files[name] = path
    wanted, tables = weights_of(model), _tables(model)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are missing, such as {missing[0]}; the files belong "
            "to another model, or name them otherwise: then train it with --train.shard none"
        )
    for name, tensor in wanted.items():
        known, grown = tensors[name].shape, [vocabulary.text_size, *tensor.shape[1:]]
        if known != tensor.shape and not (name in tables and list(known) == grown):
            raise UserError(
                f"{files[name]}: {name} is {list(known)}, expected {list(tensor.shape)}; the file "
                "belongs to another model"
            )
    return Source(folder, files, tensors)


def _write(
    folder: Path,
    model: PreTrainedModel,
    sizes: dict[str, Tensor],
    read: Callable[[str], Tensor | None],
) -> None:
    """Write weights as transformers does, in as many files as they need, each read before it."""
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_SIZE)
    distributed.on_main(lambda: _begin(folder, model))
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, names, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        distributed.on_main(lambda: save_json(folder / INDEX_FILE, index))


def _write_file(path: Path, names: list[str], read: Callable[[str], Tensor | None]) -> None:
    held: dict[str, Any] = {name: read(name) for name in names}
    distributed.on_main(lambda: save_tensors(path, held))


def _begin(folder: Path, model: PreTrainedModel) -> None:
    """Make the folder anew, with all that transformers keeps of a model beside its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(folder, state_dict={})
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError(f"{folder}: {reason}; choose another place") from None


def _finish(folder: Path, vocabulary: Vocabulary, text: TextTokenizer) -> None:
    text.save(folder)
    vocabulary.save(folder)
