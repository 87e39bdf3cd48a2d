"""The source of training items: endless, repeatable, lazy about pictures."""

from itertools import pairwise

import pytest

from ddt_llama.shapes.scene import Scene, is_heldout
from ddt_llama.shapes.world import Item, ShapesSource


@pytest.mark.parametrize("task", ["scene", "caption", "question", "edit"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_items_are_pure_functions_of_the_index(task: str, split: str):
    source = ShapesSource(seed=4, max_objects=4, split=split, task=task)
    items = [source[i] for i in range(60)]
    assert items == [ShapesSource(4, 4, split, task)[i] for i in range(60)]
    assert all(a.scene != b.scene for a, b in pairwise(items))
    for i, item in enumerate(items):
        assert item.scene == source.scene(i)
        assert 1 <= len(item.scene.objects) <= 4
        assert is_heldout(item.scene) == (split == "heldout")
        assert bool(item.text) == (task != "scene")
        assert (item.answer is not None) == (task == "question")
        if isinstance(item.target, Scene):
            assert is_heldout(item.target) == (split == "heldout")
            assert item.target != item.scene
            assert len(item.target.objects) <= 4
        assert (item.target is not None) == (task == "edit")


def test_tasks_of_one_seed_share_their_scenes_and_seeds_do_not():
    captions, questions = ShapesSource(1, task="caption"), ShapesSource(1, task="question")
    assert captions[5].scene == questions[5].scene
    assert captions[5].scene != ShapesSource(2)[5].scene
    assert isinstance(captions[10**12], Item)
