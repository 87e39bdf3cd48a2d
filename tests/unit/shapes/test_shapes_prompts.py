"""Evaluation prompts, suites and judges: what counts as right, and what training never saw."""

import re
from dataclasses import replace

import pytest
import torch

from ddt_llama.config import UserError
from ddt_llama.shapes.captions import caption
from ddt_llama.shapes.edits import EDIT_KINDS, Edit
from ddt_llama.shapes.judge import (
    change_done,
    changed_region,
    rest_untouched,
    untouched_error,
)
from ddt_llama.shapes.prompts import (
    CATEGORIES,
    Requirement,
    edit_suite,
    heldout_prompts,
    question_suite,
)
from ddt_llama.shapes.questions import QUESTION_KINDS
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import (
    COLOURS,
    SHAPES,
    Object,
    Scene,
    is_heldout,
    sample_scene,
)
from ddt_llama.shapes.words import Mention, holds


@pytest.mark.parametrize("category", CATEGORIES)
def test_each_category_has_a_hundred_prompts_and_others_for_tuning(category: str):
    prompts = heldout_prompts(category, 120, 0)
    texts = {text for text, _ in prompts}
    assert len(texts) == 120
    assert prompts == heldout_prompts(category, 120, 0)
    assert prompts != heldout_prompts(category, 120, 1)
    tuning = {
        text for seed in range(5) for text, _ in heldout_prompts(category, 40, seed, use="tuning")
    }
    assert len(tuning) >= 40
    everything = {text for seed in range(5) for text, _ in heldout_prompts(category, 120, seed)}
    assert not tuning & everything
    demands = {
        use: {one.canonical for _, one in heldout_prompts(category, count, 0, use=use)}
        for use, count in (("test", 120), ("tuning", 40))
    }
    assert not demands["test"] & demands["tuning"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_ask_for_what_training_never_showed(category: str):
    for text, demand in heldout_prompts(category, 100, 2):
        held = [
            w.shape is not None
            and w.colour is not None
            and (w.colour + 2 * w.shape + 3 * w.count) % 10 == 0
            for w in demand.wants
        ]
        assert any(held) == (category != "single")
        for want in demand.wants:
            assert SHAPES[want.shape or 0] in text
            if want.colour is not None:
                assert COLOURS[want.colour][0] in text


def test_sizes_go_with_the_held_out_object_first_and_last():
    demands = [demand for _, demand in heldout_prompts("attribute", 400, 0)]
    first = [
        (want.colour + 2 * want.shape + 3) % 10 == 0
        for want in (demand.wants[0] for demand in demands)
        if want.colour is not None and want.shape is not None
    ]
    sized = [demand.wants[0].size is not None for demand in demands]
    for place in (True, False):
        share = [with_size for with_size, held in zip(sized, first, strict=True) if held is place]
        assert 0.4 < sum(share) / len(share) < 0.6


def test_prompts_speak_the_language_of_captions():
    read = [caption(sample_scene(0, i), 0, i) for i in range(4000)]
    vocabulary = {word for text in read for word in re.findall(r"\w+", text)}
    for category in CATEGORIES:
        for text, _ in heldout_prompts(category, 100, 0):
            assert set(re.findall(r"\w+", text)) <= vocabulary, text


@pytest.mark.parametrize("category", CATEGORIES)
def test_few_random_scenes_satisfy_a_prompt(category: str):
    scenes = [sample_scene(1, i) for i in range(60)]
    hits = [
        demand.satisfied(scene)
        for _, demand in heldout_prompts(category, 100, 0)
        for scene in scenes
    ]
    assert sum(hits) < (0.3 if category == "single" else 0.01) * len(hits)


def scene(*items: tuple[int, int, int, float, float], background: int = 0) -> Scene:
    return Scene(background, tuple(Object(*item) for item in items))


def test_counting_is_exact_and_single_is_not():
    three = scene((0, 0, 0, 0.2, 0.2), (0, 0, 1, 0.8, 0.2), (0, 0, 0, 0.2, 0.8))
    two = Scene(0, three.objects[:2])
    for number, there in ((2, two), (3, three)):
        exact = Requirement((Mention(number, 0, 0),), exact=True)
        assert [exact.satisfied(s) for s in (two, three)] == [there is two, there is three]
    assert Requirement((Mention(1, 0),)).satisfied(three)
    # Others do no harm.
    more = Scene(0, (*two.objects, Object(1, 0, 0, 0.8, 0.8)))
    assert Requirement((Mention(2, 0, 0),), exact=True).satisfied(more)


def test_colour_size_and_background_must_fit():
    picture = scene((0, 2, 1, 0.5, 0.5), background=3)
    assert Requirement((Mention(1, 0, 2, 1),), background=3).satisfied(picture)
    for wrong in (Mention(1, 1, 2, 1), Mention(1, 0, 3, 1), Mention(1, 0, 2, 0)):
        assert not Requirement((wrong,)).satisfied(picture)
    assert not Requirement((Mention(1, 0),), background=0).satisfied(picture)
    assert not Requirement((Mention(1, 0),)).satisfied(None)


def test_binding_is_checked_and_one_object_is_not_two():
    asked = Requirement((Mention(1, 0, 1), Mention(1, 3, 4)))
    assert asked.satisfied(scene((0, 1, 0, 0.2, 0.2), (3, 4, 0, 0.7, 0.7)))
    assert not asked.satisfied(scene((0, 4, 0, 0.2, 0.2), (3, 1, 0, 0.7, 0.7)))
    twice = Requirement((Mention(1, 0), Mention(1, None, 1)))
    assert not twice.satisfied(scene((0, 1, 0, 0.2, 0.2)))


def test_relations_hold_for_every_pair_and_one_way():
    asked = Requirement((Mention(1, 0, 1), Mention(1, 3, 4)), relation=0)
    right = scene((0, 1, 0, 0.2, 0.5), (3, 4, 0, 0.8, 0.5))
    assert asked.satisfied(right)
    assert not asked.satisfied(scene((0, 1, 0, 0.8, 0.5), (3, 4, 0, 0.2, 0.5)))
    assert not asked.satisfied(Scene(0, (*right.objects, Object(0, 1, 0, 0.8, 0.2))))
    a, b = right.objects
    assert [holds(r, a, b) for r in range(4)] == [True, False, False, False]
    above = replace(a, x=0.72, y=0.2)
    assert [holds(r, above, b) for r in range(4)] == [False, False, True, False]


def test_a_mirrored_demand_is_the_same_one():
    circle, star = Mention(1, 0, 1), Mention(1, 3, 4)
    left = Requirement((circle, star), relation=0)
    assert left.canonical == Requirement((star, circle), relation=1).canonical
    assert left.canonical != Requirement((star, circle), relation=0).canonical
    assert Requirement((circle, star)).canonical == Requirement((star, circle)).canonical
    both = [one for text, one in heldout_prompts("position", 120, 0)]
    found = scene((0, 1, 0, 0.2, 0.5), (3, 4, 0, 0.8, 0.5))
    assert all(one.satisfied(found) == one.canonical.satisfied(found) for one in [left, *both])


def test_wrong_requests_are_one_clear_line():
    with pytest.raises(UserError, match="single, two, counting"):
        heldout_prompts("sorting", 1, 0)
    with pytest.raises(UserError, match="there are"):
        heldout_prompts("single", 10_000, 0)


def test_the_edit_suite_covers_all_kinds_and_held_out_targets():
    suite = edit_suite(60, 0)
    assert suite == edit_suite(60, 0)
    assert [made.kind for made in suite] == list(EDIT_KINDS) * 10
    assert [is_heldout(made.target) for made in suite] == ([False] * 6 + [True] * 6) * 5
    assert not {m.source for m in suite} & {m.source for m in edit_suite(60, 0, use="tuning")}


def test_the_question_suite_covers_all_kinds():
    suite = question_suite(50, 0)
    assert [asked.kind for _, asked in suite] == list(QUESTION_KINDS) * 10
    assert sum(is_heldout(picture) for picture, _ in suite) == 25


def nudged(picture: Scene, by: float) -> Scene:
    return replace(picture, objects=tuple(replace(o, x=o.x + by) for o in picture.objects))


SUITE = edit_suite(60, 3)


def test_the_target_of_an_edit_is_a_right_answer_and_the_source_is_not():
    for made in SUITE:
        for result in (made.target, nudged(made.target, 0.02)):
            assert change_done(made, result)
            assert rest_untouched(made, result)
        assert not change_done(made, made.source)
        assert rest_untouched(made, made.source)
        assert not change_done(made, None)
        assert not rest_untouched(made, None)


def harmed(made: Edit) -> list[Scene]:
    """Return targets in which something else has changed, too."""
    target = made.target
    stranger = Object(5, 5, 0, 0.11, 0.89)
    results = [replace(target, objects=(*target.objects, stranger))]
    if made.kind != "background":
        results.append(replace(target, background=(target.background + 1) % 4))
    for o in target.objects:
        if o is not made.after:
            rest = tuple(other for other in target.objects if other is not o)
            results.append(replace(target, objects=rest))
            results += [
                replace(target, objects=(*rest, changed))
                for changed in (
                    replace(o, colour=(o.colour + 1) % 8),
                    replace(o, shape=(o.shape + 1) % 6),
                    replace(o, size=1 - o.size),
                    replace(o, x=o.x + 0.1),
                )
            ]
    return results


def test_any_other_change_is_seen():
    for made in SUITE:
        for result in harmed(made):
            assert not rest_untouched(made, result), (made, result)


def test_a_half_done_move_is_not_done():
    for made in SUITE:
        if made.kind == "move" and made.before and made.after:
            copied = replace(made.source, objects=(*made.source.objects, made.after))
            assert not change_done(made, copied)
            lost = tuple(o for o in made.source.objects if o is not made.before)
            assert not change_done(made, replace(made.source, objects=lost))


def test_pixels_outside_the_change_are_compared():
    for made in SUITE:
        source, target = render([made.source, made.target])
        assert untouched_error(made, source, target) < 1e-6
        region = changed_region(made, 64)
        assert set(region.unique().tolist()) <= {0.0, 1.0}
        keep = 1 - region
        assert keep.sum() > 5
        assert abs(untouched_error(made, source, (source + 0.2 * keep)) - 0.1) < 1e-4
        assert untouched_error(made, source, torch.where(region > 0, -source, source)) < 1e-6
