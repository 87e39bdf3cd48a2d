"""Heads that start by looking back."""

from dataclasses import replace

import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.heads import look_back
from ddt_llama.language.vocabulary import Vocabulary

VOCABULARY = Vocabulary(90, 64, 8)
SHAPE = replace(backbone.nano(), depth=2)


def attention(config: BackboneConfig, *, turned: bool) -> torch.Tensor:
    """Return what the heads of the first layer look at, `heads tokens tokens`."""
    model = backbone.build(config, VOCABULARY)
    if turned:
        look_back(model)
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, output_attentions=True).attentions[0][0]


@pytest.mark.parametrize("seen", [SHAPE, replace(SHAPE, num_kv_heads=4, rope_theta=100.0)])
def test_each_head_looks_most_at_its_own_distance(seen: BackboneConfig) -> None:
    weights = attention(seen, turned=True)
    for head in range(seen.num_heads):
        by_distance = [weights[head].diagonal(-distance)[20:].mean() for distance in range(12)]
        assert max(range(12), key=lambda distance: by_distance[distance]) == head + 1
        assert by_distance[head + 1] > 0.4
        assert sum(by_distance[head : head + 3]) > 0.9  # and at the neighbours of that token
    before = attention(seen, turned=False)
    assert max(before[0].diagonal(-1)[20:]) < 0.2


def test_the_direction_in_common_changes_no_order_of_logits() -> None:
    """It is the same number for every row of the head."""
    model = backbone.build(SHAPE, VOCABULARY)
    before = model.get_output_embeddings().weight.detach().clone()
    look_back(model)
    added = model.get_output_embeddings().weight.detach() - before
    torch.testing.assert_close(added, added[:1].expand_as(added), atol=1e-6, rtol=0)
    assert added[0].norm() == pytest.approx(before.norm(dim=1).mean().item(), rel=1e-4)


def test_models_that_normalise_queries_are_refused() -> None:
    model = backbone.build(replace(SHAPE, family="qwen"), VOCABULARY)
    with pytest.raises(UserError, match="look_back: given a qwen3 model, allowed is llama"):
        look_back(model)
