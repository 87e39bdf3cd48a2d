"""Questions about scenes, with answers: count, colour, existence, relation, comparison.

A question is a pure function of (scene, seed, index), has exactly one right answer in the scene,
and that answer is chosen first and the question to fit it, so that the answers of a kind are
balanced. What cannot be read off one object comes with a thought: the facts, in
the words of the description, from which the answer follows.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from random import Random
from typing import Literal, NamedTuple, get_args

from ddt_llama.shapes.captions import reading_order, related_pairs, relation_words, told
from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Object, Scene, generator
from ddt_llama.shapes.words import NUMBERS, OPPOSITE, RELATIONS, ZONES, Mention, referents, zone

Evaluated = Literal["count", "colour", "existence", "relation", "comparison"]
Lesson = Literal["place", "where", "list"]  # what stands where: asked in training only
QuestionKind = Evaluated | Lesson
QUESTION_KINDS: tuple[Evaluated, ...] = get_args(Evaluated)
# Smaller is asked more: few scenes have a relation or a comparison to ask about.
_PRIORITY = {"count": 1.0, "colour": 1.0, "existence": 1.0, "relation": 0.5, "comparison": 0.6}


# A question, its answer and, where there is one, the thought between the two.
Asked = tuple[str, str] | tuple[str, str, str]


class Question(NamedTuple):
    """A question, its one right answer in a few lower-case words, its kind, and a thought or none.

    A relation asked alone is learned late, for neither of the places that it rests on pays alone
    (experiments/0013).
    """

    question: str
    answer: str
    kind: QuestionKind
    thought: str = ""

    @property
    def reasoned(self) -> str:
        """The answer behind its thought: "red star top, ring left: no"."""
        return f"{self.thought}: {self.answer}" if self.thought else self.answer


def question(scene: Scene, seed: int, index: int, kind: QuestionKind | None = None) -> Question:
    """Ask something about the scene; what is asked is decided by (seed, index).

    A kind the scene has no question for (a relation with one object) gives way to another; `kind`
    is the one to try first. "place", what stands in some zone, "where", in what zone something
    stands, and "list", several of both, are asked only where they are named.
    """
    rng = generator(seed, index, 2)
    order = sorted(QUESTION_KINDS, key=lambda one: rng.random() * _PRIORITY[one])
    kinds: list[QuestionKind] = [*order] if kind is None else [kind, *order]
    for chosen in kinds:
        asked = _ASK[chosen](rng, scene)
        if asked is not None:
            return Question(*asked[:2], chosen, *asked[2:])
    raise AssertionError("every scene can be asked about existence")


def _phrases() -> list[Mention]:
    pairs = [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS))]
    shapes = [(s, None) for s in range(len(SHAPES))]
    colours = [(None, c) for c in range(len(COLOURS))]
    return [Mention(0, shape, colour) for shape, colour in [*pairs, *shapes, *colours]]


_PHRASES = _phrases()
# How often a phrase names colour and shape, the shape alone, the colour alone.
_FORMS = ((True, True), (True, False), (False, True))
_FORM_WEIGHTS = (0.5, 0.3, 0.2)


def _of_form(rng: Random, phrases: list[Mention]) -> Mention | None:
    """Choose the form first, so that the many colour-shape pairs do not crowd out the rest."""
    by_form: dict[tuple[bool, bool], list[Mention]] = defaultdict(list)
    for phrase in phrases:
        by_form[phrase.shape is not None, phrase.colour is not None].append(phrase)
    weights = [w * (f in by_form) for f, w in zip(_FORMS, _FORM_WEIGHTS, strict=True)]
    if not any(weights):
        return None
    return rng.choice(by_form[rng.choices(_FORMS, weights)[0]])


def _related_to(item: Object, phrase: Mention) -> bool:
    return phrase.shape == item.shape or phrase.colour == item.colour


def _absent(rng: Random, scene: Scene) -> Mention | None:
    """Choose a phrase that fits nothing; mostly one that shares a word with some object."""
    missing = [phrase for phrase in _PHRASES if not phrase.found(scene.objects)]
    near = [p for p in missing if any(_related_to(item, p) for item in scene.objects)]
    return _of_form(rng, near if near and rng.random() < 0.6 else missing)


def _count(rng: Random, scene: Scene) -> Asked:
    by_number: dict[int, list[Mention]] = defaultdict(list)
    by_number[len(scene.objects)].append(Mention(0))
    for phrase in _PHRASES:
        number = len(phrase.found(scene.objects))
        if number:
            by_number[number].append(phrase)
    # Zero and one can be asked of almost every scene, larger numbers of few.
    numbers = [0, *sorted(by_number)]
    number = rng.choices(numbers, [1 + 2 * n for n in numbers])[0]
    if number == 0:
        phrase = _absent(rng, scene)
    elif rng.random() < 0.2 and number == len(scene.objects):
        phrase = Mention(0)
    else:
        phrase = _of_form(rng, by_number[number])
    phrase = phrase or Mention(0)
    number = len(phrase.found(scene.objects))
    return f"how many {phrase.bare} are there?", NUMBERS[number], _places(scene, phrase)


def _places(scene: Scene, phrase: Mention) -> str:
    """Tell where what the phrase means stands: "top left, right", or "none"."""
    found = phrase.found(reading_order(scene))
    return ", ".join(ZONES[zone(item.x, item.y)] for item in found) or "none"


def _colour(rng: Random, scene: Scene) -> tuple[str, str]:
    clear = [
        (phrase, item)
        for item in scene.objects
        for phrase in referents(scene, item)
        if phrase.colour is None
    ]
    if not clear or rng.random() < 0.15:
        return "what colour is the background?", BACKGROUNDS[scene.background][0]
    phrase, item = rng.choice(clear)
    return f"what colour is {phrase.definite}?", COLOURS[item.colour][0]


def _existence(rng: Random, scene: Scene) -> Asked:
    if rng.random() < 0.5:
        phrase = _of_form(rng, [phrase for phrase in _PHRASES if phrase.found(scene.objects)])
    else:
        phrase = _absent(rng, scene)
    phrase = phrase or Mention()
    answer = "yes" if phrase.found(scene.objects) else "no"
    asked = f"is there {Mention(1, phrase.shape, phrase.colour).text}?"
    return asked, answer, _places(scene, phrase)


def _relation(rng: Random, scene: Scene) -> Asked | None:
    pairs = related_pairs(scene)
    if not pairs:
        return None
    first, relation, second, item, other = rng.choice(pairs)
    thought = ", ".join(
        f"{phrase.bare} {ZONES[zone(one.x, one.y)]}"
        for phrase, one in ((first, item), (second, other))
    )
    if rng.random() < 0.3:
        low, high = sorted((relation, OPPOSITE[relation]))
        choice = f"{RELATIONS[low]} or {RELATIONS[high]}"
        asked = f"is {first.definite} {choice} {second.definite}?"
        return asked, RELATIONS[relation], thought
    answer = rng.choice(("yes", "no"))
    words = relation_words(rng, relation if answer == "yes" else OPPOSITE[relation])
    return f"is {first.definite} {words} {second.definite}?", answer, thought


def _comparison(rng: Random, scene: Scene) -> Asked | None:
    if rng.random() < 0.5:
        return _compare_sizes(rng, scene) or _compare_counts(rng, scene)
    return _compare_counts(rng, scene) or _compare_sizes(rng, scene)


def _compare_sizes(rng: Random, scene: Scene) -> Asked | None:
    pairs = [(a, b) for a, b in permutations(scene.objects, 2) if a.size != b.size]
    rng.shuffle(pairs)
    for item, other in pairs:
        first, second = (
            [phrase for phrase in referents(scene, one) if phrase.size is None]
            for one in (item, other)
        )
        if first and second:
            word, larger = rng.choice((("larger", 1), ("smaller", 0)))
            answer = "yes" if item.size == larger else "no"
            thought = ", ".join(
                replace(phrase, size=one.size).bare
                for phrase, one in ((first[0], item), (second[0], other))
            )
            return f"is {first[0].definite} {word} than {second[0].definite}?", answer, thought
    return None


def _compare_counts(rng: Random, scene: Scene) -> Asked | None:
    shapes = [Mention(0, shape) for shape in sorted({item.shape for item in scene.objects})]
    colours = [
        Mention(0, None, colour) for colour in sorted({item.colour for item in scene.objects})
    ]
    pairs = [*permutations(shapes, 2), *permutations(colours, 2)]
    more = [(a, b) for a, b in pairs if _number(a, scene) > _number(b, scene)]
    if not more:
        return None
    answer = "yes" if rng.random() < 0.5 else "no"
    first, second = rng.choice(more)[:: 1 if answer == "yes" else -1]
    thought = ", ".join(replace(one, count=_number(one, scene)).text for one in (first, second))
    return f"are there more {first.bare} than {second.bare}?", answer, thought


def _place(rng: Random, scene: Scene) -> tuple[str, str]:
    """Ask what stands in a zone that holds one object, now and then in an empty one."""
    standing: dict[int, list[Object]] = defaultdict(list)
    for item in scene.objects:
        standing[zone(item.x, item.y)].append(item)
    single = [place for place, items in standing.items() if len(items) == 1]
    empty = [place for place in range(len(ZONES)) if place not in standing]
    place = rng.choice(empty if not single or rng.random() < 0.1 else single)
    there = standing.get(place, ())
    found = [Mention.of(item).bare for item in there]
    return f"what is at the {ZONES[place]}?", found[0] if found else "none"


def _where(rng: Random, scene: Scene) -> tuple[str, str] | None:
    """Ask in what zone an object stands."""
    clear = [(phrase, item) for item in scene.objects for phrase in referents(scene, item)]
    if not clear:
        return None
    phrase, item = rng.choice(clear)
    return f"where is {phrase.definite}?", ZONES[zone(item.x, item.y)]


def _list(rng: Random, scene: Scene) -> tuple[str, str] | None:
    """Ask for a list of objects, each named by its looks or by its zone, in random order."""
    zones = [zone(item.x, item.y) for item in scene.objects]
    named = []
    for item, place in zip(scene.objects, zones, strict=True):
        keys = [phrase.bare for phrase in referents(scene, item)]
        alone = zones.count(place) == 1
        if alone and (not keys or rng.random() < 0.5):
            named.append((ZONES[place], told(item)))
        elif keys:
            named.append((rng.choice(keys), told(item)))
    if not named:
        return None
    rng.shuffle(named)
    keys, answers = zip(*named, strict=True)
    return f"list {', '.join(keys)}", ", ".join(answers)


def _number(phrase: Mention, scene: Scene) -> int:
    return len(phrase.found(scene.objects))


_ASK: dict[QuestionKind, Callable[[Random, Scene], Asked | None]] = {
    "count": _count,
    "colour": _colour,
    "existence": _existence,
    "relation": _relation,
    "comparison": _comparison,
    "place": _place,
    "where": _where,
    "list": _list,
}
