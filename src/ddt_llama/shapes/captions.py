"""Captions of scenes: what is in the picture, in several wordings, partial or complete.

A caption is a pure function of (scene, seed, index) and true of the scene: a number is the exact
number of such objects, a relation holds clearly, and what is left out is announced by the wording.
A plan is the complete description, in the order of the caption or of what was there before an edit.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from random import Random

from ddt_llama.shapes.edits import Edit
from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, generator
from ddt_llama.shapes.words import (
    RELATIONS,
    ZONES,
    Mention,
    clear_relation,
    join,
    picture,
    zone,
)

_LITTLE_WORDS = ("a", "an", "at", "on", "the")
Told = tuple[str, list[Mention]]  # a caption, and its phrases in their order


def caption(scene: Scene, seed: int, index: int) -> str:
    """Describe the scene in one phrase, worded as (seed, index) decides."""
    return _worded(scene, seed, index, hard=False)[0]


def caption_and_plan(scene: Scene, seed: int, index: int, *, hard: bool = False) -> tuple[str, str]:
    """Return a caption, and the description that tells the objects in the caption's order.

    `hard`: three of four captions tell a relation or leave a colour out, which is learned last.
    """
    text, phrases = _worded(scene, seed, index, hard=hard)
    order = [item for phrase in phrases for item in phrase.found(reading_order(scene))]
    return text, description(scene, [*order, *reading_order(scene)])


def plan_of_edit(made: Edit) -> tuple[str, str]:
    """Return what an edit does and the description of its target, as `language.documents` words it.

    The target is told in the order of the source; what is new comes last.
    """
    kept = [made.after if item is made.before else item for item in reading_order(made.source)]
    kept += [made.after] if made.before is None else []
    target = description(made.target, [item for item in kept if item is not None])
    before = made.before and told(made.before)
    after = made.after and told(made.after)
    if made.kind == "background":
        before, after = (_ground_told(scene) for scene in (made.source, made.target))
    if before and after:
        return f"change {before} to {after}", target
    return f"add {after}" if after else f"remove {before}", target


def description(scene: Scene, order: Sequence[Object] | None = None) -> str:
    """Tell every object with size, colour, shape and place, and the background, in few words.

    "small red circle top left, large blue star right, black background": what belongs together
    stands within four tokens, which is as far as `language.heads` look back (experiments/0020).
    In reading order, which gives each scene one description, so that a model that writes it must
    have seen everything; or in an order in which objects may come again.
    """
    objects = dict.fromkeys(order or reading_order(scene))
    return ", ".join([*map(told, objects), _ground_told(scene)])


def in_few_words(text: str) -> str:
    """Leave out articles and prepositions, in which descriptions that say the same may differ."""
    return " ".join(word for word in text.split() if word not in _LITTLE_WORDS)


def told(item: Object) -> str:
    """Tell one object: "small red circle top left"."""
    phrase = Mention.of(item).bare
    return f"{phrase} {ZONES[zone(item.x, item.y)]}"


def _ground_told(scene: Scene) -> str:
    return f"{BACKGROUNDS[scene.background][0]} background"


def reading_order(scene: Scene) -> list[Object]:
    """Return the objects zone by zone, as lines are read."""
    return sorted(scene.objects, key=lambda item: (zone(item.x, item.y), item.x, item.y))


def _worded(scene: Scene, seed: int, index: int, *, hard: bool) -> Told:
    rng = generator(seed, index, 1)
    weights = _HARD if hard and rng.random() < 0.75 else _WEIGHTS
    (style,) = rng.choices(_STYLES, weights)
    return style(rng, scene)


def mentions(scene: Scene, rng: Random, *, size: bool = False) -> list[Mention]:
    """Return one phrase for each colour and shape (and size), in random order, all objects told."""
    counts = Counter(
        (item.shape, item.colour, item.size if size else None) for item in scene.objects
    )
    phrases = [Mention(count, *kind) for kind, count in counts.items()]
    rng.shuffle(phrases)
    return phrases


def _ground(rng: Random, scene: Scene) -> int | None:
    return scene.background if rng.random() < 0.5 else None


def _kinds(rng: Random, scene: Scene) -> Told:
    told = mentions(scene, rng)
    return picture(rng, join([phrase.text for phrase in told]), _ground(rng, scene)), told


def _sized(rng: Random, scene: Scene) -> Told:
    told = mentions(scene, rng, size=True)
    return picture(rng, join([phrase.text for phrase in told]), _ground(rng, scene)), told


def _mixed(rng: Random, scene: Scene) -> Told:
    """Leave the colour out, or say the size, here and there; only where that stays clear."""
    shapes = Counter(shape for shape, _ in {(item.shape, item.colour) for item in scene.objects})
    told = mentions(scene, rng)
    texts = []
    for phrase in told:
        sizes = {item.size for item in phrase.found(scene.objects)}
        shape = phrase.shape
        colour = None if shape is not None and shapes[shape] == 1 else phrase.colour
        colour = phrase.colour if rng.random() < 0.5 else colour
        size = sizes.pop() if len(sizes) == 1 and rng.random() < 0.4 else None
        texts.append(Mention(phrase.count, shape, colour, size).text)
    return picture(rng, join(texts), _ground(rng, scene)), told


def _shapes(rng: Random, scene: Scene) -> Told:
    counts = Counter(item.shape for item in scene.objects)
    told = [Mention(count, shape) for shape, count in counts.items()]
    rng.shuffle(told)
    return picture(rng, join([phrase.text for phrase in told]), _ground(rng, scene)), told


def _colours(rng: Random, scene: Scene) -> Told:
    counts = Counter(item.colour for item in scene.objects)
    told = [Mention(count, None, colour) for colour, count in counts.items()]
    rng.shuffle(told)
    return picture(rng, join([phrase.text for phrase in told]), _ground(rng, scene)), told


def _total(rng: Random, scene: Scene) -> Told:
    return picture(rng, Mention(len(scene.objects)).text, scene.background), []


def related_pairs(scene: Scene) -> list[tuple[Mention, int, Mention, Object, Object]]:
    """Return (phrase, relation, phrase, object, object) of all clear pairs.

    Both objects are the only ones of their colour and shape, and the relation is the one that
    describes the pair best.
    """
    found = []
    for item, other in permutations(scene.objects, 2):
        first = Mention(1, item.shape, item.colour)
        second = Mention(1, other.shape, other.colour)
        relation = clear_relation(item, other)
        if (
            relation is not None
            and len(first.found(scene.objects)) == 1
            and len(second.found(scene.objects)) == 1
        ):
            found.append((first, relation, second, item, other))
    return found


def relation_words(rng: Random, relation: int) -> str:
    """Word a relation: "left of" or "to the left of"."""
    words = RELATIONS[relation]
    return f"to the {words}" if relation < 2 and rng.random() < 0.3 else words


def _relation(rng: Random, scene: Scene) -> Told:
    pairs = related_pairs(scene)
    if not pairs:
        return _kinds(rng, scene)
    first, relation, second, item, other = rng.choice(pairs)
    words = relation_words(rng, relation)
    if len(scene.objects) > 2 and rng.random() < 0.7:
        told = mentions(scene, rng)
        content = join([phrase.text for phrase in told])
        content = f"{content}, {first.definite} {words} {second.definite}"
        return picture(rng, content, _ground(rng, scene)), told
    if rng.random() < 0.25:
        first = Mention.of(item)
        second = Mention.of(other)
    content = f"{first.text} {words} {second.text}"
    complete = len(scene.objects) == 2
    return picture(rng, content, _ground(rng, scene), complete=complete), [first, second]


def _single(scene: Scene, rng: Random) -> list[tuple[Mention, Object]]:
    """Return one phrase for each object, in random order."""
    told = [(Mention.of(one), one) for one in scene.objects]
    rng.shuffle(told)
    return told


def _places(rng: Random, scene: Scene) -> Told:
    told = _single(scene, rng)
    content = join([f"{phrase.text} at the {ZONES[zone(i.x, i.y)]}" for phrase, i in told])
    return picture(rng, content, _ground(rng, scene)), [phrase for phrase, _ in told]


def _attributes(rng: Random, scene: Scene) -> Told:
    told = _single(scene, rng)
    texts = [
        f"{SHAPES[item.shape]}: {COLOURS[item.colour][0]}, {SIZES[item.size][0]}"
        for _, item in told
    ]
    text = "; ".join([*texts, f"background: {BACKGROUNDS[scene.background][0]}"])
    return text, [phrase for phrase, _ in told]


def _partial(rng: Random, scene: Scene) -> Told:
    told = mentions(scene, rng)
    if len(told) == 1:
        return _kinds(rng, scene)
    told = told[: 1 + int(rng.random() * (len(told) - 1))]
    content = join([phrase.text for phrase in told])
    return picture(rng, content, _ground(rng, scene), complete=False), told


_WEIGHTED: tuple[tuple[Callable[[Random, Scene], Told], float], ...] = (
    (_kinds, 0.12),
    # Weighs more than it shows: most scenes of few or like objects have no clear relation.
    (_relation, 0.32),
    (_mixed, 0.26),
    (_sized, 0.10),
    (_shapes, 0.06),
    (_places, 0.05),
    (_partial, 0.03),
    (_colours, 0.02),
    (_total, 0.01),
    (_attributes, 0.03),
)
_STYLES = [style for style, _ in _WEIGHTED]
_WEIGHTS = [weight for _, weight in _WEIGHTED]
_HARD = [{_relation: 2.0, _mixed: 1.0}.get(style, 0.0) for style in _STYLES]
