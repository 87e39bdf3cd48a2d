"""Batches: padding without loss; packed rows hold every document whole and change no loss."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddt_llama.config import UserError
from ddt_llama.language import Sequence, Vocabulary, backbone, collate
from ddt_llama.language.batches import _best_fit, pack
from ddt_llama.language.documents import IGNORED, KINDS
from ddt_llama.training.language import NextToken

VOCABULARY = Vocabulary(text_size=90, codebook_size=16, num_tokens=4)


def documents_of(sizes, seed=0):
    """Return a document of each size, of random ids, kinds and targets; bos is never a target."""
    draws = np.random.default_rng(seed)
    return [
        Sequence(
            [VOCABULARY.bos, *draws.integers(0, 90, size - 1).tolist()],
            [False, *(draws.random(size - 1) < 0.7).tolist()],
            KINDS[draws.integers(len(KINDS))],
        )
        for size in sizes
    ]


def test_collate_pads_right_without_loss():
    sequences = documents_of((7, 3, 12, 2))
    batch = collate(sequences, VOCABULARY.pad)
    assert batch.ids.shape == (4, 12)
    for row, sequence in enumerate(sequences):
        count = len(sequence.ids)
        assert batch.ids[row, :count].tolist() == sequence.ids
        assert batch.attention_mask[row].tolist() == [1] * count + [0] * (12 - count)
        assert batch.kinds[row, :count].tolist() == [KINDS.index(sequence.kind)] * count
        assert (batch.ids[row, count:] == VOCABULARY.pad).all()
        assert (batch.labels[row, count:] == IGNORED).all()
        targets = torch.tensor(sequence.supervised)
        assert torch.equal(batch.labels[row, :count] != IGNORED, targets)
    supervised = batch.labels != IGNORED
    assert torch.equal(batch.labels[supervised], batch.ids[supervised])


def test_collate_to_a_fixed_length():
    sequences = documents_of((3, 8))
    assert collate(sequences, VOCABULARY.pad, length=20).ids.shape == (2, 20)
    with pytest.raises(UserError, match="the longest of 8 tokens"):
        collate(sequences, VOCABULARY.pad, length=7)
    with pytest.raises(UserError, match="batch of 0 documents"):
        collate([], VOCABULARY.pad)


def unpacked(batch):
    """Return the documents in packed rows: ids, targets and kind, in no order."""
    found = []
    for ids, labels, mask, kinds, positions in zip(*batch[:5], strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        count = int(mask.sum())
        assert not positions[count:].any()
        starts = [*(positions[:count] == 0).nonzero().flatten().tolist(), count]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            (kind,) = set(kinds[start:end].tolist())
            wanted = (labels[start:end] != IGNORED).tolist()
            assert ids[start:end][wanted].tolist() == labels[start:end][wanted].tolist()
            found.append(Sequence(ids[start:end].tolist(), wanted, KINDS[kind]))
        assert (ids[count:] == VOCABULARY.pad).all()
        assert (labels[count:] == IGNORED).all()
    return sorted(found)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(1, 90), st.integers(1, 8))
def test_packing_keeps_every_document_whole(sizes, length, multiple):
    sequences = documents_of(sizes)
    packed = pack(collate(sequences, VOCABULARY.pad), VOCABULARY.pad, length, multiple)
    assert unpacked(packed) == sorted(sequences)
    rows, width = packed.ids.shape
    most = max(length, *sizes)
    assert width % multiple == 0
    assert width < most + multiple
    # Of two rows that first came to be, the later one's document fitted into no earlier one.
    assert rows <= max(1, -(-2 * sum(sizes) // most))


def test_rows_are_filled_evenly():
    # First fit would leave rows of 100, 100 and 40 ids.
    packed = pack(collate(documents_of([20] * 12), VOCABULARY.pad), VOCABULARY.pad, length=100)
    assert packed.ids.shape == (3, 80)
    assert packed.attention_mask.all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(30, 60))
def test_a_document_goes_where_it_leaves_the_least_room(sizes, most):
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    rows: list[list[int]] = []
    for document in order:  # the slow twin
        left = [most - sum(sizes[one] for one in row) - sizes[document] for row in rows]
        able = [(room, number) for number, room in enumerate(left) if room >= 0]
        if able:
            rows[min(able)[1]].append(document)
        else:
            rows.append([document])
    assert _best_fit(sizes, order, most) == rows


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_have_the_losses_and_gradients_of_documents_alone(family, attention):
    if (family, attention) == ("gemma", "sdpa"):
        pytest.skip("Gemma 2 caps the scores of its attention, which SDPA cannot")
    config = backbone.BackboneConfig(
        family=family, dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=64, max_positions=64
    )
    model = backbone.build(config, VOCABULARY)
    model.set_attn_implementation(attention)
    alone = collate(documents_of(range(4, 34)), VOCABULARY.pad)
    packed = pack(alone, VOCABULARY.pad, length=80)  # longer than the model's positions
    assert packed.ids.shape[1] > 64
    found = []
    for batch in (alone, packed):
        model.zero_grad()
        loss, figures = NextToken(VOCABULARY)(model, batch, 0)
        loss.backward()
        found.append((loss.detach(), figures, [one.grad.clone() for one in model.parameters()]))
    (loss, figures, wanted), (other, others, gradients) = found
    torch.testing.assert_close(other, loss)
    assert float(figures["padding"]) > 0.4
    assert float(others["padding"]) < 0.02
    for name in figures.keys() - {"padding"}:
        torch.testing.assert_close(others[name], figures[name], equal_nan=True)
    for gradient, plain in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers', and torch's own
@torch.no_grad()
def test_flex_attention_sees_what_the_others_see():
    config = backbone.BackboneConfig(dim=32, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=64)
    model = backbone.build(config, VOCABULARY).eval()
    packed = pack(collate(documents_of(range(4, 34)), VOCABULARY.pad), VOCABULARY.pad, 80)
    outputs = []
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        read = model.base_model(packed.ids, position_ids=packed.positions, use_cache=False)
        outputs.append(read.last_hidden_state[packed.attention_mask.bool()])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
