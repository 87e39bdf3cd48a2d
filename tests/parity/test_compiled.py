"""What is compiled learns what it learns uncompiled: the gradients, in bfloat16, on a CPU."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ddt_llama.language import Batch, Vocabulary, backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.batches import pack
from ddt_llama.tokenizer import (
    SpatialTokenizer,
    SpatialTokenizerConfig,
    TimestepTokenizer,
    TimestepTokenizerConfig,
)
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.language import NextToken
from ddt_llama.training.spatial import SpatialObjective, SpatialObjectiveConfig
from ddt_llama.training.timestep import TimestepObjective, TimestepObjectiveConfig

QUANTIZER = QuantizerConfig(64, 8)
SPATIAL = SpatialTokenizerConfig(32, (16, 32, 64), (0, 0, 1), quantizer=QUANTIZER)
TIMESTEP = TimestepTokenizerConfig(
    image_size=32,
    patch=8,
    num_tokens=8,
    quantizer=QUANTIZER,
    encoder=EncoderConfig(32, 1, 2),
    decoder=DecoderConfig(32, 2, 2),
)
WORDS = Vocabulary(text_size=16, codebook_size=24, num_tokens=8)
SHAPE = BackboneConfig(dim=32, depth=2, num_heads=2, num_kv_heads=2, mlp_dim=64, max_positions=16)


def stage(name: str) -> tuple[nn.Module, Any, Any]:
    """Return network, objective and batch of a stage, half way into its rounding."""
    draws = torch.Generator().manual_seed(2)
    images = torch.rand(8, 3, 32, 32, generator=draws) * 2 - 1
    if name == "spatial":
        plan = SpatialObjectiveConfig(round_from=0, round_until=2)
        return SpatialTokenizer(SPATIAL), SpatialObjective(plan, images), images
    if name == "timestep":
        plan = TimestepObjectiveConfig(round_from=0, round_until=2)
        return TimestepTokenizer(TIMESTEP), TimestepObjective(plan, images), images
    ids = torch.randint(WORDS.size, (8, 16), generator=draws)
    batch = Batch(ids, ids, torch.ones_like(ids))
    if name == "packed":
        batch = pack(batch, WORDS.pad, 64)
    return backbone.build(SHAPE, WORDS), NextToken(WORDS), batch


def gradients(
    model: nn.Module, objective: Any, batch: Any, parts: Iterable[nn.Module] = ()
) -> dict[str, torch.Tensor]:
    """Return the gradients of one step in bfloat16, with the named `parts` compiled."""
    objective.before_step(model, 1)
    for part in parts:
        part.compile()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(model, batch, 3)
    loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def difference(name: str) -> dict[str, float]:
    """Return how far each gradient is another one when compiled, as a share of its length."""
    torch.manual_seed(0)
    plain, objective, batch = stage(name)
    for parameter in plain.parameters():
        if not parameter.any():  # zero starts would hide what lies before them
            nn.init.normal_(parameter, std=0.1)
    compiled = copy.deepcopy(plain)
    wanted = gradients(plain, objective, batch)
    choose = getattr(objective, "parts_to_compile", lambda model: [model])
    found = gradients(compiled, objective, batch, choose(compiled))
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - g).norm() / g.norm().clamp_min(1e-6)) for n, g in wanted.items()}


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("name", ["spatial", "timestep", "language", "packed"])
def test_a_compiled_network_has_the_gradients_of_the_plain_one(name):
    # In a process of its own: the compiler cannot follow the checks of types that tests have.
    command = [sys.executable, __file__, name]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    apart = json.loads(answer.stdout)
    assert len(apart) > 10
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < 0.3, f"{worst}: {apart[worst]:.3f} of its gradient is another"


if __name__ == "__main__":
    print(json.dumps(difference(sys.argv[1])))
