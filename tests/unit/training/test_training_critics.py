"""What judges pictures beside squared error: each term by hand, and whom its gradient reaches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetBackbone, ResNetConfig

from ddt_llama.checkpoint import load_tensors, save_tensors
from ddt_llama.config import UserError, save_json
from ddt_llama.training.critics import Features, PatchCritic, hinge
from ddt_llama.training.spatial import SpatialObjectiveConfig


def some_images(seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def backbone(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(folder)
    return folder


class Brightness(nn.Module):
    """A critic of one weight: each picture's mean times it."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.mean((1, 2, 3))


def test_the_hinge_by_hand_and_each_side_moves_its_own_alone() -> None:
    critic = Brightness(2.0)
    made = torch.full((1, 3, 2, 2), 0.25, requires_grad=True)
    real = torch.full((1, 3, 2, 2), 0.1)
    maker, doubts = hinge(critic, made, real)
    assert maker.item() == pytest.approx(-0.5)
    assert doubts.item() == pytest.approx(((1 - 0.2) + (1 + 0.5)) / 2)
    (slope,) = torch.autograd.grad(maker, made, retain_graph=True)
    assert torch.allclose(slope, torch.full_like(slope, -2.0 / 12))
    assert torch.autograd.grad(maker, critic.weight, allow_unused=True)[0] is None
    assert torch.autograd.grad(doubts, made, retain_graph=True, allow_unused=True)[0] is None
    (pull,) = torch.autograd.grad(doubts, critic.weight)
    assert pull.item() == pytest.approx((-0.1 + 0.25) / 2)


def test_a_critic_halves_pictures_and_judges_each_alone() -> None:
    torch.manual_seed(0)
    critic = PatchCritic((8, 16))
    scores = critic(some_images(1))
    assert scores.shape == (2, 1, 8, 8)
    assert torch.allclose(critic(some_images(1)[:1]), scores[:1], atol=1e-6)


def test_a_critic_learns_to_tell_made_from_real() -> None:
    torch.manual_seed(0)
    critic = PatchCritic((8, 16))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for step in range(30):
        made, real = 0.3 * some_images(step, 8), some_images(100 + step, 8)
        _, doubts = hinge(critic, made, real)
        optimizer.zero_grad()
        doubts.backward()
        optimizer.step()
    assert critic(some_images(999)).mean().item() > 0 > critic(0.3 * some_images(998)).mean().item()


def test_features_tell_pictures_apart_and_pass_a_gradient_to_what_is_made(tmp_path: Path) -> None:
    features = Features(str(backbone(tmp_path)))
    made = some_images(1).requires_grad_()
    assert features.distance(some_images(2), some_images(2)).item() == 0
    distance = features.distance(made, some_images(2))
    assert 0 < distance.item() <= 2 * 4  # two stages of unit vectors
    distance.backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in features.network.parameters())
    assert len(features._maps(made)) == 2


def test_pictures_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    plain = Features(str(backbone(tmp_path)))
    seen: list[Tensor] = []
    save_json(
        tmp_path / "preprocessor_config.json",
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 1.0]},
    )
    scaled = Features(str(tmp_path))
    for one in (plain, scaled):
        one.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        one._maps(torch.zeros(1, 3, 8, 8))
    assert torch.allclose(seen[0], torch.zeros(1, 3, 8, 8))
    assert torch.allclose(seen[1][0, :, 0, 0], torch.tensor([0.0, 0.2, 0.2]))


def test_what_is_no_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Features(str(tmp_path / "nothing"))
    folder = backbone(tmp_path / "resnet")
    weights = load_tensors(folder / "model.safetensors")
    some = {name: weight for name, weight in weights.items() if "embedder" not in name}
    save_tensors(folder / "model.safetensors", some)
    with pytest.raises(UserError, match="weights are missing"):
        Features(str(folder))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        Features(str(folder))
    save_json(folder / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match="give a vision backbone"):
        Features(str(folder))
    with pytest.raises(UserError, match=r"--objective\.features"):
        SpatialObjectiveConfig(perceptual=1.0)
    with pytest.raises(UserError, match="0 nothing asks them"):
        SpatialObjectiveConfig(features="resnet")
    with pytest.raises(UserError, match="adversarial: given -1"):
        SpatialObjectiveConfig(adversarial=-1)
