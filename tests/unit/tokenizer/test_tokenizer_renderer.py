"""The one-step renderer: what it begins as, what its pictures depend on, its file."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig, Tokenizer, load
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


def build(stream: TokenStream = "static", **changes: Any) -> TimestepTokenizer:
    """Return a tokenizer whose zero starts are moved, with a renderer whose canvas is moved."""
    torch.manual_seed(0)
    decoder = replace(TINY.decoder, token_stream=stream)
    model = TimestepTokenizer(replace(TINY, **{"decoder": decoder, **changes}))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.add_renderer().canvas)
    return model.eval()


def some_codes(rows: int = 2) -> Tensor:
    return torch.randint(CODES, (rows, TOKENS), generator=torch.Generator().manual_seed(4))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("prediction", "sign"), [("clean", 1), ("velocity", -1)])
def test_it_begins_as_one_step_from_the_mean_of_the_noise(
    stream: TokenStream, prediction: str, sign: int
):
    """At t = 1 a velocity is the noise less the picture, and the noise is zero."""
    model = build(stream, prediction=prediction)
    torch.nn.init.zeros_(model.add_renderer().canvas)
    values = model.quantizer.look_up(some_codes())
    seen = torch.ones(2, TOKENS, dtype=torch.bool)
    tokens = model.decoder.remember(values, seen) if stream == "static" else values
    noise = torch.zeros(2, 16, 48)
    close(model.render(values, seen), sign * model.decoder(noise, torch.ones(2), tokens, seen))
    path = model.config.path
    x0, _ = path.recover(sign * model.render(values, seen), noise, 1.0, model.config.prediction)
    close(model.decode(some_codes(), steps=0), model.unpatchify(x0).clamp(-1, 1).detach())


@pytest.mark.parametrize("stream", STREAMS)
def test_a_picture_depends_on_its_codes_alone(stream: TokenStream):
    model, codes = build(stream), some_codes(3)
    pictures = model.decode(codes, steps=0, seed=5)
    assert pictures.shape == (3, 3, SIDE, SIDE)
    assert pictures.abs().max() <= 1
    assert torch.equal(model.decode(codes, steps=0, seed=[9, 1, 7], guidance_scale=3.0), pictures)
    close(model.decode(codes[1:2], steps=0), pictures[1:2])
    for place in range(TOKENS):
        other = codes.clone()
        other[:, place] = (other[:, place] + 1) % CODES
        assert (model.decode(other, steps=0) - pictures).abs().max() > 1e-3


@pytest.mark.parametrize("stream", STREAMS)
def test_tokens_can_be_hidden(stream: TokenStream):
    model, codes = build(stream), some_codes()
    coarse = model.decode(codes, steps=0, visible=2)
    assert (coarse - model.decode(codes, steps=0)).abs().max() > 1e-3
    finer = codes.clone()
    finer[:, :-2] = (finer[:, :-2] + 1) % CODES
    assert torch.equal(model.decode(finer, steps=0, visible=2), coarse)


def test_it_is_no_part_of_the_decoder_nor_of_what_codes_depend_on():
    model, codes = build(), some_codes()
    letters, before = model.fingerprint(), model.decode(codes, steps=2)
    pictures = model.decode(codes, steps=0)
    model.add_renderer().canvas.data.add_(1.0)
    for parameter in model.add_renderer().decoder.parameters():
        parameter.data.mul_(0.5)
    assert model.fingerprint() == letters
    assert torch.equal(model.decode(codes, steps=2), before)
    assert not torch.equal(model.decode(codes, steps=0), pictures)
    model.renderer = None
    assert model.fingerprint() == letters
    assert not model.renders


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int8])
def test_it_has_a_file_of_its_own(tmp_path: Path, dtype: torch.dtype | None):
    model, codes = build(), some_codes()
    model.save(tmp_path, dtype=dtype)
    again: Any = load(tmp_path)
    assert isinstance(again, Tokenizer)
    assert again.renders
    assert not any(part.training for part in again.modules())
    difference = again.decode(codes, steps=0) - model.decode(codes, steps=0)
    assert difference.abs().max() <= (0.05 if dtype else 0)
    beside = (tmp_path / "model.safetensors").read_bytes()
    model.renderer = None
    model.save(tmp_path, dtype=dtype)  # the old one goes
    assert (tmp_path / "model.safetensors").read_bytes() == beside
    without: Any = load(tmp_path)
    assert not without.renders
    with pytest.raises(UserError, match="steps is 0"):
        without.decode(codes, steps=0)


def test_another_decoders_renderer_is_refused(tmp_path: Path):
    build().save(tmp_path / "a")
    build(decoder=DecoderConfig(16, 1, 2)).save(tmp_path / "b")
    file = "renderer.safetensors"
    (tmp_path / "a" / file).write_bytes((tmp_path / "b" / file).read_bytes())
    with pytest.raises(UserError, match=rf"{file}: does not fit this model"):
        load(tmp_path / "a")
