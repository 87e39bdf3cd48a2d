"""Where does a model that plans and looks in words go wrong?

On tuning prompts, none of which is a prompt of the evaluation: the share of plans that are what the
prompt asks for, of drawings that are what was planned, and of drawings that obey, for several
numbers of tries; of the pictures in which the model read what it planned, the share that it read
rightly. On scenes: descriptions without an error, by the number of objects; questions answered, and
edits planned, from a right description alone, without the picture; edits drawn in one try where the
right result is told. Writes words.json, a flat file of figures.

    python scripts/words_study.py nano --out experiments/0015-same
"""

import re
from collections import defaultdict
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import flat, proportion
from ddt_llama.generation import Model, load
from ddt_llama.generation.tries import likeness
from ddt_llama.language import documents
from ddt_llama.shapes.captions import description, plan_of_edit
from ddt_llama.shapes.edits import EDIT_KINDS, edit
from ddt_llama.shapes.judge import change_done, rest_untouched
from ddt_llama.shapes.prompts import CATEGORIES, heldout_prompts, question_suite
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, sample_scene
from ddt_llama.shapes.verify import read
from ddt_llama.shapes.words import ZONES, zone

SEED = 0x70E5_5EED_0000  # of scenes on which nothing is trained
MIDDLES = (0.2, 0.5, 0.8)  # of the columns and rows of ZONES
OBJECT = re.compile(r"(\w+) (\w+) (\w+) ([a-z ]+)")
Outcomes = dict[str, list[bool]]


def told(text: str) -> Scene | None:
    """Return the scene that a description tells, objects in the middle of their zones.

    None for a text that is no description.
    """
    *parts, ground = text.split(", ")
    backgrounds, sizes, colours = (
        [name for name, _ in named] for named in (BACKGROUNDS, SIZES, COLOURS)
    )
    found = [OBJECT.fullmatch(part) for part in parts]
    background = re.fullmatch(r"(\w+) background", ground)
    try:
        objects = []
        for one in found:
            size, colour, shape, place = one.groups() if one else ("",) * 4
            row, column = divmod(ZONES.index(place), 3)
            kind = SHAPES.index(shape), colours.index(colour), sizes.index(size)
            objects.append(Object(*kind, MIDDLES[column], MIDDLES[row]))
        return Scene(backgrounds.index(background[1] if background else ""), tuple(objects))
    except ValueError:  # a word that names nothing
        return None


def alike(scene: Scene | None, other: Scene | None) -> bool:
    """Say whether two scenes have one description but for the order of words."""
    if scene is None or other is None or scene.background != other.background:
        return False
    first, second = (
        sorted((o.shape, o.colour, o.size, zone(o.x, o.y)) for o in one.objects)
        for one in (scene, other)
    )
    return first == second


def answers(model: Model, requests: list[documents.Document]) -> list[str]:
    """Return the most likely answer to each request for text."""
    return model.run(model.programs.texts(requests))


def drawing(model: Model, prompts: int, tries: tuple[int, ...]) -> Outcomes:
    """Plan, draw and read tuning prompts, two pictures each."""
    outcomes: Outcomes = defaultdict(list)
    for category in tqdm(CATEGORIES, "draw"):
        asked = heldout_prompts(category, prompts, SEED, use="tuning")
        texts, seeds = [text for text, _ in asked], list(range(0, 2 * prompts, 2))
        plans = model.plan(texts, num=2, seed=seeds)
        planned = [told(plan) for plan in plans]
        demands = [demand for _, demand in asked for _ in range(2)]
        right = [d.satisfied(scene) for d, scene in zip(demands, planned, strict=True)]
        outcomes[f"plan.{category}"] += right
        for most in tries:
            codes = model.draw_codes(texts, num=2, seed=seeds, tries=most)
            found = read(model.decode(codes, list(range(2 * prompts))))
            obeyed = [d.satisfied(scene) for d, scene in zip(demands, found, strict=True)]
            faithful = [alike(*pair) for pair in zip(found, planned, strict=True)]
            outcomes[f"obeyed.{category}.{most}"] += obeyed
            outcomes[f"obeyed.{most}"] += obeyed
            outcomes[f"faithful.{most}"] += faithful
            rows = model.tokenizer.to_language(codes).tolist()
            seen = answers(model, [documents.describe(row, None) for row in rows])
            accepted = [likeness(*pair) == 1 for pair in zip(seen, plans, strict=True)]
            outcomes[f"accepted.{most}"] += accepted
            outcomes[f"accepted_rightly.{most}"] += [
                ok for ok, passed in zip(faithful, accepted, strict=True) if passed
            ]
    return outcomes


def reading(model: Model, scenes: int) -> Outcomes:
    """Describe scenes of one to four objects."""
    outcomes: Outcomes = defaultdict(list)
    for number in tqdm(range(1, 5), "describe"):
        shown = [
            sample_scene(SEED, i, min_objects=number, max_objects=number, split="heldout")
            for i in range(scenes)
        ]
        said = model.describe_many(render(shown, model.tokenizer.image_size))
        outcomes[f"described.{number}"] += [
            text == description(scene) for text, scene in zip(said, shown, strict=True)
        ]
    return outcomes


def asking(model: Model, questions: int) -> Outcomes:
    """Ask about scenes that are described and not shown."""
    outcomes: Outcomes = defaultdict(list)
    asked = question_suite(questions, SEED, use="tuning")
    requests = [
        documents.plan(description(scene), description(scene), [(one.question, None)])
        for scene, one in asked
    ]
    found = [documents.conclusion(answer) for answer in answers(model, requests)]
    for (_, one), answer in zip(asked, found, strict=True):
        outcomes["answered"].append(answer == one.answer)
        outcomes[f"answered.{one.kind}"].append(answer == one.answer)
    return outcomes


def changing(model: Model, edits: int) -> Outcomes:
    """Plan edits of scenes that are described and not shown; draw them from the right plan."""
    outcomes: Outcomes = defaultdict(list)
    for kind in EDIT_KINDS:
        possible = (edit(sample_scene(SEED, i), SEED, i, kind=kind, max_objects=4) for i in count())
        made = list(islice((one for one in possible if one is not None), edits))
        there = [description(one.source) for one in made]
        changes = [
            documents.to_change(*pair)
            for pair in zip(there, [one.instruction for one in made], strict=True)
        ]
        wanted = answers(model, [documents.plan(change, None) for change in changes])
        results = [documents.changed(*pair) for pair in zip(there, wanted, strict=True)]
        outcomes[f"edit_plan.{kind}"] += [
            alike(told(result), told(description(one.target)))
            for result, one in zip(results, made, strict=True)
        ]
        asked = [documents.with_result(one.instruction, plan_of_edit(one)[1]) for one in made]
        sources = render([one.source for one in made], model.tokenizer.image_size)
        codes = model.edit_codes(sources, asked, seed=list(range(edits)), plan=False)
        found = read(model.decode(codes, list(range(edits))))
        drawn = [change_done(*p) and rest_untouched(*p) for p in zip(made, found, strict=True)]
        outcomes[f"edit_drawn.{kind}"] += drawn
        outcomes["edit_drawn"] += drawn
    return outcomes


def main(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    tries: tuple[int, ...] = (1, 2, 4, 8),
    prompts: int = 32,
    scenes: int = 128,
    questions: int = 600,
    edits: int = 64,
) -> None:
    """Measure all of it and write words.json; a model without `plan` is made to plan."""
    opened = load(model)
    opened.settings = replace(opened.settings, plan=True)
    outcomes = drawing(opened, prompts, tries) | reading(opened, scenes)
    outcomes |= asking(opened, questions) | changing(opened, edits)
    figures = {name: proportion(verdicts) for name, verdicts in outcomes.items() if verdicts}
    for name, figure in figures.items():
        print(f"{name:24} {figure.value:.3f}  ({figure.low:.3f} to {figure.high:.3f})")
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "words.json", flat(figures))


if __name__ == "__main__":
    tyro.cli(main)
