"""A decoder filled from SD3 answers as SD3 does where the token stream is masked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.tokenizer.decoder import Decoder, DecoderBlock, DecoderConfig
from ddt_llama.tokenizer.diffusers_folder import WEIGHTS
from ddt_llama.tokenizer.sd3 import load_image_stream

diffusers = pytest.importorskip("diffusers")

CHANNELS, PATCH, GRID, DIM, HEADS, DEPTH, TOKENS = 4, 2, 6, 32, 4, 3, 5


def tiny_sd3(**changes: object):
    torch.manual_seed(0)
    fields = {
        "sample_size": 16,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": DEPTH,
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM // HEADS,
        "joint_attention_dim": 12,
        "caption_projection_dim": DIM,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 11,
    }
    return diffusers.SD3Transformer2DModel(**{**fields, **changes}).eval()


def exact_gelu(sd3):
    """Give SD3 the decoder's GELU, so that only the layout is compared."""
    for block in sd3.transformer_blocks:
        block.ff.net[0].approximate = "none"
    return sd3


CONFIG = DecoderConfig(dim=DIM, depth=DEPTH, num_heads=HEADS)


def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(1)
    return Decoder(
        config,
        patch_dim=CHANNELS * PATCH**2,
        grid=GRID,
        num_tokens=TOKENS,
        code_dim=7,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_sd3().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def latents(rows: int = 2) -> Tensor:
    side = GRID * PATCH
    return torch.randn(rows, CHANNELS, side, side, generator=torch.Generator().manual_seed(2))


def patchify(x: Tensor) -> Tensor:
    b = len(x)
    x = x.reshape(b, CHANNELS, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, GRID**2, PATCH**2 * CHANNELS)


@torch.no_grad()
def answer_of_sd3(sd3, x: Tensor, t: Tensor) -> Tensor:
    """SD3's velocity with an empty prompt: no tokens of text and a pooled vector of zeros."""
    return sd3(x, torch.zeros(len(x), 0, 12), torch.zeros(len(x), 10), 1000 * t).sample


@torch.no_grad()
def answer_of(net: Decoder, x: Tensor, t: Tensor) -> Tensor:
    values = torch.randn(len(x), TOKENS, 7)
    hidden = torch.zeros(len(x), TOKENS, dtype=torch.bool)
    return net(patchify(x), t, net.remember(values, hidden), hidden)


def test_the_whole_decoder_answers_as_sd3_when_its_tokens_are_masked(folder: Path):
    net, x, t = decoder(), latents(), torch.tensor([0.25, 0.9])
    load_image_stream(net, folder)
    expected = patchify(answer_of_sd3(exact_gelu(tiny_sd3()), x, t))
    assert expected.std() > 0.05
    torch.testing.assert_close(answer_of(net, x, t), expected, rtol=1e-4, atol=1e-5)


def test_saved_and_read_again_the_decoder_still_answers_as_sd3(folder: Path):
    net, again, x, t = decoder(), decoder(), latents(), torch.tensor([0.25, 0.9])
    load_image_stream(net, folder)
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(answer_of(again, x, t), answer_of(net, x, t))


def test_the_other_form_of_gelu_changes_the_answer_by_little(folder: Path):
    net, x, t = decoder(), latents(), torch.tensor([0.25, 0.9])
    load_image_stream(net, folder)
    expected = patchify(answer_of_sd3(tiny_sd3(), x, t))
    assert (answer_of(net, x, t) - expected).abs().max() < 2e-3 * expected.std()


@torch.no_grad()
def test_a_block_of_the_image_stream_equals_that_of_sd3(folder: Path):
    net, sd3 = decoder(), exact_gelu(tiny_sd3())
    load_image_stream(net, folder)
    image, condition = torch.randn(2, GRID**2, DIM), torch.randn(2, DIM)
    nothing = torch.zeros(2, HEADS, TOKENS, DIM // HEADS)
    mask = (torch.arange(GRID**2 + TOKENS) < GRID**2).expand(2, 1, 1, -1)
    for ours, theirs in zip(net.blocks, sd3.transformer_blocks, strict=True):
        assert isinstance(ours, DecoderBlock)
        _, expected = theirs(image, torch.zeros(2, 0, DIM), condition)
        got = ours.denoise(image, condition, (nothing, nothing), mask)
        assert (expected - image).abs().max() > 0.01
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_token_stream_stays_as_it_was_and_the_rest_is_named(folder: Path):
    net = decoder()
    before = {name: value.clone() for name, value in net.named_parameters()}
    filled = load_image_stream(net, folder)
    for name, value in net.named_parameters():
        assert (name in filled) == (not torch.equal(value, before[name])), name
        assert (name in filled) == (".token." not in name and not name.startswith(("code", "tok")))


def test_shards_are_read_as_one(folder: Path, tmp_path: Path):
    tiny_sd3().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = decoder(), decoder()
    load_image_stream(one, folder)
    load_image_stream(many, tmp_path / "shards")
    for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_half_precision_weights_are_widened(tmp_path: Path):
    tiny_sd3().half().save_pretrained(tmp_path)
    net = decoder()
    load_image_stream(net, tmp_path)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(
    ("sd3", "own", "message"),
    [
        ({}, {"dim": 40, "num_heads": 5}, r"width 32 \(decoder: 40\)"),
        ({}, {"num_heads": 2}, r"heads 4 \(decoder: 2\)"),
        ({"num_layers": 2}, {}, r"blocks 2 \(decoder: 3\)"),
        ({}, {"mlp_ratio": 2.0}, r"MLP ratio 4 \(decoder: 2.0\)"),
        ({"in_channels": 3}, {}, r"numbers in a patch 12 \(decoder: 16\)"),
        ({"qk_norm": "rms_norm"}, {}, "qk_norm rms_norm"),
        ({"dual_attention_layers": (0, 1)}, {}, r"dual attention blocks 2 \(decoder: 0\)"),
        ({"pos_embed_max_size": 5}, {}, r"at most 5 patches a side \(decoder: 6\)"),
    ],
)
def test_an_sd3_of_other_sizes_is_refused_in_one_line(
    tmp_path: Path, sd3: dict, own: dict, message: str
):
    tiny_sd3(**sd3).save_pretrained(tmp_path)
    net = decoder(replace(CONFIG, **own))
    with pytest.raises(UserError, match=message) as caught:
        load_image_stream(net, tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_sd3_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        load_image_stream(decoder(), tmp_path / "none")
    with pytest.raises(UserError, match="did you mean one of its folders transformer"):
        load_image_stream(decoder(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer"}))
    with pytest.raises(UserError, match="that of 'FluxTransformer'"):
        load_image_stream(decoder(), folder)


def test_weights_that_are_cut_short_or_lacking_are_refused(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in weights.items() if k != "proj_out.bias"}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"the weights lack proj_out\.bias"):
        load_image_stream(decoder(), folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_image_stream(decoder(), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_image_stream(decoder(), folder)
