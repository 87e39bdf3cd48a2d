"""The spatial tokenizer: grid and raster, locality, the straight-through gradient, its folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddt_llama.config import UserError, load_json, save_json
from ddt_llama.tokenizer import SpatialTokenizer, SpatialTokenizerConfig, Tokenizer, load
from ddt_llama.tokenizer.quantizer import QuantizerConfig

TINY = SpatialTokenizerConfig(
    image_size=16,
    widths=(4, 8, 8),
    blocks=(0, 1, 1),
    groups=2,
    quantizer=QuantizerConfig(codebook_size=32, code_dim=4),
)


def build(config: SpatialTokenizerConfig = TINY) -> SpatialTokenizer:
    torch.manual_seed(0)
    model = SpatialTokenizer(config).eval()
    for part in model.modules():  # blocks begin as identities: open them
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.normal_(part.weight, std=(part.weight[0].numel()) ** -0.5)
    return model


def some_images(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_256_pixels_become_256_codes_768_times_fewer_numbers() -> None:
    quantizer = QuantizerConfig(codebook_size=8192)
    config = SpatialTokenizerConfig(256, (8, 8, 8, 8, 8), (0, 0, 0, 0, 0), quantizer=quantizer)
    model = SpatialTokenizer(config).eval()
    assert isinstance(model, Tokenizer)
    codes = model.encode_grid(some_images(1, 256))
    assert codes.shape == (1, 16, 16)
    assert 3 * 256**2 / codes.numel() == 768
    assert torch.equal(codes.flatten(1), model.encode(some_images(1, 256)))
    assert model.decode(codes.flatten(1)).shape == (1, 3, 256, 256)


def test_a_code_tells_of_its_square_and_what_is_near() -> None:
    config = replace(TINY, image_size=64)
    model = build(config)
    for part in model.modules():  # group statistics alone reach across the picture
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda x: x
    image = some_images(1, 64)
    other = image.clone()
    other[:, :, 32:36, 20:24] += 1  # the cell in row 8, column 5
    moved = (model.features(image) - model.features(other)).abs().sum(-1).view(16, 16) > 0
    rows, columns = moved.nonzero().unbind(1)
    assert moved[8, 5]
    assert max(abs(rows - 8).max(), abs(columns - 5).max()) <= 4
    codes = model.encode(image)
    changed = codes.clone()
    changed[0, 8 * 16 + 5] = (codes[0, 8 * 16 + 5] + 1) % 32
    difference = (model.decode(codes) - model.decode(changed)).abs().sum(1)[0] > 0
    rows, columns = difference.nonzero().unbind(1)
    assert difference[32:36, 20:24].any()
    # Half a cell, three convolutions of 4 pixels, three of 2, two of 1.
    assert max(abs(rows - 34).max(), abs(columns - 22).max()) <= 2 + 3 * 4 + 3 * 2 + 2


def test_the_gradient_passes_the_rounding_as_if_it_were_not_there() -> None:
    model = build().train()
    images = some_images(2)
    rebuilt = model(images)
    values = rebuilt.quantized.values
    assert torch.allclose(values, model.quantizer.look_up(rebuilt.quantized.codes), atol=1e-6)
    (found,) = torch.autograd.grad(rebuilt.output.sum(), rebuilt.features, retain_graph=True)
    # The same gradient, taken at the codes and carried to the features by hand.
    at = values.detach().requires_grad_()
    (at_codes,) = torch.autograd.grad(model.rebuild(at).sum(), at)
    unit = torch.nn.functional.normalize(rebuilt.features.detach(), dim=-1)
    along = (at_codes * unit).sum(-1, keepdim=True) * unit
    expected = (at_codes - along) / rebuilt.features.detach().norm(dim=-1, keepdim=True)
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.codebook_size == 32
    assert not model.quantizer.codebook.requires_grad


def test_decoding_is_one_pass_whatever_is_asked() -> None:
    model = build()
    codes = model.encode(some_images(3))
    once = model.decode(codes)
    assert torch.equal(once, model.decode(codes, steps=8, seed=[1, 2, 3], guidance_scale=3.0))
    assert torch.equal(once, model.decode(codes, visible=16))
    assert torch.equal(once, model.decode(model.quantizer.look_up(codes)))
    assert torch.allclose(once[1:2], model.decode(codes[1:2]), atol=1e-5)
    some = torch.arange(16) < 5
    zeroed = model.quantizer.look_up(codes) * some[:, None]
    assert torch.equal(model.decode(codes, visible=some), model.decode(zeroed))
    assert (model.refines, model.prefixes) == (False, False)
    assert once.abs().max() <= 1


def test_a_language_model_reads_in_raster_order() -> None:
    codes = torch.arange(16)[None]
    model = build()
    assert torch.equal(model.to_language(codes), codes)
    assert torch.equal(model.from_language(model.to_language(codes)), codes)
    assert torch.allclose(model.code_vectors().norm(dim=-1), torch.ones(32))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int8])
def test_a_folder_opens_again(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = build()
    model.save(tmp_path, dtype=dtype)
    opened = load(tmp_path)
    assert isinstance(opened, SpatialTokenizer)
    assert (opened.config, opened.training) == (model.config, False)
    images = some_images(4)
    codes = model.encode(images)
    if dtype is None:
        assert torch.equal(opened.encode(images), codes)
    error = (opened.decode(codes) - model.decode(codes)).square().mean().sqrt()
    assert error <= (0.03 if dtype else 0)


def test_folders_of_other_kinds_are_refused(tmp_path: Path) -> None:
    build().save(tmp_path)
    described = load_json(tmp_path / "config.json")
    save_json(tmp_path / "config.json", {**described, "kind": "timestep"})
    with pytest.raises(UserError, match="not a spatial tokenizer"):
        SpatialTokenizer.load(tmp_path)
    save_json(tmp_path / "config.json", {**described, "kind": "video"})
    with pytest.raises(UserError, match=r"known kind \(timestep, spatial\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(TINY, blocks=(1,)), "given 1 numbers for 3 widths"),
        (lambda: replace(TINY, widths=(4, 9, 8)), "9 is not a multiple of groups 2"),
        (lambda: replace(TINY, widths=(), blocks=()), "widths of 1 or more"),
        (lambda: replace(TINY, image_size=18), "not a multiple of 4"),
        (lambda: build().encode(torch.zeros(1, 3, 8, 8)), "resize and crop"),
        (lambda: build().decode(torch.zeros(1, 5, dtype=torch.long)), r"expected \(b, 16\)"),
        (lambda: build().decode(torch.full((1, 16), 32)), "outside 0..31"),
        (lambda: build().decode(torch.zeros(1, 16, dtype=torch.long), visible=4), "all 16 codes"),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
