"""The spatial objective: its loss by hand, its phases, and that it learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddt_llama.tokenizer import SpatialTokenizer, SpatialTokenizerConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig, keep_codes
from ddt_llama.training.critics import PatchCritic, hinge
from ddt_llama.training.spatial import SpatialObjective, SpatialObjectiveConfig, probe

CONFIG = SpatialTokenizerConfig(
    image_size=8,
    widths=(8, 16, 16),
    blocks=(0, 1, 1),
    groups=4,
    quantizer=QuantizerConfig(codebook_size=16, code_dim=4),
)


def squares(count: int) -> torch.Tensor:
    """Pictures of four quarters, each of one of two colours."""
    generator = torch.Generator().manual_seed(0)
    quarters = torch.randint(2, (count, 1, 2, 2), generator=generator).float() * 2 - 1
    return quarters.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat(1, 3, 1, 1)


@pytest.fixture
def model() -> SpatialTokenizer:
    torch.manual_seed(0)
    return SpatialTokenizer(CONFIG)


def test_the_loss_is_squared_error_and_commitment(model: SpatialTokenizer) -> None:
    objective = SpatialObjective(SpatialObjectiveConfig(commitment=0.5), squares(2))
    objective.before_step(model, 5)
    images = squares(6)
    loss, figures = objective(model, images, 0)
    rebuilt = model(images)
    error = (rebuilt.output - images).square().mean()
    unit = torch.nn.functional.normalize(rebuilt.features, dim=-1)
    away = (unit - model.quantizer.look_up(rebuilt.quantized.codes)).square().sum(-1).mean()
    assert torch.allclose(loss, error + 0.5 * away)
    assert torch.allclose(torch.as_tensor(figures["error"]), error)


def test_rounding_is_phased_in(model: SpatialTokenizer) -> None:
    config = SpatialObjectiveConfig(round_from=10, round_until=20)
    objective = SpatialObjective(config, squares(2))
    found = []
    for step in (0, 10, 15, 20, 30):
        objective.before_step(model, step)
        found.append(objective.rounding)
    assert found == [0, 0, 0.5, 1, 1]


def test_it_learns_what_every_square_shows(model: SpatialTokenizer) -> None:
    objective = SpatialObjective(
        SpatialObjectiveConfig(round_from=20, round_until=40, probe_every=150), squares(16)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    figures = {}
    for step in range(150):
        objective.before_step(model, step)
        loss, _ = objective(model, squares(64), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        figures = objective.after_step(model, step + 1)
    assert figures["probe.own"] < 0.05 < 1 < figures["probe.wrong"]
    assert 0 < figures["codebook.used"] <= 1
    assert figures["probe.spread"] > 0.1
    back = model.eval().decode(model.encode(squares(8)))
    assert (back - squares(8)).square().mean() < 0.05


def test_a_decoder_alone_learns_from_codes_that_are_kept(model: SpatialTokenizer) -> None:
    objective = SpatialObjective(SpatialObjectiveConfig(), squares(2))
    model.quantizer.config = replace(model.quantizer.config, rate=1.0)
    model.quantizer.weigh(torch.arange(1.0, 1 + len(model.quantizer.codebook)) ** 3)
    keep_codes(model)
    before = model.quantizer.codebook.clone()
    objective.before_step(model, 0)
    loss, figures = objective(model, squares(8), 0)
    codes = model.encode(squares(8))
    assert not torch.equal(codes, model.quantizer.nearest(model.features(squares(8))))
    with torch.no_grad():
        rebuilt = model.rebuild(model.quantizer.values(codes))
    assert loss.item() == pytest.approx(float((rebuilt - squares(8)).square().mean()))
    assert float(figures["commitment"]) == 0
    assert "codebook.replaced" not in objective.after_step(model, 1)
    assert torch.equal(model.quantizer.codebook, before)


def test_wrong_tokens_cost_nothing_where_tokens_say_nothing(model: SpatialTokenizer) -> None:
    same = squares(1).repeat(3, 1, 1, 1)
    figures = probe(model.eval(), same)
    assert figures["probe.own"] == pytest.approx(figures["probe.wrong"], rel=1e-5)
    assert figures["probe.spread"] == pytest.approx(0, abs=1e-5)


def test_a_critic_adds_its_terms_from_its_step_on(model: SpatialTokenizer) -> None:
    config = SpatialObjectiveConfig(adversarial=0.5, adversarial_from=3, critic_widths=(8,))
    objective = SpatialObjective(config, squares(2))
    images = squares(6)
    objective.before_step(model, 3)
    plain, _ = objective(model, images, 0)  # a tokenizer without a critic
    plain.backward()
    by_itself = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    model.critic = PatchCritic(config.critic_widths)
    objective.before_step(model, 2)
    early, figures = objective(model, images, 0)
    assert torch.equal(early, plain)
    assert "critic" not in figures
    objective.before_step(model, 3)
    loss, figures = objective(model, images, 0)
    assert torch.equal(loss, plain)  # a critic that sets in is no training that breaks
    assert float(figures["critic"]) > 0
    loss.backward()
    own = [weight.grad for name, weight in model.named_parameters() if "critic" not in name]
    rebuilt = model(images).output
    maker, critic = hinge(model.critic, rebuilt, images)
    weights = [weight for name, weight in model.named_parameters() if "critic" not in name]
    for got, alone, more in zip(
        own, by_itself, torch.autograd.grad(0.5 * maker, weights, retain_graph=True), strict=True
    ):
        assert torch.allclose(got, alone + more, atol=1e-6)
    judged = torch.autograd.grad(critic, list(model.critic.parameters()))
    for weight, wanted in zip(model.critic.parameters(), judged, strict=True):
        assert torch.allclose(weight.grad, wanted, atol=1e-6)


def test_what_features_say_is_weighed_into_the_loss(
    model: SpatialTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Means:
        """The difference of the mean colours stands for that of features."""

        def __init__(self, folder: str) -> None:
            assert folder == "resnet"

        def distance(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            return (made.mean((2, 3)) - real.mean((2, 3))).square().mean()

    monkeypatch.setattr("ddt_llama.training.spatial.Features", Means)
    images = squares(6)
    plain, _ = SpatialObjective(SpatialObjectiveConfig(), squares(2))(model, images, 0)
    config = SpatialObjectiveConfig(perceptual=0.25, features="resnet")
    loss, figures = SpatialObjective(config, squares(2))(model, images, 0)
    distance = Means("resnet").distance(model(images, 0.0).output, images)
    assert distance.item() > 1e-4
    assert torch.allclose(torch.as_tensor(figures["perceptual"]), distance)
    assert torch.allclose(loss, plain + 0.25 * distance)


def test_a_folder_holds_no_critic(model: SpatialTokenizer, tmp_path: Path) -> None:
    model.critic = PatchCritic((8,))
    model.save(tmp_path)
    assert SpatialTokenizer.load(tmp_path).critic is None
