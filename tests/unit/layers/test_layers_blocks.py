"""adaLN-zero, timestep embedding and stream halves against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddt_llama.layers import MLP, Modulation, Stream, TimestepEmbedding, attend, modulate

DIM, HEADS = 8, 2


def stream(conditional: bool, gate_start: float = 0.0) -> Stream:
    torch.manual_seed(0)
    return Stream(DIM, HEADS, 2.0, conditional, gate_start)


def run(half: Stream, x: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
    attention, mlp = half.modulations(condition)
    q, k, v = half.project(x, attention)
    return half.finish(x, attend(q, k, v), attention, mlp)


def test_a_conditional_stream_starts_as_the_identity_for_every_condition():
    half, x = stream(True), torch.randn(3, 5, DIM)
    assert torch.equal(run(half, x, 100 * torch.randn(3, DIM)), x)


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_a_conditional_stream_starts_with_the_given_gates_and_nothing_else(start: float):
    for part in stream(True, start).modulations(100 * torch.randn(3, DIM)):
        assert part is not None
        assert not part.shift.any()
        assert not part.scale.any()
        assert torch.equal(part.gate, torch.full((3, 1, DIM), start))


def test_open_gates_make_the_plain_stream_of_the_same_weights():
    plain, gated, x = stream(False), stream(True, 1.0), torch.randn(3, 5, DIM)
    gated.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(run(gated, x, torch.randn(3, DIM)), run(plain, x, None))


def test_the_gates_of_a_conditional_stream_learn_first():
    """The gates start at zero: their gradient is the only one that is not zero."""
    half, x = stream(True), torch.randn(3, 5, DIM)
    run(half, x, torch.randn(3, DIM)).square().sum().backward()
    assert half.modulation is not None
    assert half.modulation.weight.grad is not None
    moved = half.modulation.weight.grad.reshape(6, DIM, DIM).abs().sum((1, 2)) > 0
    assert moved.tolist() == [False, False, True, False, False, True]
    assert half.mlp.up.weight.grad is not None
    assert not half.mlp.up.weight.grad.any()


def test_a_plain_stream_is_no_identity_and_ignores_the_condition():
    half, x = stream(False), torch.randn(3, 5, DIM)
    out = run(half, x, None)
    assert (out - x).abs().max() > 0.1
    assert torch.equal(run(half, x, torch.randn(3, DIM)), out)


def test_a_stream_equals_its_formula():
    half, x, c = stream(True), torch.randn(2, 5, DIM), torch.randn(2, DIM)
    assert half.modulation is not None
    nn.init.normal_(half.modulation.weight)
    nn.init.normal_(half.modulation.bias)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = half.modulation(F.silu(c))[:, None].chunk(
        6, -1
    )
    normed = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + scale_a) + shift_a
    q, k, v = (
        part.reshape(2, 5, HEADS, -1).transpose(1, 2) for part in half.qkv(normed).chunk(3, -1)
    )
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(DIM / HEADS), -1)
    attended = (weights @ v).transpose(1, 2).reshape(2, 5, DIM)
    y = x + gate_a * half.out(attended)
    expected = y + gate_m * half.mlp(F.layer_norm(y, (DIM,), eps=1e-6) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(run(half, x, c), expected)


def test_modulate_is_the_identity_without_a_condition():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    assert modulate(x, None) is x
    modulated = modulate(x, Modulation(shift, scale, shift))
    torch.testing.assert_close(modulated, x * (1 + scale) + shift)


def test_the_mlp_maps_each_position_alone_with_the_exact_gelu():
    torch.manual_seed(0)
    mlp, x = MLP(4, 6), torch.randn(2, 3, 4)
    up = x @ mlp.up.weight.t() + mlp.up.bias
    gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    torch.testing.assert_close(mlp(x), gelu @ mlp.down.weight.t() + mlp.down.bias)


@pytest.mark.parametrize("t", [0.0, 0.001, 0.37, 1.0])
def test_the_timestep_is_embedded_by_sinusoids_of_a_thousand_t(t: float):
    embedding = TimestepEmbedding(8, num_frequencies=8)
    nn.init.eye_(embedding.up.weight)
    nn.init.zeros_(embedding.up.bias)
    nn.init.eye_(embedding.down.weight)
    nn.init.zeros_(embedding.down.bias)
    angles = [1000 * t * 10_000 ** (-i / 4) for i in range(4)]
    wave = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    torch.testing.assert_close(embedding(torch.tensor([t]))[0], F.silu(wave), rtol=1e-4, atol=1e-4)
