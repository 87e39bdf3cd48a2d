"""The one command that trains everything, on a folder of pictures, as README has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import LANGUAGE, TOKENIZER, pictures

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.recipes import LanguageRecipe, Recipe
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "speedrun.sh"


@pytest.mark.slow
def test_the_one_command_trains_everything_on_a_folder_of_pictures(tmp_path: Path) -> None:
    data, runs = tmp_path / "my pictures", tmp_path / "runs"
    pictures(data)
    settings = {
        "RUNS": str(runs),
        "PROCESSES": "1",
        "TOKENIZER": " ".join(["--steps 3", *TOKENIZER]),
        "PRETRAIN": " ".join(["--steps 2", *LANGUAGE]),
        "INSTRUCT": " ".join(["--steps 2", *LANGUAGE]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }

    def speedrun(**more: str) -> str:
        done = subprocess.run(
            ["sh", str(SCRIPT), "--data", str(data)],
            env=os.environ | settings | more,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "call again to go on" in speedrun(MINUTES="0.0001")
    assert not list(runs.glob("*/FINISHED"))
    assert "the model:" in speedrun()
    assert len(list(runs.glob("drawn*.png"))) == 4
    model = ddt_llama.load(runs / "nano")
    assert model.tokenizer.num_tokens == 8
    assert model.draw(["a plain picture"])[0].size == (64, 64)
    trained = (runs / "instruct" / "FINISHED").stat().st_mtime_ns
    shutil.rmtree(runs / "codes")
    (runs / "codes").mkdir()  # as a kill may leave it
    assert "the model:" in speedrun()
    assert (runs / "codes" / "config.json").is_file()
    assert (runs / "instruct" / "FINISHED").stat().st_mtime_ns == trained


# Each command as a line of JSON; a run that is trained has a marker of its own.
RECORDER = """#!/usr/bin/env python
import json, os, pathlib, sys
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if "--out" in sys.argv and sys.argv[1] == "train":
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    out.mkdir(parents=True)
    (out / "FINISHED").touch()
"""


SMALL = ["tokenizer", "pretrain", "instruct"]
NANO = ["coarse", "tokenizer", "decoder", "words", "pretrain", "instruct", "finish", "polish"]


@pytest.mark.parametrize(
    ("size", "tokens", "stages"),
    [
        ("nano", "timestep", NANO),
        ("nano", "spatial", NANO),
        ("small", "timestep", SMALL),
        ("small", "spatial", SMALL),
    ],
)
def test_stages_follow_each_other_with_fields_that_recipes_have(
    size: str, tokens: str, stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without an environment beside it the script takes `ddt` from the path: here one that records.
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "scripts")
    recorder = tmp_path / "bin" / "ddt"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    for pack in ("emoji64", "natural64", "edit64"):
        (tmp_path / "my data" / pack).mkdir(parents=True)
    settings = {
        "SIZE": size,
        "TOKENS": tokens,
        "RUNS": str(tmp_path / "runs"),
        "DDT_DATA": str(tmp_path / "my data"),
        "RECORD": str(tmp_path / "record"),
        "PROCESSES": "1",
        "INSTRUCT": "--steps 7",
        "PATH": os.pathsep.join(
            [str(recorder.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    }
    subprocess.run(["sh", script], env=os.environ | settings, check=True, timeout=60)

    commands = [json.loads(line) for line in Path(settings["RECORD"]).read_text().splitlines()]
    lessons = [command for command in commands if command[0] == "train"]
    words = next(place for place, command in enumerate(commands) if "--tokenizer" in command)
    assert [command[0] for command in commands[-2:]] == ["publish", "draw"]
    assert len(commands) == len(lessons) + 3
    # The language model learns the codes of the release, whose weights have few bits.
    published = ["publish", stages[words - 2], "codes", "--bits", "8"]
    assert [Path(part).name for part in commands[words - 1]] == published
    trained: dict[str, Recipe] = {}

    def keep(recipe: Recipe, folder: Path) -> int:
        trained[folder.name] = recipe
        return 0

    monkeypatch.setattr("ddt_llama.cli.training.train_and_tell", keep)
    for command in lessons:
        assert main(command) == 0
    assert list(trained) == stages
    last = None
    for name, recipe in trained.items():
        recipe.data.check()
        begins = [recipe.start] + ([recipe.tokenizer] if isinstance(recipe, LanguageRecipe) else [])
        assert last is None or last in [Path(one).name for one in begins if one]
        last = "codes" if name == stages[words - 2] else name
    assert trained["instruct"].train.steps == 7
    assert commands[-2][1] == str(tmp_path / "runs" / stages[-1])
    see, learn = trained["tokenizer"], trained["pretrain"]
    assert isinstance(see, SpatialRecipe) == (tokens == "spatial")
    assert isinstance(see, SpatialRecipe | TokenizerRecipe)
    assert isinstance(learn, LanguageRecipe)
    # An edit holds two pictures, its marks and its text.
    codes = see.build(begins=False).num_tokens
    assert learn.backbone.max_positions >= 2 * codes + learn.max_text + 8
    name = size if tokens == "timestep" else f"spatial-{size}"
    assert commands[-1][1] == commands[-2][2] == str(tmp_path / "runs" / name)
    if size == "small":
        assert len(trained["instruct"].data.paths) == len(trained["instruct"].data.weights) == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "no such folder"], "no such folder does not exist"),
        (["my_images"], "given my_images, allowed is --data"),
        (["--data"], "allowed is --data and one or more folders"),
    ],
)
def test_a_wrong_word_is_told_before_anything_is_trained(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = refused(arguments, tmp_path / "runs")
    assert told in done
    assert not (tmp_path / "runs").exists()


def test_runs_belong_to_one_set_of_pictures(tmp_path: Path) -> None:
    cats, dogs, runs = (tmp_path / name for name in ("cats", "dogs", "runs"))
    for folder in (cats, dogs, runs):
        folder.mkdir()
    (runs / "data").write_text(f"{cats}\n")
    assert f"was begun on {cats}; for other pictures" in refused(["--data", str(dogs)], runs)


def refused(arguments: list[str], runs: Path) -> str:
    """Return the one line in which the script refuses to begin, by exit code 2."""
    settings = {
        "RUNS": str(runs),
        "PROCESSES": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = ["sh", str(SCRIPT), *arguments]
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr
