"""Lines of `ddt bench` for a GPU: language models of 1 and 8 billion weights, pictures of 256 px.

Weights are random: time does not depend on what they are. What does not fit is left out.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddt_llama.evaluation.bench import SCALE, copying
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.race import Race, run
from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Codes, Engine
from ddt_llama.generation.lean import LeanDecoder
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.vocabulary import Vocabulary

LLAMA_3 = Vocabulary(text_size=128_256, codebook_size=65_536, num_tokens=512)
SIZES: Mapping[str, BackboneConfig] = {
    "llama_1b": BackboneConfig(  # Llama 3.2
        dim=2048,
        depth=16,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        max_positions=8192,
        rope_theta=500_000.0,
    ),
    "llama_8b": backbone.paper(),
}
PROMPT = 32  # tokens
STEPS = (1, 8)  # of decoding
SPREAD = 0.02  # of random weights
COPIES = 2.5  # of the weights there is room for: as drawn, fused, and what is computed


def writing(
    device: torch.device,
    rounds: int,
    sizes: Mapping[str, BackboneConfig] = SIZES,
    vocabulary: Vocabulary = LLAMA_3,
) -> dict[str, Figure]:
    """Time one guided image, its prompt included, in bfloat16.

    Keys, a size each: `SIZE.image_seconds`, `SIZE.token.vs_bandwidth` (the share that a token
    reaches of the speed of a copy of all weights it needs), and on a GPU, where steps are compiled,
    `SIZE.vs_recorded` against those that are recorded only.
    """
    figures: dict[str, Figure] = {}
    for name, config in sizes.items():
        needed = COPIES * 2 * backbone.count_parameters(config, vocabulary)
        if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > needed:
            figures |= _timed(name, config, vocabulary, device, rounds)
    return figures


def round_trip(tokenizer: Any, device: torch.device, rounds: int) -> dict[str, Figure]:
    """Time one picture to codes and back: `tokenizer_PX.round_trip.sN.seconds`, N steps."""
    size = tokenizer.image_size
    picture = torch.rand(1, 3, size, size, device=device) * 2 - 1
    names = {f"tokenizer_{size}.round_trip.s{steps}.seconds": steps for steps in STEPS}
    ways = {
        name: lambda steps=steps: tokenizer.decode(tokenizer.encode(picture), steps=steps)
        for name, steps in names.items()
    }
    race = Race(ways, {}, {name: name for name in names})
    return run(race, device, rounds, f"a picture of {size} px to codes and back")


def _timed(
    name: str, config: BackboneConfig, vocabulary: Vocabulary, device: torch.device, rounds: int
) -> dict[str, Figure]:
    recorded = _decoder(config, vocabulary, device)
    decoders = {"recorded": recorded}
    if device.type == "cuda":
        decoders["compiled"] = copy.copy(recorded)
        decoders["compiled"].compile()
    best = list(decoders)[-1]
    ids = (vocabulary.bos, *range(PROMPT), vocabulary.begin_image)
    task = Codes(ids, (vocabulary.bos, vocabulary.begin_image), SCALE)
    engines = {way: Engine(decoder, vocabulary) for way, decoder in decoders.items()}
    write(engines[best], [task])  # lays the head out, whose bytes count, too
    copies = copying(recorded.product_bytes, device)

    def bound() -> None:
        for _ in range(vocabulary.num_tokens):
            copies()

    race = Race(
        {"bandwidth": bound}
        | {way: lambda engine=engine: write(engine, [task]) for way, engine in engines.items()},
        {f"{name}.token.vs_bandwidth": ("bandwidth", best)}
        | {f"{name}.vs_recorded": ("recorded", way) for way in engines if way != "recorded"},
        {f"{name}.image_seconds": best},
    )
    return run(race, device, rounds, f"draw by {name}")


def _decoder(config: BackboneConfig, vocabulary: Vocabulary, device: torch.device) -> LeanDecoder:
    """Return a language model of random weights, drawn where they are to be."""
    module: Any = backbone.build(config, vocabulary, device="meta")

    def weight(shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, SPREAD)

    drawn = {name: weight(one.shape) for name, one in module.state_dict().items()}
    return LeanDecoder(module.config.to_dict(), drawn)
