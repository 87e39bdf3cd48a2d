"""The tokenizer's objective against the paper's formula, written as loops over images and draws."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError
from ddt_llama.diffusion import AtNoise, Cosine, Straight, Uniform
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.runs import Run
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig, TokenStream
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig, keep_codes
from ddt_llama.training.loop import TrainConfig, train
from ddt_llama.training.spatial import SpatialObjectiveConfig
from ddt_llama.training.timestep import TimestepObjective, TimestepObjectiveConfig, probe

TOKENS, SIDE, SEED = 6, 8, 11
STREAMS = get_args(TokenStream)
TINY = TimestepTokenizerConfig(
    image_size=SIDE,
    patch=4,
    num_tokens=TOKENS,
    quantizer=QuantizerConfig(16, 4),
    encoder=EncoderConfig(16, 1, 2),
    decoder=DecoderConfig(16, 1, 2),
)
EVERYTHING = TimestepObjectiveConfig(
    draws=3, drop_tokens=0.3, hide_fine=0.6, commitment=0.5, round_until=4, probe_every=2
)


def build(stream: TokenStream = "static", **changes: Any) -> TimestepTokenizer:
    """Return a tokenizer whose zero starts are moved, so that everything has an effect."""
    torch.manual_seed(0)
    decoder = replace(TINY.decoder, token_stream=stream)
    model = TimestepTokenizer(replace(TINY, decoder=decoder, **changes))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(rows: int = 4, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, SIDE, SIDE, generator=generator) * 2 - 1


def objective(config: TimestepObjectiveConfig = EVERYTHING) -> TimestepObjective:
    return TimestepObjective(config, images(4, seed=9))


def loss_of(
    model: TimestepTokenizer,
    config: TimestepObjectiveConfig,
    *,
    step: int = 100,
    seed: int = SEED,
    batch: Tensor | None = None,
) -> Tensor:
    goal = objective(config)
    goal.before_step(model, step)
    return goal(model, images() if batch is None else batch, seed)[0]


def twin(model: TimestepTokenizer, c: TimestepObjectiveConfig, rounding: float) -> Tensor:
    """E ||d(x_t, t, V_first..V_k(t)) - x0||^2 + commitment, one decoder call a draw."""
    generator = torch.Generator().manual_seed(SEED)
    x0 = model.patchify(images())
    b, n, p = x0.shape
    t = c.density.sample((b, c.draws), generator)
    eps = torch.randn(b, c.draws, n, p, generator=generator)
    dropped = torch.rand(b, c.draws, generator=generator) < c.drop_tokens
    hides = torch.rand(b, generator=generator) < c.hide_fine
    first = torch.randint(model.num_tokens, (b,), generator=generator)
    own = [False] * b
    if c.own:
        own = ((torch.rand(b, generator=generator) < c.own) & ~dropped[:, 0]).tolist()
        t[own, 0] = 1.0
        t[own, 1:] = Uniform().sample((b, c.draws - 1), generator)[own]
    errors, distances = [], []
    for i in range(b):
        feature = model.encoder(x0[i : i + 1])
        unit = feature / feature.norm(dim=-1, keepdim=True)
        code = (unit @ model.quantizer.codebook.t()).argmax(-1)
        near = model.quantizer.codebook[code]
        distances.append((unit - near).square().sum(-1))
        values = (1 - rounding) * unit + rounding * near
        clean, noise = x0[i], None
        for j in range(c.draws):
            k = 0 if dropped[i, j] else -(-int(t[i, j] * 1e6) * TOKENS // 1_000_000)
            low = int(first[i]) if hides[i] else 0
            visible = torch.tensor([[low <= index < k for index in range(TOKENS)]])
            time = float(t[i, j])
            alpha, sigma = model.config.path.alpha(time), model.config.path.sigma(time)
            noisy = (alpha * clean + sigma * (eps[i, j] if noise is None else noise))[None]
            static = model.config.decoder.token_stream == "static"
            tokens = model.decoder.remember(values, visible) if static else values
            out = model.decoder(noisy, t[i, j : j + 1], tokens, visible)
            goal = model.config.path.target(x0[i], eps[i, j], time, model.config.prediction)
            errors.append((out[0] - goal).square().mean())
            if own[i] and j == 0:  # the first answer takes the place of the image
                clean, noise = out[0].detach(), eps[i, 0]
    commitment = torch.cat(distances).mean()
    return torch.stack(errors).mean() + c.commitment * rounding * commitment


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, 4),
        ({}, 1),
        ({"path": Cosine(), "prediction": "velocity"}, 4),
        ({"path": Straight(), "prediction": "noise"}, 4),
    ],
)
def test_the_loss_is_the_papers(stream: TokenStream, changes: dict[str, Any], step: int):
    model = build(stream, **changes)
    got, expected = loss_of(model, EVERYTHING, step=step), twin(model, EVERYTHING, step / 4)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stream", STREAMS)
def test_later_draws_of_an_own_image_start_from_the_first_answer(stream: TokenStream):
    model = build(stream)
    config = replace(EVERYTHING, own=0.6, drop_tokens=0.1)
    got, expected = loss_of(model, config, step=4), twin(model, config, 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert abs(got - loss_of(model, replace(config, own=0.0), step=4)) > 1e-3


def test_the_gradient_of_own_draws_is_that_of_the_loss_with_the_answer_held_fixed():
    model, plain = build(), build()
    config = replace(EVERYTHING, own=0.6)
    loss_of(model, config, step=0).backward()
    twin(plain, config, 0.0).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def decoder_alone(**changes: Any) -> TimestepTokenizer:
    """Return a tokenizer whose codes are kept, some of them much commoner than others."""
    model = build(quantizer=QuantizerConfig(16, 4, rate=0.2), **changes)
    model.quantizer.weigh(torch.arange(16.0) ** 3)
    keep_codes(model)
    return model


def test_a_decoder_alone_learns_from_the_codes_that_encode_gives():
    model, plain = decoder_alone(), decoder_alone()
    codes = model.encode(images())
    features = model.encoder(model.patchify(images()))
    assert torch.equal(codes, model.quantizer(features).codes)
    assert not torch.equal(codes, build().quantizer(features).codes)  # the nearest
    plain.quantizer.nearest = plain.quantizer.cheapest
    plain.quantizer.frozen = False  # as an encoder that learns, but for which code is taken
    config = replace(EVERYTHING, commitment=0.0)
    torch.testing.assert_close(loss_of(model, config), loss_of(plain, config))


def test_slips_move_some_tokens_to_other_codes_and_the_image_stays_the_target():
    model = decoder_alone()
    seen: list[Tensor] = []
    look_up = model.quantizer.look_up
    model.quantizer.look_up = lambda codes: (seen.append(codes), look_up(codes))[1]
    batch = images(256)
    config = TimestepObjectiveConfig(draws=1, drop_tokens=0.0, slips=0.8, slip_size=3.0)
    plain = loss_of(model, replace(config, slips=0.0), batch=batch)
    slipped = loss_of(model, config, batch=batch)
    codes, moved = seen
    assert torch.equal(codes, model.encode(batch))
    shares = (codes != moved).float().mean(1)
    # Half of 0.8 are moved, some of them to the code that they had.
    assert 0.2 < float(shares.mean()) < 0.4
    assert float(shares.min()) == 0.0
    assert slipped > plain
    seen.clear()
    again = loss_of(model, config, batch=batch)
    assert torch.equal(again, slipped)
    assert torch.equal(seen[0], moved)


def test_a_small_slip_goes_to_a_code_nearby():
    def nearness(size: float) -> tuple[float, float]:
        model = build(quantizer=QuantizerConfig(512, 4))
        unit = torch.nn.functional.normalize(torch.randn(64, TOKENS, 4), dim=-1)
        model.quantizer.frozen = True
        book, codes = model.quantizer.codebook, model.quantizer(unit).codes
        noise = size * torch.randn(unit.shape) / 2
        other = model.quantizer(unit, slips=noise).codes
        cosine = (book[codes] * book[other]).sum(-1)[codes != other]
        return float(cosine.mean()), float((codes != other).float().mean())

    torch.manual_seed(1)
    (close, few), (far, many) = nearness(0.1), nearness(2.0)
    assert close > 0.9 > 0.6 > far
    assert few < many


def test_slips_need_codes_that_are_kept():
    config = TimestepObjectiveConfig(slips=0.1)
    with pytest.raises(UserError, match="--keep-codes true"):
        TokenizerRecipe("x", objective=config)
    TokenizerRecipe("x", objective=config, start="nano", keep_codes=True)


def test_own_answers_need_two_draws_of_the_clean_image():
    with pytest.raises(UserError, match="own to 0"):
        TimestepObjectiveConfig(own=0.5, draws=1)
    velocity = TimestepTokenizerConfig(prediction="velocity")
    with pytest.raises(UserError, match='needs prediction "clean"'):
        TokenizerRecipe("x", tokenizer=velocity, objective=TimestepObjectiveConfig(own=0.5))


def test_the_gradient_is_that_of_the_papers_loss_where_features_are_not_rounded():
    model, plain = build(), build()
    loss_of(model, EVERYTHING, step=0).backward()
    twin(plain, EVERYTHING, 0.0).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_a_step_is_a_pure_function_of_its_seed():
    model, goal = build(), objective()
    goal.before_step(model, 0)
    first, metrics = goal(model, images(), SEED)
    torch.manual_seed(77)
    again, _ = goal(model, images(), SEED)
    assert torch.equal(first, again)
    assert not torch.equal(goal(model, images(), SEED + 1)[0], first)
    torch.testing.assert_close(first.detach(), torch.as_tensor(metrics["error"]))  # no rounding yet


def test_with_all_tokens_dropped_the_loss_does_not_see_them():
    def encoder_slopes(drop: float) -> float:
        model = build()
        loss_of(model, TimestepObjectiveConfig(drop_tokens=drop, commitment=0.0)).backward()
        grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
        return sum(float(g.abs().sum()) for g in grads)

    assert encoder_slopes(1.0) == 0.0
    assert encoder_slopes(0.0) > 0.0
    blind = TimestepObjectiveConfig(drop_tokens=1.0, commitment=0.0)
    model, other = build(), build()
    torch.nn.init.normal_(other.encoder.queries)
    assert torch.equal(loss_of(model, blind), loss_of(other, blind))


def test_hiding_the_fine_end_spares_the_coarsest_token():
    """At t = 1 some token is always seen: the first visible one is at most the last."""
    config = TimestepObjectiveConfig(
        draws=1, density=AtNoise(1.0), drop_tokens=0.0, hide_fine=1.0, commitment=0.0
    )
    model = build()
    for seed in range(6):
        model.zero_grad()
        loss_of(model, config, seed=seed).backward()
        slope = model.encoder.queries.grad
        assert slope is not None
        assert slope[-1].any()


@pytest.mark.parametrize(
    ("start", "end", "shares"),
    [(0, 1, [0, 1, 1, 1, 1]), (1, 3, [0, 0, 0.5, 1, 1]), (2, 2, [0, 0, 0, 1, 1])],
)
def test_rounding_is_phased_in(start: int, end: int, shares: list[float]):
    goal = objective(TimestepObjectiveConfig(round_from=start, round_until=end))
    seen = []
    for step in range(5):
        goal.before_step(build(), step)
        seen.append(goal.rounding)
    assert seen == shares


@pytest.mark.parametrize("config", [TimestepObjectiveConfig, SpatialObjectiveConfig])
def test_rounding_cannot_end_before_it_begins(config: Any):
    with pytest.raises(UserError, match="round_from 400, round_until 1: it would end before"):
        config(round_from=400)


def test_balance_weighs_gradients_by_the_inverse_of_visibility():
    goal = objective(TimestepObjectiveConfig(balance=True, density=Uniform()))
    goal.before_step(build(), 0)
    assert goal.weights is not None
    inverse = TOKENS / torch.arange(TOKENS, 0, -1)
    torch.testing.assert_close(goal.weights, inverse / inverse.mean(), rtol=2e-2, atol=0)
    assert float(goal.weights.mean()) == pytest.approx(1.0)
    plain = loss_of(build(), TimestepObjectiveConfig(density=Uniform()))
    balanced = loss_of(build(), TimestepObjectiveConfig(density=Uniform(), balance=True))
    torch.testing.assert_close(balanced, plain)


def test_a_token_that_is_never_visible_has_a_finite_weight():
    goal = objective(TimestepObjectiveConfig(balance=True))
    goal.before_step(build(pieces=(1.0, 0.0)), 0)
    assert goal.weights is not None
    assert goal.weights.isfinite().all()


def test_after_a_step_the_codebook_moves_and_the_probe_speaks_every_so_often():
    model, goal = build(), objective()
    before = model.quantizer.codebook.clone()
    assert goal.after_step(model, 0) == {}  # no batch yet
    goal.before_step(model, 0)
    goal(model, images(), SEED)
    first = goal.after_step(model, 1)
    assert first == {"codebook.replaced": 16.0}
    assert not torch.equal(model.quantizer.codebook, before)
    goal(model, images(), SEED)
    figures = goal.after_step(model, 2)
    assert {"probe.own", "probe.wrong", "probe.none", "probe.spread"} <= set(figures)
    assert {"codebook.used", "codebook.perplexity"} <= set(figures)


def test_the_codebook_learns_from_all_parts_of_a_step():
    parts, whole = build(), build()
    goal, other = objective(), objective()
    for rows in images(8).chunk(2):
        goal(parts, rows, SEED)
    goal.after_step(parts, 1)
    features = whole.encoder(whole.patchify(images(8)))
    whole.quantizer.update(features, whole.quantizer(features).codes, seed=1)
    torch.testing.assert_close(parts.quantizer.codebook, whole.quantizer.codebook)
    assert goal.after_step(parts, 2) == other.after_step(whole, 2) == {}  # nothing new


def test_the_probe_measures_what_the_tokens_hold():
    """Before training own and wrong tokens do alike; fitted to four images, own does better."""
    torch.manual_seed(0)
    model = TimestepTokenizer(replace(TINY, decoder=replace(TINY.decoder, gate_start=1.0)))
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 0.0]])
    batch = colours[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    start = probe(model, batch)
    energy = float(batch.square().mean())
    assert start["probe.own"] == pytest.approx(energy, rel=1e-5)
    assert start["probe.own"] == start["probe.wrong"] == start["probe.none"]
    config = TimestepObjectiveConfig(
        draws=1, density=AtNoise(1.0), round_from=10**6, round_until=10**6
    )
    goal, optimizer = objective(config), torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        goal.before_step(model, step)
        loss, _ = goal(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = probe(model, batch, rounding=0.0)
    assert end["probe.own"] < 0.5 * end["probe.none"]
    assert end["probe.own"] < 0.5 * end["probe.wrong"]


def test_the_spread_is_zero_for_equal_images_and_known_for_opposite_features():
    model = build()
    same = images(1).expand(4, -1, -1, -1)
    assert probe(model, same)["probe.spread"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < probe(model, images(4))["probe.spread"] < 1

    def opposite(patches: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
        return signs * torch.ones(4, TOKENS, 4)

    model.encoder.forward = opposite
    assert probe(model, images(4))["probe.spread"] == pytest.approx(1.0)


def test_blocks_used_twice_can_be_computed_again_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of rounded weights would be full in the forward pass and empty in the second one."""
    monkeypatch.setattr(distributed, "has_bf16", lambda device: True)
    config = TrainConfig(steps=1, batch=4, recompute="selective", tensorboard=False)
    own = TimestepObjectiveConfig(draws=2, own=1.0, drop_tokens=0.0)
    with Run.create_or_resume(tmp_path / "run", TokenizerRecipe("tiny", train=config)) as run:
        outcome = train(build(), objective(own), lambda _: images(), config, run)
    assert outcome.finished
