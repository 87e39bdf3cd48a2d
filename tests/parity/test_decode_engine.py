"""The decode engine against the plain loop: two full transformers forwards a token, no cache."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Codes, Engine, decoder_of
from ddt_llama.generation.generic import GenericDecoder
from ddt_llama.generation.lean import LeanDecoder, obstacle
from ddt_llama.generation.rows import Rows
from ddt_llama.generation.sampling import Sampling, TopK, choose, uniforms
from ddt_llama.language.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=95, codebook_size=64, num_tokens=8)
SHAPE = {
    "vocab_size": VOCABULARY.size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
}


def tiny(family: str, **fields: Any) -> Any:
    """Build a random language model whose logits are far from uniform."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.2))
    return model


BACKBONES = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 6}),
}
LEAN = {"llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen3"}


def full_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Read one unpadded sequence from nothing and return the logits after its last id."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


def plain_codes(
    model: Any, prompt: list[int], empty: list[int], scale: float, sampling: Sampling, seed: int
) -> list[int]:
    """Draw one image the obvious way."""
    chance = uniforms([seed], VOCABULARY.num_tokens)
    codes: list[int] = []
    for step in range(VOCABULARY.num_tokens):
        ids = [code + VOCABULARY.code_offset for code in codes]
        conditional, unconditional = (
            full_logits(model, start + ids)[None, VOCABULARY.code_offset :]
            for start in (prompt, empty)
        )
        logits = unconditional + scale * (conditional - unconditional)
        codes.append(int(choose(logits, sampling, chance[step])))
    return codes


@pytest.fixture(params=sorted(BACKBONES), scope="module")
def backbone(request: pytest.FixtureRequest) -> tuple[str, Any]:
    family, fields = BACKBONES[request.param]
    return request.param, tiny(family, **fields)


PROMPTS = [[95, 3, 9, 98], [95, 4, 98], [95, 7, 7, 7, 1, 2, 60, 98], [95, 3, 9, 98]]
EMPTY = [95, 98]


def test_the_fast_path_is_taken_where_it_is_right(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    assert isinstance(decoder_of(model), LeanDecoder) == (name in LEAN)
    assert (obstacle(model.config.to_dict()) is None) == (name in LEAN)


def test_logits_of_rows_that_come_and_go_equal_full_forwards(backbone: tuple[str, Any]) -> None:
    _, model = backbone
    everything = slice(0, VOCABULARY.size)
    written = torch.randint(0, VOCABULARY.size, (5, 8), generator=torch.manual_seed(1)).tolist()
    for decoder in (decoder_of(model), GenericDecoder(model)):
        texts = [[*prompt] for prompt in PROMPTS]
        with torch.inference_mode():
            length = max(map(len, texts))
            ids = torch.tensor([row + [97] * (length - len(row)) for row in texts])
            prompts = decoder.read(ids, [len(row) for row in texts])
            rows = Rows(5, 20, torch.device("cpu"))
            rows.put(prompts, range(4))
            states = prompts.states
            for step in range(8):
                assert len(states) == len(texts) == rows.count
                for logits, row in zip(decoder.logits(states, everything), texts, strict=True):
                    expected = full_logits(model, row)
                    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
                if step == 2:  # the second leaves, the last moves into its place
                    assert rows.drop(1) == 3
                    texts[1] = texts.pop()
                if step == 4:  # a prompt joins in two rows
                    rows.put(prompts, [2, 2])
                    texts += [[*PROMPTS[2]], [*PROMPTS[2]]]
                new = [written[row][step] for row in range(len(texts))]
                states = decoder.step(torch.tensor(new), rows)
                texts = [[*row, one] for row, one in zip(texts, new, strict=True)]


def test_codes_equal_the_plain_loop(backbone: tuple[str, Any]) -> None:
    _, model = backbone
    engine = Engine(decoder_of(model), VOCABULARY)
    sampling = Sampling(TopK(20), temperature=2.0)
    seeds = [5, 6, 2**63 - 1, 8]
    drawn = write(
        engine,
        [
            Codes(tuple(prompt), tuple(EMPTY), 2.5, sampling, seed)
            for prompt, seed in zip(PROMPTS, seeds, strict=True)
        ],
    )
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        assert drawn[row].tolist() == plain_codes(model, prompt, EMPTY, 2.5, sampling, seed)
    assert drawn[0].tolist() != drawn[3].tolist()  # one prompt, two seeds


def test_lean_weights_do_not_follow_the_module_and_half_precision_stays_close() -> None:
    model = tiny("Llama").to(torch.bfloat16)
    decoder = decoder_of(model)
    expected = full_logits(model, PROMPTS[2])
    with torch.inference_mode():
        prompts = decoder.read(torch.tensor([PROMPTS[2]]), [len(PROMPTS[2])])
        logits = decoder.logits(prompts.states, slice(0, VOCABULARY.size))
    assert logits.dtype == torch.float32
    assert (logits[0] - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"layer_types": ["sliding_attention"]}, "layer_types ['sliding_attention']"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ({"rope_theta": None}, "rope_parameters {}"),
    ],
)
def test_what_the_lean_decoder_cannot_run_is_named(
    changes: dict[str, Any], told: str | None
) -> None:
    config = {"model_type": "llama", "rope_theta": 1e4} | changes
    found = obstacle({name: value for name, value in config.items() if value is not None})
    assert (told or "") in (found or "")
    assert (found is None) == (told is None)
