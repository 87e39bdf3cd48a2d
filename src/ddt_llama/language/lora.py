"""LoRA: a frozen language model learns by small matrices beside its own.

W x becomes W x + alpha / rank B A x; B is zero at first, so that nothing changes before training.
peft puts the matrices in place and defines the format of the folder. That is read and merged here,
without peft or transformers: drawing needs neither. Source: Hu et al. (arXiv 2106.09685).
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddt_llama import distributed
from ddt_llama.checkpoint import load_tensors, replaced, save_tensors
from ddt_llama.config import UserError, check_range, load_json, replace_file, save_json
from ddt_llama.language.vocabulary import Vocabulary

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # of peft's names of weights
NAME = "default"  # of the only adapter of a model
ROWS = ".token_adapter.trainable_tokens_delta"
# What peft may have done otherwise than `Adapter` merges.
OTHER = ("alpha_pattern", "fan_in_fan_out", "modules_to_save", "use_dora", "use_rslora")


@dataclass(frozen=True)
class LoraConfig:
    """What learns beside frozen weights.

    `rank` numbers pass between A and B, whose product counts `alpha` / `rank`; `dropout` is the
    share of A's inputs that are left out in training. `targets`: "linear" (attention and MLP),
    "attention", or names of linear layers such as q_proj. `rows`: the rows of marks and codes learn
    in full, too, in embedding and head; a model that was just grown needs it.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("linear",)
    rows: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot learn."""
        check_range(self, 1, math.inf, "rank")
        check_range(self, 0, 1, "dropout")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha: given {self.alpha}, allowed is more than 0")
        if not self.targets:
            raise UserError("targets: none given, allowed are attention, linear and names of them")


def adapt(model: Any, config: LoraConfig, vocabulary: Vocabulary, seed: int = 0) -> None:
    """Freeze a causal LM and put adapters in place, which `config` describes.

    Its class and its methods stay what they are. Beside empty weights adapters are empty, too, for
    `begin` to fill. Raises UserError where peft is not installed and for targets that the model
    lacks.
    """
    try:
        import peft
    except ImportError:
        raise UserError("lora: peft is not installed; install ddt-llama[lora]") from None
    rows = list(range(vocabulary.text_size, vocabulary.size))
    tables = [_last(name) for name in _tables(model)]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=targets_in(model, config.targets),
        trainable_token_indices=dict.fromkeys(tables, rows) if config.rows else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(settings, model)
    for layer in _adapted(model).values():
        if "token_adapter" in layer._modules:  # rows as they were, for peft's way to undo a merge
            layer.token_adapter.trainable_tokens_original.clear()
    begin(model, seed)


@torch.no_grad()
def begin(model: Any, seed: int) -> None:
    """Give adapters what they are before training: A is drawn, B zero, rows are those of the base.

    All processes take part; each fills what it holds, and what is empty stays so.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(model).values():
        if "lora_A" in layer._modules:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            for shape in (a.shape, b.shape, a.shape):  # as peft 0.21 draws: the last is A
                drawn = torch.empty(shape)
                nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator)
            a.copy_(distributed.like_shards(drawn.to(a.device), a))
            b.zero_()
        else:
            adapter = layer.token_adapter
            rows = adapter.trainable_tokens_delta[NAME]
            places = torch.tensor(adapter.token_indices[NAME])
            first = distributed.rows_of(adapter.base_layer.weight, places)
            rows.copy_(distributed.like_shards(first, rows))


def targets_in(model: Any, wanted: Iterable[str]) -> list[str]:
    """Return the names of the linear layers that are meant; UserError lists what there is."""
    linear = _linear(model)
    last = {_last(name) for name in linear}
    attention = {_last(name) for name in linear if "attn" in name or "attention" in name}
    known = {"attention": attention, "linear": last, **{name: {name} for name in last}}
    found: set[str] = set()
    for one in wanted:
        if not known.get(one):
            allowed = ", ".join(sorted(name for name in known if known[name]))
            raise UserError(
                f"lora.targets: given {one!r}, allowed for a {model.config.model_type} model are "
                f"{allowed or 'none: it has no linear layers'}"
            )
        found |= known[one]
    return sorted(found)


def count(model: Any, config: LoraConfig, vocabulary: Vocabulary) -> int:
    """Return how many numbers learn in a model that `adapt` has not changed yet."""
    chosen = targets_in(model, config.targets)
    pairs = sum(
        config.rank * (layer.in_features + layer.out_features)
        for name, layer in _linear(model).items()
        if _last(name) in chosen
    )
    tables = _tables(model).values()
    rows = vocabulary.size - vocabulary.text_size
    return pairs + config.rows * sum(rows * table.weight.shape[1] for table in tables)


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Make a plain model of an adapted one for the length of a `with` block: adapters merged.

    The weights of adapted layers are new ones, all others shared. A model without adapters stays
    as it is.
    """
    shared: dict[int, nn.Parameter] = {}  # tied tables stay tied
    with _in_place(model, lambda layer: _with_merged(layer, shared)):
        yield


@contextmanager
def without(model: Any) -> Iterator[None]:
    """Make a plain model of an adapted one for the length of a `with` block: as it was before."""
    with _in_place(model, _base):
        yield


def save(folder: Path, model: Any, base: str, described: Mapping[str, Any]) -> None:
    """Write the adapters of a model as a folder that peft and `Adapter.read` open.

    `base` names the model that they belong to, for people to read; what it is known by is a
    fingerprint. `described` is what a release of the whole model says of itself. All or nothing;
    all processes take part, the main one writes.
    """
    import peft

    learned = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors: Any = {f"{PREFIX}{name}": distributed.gathered(one) for name, one in learned.items()}
    settings = model.peft_config[NAME]
    settings.base_model_name_or_path = base

    def write() -> None:
        weights = {
            f"{name}.weight": distributed.own_shard(_base(layer).weight)
            for name, layer in _adapted(model).items()
            if "lora_A" in layer._modules
        }
        origin = {"name": base, "fingerprint": fingerprint(weights, weights)}
        with replaced(folder) as partial:
            settings.save_pretrained(str(partial))
            save_tensors(partial / WEIGHTS_FILE, tensors)
            save_json(partial / "config.json", {**described, "adapter_of": origin})

    distributed.on_main(write)


def publish(source: Path, folder: Path, described: Mapping[str, Any]) -> None:
    """Write the adapter `source` anew, in 16 bits, with what is now said of the whole model.

    Raises UserError where `folder` holds other things than an adapter.
    """
    check_place(folder)
    tensors = load_tensors(source / WEIGHTS_FILE)
    settings = (source / CONFIG_FILE).read_bytes()
    base = _origin(source)
    with replaced(folder) as partial:
        replace_file(partial / CONFIG_FILE, settings)
        save_tensors(partial / WEIGHTS_FILE, tensors, torch.float16)
        save_json(partial / "config.json", {**described, "adapter_of": base})


def check_place(folder: Path) -> None:
    """Raise UserError where `folder` holds other things than an adapter, which would be lost."""
    inside = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or not inside <= {CONFIG_FILE, WEIGHTS_FILE, "config.json"}:
        raise UserError(f"{folder}: exists and is no adapter; choose another folder")


class Adapter(NamedTuple):
    """What an adapter folder holds, by the names of the weights that it changes."""

    folder: Path
    pairs: Mapping[str, tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]]  # A and B
    rows: Mapping[str, tuple[Sequence[int], Float[Tensor, "n d"]]]  # which, and what they are
    alpha: float
    base: str  # its name
    fingerprint: str | None  # of the base; None where peft alone wrote the folder

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Open a folder of plain LoRA, ours or peft's; UserError where it is damaged or another."""
        settings = load_json(folder / CONFIG_FILE)
        told = settings if isinstance(settings, dict) else {}
        wrong = [f"{name} {told[name]}" for name in OTHER if told.get(name)]
        alpha: Any = told.get("lora_alpha")
        if told.get("peft_type") != "LORA" or not isinstance(alpha, int | float):
            wrong = [f"peft_type {told.get('peft_type')}, lora_alpha {alpha}"]
        if wrong:
            raise UserError(f"{folder}: given {wrong[0]}, allowed is plain LoRA; merge it by peft")
        tensors = load_tensors(folder / WEIGHTS_FILE)
        pairs, rows = {}, {}
        for name in list(tensors):
            module = name.removeprefix(PREFIX)
            if module.endswith(".lora_A.weight"):
                module = module.removesuffix(".lora_A.weight")
                b = tensors.pop(f"{PREFIX}{module}.lora_B.weight", None)
                if b is not None:
                    pairs[f"{module}.weight"] = tensors.pop(name), b
            elif module.endswith(ROWS):
                module = module.removesuffix(ROWS)
                places = told.get("trainable_token_indices")
                if isinstance(places, dict):
                    places = places.get(_last(module))
                rows[f"{module}.weight"] = places or [], tensors.pop(name)
        if tensors:
            raise UserError(
                f"{folder}: damaged or not plain LoRA ({next(iter(tensors))}); save it again"
            )
        own = _origin(folder)
        base = own.get("name") or told.get("base_model_name_or_path") or "another model"
        return cls(folder, pairs, rows, alpha, base, own.get("fingerprint"))

    @torch.no_grad()
    def merge_into(self, weights: Mapping[str, Tensor]) -> None:
        """Change the weights of its base in place; UserError where they are another model's."""
        self._check(weights)
        for name in self.pairs.keys() | self.rows.keys():
            weights[name].copy_(self.merged(name, weights[name]))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of its base with what this adapter changes in it."""
        if name in self.pairs:
            a, b = (one.to(weight.device) for one in self.pairs[name])
            weight = (weight.float() + product(a, b, self.alpha)).to(weight.dtype)
        if name in self.rows:
            places, rows = self.rows[name]
            index = torch.tensor(places, device=weight.device)
            weight = weight.index_copy(0, index, rows.to(weight))
        return weight

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        wrong = None
        for name, (a, b) in self.pairs.items():
            shape = (len(b), a.shape[1])
            if name not in weights or weights[name].shape != shape or len(a) != b.shape[1]:
                wrong = f"{name} is to be {list(shape)}"
        for name, (places, rows) in self.rows.items():
            fits = name in weights and weights[name].shape[1] == rows.shape[1]
            if not fits or not _name_rows(places, len(rows), len(weights[name])):
                wrong = f"{name} is to have {len(rows)} rows in place of others"
        if wrong is None and self.fingerprint is not None:
            found = fingerprint(weights, self.pairs)
            if found != self.fingerprint:
                wrong = f"its fingerprint is to be {self.fingerprint}, and is {found}"
        if wrong is not None:
            raise UserError(
                f"{self.folder}: an adapter of {self.base}, and the model given is another "
                f"({wrong}); give the one that it was trained on"
            )


def product(a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], alpha: float) -> Float[Tensor, "o i"]:
    """Return what is added to a weight: alpha / rank B A."""
    return (b @ a) * (alpha / len(a))


def fingerprint(weights: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Return 16 letters for the values of some matrices, whatever precision holds them.

    The first row of each stands for all: no training leaves it alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(names):
        row = weights[name][0].detach().float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(row.numpy().tobytes())
    return digest.hexdigest()


def _origin(folder: Path) -> dict[str, Any]:
    """Return what an adapter says of its base; nothing where peft alone wrote it."""
    file = folder / "config.json"
    described = load_json(file) if file.is_file() else {}
    told = described.get("adapter_of", {}) if isinstance(described, dict) else None
    if not isinstance(told, dict):
        raise UserError(f"{file}: damaged (adapter_of); save it again")
    return told


def _name_rows(places: Any, count: int, limit: int) -> bool:
    """Say whether `places` are so many rows of a table of `limit`."""
    if not isinstance(places, list) or len(places) != count:
        return False
    return all(isinstance(one, int) and 0 <= one < limit for one in places)


def _linear(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of a plain model by name, its head left out."""
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _tables(model: Any) -> dict[str, Any]:
    """Return embedding and, where it is another table, head by their names."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: module for module in wanted}


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the layers that peft has put in the place of others, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if {"lora_A", "token_adapter"} & layer._modules.keys()
    }


def _base(layer: Any) -> Any:
    """Return the layer in whose place an adapted one stands."""
    return getattr(layer, "token_adapter", layer).base_layer


@torch.no_grad()
def _with_merged(layer: Any, shared: dict[int, nn.Parameter]) -> Any:
    """Return a copy of the base whose weight is the merged one; all else is shared with it."""
    base = _base(layer)
    if "lora_A" in layer._modules:
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        change = product(a, b, layer.lora_alpha[NAME])
        weight = (base.weight.float() + change).to(base.weight.dtype)
    else:
        weight = layer.weight
    plain = copy.copy(base)
    plain._parameters = dict(base._parameters)
    plain.weight = shared.setdefault(id(base.weight), nn.Parameter(weight, requires_grad=False))
    return plain


@contextmanager
def _in_place(model: Any, plain: Callable[[Any], Any]) -> Iterator[None]:
    """Put `plain(layer)` in the place of every adapted layer, and then the layers back."""
    layers = _adapted(model)
    for name, layer in layers.items():
        model.set_submodule(name, plain(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
