"""Latent spaces: pixels are the identity, a VAE is frozen, normalised, deterministic, refused."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ddt_llama.config import UserError, from_dict, to_dict
from ddt_llama.tokenizer.diffusers_folder import WEIGHTS
from ddt_llama.tokenizer.latents import Pixels, VaeLatents

diffusers = pytest.importorskip("diffusers")


def save_vae(folder: Path, seed: int = 0, **fields: float) -> Path:
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (4, 8, 8), "norm_num_groups": 2, "latent_channels": 5}
    stages = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = diffusers.AutoencoderKL(
        down_block_types=stages[0], up_block_types=stages[1], **sizes, **fields
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_vae(tmp_path / "vae", scaling_factor=1.5305, shift_factor=0.0609)


def images(rows: int = 2, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, 3, size, size, generator=generator) * 2 - 1


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pixels_change_nothing():
    space = Pixels()
    assert (space.channels, space.downsample) == (3, 1)
    assert torch.equal(space.decode(space.encode(images())), images())


def test_latents_are_the_normalised_mode_of_the_posterior(folder: Path):
    space = VaeLatents(str(folder))
    assert (space.channels, space.downsample) == (5, 4)
    latents = space.encode(images())
    assert latents.shape == (2, 5, 4, 4)
    reference = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        moments = reference.quant_conv(reference.encoder(images()))
    equal(latents, (moments[:, :5] - 0.0609) * 1.5305)
    assert torch.equal(latents, space.encode(images()))


def test_decode_undoes_the_normalisation(folder: Path):
    space = VaeLatents(str(folder))
    reference = diffusers.AutoencoderKL.from_pretrained(folder)
    z = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference.decode(z).sample
    equal(space.decode((z - 0.0609) * 1.5305), expected)


def test_a_given_shift_and_scale_replace_those_of_the_config(folder: Path):
    plain = VaeLatents(str(folder), shift=0.0, scale=1.0).encode(images())
    equal(VaeLatents(str(folder), shift=2.0, scale=3.0).encode(images()), (plain - 2) * 3)


def test_a_vae_without_a_shift_has_none(tmp_path: Path):
    space = VaeLatents(str(save_vae(tmp_path / "vae", scaling_factor=0.5)))
    assert space.normalisation == (0.0, 0.5)


def test_the_vae_is_frozen_but_passes_gradients_to_the_latents(folder: Path):
    space = VaeLatents(str(folder))
    latents = space.encode(images()).requires_grad_()
    space.decode(latents).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert not space.vae.training
    assert all(p.grad is None and not p.requires_grad for p in space.vae.parameters())


def test_autocast_does_not_lower_the_precision_of_the_vae(folder: Path):
    space = VaeLatents(str(folder))
    plain = space.encode(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = space.encode(images())
    assert torch.equal(plain, again)


def test_a_model_that_holds_the_space_saves_and_copies_none_of_its_weights(folder: Path):
    class Holder(nn.Module):
        def __init__(self, latents: VaeLatents) -> None:
            super().__init__()
            self.latents = latents

    holder = Holder(VaeLatents(str(folder)))
    holder.latents.encode(images())
    assert holder.state_dict() == {}
    twin = copy.deepcopy(holder)
    assert twin.latents is holder.latents


def test_a_pinned_space_survives_json_and_refuses_other_weights(folder: Path, tmp_path: Path):
    @dataclass(frozen=True)
    class Plan:
        latents: Pixels | VaeLatents

    pinned = VaeLatents(str(folder)).pinned()
    assert (pinned.shift, pinned.scale) == (0.0609, 1.5305)
    plan = from_dict(Plan, json.loads(json.dumps(to_dict(Plan(pinned)))))
    assert plan.latents == pinned
    equal(plan.latents.encode(images()), VaeLatents(str(folder)).encode(images()))
    save_vae(folder, seed=5, scaling_factor=1.5305, shift_factor=0.0609)
    with pytest.raises(UserError, match="the tokenizer was made with"):
        from_dict(Plan, to_dict(plan)).latents.encode(images())


def refused(space: VaeLatents, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        space.encode(images())
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path):
    refused(VaeLatents(str(tmp_path / "none")), "no such folder; give the local folder")
    with pytest.raises(UserError, match="no such folder"):
        _ = VaeLatents(str(tmp_path / "none")).channels


def test_the_folder_of_a_whole_pipeline_is_refused_with_a_hint(folder: Path):
    refused(VaeLatents(str(folder.parent)), "no config.json.*did you mean one of its folders vae")


def test_another_model_is_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    refused(VaeLatents(str(folder)), "that of 'VQModel'; give a diffusers AutoencoderKL")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_an_unreadable_config_is_refused(folder: Path, text: str):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(VaeLatents(str(folder)), "config.json is")


def test_absent_weights_are_refused(folder: Path):
    (folder / WEIGHTS).unlink()
    refused(VaeLatents(str(folder)), f"no readable {WEIGHTS}")


def test_weights_cut_short_are_refused(folder: Path):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    refused(VaeLatents(str(folder)), "the VAE cannot be read")


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    config["latent_channels"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    refused(VaeLatents(str(folder)), "the VAE cannot be read")


def test_lacking_weights_are_refused_rather_than_drawn_at_random(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_out.weight"]
    save_file(weights, folder / WEIGHTS)
    refused(VaeLatents(str(folder)), "lacks 1 weights of the VAE, decoder.conv_out.weight")


def test_images_that_do_not_divide_are_refused(folder: Path):
    with pytest.raises(UserError, match="needs sides that 4 divides"):
        VaeLatents(str(folder)).encode(images(size=18))
