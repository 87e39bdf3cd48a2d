"""A model that serves in milliseconds: cells for a tokenizer, an untrained language model."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ddt_llama.generation import Model, Settings, programs
from ddt_llama.generation.engine import Answer
from ddt_llama.language import backbone
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary
from ddt_llama.tokenizer.base import visible_mask
from stand_in import StandIn

TOKENS, SIZE = 16, 16
VOCABULARY = Vocabulary(text_size=260, codebook_size=64, num_tokens=TOKENS)


class Cells(StandIn):
    """Code = brightness (0..63) of one of 4 x 4 cells; the seed tints; hidden cells are black."""

    num_tokens, codebook_size, image_size = TOKENS, 64, SIZE

    def __init__(self) -> None:
        """Remember what was asked for."""
        self.encoded: list[int] = []
        self.decoded: list[dict[str, Any]] = []
        self.broken: int | None = None  # the seed of a picture that cannot be decoded

    def encode(self, images: Tensor) -> Tensor:
        """Return the mean of each cell."""
        self.encoded.append(len(images))
        cells = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), SIZE // 4)
        return ((cells.flatten(1) + 1) * 31.5).round().long()

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: int | Tensor | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Return cells of one grey each, the last channel tinted by the seed and the steps."""
        assert not isinstance(seed, int)
        if self.broken in seed:
            raise RuntimeError("secret words")
        self.decoded.append({"rows": len(codes), "steps": steps, "visible": visible})
        grey = codes.view(-1, 1, 4, 4).float() / 31.5 - 1
        kept = visible_mask(visible, TOKENS)
        grey = torch.where(kept.view(1, 1, 4, 4), grey, -1.0)
        picture = grey.repeat(1, 3, 1, 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
        picture[:, 2] *= (torch.tensor(seed).float() % 7 / 7)[:, None, None] / (steps + 1)
        return picture

    def to_language(self, codes: Tensor) -> Tensor:
        """Reverse the columns."""
        return codes.flip(1)

    def from_language(self, codes: Tensor) -> Tensor:
        """Reverse the columns."""
        return codes.flip(1)


def cut_answers_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers be of 12 tokens at most: an untrained model never ends one."""
    monkeypatch.setattr(programs, "Answer", functools.partial(Answer, most=12))


def tiny_model(settings: Settings | None = None, **changes: Any) -> Model:
    """Return a model of this tokenizer; each call gives one of its own, all alike."""
    words = ["a red circle above a ring", "two squares, blue and green", "what is it"]
    text = TextTokenizer.train(words, 260)
    config = BackboneConfig(
        "llama",
        dim=32,
        depth=2,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=48,
        max_positions=changes.pop("max_positions", 512),
        init_std=0.3,
    )
    language: Any = backbone.build(config, VOCABULARY, seed=0).eval()
    return Model(Cells(), language, VOCABULARY, text, settings=settings, name="tiny", **changes)
