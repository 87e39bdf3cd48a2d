"""Release folders: find one by name and open it (`Model.save` writes one).

`load("nano")` is bundled with the package, `load("small")` lies in the repository, anything else is
a folder or a name on the Hugging Face hub. Weights are safetensors only. For LLaMA-like language
models nothing of transformers is imported, which is most of the start-up time of a command.
"""

import importlib.resources
import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ddt_llama.checkpoint import load_tensors
from ddt_llama.config import UserError, from_dict, load_json
from ddt_llama.generation.engine import Decoder, Engine
from ddt_llama.generation.history import history_of
from ddt_llama.generation.lean import LeanDecoder, obstacle
from ddt_llama.generation.model import FORMAT, VERSION, Model
from ddt_llama.generation.precision import Weights, check, dtype_of, hold
from ddt_llama.generation.programs import Stage
from ddt_llama.generation.settings import Settings
from ddt_llama.language.lora import CONFIG_FILE, Adapter
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary

RELEASES = ("nano", "small")  # names that `load` knows without a path
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.md"]


def load(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    weights: Weights | None = None,
    compile: bool = False,
) -> Model:
    """Open a model: "nano", "small", the folder of a run or release, or a hub name `owner/name`.

    A hub name may end in `@revision`. `adapter`: a folder (or run, or hub name) of what LoRA has
    learned beside this model; it is merged. `device` None takes the GPU where there is one.
    `weights`: in how many bits the language model holds its own while it writes; None is float32
    on a CPU and as stored on a GPU. `compile` (for many drawings on a GPU): torch compiles its
    steps now, which takes a while. Raises UserError that lists what exists.
    """
    folder = find(name)
    described = description(folder)
    if "adapter_of" in described:
        raise UserError(f"{folder}: an adapter alone; give its model, with --adapter {folder}")
    added = None if adapter is None else Adapter.read(find_adapter(adapter))
    own = folder if added is None else added.folder
    if (own / "config.json").is_file():  # not where peft alone wrote an adapter
        described = description(own)
    place = _place(device)
    check(weights, place)
    if compile and place.type != "cuda":
        raise UserError(f"compile: for GPUs, and this is a {place.type}; leave it out")
    tokenizer = _open_tokenizer(folder / "tokenizer", place)
    settings = from_dict(Settings, described.get("generation", {}), "generation.")
    language = vocabulary = text = engine = None
    if (folder / "language").is_dir():
        vocabulary = Vocabulary.load(folder / "language")
        text = TextTokenizer.load(folder / "language")
        decoder = open_decoder(folder / "language", vocabulary, place, added, weights)
        if compile and isinstance(decoder, LeanDecoder):  # transformers' own is left as it is
            decoder.compile()
        language = partial(_open_language, folder / "language", place, added)
        engine = Engine(decoder, vocabulary, text.size)
    elif added is not None:
        raise UserError(f"adapter: {name} is an image tokenizer alone; give {added.base}")
    model = Model(
        tokenizer,
        language,
        vocabulary,
        text,
        engine=engine,
        settings=settings,
        stage=described.get("stage", "instruct"),
        name=str(described.get("name", folder.name)),
    )
    model.history = history_of(own)
    return model


def find(name: str | Path) -> Path:
    """Return the release folder behind a name; a hub name is fetched into the local cache."""
    if str(name) == "nano":
        return _existing(_bundled(), "nano", "reinstall, or train it with scripts/speedrun.sh")
    if str(name) == "small":
        return _existing(_small(), "small", "make it: SIZE=small scripts/speedrun.sh")
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:  # the home of nobody
        raise UserError(f"model {str(name)!r}: {error}; check the spelling") from None
    of_run = folder / "release"
    if (of_run / "config.json").is_file():
        return of_run
    if folder.is_dir():
        return folder
    if HUB_NAME.fullmatch(str(name)) and not folder.parent.is_dir():
        return _fetch(str(name))
    here = [
        known for known, path in (("nano", _bundled()), ("small", _small())) if _is_release(path)
    ]
    raise UserError(
        f"unknown model {str(name)!r}: allowed are {', '.join([*here, 'a release folder'])} "
        "or a hub name owner/name; check the spelling"
    )


def find_adapter(name: str | Path) -> Path:
    """Return the folder of an adapter: that of a run, its own, or of a hub name."""
    place = Path(name)
    if HUB_NAME.fullmatch(str(name)) and not place.exists() and not place.parent.is_dir():
        place = _fetch(str(name))
    for folder in (place / "adapter", place):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(
        f"adapter: {name} has no {CONFIG_FILE}; give the folder of ddt train lora, of ddt publish "
        "--adapter or of peft"
    )


def open_decoder(
    folder: Path,
    vocabulary: Vocabulary,
    device: torch.device,
    adapter: Adapter | None = None,
    weights: Weights | None = None,
) -> Decoder:
    """Open the language folder for generation alone, through the fast path where it applies."""
    config = load_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a config of transformers; fetch it again")
    try:
        slow = obstacle(config) is not None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'}: damaged ({error}); fetch it again") from None
    if slow:
        from ddt_llama.generation.generic import GenericDecoder

        module = _open_language(folder, device, adapter)
        return GenericDecoder(module if weights is None else hold(module, weights))
    dtype = dtype_of(weights, device)
    merges = adapter is not None and dtype is not None
    state = _read_weights(folder, torch.float32 if merges else dtype, device)
    if adapter is not None:
        adapter.merge_into(state)
        state = {name: one.to(dtype or one.dtype) for name, one in state.items()}
    try:
        decoder = LeanDecoder(config, state, int8=weights == "int8")
    except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"missing or misfit: {error}"
        raise UserError(f"{folder}: its weights are another model's ({reason})") from None
    rows = len(decoder.embedding)
    if rows != vocabulary.size:
        raise UserError(
            f"{folder}: the model has {rows} vocabulary rows, vocabulary.json counts "
            f"{vocabulary.size}; take both from the same model"
        )
    return decoder


def _open_language(folder: Path, device: torch.device, adapter: Adapter | None = None) -> nn.Module:
    """Open the transformers module, for likelihoods and further training."""
    from ddt_llama.language import backbone

    model = backbone.load(folder, device=device).model
    if adapter is not None:
        adapter.merge_into(model.state_dict())
    return model


def description(folder: Path) -> dict[str, Any]:
    """Return what a release says of itself; UserError for other folders and other versions."""
    described = load_json(folder / "config.json")
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(
            f'{folder}: not a release of ddt-llama (config.json lacks "format": "{FORMAT}"); '
            "give the folder that training or Model.save wrote"
        )
    version = described.get("version")
    if version != VERSION:
        older = isinstance(version, int) and version < VERSION
        remedy = "train or fetch it again" if older else "update ddt-llama"
        raise UserError(
            f"{folder}: release version {version!r}, this program reads {VERSION}; {remedy}"
        )
    if described.get("stage", "instruct") not in get_args(Stage):
        allowed = ", ".join(get_args(Stage))
        raise UserError(f"{folder}: stage {described['stage']!r}; allowed are {allowed}")
    return described


def _place(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # unknown to torch, or no such hardware
        raise UserError(
            f"device {str(device)!r} is not available here; give cpu, or leave it out"
        ) from None


def _open_tokenizer(folder: Path, device: torch.device) -> Any:
    from ddt_llama import tokenizer

    opened = tokenizer.load(folder)
    return opened.to(device).eval() if isinstance(opened, nn.Module) else opened


def _read_weights(
    folder: Path, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.is_file():
        shards = {Path(name).name for name in load_json(index).get("weight_map", {}).values()}
    weights: dict[str, Tensor] = {}
    for shard in sorted(shards):
        weights |= load_tensors(folder / shard, dtype, device)
    eight = torch.float8_e4m3fn  # is for storing; nothing computes in it
    return {name: w.bfloat16() if w.dtype is eight else w for name, w in weights.items()}


def _bundled() -> Path:
    return Path(str(importlib.resources.files("ddt_llama") / "weights" / "nano"))


def _small() -> Path:
    return Path(__file__).resolve().parents[3] / "weights" / "small"


def _is_release(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _existing(folder: Path, name: str, remedy: str) -> Path:
    if not _is_release(folder):
        raise UserError(f"model {name!r} is not here ({folder} has no config.json); {remedy}")
    return folder


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
        )
    except Exception as error:  # network, rights, unknown name: the library has a type for each
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model {name!r} is no folder here and was not found on the hub ({reason}); "
            "allowed are nano, small, a release folder, or owner/name"
        ) from None
