"""The next-token objective against transformers' own loss and against a count by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

from ddt_llama.config import UserError
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.batches import Batch
from ddt_llama.language.documents import KINDS
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.training import language
from ddt_llama.training.language import LinearCrossEntropy, NextToken, check_head

VOCABULARY = Vocabulary(text_size=20, codebook_size=30, num_tokens=4)


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY.size, (3, 12), generator=generator)
    ids[0, 8:] = VOCABULARY.pad
    mask = (torch.arange(12) < torch.tensor([[8], [12], [12]])).long()
    labels = torch.where(mask.bool() & (torch.arange(12) > 2), ids, -100)
    return ids, labels, mask


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen"])
def test_loss_and_gradients_are_those_of_transformers(family, monkeypatch):
    monkeypatch.setattr(language, "CPU_ROWS", 5)  # 23 rows: the last part is shorter
    config = BackboneConfig(
        family=family, dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=64, max_positions=32
    )
    equals_transformers(build(config, VOCABULARY))


def gemma_2(**changes):
    """Build a Gemma 2 as published: windows in every other layer, soft caps, wide heads."""
    config = Gemma2Config(
        vocab_size=VOCABULARY.size,
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        initializer_range=0.5,
        **{
            "sliding_window": 3,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.5,
            **changes,
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_a_gemma_2_of_short_windows_and_low_caps_trains_as_in_transformers():
    model = gemma_2()
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    loss = equals_transformers(model)
    changes = (
        ("sliding_window", 12),
        ("attn_logit_softcapping", 5.0),
        ("final_logit_softcapping", 5.0),
    )
    for name, larger in changes:  # each takes part
        other = NextToken(VOCABULARY)(gemma_2(**{name: larger}), batch(), 0)[0]
        assert abs(float(other.detach()) - loss) > 1e-3, name


def test_packed_rows_of_a_gemma_2_have_the_loss_of_documents_alone():
    ids, labels, mask = (part[1:] for part in batch())  # two documents of 12
    positions = torch.arange(12).repeat(2, 1)
    alone = Batch(ids, labels, mask)
    packed = Batch(
        *(part.reshape(1, 24) for part in (ids, labels, mask)), None, positions.view(1, 24)
    )
    one, other = (NextToken(VOCABULARY)(gemma_2(), rows, 0)[0] for rows in (alone, packed))
    torch.testing.assert_close(one, other)


def equals_transformers(model):
    """Compare loss and gradients with those of the model's own loss, with a mask; return it."""
    ids, labels, mask = batch()
    objective = NextToken(VOCABULARY)
    fused, _ = objective(model, (ids, labels, mask), 0)
    objective.before_step(model, 0)
    loss, _ = objective(model, (ids, labels, mask), 0)
    torch.testing.assert_close(loss, fused)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    theirs = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    theirs.backward()
    torch.testing.assert_close(loss, theirs)
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)
    return float(loss.detach())


def test_the_head_in_parts_equals_all_logits_at_once_in_bf16(monkeypatch):
    monkeypatch.setattr(language, "CPU_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 24, generator=generator)
    weight = torch.randn(90, 24, generator=generator)
    wanted = torch.randint(90, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)
    results = []
    for parts in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if parts:
                loss, each, right = LinearCrossEntropy.apply(h, w, wanted, weights / 50)
            else:
                logits = F.linear(h, w).float()
                each, right = (
                    F.cross_entropy(logits, wanted, reduction="none"),
                    logits.argmax(-1) == wanted,
                )
                loss = (weights * each).mean()
        (3 * loss).backward()
        results.append((loss, each, right, h.grad, w.grad))
    for mine, plain in zip(*results, strict=True):
        assert mine.dtype == plain.dtype
        torch.testing.assert_close(mine, plain, rtol=2e-2, atol=2e-3)


def test_a_frozen_head_gives_the_same_gradient_to_what_it_reads():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 24, generator=generator)
    weight = torch.randn(90, 24, generator=generator)
    wanted = torch.randint(90, (9,), generator=generator)
    grads = []
    for learns in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(learns)
        LinearCrossEntropy.apply(h, w, wanted, torch.ones(9))[0].backward()
        assert (w.grad is not None) == learns
        grads.append(h.grad)
    assert torch.equal(*grads)


class Uniform(torch.nn.Module):
    """A stand-in for a causal LM that prefers id 7 by a known margin."""

    config = SimpleNamespace(get_text_config=lambda: None)

    def base_model(self, input_ids, use_cache):
        class Output:
            last_hidden_state = torch.ones(*input_ids.shape, 1)

        return Output

    def get_output_embeddings(self):
        head = torch.nn.Linear(1, VOCABULARY.size, bias=False)
        torch.nn.init.zeros_(head.weight).data[7] = math.log(2.0)
        return head


def test_figures_split_text_from_codes_and_kinds():
    code = VOCABULARY.code_offset
    ids = torch.tensor([[1, 7, 3], [1, code, code + 1]])
    labels = torch.tensor([[-100, 7, -100], [-100, code, code + 1]])
    kinds = torch.tensor([[KINDS.index("ask")] * 3, [KINDS.index("draw")] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, figures = NextToken(VOCABULARY)(Uniform(), (ids, labels, mask, kinds), 0)
    assert (float(figures["tokens"]), float(figures["padding"])) == (5, pytest.approx(1 / 6))
    total = math.log(VOCABULARY.size + 1)
    assert float(figures["loss.text"]) == pytest.approx(total - math.log(2))
    assert float(figures["loss.code"]) == pytest.approx(total)
    assert float(loss.detach()) == pytest.approx(total - math.log(2) / 3)
    assert float(figures["accuracy"]) == pytest.approx(1 / 3)
    assert float(figures["loss.ask"]) == pytest.approx(total - math.log(2))
    assert float(figures["loss.draw"]) == pytest.approx(total)
    assert math.isnan(float(figures["loss.edit"]))


def test_an_id_of_text_may_count_more_than_a_code():
    code = VOCABULARY.code_offset
    ids = torch.tensor([[1, 7, 3], [1, code, code + 1]])
    labels = torch.tensor([[-100, 7, -100], [-100, code, code + 1]])
    loss, figures = NextToken(VOCABULARY, text_weight=3.0)(Uniform(), (ids, labels, labels), 0)
    parts = float(figures["loss.text"]), float(figures["loss.code"])
    assert parts[0] < parts[1]
    assert float(loss.detach()) == pytest.approx((3 * parts[0] + 2 * parts[1]) / 5)


def test_a_batch_without_targets_is_refused():
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(UserError, match="without a supervised id"):
        NextToken(VOCABULARY)(Uniform(), (ids, torch.full_like(ids, -100), ids), 0)


def test_models_that_scale_their_logits_behind_the_head_are_refused() -> None:
    from transformers import GraniteConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    for scaling in (1.0, 8.0):
        torch.manual_seed(0)
        config = GraniteConfig(**sizes, logits_scaling=scaling)
        model = AutoModelForCausalLM.from_config(config).eval()
        if scaling == 1.0:
            check_head(model)
            continue
        with pytest.raises(UserError, match="a granite model changes its logits behind the head"):
            check_head(model)
    capped = Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=0.01)
    check_head(AutoModelForCausalLM.from_config(capped).eval())  # a cap is known
