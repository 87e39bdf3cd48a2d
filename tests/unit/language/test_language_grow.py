"""Growing a checkpoint: text rows and text logits unchanged, new rows near their mean, seeded."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from ddt_llama.config import UserError
from ddt_llama.language import TextTokenizer, Vocabulary, backbone

TEXT = TextTokenizer.train(["a red circle"] * 4, 270)
ROWS = 320  # padded beyond the tokenizer, as in published checkpoints
VOCABULARY = Vocabulary(ROWS, codebook_size=24, num_tokens=4)
FAMILIES = {
    "llama": LlamaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def checkpoint(folder, family, tied):
    """Write a tiny checkpoint of a family with its own marks, as a stranger would have."""
    settings = FAMILIES[family](
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(settings).eval()
    model.save_pretrained(folder)
    return model


cases = pytest.mark.parametrize(
    ("family", "tied"), [(family, tied) for family in FAMILIES for tied in (True, False)]
)


@cases
@torch.no_grad()
def test_text_logits_are_those_of_the_checkpoint(family, tied, tmp_path, capfd):
    original = checkpoint(tmp_path, family, tied)
    capfd.readouterr()
    grown = backbone.grow(tmp_path, VOCABULARY)
    assert capfd.readouterr() == ("", "")
    ids = torch.randint(0, ROWS, (2, 16), generator=torch.Generator().manual_seed(0))
    before, after = original(ids).logits, grown(ids).logits
    assert after.shape[-1] == VOCABULARY.size
    assert torch.equal(after[..., :ROWS], before)
    for table, old in (
        (grown.get_input_embeddings().weight, original.get_input_embeddings().weight),
        (grown.get_output_embeddings().weight, original.get_output_embeddings().weight),
    ):
        assert torch.equal(table[:ROWS], old)
    is_tied = grown.get_input_embeddings().weight is grown.get_output_embeddings().weight
    assert is_tied == tied


@cases
@torch.no_grad()
def test_new_rows_are_the_mean_and_a_little_noise(family, tied, tmp_path):
    checkpoint(tmp_path, family, tied)
    grown = backbone.grow(tmp_path, VOCABULARY, seed=1)
    for layer in (grown.get_input_embeddings(), grown.get_output_embeddings()):
        old, new = layer.weight[:ROWS], layer.weight[ROWS:]
        away = (new - old.mean(0)) / old.std(0, correction=0)
        assert away.abs().max() < 6 * backbone.GROWN_NOISE
        assert away.std() == pytest.approx(backbone.GROWN_NOISE, rel=0.15)
        assert len(torch.unique(new, dim=0)) == len(new)


@torch.no_grad()
def test_growing_is_seeded(tmp_path):
    checkpoint(tmp_path, "llama", False)
    first, again, other = (
        backbone.grow(tmp_path, VOCABULARY, seed=seed).get_output_embeddings().weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:ROWS], other[:ROWS])


@cases
@torch.no_grad()
def test_a_grown_model_is_saved_and_opened_whole(family, tied, tmp_path):
    checkpoint(tmp_path / "old", family, tied)
    grown = backbone.grow(tmp_path / "old", VOCABULARY)
    backbone.save(tmp_path / "new", grown, VOCABULARY, TEXT)
    language = backbone.load(tmp_path / "new")
    ids = torch.randint(0, VOCABULARY.size, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(language.model(ids).logits, grown(ids).logits)
    settings = language.model.config
    marks = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
    assert marks == (VOCABULARY.bos, VOCABULARY.eos, VOCABULARY.pad)
    assert language.model.generation_config.eos_token_id == VOCABULARY.eos


def test_every_row_learns(tmp_path):
    checkpoint(tmp_path, "llama", False)
    grown = backbone.grow(tmp_path, VOCABULARY)
    ids = torch.tensor([[VOCABULARY.bos, 0, 5, VOCABULARY.begin_image, VOCABULARY.size - 1]])
    grown(ids, labels=ids).loss.backward()
    gradient = grown.get_input_embeddings().weight.grad
    # the last id is never read; the checkpoint's own padding row 0 is a row like any other now
    assert (gradient[ids[0, :-1]].abs().sum(-1) > 0).all()


def test_text_rows_counts_padded_rows(tmp_path):
    checkpoint(tmp_path, "qwen2", True)
    assert backbone.text_rows(tmp_path) == ROWS


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    checkpoint(tmp_path, "llama", True)
    with pytest.raises(UserError, match=rf"320 rows.*counts {TEXT.size} of text; give text_size"):
        backbone.grow(tmp_path, Vocabulary(TEXT.size, 24, 4))
    with pytest.raises(UserError, match="no such folder"):
        backbone.grow(tmp_path / "absent", VOCABULARY)
