"""The DDT tokenizer as a whole: draws, decoding, guidance, prefixes, errors, files."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError, from_dict, save_json, to_dict
from ddt_llama.diffusion import Cosine, DiscreteDDPM
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig, Tokenizer, load
from ddt_llama.tokenizer.base import visible_mask
from ddt_llama.tokenizer.decoder import DecoderConfig, TokenStream
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig

TOKENS, CODES, SIDE = 6, 12, 16
STREAMS = get_args(TokenStream)
TINY = TimestepTokenizerConfig(
    image_size=SIDE,
    patch=4,
    num_tokens=TOKENS,
    quantizer=QuantizerConfig(CODES, 4),
    encoder=EncoderConfig(16, 1, 2),
    decoder=DecoderConfig(16, 2, 2),
)


def config(stream: TokenStream = "static", **changes: Any) -> TimestepTokenizerConfig:
    return replace(TINY, decoder=replace(TINY.decoder, token_stream=stream), **changes)


def build(plan: TimestepTokenizerConfig = TINY) -> TimestepTokenizer:
    """Return a tokenizer whose zero starts are moved, so that everything has an effect."""
    torch.manual_seed(0)
    model = TimestepTokenizer(plan)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(rows: int = 2) -> Tensor:
    return torch.rand(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def some_codes(rows: int = 2) -> Tensor:
    return torch.randint(CODES, (rows, TOKENS), generator=torch.Generator().manual_seed(4))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draws(rows: int, count: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "eps": torch.randn(rows, count, 16, 48, generator=g),
        "t": torch.rand(rows, count, generator=g),
        "dropped": torch.rand(rows, count, generator=g) < 0.3,
        "first": torch.randint(TOKENS, (rows,), generator=g),
    }


def denoised(
    model: TimestepTokenizer,
    x: Tensor,
    given: dict[str, Tensor],
    **more: Any,
) -> Any:
    """Run a training pass whose draws see the window of their t, or nothing where dropped."""
    window = model.schedule.window(given["t"], given["first"][:, None])
    visible = window & ~given["dropped"][..., None]
    return model(x, given["eps"], given["t"], visible, **more)


def test_it_is_a_tokenizer():
    assert isinstance(build(), Tokenizer)


def test_patchify_is_undone_and_runs_in_raster_order():
    model, x = build(), images()
    patches = model.patchify(x)
    assert patches.shape == (2, 16, 48)
    assert torch.equal(patches[1, 5].reshape(4, 4, 3), x[1, :, 4:8, 4:8].permute(1, 2, 0))
    assert torch.equal(model.unpatchify(patches), x)


@pytest.mark.parametrize("stream", STREAMS)
def test_draws_together_equal_draws_alone(stream: TokenStream):
    model, x = build(config(stream)), build().to_patches(images(3))
    given = draws(3, 4)
    together = denoised(model, x, given)
    for i in range(3):
        for j in range(4):
            own = {
                name: value[i : i + 1] if name == "first" else value[i : i + 1, j : j + 1]
                for name, value in given.items()
            }
            alone = denoised(model, x[i : i + 1], own)
            close(alone.output[0, 0], together.output[i, j])


@pytest.mark.parametrize("stream", STREAMS)
def test_a_dropped_draw_does_not_depend_on_the_image(stream: TokenStream):
    model, given = build(config(stream)), draws(2, 3)
    given["dropped"][:] = torch.tensor([True, False, True])
    given["first"][:] = 0
    given["t"][:] = 1.0  # pure noise: the image can come through the tokens alone
    x = model.to_patches(images(2))
    out, other = denoised(model, x, given).output, denoised(model, x.roll(1, 0), given).output
    close(out[:, ::2], other[:, ::2])
    assert (out[:, 1] - other[:, 1]).abs().max() > 1e-3


def test_gradient_weights_change_gradients_only():
    model, x, given = build(), build().to_patches(images()), draws(2, 2)
    given["t"][:] = 1.0
    given["first"][:] = 0
    given["dropped"][:] = False
    weights = torch.linspace(0, 2.5, TOKENS)

    def slopes(gradient_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        result = denoised(model, x, given, gradient_weights=gradient_weights)
        out = result.output
        (slope,) = torch.autograd.grad(out.square().sum(), result.quantized.values)
        return out, slope

    (plain, slope), (weighted, weighted_slope) = slopes(None), slopes(weights)
    close(weighted, plain)
    close(weighted_slope, slope * weights[:, None])
    assert slope.abs().sum(-1).min() > 0


@pytest.mark.parametrize("stream", STREAMS)
def test_every_parameter_learns(stream: TokenStream):
    model, given = build(config(stream)), draws(2, 3)
    given["t"][:] = 1.0
    result = denoised(model, model.to_patches(images()), given)
    result.output.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_rounding_zero_passes_the_features_themselves():
    model, x, given = build(), build().to_patches(images()), draws(2, 1)
    free, rounded = (denoised(model, x, given, rounding=share) for share in (0.0, 1.0))
    close(free.quantized.values, torch.nn.functional.normalize(free.features, dim=-1))
    close(rounded.quantized.values, model.quantizer.look_up(rounded.quantized.codes))


def test_encode_rounds_what_training_rounds():
    model, given = build(), draws(2, 1)
    codes = model.encode(images())
    assert torch.equal(codes, denoised(model, model.to_patches(images()), given).quantized.codes)
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0, "steps": TOKENS}, {"order": 2, "steps": 3}])
def test_codes_and_seed_give_the_picture_whatever_else_is_in_the_batch(
    stream: TokenStream, options: dict[str, Any]
):
    model, codes = build(config(stream)), some_codes(3)
    whole = model.decode(codes, seed=[5, 9, 5], **options)
    assert whole.shape == (3, 3, SIDE, SIDE)
    assert whole.abs().max() <= 1
    assert torch.equal(model.decode(codes, seed=[5, 9, 5], **options), whole)
    for i, seed in enumerate([5, 9, 5]):
        close(model.decode(codes[i : i + 1], seed=seed, **options), whole[i : i + 1])
    same = model.decode(codes[:1].expand(2, -1), seed=[5, 9], **options)
    assert (same[0] - same[1]).abs().max() > 1e-3
    torch.manual_seed(8)
    assert torch.equal(model.decode(codes, seed=[5, 9, 5], **options), whole)


def test_one_seed_counts_up_along_the_batch():
    model, codes = build(), some_codes(3)
    assert torch.equal(model.decode(codes, seed=7), model.decode(codes, seed=[7, 8, 9]))


@pytest.mark.parametrize("stream", STREAMS)
def test_decoding_equals_a_loop_written_out(stream: TokenStream):
    """Euler on the straight path: x0 is predicted from the first k(t) tokens, noise kept."""
    model, codes, steps = build(config(stream)), some_codes(1), 4
    xt = torch.randn(16, 48, generator=torch.Generator().manual_seed(2))[None]
    values = model.quantizer.codebook[codes]
    with torch.no_grad():
        for i in range(steps, 0, -1):
            t, s = i / steps, (i - 1) / steps
            visible = (torch.arange(TOKENS) < -(-TOKENS * i // steps))[None]
            tokens = model.decoder.remember(values, visible) if stream == "static" else values
            x0 = model.decoder(xt, torch.tensor([t]), tokens, visible)
            xt = (1 - s) * x0 + s * (xt - (1 - t) * x0) / t
    close(model.decode(codes, steps=steps, seed=2), model.unpatchify(xt).clamp(-1, 1))


@pytest.mark.parametrize("stream", STREAMS)
def test_guidance_mixes_the_answers_with_and_without_tokens(stream: TokenStream):
    model, codes = build(config(stream)), some_codes()
    plain, none, twice = (
        model.decode(codes, steps=1, guidance_scale=scale) for scale in (1.0, 0.0, 2.0)
    )
    assert torch.equal(model.decode(codes, steps=1), plain)
    blind = model.decode(codes, steps=1, visible=0)
    close(none, blind)
    free = (plain.abs() < 1) & (blind.abs() < 1) & (twice.abs() < 1)
    assert free.float().mean() > 0.2
    close(twice[free], (2 * plain - blind)[free])


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("visible", [0, 1, 3, TOKENS])
def test_only_the_coarsest_visible_tokens_count(stream: TokenStream, visible: int):
    model, codes = build(config(stream)), some_codes()
    out = model.decode(codes, visible=visible)
    if visible == TOKENS:
        assert torch.equal(model.decode(codes), out)
    finer, coarser = codes.clone(), codes.clone()
    finer[:, : TOKENS - visible] = (finer[:, : TOKENS - visible] + 1) % CODES
    assert torch.equal(model.decode(finer, visible=visible), out)
    coarser[:, TOKENS - visible :] = (coarser[:, TOKENS - visible :] + 1) % CODES
    assert torch.equal(model.decode(coarser, visible=visible), out) == (visible == 0)


def test_vectors_decode_like_the_codes_that_they_stand_for():
    model, codes = build(), some_codes()
    vectors = model.quantizer.look_up(codes)
    assert torch.equal(model.decode(vectors), model.decode(codes))
    assert not torch.equal(model.decode(vectors.flip(-1)), model.decode(codes))


@pytest.mark.parametrize("prediction", ["clean", "velocity", "noise"])
@pytest.mark.parametrize("path", [Cosine(), DiscreteDDPM(num_steps=8, beta_end=0.5)])
def test_every_path_and_prediction_decodes_to_finite_pictures(prediction: str, path: Any):
    model = build(config(path=path, prediction=prediction))
    assert model.decode(some_codes(), steps=3, eta=1.0).isfinite().all()


def bad_decode(**changes: Any) -> dict[str, Any]:
    return {"codes": some_codes(), **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad_decode(codes=torch.zeros(2, 5, dtype=torch.long)), r"\(2, 5\); expected \(b, 6\)"),
        (bad_decode(codes=torch.zeros(2, 6, 3)), r"\(2, 6, 3\); expected \(b, 6, 4\)"),
        (bad_decode(codes=torch.full((1, 6), CODES)), r"a code outside 0\.\.11"),
        (bad_decode(codes=torch.full((1, 6), -1)), r"a code outside 0\.\.11"),
        (bad_decode(steps=-1), "steps is -1; it must be at least 1"),
        (bad_decode(steps=0), r"has none: give 1 or more, or train one \(ddt train nano_renderer"),
        (bad_decode(visible=7), r"visible is 7; it must lie in 0\.\.6"),
        (bad_decode(visible=-1), r"visible is -1; it must lie in 0\.\.6"),
        (bad_decode(guidance_scale=-0.5), r"guidance_scale is -0\.5; it must be finite and >= 0"),
        (bad_decode(guidance_scale=float("nan")), "guidance_scale is nan"),
        (bad_decode(guidance_scale=float("inf")), "guidance_scale is inf"),
        (bad_decode(eta=1.5), "eta 1.5: need 0"),
    ],
)
def test_decode_refuses_in_one_line(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        build().decode(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 3, 16, 12), (2, 3, 32, 32)])
def test_encode_refuses_other_sizes(shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"of shape .* reads \(b, 3, 16, 16\): resize"):
        build().encode(torch.zeros(shape))


def test_sizes_that_leave_a_rest_are_refused():
    with pytest.raises(UserError, match="image_size 16 is not a multiple of downsample x patch"):
        config(patch=5)
    with pytest.raises(UserError, match="the latents have 3 channels and 1 pixels a cell"):
        build(config(channels=4)).encode(images())


def test_decoding_nothing_gives_nothing():
    assert build().decode(some_codes(0)).shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saved_and_loaded_it_gives_the_same_codes_and_pictures(
    tmp_path: Path, dtype: torch.dtype | None
):
    model = build(config("joint", pieces=(0.75, 0.25), language_order="fine_to_coarse"))
    model.quantizer.filled.fill_(True)
    model.save(tmp_path / "a", dtype=dtype)
    again = load(tmp_path / "a")
    assert isinstance(again, TimestepTokenizer)
    assert again.config == model.config
    assert not again.training
    assert again.quantizer.filled
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert torch.equal(again.encode(images()), model.encode(images()))
    codes = some_codes()
    if dtype is None:
        assert torch.equal(again.decode(codes), model.decode(codes))
    else:
        close(again.decode(codes), model.decode(codes), 2e-2)
        half, whole = tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"
        model.save(tmp_path / "b")
        assert half.stat().st_size < 0.6 * whole.stat().st_size


def test_a_folder_of_another_kind_is_refused(tmp_path: Path):
    build().save(tmp_path)
    save_json(tmp_path / "config.json", {"kind": "spatial", **to_dict(TINY)})
    with pytest.raises(UserError, match="unknown field 'latents'"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none")


def test_weights_of_another_size_or_cut_short_are_refused(tmp_path: Path):
    build().save(tmp_path)
    path = tmp_path / "model.safetensors"
    save_json(tmp_path / "config.json", {"kind": "timestep", **to_dict(config(num_tokens=4))})
    with pytest.raises(UserError, match=r"does not fit this model: .*expected"):
        load(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        load(tmp_path)


def test_its_configuration_survives_json():
    plan = config("joint", path=DiscreteDDPM(8), prediction="noise", pieces=(0.5, 0.5))
    assert from_dict(TimestepTokenizerConfig, to_dict(plan)) == plan


def test_it_builds_on_the_meta_device_without_memory():
    with torch.device("meta"):
        model = TimestepTokenizer(config(image_size=256))
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    real = TimestepTokenizer(config(image_size=256))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("stream", STREAMS)
def test_any_tokens_can_be_hidden(stream: TokenStream):
    model, codes = build(config(stream)), some_codes()
    coarse = torch.arange(TOKENS) >= TOKENS - 2
    assert torch.equal(model.decode(codes, visible=coarse), model.decode(codes, visible=2))
    some = torch.tensor([True, False, True, True, False, False])
    out = model.decode(codes, visible=some, steps=3)
    hidden_changed = torch.where(some, codes, (codes + 1) % CODES)
    assert torch.equal(model.decode(hidden_changed, visible=some, steps=3), out)
    seen_changed = torch.where(some, (codes + 1) % CODES, codes)
    assert (model.decode(seen_changed, visible=some, steps=3) - out).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"names 3 tokens; there are 6"):
        visible_mask(torch.ones(3, dtype=torch.bool), TOKENS)
