"""Scenes: purity, geometry, and the rule that keeps compositions out of training."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations, product

import jaxtyping
import pytest

from ddt_llama.config import UserError
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    is_heldout,
    is_valid,
    sample_scene,
)

HELDOUT = {
    (c, s, n)
    for c, s, n in product(range(8), range(6), range(1, 7))
    if (c + 2 * s + 3 * n) % 10 == 0
}


def combos(scene: Scene) -> set[tuple[int, int, int]]:
    counted = Counter((o.colour, o.shape) for o in scene.objects)
    return {(c, s, n) for (c, s), n in counted.items()}


@pytest.fixture(scope="module")
def train() -> Iterator[list[Scene]]:
    # No tensors here: checking shapes would take ten times as long as the scenes.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield [sample_scene(0, i, max_objects=6) for i in range(20_000)]
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_scene_depends_on_seed_and_index_alone():
    scenes = [sample_scene(3, i) for i in range(50)]
    assert scenes[::-1] == [sample_scene(3, i) for i in reversed(range(50))]
    assert len(set(scenes)) == 50
    assert not set(scenes) & {sample_scene(4, i) for i in range(50)}


def test_objects_lie_inside_and_apart(train: list[Scene]):
    for scene in train:
        for o in scene.objects:
            radius = SIZES[o.size][1]
            assert min(o.x, o.y, 1 - o.x, 1 - o.y) >= radius + 0.01 - 1e-9
        for a, b in combinations(scene.objects, 2):
            distance = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5
            assert distance >= SIZES[a.size][1] + SIZES[b.size][1] + 0.02 - 1e-9


def test_training_holds_no_heldout_combination(train: list[Scene]):
    assert not any(combos(scene) & HELDOUT for scene in train)
    assert not any(is_heldout(scene) for scene in train)


def test_training_holds_everything_else(train: list[Scene]):
    seen = set().union(*(combos(scene) for scene in train))
    possible = set(product(range(8), range(6), range(1, 6))) - HELDOUT
    # Five and six alike are rare; up to four alike, all that is allowed occurs.
    assert {combo for combo in possible if combo[2] <= 4} <= seen
    for colour, shape in product(range(8), range(6)):
        assert sum((colour, shape, n) in HELDOUT for n in range(1, 7)) <= 1
    assert 0.08 < len(HELDOUT) / (8 * 6 * 6) < 0.12


def test_even_scenes_hold_the_pairs_that_never_stand_alone_as_often_as_others():
    alone = {(c, s) for c, s, n in HELDOUT if n == 1}
    shares = []
    for even in (False, True):
        scenes = [sample_scene(5, i, even=even) for i in range(6000)]
        assert not any(map(is_heldout, scenes))
        seen = Counter((c, s) for scene in scenes for c, s, _ in combos(scene))
        assert len(seen) == 48
        rare = sum(seen[pair] for pair in alone) / len(alone)
        common = (seen.total() - rare * len(alone)) / (48 - len(alone))
        shares.append(rare / common)
        assert Counter(len(scene.objects) for scene in scenes) == Counter(
            len(sample_scene(5, i).objects) for i in range(6000)
        )
    assert shares[0] < 0.3
    assert 0.7 < shares[1] < 1.1


def test_even_changes_no_scene_that_was_in_the_right_split_at_once():
    pairs = [(sample_scene(6, i), sample_scene(6, i, even=True)) for i in range(500)]
    changed = [one for one, other in pairs if one != other]
    assert 0.05 < len(changed) / len(pairs) < 0.3
    for split_scene, other in ((sample_scene(6, i, split="heldout"), i) for i in range(50)):
        assert split_scene == sample_scene(6, other, split="heldout", even=True)


def test_the_heldout_split_always_holds_one():
    for i in range(500):
        scene = sample_scene(0, i, split="heldout")
        assert combos(scene) & HELDOUT
        assert is_heldout(scene)
        assert is_valid(scene)


def test_numbers_of_objects_and_attributes_are_balanced(train: list[Scene]):
    counts = Counter(len(scene.objects) for scene in train)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert all(abs(n / len(train) - 1 / 6) < 0.02 for n in counts.values())
    items = [o for scene in train for o in scene.objects]
    for values, total in (
        (Counter(o.shape for o in items), len(SHAPES)),
        (Counter(o.colour for o in items), len(COLOURS)),
        (Counter(o.size for o in items), len(SIZES)),
        (Counter(scene.background for scene in train), len(BACKGROUNDS)),
    ):
        share = 1 / total
        assert len(values) == total
        assert all(abs(n / sum(values.values()) - share) < 0.3 * share for n in values.values())


def test_places_fill_the_canvas():
    places = [o for i in range(3000) for o in sample_scene(1, i, max_objects=1).objects]
    cells = Counter((int(4 * o.x), int(4 * o.y)) for o in places)
    assert len(cells) == 16


def test_on_a_grid_centres_are_the_middles_of_cells():
    scenes = [sample_scene(4, i, grid=8) for i in range(2000)]
    centres = {value * 8 for scene in scenes for o in scene.objects for value in (o.x, o.y)}
    assert centres == {1.5, 2.5, 3.5, 4.5, 5.5, 6.5}
    assert all(is_valid(scene) for scene in scenes)
    assert scenes != [sample_scene(4, i) for i in range(2000)]
    crowded = [sample_scene(4, i, grid=8, min_objects=6, max_objects=6) for i in range(200)]
    assert all(is_valid(scene) for scene in crowded)


def test_every_two_colours_are_far_apart():
    for (_, a), (_, b) in combinations((*COLOURS, *BACKGROUNDS), 2):
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 100


@pytest.mark.parametrize(("low", "high"), [(0, 4), (3, 2), (1, MAX_OBJECTS + 1)])
def test_impossible_numbers_of_objects_are_refused(low: int, high: int):
    with pytest.raises(UserError, match="max_objects") as caught:
        sample_scene(0, 0, min_objects=low, max_objects=high)
    assert "\n" not in str(caught.value)


def test_validity_sees_overlap_and_overhang():
    item = Object(0, 0, 1, 0.5, 0.5)
    assert is_valid(Scene(0, (item,)))
    assert not is_valid(Scene(0, ()))
    assert not is_valid(Scene(0, (item, Object(1, 1, 0, 0.6, 0.5))))
    assert not is_valid(Scene(0, (Object(0, 0, 1, 0.1, 0.5),)))
