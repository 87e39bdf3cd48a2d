"""Prompts for evaluation: six categories as in GenEval, an edit suite and a question suite.

What a prompt demands is a `Requirement` on the scene that the verifier reads from the picture. The
colour, shape and count combinations asked for never occur in training. "tuning" prompts serve to
choose sampling settings and share no demand with "test". Source of the categories: GenEval (Ghosh
et al., 2023); its object classes are shapes here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from random import Random
from typing import Literal

from ddt_llama.config import UserError
from ddt_llama.shapes.edits import EDIT_KINDS, Edit, edit
from ddt_llama.shapes.questions import QUESTION_KINDS, Question, question
from ddt_llama.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    generator,
    is_heldout_group,
    sample_scene,
)
from ddt_llama.shapes.words import OPPOSITE, RELATIONS, Mention, article, holds, join

Category = Literal["single", "two", "counting", "colours", "position", "attribute"]
CATEGORIES: tuple[Category, ...] = (
    "single",
    "two",
    "counting",
    "colours",
    "position",
    "attribute",
)
Use = Literal["test", "tuning"]

# The largest number of objects of a kind that a counting prompt asks for: nano trains up to four.
_MOST = 4
_TUNING_SHARE = 0.2
# Scenes of the suites come from seeds that no training run is likely to use.
_SUITE_SEED = {"test": 0x7E57_0000_0000, "tuning": 0x70E5_0000_0000}
_FRAMES = ("{}", "a picture of {}", "an image of {}")
_SIZED = (None, *range(len(SIZES)))
_GROUNDED = (None, *range(len(BACKGROUNDS)))


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a prompt demands of a scene.

    Each want must be there at least `count` times, exactly so where `exact`; the background, where
    given, must be that one; every object of the first want must stand in `relation` (index into
    RELATIONS) to every object of the second. Other objects do no harm, as in GenEval.
    """

    wants: tuple[Mention, ...]
    exact: bool = False
    relation: int | None = None
    background: int | None = None

    @property
    def canonical(self) -> "Requirement":
        """The same demand in one of its two wordings: "B right of A" is "A left of B"."""
        relation = None if self.relation is None else OPPOSITE[self.relation]
        return min(self, replace(self, wants=self.wants[::-1], relation=relation), key=repr)

    def satisfied(self, scene: Scene | None) -> bool:
        """Say whether the scene is what the prompt asks for; an unreadable picture (None) is not.

        Two wants are never met by one object.
        """
        if scene is None or self.background not in (None, scene.background):
            return False
        found = [want.found(scene.objects) for want in self.wants]
        for want, items in zip(self.wants, found, strict=True):
            if len(items) < want.count or (self.exact and len(items) != want.count):
                return False
        distinct = {id(item) for items in found for item in items}
        if len(distinct) < sum(want.count for want in self.wants):
            return False
        return self.relation is None or all(
            holds(self.relation, item, other) for item in found[0] for other in found[1]
        )


def heldout_prompts(
    category: str, count: int, seed: int, *, use: Use = "test"
) -> list[tuple[str, Requirement]]:
    """Return `count` different prompts of a category with what each demands.

    The wording is that of training captions. In every category but "single", whose objects have no
    colour, the prompt asks for a colour-shape-count combination held out of training. Raises
    UserError for an unknown category or more prompts than there are.
    """
    if category not in CATEGORIES:
        raise UserError(
            f"category {category!r} given; allowed are {', '.join(CATEGORIES)}; choose one of them"
        )
    demands = list(_demands(category, use))
    rng = generator(seed, list(_EVERY).index(category), 4)
    rng.shuffle(demands)
    frames = [rng.sample(_FRAMES, len(_FRAMES)) for _ in demands]
    prompts = [
        (_word(order[turn], demand), demand)
        for turn in range(len(_FRAMES))
        for demand, order in zip(demands, frames, strict=True)
    ]
    if not 0 <= count <= len(prompts):
        raise UserError(
            f"{count} prompts of category {category!r} asked for; there are {len(prompts)} "
            f"for {use}; ask for at most that many"
        )
    return prompts[:count]


def _word(frame: str, demand: Requirement) -> str:
    texts = [want.text for want in demand.wants]
    if demand.relation is not None:
        content = f"{texts[0]} {RELATIONS[demand.relation]} {texts[1]}"
    else:
        content = join(texts)
    prompt = frame.format(content)
    if demand.background is None:
        return prompt
    name = BACKGROUNDS[demand.background][0]
    return f"{prompt} on {article(name)} {name} background"


@cache
def _demands(category: str, use: Use) -> tuple[Requirement, ...]:
    """Return the demands of a category; a fixed fifth of them, in all wordings, is for tuning."""
    wordings: dict[Requirement, list[Requirement]] = {}
    for demand in dict.fromkeys(_EVERY[category]()):
        wordings.setdefault(demand.canonical, []).append(demand)
    everything = list(wordings.values())
    Random(list(_EVERY).index(category)).shuffle(everything)
    cut = round(_TUNING_SHARE * len(everything))
    chosen = everything[:cut] if use == "tuning" else everything[cut:]
    return tuple(demand for words in chosen for demand in words)


def _heldout_pairs(count: int) -> list[tuple[int, int]]:
    """Return the (shape, colour) pairs of which exactly `count` never occur in training."""
    pairs = product(range(len(SHAPES)), range(len(COLOURS)))
    return [(s, c) for s, c in pairs if is_heldout_group(c, s, count)]


def _single() -> Iterator[Requirement]:
    for shape, size, ground in product(range(len(SHAPES)), _SIZED, _GROUNDED):
        yield Requirement((Mention(1, shape, None, size),), background=ground)


def _two() -> Iterator[Requirement]:
    for (shape, colour), other, ground in product(_heldout_pairs(1), range(len(SHAPES)), _GROUNDED):
        if other != shape:
            wants = Mention(1, shape, colour), Mention(1, other)
            yield Requirement(wants, background=ground)
            yield Requirement(wants[::-1], background=ground)


def _counting() -> Iterator[Requirement]:
    for count in range(2, _MOST + 1):
        for (shape, colour), ground in product(_heldout_pairs(count), _GROUNDED):
            yield Requirement((Mention(count, shape, colour),), exact=True, background=ground)


def _colours() -> Iterator[Requirement]:
    for (shape, colour), size, ground in product(_heldout_pairs(1), _SIZED, _GROUNDED):
        yield Requirement((Mention(1, shape, colour, size),), background=ground)


def _position() -> Iterator[Requirement]:
    for first, second in _ordered_pairs():
        for relation in range(len(RELATIONS)):
            yield Requirement((Mention(1, *first), Mention(1, *second)), relation=relation)


def _ordered_pairs() -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for held in _heldout_pairs(1):
        for other in product(range(len(SHAPES)), range(len(COLOURS))):
            if other[0] != held[0] and other[1] != held[1]:
                yield held, other
                yield other, held


def _attribute() -> Iterator[Requirement]:
    """Two objects that differ in colour and shape; in half of the demands in size, too.

    Pairs come in twos, the held-out object first and last: both of a two get the same sizes.
    """
    for number, (first, second) in enumerate(_ordered_pairs()):
        sizes = ((None, None), (0, 1), (None, None), (1, 0))[number // 2 % 4]
        wants = Mention(1, *first, sizes[0]), Mention(1, *second, sizes[1])
        yield Requirement(wants)


_EVERY: dict[str, Callable[[], Iterator[Requirement]]] = {
    "single": _single,
    "two": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "attribute": _attribute,
}


MOST = 4  # objects of a scene to edit or to ask about


def edit_suite(count: int, seed: int, *, use: Use = "test") -> list[Edit]:
    """Return `count` edits, all kinds in turn; every second round ends in a held-out combination.

    Moving, resizing and a new background change no combination: in those rounds their source holds
    one already.
    """
    suite: list[Edit] = []
    index = 0
    base = _SUITE_SEED[use] + seed
    while len(suite) < count:
        kind = EDIT_KINDS[len(suite) % len(EDIT_KINDS)]
        heldout = (len(suite) // len(EDIT_KINDS)) % 2 == 1
        keeps = kind in ("move", "resize", "background")
        split: Split = "heldout" if heldout and keeps else "train"
        scene = sample_scene(base, index, max_objects=MOST, split=split)
        made = edit(scene, base, index, kind=kind, heldout=heldout, max_objects=MOST)
        if made is not None:
            suite.append(made)
        index += 1
    return suite


def question_suite(count: int, seed: int, *, use: Use = "test") -> list[tuple[Scene, Question]]:
    """Return `count` scenes with a question each, all kinds in turn.

    Every second round asks about scenes that hold a combination kept out of training.
    """
    suite: list[tuple[Scene, Question]] = []
    index = 0
    base = _SUITE_SEED[use] + seed
    while len(suite) < count:
        kind = QUESTION_KINDS[len(suite) % len(QUESTION_KINDS)]
        held = (len(suite) // len(QUESTION_KINDS)) % 2 == 1
        split: Split = "heldout" if held else "train"
        scene = sample_scene(base, index, max_objects=MOST, split=split)
        asked = question(scene, base, index, kind)
        if asked.kind == kind:
            suite.append((scene, asked))
        index += 1
    return suite
