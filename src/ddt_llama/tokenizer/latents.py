"""The space in which a tokenizer works: the pixels themselves, or the latents of a frozen VAE.

Values, not modules: a configuration holds them, JSON keeps their fields, and a tokenizer that
holds one does not save the VAE's weights again, only where they are and their fingerprint.
The paper's space: the VAE of SD3 (Esser et al. 2024), normalised as (z - 0.0609) * 1.5305.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.tokenizer.diffusers_folder import WEIGHTS, read_config

SCALE = 0.18215  # of Stable Diffusion 1, whose first configs do not say it


@dataclass(frozen=True)
class Pixels:
    """The identity: latents are the pixels."""

    @property
    def channels(self) -> int:
        """Return 3, the colours."""
        return 3

    @property
    def downsample(self) -> int:
        """Return 1."""
        return 1

    def open(self) -> None:
        """Open nothing."""

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the images."""
        return images

    def decode(self, latents: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the latents."""
        return latents


@dataclass(frozen=True)
class VaeLatents:
    """Latents (z - shift) * scale of a diffusers `AutoencoderKL` in a local folder.

    z is the mode of the posterior, so an image has one latent. `shift` and `scale` are those of
    the VAE's config where they are None. With a `fingerprint` (sha256 of the weights file) other
    weights are refused; `pinned` fills all three in for saving. The VAE is read at the first
    encode or decode, follows its input's device, stays in float32 and is never trained; decode
    passes gradients to the latents. Raises UserError where the folder holds no such VAE.
    """

    folder: str
    shift: float | None = None
    scale: float | None = None
    fingerprint: str | None = None

    @property
    def channels(self) -> int:
        """Return the VAE's latent channels."""
        return int(self.vae_config["latent_channels"])

    @property
    def downsample(self) -> int:
        """Return 2 for every stage of the VAE but the first."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def pinned(self) -> "VaeLatents":
        """Return the same space with shift, scale and fingerprint written out."""
        shift, scale = self.normalisation
        fingerprint = weights_fingerprint(Path(self.folder))
        return replace(self, shift=shift, scale=scale, fingerprint=fingerprint)

    def open(self) -> None:
        """Read the VAE now."""
        _ = self.vae

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
        """Return normalised latents; UserError unless `downsample` divides both sides."""
        if images.shape[-1] % self.downsample or images.shape[-2] % self.downsample:
            raise UserError(
                f"images of {images.shape[-1]}x{images.shape[-2]} pixels: the VAE in "
                f"{self.folder} needs sides that {self.downsample} divides; resize them"
            )
        with torch.autocast(images.device.type, enabled=False):
            z = self.vae.to(images.device).encode(images.float()).latent_dist.mode()
        shift, scale = self.normalisation
        return (z - shift) * scale

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Return the images of normalised latents."""
        shift, scale = self.normalisation
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float() / scale + shift
            return self.vae.to(latents.device).decode(z).sample

    @property
    def normalisation(self) -> tuple[float, float]:
        """Return (shift, scale), from the VAE's config where they are not given."""
        shift = self.vae_config.get("shift_factor") if self.shift is None else self.shift
        scale = self.vae_config.get("scaling_factor", SCALE) if self.scale is None else self.scale
        return float(shift or 0.0), float(scale)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """Return config.json of the folder, checked to be that of an AutoencoderKL."""
        return read_config(Path(self.folder), "AutoencoderKL")

    @cached_property
    def vae(self) -> Any:
        """Return the AutoencoderKL, frozen; read once."""
        found = weights_fingerprint(Path(self.folder))
        if self.fingerprint is not None and found != self.fingerprint:
            raise UserError(
                f"{self.folder}: the VAE's weights have sha256 {found[:12]}.., the tokenizer was "
                f"made with {self.fingerprint[:12]}..; give the folder of that VAE"
            )
        assert self.vae_config  # A folder of another class is refused before its weights load.
        return load_vae(Path(self.folder))

    def __deepcopy__(self, memo: dict[int, Any]) -> "VaeLatents":
        """Return itself: copies of a model (weight averages) share the one frozen VAE."""
        return self


def weights_fingerprint(folder: Path) -> str:
    """Return the sha256 of the folder's weights file; UserError where there is none."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise UserError(
            f"{folder}: holds no readable {WEIGHTS}; give the local folder of a diffusers "
            "AutoencoderKL saved with save_pretrained"
        ) from None


def load_vae(folder: Path) -> Any:
    """Read a VAE from safetensors, in float32, frozen; UserError where a weight is missing."""
    try:
        diffusers = import_module("diffusers")  # late: it takes seconds, and is an extra
    except ImportError:
        raise UserError("a VAE needs diffusers: pip install 'ddt-llama[vae]'") from None
    try:
        vae, report = diffusers.AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors share no base class of their errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the VAE cannot be read ({reason}); fetch it again") from None
    if report["missing_keys"]:
        raise UserError(
            f"{folder}: {WEIGHTS} lacks {len(report['missing_keys'])} weights of the VAE, "
            f"{report['missing_keys'][0]} first; fetch it again"
        )
    return vae.float().eval().requires_grad_(False)
