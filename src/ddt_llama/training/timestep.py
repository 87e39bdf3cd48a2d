"""The objective of the DDT tokenizer: E ||d(x_t, t, V_1..V_k(t)) - x0||^2 + commitment.

Source: DDT-LLaMA section 3; `docs/paper-to-code.md` says which options are the paper's. Several
noise draws share one encoding, since the encoder and a static token stream are the dear part of a
step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ddt_llama.config import UserError, check_range
from ddt_llama.diffusion import AtNoise, Density, Uniform
from ddt_llama.tokenizer.timestep import TimestepTokenizer
from ddt_llama.training.codebook import CodebookKeeper, check_phases, rounding_at, spread


@dataclass(frozen=True)
class TimestepObjectiveConfig:
    """What a step draws, and how the loss is weighed.

    `density` of t; `drop_tokens`: share of draws that see no token (for guidance); `hide_fine`:
    share of images whose finest tokens are hidden, a random number of them; `balance` weighs the
    gradient of each token by 1 / P(visible), mean 1, P being that of `density` and the schedule
    alone, without `own` and `hide_fine`. The quantizer is phased in: features pass
    unrounded up to step `round_from`, fully rounded from `round_until` on. `own`: share of images
    whose first draw is at t = 1 and whose later draws start from the network's own answer to it,
    as in decoding, with t uniform: else x_t always holds the true image in training, and the
    network trusts it more than it may (needs prediction "clean" and two draws).
    `slips`: up to this share of an image's tokens are moved by noise of length `slip_size`, mostly
    to other codes nearby, while the decoder still has to draw the image: a language model's tokens
    slip, too. It needs codes that are kept.
    `probe_every`: steps between measurements of what the tokens hold (see `probe`).
    """

    draws: int = 2
    density: Density = AtNoise(0.3)
    drop_tokens: float = 0.1
    hide_fine: float = 0.0
    own: float = 0.0
    slips: float = 0.0
    slip_size: float = 0.5
    balance: bool = False
    commitment: float = 0.25
    round_from: int = 0
    round_until: int = 1
    probe_every: int = 100

    def __post_init__(self) -> None:
        """Refuse counts and shares that cannot be."""
        check_range(self, 1, math.inf, "draws", "probe_every")
        check_range(self, 0, 1, "drop_tokens", "hide_fine", "own", "slips")
        check_range(self, 0, math.inf, "slip_size", "commitment", "round_from", "round_until")
        check_phases(self.round_from, self.round_until)
        if self.own and self.draws < 2:
            raise UserError(
                f"own {self.own} with draws {self.draws}: it needs 2 draws or more; set draws to 2 "
                "or own to 0"
            )


class TimestepObjective:
    """Loss and first-screen metrics of a tokenizer in training.

    `probe_images` are held-out images; every `probe_every` steps the error at t = 1 is measured
    with an image's own tokens, with another image's and with none. A falling loss alone proves
    little: own must fall below none, and wrong must rise.
    """

    def __init__(
        self, config: TimestepObjectiveConfig, probe_images: Float[Tensor, "b 3 h w"]
    ) -> None:
        self.config = config
        self.probe_images = probe_images
        self.rounding = 0.0
        self.weights: Tensor | None = None
        self.keeper = CodebookKeeper()

    def before_step(self, model: TimestepTokenizer, step: int) -> None:
        """Set how far features are rounded in this step."""
        c = self.config
        self.rounding = rounding_at(step, c.round_from, c.round_until)
        if c.balance and self.weights is None:
            times = c.density.sample((100_000,), Generator().manual_seed(0))
            visible = model.schedule.probability_visible(times).clamp_min(1e-4)
            self.weights = 1 / visible / (1 / visible).mean()

    def __call__(
        self, model: TimestepTokenizer, images: Float[Tensor, "b 3 h w"], step_seed: int, /
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the loss of one batch; everything random comes from `step_seed`."""
        c, path = self.config, model.config.path
        generator = Generator().manual_seed(step_seed)
        patches = model.to_patches(images)
        b, device = len(images), images.device
        t = c.density.sample((b, c.draws), generator)
        # Noise for a GPU is made there, not by one CPU core and then moved.
        noise = Generator(device).manual_seed(step_seed) if device.type == "cuda" else generator
        shape = (b, c.draws, *patches.shape[1:])
        eps = torch.randn(shape, generator=noise, device=device)
        dropped = torch.rand(b, c.draws, generator=generator) < c.drop_tokens
        hides = torch.rand(b, generator=generator) < c.hide_fine
        first = torch.randint(model.num_tokens, (b,), generator=generator) * hides
        own = None
        if c.own:
            own = (torch.rand(b, generator=generator) < c.own) & ~dropped[:, 0]
            onward = torch.cat([torch.ones(b, 1), Uniform().sample((b, c.draws - 1), generator)], 1)
            t = torch.where(own[:, None], onward, t)
            own = own.to(device)
        slips = None
        if c.slips:
            row = (b, model.num_tokens, model.config.quantizer.code_dim)
            share = c.slips * torch.rand(b, 1, generator=generator)
            moved = torch.rand(row[:2], generator=generator) < share
            size = c.slip_size * row[-1] ** -0.5
            slips = (size * torch.randn(row, generator=generator) * moved[..., None]).to(device)
        t, dropped, first = (x.to(device) for x in (t, dropped, first))
        denoised = model(
            patches,
            eps,
            t,
            model.schedule.window(t, first[:, None]) & ~dropped[..., None],
            own=own,
            rounding=self.rounding,
            gradient_weights=None if self.weights is None else self.weights.to(device),
            slips=slips,
        )
        clean = patches[:, None].expand_as(eps).flatten(0, 1)
        target = path.target(clean, eps.flatten(0, 1), t.flatten(), model.config.prediction)
        error = (denoised.output.flatten(0, 1).float() - target).square().mean()
        quantized = denoised.quantized
        loss = error + c.commitment * self.rounding * quantized.commitment
        self.keeper.see(denoised.features, quantized.codes)
        return loss, {"error": error.detach(), "commitment": quantized.commitment.detach()}

    def after_step(self, model: TimestepTokenizer, step: int) -> dict[str, float]:
        """Move the codebook; every `probe_every` steps measure what the tokens hold."""

        def measure() -> dict[str, float]:
            device = next(model.parameters()).device
            return probe(model, self.probe_images.to(device), self.rounding)

        return self.keeper.after_step(model, step, self.config.probe_every, measure)


@torch.no_grad()
def probe(
    model: TimestepTokenizer, images: Float[Tensor, "b 3 h w"], rounding: float = 1.0
) -> dict[str, float]:
    """Return the error at t = 1 with own, wrong and no tokens, and the spread of the features.

    At t = 1 the input is pure noise: what is right in the output came through the tokens.
    Needs at least two images.
    """
    patches = model.to_patches(images)
    features = model.encoder(patches)
    values = model.quantizer(features, rounding).values
    generator = Generator().manual_seed(0)
    noise = torch.randn(patches.shape, generator=generator).to(images.device)[:, None]
    t = torch.ones(len(images), 1, device=images.device)
    seen = torch.ones(len(images), 1, model.num_tokens, dtype=torch.bool, device=images.device)
    start = model.config.path.mix(patches, noise[:, 0], t[:, 0])[:, None]

    def error(values: Tensor, visible: Tensor) -> float:
        output = model.denoise(model.tokens(values, visible), start, t, visible).float()
        config = model.config
        x0, _ = config.path.recover(output[:, 0], start[:, 0], t[:, 0], config.prediction)
        return float((x0 - patches).square().mean())

    return {
        "probe.own": error(values, seen),
        "probe.wrong": error(values.roll(1, 0), seen),
        "probe.none": error(values, ~seen),
        "probe.spread": spread(features),
    }
