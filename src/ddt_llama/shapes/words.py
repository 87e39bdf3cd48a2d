"""The English of the shapes world: noun phrases, lists, places and relations.

Captions, questions, edits and evaluation prompts are all worded from these few functions, so what
a model is asked at evaluation is worded like what it read in training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import hypot
from random import Random

from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = (1, 0, 3, 2)
ZONES = (
    *("top left", "top", "top right"),
    *("left", "middle", "right"),
    *("bottom left", "bottom", "bottom right"),
)
# Edges of the middle column and row of ZONES.
ZONE_EDGES = (0.38, 0.62)
# Offsets along an axis below this say nothing: the relation neither holds nor is described.
RELATION_OFFSET = 0.10


@dataclass(frozen=True, slots=True)
class Mention:
    """A noun phrase: how many objects of what shape, colour and size; None leaves a word out."""

    count: int = 1
    shape: int | None = None
    colour: int | None = None
    size: int | None = None

    @staticmethod
    def of(item: Object) -> "Mention":
        """Return the phrase that tells all looks of one object."""
        return Mention(1, item.shape, item.colour, item.size)

    def fits(self, item: Object) -> bool:
        """Say whether the object is one of those the phrase speaks of."""
        return (
            self.shape in (None, item.shape)
            and self.colour in (None, item.colour)
            and self.size in (None, item.size)
        )

    def found(self, objects: Iterable[Object]) -> list[Object]:
        """Return the objects that the phrase speaks of."""
        return [item for item in objects if self.fits(item)]

    @property
    def bare(self) -> str:
        """The phrase without number or article: "small red circles"."""
        words = [] if self.size is None else [SIZES[self.size][0]]
        words += [] if self.colour is None else [COLOURS[self.colour][0]]
        noun = "shape" if self.shape is None else SHAPES[self.shape]
        ending = "" if self.count == 1 else "es" if noun.endswith("s") else "s"
        return " ".join([*words, noun + ending])

    @property
    def text(self) -> str:
        """The phrase with number or article: "three small red circles", "an orange star"."""
        if self.count == 1:
            return f"{article(self.bare)} {self.bare}"
        return f"{NUMBERS[self.count]} {self.bare}"

    @property
    def definite(self) -> str:
        """The phrase with the definite article: "the red circle"."""
        return f"the {self.bare}"


def article(phrase: str) -> str:
    """Return "a" or "an", as the phrase needs."""
    return "an" if phrase[0] in "aeiou" else "a"


def join(phrases: Sequence[str]) -> str:
    """Join phrases with commas and one "and"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def holds(relation: int, item: Object, other: Object) -> bool:
    """Say whether `item` stands in the relation (index into RELATIONS) to `other`.

    As in GenEval the direction must lie within 60 degrees of the axis, so an object can be both
    left of and above another; an offset below RELATION_OFFSET is no relation.
    """
    dx, dy = other.x - item.x, other.y - item.y
    along = (dx, -dx, dy, -dy)[relation]
    return along >= RELATION_OFFSET and along > 0.5 * hypot(dx, dy)


def clear_relation(item: Object, other: Object) -> int | None:
    """Return the relation that describes the pair best, None where the axis is not clear."""
    dx, dy = other.x - item.x, other.y - item.y
    across, along = sorted((abs(dx), abs(dy)))
    if along < 0.15 or along < 1.2 * across:
        return None
    if along == abs(dx):
        return 0 if dx > 0 else 1
    return 2 if dy > 0 else 3


def zone(x: float, y: float) -> int:
    """Return the zone (index into ZONES) of a point."""
    low, high = ZONE_EDGES
    return 3 * ((y >= low) + (y >= high)) + (x >= low) + (x >= high)


def referents(scene: Scene, item: Object) -> list[Mention]:
    """Return every phrase that speaks of this object and of no other in the scene."""
    phrases = [
        Mention(1, item.shape, item.colour),
        Mention(1, item.shape),
        Mention.of(item),
        Mention(1, item.shape, None, item.size),
    ]
    return [phrase for phrase in phrases if len(phrase.found(scene.objects)) == 1]


def refer(rng: Random, scene: Scene, item: Object) -> Mention | None:
    """Choose a phrase for the object, colour and shape in most cases; None where none is clear."""
    phrases = referents(scene, item)
    if not phrases:
        return None
    return phrases[0] if rng.random() < 0.7 else rng.choice(phrases)


def picture(rng: Random, content: str, background: int | None, *, complete: bool = True) -> str:
    """Word a caption around its content, with the background where one is given.

    Captions that leave objects out say so by their wording ("a picture with ...", "among others").
    """
    if complete:
        frame = rng.choice(("{}", "{}", "{}", "a picture of {}", "an image of {}"))
    else:
        frame = rng.choice(("a picture with {}", "an image that contains {}", "{} among others"))
    if background is None:
        return frame.format(content)
    name = BACKGROUNDS[background][0]
    ground = f"{article(name)} {name} background"
    if complete and rng.random() < 0.15:
        return f"{ground} with {content}"
    return f"{frame.format(content)} on {ground}"
