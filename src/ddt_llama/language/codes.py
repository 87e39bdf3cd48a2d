"""Where the rows of codes start in a new language model: near codes get near rows.

A codebook is a map of what codes look like; rows drawn at random hide it, and the model has to find
out from documents which codes are alike. Only integers reach the model in training all the same.
Measured in experiments/0006.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ddt_llama.language.backbone import vocabulary_tables
from ddt_llama.language.vocabulary import Vocabulary

BANDWIDTH = 2.0  # of unit vectors: rows of codes half the sphere apart are nearly independent
NOISE_SHARE = 0.25  # of a row's length: tells apart what the features leave alike


@torch.no_grad()
def place_codes(
    model: PreTrainedModel, vocabulary: Vocabulary, vectors: Float[Tensor, "v e"], seed: int = 0
) -> None:
    """Start the rows of embedding and head from the vectors of the codes, which have unit length.

    A row is random Fourier features of its vector (Rahimi and Recht 2007): the product of two rows
    falls with the distance of the two vectors as a Gaussian does. The size of the numbers stays
    what the model started with.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = vocabulary_tables(model)
    dim = tables[0].shape[1]
    directions = BANDWIDTH * torch.randn(vectors.shape[1], -(-dim // 2), generator=generator)
    angles = vectors.float().cpu() @ directions
    features = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]
    for table in tables:
        rows = table[vocabulary.code_offset :]
        keep = math.sqrt(1 - NOISE_SHARE**2)
        rows.copy_(keep * rows.std() * features.to(rows) + NOISE_SHARE * rows)
