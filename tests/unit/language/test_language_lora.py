"""LoRA in closed form: an identity at first, W + alpha / rank B A merged, and peft's own format."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError, load_json, save_json
from ddt_llama.language import Vocabulary, lora
from ddt_llama.language.backbone import BackboneConfig, build
from ddt_llama.language.lora import Adapter, LoraConfig
from ddt_llama.training.language import NextToken

VOCABULARY = Vocabulary(text_size=20, codebook_size=30, num_tokens=4)
IDS = torch.randint(VOCABULARY.size, (3, 12), generator=torch.Generator().manual_seed(3))
CONFIG = LoraConfig(rank=3, alpha=7.5)
SIZES = {"dim": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 48}
DESCRIBED = {"format": "ddt-llama"}

families = pytest.mark.parametrize("family", ["llama", "gemma", "qwen"])
tables = pytest.mark.parametrize(("tied", "rows"), [(True, True), (False, True), (True, False)])

# What peft itself asks of transformers.
of_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def base(family: str = "llama", tied: bool = True, seed: int = 0) -> Any:
    config = BackboneConfig(family=family, max_positions=32, init_std=0.3, tied=tied, **SIZES)
    return build(config, VOCABULARY, seed=seed)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def learning(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learned(family: str = "llama", tied: bool = True, config: LoraConfig = CONFIG) -> Any:
    """Return a model whose adapters have had three lessons."""
    model = base(family, tied)
    lora.adapt(model, config, VOCABULARY)
    objective = NextToken(VOCABULARY)
    optimizer = torch.optim.SGD(learning(model).values(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        objective(model, (IDS, IDS, torch.ones_like(IDS)), 0)[0].backward()
        optimizer.step()
    return model


@families
@tables
def test_adapters_begin_as_nothing_and_the_model_stays_its_class(
    family: str, tied: bool, rows: bool
) -> None:
    model = base(family, tied)
    before, kind = logits(model), type(model)
    wanted = lora.count(model, replace(CONFIG, rows=rows), VOCABULARY)
    lora.adapt(model, replace(CONFIG, rows=rows), VOCABULARY)
    assert type(model) is kind
    assert torch.equal(logits(model), before)
    assert sum(p.numel() for p in learning(model).values()) == wanted


def test_adapters_begin_as_their_seed_says() -> None:
    starts = []
    for seed in (1, 1, 2):
        model = base()
        torch.rand(3)  # the global generator has no say, and is left alone
        state = torch.get_rng_state()
        lora.adapt(model, CONFIG, VOCABULARY, seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(torch.cat([p.flatten() for p in learning(model).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_adapters_begin_as_those_that_peft_draws() -> None:
    model, drawn = base(), base()
    lora.adapt(model, CONFIG, VOCABULARY, seed=4)
    torch.manual_seed(4)
    peft.inject_adapter_in_model(model.peft_config["default"], drawn)
    assert learning(model).keys() == learning(drawn).keys()
    for name, parameter in learning(drawn).items():
        assert torch.equal(learning(model)[name], parameter), name


def test_a_merged_weight_is_w_and_alpha_by_rank_b_a() -> None:
    model = learned()
    layer = model.model.layers[1].mlp.up_proj
    a, b = (layer.get_submodule(f"lora_{one}.default").weight.detach().double() for one in "AB")
    assert a.shape == (3, 32)
    assert b.shape == (48, 3)
    assert b.abs().max() > 0
    wanted = layer.base_layer.weight.double() + 7.5 / 3 * b @ a
    with lora.merged(model):
        found = model.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@families
@tables
def test_merged_and_beside_are_one_model_and_what_was_there_is_unchanged(
    family: str, tied: bool, rows: bool
) -> None:
    original = base(family, tied)
    model = learned(family, tied, replace(CONFIG, rows=rows))
    beside = logits(model)
    assert not torch.allclose(beside, logits(original), atol=1e-2)
    with lora.without(model):
        assert model.state_dict().keys() == original.state_dict().keys()
        for name, tensor in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    with lora.merged(model):
        assert model.state_dict().keys() == original.state_dict().keys()
        torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=1e-4)
        embedding = model.get_input_embeddings().weight
        assert (embedding is model.get_output_embeddings().weight) == tied
        old, head = (one.get_output_embeddings().weight for one in (original, model))
        assert torch.equal(head[: VOCABULARY.text_size], old[: VOCABULARY.text_size])
        assert bool((head != old).any(1)[VOCABULARY.text_size :].all()) == rows
    assert torch.equal(logits(model), beside)


@of_peft
@families
@tables
def test_peft_and_we_open_the_folder_as_the_same_model(
    family: str, tied: bool, rows: bool, tmp_path: Path
) -> None:
    model = learned(family, tied, replace(CONFIG, rows=rows))
    lora.save(tmp_path / "adapter", model, "a base", DESCRIBED)
    opened: Any = peft.PeftModel.from_pretrained(base(family, tied), str(tmp_path / "adapter"))
    assert torch.equal(logits(opened), logits(model))
    merged = base(family, tied)
    Adapter.read(tmp_path / "adapter").merge_into(merged.state_dict())
    with lora.merged(model):
        for name, tensor in model.state_dict().items():
            assert torch.equal(merged.state_dict()[name], tensor), name
    told = load_json(tmp_path / "adapter" / "config.json")
    assert told["format"] == "ddt-llama"
    assert told["adapter_of"]["name"] == "a base"


@of_peft
def test_an_adapter_of_peft_alone_is_merged_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False
    )
    model: Any = peft.get_peft_model(base(), settings)
    model.save_pretrained(str(tmp_path))
    (tmp_path / "README.md").unlink()  # its model card
    merged = base()
    Adapter.read(tmp_path).merge_into(merged.state_dict())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_that_of_the_values(tmp_path: Path) -> None:
    model = base()
    weights = {name: one.bfloat16() for name, one in model.state_dict().items()}
    names = [name for name in weights if "q_proj" in name]
    exact = {name: one.float() for name, one in weights.items()}
    assert lora.fingerprint(weights, names) == lora.fingerprint(exact, reversed(names))
    exact[names[0]][0, 5] += 0.01
    assert lora.fingerprint(weights, names) != lora.fingerprint(exact, names)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora.save(tmp_path / "adapter", learned(), "mine", DESCRIBED)
    adapter = Adapter.read(tmp_path / "adapter")
    other = base(seed=1)
    before = {name: one.clone() for name, one in other.state_dict().items()}
    with pytest.raises(UserError, match=r"adapter of mine, .* fingerprint .* trained on") as error:
        adapter.merge_into(other.state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())
    smaller = build(BackboneConfig(**{**SIZES, "mlp_dim": 40}, max_positions=32), VOCABULARY)
    with pytest.raises(UserError, match=r"up_proj.weight is to be \[48, 32\]"):
        adapter.merge_into(smaller.state_dict())


def test_rows_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    lora.save(tmp_path / "adapter", learned(config=replace(CONFIG, rows=True)), "a", DESCRIBED)
    weights = base().state_dict()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]
    with pytest.raises(UserError, match="36 rows in place of others"):
        Adapter.read(tmp_path / "adapter").merge_into(weights)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora True, allowed is plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"lora_alpha": "x"}, "lora_alpha x"),
    ],
)
def test_what_is_not_plain_lora_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    lora.save(tmp_path / "adapter", learned(), "mine", DESCRIBED)
    file = tmp_path / "adapter" / "adapter_config.json"
    save_json(file, {**load_json(file), **change})
    with pytest.raises(UserError, match=told):
        Adapter.read(tmp_path / "adapter")


def test_an_adapter_is_published_in_half_the_bits(tmp_path: Path) -> None:
    model = learned()
    lora.save(tmp_path / "own", model, "mine", DESCRIBED)
    lora.publish(tmp_path / "own", tmp_path / "out", {"name": "new"})
    own, out = (
        (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("own", "out")
    )
    assert out < 0.7 * own
    merged = base()
    Adapter.read(tmp_path / "out").merge_into(merged.state_dict())
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-2, atol=1e-2)
    assert load_json(tmp_path / "out" / "config.json")["name"] == "new"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no adapter"):
        lora.publish(tmp_path / "own", tmp_path / "other", {})
    assert (tmp_path / "other" / "letter.txt").is_file()


def test_targets_are_words_or_names() -> None:
    model = base()
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert lora.targets_in(model, ["attention"]) == attention
    mlp = ["down_proj", "gate_proj", "up_proj"]
    assert lora.targets_in(model, ["linear"]) == sorted(attention + mlp)
    assert lora.targets_in(model, ["q_proj", "attention"]) == attention
    with pytest.raises(UserError, match=r"'head', allowed .* are attention, down_proj, gate_proj"):
        lora.targets_in(model, ["q_proj", "head"])
    with pytest.raises(UserError, match="'lm_head', allowed"):  # its rows are what `rows` is for
        lora.targets_in(base(tied=False), ["lm_head"])


@pytest.mark.parametrize("fields", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.5}, {"targets": ()}])
def test_numbers_that_learn_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(fields))):
        LoraConfig(**fields)


def test_without_peft_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is not installed; install ddt-llama\[lora\]"):
        lora.adapt(base(), CONFIG, VOCABULARY)
