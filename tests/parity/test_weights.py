"""Language models in bfloat16 and in 8 bits against themselves in float32, and what they weigh."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ddt_llama import cli, distributed
from ddt_llama.checkpoint import load_tensors
from ddt_llama.config import UserError
from ddt_llama.generation import kernels, precision
from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Codes, Engine, decoder_of
from ddt_llama.generation.generic import GenericDecoder
from ddt_llama.generation.lean import LeanDecoder
from ddt_llama.generation.precision import FEW, Int8Linear, Weights
from ddt_llama.generation.release import find, load, open_decoder
from ddt_llama.generation.rows import Rows
from ddt_llama.generation.sampling import GREEDY
from ddt_llama.language.lora import Adapter, product
from ddt_llama.language.vocabulary import Vocabulary

CPU = torch.device("cpu")
# The most by which log-probabilities of the codes may be off (root of the mean square, in nats),
# and the least share of steps at which the likeliest code is that of float32.
BOUNDS = {"bfloat16": (0.03, 0.97), "int8": (0.05, 0.95)}
NARROW = tuple(BOUNDS)


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor has instructions for decides the speed alone: others compute the same."""
    monkeypatch.setattr(distributed, "has_bf16", lambda device: True)
    pytest.importorskip("torchao", reason="int8 needs torchao: make setup")


@pytest.fixture(scope="module")
def folder() -> Path:
    return find("nano") / "language"


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary.load(folder)


def tasks(vocabulary: Vocabulary) -> list[Codes]:
    """Four prompts of the bundled model, drawn by the likeliest codes."""
    model = load("nano")
    assert model.text is not None
    prompts = ["a large red circle", "two small blue squares", "a green star", "a white ring"]
    marks = vocabulary.bos, vocabulary.begin_image
    rows = [(marks[0], *model.text.encode(one), marks[1]) for one in prompts]
    return [Codes(row, sampling=GREEDY) for row in rows]


def followed(decoder: Any, vocabulary: Vocabulary, written: Tensor, asked: list[Codes]) -> Tensor:
    """Return the log-probabilities of codes while all rows are given `written`: step, row, code."""
    head = slice(vocabulary.code_offset, vocabulary.size)
    lengths = [len(task.prompt) for task in asked]
    ids = torch.tensor([[*t.prompt, *[0] * (max(lengths) - len(t.prompt))] for t in asked])
    told = []
    with torch.inference_mode():
        prompts = decoder.read(ids, lengths)
        rows, states = Rows(len(asked), 512, CPU), prompts.states
        rows.put(prompts, range(len(asked)))
        for codes in written.T + vocabulary.code_offset:
            told.append(decoder.logits(states, head).log_softmax(-1))
            states = decoder.step(codes, rows)
    return torch.stack(told)


@pytest.mark.parametrize("weights", NARROW)
def test_the_bundled_model_is_nearly_as_sure_of_its_codes(
    weights: Weights, folder: Path, vocabulary: Vocabulary
) -> None:
    asked = tasks(vocabulary)
    wide = open_decoder(folder, vocabulary, CPU)
    narrow = open_decoder(folder, vocabulary, CPU, weights=weights)
    written = torch.stack(write(Engine(wide, vocabulary), asked))
    expected = followed(wide, vocabulary, written, asked)
    told = followed(narrow, vocabulary, written, asked)
    off, same = BOUNDS[weights]
    weight = expected.exp()  # codes that are never drawn may be off by more
    assert ((told - expected).square() * weight).sum(-1).mean().sqrt() < off
    assert (told.argmax(-1) == expected.argmax(-1)).float().mean() > same
    assert not torch.equal(told, expected)


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_both_decoders_hold_any_module_so(family: str, weights: Weights) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        **({"attention_bias": True, "mlp_bias": True} if family == "Llama" else {}),
    )
    torch.manual_seed(3)
    module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
    before = copy.deepcopy(module.state_dict())
    vocabulary = Vocabulary(text_size=95, codebook_size=64, num_tokens=8)
    asked = [Codes((95, 3, 9, 98)), Codes((95, 98))]
    written = torch.arange(16).view(2, 8)
    narrow = decoder_of(module, weights)
    assert isinstance(narrow, LeanDecoder if family == "Llama" else GenericDecoder)
    expected = followed(decoder_of(module), vocabulary, written, asked)
    told = followed(narrow, vocabulary, written, asked)
    off = 0.05 if weights == "bfloat16" else 0.1
    assert 0 < (told - expected).square().mean().sqrt() / expected.std() < off
    if isinstance(narrow, GenericDecoder):
        layers = [one for one in narrow.module.modules() if isinstance(one, Int8Linear)]
        assert len(layers) == (15 if weights == "int8" else 0)  # seven a layer, and the head
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


@pytest.mark.parametrize("rows", [(1,), (FEW,), (FEW + 1,), (3, 7)])
@pytest.mark.parametrize("shape", [(48, 32), (33, 24), (64, 96)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_of_integers_is_off_by_their_rounding_alone(
    rows: tuple[int, ...], shape: tuple[int, int], biased: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if biased else None
    x = torch.randn(*rows, shape[1]).bfloat16()
    kept = None if bias is None else bias.clone()
    layer = Int8Linear(weight, bias)
    scale, integers = layer.weight.scale, layer.weight.qdata
    assert ((integers * scale - weight).abs() <= 0.51 * scale).all()
    with torch.inference_mode():
        told = layer(x).float()
    expected = F.linear(x.float(), integers * scale, None if bias is None else bias.float())
    torch.testing.assert_close(told, expected, atol=0.05, rtol=0.02)
    assert told.shape == (*rows, shape[0])
    assert (bias is None) or torch.equal(bias, kept)


def test_weights_of_half_and_a_quarter_of_the_bytes(folder: Path, vocabulary: Vocabulary) -> None:
    products, tables = {}, {}
    for weights in get_args(Weights):
        decoder: Any = open_decoder(folder, vocabulary, CPU, weights=weights)
        decoder.logits(decoder.embedding[:1], slice(vocabulary.code_offset, vocabulary.size))
        products[weights], tables[weights] = decoder.product_bytes, decoder.embedding.nbytes
    layer = 256 * (8 + 4) * 64 + 3 * 256 * 576  # nano's: queries and outputs, keys and values, MLP
    assert products["float32"] == 4 * (6 * layer + 16384 * 256)
    assert products["bfloat16"] == products["float32"] / 2
    assert products["int8"] / products["float32"] == pytest.approx(0.25, abs=0.01)
    assert tables["int8"] == tables["bfloat16"] == tables["float32"] / 2  # no product, a look-up


def test_a_process_grows_by_as_much() -> None:
    """What the numbers of tensors say, asked of the system."""
    code = """
import sys, psutil, torch
from ddt_llama.generation.kernels import Product
from ddt_llama.generation.precision import Int8Linear
kind = sys.argv[1]
dtype = torch.float32 if kind == "float32" else torch.bfloat16
make = Int8Linear if kind == "int8" else Product
def held():
    return psutil.Process().memory_info().rss
kept = [make(torch.randn(1024, 1024).to(dtype), None) for _ in range(3)]  # imports, first of all
before = held()
for _ in range(40):
    kept.append(make(torch.randn(1024, 1024).to(dtype), None))
print((held() - before) / 40 / 1024**2)
"""
    grown = {}
    for kind in get_args(Weights):
        words = [sys.executable, "-c", code, kind]
        given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
        told = subprocess.run(words, capture_output=True, text=True, check=True, env=given)
        grown[kind] = float(told.stdout)  # bytes a weight
    assert grown["float32"] == pytest.approx(4, rel=0.05)
    assert grown["bfloat16"] == pytest.approx(2, rel=0.05)
    assert grown["int8"] == pytest.approx(1, rel=0.05)


def test_an_adapter_is_merged_before_weights_are_rounded(
    folder: Path, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "layout_for", lambda weight: "plain")  # so that it can be read
    name = "model.layers.0.mlp.down_proj.weight"
    stored = load_tensors(folder / "model.safetensors", torch.float32)  # in 8 bits: made finer
    state = {key: 1.003 * one for key, one in stored.items()}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    wide = state[name]
    a, b = torch.full((1, wide.shape[1]), 0.01), torch.ones(len(wide), 1)
    adapter = Adapter(tmp_path, {name: (a, b)}, {}, 1.0, "nano", None)
    merged: Any = open_decoder(tmp_path, vocabulary, CPU, adapter, weights="bfloat16")
    expected = (wide + product(a, b, 1.0)).bfloat16()
    assert torch.equal(merged.layers[0].down.weight, expected)
    assert not torch.equal(expected, (wide.bfloat16() + product(a, b, 1.0)).bfloat16())


def test_what_cannot_be_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = str(tmp_path / "a.png")
    assert cli.main(["draw", "nano", "a red circle", "--weights", "int4", "--out", place]) == 2
    assert "int4" in capsys.readouterr().err
    with pytest.raises(UserError, match="'int4'; allowed are float32, bfloat16, int8"):
        precision.check("int4", CPU)
    found = precision.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            precision.importlib.util,
            "find_spec",
            lambda name, *a: None if name == "torchao" else found(name, *a),
        )
        with pytest.raises(UserError, match=r"install ddt-llama\[int8\]"):
            load("nano", weights="int8")
    monkeypatch.setattr(distributed, "has_bf16", lambda device: False)
    for weights in NARROW:
        with pytest.raises(UserError, match=f"{weights} computes in bfloat16, which this cpu"):
            load("nano", weights=weights)
    assert load("nano", weights="float32").engine is not None
