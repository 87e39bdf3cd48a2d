"""The contrast of pictures under their own and another's text: closed forms, and a slow twin."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddt_llama.config import UserError
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.batches import Batch, collate, pack
from ddt_llama.language.documents import Sequence
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.training.alignment import Alignment, AlignmentConfig, contrast
from ddt_llama.training.language import NextToken

VOCABULARY = Vocabulary(text_size=20, codebook_size=30, num_tokens=4)
CONFIG = AlignmentConfig(beta=0.3, weight=4.0)


def model(seed: int = 0) -> Any:
    shape = BackboneConfig(dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=64, init_std=0.3)
    return build(shape, VOCABULARY, seed=seed)


def document(text: list[int], codes: list[int] | None, answer: list[int] | None = None) -> Sequence:
    """A drawing (text, codes and their marks) or a text with an answer."""
    if codes is None:
        written = [*(answer or []), VOCABULARY.eos]
    else:
        ids = VOCABULARY.ids_of(codes)
        written = [VOCABULARY.begin_image, *ids, VOCABULARY.end_image, VOCABULARY.eos]
    given = [VOCABULARY.bos, *text]
    supervised = [False] * len(given) + [True] * len(written)
    return Sequence([*given, *written], supervised, "plan" if codes is None else "draw")


PICTURES = [[1, 2, 3, 4], [9, 8, 7, 6]]
TEXTS = [[3, 4, 5], [6, 7]]
TWICE = [document(TEXTS[n], PICTURES[n]) for n in (0, 1)]
OTHERS = [document(TEXTS[1 - n], PICTURES[n]) for n in (0, 1)]
USUAL = [document([8], None, [9, 10]), document([11, 12], PICTURES[0])]


def batch(usual: bool = True) -> Batch:
    rows = [*TWICE, *(USUAL if usual else []), *OTHERS]
    made = collate(rows, VOCABULARY.pad)
    sides = torch.tensor([1, 1, *([0, 0] if usual else []), -1, -1])
    return made._replace(contrast=sides[:, None] * made.attention_mask)


def likelihoods(lm: Any, one: Sequence) -> torch.Tensor:
    """Return the log-probability of every id of a document but the first."""
    ids = torch.tensor([one.ids])
    logits = lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def of_codes(lm: Any, one: Sequence) -> torch.Tensor:
    return likelihoods(lm, one)[[VOCABULARY.code_offset <= i for i in one.ids[1:]]].sum()


def test_values_and_slopes_are_those_of_the_formula() -> None:
    r = torch.linspace(-40, 40, 9, dtype=torch.float64, requires_grad=True)
    for beta, weight in ((0.02, 300.0), (1.0, 0.5)):
        for sign, w in ((1.0, 1.0), (-1.0, weight), (0.0, 0.0)):
            signs = torch.full_like(r, sign).detach()
            values, slopes = contrast(r, signs, beta, weight)
            expected = w * torch.log1p(torch.exp(-sign * beta * r))
            torch.testing.assert_close(values, expected)
            (found,) = torch.autograd.grad(expected.sum(), r)
            torch.testing.assert_close(slopes, found)


@pytest.mark.parametrize("weight", [0.25, 1.0, 100.0])
def test_at_the_start_it_is_known(weight: float) -> None:
    lm = model()
    objective = Alignment(NextToken(VOCABULARY), copy.deepcopy(lm), AlignmentConfig(0.1, weight))
    loss, figures = objective(lm, batch(usual=False), 0)
    expected = (1 + weight) * math.log(2) / max(weight, 1)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(figures["loss.contrast"]) == pytest.approx(expected, rel=1e-5)
    assert float(figures["r.own"]) == pytest.approx(0, abs=1e-4)


def test_loss_and_gradients_are_those_of_a_twin_in_loops() -> None:
    lm, reference = model(), model(1)
    objective = Alignment(NextToken(VOCABULARY, text_weight=3.0), reference, CONFIG)
    loss, figures = objective(lm, batch(), 0)
    loss.backward()
    ours = {name: one.grad.clone() for name, one in lm.named_parameters()}
    lm.zero_grad()
    with torch.no_grad():
        before = [of_codes(reference, one) for one in (*TWICE, *OTHERS)]
    now = [of_codes(lm, one) for one in (*TWICE, *OTHERS)]
    r = torch.stack(now) - torch.stack(before)
    own = -F.logsigmoid(CONFIG.beta * r[:2]).mean()
    other = -CONFIG.weight * F.logsigmoid(-CONFIG.beta * r[2:]).mean()
    # Answers of 3 and 7 ids, of which 4 are codes.
    told = -torch.cat([likelihoods(lm, USUAL[0])[-3:], likelihoods(lm, USUAL[1])[-7:]])
    counted = torch.tensor([3.0] * 4 + [1.0] * 4 + [3.0] * 2)
    expected = (own + other) / CONFIG.weight + (told * counted).sum() / counted.sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, one in lm.named_parameters():
        assert one.grad is not None
        torch.testing.assert_close(ours[name], one.grad, rtol=1e-3, atol=1e-6)
    assert float(figures["r.own"]) == pytest.approx(float(r[:2].mean().detach()), rel=1e-4)
    assert float(figures["r.other"]) == pytest.approx(float(r[2:].mean().detach()), rel=1e-4)
    draws = [*TWICE, USUAL[1]]
    codes = [-of_codes(lm, one).detach() for one in draws]
    marks = -likelihoods(lm, USUAL[1]).detach()[[-7, -2, -1]].sum()
    assert float(figures["loss.draw"]) == pytest.approx(float(sum(codes) + marks) / 15, rel=1e-4)


def test_pictures_get_likelier_under_their_text_only_and_the_reference_stays() -> None:
    lm = model()
    reference = copy.deepcopy(lm).requires_grad_(False)
    kept = copy.deepcopy(reference.state_dict())
    objective = Alignment(NextToken(VOCABULARY), reference, AlignmentConfig(0.02, 1.0))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        objective(lm, batch(usual=False), 0)[0].backward()
        optimizer.step()
    _, figures = objective(lm, batch(usual=False), 0)
    assert float(figures["r.own"]) > 1
    assert float(figures["r.other"]) < -1
    for name, one in reference.state_dict().items():
        assert torch.equal(one, kept[name])
    assert all(one.grad is None for one in reference.parameters())


def test_packed_rows_have_the_loss_of_documents_alone() -> None:
    lm, reference = model(), model(1)
    lm.set_attn_implementation("sdpa")
    objective = Alignment(NextToken(VOCABULARY), reference, CONFIG)
    packed = pack(batch(), VOCABULARY.pad, 24)
    assert packed.ids.shape[0] < 6
    one, other = (objective(lm, rows, 0) for rows in (batch(), packed))
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    for name in ("r.own", "r.other", "loss.contrast", "loss.draw"):
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-3, atol=1e-4)


def test_either_part_may_be_absent_and_not_both() -> None:
    lm = model()
    objective = Alignment(NextToken(VOCABULARY), copy.deepcopy(lm), CONFIG)
    usual = collate(USUAL, VOCABULARY.pad)
    alone = usual._replace(contrast=torch.zeros_like(usual.ids))
    loss, _ = objective(lm, alone, 0)
    torch.testing.assert_close(loss, NextToken(VOCABULARY)(lm, usual, 0)[0])
    with pytest.raises(UserError, match="without a supervised id"):
        objective(lm, alone._replace(labels=torch.full_like(usual.ids, -100)), 0)


def test_both_compute_attention_alike() -> None:
    lm, reference = model(), model(1)
    objective = Alignment(NextToken(VOCABULARY), reference, CONFIG)
    objective.before_step(lm, 0)
    assert lm.config._attn_implementation == reference.config._attn_implementation == "eager"
    compiled = objective.parts_to_compile(SimpleNamespace(base_model=lm.base_model))
    assert any(part is reference.base_model for part in compiled)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta: given 0"),
        ({"beta": math.nan}, "beta: given nan"),
        ({"weight": -1.0}, "weight: given -1"),
        ({"kinds": ()}, "kinds: none given"),
    ],
)
def test_what_aligns_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlignmentConfig(**fields)
