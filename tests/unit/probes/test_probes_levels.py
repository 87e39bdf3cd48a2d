"""Probes that decode some of the tokens, on tokenizers whose answer is known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError, load_json
from ddt_llama.data.images import to_pil
from ddt_llama.generation import Model
from ddt_llama.generation.settings import Settings
from ddt_llama.probes.base import points
from ddt_llama.probes.levels import SHOWN_PICTURES, LevelPlan, Subjects
from ddt_llama.probes.prefix import (
    ATTRIBUTES,
    ENDS,
    attributes,
    back,
    figures_of,
    mask_of,
    prefix,
    stays,
)
from ddt_llama.probes.swap import among_mixed, from_a, regions, sides_of, swap
from ddt_llama.reports.pictures import GAP
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Object, Scene
from ddt_llama.shapes.verify import Blob
from ddt_llama.tokenizer.base import visible_mask
from ddt_llama.tokenizer.schedule import token_places
from stand_in import StandIn

TOKENS = 8
PLAN = LevelPlan(seeds=(0, 1), levels=4, scenes=6, steps=1)
QUARTERS = PLAN.shares(TOKENS)


class Album(StandIn):
    """Knows every picture it has encoded; each token names it.

    A token adds what `mask` (k 1 h w) takes of its picture: "blend" an equal part everywhere,
    "collage" its rows alone, "last" everything by the last token.
    """

    def __init__(self, kind: str) -> None:
        self.pictures: list[Tensor] = []
        self.seeds: list[Any] = []
        self.mask = torch.zeros(TOKENS, 1, 64, 64)
        if kind == "blend":
            self.mask += 1 / TOKENS
        elif kind == "last":
            self.mask[-1] = 1
        for k in range(TOKENS if kind == "collage" else 0):
            self.mask[k, :, 8 * k : 8 * k + 8] = 1

    def encode(self, images: Tensor) -> Tensor:
        first = len(self.pictures)
        self.pictures += list(images)
        return torch.arange(first, len(self.pictures))[:, None].repeat(1, TOKENS)

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: Any = None,
        seed: Any = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        self.seeds.append((steps, list(seed)))
        kept = torch.ones(TOKENS) if visible is None else visible.float()
        table = torch.stack(self.pictures)
        return (table[codes] * self.mask * kept[:, None, None, None]).sum(1)


def album(kind: str) -> Model:
    return Model(Album(kind), name=kind)


def test_tokens_that_all_hold_the_picture_blend_and_squares_make_a_collage(tmp_path: Path) -> None:
    outcome = swap(PLAN, [album("blend"), album("collage")], tmp_path)
    figures = outcome.figures
    assert figures["blend.collage"].value == pytest.approx(0, abs=1e-4)
    assert figures["collage.collage"].value == pytest.approx(1, abs=1e-4)
    assert figures["blend.neither"].value == pytest.approx(0, abs=1e-4)
    assert figures["collage.neither"].value == pytest.approx(0, abs=1e-4)
    percent, share = outcome.plots["blend, mixed, 2 seeds"].curves["share of A"]
    assert percent == [25, 50, 75, 100]
    assert share == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-4)
    assert figures["collage.place"].value == pytest.approx(1, abs=1e-4)
    assert figures["blend.place"].value == pytest.approx(0, abs=1e-4)
    assert "collage 1.00 (1.00 to 1.00), in place 1.00" in outcome.verdict
    assert figures["blend less collage.collage"].value == pytest.approx(-1, abs=1e-4)
    assert "blend less collage -1.00" in outcome.verdict
    assert len(outcome.pictures) == 2


def test_levels_that_mix_nothing_are_no_collage(tmp_path: Path) -> None:
    outcome = swap(PLAN, [album("last"), album("blend")], tmp_path)  # the last token is all
    assert "last nowhere, as no level mixes both; blend 0.00" in outcome.verdict
    assert "last.collage" not in outcome.figures
    assert not any(" less " in name for name in outcome.figures)


def test_pairs_on_one_ground_are_told_beside_all(tmp_path: Path) -> None:
    class Bright(Album):
        """Cuts in place, and shifts everything by the mean of what it shows, as norms may."""

        def decode(self, codes: Tensor, **rest: Any) -> Tensor:
            mixed = super().decode(codes, **rest)
            ground = mixed[..., :1, :1] - mixed[..., -1:, -1:]
            return mixed - 0.5 * ground if len({*codes[0].tolist()}) > 1 else mixed

    plan = replace(PLAN, scenes=32)
    outcome = swap(plan, [Model(Bright("collage"), name="bright")], tmp_path)
    figures = outcome.figures
    assert figures["bright.ground"].value == pytest.approx(1, abs=1e-3)
    assert figures["bright.collage"].value < 0.9
    assert "on one ground 1.00 (" in outcome.verdict


def test_codes_without_a_coarse_end_are_cut_by_rows_too(tmp_path: Path) -> None:
    grid = album("collage")
    grid.tokenizer.prefixes = False
    outcome = swap(PLAN, [grid], tmp_path)
    for name in ("collage", "collage by rows"):
        assert outcome.figures[f"{name}.place"].value == pytest.approx(1, abs=1e-4)
    assert "collage less collage by rows.collage" in outcome.figures
    # Of each pair: B, two, four and six of its eight rows from A, A.
    images = Subjects.of(grid, PLAN, 0, SHOWN_PICTURES).images
    strip = outcome.pictures["collage by rows, B (left) to A (right)"]
    for row, (a, b) in enumerate(zip(images, images.roll(1, 0), strict=True)):
        for column in range(5):
            mixed = torch.cat([a[:, : 16 * column], b[:, 16 * column :]], dim=1)
            assert cell(strip, row, column) == pixels(mixed)


def test_a_strip_of_prefixes_shows_each_level_from_either_end(tmp_path: Path) -> None:
    outcome = prefix(PLAN, [album("collage")], tmp_path)
    (strip,) = outcome.pictures.values()
    images = Subjects.of(album("collage"), PLAN, 0, SHOWN_PICTURES).images
    for row, image in enumerate(images):
        for column in range(4):
            coarse, fine = torch.zeros_like(image), torch.zeros_like(image)
            first, last = 64 - 16 * (column + 1), 16 * (column + 1)
            coarse[:, first:], fine[:, :last] = image[:, first:], image[:, :last]
            assert cell(strip, row, column) == pixels(coarse)
            assert cell(strip, SHOWN_PICTURES + row, column) == pixels(fine)
        assert cell(strip, row, 4) == cell(strip, SHOWN_PICTURES + row, 4) == pixels(image)


def cell(picture: Any, row: int, column: int) -> bytes:
    """Return a picture of a sheet of them."""
    x, y = (64 + GAP) * column, (64 + GAP) * row
    return picture.crop((x, y, x + 64, y + 64)).tobytes()


def pixels(image: Tensor) -> bytes:
    return to_pil(image[None])[0].tobytes()


def test_what_is_neither_of_both_is_told() -> None:
    a, b = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    pattern = torch.ones(16, 16)
    pattern[:, ::2] = -1
    share, collage, _, neither = regions(0.5 * pattern.expand(1, 3, 16, 16), a, b)
    assert (share, collage) == pytest.approx((0.5, 0.0))
    assert neither == pytest.approx(0.25 / 4)  # |0.5 pattern|^2 of |a - b|^2 = 4
    row = {"share": [0.05, 0.3, 0.5, 1.0], "collage": [9.0, 0.2, 0.4, None]}
    assert among_mixed(row, "collage") == pytest.approx(0.3)


def test_a_collage_cut_by_content_is_none_in_place() -> None:
    """Half of the regions of every picture are of A, but other ones in each."""
    generator = torch.Generator().manual_seed(0)
    side = torch.stack([torch.randperm(64, generator=generator) < 32 for _ in range(200)])
    chosen = side.view(200, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    a, b = torch.ones(200, 3, 16, 16), -torch.ones(200, 3, 16, 16)
    share, collage, place, neither = regions(torch.where(chosen, a, b), a, b)
    assert (share, collage, neither) == pytest.approx((0.5, 1.0, 0.0))
    assert place < 0.01
    chosen = chosen[:1]
    assert regions(torch.where(chosen, a, b), a, b)[2] == pytest.approx(1.0)


def test_codes_without_a_coarse_end_are_taken_as_the_coarse_ends_of_others_start() -> None:
    class Timed(StandIn):
        num_tokens = 64

    class Grid(StandIn):
        num_tokens, prefixes = 64, False

    coarse, spread = from_a(Timed(), 16), from_a(Grid(), 16)
    assert coarse.nonzero().flatten().tolist() == list(range(48, 64))
    cells = (token_places(64)[coarse] * 8).floor().long()
    there = torch.zeros(8, 8, dtype=torch.bool)
    there[cells[:, 0], cells[:, 1]] = True
    assert torch.equal(spread.view(8, 8), there)
    assert from_a(Grid(), 16, by_rows=True).nonzero().flatten().tolist() == list(range(16))
    quarters = there.view(2, 4, 2, 4).sum((1, 3))
    assert quarters.min() >= 2  # every quarter of the picture has its part of A
    assert (sides_of(64), sides_of(128), sides_of(256), sides_of(480)) == (8, 16, 16, 32)


def test_the_end_that_holds_the_picture_gives_it_back(tmp_path: Path) -> None:
    outcome = prefix(PLAN, [album("last")], tmp_path)
    for name in ("count", "colour", "shape", "size", "position"):
        assert outcome.figures[f"last.coarse.{name}.25"].value == 1
        assert outcome.figures[f"last.coarse.{name}.back"].value == 0.25
        assert outcome.figures[f"last.fine.{name}.75"].value == 0
        assert 0.75 < outcome.figures[f"last.fine.{name}.back"].value < 1  # between two levels
    assert outcome.figures["last.coarse.psnr.25"].value > 60
    assert outcome.figures["last.fine.psnr.75"].value < 20
    assert "count 25 % (25 to 25)" in outcome.verdict
    assert len(outcome.plots) == 3
    for seed in PLAN.seeds:  # the border is half of the way from what another scene shows
        measured = load_json(tmp_path / "parts" / f"last-{seed}.json")
        scenes = Subjects.of(album("last"), PLAN, seed).scenes
        others = [*scenes[1:], scenes[0]]
        shown = [attributes(other.objects, one) for other, one in zip(others, scenes, strict=True)]
        chance = dict(zip(ATTRIBUTES, np.mean(shown, axis=0), strict=True))
        assert measured["chance"] == pytest.approx(chance)
    again = prefix(PLAN, [replace_album(tmp_path)], tmp_path)
    assert again.figures == outcome.figures


def test_no_share_has_an_interval_beyond_0_and_1() -> None:
    names = ("psnr", "count", "colour", "shape", "size", "position")
    measured: list[dict[str, Any]] = []
    for third in (0.0, 1.0):
        levels = {name: [0.0, 0.0, third, 1.0] for name in names}
        measured.append({"coarse": levels, "fine": levels, "chance": dict.fromkeys(names, 0.0)})
    figures = figures_of(QUARTERS, measured)
    for name in names[1:]:
        half_way = figures[f"coarse.{name}.back"]
        # Half of the way to 1 is passed half way from 50 % to 75 %, or from 75 % to all.
        assert (half_way.value, half_way.high) == (0.75, 1)
        assert half_way.low == 0  # Student's t of two values reaches further
    shape, psnr = figures["coarse.shape.75"], figures["coarse.psnr.75"]
    assert (shape.low, shape.value, shape.high) == (0, 0.5, 1)
    assert psnr.low < 0  # decibels are no share
    assert psnr.high > 1


def replace_album(folder: Path) -> Model:
    """Return a model of the same name that knows nothing: what was measured is read, not made."""
    assert {path.name for path in (folder / "parts").iterdir()} == {"last-0.json", "last-1.json"}
    model = album("blend")
    model.name = "last"
    return model


def test_noise_is_the_same_at_all_levels_and_differs_between_pictures_and_seeds() -> None:
    model = album("blend")
    for seed in (0, 1):
        subjects = Subjects.of(model, replace(PLAN, steps=3), seed)
        subjects.decode(subjects.codes)
        subjects.decode(subjects.codes, visible_mask(3, TOKENS))
    first, again, other, _ = cast(Any, model.tokenizer).seeds
    assert first == again
    assert first[0] == 3
    assert len({*first[1], *other[1]}) == 2 * PLAN.scenes


def test_ends_meet_at_all_tokens() -> None:
    assert mask_of("coarse", 2, 5).tolist() == [False, False, False, True, True]
    assert mask_of("fine", 2, 5).tolist() == [True, True, False, False, False]
    assert all(mask_of(end, 5, 5).all() for end in ENDS)
    assert LevelPlan().counts(64) == list(range(2, 65, 2))
    assert LevelPlan().counts(8) == list(range(1, 9))
    assert LevelPlan().shares(8)[:2] == [0.125, 0.25]
    assert LevelPlan().counts(48)[:4] == [2, 3, 4, 6]
    assert LevelPlan(levels=4).shown(64) == [0, 1, 2, 3]
    assert LevelPlan().shown(64)[-1] == 31
    assert LevelPlan().shown(8) == list(range(8))


def test_attributes_are_those_of_the_objects() -> None:
    circle, star = Object(0, 0, 0, 0.25, 0.25), Object(3, 1, 1, 0.75, 0.75)
    wanted = Scene(0, (circle, star))
    assert attributes(wanted.objects, wanted) == [1, 1, 1, 1, 1]
    assert attributes(None, wanted) == [0, 0, 0, 0, 0]
    assert attributes([circle], wanted) == [0, 0.5, 0.5, 0.5, 0.5]
    changed = replace(star, colour=5, x=0.5)
    assert attributes([circle, changed], wanted) == [1, 0.5, 1, 1, 0.5]
    assert attributes([circle, star, star], wanted) == pytest.approx([0, *[2 / 3] * 4])
    blob = Blob(1, 0.76, 0.74)  # a star of which colour and place alone are clear
    assert attributes([circle, blob], wanted) == [1, 1, 0.5, 0.5, 1]


def test_what_is_never_back_is_said_to_be_so_and_compared_with_nothing(tmp_path: Path) -> None:
    class Blind(Album):
        def decode(self, codes: Tensor, **rest: Any) -> Tensor:
            return torch.ones(len(codes), 3, 64, 64)

    outcome = prefix(PLAN, [album("last"), Model(Blind("last"), name="blind")], tmp_path)
    assert "blind: with these shares of its tokens" in outcome.verdict
    assert outcome.verdict.endswith(
        "psnr never, count never, colour never, shape never, size never, position never."
    )
    assert "blind.coarse.count.back" not in outcome.figures
    assert "last.coarse.count.back" in outcome.figures
    assert not any(" less " in name for name in outcome.figures)
    assert outcome.figures["blind.coarse.count.100"].value == 0
    (tmp_path / "two").mkdir()
    both = prefix(PLAN, [album("last"), album("blend")], tmp_path / "two")
    assert both.figures["last less blend.coarse.psnr.back"].value < 0
    apart = [both.figures[f"last less blend.coarse.{name}.back"].value for name in ATTRIBUTES]
    mean = both.figures["last less blend.coarse.attributes.back"]
    assert mean.value == pytest.approx(sum(apart) / 5)
    assert f"last less blend, mean of the attributes {points(mean)}." in both.verdict


def test_back_is_what_stays_above_a_border_that_all_tokenizers_share() -> None:
    assert stays([3.0, 2.0], [0.5, 1], 4.0) == math.inf  # never there
    assert stays([3.0, 4.0], [0.5, 1], 4.0) == 1
    assert stays([0.5, 0.6, 1.0], [0.2, 0.5, 1], 0.5) == 0.2
    assert stays([0.0, 1.0, 1.0], [0.2, 0.5, 1], 0.5) == pytest.approx(0.35)
    sizes = {"size": [0.5, 0.7, 0.8, 1.0], "psnr": [10.0, 19.0, 21.0, 40.0]}
    measured = {"coarse": sizes, "chance": {"size": 0.5}}  # one of two is right by chance
    # Half of the way from 0.5 is 0.75, between the second and the third level.
    assert back(measured, QUARTERS, "coarse", "size") == pytest.approx(2.5 / 4)
    assert back(measured, QUARTERS, "coarse", "psnr") == pytest.approx(2.5 / 4)


def test_what_is_hidden_of_tokens_in_place_is_the_bare_background() -> None:
    class Cells(StandIn):
        """Codes are 1..8, of a picture of one colour all its mean."""

        prefixes = False

        def encode(self, images: Tensor) -> Tensor:
            flat = images.flatten(2)
            plain = (flat == flat[..., :1]).flatten(1).all(1)
            ground = (images.mean((1, 2, 3)) * 100).long() + 200
            return torch.where(plain[:, None], ground[:, None], torch.arange(8)[None])

        def decode(self, codes: Tensor, *, visible: Any = None, **rest: Any) -> Tensor:
            assert visible is None
            return codes[:, None, None, :].expand(-1, 3, 8, 8).float()

    subjects = Subjects.of(Model(Cells(), name="cells"), PLAN, 0)
    shown = subjects.decode(subjects.codes, mask_of("fine", 3, 8))[:, 0, 0]
    assert shown[0, :3].tolist() == [0, 1, 2]
    grounds = render([replace(scene, objects=()) for scene in subjects.scenes], 64)
    means = (grounds.mean((1, 2, 3)) * 100).long() + 200
    assert len(set(means.tolist())) > 1
    assert torch.equal(shown[:, 3:], means[:, None].expand(-1, 5).float())


def test_steps_are_those_of_the_release_unless_given() -> None:
    model = album("blend")
    model.settings = Settings(steps=5)
    own, given = (Subjects.of(model, replace(PLAN, steps=steps), 0).steps for steps in (None, 2))
    assert (own, given) == (5, 2)
    assert "decoding steps of each release" in LevelPlan().about()


@pytest.mark.parametrize("changes", [{"levels": 0}, {"scenes": 0}, {"steps": -1}, {"seeds": ()}])
def test_plans_of_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"given -?[01], allowed is|one or more"):
        LevelPlan(**changes)
