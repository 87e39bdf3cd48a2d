"""The model that comes with the package: it opens without a network and does all it should."""

import glob
import socket
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.data.images import save_png
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import sample_scene
from ddt_llama.tokenizer import TimestepTokenizer

ROOT = Path(__file__).resolve().parents[2]
NANO = Path(str(files("ddt_llama"))) / "weights" / "nano"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_it_draws_edits_answers_and_describes(offline: None) -> None:
    model = ddt_llama.load("nano")
    (drawn,) = model.draw("a red circle on a white background", seed=1)
    (again,) = model.draw("a red circle on a white background", seed=1)
    assert drawn.tobytes() == again.tobytes()
    scene = sample_scene(9, 1)
    picture = render([scene], 64)
    (edited,) = model.edit(picture, "make the background black")
    assert edited.size == drawn.size == (64, 64)
    assert edited.tobytes() != drawn.tobytes()
    (rebuilt,) = model.reconstruct(picture)
    assert rebuilt.size == (64, 64)
    assert model.ask(picture[0], "how many shapes are there?")
    assert "background" in model.describe(picture[0])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_picture_decoded_in_company_is_that_decoded_alone_to_the_bit(steps: int) -> None:
    model = ddt_llama.load("nano")
    assert isinstance(model.tokenizer, TimestepTokenizer)
    model.tokenizer.add_renderer()
    codes = torch.randint(0, 16384, (5, 64), generator=torch.Generator().manual_seed(1))
    together = model.decode(codes, range(5), steps)
    for row in range(5):
        assert torch.equal(model.decode(codes[row : row + 1], [row], steps)[0], together[row])


def test_it_is_small_and_inside_the_package() -> None:
    found = [path for path in NANO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in found) < 20e6
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = NANO.parents[1]
    packed = {
        package / name
        for pattern in project["tool"]["setuptools"]["package-data"]["ddt_llama"]
        for name in glob.glob(pattern, root_dir=package, recursive=True)
    }
    assert packed >= set(found)


def test_small_is_in_the_repository_and_opens(offline: None, tmp_path: Path) -> None:
    folder = ROOT / "weights" / "small"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 60e6
    model = ddt_llama.load("small")
    assert model.draw("a noto style emoji of a horse face", plan=False)[0].size == (64, 64)


def test_a_drawing_may_be_planned_or_not(tmp_path: Path) -> None:
    pictures = {}
    for plan in ("yes", "no"):
        path = tmp_path / f"{plan}.png"
        command = ["draw", "nano", "a red circle", "--seed", "3", "--plan", plan]
        assert main([*command, "--tries", "1", "--out", str(path)]) == 0
        pictures[plan] = path.read_bytes()
    planned = ddt_llama.load("nano").draw("a red circle", seed=3, plan=True, tries=1)[0]
    save_png(planned, tmp_path / "planned.png")
    assert pictures["yes"] == (tmp_path / "planned.png").read_bytes() != pictures["no"]
