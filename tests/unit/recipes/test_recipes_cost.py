"""The cost formulas against torch's own counter, and the large recipes on the meta device."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddt_llama.config import UserError, override
from ddt_llama.language import Vocabulary, backbone, lora
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes import NAMES, LanguageRecipe, TokenizerRecipe, recipe_named
from ddt_llama.recipes.cost import cost_of
from ddt_llama.recipes.formulas import (
    decoder_flops,
    document_flops,
    encoder_flops,
    quantity,
    spatial_flops,
    token_stream_flops,
)
from ddt_llama.recipes.tokenizer import SpatialRecipe
from ddt_llama.tokenizer import (
    SpatialTokenizer,
    SpatialTokenizerConfig,
    TimestepTokenizer,
    TimestepTokenizerConfig,
)
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig

SIZES = TimestepTokenizerConfig(
    image_size=32,
    patch=8,
    num_tokens=6,
    quantizer=QuantizerConfig(codebook_size=32, code_dim=4),
    encoder=EncoderConfig(dim=24, depth=2, num_heads=3),
    decoder=DecoderConfig(dim=40, depth=3, num_heads=5),
)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(params=["static", "joint"])
def model(request: pytest.FixtureRequest) -> TimestepTokenizer:
    decoder = replace(SIZES.decoder, token_stream=request.param)
    # Meta: attention is counted by its shapes, whatever kernel a machine would choose.
    with torch.device("meta"):
        return TimestepTokenizer(replace(SIZES, decoder=decoder)).requires_grad_(False)


def test_what_lora_costs_depends_on_its_start() -> None:
    nano, small = (
        cost_of(override(recipe_named("lora"), {"start": one})) for one in ("nano", "small")
    )
    assert (
        small.parameters["layers"] == cost_of(recipe_named("small_pretrain")).parameters["layers"]
    )
    assert nano.parameters["layers"] < small.parameters["layers"]
    with pytest.raises(UserError, match="known for nano, small"):
        cost_of(override(recipe_named("lora"), {"start": "models/other"}))


def test_encoding_costs_what_the_counter_says(model: TimestepTokenizer) -> None:
    images = torch.zeros(1, 3, 32, 32, device="meta")
    features = counted(lambda: model.encoder(model.to_patches(images)))
    nearest = 2 * model.num_tokens * model.quantizer.codebook.numel()
    assert features + nearest == encoder_flops(model)


def test_a_decoding_step_costs_what_the_counter_says(model: TimestepTokenizer) -> None:
    n, k = model.config.grid**2, model.num_tokens
    noisy = torch.zeros(1, n, model.config.patch_dim, device="meta")
    values = torch.zeros(1, k, 4, device="meta")
    seen = torch.ones(1, k, dtype=torch.bool, device="meta")
    t = torch.ones(1, device="meta")
    static = model.config.decoder.token_stream == "static"
    tokens = model.decoder.remember(values, seen) if static else values
    step = counted(lambda: model.decoder(noisy, t, tokens, seen))
    stream = token_stream_flops(model)
    assert step == decoder_flops(model) + (0 if static else stream)
    if static:
        assert counted(lambda: model.decoder.remember(values, seen)) == stream


def test_a_spatial_tokenizer_costs_what_the_counter_says() -> None:
    config = SpatialTokenizerConfig(
        16, (4, 8, 12), (1, 0, 2), 2, QuantizerConfig(codebook_size=32, code_dim=4)
    )
    with torch.device("meta"):
        model = SpatialTokenizer(config).requires_grad_(False)
    images = torch.zeros(1, 3, 16, 16, device="meta")
    encode, decode, _ = spatial_flops(model)
    nearest = 2 * model.num_tokens * model.quantizer.codebook.numel()
    assert counted(lambda: model.features(images)) + nearest == encode
    values = torch.zeros(1, 16, 4, device="meta")
    assert counted(lambda: model.rebuild(values)) == decode


@pytest.mark.parametrize("name", ["spatial_nano", "spatial_small", "spatial_base"])
def test_rivals_are_matched_in_bits_parameters_and_flops(name: str) -> None:
    beside = cost_of(recipe_named(name)).beside
    assert len(beside) == 3
    assert all(abs(share - 1) < 0.04 for share in beside.values())
    size = name.removeprefix("spatial_")
    assert all(f"{size}_tokenizer" in title for title in beside)


@pytest.mark.parametrize("name", ["spatial_nano", "spatial_small", "spatial_base"])
def test_rivals_are_trained_alike_and_their_quantizers_differ_in_size_only(name: str) -> None:
    one = recipe_named(name)
    assert isinstance(one, SpatialRecipe)
    assert one.rival is not None
    other = recipe_named(one.rival)
    assert isinstance(other, TokenizerRecipe)
    assert (one.train, one.data) == (other.train, other.data)
    size = one.tokenizer.quantizer.codebook_size
    assert one.tokenizer.quantizer == replace(other.tokenizer.quantizer, codebook_size=size)


def test_a_language_token_costs_what_the_counter_says() -> None:
    config = backbone.BackboneConfig(
        dim=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48, tied=False
    )
    vocabulary = Vocabulary(300, 64, 6)
    model = backbone.build(config, vocabulary)
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, 10, dtype=torch.long)
    # The counter sees full rows of attention: every token against all ten.
    assert counted(lambda: model(input_ids=ids, use_cache=False)) == pytest.approx(
        10 * backbone.flops_per_token(config, vocabulary, 10), rel=0.01
    )


@pytest.mark.parametrize(("tied", "head_dim"), [(True, None), (False, None), (True, 64)])
def test_learning_a_document_costs_three_forward_passes(tied: bool, head_dim: int | None) -> None:
    config = backbone.BackboneConfig(
        dim=64, depth=2, num_heads=4, num_kv_heads=2, head_dim=head_dim, tied=tied
    )
    vocabulary = Vocabulary(300, 64, 6)
    token = backbone.flops_per_token(config, vocabulary, 500)
    found = document_flops(backbone.build(config, vocabulary, device="meta"), 999)
    assert found == pytest.approx(3 * 999 * token, rel=0.01)


def test_beside_frozen_weights_their_gradients_cost_nothing() -> None:
    """Against torch's counter; the first layer, which has nothing to hand back, is one of many."""
    config = backbone.BackboneConfig(dim=64, depth=12, num_heads=4, num_kv_heads=2, mlp_dim=96)
    vocabulary = Vocabulary(300, 64, 6)
    model: Any = backbone.build(config, vocabulary)
    chosen = LoraConfig(rank=4)
    beside = lora.count(model, chosen, vocabulary)
    told = document_flops(model, 9, beside)
    assert told < 0.8 * document_flops(model, 9)
    lora.adapt(model, chosen, vocabulary)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of a CPU
    ids = torch.zeros(1, 9, dtype=torch.long)
    found = counted(lambda: model(input_ids=ids, use_cache=False).logits.sum().backward())
    assert told == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("name", ["nano_tokenizer", "spatial_nano"])
def test_codes_that_are_kept_have_no_backward_pass(name: str) -> None:
    recipe = recipe_named(name)
    assert not isinstance(recipe, LanguageRecipe)
    with torch.device("meta"):
        model: Any = recipe.build(begins=False)
    kept = replace(recipe, start="nano", keep_codes=True)
    spatial = isinstance(model, SpatialTokenizer)
    encode = spatial_flops(model)[0] if spatial else encoder_flops(model)
    assert kept.learning_flops(model) == recipe.learning_flops(model) - 2 * encode
    assert recipe.learning_flops(model) == cost_of(recipe).learn


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_described_without_memory(name: str) -> None:
    cost = cost_of(recipe_named(name))
    assert all(value > 0 for value in [*cost.parameters.values(), *cost.flops.values()])
    assert str(cost).count("\n") >= 6


def test_the_sizes_are_those_that_are_told() -> None:
    def parameters(name: str) -> int:
        return sum(cost_of(recipe_named(name)).parameters.values())

    assert 3e6 < parameters("nano_tokenizer") < 8e6
    assert 2.5e7 < parameters("small_tokenizer") < 4.5e7
    assert 1.5e9 < parameters("paper_tokenizer") < 2.5e9  # SD3-medium and its token stream
    assert 8e9 < parameters("paper_pretrain") < 9e9  # LLaMA-3-8B and 65,536 codes


def test_cost_follows_the_fields() -> None:
    recipe = recipe_named("nano_tokenizer")
    assert isinstance(recipe, TokenizerRecipe)
    more = override(recipe, {"objective.draws": recipe.objective.draws + 1})
    one, other = cost_of(recipe), cost_of(more)
    extra = list(other.flops.values())[-1] - list(one.flops.values())[-1]
    with torch.device("meta"):
        model = TimestepTokenizer(recipe.tokenizer)
    assert extra == 3 * decoder_flops(model)
    assert one.parameters == other.parameters


def test_the_vocabulary_is_that_of_the_tokenizer() -> None:
    recipe = recipe_named("paper_pretrain")
    assert isinstance(recipe, LanguageRecipe)
    rows = cost_of(recipe).parameters["embedding and head"]
    assert rows == 2 * 4096 * (128_256 + 6 + 65_536)


def test_quantities_are_short() -> None:
    assert [quantity(value) for value in (3, 1234, 5.5e6, 2e9, 7e12)] == [
        "3 ",
        "1.23 k",
        "5.5 M",
        "2 G",
        "7 T",
    ]


def test_meta_has_no_values(model: TimestepTokenizer) -> None:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
