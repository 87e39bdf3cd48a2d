"""Captions, questions and edits, judged by a reader of English that shares no code with them."""

import re
from collections import Counter

import jaxtyping
import pytest

from ddt_llama.language import documents
from ddt_llama.shapes.captions import (
    caption,
    caption_and_plan,
    description,
    in_few_words,
    plan_of_edit,
)
from ddt_llama.shapes.edits import EDIT_KINDS, NEAR, Edit, edit
from ddt_llama.shapes.judge import change_done, rest_untouched
from ddt_llama.shapes.questions import QUESTION_KINDS, question
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    is_valid,
    sample_scene,
)
from ddt_llama.shapes.words import zone

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
COLOUR = [name for name, _ in COLOURS]
GROUND = [name for name, _ in BACKGROUNDS]
SIZE = [name for name, _ in SIZES]
NOUNS = {n: n for n in SHAPES} | {n + ("es" if n == "cross" else "s"): n for n in SHAPES}
NOUNS |= {"shape": "shape", "shapes": "shape"}
PHRASE = (
    rf"(?:(?P<n>an?|{'|'.join(NUMBERS)}|the) )?(?:(?P<size>small|large) )?"
    rf"(?:(?P<colour>{'|'.join(COLOUR)}) )?(?P<noun>{'|'.join(sorted(NOUNS, reverse=True))})\b"
)
ZONE = "top left|top right|bottom left|bottom right|top|bottom|left|right|middle"
RELATION = r"(?:to the )?(?P<relation>left of|right of|above|below)"
SCENES = [sample_scene(21, i, max_objects=5) for i in range(1000)]

Fact = tuple[int | None, str | None, str | None, str]


@pytest.fixture(autouse=True, scope="module")
def _unchecked():
    """Switch the check of tensor shapes off: no tensors here, and ten thousands of scenes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def facts(text: str) -> list[Fact]:
    """Read all noun phrases: (number, size, colour, noun); None as number for "the"."""
    found = []
    for m in re.finditer(PHRASE, text):
        n = m["n"]
        number = None if n == "the" else NUMBERS.index(n) if n in NUMBERS else 1
        found.append((number, m["size"], m["colour"], NOUNS[m["noun"]]))
    return found


def place_told(phrase: str) -> str:
    """Return the words behind the noun: "top left" of "small red circle top left"."""
    return re.sub(rf"^{PHRASE} ", "", phrase)


def fitting(scene: Scene, fact: Fact) -> list[Object]:
    _, size, colour, noun = fact
    return [
        o
        for o in scene.objects
        if size in (None, SIZE[o.size])
        and colour in (None, COLOUR[o.colour])
        and noun in ("shape", SHAPES[o.shape])
    ]


def speaks_of(fact: Fact, other: Fact) -> bool:
    """Say whether a noun phrase leaves out nothing but words of the other."""
    _, size, colour, noun = fact
    return size in (None, other[1]) and colour in (None, other[2]) and noun in ("shape", other[3])


def stands(relation: str, a: Object, b: Object) -> bool:
    gap = {
        "left of": b.x - a.x,
        "right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[relation]
    return gap >= 0.15


def in_zone(o: Object, words: str) -> bool:
    column = "left" if o.x < 0.38 else "right" if o.x >= 0.62 else ""
    row = "top" if o.y < 0.38 else "bottom" if o.y >= 0.62 else ""
    return words == (f"{row} {column}".strip() or "middle")


def is_true(text: str, scene: Scene) -> bool:
    ground = re.search(rf"({'|'.join(GROUND)}) background|background: ({'|'.join(GROUND)})", text)
    if ground and (ground[1] or ground[2]) != GROUND[scene.background]:
        return False
    if "background:" in text:
        told = Counter(re.findall(r"(\w+): (\w+), (\w+)", text))
        real = Counter((SHAPES[o.shape], COLOUR[o.colour], SIZE[o.size]) for o in scene.objects)
        return told == real
    placed = re.findall(rf"{PHRASE} at the ({ZONE})", text)
    if placed:
        told = [
            (size or None, colour or None, noun, word) for _, size, colour, noun, word in placed
        ]
        pool = list(scene.objects)
        for size, colour, noun, word in told:
            hit = [o for o in fitting(scene, (1, size, colour, noun)) if in_zone(o, word)]
            hit = [o for o in hit if o in pool]
            if not hit:
                return False
            pool.remove(hit[0])
        return not pool
    related = re.search(rf"{PHRASE} {RELATION} ", text)
    if related:
        first, second = facts(text[related.start() :])[:2]
        a, b = fitting(scene, first), fitting(scene, second)
        if len(a) != 1 or len(b) != 1 or not stands(related["relation"], a[0], b[0]):
            return False
    told = [fact for fact in facts(text) if fact[0] is not None]
    exact = all(len(fitting(scene, fact)) == fact[0] for fact in told)
    partial = re.search(r"a picture with|contains|among others", text)
    number = sum(fact[0] or 0 for fact in told)
    whole = len(scene.objects)
    return exact and (number < whole if partial else number == whole)


def test_captions_are_true_of_their_scene_and_of_few_others():
    true = [is_true(caption(s, 21, i), s) for i, s in enumerate(SCENES)]
    assert all(true)
    # The reader is no rubber stamp: captions of other scenes are false.
    crossed = [is_true(caption(s, 21, i), SCENES[i - 1]) for i, s in enumerate(SCENES)]
    assert sum(crossed) < 0.05 * len(crossed)


def test_captions_come_in_many_wordings():
    texts = [caption(s, 21, i) for i, s in enumerate(SCENES)]
    for words in (
        *("left of", "right of", "above", "below", "among others", "background:", " at the "),
        *("a picture of", "small", "large", "three", "shapes", "on a white background"),
    ):
        assert sum(words in text for text in texts) >= 5, words
    assert len({caption(SCENES[0], 0, i) for i in range(100)}) > 10


def test_texts_depend_on_scene_seed_and_index_alone():
    for i in (0, 7):
        scene = SCENES[i]
        assert caption(scene, 1, i) == caption(scene, 1, i)
        assert question(scene, 1, i) == question(scene, 1, i)
        assert edit(scene, 1, i) == edit(scene, 1, i)


def test_plans_tell_all_objects_in_the_order_of_the_caption():
    in_order = several = 0
    for i, scene in enumerate(SCENES):
        text, planned = caption_and_plan(scene, 21, i)
        assert text == caption(scene, 21, i)
        assert sorted(planned.split(", ")) == sorted(description(scene).split(", "))
        assert planned.split(", ")[-1] == description(scene).split(", ")[-1]
        complete = facts(planned)
        mentioned = [fact for fact in facts(text) if fact[0] is not None]
        places = [
            next(n for n, one in enumerate(complete) if speaks_of(fact, one)) for fact in mentioned
        ]
        several += len(mentioned) > 1
        in_order += len(mentioned) > 1 and places == sorted(places)
    assert several > 200
    assert in_order > 0.95 * several


def test_little_words_make_no_other_description():
    told = "a small red circle at the top left, an orange star at the right, on a white background"
    assert in_few_words(told) == "small red circle top left, orange star right, white background"
    scene = sample_scene(21, 0)
    assert in_few_words(f" {description(scene)} ") == description(scene)


def test_an_edit_in_words_changes_the_description_as_the_edit_changes_the_scene():
    kinds = Counter()
    for i, scene in enumerate(SCENES):
        made = edit(scene, 21, i)
        assert made is not None
        change, target = plan_of_edit(made)
        assert sorted(target.split(", ")) == sorted(description(made.target).split(", "))
        result = documents.changed(description(scene), change)
        assert sorted(result.split(", ")) == sorted(target.split(", "))
        assert result.split(", ")[-1] == target.split(", ")[-1]
        kinds[change.split()[0]] += 1
    assert min(kinds[verb] for verb in ("add", "remove", "change")) > 50


def test_no_training_text_names_a_heldout_combination():
    for i in range(20_000):
        scene = sample_scene(5, i)
        totals: Counter[tuple[str, str]] = Counter()
        text = caption(scene, 5, i)
        for n, _, colour, noun in facts(text):
            if n and colour and noun != "shape":
                totals[colour, noun] += n
        for (colour, noun), n in totals.items():
            assert (COLOUR.index(colour) + 2 * SHAPES.index(noun) + 3 * n) % 10, text


def answered(scene: Scene, text: str) -> str:
    """Answer a question by looking; fails where it has not exactly one answer."""
    found = facts(text)
    if text.startswith("how many"):
        return NUMBERS[len(fitting(scene, found[0]))]
    if text == "what colour is the background?":
        return GROUND[scene.background]
    if text.startswith("what colour"):
        (item,) = fitting(scene, found[0])
        return COLOUR[item.colour]
    if text.startswith("is there"):
        return "yes" if fitting(scene, found[0]) else "no"
    if text.startswith("are there more"):
        first, second = (len(fitting(scene, fact)) for fact in found)
        return "yes" if first > second else "no"
    (a,), (b,) = (fitting(scene, fact) for fact in found)
    if "than" in text:
        assert a.size != b.size
        return "yes" if (a.size > b.size) == ("larger" in text) else "no"
    asked = re.findall("left of|right of|above|below", text)
    true = [relation for relation in asked if stands(relation, a, b)]
    if len(asked) == 2:
        return true[0]
    assert true or stands(
        {"left of": "right of", "right of": "left of"}.get(
            asked[0], {"above": "below", "below": "above"}.get(asked[0], "")
        ),
        a,
        b,
    )
    return "yes" if true else "no"


def test_questions_have_the_answer_that_looking_gives():
    for i, scene in enumerate(SCENES):
        asked = question(scene, 21, i)
        assert answered(scene, asked.question) == asked.answer, asked


def test_thoughts_are_true_and_lead_to_the_answer():
    seen: Counter[str] = Counter()
    for i, scene in enumerate(SCENES):
        for number in range(4):
            asked = question(scene, 21, 4 * i + number)
            assert asked.reasoned.endswith(asked.answer)
            if not asked.thought:
                assert asked.kind == "colour"
                assert asked.reasoned == asked.answer
                continue
            assert documents.conclusion(asked.reasoned) == asked.answer
            seen[asked.kind] += 1
            parts = asked.thought.split(", ")
            if asked.kind in ("count", "existence"):
                there = fitting(scene, facts(asked.question)[0])
                parts = [] if parts == ["none"] else parts
                assert len(parts) == len(there)
                if asked.kind == "count":
                    assert len(there) == NUMBERS.index(asked.answer)
                assert all(any(in_zone(item, part) for item in there) for part in parts)
                continue
            for part, fact in zip(parts, facts(asked.question), strict=True):
                found = facts(part)[0]
                if asked.question.startswith("are there more"):
                    assert found[0] == len(fitting(scene, fact))
                    assert found[1:] == fact[1:]
                    continue
                (item,) = fitting(scene, fact)
                assert found[2:] == fact[2:]
                assert fitting(scene, found) == [item]
                if asked.kind == "relation":
                    assert in_zone(item, place_told(part))
    assert min(seen[kind] for kind in set(QUESTION_KINDS) - {"colour"}) > 100


def test_what_stands_at_a_place_is_asked_where_it_is_clear():
    empty = 0
    for i in range(300):
        scene = sample_scene(9, i)
        asked = question(scene, 9, i, "place")
        place = asked.question.removeprefix("what is at the ").removesuffix("?")
        there = [item for item in scene.objects if in_zone(item, place)]
        if asked.answer == "none":
            empty += 1
            assert not there
            continue
        (item,) = there
        found = facts(asked.answer)[0]
        assert fitting(scene, found).count(item) == 1
        assert None not in found[1:]
    assert 10 < empty < 60


def test_where_an_object_stands_is_asked_of_one_that_is_named_clearly():
    answers = Counter()
    for i in range(300):
        scene = sample_scene(9, i)
        asked = question(scene, 9, i, "where")
        if asked.kind != "where":
            continue
        (item,) = fitting(scene, facts(asked.question)[0])
        assert in_zone(item, asked.answer)
        answers[asked.answer] += 1
    assert len(answers) == 9
    assert sum(answers.values()) > 250


def test_a_list_tells_each_object_that_is_named_in_the_order_asked_for():
    by_place = by_looks = 0
    for i in range(300):
        scene = sample_scene(9, i)
        asked = question(scene, 9, i, "list")
        if asked.kind != "list":
            continue
        keys = asked.question.removeprefix("list ").split(", ")
        told_ones = asked.answer.split(", ")
        assert len(set(keys)) == len(keys) == len(told_ones) <= len(scene.objects)
        for key, told_one in zip(keys, told_ones, strict=True):
            if facts(key):
                there = fitting(scene, facts(key)[0])
                by_looks += 1
            else:
                there = [item for item in scene.objects if in_zone(item, key)]
                by_place += 1
            (item,) = there
            assert None not in facts(told_one)[0][1:]
            assert item in fitting(scene, facts(told_one)[0])
            assert in_zone(item, place_told(told_one))
    assert min(by_place, by_looks) > 200


def test_answers_are_balanced():
    tally: dict[str, Counter[str]] = {kind: Counter() for kind in QUESTION_KINDS}
    for i in range(6000):
        asked = question(sample_scene(8, i), 8, i)
        tally[asked.kind][asked.answer] += 1
    total = sum(sum(answers.values()) for answers in tally.values())
    for kind, answers in tally.items():
        assert sum(answers.values()) > 0.08 * total, kind
        # Count questions cannot be even: few scenes have four of anything.
        bound = {"count": 0.35, "colour": 0.12}.get(kind, 0.54)
        assert max(answers.values()) < bound * sum(answers.values()), (kind, answers)
    yes, no = tally["existence"]["yes"], tally["existence"]["no"]
    assert 0.9 < yes / no < 1.1


def test_a_wanted_kind_of_question_comes_first():
    scene = sample_scene(1, 0, min_objects=4)
    assert question(scene, 0, 0, "count").kind == "count"
    alone = sample_scene(1, 0, max_objects=1)
    assert question(alone, 0, 0, "relation").kind != "relation"


def spoken_of(made: Edit) -> list[Object]:
    fact = next(f for f in facts(made.instruction) if f[0] is None)
    return fitting(made.source, fact)


def check_edit(made: Edit, may_shift: bool = False) -> None:
    gone = [o for o in made.source.objects if o not in made.target.objects]
    new = [o for o in made.target.objects if o not in made.source.objects]
    same_ground = made.source.background == made.target.background
    text = made.instruction
    if made.kind == "background":
        assert gone == new == []
        assert not same_ground
        assert text.endswith(GROUND[made.target.background])
        return
    assert same_ground
    if made.kind == "add":
        assert gone == []
        (o,) = new
        assert facts(text) == [(1, SIZE[o.size], COLOUR[o.colour], SHAPES[o.shape])]
        assert in_zone(o, text.split(" at the ")[1])
        return
    assert spoken_of(made) == gone
    assert len(gone) == 1
    if made.kind == "remove":
        assert new == []
        return
    (a,), (b,) = gone, new
    changed = {f for f in ("shape", "colour", "size", "x", "y") if getattr(a, f) != getattr(b, f)}
    shift = ("x", "y") if may_shift else ()
    if made.kind == "recolour":
        assert {"colour"} <= changed <= {"colour", *shift}
        assert text.endswith(f" {COLOUR[b.colour]}")
    elif made.kind == "resize":
        assert {"size"} <= changed <= {"size", *shift}
        assert text.split()[-1] in (SIZE[b.size], ["smaller", "larger"][b.size])
    else:
        assert changed <= {"x", "y"}
        assert in_zone(b, text.split(" to the ")[1])
        assert not in_zone(a, text.split(" to the ")[1])


def test_edits_change_what_they_say_and_nothing_else():
    for i, scene in enumerate(SCENES):
        made = edit(scene, 21, i)
        assert made is not None
        assert made.source == scene
        assert is_valid(made.target)
        check_edit(made)


def test_on_a_grid_edits_put_objects_into_cells_or_shift_them_to_where_most_are_near():
    shifted: Counter[float] = Counter()
    for i, scene in enumerate(SCENES):
        made = edit(scene, 21, i, grid=8)
        assert made is not None
        check_edit(made, may_shift=True)
        after, before = made.after, made.before
        if after is None:
            continue
        if made.kind in ("add", "move"):
            assert (after.x * 8 % 1, after.y * 8 % 1) == (0.5, 0.5)
            continue
        assert before is not None
        for now, then in ((after.x, before.x), (after.y, before.y)):
            assert abs(now - then) <= NEAR
            part = now * 8 % 1
            assert part == 0.5 or (part == 0 and abs(now - then) <= 1 / 16 - NEAR)
            shifted[part] += 1
        assert zone(after.x, after.y) == zone(before.x, before.y)
        assert change_done(made, made.target)
        assert rest_untouched(made, made.target)
    assert shifted[0.5] > 1.3 * shifted[0] > 50


def test_training_edits_hold_no_heldout_combination():
    for i in range(20_000):
        made = edit(sample_scene(6, i), 6, i, max_objects=4)
        assert made is not None
        assert len(made.target.objects) <= 4
        for scene in (made.source, made.target):
            counted = Counter((o.colour, o.shape) for o in scene.objects)
            assert all((c + 2 * s + 3 * n) % 10 for (c, s), n in counted.items())


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_kind_of_edit_can_be_asked_for(kind: str):
    made = [edit(SCENES[i], 1, i, kind=kind) for i in range(100)]
    assert sum(m is not None for m in made) > 30
    assert {m.kind for m in made if m} == {kind}
