"""What every image tokenizer offers: images to codes and back.

The language side sees only this protocol; method and rivals are exchangeable behind it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ddt_llama.checkpoint import load_into, load_tensors
from ddt_llama.config import UserError, from_dict, load_json, to_dict

N = TypeVar("N", bound=nn.Module)


@runtime_checkable
class Tokenizer(Protocol):
    """Images `b 3 h w` in [-1, 1] to codes `b k` in 0..codebook_size-1, and back.

    Abilities are asked for by name, never the kind of a tokenizer: `refines` says that steps, seed
    and guidance change what `decode` returns, `prefixes` that the `visible` coarsest codes alone
    are a picture, `renders` that `steps` 0 decodes in one pass, without noise.
    """

    num_tokens: int
    codebook_size: int
    image_size: int
    refines: bool
    prefixes: bool

    @property
    def renders(self) -> bool:
        """Say whether there is a renderer."""
        ...

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b k"]:
        """Return the codes, column 0 the finest."""
        ...

    def decode(
        self,
        codes: Int[Tensor, "b k"],
        *,
        steps: int = 8,
        visible: int | Bool[Tensor, " k"] | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images; the same codes and seed give the same images.

        `visible`: the number of coarsest codes to use, or which ones; the others are hidden (zero
        vectors, and masked where tokens are attended to).
        """
        ...

    def code_vectors(self) -> Float[Tensor, "v e"]:
        """Return the unit vector of each code: near vectors look alike."""
        ...

    def to_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Reorder the columns to the order that the language model reads and writes."""
        ...

    def from_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Undo `to_language`."""
        ...

    def fingerprint(self) -> str:
        """Return letters that stand for all that codes depend on: other ones, other codes."""
        ...

    def save(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; floats are stored as `dtype` if given."""
        ...


def config_of(folder: str | Path, kind: str, config: type[Any]) -> Any:
    """Return the `config` of a network that was saved as one of `kind`; UserError for another."""
    described = dict(load_json(Path(folder) / "config.json"))
    if described.pop("kind", None) != kind:
        raise UserError(f"{folder}: not a {kind} tokenizer; choose the folder of one")
    return from_dict(config, described)


def open_network(folder: str | Path, kind: str, config: type[Any], build: Callable[[Any], N]) -> N:
    """Return a network that was saved as one of `kind`, in eval mode.

    `config` is what its config.json describes, `build` makes the network of it. Raises UserError
    for the folder of another kind, and for a damaged one.
    """
    model = build(config_of(folder, kind, config))
    source = Path(folder) / "model.safetensors"
    load_into(model, load_tensors(source), source)
    return model.eval()


def codes_fingerprint(network: nn.Module, config: Any, others: Sequence[str]) -> str:
    """Return 16 letters for the encoder, the codebook and the config of a tokenizer.

    `others` are fields of the config that codes do not depend on.
    """
    settings = {name: value for name, value in to_dict(config).items() if name not in others}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, tensor in network.state_dict().items():
        if name.startswith("encoder.") or name in ("quantizer.codebook", "quantizer.lengths"):
            digest.update(name.encode())
            plain = tensor.detach().cpu().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def visible_mask(visible: int | Bool[Tensor, " k"] | None, num_tokens: int) -> Bool[Tensor, " k"]:
    """Return which tokens are to be used; a number counts from the coarse end, None is all.

    Raises UserError for a number of tokens that there are not, and a mask of another length.
    """
    if isinstance(visible, Tensor):
        if len(visible) != num_tokens:
            raise UserError(f"visible names {len(visible)} tokens; there are {num_tokens}")
        return visible
    count = num_tokens if visible is None else visible
    if not 0 <= count <= num_tokens:
        raise UserError(f"visible is {visible}; it must lie in 0..{num_tokens}")
    return torch.arange(num_tokens) >= num_tokens - count
