"""How well a language model knows text: the captions of held-out scenes, word for word."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ddt_llama.config import UserError, check_range
from ddt_llama.evaluation.intervals import Figure, mean
from ddt_llama.evaluation.pictures import EVALUATION_SEED, batches, check_seed
from ddt_llama.evaluation.result import watch
from ddt_llama.generation.model import Model
from ddt_llama.language import collate, documents, render
from ddt_llama.language.documents import IGNORED
from ddt_llama.shapes.captions import caption
from ddt_llama.shapes.scene import sample_scene


@dataclass(frozen=True)
class TextSuite:
    """Measures the surprise of a model at captions of scenes that training never held.

    `captions`: how many. Bits are counted a character, which does not depend on how text becomes
    ids; perplexity is that of an id.
    """

    captions: int = 1000
    batch_size: int = 64
    seed: int = EVALUATION_SEED

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        check_range(self, 1, math.inf, "captions", "batch_size")
        check_seed(self.seed)

    def run(self, model: Model) -> dict[str, Figure]:
        """Measure a model; keys: `text.bits_a_character`, `text.perplexity`.

        Means over captions with Student's t, each caption counting alike; perplexity is exp of the
        mean of the captions' mean surprises of an id. UserError for a tokenizer alone.
        """
        scenes = [sample_scene(self.seed, i, split="heldout") for i in range(self.captions)]
        told = [caption(scene, self.seed, i) for i, scene in enumerate(scenes)]
        bits, nats = [], []
        for start, stop in watch(list(batches(len(told), self.batch_size)), "read"):
            for text, surprise in zip(
                told[start:stop], surprises(model, told[start:stop]), strict=True
            ):
                bits.append(sum(surprise) / math.log(2) / len(text))
                nats.append(sum(surprise) / len(surprise))
        one = mean(nats)
        return {
            "text.bits_a_character": mean(bits),
            "text.perplexity": Figure(*(math.exp(x) for x in (one.value, one.low, one.high))),
        }


@torch.no_grad()
def surprises(model: Model, texts: Sequence[str]) -> list[list[float]]:
    """Return -log p in nats of every id of each text, the mark that ends it included."""
    language, vocabulary, text = model.language, model.vocabulary, model.text
    if vocabulary is None or text is None:
        raise UserError(f"model {model.name} has no text; give one with a language model")
    rows = [render(documents.text_only(one), vocabulary, text) for one in texts]
    ids, labels, mask = (part.to(model.device) for part in collate(rows, vocabulary.pad)[:3])
    logits = language(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    wanted = labels[:, 1:]
    told = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    return [row[seen].tolist() for row, seen in zip(told, wanted != IGNORED, strict=True)]
