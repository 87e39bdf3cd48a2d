"""The one command that trains everything, on a folder of pictures, as README has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import LANGUAGE, TOKENIZER, pictures

import ddt_llama

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
    assert "the model:" in speedrun()
    assert (runs / "instruct" / "FINISHED").stat().st_mtime_ns == trained
