"""The renderer's objective against its formula, as a loop; and what training leaves alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ResNetBackbone, ResNetConfig

from ddt_llama.config import UserError
from ddt_llama.recipes.renderer import RendererRecipe
from ddt_llama.runs import Run
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.critics import Features
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.optim import OptimConfig
from ddt_llama.training.renderer import RendererObjective, RendererObjectiveConfig

TOKENS, SIDE, SEED = 6, 8, 11
TINY = TimestepTokenizerConfig(
    image_size=SIDE,
    patch=4,
    num_tokens=TOKENS,
    quantizer=QuantizerConfig(16, 4, rate=0.2),
    encoder=EncoderConfig(16, 1, 2),
    decoder=DecoderConfig(16, 1, 2),
)


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig = field(default_factory=TrainConfig)


def build() -> TimestepTokenizer:
    """Return a tokenizer whose zero starts are moved, with a renderer that alone learns."""
    torch.manual_seed(0)
    model = TimestepTokenizer(TINY)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    model.quantizer.weigh(torch.arange(16.0) ** 3)
    RendererRecipe("tiny", "nano").equip(model)
    return model


def images(rows: int = 5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, SIDE, SIDE, generator=generator) * 2 - 1


def loss_of(model: TimestepTokenizer, config: RendererObjectiveConfig, seed: int = SEED) -> Tensor:
    return RendererObjective(config)(model, images(), seed)[0]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_loss_is_the_squared_error_of_what_the_visible_tokens_give(share: float) -> None:
    model = build()
    torch.nn.init.normal_(model.add_renderer().canvas)
    generator = torch.Generator().manual_seed(SEED)
    hides = torch.rand(5, generator=generator) < share
    first = torch.randint(TOKENS, (5,), generator=generator)
    errors = []
    for i, image in enumerate(images()):
        codes = model.encode(image[None])
        seen = TOKENS - int(first[i]) if hides[i] else TOKENS
        made = model.render(
            model.quantizer.look_up(codes), torch.arange(TOKENS)[None] >= TOKENS - seen
        )
        errors.append((model.unpatchify(made) - image[None]).square().mean())
    got = loss_of(model, RendererObjectiveConfig(hide_fine=share))
    torch.testing.assert_close(got, torch.stack(errors).mean())


def test_the_gradient_reaches_the_canvas_and_the_renderer_alone() -> None:
    model = build()
    torch.nn.init.normal_(model.add_renderer().canvas)
    loss_of(model, RendererObjectiveConfig(hide_fine=0.5)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("renderer.")}
    assert "renderer.canvas" in moved


def test_a_step_is_a_pure_function_of_its_seed() -> None:
    model, config = build(), RendererObjectiveConfig(hide_fine=0.5)
    first = loss_of(model, config)
    torch.manual_seed(77)
    assert torch.equal(loss_of(model, config), first)
    assert not torch.equal(loss_of(model, config, SEED + 1), first)


def test_a_distance_of_features_is_added_by_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetBackbone(shape).save_pretrained(tmp_path)
    config = RendererObjectiveConfig(perceptual=0.5, features=str(tmp_path))
    model = build()
    loss, figures = RendererObjective(config)(model, images(), SEED)
    seen = torch.ones(5, TOKENS, dtype=torch.bool)
    made = model.render(model.quantizer.look_up(model.encode(images())), seen)
    distance = Features(str(tmp_path)).distance(model.unpatchify(made), images())
    plain = loss_of(model, RendererObjectiveConfig())
    torch.testing.assert_close(loss, plain + 0.5 * distance)
    torch.testing.assert_close(figures["perceptual"], distance.detach())
    with pytest.raises(UserError, match=r"--objective\.features"):
        RendererObjectiveConfig(perceptual=0.1)


def run(folder: Path, **changes: Any) -> TimestepTokenizer:
    """Train a fresh renderer, or go on in `folder`; the averaged weights are in place."""
    config = TrainConfig(
        steps=24,
        batch=5,
        bf16=False,
        ema=0.9,
        log_every=24,
        checkpoint_every=5,
        tensorboard=False,
        optim=OptimConfig(kind="muon", lr=3e-3, warmup=4),
        **changes,
    )
    model = build()
    goal = RendererObjective(RendererObjectiveConfig(hide_fine=0.3))
    with Run.create_or_resume(folder, Recipe(config)) as opened:
        train(model, goal, lambda step: images(seed=step), config, opened).ema.write()
    return model


def test_training_moves_the_renderer_alone_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", minutes=0.0)
    cut, before = run(tmp_path / "cut"), build()
    started = before.state_dict()
    assert all(torch.equal(cut.state_dict()[name], one) for name, one in whole.state_dict().items())
    still = {name for name, one in whole.state_dict().items() if torch.equal(one, started[name])}
    learned = {name for name, _ in whole.named_parameters() if name.startswith("renderer.")}
    assert still == started.keys() - learned
    assert whole.fingerprint() == before.fingerprint()
    config = RendererObjectiveConfig()
    assert loss_of(whole, config) < 0.95 * loss_of(before, config)
