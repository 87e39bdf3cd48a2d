"""A run folder belongs to one recipe and one process, and says where it was made."""

import json
from dataclasses import dataclass, field

import pytest

from ddt_llama.config import UserError, load_json, save_json, to_dict
from ddt_llama.runs import MAY_CHANGE, MAY_GROW, Run, told_environment


@dataclass(frozen=True)
class Train:
    lr: float = 0.1
    steps: int = field(default=10, metadata=MAY_GROW)
    log_every: int = field(default=5, metadata=MAY_CHANGE)


@dataclass(frozen=True)
class Recipe:
    dim: int = 8
    train: Train = field(default_factory=Train)


@dataclass(frozen=True)
class Other:
    width: int = 8


def create(folder, config):
    with Run.create_or_resume(folder, config):
        pass


def test_a_new_folder_describes_itself(tmp_path):
    create(tmp_path / "deep" / "run", Recipe())
    folder = tmp_path / "deep" / "run"
    assert load_json(folder / "config.json") == to_dict(Recipe())
    environment = load_json(folder / "environment.json")
    assert {"python", "torch", "platform", "cpus", "commit", "command"} <= environment.keys()
    assert (folder / "samples").is_dir()
    create(folder, Recipe())
    assert len(load_json(folder / "environment.json")["resumed"]) == 1
    here = f"commit {environment['commit'] or 'unknown'} on {environment['gpu'] or 'a CPU'}"
    assert (
        told_environment(folder / "environment.json") == f"Started from {here} (environment.json)."
    )
    moved = {**load_json(folder / "environment.json"), "commit": "abc", "gpu": "H200"}
    save_json(folder / "environment.json", moved)
    both = f"Started from commit abc on H200, {here} (environment.json)."
    assert told_environment(folder / "environment.json") == both


def test_a_changed_recipe_is_refused_with_the_changed_fields(tmp_path):
    create(tmp_path / "run", Recipe())
    with pytest.raises(UserError) as error:
        create(tmp_path / "run", Recipe(dim=9, train=Train(lr=0.2, steps=11, log_every=1)))
    message = str(error.value)
    assert "dim was 8, now 9; train.lr was 0.1, now 0.2" in message
    assert "steps" not in message
    assert "log_every" not in message
    assert load_json(tmp_path / "run" / "config.json") == to_dict(Recipe())
    with pytest.raises(UserError, match="made by another recipe"):
        create(tmp_path / "run", Other())


def test_steps_may_grow_but_not_shrink(tmp_path):
    create(tmp_path / "run", Recipe(train=Train(steps=20)))
    with pytest.raises(UserError, match=r"train\.steps was 20, now 19"):
        create(tmp_path / "run", Recipe(train=Train(steps=19)))
    create(tmp_path / "run", Recipe(train=Train(steps=21, log_every=1)))
    assert load_json(tmp_path / "run" / "config.json")["train"]["steps"] == 21


def test_a_field_added_since_counts_as_its_default(tmp_path):
    create(tmp_path / "run", Recipe())
    path = tmp_path / "run" / "config.json"
    saved = load_json(path)
    del saved["train"]["lr"]
    path.write_text(json.dumps(saved))
    create(tmp_path / "run", Recipe())
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"train\.lr was 0\.1, now 0\.3"):
        create(tmp_path / "run", Recipe(train=Train(lr=0.3)))


def test_two_processes_cannot_share_a_folder(tmp_path):
    with (
        Run.create_or_resume(tmp_path / "run", Recipe()),
        pytest.raises(UserError, match="another process"),
    ):
        Run.create_or_resume(tmp_path / "run", Recipe())
    create(tmp_path / "run", Recipe())


def test_foreign_and_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty and not a run"):
        create(tmp_path / "photos", Recipe())
    assert not (tmp_path / "photos" / "config.json").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        create(tmp_path / "file" / "run", Recipe())


def test_metrics_after_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    with Run.create_or_resume(tmp_path / "run", Recipe()) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "loss": 1 / step})
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with Run.create_or_resume(tmp_path / "run", Recipe()) as run:
        assert run.resume() is None  # no checkpoint: everything is done again
        assert path.read_text() == ""
        run.log({"step": 1, "loss": float(1)})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 1.0}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Run.create_or_resume(tmp_path / "run", Recipe()) as run:
        run.board({"step": 3, "loss": 0.25})
        run.board({"step": 5, "loss": 0.125})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (3, 0.25),
        (5, 0.125),
    ]
