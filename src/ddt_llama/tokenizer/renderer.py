"""The one-step renderer: codes to a picture in one pass, without noise.

The decoder's network once more, with a learned canvas in the place of x_t, at t = 1, where all
tokens are visible; its answer is the picture. Trained behind a finished tokenizer (`ddt train
nano_renderer`). Source: Selftok (arXiv 2505.07538), its one-step renderer.
"""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ddt_llama.diffusion import Prediction
from ddt_llama.tokenizer.decoder import Decoder


class Renderer(nn.Module):
    """A copy of `decoder`, whose answers are a `prediction`, and a canvas of zeros.

    At t = 1 x_t says nothing about the picture, so the decoder has learned to answer from the
    tokens alone, and zeros are the mean of the noise that it saw there: the copy begins as decoding
    in one step does.
    """

    def __init__(self, decoder: Decoder, prediction: Prediction) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        way_in, way_out = self.decoder.patch_in, self.decoder.patch_out
        patches = len(self.decoder.get_buffer("positions"))
        self.canvas = nn.Parameter(way_in.weight.new_zeros(patches, way_in.in_features))
        if prediction == "velocity":  # at t = 1 the noise less the picture
            with torch.no_grad():
                for parameter in way_out.parameters():
                    parameter.neg_()

    def forward(
        self, values: Float[Tensor, "b k e"], visible: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b n p"]:
        """Return the picture of these tokens, as patches."""
        canvas = self.canvas.expand(len(values), -1, -1)
        t = self.canvas.new_ones(1)  # one for all: products of few rows depend on how many
        return self.decoder(canvas, t, self.decoder.read(values, visible), visible)
