"""The shapes world as a source of training items: an index gives a scene with its texts.

No pictures are made here; the trainer renders the scenes of a batch in one call, on its device. An
item is a pure function of the source and the index, so any position in training can be repeated.
"""

from dataclasses import dataclass
from typing import Literal

from ddt_llama.shapes.captions import caption
from ddt_llama.shapes.edits import edit
from ddt_llama.shapes.questions import question
from ddt_llama.shapes.scene import Scene, Split, sample_scene

Task = Literal["scene", "caption", "question", "edit"]


@dataclass(frozen=True, slots=True)
class Item:
    """A scene with the texts of the source's task.

    text: caption, question or instruction, empty for the task "scene"; answer: of a question;
    target: the scene after an edit.
    """

    scene: Scene
    text: str = ""
    answer: str | None = None
    target: Scene | None = None


@dataclass(frozen=True)
class ShapesSource:
    """An endless source: `source[index]` for any index from 0 up, always the same.

    Sources of different tasks with one seed share their scenes. `grid` and `even` as in
    `sample_scene`.
    """

    seed: int = 0
    max_objects: int = 4
    split: Split = "train"
    task: Task = "caption"
    min_objects: int = 1
    grid: int | None = None
    even: bool = False

    def scene(self, index: int) -> Scene:
        """Return the scene of an item without its texts."""
        return sample_scene(
            self.seed,
            index,
            max_objects=self.max_objects,
            min_objects=self.min_objects,
            split=self.split,
            grid=self.grid,
            even=self.even,
        )

    def __getitem__(self, index: int) -> Item:
        """Return the item at an index."""
        scene = self.scene(index)
        if self.task == "caption":
            return Item(scene, caption(scene, self.seed, index))
        if self.task == "question":
            asked = question(scene, self.seed, index)
            return Item(scene, asked.question, answer=asked.answer)
        if self.task == "edit":
            # A new background is always possible and keeps the split, so an edit always exists.
            made = edit(
                scene,
                self.seed,
                index,
                heldout=self.split == "heldout",
                max_objects=self.max_objects,
            )
            assert made is not None
            return Item(scene, made.instruction, target=made.target)
        return Item(scene)
