"""What is copied and saved file by file is what whole models are, bit by bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_language_grow import ROWS, TEXT, VOCABULARY, cases, checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from ddt_llama.checkpoint import load_tensors
from ddt_llama.config import UserError
from ddt_llama.language import backbone, lora, streaming
from ddt_llama.language.lora import Adapter, LoraConfig
from ddt_llama.training.language import check_head
from ddt_llama.training.sharding import make_room

IDS = torch.randint(0, VOCABULARY.size, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FILE_SIZE", "20KB")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    assert len(files) > 1
    return {name: one for file in files for name, one in load_tensors(file, None).items()}


@cases
@torch.no_grad()
def test_an_empty_model_becomes_the_one_that_grows(family, tied, tmp_path):
    checkpoint(tmp_path / "old", family, tied).bfloat16().save_pretrained(tmp_path / "given")
    state = torch.get_rng_state()
    model, source = streaming.open_empty(tmp_path / "given", VOCABULARY, TEXT)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in model.parameters())
    check_head(streaming.without_layers(model))
    streaming.copy_grown(source, tmp_path / "parts", model, VOCABULARY, TEXT, seed=3)
    whole = backbone.grow(tmp_path / "given", VOCABULARY, seed=3)
    for name, tensor in stored(tmp_path / "parts").items():
        grown = whole.state_dict()[name]
        assert torch.equal(tensor.float(), grown)
        assert tensor.dtype is (torch.float32 if len(grown) == VOCABULARY.size else torch.bfloat16)
    make_room(model, torch.device("cpu"))
    streaming.fill(model, tmp_path / "parts")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == tied
    assert torch.equal(backbone.load(tmp_path / "parts").model(IDS).logits, whole(IDS).logits)


@cases
@torch.no_grad()
def test_files_are_those_of_a_whole_model(family, tied, tmp_path):
    checkpoint(tmp_path / "old", family, tied)
    model = backbone.grow(tmp_path / "old", VOCABULARY)
    backbone.save(tmp_path / "whole", model, VOCABULARY, TEXT)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors").write_text("of an earlier save")
    streaming.save_shards(tmp_path / "shards", model, VOCABULARY, TEXT)
    assert {one.name for one in (tmp_path / "shards").iterdir()} == {
        *(one.name for one in (tmp_path / "whole").iterdir() if one.suffix != ".safetensors"),
        *(one.name for one in (tmp_path / "shards").glob("model-0*-of-0*.safetensors")),
        "model.safetensors.index.json",
    }
    for path in (tmp_path / "whole").glob("*.json"):
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes(), path.name
    wanted = load_tensors(tmp_path / "whole" / "model.safetensors")
    found = stored(tmp_path / "shards")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(opened(IDS).logits, model(IDS).logits)


@cases
@pytest.mark.parametrize("rows", [True, False])
@torch.no_grad()
def test_adapters_beside_an_empty_model_are_those_beside_a_whole_one(family, tied, rows, tmp_path):
    checkpoint(tmp_path / "old", family, tied)
    config = LoraConfig(rank=3, rows=rows)
    model, source = streaming.open_empty(tmp_path / "old", VOCABULARY, TEXT)
    lora.adapt(model, config, VOCABULARY, seed=3)
    whole = backbone.grow(tmp_path / "old", VOCABULARY, seed=3)
    lora.adapt(whole, config, VOCABULARY, seed=3)
    with lora.without(model):
        streaming.copy_grown(source, tmp_path / "parts", model, VOCABULARY, TEXT, seed=3)
    assert all(parameter.is_meta for parameter in model.parameters())
    make_room(model, torch.device("cpu"))
    with lora.without(model):
        streaming.fill(model, tmp_path / "parts")
    lora.begin(model, 3)
    wanted = dict(whole.named_parameters())
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad, name
        if parameter.requires_grad:  # it learns something
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lora.save(tmp_path / "adapter", model, "base", {})
    learned = Adapter.read(tmp_path / "adapter")
    with lora.without(model):
        streaming.save_shards(tmp_path / "release", model, VOCABULARY, TEXT, learned)
    with lora.merged(model):
        merged = model.state_dict()
        found = stored(tmp_path / "release")
        assert found.keys() == {name for name in merged if not tied or name != "lm_head.weight"}
        for name, tensor in found.items():
            assert torch.equal(tensor, merged[name]), name
    assert not torch.equal(model(IDS).logits, whole(IDS).logits)


@torch.no_grad()
def test_a_folder_of_ours_is_copied_as_it_is(tmp_path):
    checkpoint(tmp_path / "old", "llama", False)
    model = backbone.grow(tmp_path / "old", VOCABULARY)
    eight = torch.float8_e4m3fn
    backbone.save(tmp_path / "ours", model, VOCABULARY, TEXT, dtype=eight)
    empty, source = streaming.open_empty(tmp_path / "ours", VOCABULARY, TEXT)
    streaming.copy_grown(source, tmp_path / "parts", empty, VOCABULARY, TEXT, seed=3)
    found = stored(tmp_path / "parts")
    assert found["lm_head.weight"].dtype is eight
    wanted = load_tensors(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(found[name].float(), wanted[name]) for name in wanted)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_a_head_is_tried_without_the_layers(scaling, tmp_path):
    settings = AutoConfig.for_model("granite", vocab_size=ROWS, logits_scaling=scaling)
    settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers = 128, 48, 2
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    model, _ = streaming.open_empty(tmp_path, VOCABULARY, TEXT)
    small = streaming.without_layers(model)
    assert len(list(small.parameters())) <= 3
    if scaling == 1:
        check_head(small)
        return
    with pytest.raises(UserError, match="a granite model changes its logits"):
        check_head(small)


def test_weights_that_do_not_fit_are_opened(tmp_path):
    checkpoint(tmp_path / "old", "llama", True)
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_tensors(file)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=r"old: 20 weights are missing, such as model\.embed"):
        opened(tmp_path / "old", renamed)
    norm = {"model.norm.weight": torch.ones(31)}
    with pytest.raises(UserError, match=r"norm\.weight is \[31\], expected \[32\]"):
        opened(tmp_path / "old", tensors | norm)
    table = {"model.embed_tokens.weight": torch.ones(ROWS - 1, 32)}
    with pytest.raises(UserError, match=rf"is \[319, 32\], expected \[{VOCABULARY.size}, 32\]"):
        opened(tmp_path / "old", tensors | table)
    _, source = opened(tmp_path / "old", tensors)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        source.read("model.norm.weight")
    with pytest.raises(UserError, match="truncated"):
        streaming.open_empty(tmp_path / "old", VOCABULARY, TEXT)


def opened(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return streaming.open_empty(folder, VOCABULARY, TEXT)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    checkpoint(tmp_path / "old", "llama", True)
    model = backbone.grow(tmp_path / "old", VOCABULARY)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/language: cannot be written"):
        streaming.save_shards(tmp_path / "file" / "language", model, VOCABULARY, TEXT)
