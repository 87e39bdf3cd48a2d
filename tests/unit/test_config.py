"""Configs survive JSON, are changed by dotted names, and refuse what they do not know."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from ddt_llama.config import (
    UserError,
    flatten,
    from_dict,
    load_json,
    override,
    save_json,
    show,
    to_dict,
)


@dataclass(frozen=True)
class Straight:
    pass


@dataclass(frozen=True)
class Curved:
    power: float = 2.0


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self):
        if self.lr < 0:
            raise UserError(f"lr: given {self.lr}, allowed is 0 or more")


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: int = 10
    fast: bool = False
    limit: int | None = 5
    optim: Optim = field(default_factory=Optim)
    path: Straight | Curved = field(default_factory=Straight)
    mixture: tuple[Optim, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps: given {self.steps}, allowed is 1 or more")


FULL = Recipe(
    "a",
    7,
    True,
    None,
    Optim(0.5, (0.1, 0.2), "muon"),
    Curved(3.0),
    (Optim(1.0), Optim(2.0)),
    {"x": 0.25},
)


@pytest.mark.parametrize("recipe", [Recipe("b"), FULL, replace(FULL, path=Straight())])
def test_json_and_back_is_the_identity(recipe, tmp_path):
    save_json(tmp_path / "deep" / "config.json", to_dict(recipe))
    assert from_dict(Recipe, load_json(tmp_path / "deep" / "config.json")) == recipe


def test_override_reads_strings_as_the_field_type():
    changed = override(
        Recipe("b"),
        {
            "optim.lr": "3e-4",
            "steps": "12",
            "fast": "true",
            "limit": "none",
            "optim.betas": "0.5,0.6",
            "optim.kind": "muon",
            "path": "Curved",
            "weights": '{"y": 2}',
        },
    )
    assert changed == Recipe(
        "b", 12, True, None, Optim(3e-4, (0.5, 0.6), "muon"), Curved(), (), {"y": 2.0}
    )
    assert override(changed, {"path.power": "4"}).path == Curved(4.0)
    assert override(changed, {"path.type": "Straight"}).path == Straight()
    straight = override(changed, {"path": "Straight"})
    for switch in ({"path": "Curved"}, {"path.type": "Curved"}):
        assert override(straight, {**switch, "path.power": "4"}).path == Curved(4.0)


def test_what_follows_the_name_of_a_table_is_one_key():
    changed = override(Recipe("b"), {"weights.decoder.*.image.*": "0.2", "weights.y": "2"})
    assert changed.weights == {"decoder.*.image.*": 0.2, "y": 2.0}
    assert flatten(changed)["weights.decoder.*.image.*"] == 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.lrr": "1"}, ["optim.lrr", "lr, betas, kind", "did you mean lr?"]),
        ({"optimm.lr": "1"}, ["optimm.lr", "did you mean optim?"]),
        ({"steps.lr": "1"}, ["steps.lr"]),
        ({"steps": "many"}, ["steps", "'many'", "integer"]),
        ({"steps": "0"}, ["steps", "1 or more"]),
        ({"optim.lr": "-1"}, ["optim.lr: given -1.0"]),
        ({"optim.kind": "sgd"}, ["optim.kind", "'adamw' or 'muon'"]),
        ({"optim.betas": "1,2,3"}, ["optim.betas"]),
        ({"path": "Round"}, ["path", "'Round'", "Straight, Curved"]),
        ({"limit": "x"}, ["limit"]),
        ({"path": "Curved", "path.powr": "1"}, ["path.powr", "did you mean power?"]),
        ({"weights.y": "many"}, ["weights"]),
    ],
)
def test_mistakes_name_the_field_and_the_choice(changes, words):
    with pytest.raises(UserError) as error:
        override(Recipe("b"), changes)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="missing name"):
        from_dict(Recipe, {"steps": 3})


def test_flatten_and_show_list_every_leaf():
    flat = flatten(FULL)
    assert flat["optim.betas"] == [0.1, 0.2]
    assert flat["path.type"] == "Curved"
    lines = show(FULL).splitlines()
    assert len(lines) == len(flat)
    assert "optim.lr" in show(FULL)


def test_json_files_are_all_or_nothing(tmp_path):
    target = tmp_path / "a.json"
    save_json(target, {"x": float("nan"), "y": [1.5, float("inf")]})
    assert load_json(target) == {"x": None, "y": [1.5, None]}
    with pytest.raises(TypeError):
        save_json(target, {"x": object()})
    assert load_json(target) == {"x": None, "y": [1.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_unreadable_json_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_json(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        load_json(tmp_path / "broken.json")
    with pytest.raises(UserError, match="cannot be written"):
        save_json(tmp_path / "broken.json" / "inside.json", {})
