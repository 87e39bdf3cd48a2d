"""Publishing: the settings of a release are chosen by measurement."""

import torch

from ddt_llama.recipes.publish import best_steps
from ddt_llama.shapes.render import render
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig


class Noisy(TimestepTokenizer):
    """Decodes to the image plus an error that depends on the number of steps."""

    def __init__(self, errors: dict[int, float]) -> None:
        super().__init__(TimestepTokenizerConfig(image_size=16))
        self.errors = errors
        self.seen = torch.zeros(0)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return torch.zeros(len(images), self.num_tokens, dtype=torch.long)

    def decode(self, codes: torch.Tensor, *, steps: int = 8, **_: object) -> torch.Tensor:
        return self.seen + self.errors[steps]


def test_the_number_of_steps_with_the_best_psnr_is_chosen():
    assert best_steps(Noisy({1: 0.3, 2: 0.1, 4: 0.2}), choices=(1, 2, 4)) == 2


def test_of_equal_numbers_of_steps_the_fewest_are_chosen():
    assert best_steps(Noisy({4: 0.1, 2: 0.1, 8: 0.1}), choices=(4, 8, 2)) == 2


def test_tuning_scenes_are_none_of_training():
    noisy = Noisy({1: 0.1})
    best_steps(noisy, choices=(1,))
    trained = render([ShapesSource(seed=0)[i].scene for i in range(128)], 16)
    assert not any(torch.equal(a, b) for a, b in zip(noisy.seen, trained, strict=True))
