"""Rows of codes that start from a codebook."""

import math

import pytest
import torch

from ddt_llama.language import Vocabulary, backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.codes import BANDWIDTH, NOISE_SHARE, place_codes

VOCABULARY = Vocabulary(text_size=20, codebook_size=48, num_tokens=4)


def vectors() -> torch.Tensor:
    angles = torch.arange(48) / 48 * 2 * math.pi
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.mark.parametrize("tied", [True, False])
def test_products_of_rows_fall_with_the_distance_of_the_codes_as_a_gaussian(tied: bool):
    shape = BackboneConfig(dim=2048, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=8, tied=tied)
    model = backbone.build(shape, VOCABULARY)
    place_codes(model, VOCABULARY, vectors(), seed=3)
    distances = torch.cdist(vectors(), vectors())
    expected = (1 - NOISE_SHARE**2) * torch.exp(-((BANDWIDTH * distances) ** 2) / 2)
    expected += NOISE_SHARE**2 * torch.eye(48)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = layer.weight[VOCABULARY.code_offset :].detach()
        torch.testing.assert_close(rows @ rows.T / 0.02**2 / 2048, expected, rtol=0, atol=0.12)


def test_text_and_marks_and_the_size_of_the_numbers_stay():
    shape = BackboneConfig(dim=64, depth=1, num_heads=2, num_kv_heads=2, mlp_dim=8)
    model, plain = backbone.build(shape, VOCABULARY), backbone.build(shape, VOCABULARY)
    place_codes(model, VOCABULARY, vectors())
    placed, random = (m.get_input_embeddings().weight.detach() for m in (model, plain))
    split = VOCABULARY.code_offset
    assert torch.equal(placed[:split], random[:split])
    assert not torch.equal(placed[split:], random[split:])
    assert float(placed[split:].std()) == pytest.approx(float(random[split:].std()), rel=0.05)


def test_odd_widths_and_the_seed():
    shape = BackboneConfig(dim=6, depth=1, num_heads=1, num_kv_heads=1, mlp_dim=8)
    rows = []
    for seed in (0, 0, 1):
        model = backbone.build(shape, VOCABULARY)
        place_codes(model, VOCABULARY, vectors(), seed)
        rows.append(model.get_input_embeddings().weight.detach().clone())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
