"""Where the attention heads of a new language model start: looking a few tokens back.

To answer for one of several phrases, a model must first gather each phrase ("small red circle top
left") where it ends, and then find the one that is asked for. Neither half pays without the other,
so both are learned late: for long it answers with the words of any phrase. Heads that look back
from the start give it the first half; the second needs rotary waves long enough to find words at
any distance (experiments/0020). The idea of starting from what trained models end with is that of
Trockman and Kolter (arXiv 2305.09828).
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ddt_llama.config import UserError
from ddt_llama.language.backbone import vocabulary_tables

PEAK = 8.0  # of a head's score, at its distance; far from it the score is about 0
SLOWEST = 0.15  # radians a token: pairs of numbers that turn slower do not tell neighbours apart


@torch.no_grad()
def look_back(model: PreTrainedModel, seed: int = 0) -> None:
    """Turn head h (from 0) of the first layer to the token h + 1 places before.

    All rows of the embedding get one direction in common, as long as they are themselves. Queries
    and keys get a part that only depends on it, the query turned so that rotary position embedding
    (Su et al. 2021) makes their product largest at the wanted distance. The rest of the weights
    stays what it was. Raises UserError for a model whose queries are normalised or that has no such
    layer.
    """
    config: Any = model.config
    base: Any = model.base_model
    if config.model_type != "llama":
        raise UserError(f"look_back: given a {config.model_type} model, allowed is llama")
    attention = base.layers[0].self_attn
    rows = vocabulary_tables(model)[0]
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows.shape[1], generator=generator).to(rows)
    common /= common.norm()
    rows += common * rows.norm(dim=1).mean()
    width = config.head_dim
    turns = _turns(width, config.rope_parameters["rope_theta"]).to(rows)
    used = (turns > SLOWEST).to(rows)
    # Normalised, a row has length sqrt(d), half of its square along `common`; and scores are
    # divided by sqrt(width).
    size = math.sqrt(PEAK * math.sqrt(width) / float(used.sum()) / (rows.shape[1] / 2))
    key = torch.cat((used, torch.zeros_like(used))) * size
    for head in range(config.num_key_value_heads):
        attention.k_proj.weight[head * width : (head + 1) * width] += torch.outer(key, common)
    for head in range(config.num_attention_heads):
        angle = (head + 1) * turns
        query = torch.cat((used * angle.cos(), -used * angle.sin())) * size
        attention.q_proj.weight[head * width : (head + 1) * width] += torch.outer(query, common)


def _turns(width: int, theta: float) -> Tensor:
    """Return how far each pair of numbers of a head turns from one token to the next, in radians.

    Pair i is the numbers i and i + width / 2, as transformers lays them out.
    """
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
