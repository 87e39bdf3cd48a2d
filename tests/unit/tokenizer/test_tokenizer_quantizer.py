"""The quantizer against brute force, closed forms and a twin in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddt_llama.tokenizer.quantizer import REPLACED_PER_FEATURES, Quantizer, QuantizerConfig

SIZE, DIM, TOKENS = 7, 3, 4


def quantizer(**fields: float) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(QuantizerConfig(codebook_size=SIZE, code_dim=DIM, **fields), TOKENS)


def features(seed: int, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, TOKENS, DIM, generator=generator)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def test_the_code_is_the_nearest_by_cosine():
    net, z = quantizer(), features(1)
    book, codes = net.codebook.tolist(), net(z).codes
    for row, its_codes in zip(z.tolist(), codes.tolist(), strict=True):
        for feature, code in zip(row, its_codes, strict=True):
            assert code == max(range(SIZE), key=lambda i: cosine(feature, book[i]))
    assert torch.equal(net.look_up(codes), net.codebook[codes])
    assert torch.equal(net(100 * z).codes, codes)


def test_of_codes_nearly_as_near_the_commonest_is_taken():
    plain, weighed = quantizer(), quantizer(rate=0.1)
    unit, counts = F.normalize(features(1, 500), dim=-1), torch.tensor([1, 9, 900, 3, 40, 2, 0.0])
    for net in (plain, weighed):
        net.weigh(counts)
    assert torch.equal(plain.cheapest(unit), plain.nearest(unit))
    book, total = weighed.codebook.tolist(), float(counts.sum())
    share = [max(float(count) / total, 0.01 / SIZE) for count in counts]
    found = weighed.cheapest(unit).flatten().tolist()
    for feature, code in zip(unit.flatten(0, 1).tolist(), found, strict=True):
        cost = [
            sum((x - y) ** 2 for x, y in zip(feature, row, strict=True)) - 0.1 * math.log(p)
            for row, p in zip(book, share, strict=True)
        ]
        assert cost[code] == pytest.approx(min(cost), abs=1e-5)
    assert (torch.tensor(found) == 2).sum() > (plain.nearest(unit) == 2).sum()


@pytest.mark.parametrize("size", [100, 128, 300])
def test_the_search_by_groups_finds_what_the_whole_search_finds(size: int):
    net = Quantizer(QuantizerConfig(codebook_size=size, code_dim=DIM, rate=0.1), TOKENS)
    torch.manual_seed(0)
    net.codebook.copy_(F.normalize(torch.randn(size, DIM), dim=-1))
    net.codebook[-1] = net.codebook[3]  # of two that are alike the first is taken
    net.weigh(torch.rand(size))
    net.lengths[-1] = net.lengths[3]
    unit = F.normalize(torch.cat([features(2, 50), net.codebook[None, -TOKENS:]]), dim=-1)
    gain = unit @ net.codebook.t()
    assert torch.equal(net.nearest(unit), gain.argmax(-1))
    assert torch.equal(net.cheapest(unit), (gain - 0.05 * net.lengths).argmax(-1))
    assert int(net.nearest(unit)[-1, -1]) == 3


def test_lengths_follow_the_usage_in_training():
    net = quantizer(decay=0.5)
    assert not net.lengths.any()  # all alike before
    for step in range(3):
        z = features(step)
        net.update(z, net(z).codes, step)
    share = net.counts / net.counts.sum()
    torch.testing.assert_close(net.lengths, -share.clamp_min(0.01 / SIZE).log())


@pytest.mark.parametrize("rounding", [0.0, 0.5, 1.0])
def test_rounding_goes_that_share_of_the_way(rounding: float):
    net, z = quantizer(), features(1)
    out, unit = net(z, rounding), F.normalize(z, dim=-1)
    expected = (1 - rounding) * unit + rounding * net.look_up(out.codes)
    torch.testing.assert_close(out.values, expected)


@pytest.mark.parametrize("rounding", [0.0, 0.3, 1.0])
def test_the_gradient_goes_straight_through_to_the_unit_features(rounding: float):
    net, z = quantizer(), features(1).requires_grad_()
    slope = torch.randn(z.shape)
    (got,) = torch.autograd.grad(net(z, rounding).values, z, slope)
    (expected,) = torch.autograd.grad(F.normalize(z, dim=-1), z, slope)
    torch.testing.assert_close(got, expected)


def test_commitment_is_two_minus_two_cosines_and_pulls_towards_the_code():
    net, z = quantizer(), features(1).requires_grad_()
    out = net(z)
    near = F.cosine_similarity(z.detach(), net.look_up(out.codes), dim=-1)
    torch.testing.assert_close(out.commitment.detach(), (2 - 2 * near).mean())
    (slope,) = torch.autograd.grad(out.commitment, z)
    moved = F.cosine_similarity(z.detach() - 0.1 * slope, net.look_up(out.codes), dim=-1)
    assert (moved >= near - 1e-6).all()
    assert moved.mean() > near.mean()


def test_half_precision_features_are_rounded_in_float32():
    net, z = quantizer(), features(1).bfloat16()
    out = net(z)
    assert out.values.dtype == out.commitment.dtype == torch.float32
    assert torch.equal(out.codes, net(z.float()).codes)


def test_autocast_does_not_change_the_codes():
    """Features that lie close together, as early in training, tie in bf16 and share a code."""
    torch.manual_seed(0)
    net = Quantizer(QuantizerConfig(codebook_size=64, code_dim=8), TOKENS)
    z = torch.randn(1, TOKENS, 8) + 0.05 * torch.randn(100, TOKENS, 8)
    net.update(z, net(z).codes, seed=0)
    plain = net(z).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(z).codes, plain)


def test_the_first_batch_fills_the_codebook():
    net, z = quantizer(), features(1)
    assert not net.filled
    assert net.update(z, net(z).codes, seed=3) == SIZE
    assert net.filled
    members = F.normalize(z, dim=-1).flatten(0, 1)
    distances = (net.codebook[:, None] - members).norm(dim=-1)
    assert distances.min(1).values.max() < 1e-6
    assert len(distances.argmin(1).unique()) > 1


class Twin:
    """The moving average in plain Python; `dead` codes take `replacements` in turn."""

    def __init__(self, decay: float, dead_share: float) -> None:
        self.decay, self.dead_share = decay, dead_share
        self.counts = [0.0] * SIZE
        self.sums = [[0.0] * DIM for _ in range(SIZE)]

    def update(self, units: list[list[float]], codes: list[int], picks: list[int]) -> int:
        fresh = not any(self.counts)
        even, replaced = len(units) / SIZE, 0
        most = SIZE if fresh else max(1, len(units) // REPLACED_PER_FEATURES)
        for i in range(SIZE):
            mine = [u for u, c in zip(units, codes, strict=True) if c == i and not fresh]
            self.counts[i] = self.decay * self.counts[i] + (1 - self.decay) * len(mine)
            for d in range(DIM):
                new = sum(u[d] for u in mine)
                self.sums[i][d] = self.decay * self.sums[i][d] + (1 - self.decay) * new
            if self.counts[i] < self.dead_share * even and replaced < most:
                self.sums[i] = [x * even for x in units[picks[replaced]]]
                self.counts[i] = even
                replaced += 1
        return replaced

    def codebook(self) -> list[list[float]]:
        return [[x / math.hypot(*s) for x in s] for s in self.sums]


def worst_served(units: torch.Tensor, nearest: torch.Tensor, count: int, seed: int) -> list[int]:
    """Draw indices in proportion to the squared distance, by walking along the total."""
    distances = [float((u - c).square().sum()) for u, c in zip(units, nearest, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    picks = []
    for share in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
        left, pick = share * sum(distances), 0
        while pick + 1 < len(distances) and left > distances[pick]:
            left, pick = left - distances[pick], pick + 1
        picks.append(pick)
    return picks


@pytest.mark.parametrize(("decay", "dead_share"), [(0.5, 0.7), (0.5, 0.9), (0.99, 1e-6)])
def test_the_moving_average_equals_its_twin(decay: float, dead_share: float):
    """At a dead_share of 0.9 codes are replaced at most steps, at 1e-6 none after the first."""
    net, twin = quantizer(decay=decay, dead_share=dead_share), Twin(decay, dead_share)
    replaced = 0
    for step in range(12):
        z = features(step)
        codes, units = net(z).codes, F.normalize(z, dim=-1).flatten(0, 1)
        before = net.codebook.clone()
        count = net.update(z, codes, seed=step)
        picks = worst_served(units, before[codes.flatten()], count, seed=step)
        assert twin.update(units.tolist(), codes.flatten().tolist(), picks) == count
        replaced += count if step else 0
        torch.testing.assert_close(net.codebook, torch.tensor(twin.codebook()))
        torch.testing.assert_close(net.counts, torch.tensor(twin.counts))
    assert (replaced > 0) == (dead_share > 0.1)


def test_dead_codes_become_batch_members_chosen_by_the_seed():
    def after(seed: int) -> tuple[Quantizer, int]:
        net, codes = quantizer(decay=0.5), torch.zeros(6, TOKENS, dtype=torch.long)
        # only code 0 is used: an even share halves three times before it is below a fifth
        counts = [net.update(features(step), codes, seed=seed + step) for step in range(4)]
        # all but the used one are dead by then; few are replaced at once
        assert counts == [SIZE, 0, 0, 6 * TOKENS // REPLACED_PER_FEATURES]
        return net, counts[-1]

    net, replaced = after(0)
    again, other = after(0)[0], after(100)[0]
    assert torch.equal(net.codebook, again.codebook)
    assert not torch.equal(net.codebook, other.codebook)
    members = F.normalize(features(3), dim=-1).flatten(0, 1)
    gaps = (net.codebook[:, None] - members).norm(dim=-1).min(1).values
    assert (gaps[1:] < 1e-6).sum() == replaced
    assert gaps[0] > 1e-3


def test_a_larger_codebook_fills_up_from_the_first_batches():
    """Rows of zeros (`--start` with fewer codes) become batch members, a few at each step."""
    net = quantizer(decay=0.99)
    known = F.normalize(torch.randn(2, DIM), dim=-1)
    net.codebook.copy_(torch.cat([known, torch.zeros(SIZE - 2, DIM)]))
    net.filled.fill_(True)
    replaced = [net.update(features(step), net(features(step)).codes, step) for step in range(3)]
    each = len(features(0).flatten(0, 1)) // REPLACED_PER_FEATURES
    assert replaced == [each, SIZE - 2 - each, 0]
    torch.testing.assert_close(net.codebook.norm(dim=-1), torch.ones(SIZE))
    assert (F.cosine_similarity(net.codebook[:2], known) > 0.98).all()


def test_training_goes_on_from_a_released_codebook():
    """A release has the codebook alone: its counts start at an even share, its codes stay."""
    net = quantizer()
    net.update(features(1), net(features(1)).codes, seed=0)
    released = quantizer()
    released.load_state_dict(net.state_dict())
    assert released.filled
    assert not released.counts.any()
    z = features(2)
    assert released.update(z, released(z).codes, seed=0) == 0
    even = 6 * TOKENS / SIZE
    hits = torch.bincount(net(z).codes.flatten(), minlength=SIZE)
    torch.testing.assert_close(released.counts, 0.99 * even + 0.01 * hits)
    assert F.cosine_similarity(released.codebook, net.codebook).min() > 0.999
    assert not torch.equal(released.codebook, net.codebook)


def test_metrics_are_perplexities_of_the_decayed_counts():
    net = quantizer()
    codes = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 2]])
    net.update(features(0, rows=2), codes, seed=0)
    metrics = net.metrics()
    assert metrics["used"] == pytest.approx(4 / SIZE)
    whole = math.exp(-sum(p * math.log(p) for p in (2 / 8, 2 / 8, 3 / 8, 1 / 8)))
    assert metrics["perplexity"] == pytest.approx(whole, rel=1e-5)
    assert metrics["position_perplexity"] == pytest.approx((1 + 1 + 1 + 2) / 4, rel=1e-5)
    for step in range(100):  # forgotten: code 3 has weight 0.99^100 = 0.37
        net.update(features(0, rows=2), torch.zeros_like(codes), seed=step)
    assert net.metrics()["used"] == pytest.approx(3 / SIZE)
    assert net.metrics()["position_perplexity"] < 1.1


def test_the_codebook_and_its_lengths_alone_are_released():
    assert set(quantizer().state_dict()) == {"codebook", "filled", "lengths"}
