"""The weight average in closed form, and its coming and going in the model."""

import pytest
import torch
from torch import nn

from ddt_llama.config import UserError
from ddt_llama.training.ema import Ema, decay_at


def linear(value):
    net = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def test_the_average_is_the_weighted_sum_of_all_weights():
    """average_n = sum_i (1 - d_i) w_i prod_{j > i} d_j + w_start prod_j d_j."""
    net = linear(1.0)
    ema = Ema(net, 0.9)
    expected = 1.0
    for update in range(200):
        with torch.no_grad():
            net.weight.fill_(update)
        ema.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    average = ema.state_dict()["weight"]
    torch.testing.assert_close(average, torch.full((2, 2), expected))
    assert torch.equal(ema.state_dict()["bias"], torch.ones(2))


def test_the_decay_warms_up_to_its_limit():
    assert decay_at(0.999, 0) == 0.1
    assert decay_at(0.999, 90) == 0.91
    assert decay_at(0.999, 10**6) == 0.999


def test_without_decay_nothing_is_held_and_the_last_weight_is_used():
    net = linear(1.0)
    ema = Ema(net, 0.0)
    with torch.no_grad():
        net.weight.fill_(5.0)
    ema.update()
    assert (ema.updates, ema.state_dict()) == (1, {})
    with ema.swapped():
        assert torch.equal(net.weight, torch.full((2, 2), 5.0))
    ema.write()
    assert torch.equal(net.weight, torch.full((2, 2), 5.0))


def test_swapping_gives_the_weights_back_even_after_an_error():
    net = linear(1.0)
    ema = Ema(net, 0.99)
    with torch.no_grad():
        net.weight.fill_(3.0)

    def fail():
        with ema.swapped():
            assert float(net.weight.detach()[0, 0]) == 1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert float(net.weight.detach()[0, 0]) == 3.0
    ema.write()
    assert float(net.weight.detach()[0, 0]) == 1.0


def test_half_precision_weights_are_averaged_in_float32():
    net = linear(1.0).to(torch.bfloat16)
    ema = Ema(net, 0.999)
    ema.updates = 10**6
    with torch.no_grad():
        net.weight.fill_(1.5)
    ema.update()
    torch.testing.assert_close(ema.state_dict()["weight"], torch.full((2, 2), 1.0005))


def test_wrong_states_and_decays_are_refused():
    with pytest.raises(UserError, match="ema: given 1"):
        Ema(linear(1.0), 1.0)
