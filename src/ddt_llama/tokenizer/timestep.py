"""The DDT tokenizer: an image as T codes, each tied to a timestep of diffusion.

Encoder, quantizer and decoder put together: `forward` is what training needs, `encode` and
`decode` are the `Tokenizer` protocol. Source: DDT-LLaMA (arXiv 2504.14666), section 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ddt_llama.checkpoint import load_into, load_tensors, save_release, save_tensors
from ddt_llama.config import UserError, check_range, to_dict
from ddt_llama.diffusion import Cosine, DiscreteDDPM, Prediction, Straight, sample, step_times
from ddt_llama.tokenizer.base import codes_fingerprint, open_network, visible_mask
from ddt_llama.tokenizer.decoder import Decoder, DecoderConfig, Memory
from ddt_llama.tokenizer.encoder import Encoder, EncoderConfig
from ddt_llama.tokenizer.latents import Pixels, VaeLatents
from ddt_llama.tokenizer.quantizer import Quantized, Quantizer, QuantizerConfig
from ddt_llama.tokenizer.renderer import Renderer
from ddt_llama.tokenizer.schedule import LanguageOrder, TokenSchedule, step_seeds

KIND = "timestep"
RENDERER = "renderer.safetensors"  # in a folder, where there is one
OF_DECODING = ("pieces", "language_order", "prediction", "path", "shift", "decoder")


@dataclass(frozen=True)
class TimestepTokenizerConfig:
    """Everything that determines the network.

    `image_size` in pixels; `latents` is the space that is tokenised, with its `channels` and
    `downsample` (pixels a cell) stated here too, so that a network can be built without its VAE;
    `patch` in cells of that space. `shift` > 1 lets decoding take more of its steps near noise
    (see `step_times`). Raises UserError where sizes do not divide.
    """

    image_size: int = 64
    latents: Pixels | VaeLatents = Pixels()
    channels: int = 3
    downsample: int = 1
    patch: int = 8
    num_tokens: int = 32
    pieces: tuple[float, ...] = (1.0,)
    language_order: LanguageOrder = "coarse_to_fine"
    prediction: Prediction = "clean"
    path: Straight | Cosine | DiscreteDDPM = Straight()
    shift: float = 1.0
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that leave a rest."""
        check_range(self, 1, math.inf, "image_size", "channels", "downsample", "patch")
        TokenSchedule(self.num_tokens, self.pieces)  # refuses what it cannot have
        if self.image_size % (self.downsample * self.patch):
            raise UserError(
                f"image_size {self.image_size} is not a multiple of downsample x patch = "
                f"{self.downsample} x {self.patch}; choose sizes that divide"
            )
        step_times(1, shift=self.shift)  # refuses a shift that is not positive

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.downsample // self.patch

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.patch**2

    def open_latents(self) -> None:
        """Open the latent space; UserError where there is none, or another than is stated here."""
        latents = self.latents
        if (latents.channels, latents.downsample) != (self.channels, self.downsample):
            raise UserError(
                f"the latents have {latents.channels} channels and {latents.downsample} pixels a "
                f"cell, the recipe {self.channels} and {self.downsample}; "
                "set channels and downsample to match"
            )
        latents.open()


class Denoised(NamedTuple):
    """What one training pass returns.

    `output` is the network's answer to every draw (clean image, velocity or noise), `features` are
    the encoder's, before the quantizer.
    """

    output: Float[Tensor, "b draws n p"]
    features: Float[Tensor, "b k e"]
    quantized: Quantized


class TimestepTokenizer(nn.Module):
    """Images `b 3 h w` in [-1, 1] to codes `b k` (index 0 finest) and back.

    `renderer` decodes in one pass, without noise, once one was trained or opened.
    """

    refines = True
    prefixes = True

    def __init__(self, config: TimestepTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.num_tokens
        self.codebook_size = config.quantizer.codebook_size
        self.image_size = config.image_size
        self.schedule = TokenSchedule(config.num_tokens, config.pieces, config.language_order)
        self.quantizer = Quantizer(config.quantizer, config.num_tokens)
        sizes = {
            "patch_dim": config.patch_dim,
            "grid": config.grid,
            "num_tokens": config.num_tokens,
            "code_dim": config.quantizer.code_dim,
        }
        self.encoder = Encoder(config.encoder, **sizes)
        self.decoder = Decoder(config.decoder, **sizes)
        self.renderer: Renderer | None = None

    @property
    def renders(self) -> bool:
        """Say whether there is a renderer."""
        return self.renderer is not None

    def add_renderer(self) -> Renderer:
        """Return the renderer; where there is none it is made, and begins as the decoder does."""
        if self.renderer is None:
            self.renderer = Renderer(self.decoder, self.config.prediction)
        return self.renderer

    def to_patches(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n p"]:
        """Carry images into the latent space and cut them; UserError for images of another size."""
        size = self.image_size
        if images.ndim != 4 or tuple(images.shape[-2:]) != (size, size):
            raise UserError(
                f"got images of shape {tuple(images.shape)}; this tokenizer reads "
                f"(b, 3, {size}, {size}): resize and crop them first"
            )
        self.config.open_latents()
        return self.patchify(self.config.latents.encode(images))

    def patchify(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Cut images into square patches in raster order."""
        p = self.config.patch
        return rearrange(images, "b c (y p) (x q) -> b (y x) (p q c)", p=p, q=p)

    def unpatchify(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b c h w"]:
        """Undo `patchify`."""
        p, y = self.config.patch, self.config.grid
        return rearrange(patches, "b (y x) (p q c) -> b c (y p) (x q)", p=p, q=p, y=y)

    def forward(
        self,
        patches: Float[Tensor, "b n p"],
        eps: Float[Tensor, "b draws n p"],
        t: Float[Tensor, "b draws"],
        visible: Bool[Tensor, "b draws k"],
        *,
        own: Bool[Tensor, " b"] | None = None,
        rounding: float = 1.0,
        gradient_weights: Float[Tensor, " k"] | None = None,
        slips: Float[Tensor, "b k e"] | None = None,
    ) -> Denoised:
        """Encode, round and denoise several noise draws of each image.

        `visible`: which tokens each draw sees, within the window of its t (`TokenSchedule.window`);
        `own` images take their later draws not from the image but, as decoding does, from the
        network's answer to their first draw and its noise (no gradient flows through them);
        `rounding`: see `Quantizer.forward`; `gradient_weights` scale what flows back into each
        token, without changing its value (Selftok's 1 / P(visible)); `slips` move the features of
        a frozen quantizer to other codes.
        """
        features = self.encoder(patches)
        quantized = self.quantizer(features, rounding, slips)
        values = quantized.values
        if gradient_weights is not None:
            weights = gradient_weights[:, None]
            values = values * weights + (values * (1 - weights)).detach()
        tokens = self.tokens(values, visible)
        if own is None or not own.any():
            noisy = self._mix(patches[:, None].expand_as(eps), eps, t)
            return Denoised(self.denoise(tokens, noisy, t, visible), features, quantized)
        start = self._mix(patches[:, None], eps[:, :1], t[:, :1])
        answer = self.denoise(tokens, start, t[:, :1], visible[:, :1])
        config, chosen = self.config, own[:, None, None, None]
        with torch.no_grad():
            flat = answer[:, 0].float(), start[:, 0], t[:, 0]
            guess, guessed_eps = config.path.recover(*flat, config.prediction)
            clean = torch.where(chosen, guess[:, None], patches[:, None])
            eps = torch.where(chosen, guessed_eps[:, None], eps[:, 1:])
            noisy = self._mix(clean.expand_as(eps), eps, t[:, 1:])
        rest = self.denoise(tokens, noisy, t[:, 1:], visible[:, 1:])
        return Denoised(torch.cat([answer, rest], dim=1), features, quantized)

    def _mix(
        self,
        clean: Float[Tensor, "b draws n p"],
        eps: Float[Tensor, "b draws n p"],
        t: Float[Tensor, "b draws"],
    ) -> Float[Tensor, "b draws n p"]:
        flat = clean.flatten(0, 1), eps.flatten(0, 1), t.flatten()
        return self.config.path.mix(*flat).unflatten(0, t.shape)

    def tokens(
        self, values: Float[Tensor, "b k e"], visible: Bool[Tensor, "b draws k"]
    ) -> Memory | Float[Tensor, "b k e"]:
        """Return what all draws of an image share: a static token stream is run once."""
        return self.decoder.read(values, kept_tokens(visible))

    def denoise(
        self,
        tokens: Memory | Float[Tensor, "b k e"],
        noisy: Float[Tensor, "b draws n p"],
        t: Float[Tensor, "b draws"],
        visible: Bool[Tensor, "b draws k"],
    ) -> Float[Tensor, "b draws n p"]:
        """Return the decoder's output for every draw."""
        draws = t.shape[1]
        if isinstance(tokens, Memory):
            repeated = tokens.repeat(draws)
        else:
            repeated = tokens.repeat_interleave(draws, 0)
        flat = self.decoder(noisy.flatten(0, 1), t.flatten(), repeated, visible.flatten(0, 1))
        return flat.unflatten(0, t.shape)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b k"]:
        """Return the codes of images of the tokenizer's own size."""
        return self.encode_patches(self.to_patches(images))

    @torch.no_grad()
    def encode_patches(self, patches: Float[Tensor, "b n p"]) -> Int[Tensor, "b k"]:
        """Return the codes of images that are cut already."""
        features = nn.functional.normalize(self.encoder(patches).float(), dim=-1)
        return self.quantizer.cheapest(features)

    def render(
        self, values: Float[Tensor, "b k e"], visible: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b n p"]:
        """Return the renderer's picture, as patches; UserError where there is no renderer."""
        if self.renderer is None:
            raise UserError(
                "steps is 0, which is the renderer, and this tokenizer has none: give 1 or more, "
                "or train one (ddt train nano_renderer --start MODEL)"
            )
        return self.renderer(values, visible).float()

    @torch.no_grad()
    def decode(
        self,
        codes: Int[Tensor, "b k"] | Float[Tensor, "b k e"],
        *,
        steps: int = 8,
        visible: int | Bool[Tensor, " k"] | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        order: Literal[1, 2] = 1,
    ) -> Float[Tensor, "b 3 h w"]:
        """Return images in [-1, 1]; the same codes and seed give the same images.

        `steps` 0 is the renderer, where there is one: one pass, without noise, so that `seed`,
        `guidance_scale`, `eta` and `order` change nothing.
        `codes`: integers, or vectors in their place (features that were not rounded).
        `visible`: how many tokens to use, counted from the coarse end (None: all), or which.
        `guidance_scale` 1 is none; above 1 pushes away from the output without tokens.
        `eta` 1 with steps = T is the paper's DDPM loop. Raises UserError outside these ranges.
        """
        if steps < 0:
            raise UserError(f"steps is {steps}; it must be at least 1, or 0 for the renderer")
        if not 0 <= guidance_scale < float("inf"):
            raise UserError(f"guidance_scale is {guidance_scale}; it must be finite and >= 0")
        config, device = self.config, self.quantizer.codebook.device
        codes = codes.to(device)
        kept = visible_mask(visible, self.num_tokens).to(device).expand(len(codes), -1)
        values = self.quantizer.values(codes)
        if steps == 0:
            return self._images(self.render(values, kept))
        tokens = self.tokens(values, kept[:, None])
        generators = [torch.Generator().manual_seed(s) for s in step_seeds(seed, len(codes))]

        def fresh(_: int) -> Tensor:
            shape = (config.grid**2, config.patch_dim)
            noise = torch.empty(len(codes), *shape)
            for row, generator in zip(noise, generators, strict=True):
                row.copy_(torch.randn(shape, generator=generator))
            return noise.to(device)

        def predict(xt: Tensor, t: float) -> tuple[Tensor, Tensor]:
            # One time for all rows: products of few rows depend, in their last bits, on how many.
            times = torch.full((1,), t, device=device)
            window = self.schedule.window(times) & kept
            output = self.decoder(xt, times, tokens, window)
            if guidance_scale != 1.0:
                blind = self.decoder(xt, times, tokens, torch.zeros_like(window))
                output = blind + guidance_scale * (output - blind)
            return config.path.recover(output.float(), xt, t, config.prediction)

        x0 = sample(
            predict,
            fresh(-1),
            path=config.path,
            times=step_times(steps, shift=config.shift),
            eta=eta,
            order=order,
            fresh_noise=fresh,
        )
        return self._images(x0)

    def _images(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b 3 h w"]:
        return self.config.latents.decode(self.unpatchify(patches)).clamp(-1, 1)

    def fingerprint(self) -> str:
        """Return letters for encoder, codebook and VAE; those who share them share codes."""
        config = self.config
        if isinstance(config.latents, VaeLatents):
            config = replace(config, latents=replace(config.latents.pinned(), folder=""))
        return codes_fingerprint(self, config, OF_DECODING)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors; float16 halves the file.

        A renderer has a file of its own beside them: all else is as without one.
        """
        config, beside = self.config, Path(folder) / RENDERER
        if isinstance(config.latents, VaeLatents):
            config = replace(config, latents=config.latents.pinned())
        if self.renderer is None:
            beside.unlink(missing_ok=True)
        else:
            save_tensors(beside, self.renderer.state_dict(), dtype)
        own = {n: t for n, t in self.state_dict().items() if not n.startswith("renderer.")}
        save_release(folder, own, {"kind": KIND, **to_dict(config)}, dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "TimestepTokenizer":
        """Open what `save` wrote, in eval mode; UserError for a wrong or damaged folder."""
        model = open_network(folder, KIND, TimestepTokenizerConfig, cls)
        source = Path(folder) / RENDERER
        if source.is_file():
            load_into(model.add_renderer(), load_tensors(source), source)
        return model.eval()

    def code_vectors(self) -> Float[Tensor, "v e"]:
        """Return the codebook."""
        return self.quantizer.codebook

    def to_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Reorder the columns to the order the language model reads."""
        return self.schedule.to_language(codes)

    def from_language(self, codes: Int[Tensor, "b k"]) -> Int[Tensor, "b k"]:
        """Undo `to_language`."""
        return self.schedule.from_language(codes)


def kept_tokens(visible: Bool[Tensor, "b draws k"]) -> Bool[Tensor, "b k"]:
    """Return the tokens that some draw sees.

    A fine end that is hidden from all draws of an image is hidden from its token stream too; the
    coarse end needs no care, since no token looks at coarser ones.
    """
    return visible.any(1)


__all__ = ["Memory", "TimestepTokenizer", "TimestepTokenizerConfig"]
