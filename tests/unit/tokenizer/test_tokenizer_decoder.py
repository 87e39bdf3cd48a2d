"""The decoder sees the visible tokens and nothing of the hidden ones, in both token streams."""

from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from ddt_llama.tokenizer.decoder import Decoder, DecoderConfig, Memory, TokenStream

GRID, PATCH_DIM, TOKENS, CODE, DRAWS = 3, 5, 6, 4, 3
STREAMS = get_args(TokenStream)


def decoder(
    token_stream: TokenStream, positions: Literal["spatial", "normal"] = "spatial"
) -> Decoder:
    """A decoder whose zero starts are moved, so that everything has an effect."""
    torch.manual_seed(0)
    config = DecoderConfig(16, 2, 2, token_stream=token_stream, positions=positions)
    net = Decoder(config, patch_dim=PATCH_DIM, grid=GRID, num_tokens=TOKENS, code_dim=CODE)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def answer(net: Decoder, values: Tensor, visible: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    static = net.config.token_stream == "static"
    return net(noisy, t, net.remember(values, visible) if static else values, visible)


def inputs(rows: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return token values, noisy patches and times."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, TOKENS, CODE, generator=g)
    return values, torch.randn(rows, GRID**2, PATCH_DIM, generator=g), torch.rand(rows, generator=g)


def window(low: int, high: int, rows: int = 2) -> Tensor:
    index = torch.arange(TOKENS)
    return ((index >= low) & (index < high)).expand(rows, -1)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 2), (2, 5), (0, 6), (5, 6)])
def test_hidden_tokens_have_no_influence_and_visible_ones_have(
    stream: TokenStream, low: int, high: int
):
    net, (values, noisy, t), visible = decoder(stream), inputs(), window(low, high)
    other = torch.where(visible[..., None], values, 1e4 * torch.randn_like(values))
    out = answer(net, values, visible, noisy, t)
    torch.testing.assert_close(answer(net, other, visible, noisy, t), out, rtol=0, atol=0)
    for index in range(low, high):
        changed = values.clone()
        changed[:, index] += 1
        assert (answer(net, changed, visible, noisy, t) - out).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("stream", STREAMS)
def test_hidden_tokens_get_no_gradient(stream: TokenStream):
    net, (values, noisy, t), visible = decoder(stream), inputs(), window(1, 4)
    values.requires_grad_()
    answer(net, values, visible, noisy, t).square().sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad.abs().sum(-1) > 0, visible)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_hidden_tokens_position_is_hidden_too(stream: TokenStream):
    net, (values, noisy, t), visible = decoder(stream), inputs(), window(2, 5)
    before = answer(net, values, visible, noisy, t)
    net.token_positions.data[~visible[0]] = 7.0
    torch.testing.assert_close(answer(net, values, visible, noisy, t), before, rtol=0, atol=0)
    net.token_positions.data[3] = 7.0
    assert (answer(net, values, visible, noisy, t) - before).abs().max() > 1e-4


def test_keys_and_values_of_a_static_prefix_do_not_depend_on_coarser_tokens():
    net, (values, _, _) = decoder("static"), inputs()
    whole = net.remember(values, window(0, TOKENS))
    for k in range(TOKENS + 1):
        part = net.remember(values, window(0, k))
        for a, b in zip(whole.pairs, part.pairs, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x[:, :, :k], y[:, :, :k], rtol=1e-5, atol=1e-5)
    other = values.clone()
    other[:, 4:] = 0
    moved = net.remember(other, window(0, TOKENS)).pairs[1][0] - whole.pairs[1][0]
    assert moved[:, :, :4].abs().max() < 1e-5
    assert moved[:, :, 4:].abs().amax((0, 1, 3)).min() > 1e-3


def test_a_memory_made_once_serves_every_step():
    net, (values, noisy, _) = decoder("static"), inputs()
    once = net.remember(values, window(0, TOKENS))
    for k in range(TOKENS + 1):
        t = torch.full((2,), k / TOKENS)
        again = net(noisy, t, net.remember(values, window(0, k)), window(0, k))
        torch.testing.assert_close(net(noisy, t, once, window(0, k)), again, rtol=1e-5, atol=1e-5)


def test_a_hidden_fine_end_leaves_the_rest_as_if_it_had_never_been():
    """Tokens 3, 4, 5 see only one another, so the values of 0, 1, 2 cannot leak through them."""
    net, (values, _, _) = decoder("static"), inputs()
    kept = net.remember(values, window(3, TOKENS))
    values[:, :3] = 1e3
    for a, b in zip(kept.pairs, net.remember(values, window(3, TOKENS)).pairs, strict=True):
        assert torch.equal(a[0][:, :, 3:], b[0][:, :, 3:])
        assert torch.equal(a[1][:, :, 3:], b[1][:, :, 3:])


def test_repeating_a_memory_gives_each_draw_its_own_images_rows():
    pair = (torch.arange(2.0).reshape(2, 1, 1, 1), torch.arange(2.0, 4).reshape(2, 1, 1, 1))
    keys, values = Memory([pair]).repeat(DRAWS).pairs[0]
    assert keys.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert values.flatten().tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("stream", STREAMS)
def test_rows_do_not_see_one_another(stream: TokenStream):
    net, (values, noisy, t) = decoder(stream), inputs(rows=3)
    visible = torch.stack([window(0, k)[0] for k in (1, 4, 6)])
    whole = answer(net, values, visible, noisy, t)
    for i in range(3):
        row = slice(i, i + 1)
        alone = answer(net, values[row], visible[row], noisy[row], t[row])
        torch.testing.assert_close(whole[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stream", STREAMS)
def test_the_untrained_decoder_answers_zero(stream: TokenStream):
    config = DecoderConfig(16, 1, 2, token_stream=stream)
    net = Decoder(config, patch_dim=PATCH_DIM, grid=GRID, num_tokens=TOKENS, code_dim=CODE)
    values, noisy, t = inputs()
    assert not answer(net, values, window(0, 6), noisy, t).any()


@pytest.mark.parametrize("stream", STREAMS)
def test_time_matters_to_the_picture_but_not_to_a_static_token_stream(stream: TokenStream):
    net, (values, noisy, t), visible = decoder(stream), inputs(), window(0, 6)
    assert (
        answer(net, values, visible, noisy, t) - answer(net, values, visible, noisy, 1 - t)
    ).abs().max() > 1e-3


def test_random_starts_are_small_and_spatial_ones_are_places():
    plain, spatial = decoder("static", "normal"), decoder("static")
    assert plain.token_positions.abs().max() < 0.1
    assert spatial.token_positions.abs().amax(1).min() > 0.5
    first = next(iter(spatial.blocks))
    weights = [getattr(first, name).qkv.weight for name in ("image", "token")]
    assert torch.equal(weights[0][:32], weights[1][:32])
    assert torch.equal(weights[0][:16], weights[0][16:32])
    assert not torch.equal(weights[0][32:], weights[1][32:])
