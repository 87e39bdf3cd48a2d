"""Schedules in closed form, groups by name, and one state whatever the kind."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddt_llama.config import UserError
from ddt_llama.tokenizer import SpatialTokenizer, SpatialTokenizerConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.critics import PatchCritic
from ddt_llama.training.muon import Muon, orthogonal
from ddt_llama.training.optim import OptimConfig, Optimizer, groups, lr_scale

COSINE = OptimConfig(warmup=10, decay="cosine", floor=0.1)
WSD = OptimConfig(warmup=10, decay="wsd", decay_share=0.25)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 5, bias=False)
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids) + self.queries))


def descend(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        ids = torch.tensor([[0, 1, 2]]) + step % 2
        nn.functional.cross_entropy(net(ids)[0], ids[0]).backward()
        optimizer.clip(1.0)
        optimizer.step(step)


@pytest.mark.parametrize("config", [COSINE, WSD, replace(WSD, decay="constant")])
def test_warmup_is_a_line_up_to_one(config):
    rising = [lr_scale(config, step, 1000) for step in range(10)]
    assert rising == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert lr_scale(config, 10, 1000) == pytest.approx(1.0)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    assert lr_scale(COSINE, 55, 100) == pytest.approx(0.1 + 0.9 / 2)
    assert lr_scale(COSINE, 100, 100) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2
    assert lr_scale(COSINE, 40, 100) == pytest.approx(quarter)


def test_wsd_is_flat_then_a_line_to_zero():
    assert [lr_scale(WSD, step, 100) for step in (10, 50, 75)] == pytest.approx([1, 1, 1])
    falling = [lr_scale(WSD, step, 100) for step in range(76, 101)]
    assert falling == pytest.approx([(100 - step) / 25 for step in range(76, 101)])


def test_each_parameter_is_in_one_group_and_only_matrices_decay():
    config = OptimConfig(weight_decay=0.1, multipliers={"body.*": 0.5, "body.2.*": 2.0})
    found = {name: group for group in groups(Net(), config) for name in group.names}
    assert set(found) == {name for name, p in Net().named_parameters() if p.requires_grad}
    decayed = {name for name, group in found.items() if group.weight_decay}
    assert decayed == {"body.0.weight", "body.2.weight", "head.weight"}
    assert found["body.0.bias"].multiplier == 0.5
    assert found["body.2.weight"].multiplier == 2.0
    assert found["head.weight"].multiplier == 1.0


def test_muon_takes_the_hidden_matrices_alone():
    chosen = {n for g in groups(Net(), OptimConfig(kind="muon")) if g.muon for n in g.names}
    assert chosen == {"body.0.weight", "body.2.weight"}


def test_muon_moves_a_convolution_as_the_matrix_that_it_is():
    torch.manual_seed(2)
    weights = torch.randn(8, 4, 3, 3)
    whole = nn.Parameter(weights.clone().contiguous(memory_format=torch.channels_last))
    flat = nn.Parameter(weights.flatten(1).clone())
    optimizer = Muon([whole, flat], lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn(weights.shape)
        flat.grad = whole.grad.flatten(1).clone()
        optimizer.step()
    assert (whole - weights).abs().max() > 0.01
    torch.testing.assert_close(whole.flatten(1), flat)


def test_muon_takes_the_hidden_convolutions_of_a_tokenizer_and_leaves_its_critic():
    model = SpatialTokenizer(
        SpatialTokenizerConfig(
            image_size=16,
            widths=(8, 8),
            blocks=(0, 1),
            groups=2,
            quantizer=QuantizerConfig(codebook_size=4, code_dim=2),
        )
    )
    model.critic = PatchCritic((8, 8))
    chosen = {n for g in groups(model, OptimConfig(kind="muon")) if g.muon for n in g.names}
    assert chosen == {
        "encoder.1.weight",  # the stride
        "encoder.2.conv_in.weight",
        "encoder.2.conv_out.weight",
        "decoder.1.conv_in.weight",
        "decoder.1.conv_out.weight",
        "decoder.3.weight",  # behind the upsampling
    }


def test_muon_moves_as_that_of_torch():
    """Torch multiplies in bf16: a per cent of the way is rounding, not another rule."""

    def matrices():
        torch.manual_seed(1)
        shapes = [(24, 60), (60, 24), (32, 32)] * 4
        return [nn.Parameter(0.1 * torch.randn(shape)) for shape in shapes]

    ours, theirs, start = matrices(), matrices(), matrices()
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (one - first).norm()


def test_orthogonal_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for result in orthogonal([torch.randn(40, 9), torch.randn(9, 40), torch.randn(40, 9)]):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_multipliers_scale_the_first_step_of_adam():
    """The first AdamW step without decay is lr x sign(gradient)."""
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    config = OptimConfig(lr=1e-3, warmup=0, decay="constant", multipliers={"head.*": 0.0})
    config = replace(config, multipliers={"head.*": 0.0, "body.0.*": 10.0})
    descend(net, Optimizer(net, config, 10), 1)
    moved = {name: (p - before[name]).abs().max() for name, p in net.named_parameters()}
    assert float(moved["head.weight"].detach()) == 0.0
    assert float(moved["fixed"].detach()) == 0.0
    assert float(moved["body.0.weight"].detach()) == pytest.approx(1e-2, rel=1e-3)
    assert float(moved["body.2.weight"].detach()) == pytest.approx(1e-3, rel=1e-3)


def test_a_multiplier_for_nothing_is_refused():
    with pytest.raises(UserError, match="'bodi"):
        groups(Net(), OptimConfig(multipliers={"bodi.*": 2.0}))
    with pytest.raises(UserError, match="every parameter is frozen"):
        groups(Net().requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_on_exactly(kind):
    config = OptimConfig(kind=kind, lr=0.01, weight_decay=0.1, warmup=2)
    whole, parted = Net(), Net()
    descend(whole, Optimizer(whole, config, 10), 8)
    first = Optimizer(parted, config, 10)
    descend(parted, first, 3)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = Optimizer(parted, config, 10)
    second.prepare([*state, "gone.weight/exp_avg"])
    assert second.state_dict().keys() == state.keys()
    for name, tensor in second.state_dict().items():
        tensor.copy_(state[name])
    descend(parted, second, 5, start=3)
    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e9])
def test_clipping_scales_the_whole_gradient(limit):
    net = Net()
    optimizer = Optimizer(net, OptimConfig(), 10)
    ids = torch.tensor([[0, 1, 2]])
    (10 * net(ids).square().sum()).backward()
    before = torch.cat([p.grad.flatten() for p in optimizer.parameters])
    norm = optimizer.clip(limit)
    after = torch.cat([p.grad.flatten() for p in optimizer.parameters])
    torch.testing.assert_close(norm, before.norm())
    scale = limit / float(norm) if 0 < limit < float(norm) else 1.0
    torch.testing.assert_close(after, before * scale, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"warmup": -1}, {"decay_share": 2.0}])
def test_values_that_cannot_train_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)
