"""Publishing: the settings of a release are chosen by measurement."""

from pathlib import Path

import PIL.Image
import torch

from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.publish import best_steps, changed_codes, tuning_pictures
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


IMAGES = torch.zeros(2, 3, 16, 16)


def test_the_number_of_steps_with_the_best_psnr_is_chosen():
    assert best_steps(Noisy({1: 0.3, 2: 0.1, 4: 0.2}), IMAGES, choices=(1, 2, 4)) == 2


def test_of_equal_numbers_of_steps_the_fewest_are_chosen():
    assert best_steps(Noisy({4: 0.1, 2: 0.1, 8: 0.1}), IMAGES, choices=(4, 8, 2)) == 2


def test_tuning_scenes_are_none_of_training():
    trained = render([ShapesSource(seed=0)[i].scene for i in range(128)], 16)
    chosen = tuning_pictures(DataConfig(), Noisy({}))
    assert {image.numpy().tobytes() for image in chosen}.isdisjoint(
        image.numpy().tobytes() for image in trained
    )


def test_own_pictures_are_tuned_on_those_that_training_left_alone(tmp_path: Path) -> None:
    for number in range(40):
        PIL.Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = DataConfig(paths=(str(tmp_path),), held_out=0.2)
    trained = data.open_images(str(tmp_path), 16)
    chosen = {image[0, 0, 0].item() for image in tuning_pictures(data, Noisy({}))}
    assert chosen
    assert chosen.isdisjoint(trained[i].image[0, 0, 0].item() for i in range(len(trained)))


def test_codes_that_fewer_bits_change_are_counted() -> None:
    class Fixed(Noisy):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            codes = torch.zeros(len(images), self.num_tokens, dtype=torch.long)
            codes[0, :8] = int(self.errors[1])
            return codes

    one, other = Fixed({1: 0.0}), Fixed({1: 3.0})
    assert changed_codes(one, one, IMAGES) == 0
    assert changed_codes(one, other, IMAGES) == 8 / (2 * one.num_tokens)
