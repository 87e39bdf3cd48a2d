"""Lines of `ddt bench` on how codes are written: weights in fewer bits, and previews.

How much fewer bits give depends on how much the reading of weights is of a token: so they are timed
in a larger model, too, whose weights are random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from ddt_llama.config import UserError
from ddt_llama.evaluation.bench import Requests, requests
from ddt_llama.evaluation.intervals import Figure
from ddt_llama.evaluation.race import Race, run
from ddt_llama.generation.batch import Batch
from ddt_llama.generation.engine import decoder_of
from ddt_llama.generation.lean import LeanDecoder
from ddt_llama.generation.model import Model
from ddt_llama.generation.precision import Weights, check
from ddt_llama.generation.rows import Rows
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.vocabulary import Vocabulary

LARGE = BackboneConfig(dim=1024, depth=12, num_heads=16, num_kv_heads=8, mlp_dim=2816)
TOKENS = 8  # of each image that are timed
IMAGES = (1, 8)  # written side by side, with guidance
EVERY = 8  # tokens between two previews


def narrowing(model: Model, rounds: int) -> dict[str, Figure]:
    """Time tokens of guided images, the weights in fewer bits against float32.

    Keys: `weights.KIND.bN.vs_float32`, N images side by side, and `weights.KIND.bytes`, the share
    of float32's that a token reads; the same of a larger model as `weights.large.KIND...`. Left out
    is what this machine cannot use, and all for models that the lean decoder cannot run.
    """
    kinds = [kind for kind in get_args(Weights) if _usable(kind, model.device)]
    vocabulary = model.vocabulary
    assert vocabulary is not None
    asked = {count: requests(model, count) for count in IMAGES}
    figures = _narrowed("weights", model.language, vocabulary, kinds, asked, rounds)
    large = backbone.build(LARGE, vocabulary, device=model.device).eval()
    return figures | _narrowed("weights.large", large, vocabulary, kinds, asked, rounds)


def previewing(model: Model, count: int, rounds: int) -> dict[str, Figure]:
    """Time drawing with a preview of each image every eight tokens, and without.

    Key: `draw.bN.vs_no_preview`, 1 where previews cost nothing.
    """
    engine, tasks = model.engine, requests(model, count).tasks()
    assert engine is not None

    def drawn(every: int | None) -> None:
        batch = Batch(engine, engine.rows(2 * count, max(map(engine.length, tasks))))
        waiting = dict(zip(batch.join(tasks), [task.seed for task in tasks], strict=True))
        written, done = 0, []
        while len(batch):
            done += batch.step()
            written += 1
            if every and len(batch) and written % every == 0:
                codes = torch.stack([batch.so_far(ticket) for ticket in waiting])
                model.unfinished(codes, list(waiting.values()))
        codes = torch.stack([ids for _, ids in sorted(done)])
        model.decode(model.tokenizer.from_language(codes), list(waiting.values()))

    race = Race(
        {"none": lambda: drawn(None), "previews": lambda: drawn(EVERY)},
        {f"draw.b{count}.vs_no_preview": ("none", "previews")},
        {},
    )
    return run(race, model.device, rounds, f"draw {count} with previews")


@dataclass
class _Writer:
    """Some tokens of images, again and again."""

    decoder: LeanDecoder
    vocabulary: Vocabulary
    asked: Requests

    def __post_init__(self) -> None:
        """Read the prompts."""
        prompts = [
            row for pair in zip(self.asked.prompts, self.asked.twins, strict=True) for row in pair
        ]
        longest, device = max(map(len, prompts)), self.decoder.device
        ids = [[*row, *[self.vocabulary.pad] * (longest - len(row))] for row in prompts]
        lengths = [len(row) for row in prompts]
        with torch.inference_mode():
            self.read = self.decoder.read(torch.tensor(ids, device=device), lengths)
        self.rows = Rows(len(prompts), longest + TOKENS, device)
        self.head = slice(self.vocabulary.code_offset, self.vocabulary.size)
        self.ids = torch.full((len(prompts),), self.vocabulary.code_offset, device=device)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Write; every image takes two rows, and the head once."""
        self.rows.put(self.read, range(len(self.ids)))
        for _ in range(TOKENS):
            states = self.decoder.step(self.ids, self.rows)
            self.decoder.logits(states[::2], self.head)
        for row in reversed(range(self.rows.count)):
            self.rows.drop(row)


def _narrowed(
    name: str,
    module: nn.Module,
    vocabulary: Vocabulary,
    kinds: Sequence[Weights],
    asked: dict[int, Requests],
    rounds: int,
) -> dict[str, Figure]:
    decoders = {kind: decoder_of(module, kind) for kind in kinds}
    figures: dict[str, Figure] = {}
    for count, one in asked.items():
        ways: dict[str, Callable[[], None]] = {
            kind: _Writer(decoder, vocabulary, one)
            for kind, decoder in decoders.items()
            if isinstance(decoder, LeanDecoder)
        }
        ratios = {f"{name}.{kind}.b{count}.vs_float32": ("float32", kind) for kind in ways}
        seconds = {f"{name}.{kind}.b{count}.seconds": kind for kind in ways}
        ratios.pop(f"{name}.float32.b{count}.vs_float32", None)
        device = next(module.parameters()).device
        told = run(Race(ways, ratios, seconds), device, rounds, f"{name}, {count} at a time")
        for key, figure in told.items():
            share = 1 / TOKENS if key.endswith("seconds") else 1
            figures[key] = Figure(*(share * x for x in (figure.value, figure.low, figure.high)))
    return figures | _weighed(name, decoders)


def _weighed(name: str, decoders: dict[Any, Any]) -> dict[str, Figure]:
    sizes = {k: one.product_bytes for k, one in decoders.items() if isinstance(one, LeanDecoder)}
    return {
        f"{name}.{kind}.bytes": Figure(*[size / sizes["float32"]] * 3)
        for kind, size in sizes.items()
        if kind != "float32"
    }


def _usable(kind: Weights, device: torch.device) -> bool:
    try:
        check(kind, device)
    except UserError:
        return False
    return True
