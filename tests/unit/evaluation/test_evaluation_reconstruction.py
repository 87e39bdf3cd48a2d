"""The reconstruction suite on tokenizers whose every figure is known beforehand."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ddt_llama.config import UserError
from ddt_llama.data.sources import open_source
from ddt_llama.evaluation.pictures import ScenePictures, SourcePictures, batches
from ddt_llama.evaluation.reconstruction import (
    ReconstructionSuite,
    default_levels,
    perplexity,
    share_used,
)
from ddt_llama.evaluation.result import figures_table, watch, write_figures
from ddt_llama.shapes import scene as shapes_scene
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.tokenizer.timestep import TimestepTokenizer, TimestepTokenizerConfig

SIZE = 64


class Memory:
    """A tokenizer that remembers pictures; the codes of a picture are its number in base 8."""

    num_tokens = 4
    codebook_size = 8
    image_size = SIZE
    refines = prefixes = True
    renders = False

    def __init__(self) -> None:
        self.seen: dict[bytes, int] = {}
        self.images: list[Tensor] = []
        self.calls: list[tuple[int, int | None, list[int], float]] = []

    def encode(self, images: Tensor) -> Tensor:
        rows = []
        for image in images:
            key = image.numpy().tobytes()
            if key not in self.seen:
                self.seen[key] = len(self.images)
                self.images.append(image)
            number = self.seen[key]
            rows.append([number // 8**i % 8 for i in range(self.num_tokens)])
        return torch.tensor(rows)

    def numbers(self, codes: Tensor) -> list[int]:
        return (codes * 8 ** torch.arange(self.num_tokens)).sum(1).tolist()

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        assert not isinstance(seed, int)
        self.calls.append((steps, visible, list(seed), guidance_scale))
        return torch.stack([self.recall(number, steps, visible) for number in self.numbers(codes)])

    def recall(self, number: int, steps: int, visible: int | None) -> Tensor:
        """Move every value towards zero by 0.2 / steps, or by 0.4 / visible where given."""
        image = self.images[number]
        shift = 0.2 / steps if visible is None else 0.4 / visible
        return image - shift * torch.where(image >= 0, 1.0, -1.0)

    def code_vectors(self) -> Tensor:
        return torch.eye(self.codebook_size)

    def to_language(self, codes: Tensor) -> Tensor:
        return codes

    def from_language(self, codes: Tensor) -> Tensor:
        return codes

    def fingerprint(self) -> str:
        return "stand-in"

    def save(self, folder: Path, *, dtype: object = None) -> None:
        raise NotImplementedError


class Forgetful(Memory):
    """Gives another picture back in place of every third."""

    def recall(self, number: int, steps: int, visible: int | None) -> Tensor:
        return self.images[0 if number % 3 == 2 else number]


SMALL = ReconstructionSuite(scenes=12, steps=(1, 2), codebook_scenes=40, batch_size=5)


def test_psnr_at_each_number_of_steps_and_tokens_is_that_of_the_known_error() -> None:
    figures = SMALL.run(Memory())
    for steps in (1, 2, 4):  # 4: as many steps as tokens are always measured
        expected = 20 * math.log10(2 * steps / 0.2)
        assert figures[f"reconstruction.psnr.{steps}"].value == pytest.approx(expected, abs=0.01)
    for tokens in (1, 4):
        expected = 20 * math.log10(2 * tokens / 0.4)
        name = f"reconstruction.visible.psnr.{tokens}"
        assert figures[name].value == pytest.approx(expected, abs=0.01)
    few, many = (figures[f"reconstruction.ssim.{steps}"].value for steps in (1, 4))
    assert 0.5 < few < many < 1


def test_a_faithful_tokenizer_is_read_back_exactly() -> None:
    figures = SMALL.run(Memory())
    assert figures["reconstruction.exact.4"].value == 1.0
    assert figures["reconstruction.exact.4"].low < 1.0


def test_exact_counts_the_scenes_that_came_back() -> None:
    figures = SMALL.run(Forgetful())
    for name in ("exact.1", "exact.2", "exact.4", "visible.exact.1"):
        assert figures[f"reconstruction.{name}"].value == pytest.approx(8 / 12)


def test_each_picture_has_its_own_seed_whatever_the_batch() -> None:
    runs = []
    for batch_size in (5, 12):
        memory = Memory()
        suite = ReconstructionSuite(
            scenes=12, steps=(1,), codebook_scenes=2, batch_size=batch_size, guidance_scale=1.5
        )
        suite.run(memory)
        runs.append([s for steps, visible, seeds, _ in memory.calls if steps == 1 for s in seeds])
        assert {scale for *_, scale in memory.calls} == {1.5}
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 12


def test_codebook_figures_are_those_of_the_codes() -> None:
    """40 new pictures have numbers 12 to 51; their digits in base 8 are counted by hand."""
    figures = SMALL.run(Memory())
    digits = [n // 8**i % 8 for n in range(12, 52) for i in range(4)]
    shares = [digits.count(d) / len(digits) for d in range(8)]
    expected = math.exp(-sum(s * math.log(s) for s in shares if s))
    assert figures["codebook.used"].value == 1.0
    assert figures["codebook.perplexity"].value == pytest.approx(expected)
    assert figures["codebook.perplexity"].low < expected < figures["codebook.perplexity"].high


def test_usage_and_perplexity_of_known_counts() -> None:
    counts = torch.tensor([5, 5, 0, 5, 5, 0, 0, 0])
    assert share_used(counts) == 0.5
    assert perplexity(counts) == pytest.approx(4.0)


def test_scenes_are_heldout_and_their_number_is_recorded() -> None:
    pictures = ScenePictures(30, SIZE)
    assert all(shapes_scene.is_heldout(scene) for scene in pictures.scenes(0, 30))
    assert torch.equal(pictures.images(0, 7)[5:], pictures.images(5, 7))
    assert SMALL.run(Memory())["reconstruction.scenes"].value == 12


def test_levels_double_up_to_all_tokens() -> None:
    assert default_levels(32) == (1, 4, 8, 16, 32)
    assert default_levels(20) == (1, 4, 8, 16, 20)
    assert default_levels(2) == (1, 2)


def test_batches_cover_everything_once() -> None:
    assert list(batches(7, 3)) == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(UserError, match="batch_size is 0"):
        batches(7, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 0}, "scenes: given 0"),
        ({"steps": (-1,)}, "steps are"),
        ({"steps": ()}, "steps are"),
    ],
)
def test_a_suite_that_measures_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_more_visible_tokens_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="has 4 tokens"):
        ReconstructionSuite(scenes=2, visible=(5,)).run(Memory())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        Image.new("RGB", (SIZE, SIZE), (40 * i, 10, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "6.png").write_bytes(b"no picture")
    return tmp_path


def test_pictures_of_a_folder_have_no_exact_share(folder: Path) -> None:
    pictures = SourcePictures(open_source(folder, image_size=SIZE), SIZE)
    assert len(pictures) == 6  # the broken one's stand-in is not counted twice
    figures = SMALL.run(Memory(), pictures)
    assert figures["reconstruction.psnr.1"].value == pytest.approx(20.0, abs=0.5)
    assert not any(".exact." in name for name in figures)
    assert figures["reconstruction.scenes"].value == 6


def test_pictures_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="image_size=64"):
        SourcePictures(open_source(folder, image_size=32), SIZE)


def test_figures_are_written_flat_with_their_bounds(tmp_path: Path) -> None:
    figures = SMALL.run(Memory())
    write_figures(tmp_path / "out.json", figures)
    rows = json.loads((tmp_path / "out.json").read_text())
    names = [name for name in rows if not name.endswith((".low", ".high"))]
    assert len(rows) == 3 * len(names)
    for name in names:
        assert rows[f"{name}.low"] <= rows[name] <= rows[f"{name}.high"]
    table = figures_table(figures, "reconstruction")
    assert table.row_count == len(names)


def test_watching_changes_nothing() -> None:
    assert list(watch([3, 1, 2], "count")) == [3, 1, 2]
    assert list(watch(iter([3, 1]), "count", total=2)) == [3, 1]


def test_an_untrained_tokenizer_of_this_project_is_measured_and_fails() -> None:
    torch.manual_seed(0)
    tokenizer = TimestepTokenizer(
        TimestepTokenizerConfig(
            num_tokens=4,
            encoder=EncoderConfig(dim=32, depth=1, num_heads=2),
            decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
            quantizer=QuantizerConfig(codebook_size=64),
        )
    )
    figures = SMALL.run(tokenizer)
    assert figures["reconstruction.exact.4"].value == 0.0
    assert 0 < figures["reconstruction.psnr.4"].value < 15
    assert 0 < figures["codebook.used"].value <= 1
    assert {"reconstruction.visible.psnr.1", "reconstruction.visible.psnr.4"} <= set(figures)
    assert SMALL.run(tokenizer) == figures


def test_a_tokenizer_of_one_pass_is_measured_once() -> None:
    """No further steps, and no prefix of its codes, where these would change or mean nothing."""
    one = Memory()
    one.refines = one.prefixes = False
    figures = ReconstructionSuite(scenes=4, codebook_scenes=4).run(one)
    measured = {name for name in figures if ".psnr." in name}
    assert measured == {"reconstruction.psnr.1", "reconstruction.visible.psnr.4"}
