"""The paper's recipes at full size, on the meta device: published parameter counts, SD3's names."""

import json
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

from ddt_llama.diffusion import Uniform
from ddt_llama.language import Vocabulary, backbone
from ddt_llama.recipes import LanguageRecipe, TokenizerRecipe, recipe_named
from ddt_llama.recipes.cost import cost_of
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig, TokenSchedule, sd3
from ddt_llama.training.optim import groups
from ddt_llama.training.timestep import TimestepObjective

diffusers = pytest.importorskip("diffusers")

TOKENS = {"paper_tokenizer": 480, "selftok_tokenizer_512": 512, "selftok_tokenizer_1024": 1024}
# config.json of the folder `transformer` of Stable Diffusion 3 medium.
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}


def tokenizer_recipe(name: str) -> TokenizerRecipe:
    recipe = recipe_named(name)
    assert isinstance(recipe, TokenizerRecipe)
    return recipe


def language_recipe(name: str) -> LanguageRecipe:
    recipe = recipe_named(name)
    assert isinstance(recipe, LanguageRecipe)
    return recipe


def on_meta(name: str) -> TimestepTokenizer:
    with torch.device("meta"):
        return TimestepTokenizer(tokenizer_recipe(name).tokenizer)


def count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


@pytest.fixture(scope="module")
def medium() -> nn.Module:
    with torch.device("meta"):
        return diffusers.SD3Transformer2DModel(**SD3_MEDIUM)


@pytest.mark.parametrize("name", TOKENS)
def test_the_decoder_is_sd3_medium_without_its_text_and_the_modulation_of_tokens(
    name: str, medium: nn.Module
) -> None:
    assert count(medium) == 2_028_328_000
    sizes = {name: parameter.numel() for name, parameter in medium.named_parameters()}
    of_text = sum(size for part, size in sizes.items() if "text_embedder" in part)  # conTEXT, too
    modulation = sum(size for part, size in sizes.items() if "norm1_context" in part)
    dim, tokens = 1536, TOKENS[name]
    entry = 16 * dim + dim + tokens * dim  # a code's linear map, a position a token
    norms = (2 * 24 - 1) * 2 * dim  # two a block, with their own scale and shift; the last has one
    decoder = count(on_meta(name).decoder)
    assert decoder == count(medium) - of_text - modulation + entry + norms
    known = {480: 1_686_918_208, 512: 1_686_967_360, 1024: 1_687_753_792}
    assert decoder == known[tokens]


def test_the_decoder_takes_every_weight_of_sd3_mediums_image_stream(
    medium: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `load_image_stream` but for the reading: names and shapes, no values."""
    described = {"_class_name": "SD3Transformer2DModel", **medium.config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    weights, asked = medium.state_dict(), set()

    def read(name: str) -> Tensor:
        asked.add(name)
        return weights[name]

    monkeypatch.setattr(sd3, "open_weights", lambda folder: read)
    model = on_meta("selftok_tokenizer_512")
    filled = sd3.load_image_stream(model.decoder, tmp_path)
    theirs = [name for name in weights if name not in asked]
    other = ("context_embedder", "add_", "_context", "text_embedder.linear_1.weight")
    assert all(any(part in name for part in other) for name in theirs)
    optim = tokenizer_recipe("selftok_tokenizer_512").train.optim
    slow = {name for group in groups(model, optim) if group.multiplier < 1 for name in group.names}
    assert slow == {f"decoder.{name}" for name in filled}
    assert optim.lr == 5e-5
    assert [5e-5 * factor for factor in optim.multipliers.values()] == pytest.approx([1e-5] * 4)


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_appear_as_the_papers_say(name: str) -> None:
    config, count = tokenizer_recipe(name).tokenizer, TOKENS[name]
    schedule = TokenSchedule(config.num_tokens, config.pieces)
    fifths = schedule.num_visible(torch.arange(6) / 5).diff().tolist()
    of_512 = [192, 184, 72, 48, 16]
    linear = [count // 5] * 5
    assert fifths == (linear if name == "paper_tokenizer" else [n * count // 512 for n in of_512])
    ends = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0])
    assert schedule.num_visible(ends).tolist() == [0, 1, count, count]
    assert config.grid**2 == 256  # patches of 32 x 32 cells


def test_gradients_are_weighed_from_the_first_token_to_the_last_as_selftoks() -> None:
    """There from 1 to 78, here 80 times as much for the last, with a mean of 1."""
    recipe = tokenizer_recipe("selftok_tokenizer_512")
    tiny = TimestepTokenizerConfig(num_tokens=512, pieces=recipe.tokenizer.pieces)
    goal = TimestepObjective(recipe.objective, torch.zeros(2, 3, 64, 64))
    with torch.device("meta"):
        model = TimestepTokenizer(tiny)
    goal.before_step(model, 0)
    assert goal.weights is not None
    assert float(goal.weights.mean()) == pytest.approx(1)
    # The last token appears in the last of 16 parts of the last fifth.
    assert float(goal.weights[-1] / goal.weights[0]) == pytest.approx(5 * 16, rel=0.1)
    times = Uniform().sample((100_000,), Generator().manual_seed(1))
    seen = model.schedule.probability_visible(times)
    assert float((1 / seen).mean()) == pytest.approx(2, abs=0.1)  # that of its weights


@pytest.mark.parametrize(
    ("name", "published", "text", "width", "tables"),
    [
        ("paper_pretrain", 8_030_261_248, 128_256, 4096, 2),
        ("paper_instruct", 8_030_261_248, 128_256, 4096, 2),
        ("paper_gemma_pretrain", 2_614_341_888, 256_000, 2304, 1),
        ("paper_gemma_instruct", 2_614_341_888, 256_000, 2304, 1),
    ],
)
def test_language_models_are_the_published_ones_and_rows_of_marks_and_codes(
    name: str, published: int, text: int, width: int, tables: int
) -> None:
    recipe = language_recipe(name)
    assert recipe.text_vocab == text
    total = sum(cost_of(recipe).parameters.values())
    assert total == published + tables * (6 + 65_536) * width


def test_gemmas_shape_is_that_of_a_gemma_2_of_transformers() -> None:
    """What is grown from a folder has the shape that `ddt recipes` counts by."""
    config = language_recipe("paper_gemma_pretrain").backbone
    vocabulary = Vocabulary(256_000, 65_536, 480)
    own = backbone.build(config, vocabulary, device="meta")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            Gemma2Config(vocab_size=vocabulary.size, num_hidden_layers=26)
        )
    shapes = {name: tensor.shape for name, tensor in theirs.named_parameters()}
    assert {name: tensor.shape for name, tensor in own.named_parameters()} == shapes
    assert backbone.count_parameters(config, vocabulary) == count(own)


def test_each_starts_from_a_local_folder_and_the_second_stage_from_the_first() -> None:
    starts = {"paper": "models/llama-3-8b", "paper_gemma": "models/gemma-2-2b"}
    for size, folder in starts.items():
        assert language_recipe(f"{size}_pretrain").start == folder
        assert language_recipe(f"{size}_instruct").start == f"runs/{size}_pretrain"
    assert tokenizer_recipe("paper_tokenizer").image_stream is None
    assert tokenizer_recipe("selftok_tokenizer_1024").image_stream == "models/sd3/transformer"
