"""The causal language model: built small, grown from a checkpoint, saved as a Hugging Face folder.

Any causal LM of transformers serves; its embedding and head get one row more for every mark and
code of the `Vocabulary`, and one cross-entropy trains all. Source: DDT-LLaMA (LLaMA-3-8B and
Gemma-2-2B with one vocabulary over text and codes).
"""

import contextlib
import copy
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from ddt_llama.checkpoint import load_tensors, save_tensors
from ddt_llama.config import UserError, check_range, let_others_read
from ddt_llama.language.pretrained import open_model, quiet, read_config
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import VOCABULARY_FILE, Vocabulary

FILE_SIZE = "4GB"  # of weights, the most in one file, unless a tensor is larger
GROWN_NOISE = 0.02  # of the spread of the text rows: breaks ties, and leaves all near the mean


@dataclass(frozen=True)
class BackboneConfig:
    """The shape of a language model; its vocabulary is given apart.

    `init_std` is the spread of the weights at first, `row_std` that of the rows of the vocabulary
    (none: the same). `head_dim` is the width of a head (none: dim / num_heads).
    family: llama; gemma is Gemma 2 (scaled embedding, soft-capped logits) with full attention in
    every layer; qwen is Qwen 3 (normalised queries and keys).
    """

    family: Literal["llama", "gemma", "qwen"] = "llama"
    dim: int = 256
    depth: int = 6
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int | None = None
    mlp_dim: int = 704
    max_positions: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    row_std: float | None = None
    tied: bool = True

    def __post_init__(self) -> None:
        """Refuse shapes that no attention has."""
        check_range(self, 1, math.inf, "dim", "depth", "num_heads", "num_kv_heads", "mlp_dim")
        check_range(self, 1, math.inf, "max_positions", "rope_theta")
        check_range(self, 0, math.inf, "norm_eps", "row_std")
        check_range(self, 1e-6, 1, "init_std")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise UserError(
                f"backbone head_dim: given {self.head_dim}, allowed are multiples of 2 (rotary "
                "positions turn pairs)"
            )
        if self.head_dim is None and self.dim % (2 * self.num_heads):
            raise UserError(
                f"backbone dim: given {self.dim}, allowed are multiples of 2 x num_heads = "
                f"{2 * self.num_heads} (rotary positions turn pairs)"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"backbone num_kv_heads: given {self.num_kv_heads}, allowed are the divisors of "
                f"num_heads = {self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.dim // self.num_heads


class Language(NamedTuple):
    """What a language folder holds."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    text: TextTokenizer


def nano() -> BackboneConfig:
    """About 4 million parameters beside the vocabulary: for two CPU cores, bundled."""
    return BackboneConfig(depth=6, num_heads=4, num_kv_heads=2, mlp_dim=576, row_std=0.12)


def small() -> BackboneConfig:
    """About 30 million parameters: trained on one GPU in minutes."""
    return BackboneConfig(dim=512, depth=8, num_heads=8, num_kv_heads=8, mlp_dim=1280, row_std=0.12)


def base() -> BackboneConfig:
    """About 350 million parameters: one node."""
    return BackboneConfig(
        dim=1024, depth=24, num_heads=16, num_kv_heads=8, mlp_dim=3584, max_positions=2048
    )


def paper() -> BackboneConfig:
    """The shape of LLaMA-3-8B, the backbone of DDT-LLaMA."""
    return BackboneConfig(
        dim=4096,
        depth=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        max_positions=8192,
        rope_theta=500_000.0,
        tied=False,
    )


def count_parameters(config: BackboneConfig, vocabulary: Vocabulary) -> int:
    """Return the number of parameters of `build(config, vocabulary)`, by formula."""
    rows = vocabulary.size * config.dim
    norms = {"llama": 2 * config.dim, "gemma": 4 * config.dim, "qwen": 2 * config.dim}
    layer = _matrix_weights(config) + norms[config.family]
    if config.family == "qwen":
        layer += 2 * config.head_width
    return rows * (1 if config.tied else 2) + config.depth * layer + config.dim


def flops_per_token(config: BackboneConfig, vocabulary: Vocabulary, context: int) -> int:
    """Return the FLOPs of the forward pass of one token that attends to `context` tokens.

    Two for each weight of a matrix product (head included, embedding lookup not), four for each
    token attended to, head and width. A training step costs three times as much; over a causal
    sequence of length L the mean context is (L + 1) / 2.
    """
    matrices = config.depth * _matrix_weights(config) + vocabulary.size * config.dim
    attended = config.num_heads * config.head_width
    return 2 * matrices + 4 * config.depth * attended * context


def build(
    config: BackboneConfig,
    vocabulary: Vocabulary,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Build an untrained causal LM, in training mode; the same seed gives the same weights.

    Weights are drawn on the CPU, so that they do not depend on the device; on "meta" none are.
    The global random state is left as it was.
    """
    settings = _transformers_config(config, vocabulary)
    on_meta = torch.device(device).type == "meta"
    with quiet(), _seeded(seed), torch.device("meta" if on_meta else "cpu"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    if config.row_std is not None:
        _scale_rows(model, config.row_std / config.init_std)
    return model if on_meta else _move(model, device)


def text_rows(folder: str | os.PathLike[str]) -> int:
    """Return the number of vocabulary rows of a checkpoint, padded rows included.

    This is the `text_size` of the vocabulary it can be grown to.
    """
    settings = read_config(Path(folder)).get_text_config()
    rows = getattr(settings, "vocab_size", None)
    if not isinstance(rows, int):
        raise UserError(
            f"{folder}: a {settings.model_type} model has no vocabulary; give a causal LM"
        )
    return rows


def grow(
    folder: str | os.PathLike[str],
    vocabulary: Vocabulary,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a causal LM from a local checkpoint and add the rows of marks and codes.

    The text rows of embedding and head stay as they are, bit by bit, so over text rows the logits
    are those of the checkpoint. A new row is the mean of the text rows plus seeded noise of
    `GROWN_NOISE` times their spread.
    Raises UserError where the checkpoint cannot be opened, or where its rows are not `text_size`.
    """
    folder = Path(folder)
    rows = text_rows(folder)
    if rows != vocabulary.text_size:
        raise UserError(
            f"{folder}: its embedding has {rows} rows, the vocabulary counts "
            f"{vocabulary.text_size} of text; give text_size={rows}"
        )
    model = open_model(folder, dtype)
    with quiet(), _seeded(seed):
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for table in vocabulary_tables(model):
        fill_new_rows(table, rows, generator)
    set_marks(model.config, vocabulary)
    cast(nn.Embedding, model.get_input_embeddings()).padding_idx = vocabulary.pad
    # The checkpoint's own sampling defaults (temperature, its end of text) do not hold any more.
    model.generation_config = GenerationConfig(**marks_of(vocabulary))
    return model


def vocabulary_tables(model: PreTrainedModel) -> list[Tensor]:
    """Return embedding and head, each `v d`; a single table where both are one."""
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    head = cast(nn.Linear, model.get_output_embeddings()).weight
    return [embedding] if head is embedding else [embedding, head]


def save(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a language folder that `load` and `AutoModelForCausalLM` open.

    Weights are safetensors, in `dtype` where one is given. torch.float8_e4m3fn stores matrices and
    tables so (an error of at most 6 % of a number above 1/64, of 1/1024 below) and all else in
    bfloat16. Each file appears whole or not at all.
    Raises UserError where the parts do not belong together or the folder cannot be written.
    """
    folder = Path(folder)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    check_parts(folder, embedding.num_embeddings, vocabulary, text)
    if dtype not in (None, torch.float8_e4m3fn, model.dtype):
        model = _move(copy.deepcopy(model), dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            with quiet():
                model.save_pretrained(temporary, max_shard_size=FILE_SIZE)
            if dtype is torch.float8_e4m3fn:
                for path in Path(temporary).glob("model*.safetensors"):
                    save_tensors(path, _in_eight_bits(load_tensors(path)))
            written = sorted(Path(temporary).iterdir())
            # Weights of an earlier save in other shards would be read instead of these.
            names = {path.name for path in written}
            for stale in folder.glob("model*.safetensors*"):
                if stale.name not in names:
                    stale.unlink()
            for path in written:
                let_others_read(path)
                os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another place"
        ) from None
    text.save(folder)
    vocabulary.save(folder)


def _in_eight_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 else torch.bfloat16)
        for name, tensor in tensors.items()
    }


def load(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Language:
    """Open a language folder: model (in evaluation mode), vocabulary and text tokenizer.

    Reads this folder only: no network, no pickle, no code of the folder is run.
    Raises UserError, naming the file, where anything is missing, broken or of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a language folder written by this project")
    vocabulary = Vocabulary.load(folder)
    rows = text_rows(folder)
    text = TextTokenizer.load(folder)
    check_parts(folder, rows, vocabulary, text)
    return Language(_move(open_model(folder, dtype), device), vocabulary, text)


def _matrix_weights(config: BackboneConfig) -> int:
    """Count the weights of one layer that take part in matrix products."""
    attention = 2 * config.dim * (config.num_heads + config.num_kv_heads) * config.head_width
    return attention + 3 * config.dim * config.mlp_dim


def marks_of(vocabulary: Vocabulary) -> dict[str, int]:
    """Return the marks that transformers knows, by its names."""
    return {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }


def set_marks(settings: PretrainedConfig, vocabulary: Vocabulary) -> None:
    """Put the marks of a vocabulary in place of a checkpoint's own."""
    for each in (settings, settings.get_text_config()):
        for name, index in marks_of(vocabulary).items():
            setattr(each, name, index)


def _transformers_config(config: BackboneConfig, vocabulary: Vocabulary) -> PretrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **marks_of(vocabulary),
    }
    if config.family == "llama":
        return LlamaConfig(**shared)
    if config.family == "qwen":
        return Qwen3Config(**shared)
    # Differs from Gemma 2: no sliding windows, because documents are shorter than one window.
    return Gemma2Config(
        query_pre_attn_scalar=config.head_width,
        sliding_window=config.max_positions,
        layer_types=["full_attention"] * config.depth,
        **shared,
    )


@torch.no_grad()
def _scale_rows(model: PreTrainedModel, factor: float) -> None:
    for table in vocabulary_tables(model):
        table.mul_(factor)


@torch.no_grad()
def fill_new_rows(table: Tensor, old: int, generator: torch.Generator) -> None:
    """Fill the rows from `old` on: the mean of those before, and a little of their spread."""
    text = table[:old].float()
    mean, spread = text.mean(dim=0), text.std(dim=0, correction=0)
    new = torch.randn((len(table) - old, table.shape[1]), generator=generator)
    table[old:] = new.mul_(GROWN_NOISE * spread).add_(mean)  # in place: no second table in memory


def check_parts(folder: Path, rows: int, vocabulary: Vocabulary, text: TextTokenizer) -> None:
    """Raise UserError where model, vocabulary and text tokenizer do not belong together."""
    if rows != vocabulary.size:
        raise UserError(
            f"{folder}: the model has {rows} vocabulary rows, {VOCABULARY_FILE} counts "
            f"{vocabulary.size}; take both from the same model"
        )
    if text.size > vocabulary.text_size:
        raise UserError(
            f"{folder}: the text tokenizer has {text.size} ids, {VOCABULARY_FILE} counts "
            f"{vocabulary.text_size}; take both from the same model"
        )


def _move(model: PreTrainedModel, where: str | torch.device | torch.dtype) -> PreTrainedModel:
    nn.Module.to(model, where)  # the wrapper that transformers puts around it has lost its types
    return model


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs, too
        yield
