"""Backbone: shapes and cost by formula, causal, seeded; one folder for us and for transformers."""

import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddt_llama.config import UserError, from_dict, to_dict
from ddt_llama.language import TextTokenizer, Vocabulary, backbone, collate, documents, render

TEXT = TextTokenizer.train(["a red circle"] * 4, 270)
VOCABULARY = Vocabulary(TEXT.size, codebook_size=32, num_tokens=4)
TINY = backbone.BackboneConfig(
    dim=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_positions=64
)
FAMILIES = ("llama", "gemma", "qwen")


def tiny(family="llama", tied=True, **changes):
    return dataclasses.replace(TINY, family=family, tied=tied, **changes)


def some_ids(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY.size, (2, count), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [None, 20])
def test_the_formula_counts_every_parameter(family, tied, head_dim):
    config = tiny(family, tied, head_dim=head_dim)
    model = backbone.build(config, VOCABULARY)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == backbone.count_parameters(config, VOCABULARY)
    assert model.get_input_embeddings().weight.shape == (VOCABULARY.size, config.dim)


@pytest.mark.parametrize("head_dim", [None, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_token_are_those_that_torch_counts(family, head_dim):
    config = tiny(family, head_dim=head_dim)
    model = backbone.build(config, VOCABULARY)
    model.set_attn_implementation("eager")
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros((1, length), dtype=torch.int64), use_cache=False)
    expected = length * backbone.flops_per_token(config, VOCABULARY, context=length)
    assert counter.get_total_flops() == expected


def test_paper_is_llama_3_8b():
    published = Vocabulary(128_256 - 7, codebook_size=1, num_tokens=1)
    assert backbone.count_parameters(backbone.paper(), published) == 8_030_261_248
    ours = Vocabulary(128_256, codebook_size=65_536, num_tokens=480)
    model = backbone.build(backbone.paper(), ours, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == backbone.count_parameters(backbone.paper(), ours)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("size", "low", "high"), [("nano", 4, 7), ("small", 25, 35)])
def test_sizes_are_as_named(size, low, high):
    config = getattr(backbone, size)()
    count = backbone.count_parameters(config, Vocabulary(1024, 4096, 128))
    assert low <= count / 1e6 <= high


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_vocabulary_start_as_large_as_asked(tied):
    plain, large = (backbone.build(tiny(tied=tied, row_std=std), VOCABULARY) for std in (None, 0.1))
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for (name, before), after in zip(plain.named_parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(after, before * (5 if name in tables else 1))


def test_same_seed_same_weights_and_global_state_untouched():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = backbone.build(TINY, VOCABULARY, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again = backbone.build(TINY, VOCABULARY, seed=1).state_dict()
    other = backbone.build(TINY, VOCABULARY, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.embed_tokens.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_later_id_changes_no_earlier_logit(family):
    model = backbone.build(tiny(family), VOCABULARY).eval()
    ids = some_ids()
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY.size
    one, two = model(ids).logits, model(changed).logits
    torch.testing.assert_close(one[:, :7], two[:, :7])
    assert not torch.allclose(one[:, 7:], two[:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_loss_nor_gradient(family):
    model = backbone.build(tiny(family), VOCABULARY)
    sequence = render(documents.draw("a red circle", (1, 2, 3, 31)), VOCABULARY, TEXT)
    losses, gradients = [], []
    for length in (None, 40):
        batch = collate([sequence], VOCABULARY.pad, length)
        model.zero_grad()
        loss = model(batch.ids, labels=batch.labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_loss_of_transformers_is_cross_entropy_on_the_answer():
    model = backbone.build(TINY, VOCABULARY).eval()
    sequence = render(documents.draw("a red circle", (1, 2, 3, 31)), VOCABULARY, TEXT)
    batch = collate([sequence], VOCABULARY.pad)
    with torch.no_grad():
        output = model(batch.ids, labels=batch.labels)
    log_probs = output.logits[0].log_softmax(-1)
    targets = [place for place, counts in enumerate(sequence.supervised) if counts]
    expected = -torch.stack([log_probs[place - 1, sequence.ids[place]] for place in targets]).mean()
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_folder_opens_here_and_in_transformers(family, tied, tmp_path, capfd):
    model = backbone.build(tiny(family, tied), VOCABULARY).eval()
    backbone.save(tmp_path, model, VOCABULARY, TEXT)
    language = backbone.load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert language.vocabulary == VOCABULARY
    assert language.text.encode("a red circle") == TEXT.encode("a red circle")
    assert not language.model.training
    expected = model(some_ids()).logits
    assert torch.equal(language.model(some_ids()).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(plain(some_ids()).logits, expected)
    assert plain.config.eos_token_id == VOCABULARY.eos
    words = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert words(" a red", add_special_tokens=False).input_ids == TEXT.encode("a red")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_saving_in_half_precision_leaves_the_model_alone(tmp_path):
    model = backbone.build(TINY, VOCABULARY)
    backbone.save(tmp_path, model, VOCABULARY, TEXT, dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights  # tied: kept once
    loaded = backbone.load(tmp_path).model
    assert loaded.dtype == torch.float32
    half = model.get_input_embeddings().weight.bfloat16().float()
    assert torch.equal(loaded.get_input_embeddings().weight, half)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_folder_in_eight_bits_opens_anywhere_with_nearly_the_same_logits(tied, tmp_path):
    wide = tiny("llama", tied, dim=64, mlp_dim=96)
    model = backbone.build(wide, VOCABULARY).eval()
    backbone.save(tmp_path, model, VOCABULARY, TEXT, dtype=torch.float8_e4m3fn)
    stored = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in stored.values() if w.ndim == 2} == {torch.float8_e4m3fn}
    expected = model(some_ids()).logits
    for loaded in (
        backbone.load(tmp_path).model,
        AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True),
    ):
        assert not loaded.training
        got = loaded(some_ids()).logits
        assert (got - expected).norm() < 0.06 * expected.norm()
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_saving_again_removes_weights_in_other_shards(tmp_path):
    model = backbone.build(TINY, VOCABULARY, seed=1)
    backbone.save(tmp_path, model, VOCABULARY, TEXT)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "README.md").write_text("kept")
    other = backbone.build(TINY, VOCABULARY, seed=2)
    backbone.save(tmp_path, other, VOCABULARY, TEXT)
    weights = [path.name for path in tmp_path.glob("*.safetensors")]
    assert weights == ["model.safetensors"]
    assert (tmp_path / "README.md").exists()
    loaded = backbone.load(tmp_path).model.get_input_embeddings().weight
    assert torch.equal(loaded, other.get_input_embeddings().weight)


def test_gemma_scales_by_its_own_head_and_sees_all_positions():
    settings = backbone.build(tiny("gemma"), VOCABULARY, device="meta").config.to_dict()
    assert settings["query_pre_attn_scalar"] == TINY.head_width
    assert set(settings["layer_types"]) == {"full_attention"}


def test_a_config_survives_json():
    assert from_dict(backbone.BackboneConfig, to_dict(backbone.paper())) == backbone.paper()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth: given 0"),
        ({"dim": 30}, "dim: given 30, allowed are multiples of 2 x num_heads = 8"),
        ({"num_kv_heads": 3}, "num_kv_heads: given 3"),
        ({"head_dim": 7}, "head_dim: given 7, allowed are multiples of 2"),
        ({"head_dim": 0}, "head_dim: given 0"),
    ],
)
def test_shapes_that_no_attention_has_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_parts_of_different_models_are_refused_before_anything_is_written(tmp_path):
    model = backbone.build(TINY, VOCABULARY)
    other = dataclasses.replace(VOCABULARY, codebook_size=33)
    with pytest.raises(UserError, match=f"{VOCABULARY.size} vocabulary rows.*counts {other.size}"):
        backbone.save(tmp_path / "new", model, other, TEXT)
    shifted = Vocabulary(VOCABULARY.text_size - 1, 33, 4)
    with pytest.raises(UserError, match="the text tokenizer has"):
        backbone.save(tmp_path / "new", model, shifted, TEXT)
    assert not (tmp_path / "new").exists()


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        backbone.save(tmp_path / "file", backbone.build(TINY, VOCABULARY), VOCABULARY, TEXT)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip")


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_rows(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite(name, **changes):
    def change(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **changes}))

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def empty_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')


def index_that_climbs(folder):
    (folder / "model.safetensors").rename(folder.parent / f"{folder.name}.safetensors")
    index = {"weight_map": {"a": f"../{folder.name}.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "truncated or not safetensors"),
        (not_safetensors, "truncated or not safetensors"),
        (huge_header, "truncated or not safetensors"),
        (pickled, "a pickle, which can run code"),
        (without_a_weight, "1 weights are missing, such as model.layers.1.mlp.up_proj.weight"),
        (with_other_rows, "weights cannot be loaded"),
        (remove("vocabulary.json"), "vocabulary.json: no such file"),
        (remove("config.json"), "config.json: no such file"),
        (remove("model.safetensors"), "weights found: none"),
        (remove("tokenizer.json"), "no text tokenizer"),
        (rewrite("vocabulary.json", codebook_size=31), "vocabulary rows"),
        (rewrite("vocabulary.json", text_size=1, codebook_size=297), "the text tokenizer has"),
        (rewrite("config.json", model_type="unheard_of"), "not a config of transformers"),
        (rewrite("config.json", hidden_size="wide"), "not a config of transformers"),
        (rewrite("config.json", model_type="vit"), "cannot be loaded"),
        (empty_index, "gone: no such file"),
        (index_that_climbs, "the folder is incomplete"),
    ],
)
def test_a_harmed_folder_is_one_clear_line(harm, message, tmp_path):
    backbone.save(tmp_path, backbone.build(TINY, VOCABULARY), VOCABULARY, TEXT)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        backbone.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_is_one_clear_line(tmp_path):
    for call in (backbone.load, backbone.text_rows):
        with pytest.raises(UserError, match="no such folder"):
            call(tmp_path / "absent")
