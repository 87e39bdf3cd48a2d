"""Captions of scenes: what is in the picture, in several wordings, partial or complete.

A caption is a pure function of (scene, seed, index) and true of the scene: a number is the exact
number of such objects, a relation holds clearly, and what is left out is announced by the wording.
"""

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from random import Random

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


def caption(scene: Scene, seed: int, index: int) -> str:
    """Describe the scene in one phrase, worded as (seed, index) decides."""
    rng = generator(seed, index, 1)
    (style,) = rng.choices(_STYLES, _WEIGHTS)
    return style(rng, scene)


def description(scene: Scene) -> str:
    """Tell every object with size, colour, shape and place, in reading order, and the background.

    Each scene has one description, so that a model that writes it must have seen everything.
    """
    told = sorted((zone(item.x, item.y), item.x, item.y, item) for item in scene.objects)
    texts = [
        f"{Mention(1, item.shape, item.colour, item.size).text} at the {ZONES[place]}"
        for place, _, _, item in told
    ]
    return f"{', '.join(texts)}, on a {BACKGROUNDS[scene.background][0]} background"


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


def _kinds(rng: Random, scene: Scene) -> str:
    content = join([phrase.text for phrase in mentions(scene, rng)])
    return picture(rng, content, _ground(rng, scene))


def _sized(rng: Random, scene: Scene) -> str:
    content = join([phrase.text for phrase in mentions(scene, rng, size=True)])
    return picture(rng, content, _ground(rng, scene))


def _mixed(rng: Random, scene: Scene) -> str:
    """Leave the colour out, or say the size, here and there; only where that stays clear."""
    shapes = Counter(shape for shape, _ in {(item.shape, item.colour) for item in scene.objects})
    texts = []
    for phrase in mentions(scene, rng):
        sizes = {item.size for item in phrase.found(scene.objects)}
        shape = phrase.shape
        colour = None if shape is not None and shapes[shape] == 1 else phrase.colour
        colour = phrase.colour if rng.random() < 0.5 else colour
        size = sizes.pop() if len(sizes) == 1 and rng.random() < 0.4 else None
        texts.append(Mention(phrase.count, shape, colour, size).text)
    return picture(rng, join(texts), _ground(rng, scene))


def _shapes(rng: Random, scene: Scene) -> str:
    counts = Counter(item.shape for item in scene.objects)
    texts = [Mention(count, shape).text for shape, count in counts.items()]
    rng.shuffle(texts)
    return picture(rng, join(texts), _ground(rng, scene))


def _colours(rng: Random, scene: Scene) -> str:
    counts = Counter(item.colour for item in scene.objects)
    texts = [Mention(count, None, colour).text for colour, count in counts.items()]
    rng.shuffle(texts)
    return picture(rng, join(texts), _ground(rng, scene))


def _total(rng: Random, scene: Scene) -> str:
    return picture(rng, Mention(len(scene.objects)).text, scene.background)


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


def _relation(rng: Random, scene: Scene) -> str:
    pairs = related_pairs(scene)
    if not pairs:
        return _kinds(rng, scene)
    first, relation, second, item, other = rng.choice(pairs)
    words = relation_words(rng, relation)
    if len(scene.objects) > 2 and rng.random() < 0.7:
        content = join([phrase.text for phrase in mentions(scene, rng)])
        content = f"{content}, {first.definite} {words} {second.definite}"
        return picture(rng, content, _ground(rng, scene))
    if rng.random() < 0.25:
        first = Mention(1, item.shape, item.colour, item.size)
        second = Mention(1, other.shape, other.colour, other.size)
    content = f"{first.text} {words} {second.text}"
    complete = len(scene.objects) == 2
    return picture(rng, content, _ground(rng, scene), complete=complete)


def _places(rng: Random, scene: Scene) -> str:
    phrases = [Mention(1, item.shape, item.colour, item.size) for item in scene.objects]
    texts = [
        f"{phrase.text} at the {ZONES[zone(item.x, item.y)]}"
        for phrase, item in zip(phrases, scene.objects, strict=True)
    ]
    rng.shuffle(texts)
    return picture(rng, join(texts), _ground(rng, scene))


def _attributes(rng: Random, scene: Scene) -> str:
    texts = [
        f"{SHAPES[item.shape]}: {COLOURS[item.colour][0]}, {SIZES[item.size][0]}"
        for item in scene.objects
    ]
    rng.shuffle(texts)
    return "; ".join([*texts, f"background: {BACKGROUNDS[scene.background][0]}"])


def _partial(rng: Random, scene: Scene) -> str:
    phrases = mentions(scene, rng)
    if len(phrases) == 1:
        return _kinds(rng, scene)
    kept = phrases[: 1 + int(rng.random() * (len(phrases) - 1))]
    content = join([phrase.text for phrase in kept])
    return picture(rng, content, _ground(rng, scene), complete=False)


_WEIGHTED: tuple[tuple[Callable[[Random, Scene], str], float], ...] = (
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
