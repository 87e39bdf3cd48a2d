"""Encoding by two processes of a local Ray cluster, one of which is killed on the way."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_pipeline import Pipeline, pictures

from ddt_llama.cli import main
from ddt_llama.config import UserError
from ddt_llama.data.codes import Shard
from ddt_llama.recipes.cluster import on_ray
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.encode import Advance, ShardEncoder, encode_pictures
from ddt_llama.shapes.render import render
from ddt_llama.shapes.world import ShapesSource

ray = pytest.importorskip("ray")
# Ray warns of its own settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _two_cores() -> Iterator[None]:
    """Two processes whatever this machine has; the first `on_ray` would start a cluster."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    source = ShapesSource(seed=0)
    from ddt_llama.data.images import to_pil

    for number, picture in enumerate(to_pil(render([source.scene(i) for i in range(240)], 64))):
        picture.save(folder / f"{number:03}.png")
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def encoders() -> list[Any]:
    """Return the processes that encode."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if "RemoteEncoder" in " ".join(one.cmdline())]


def test_a_killed_process_loses_nothing(scenes: Path, tmp_path: Path) -> None:
    data = DataConfig((str(scenes),))
    alone = encode_pictures("nano", data, tmp_path / "alone", shard_rows=20)
    killed: list[int] = []

    def unlucky(encoder: ShardEncoder, numbers: Sequence[int], advance: Advance) -> Iterator[Shard]:
        for shard in on_ray(encoder, numbers, advance):
            if not killed:
                killed.append(encoders()[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            yield shard

    done = encode_pictures("nano", data, tmp_path / "shared", shard_rows=20, engine=unlucky)
    assert killed
    assert (done.rows, done.skipped) == (alone.rows, 0) == (240, 0)
    assert shards(tmp_path / "shared") == shards(tmp_path / "alone")
    assert len(shards(tmp_path / "shared")) == 12


def test_the_command_says_what_a_process_could_not_do(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = pictures(tmp_path / "data"), tmp_path / "codes"
    command = ["encode", str(pipeline.tokenizer), str(data), str(out), "--engine", "ray"]
    (data / "broken.png").write_bytes(b"nothing")
    assert main([*command, "--shard-rows", "2"]) == 0
    assert f"{out}: codes of 6 rows, 1 skipped" in capsys.readouterr().out
    assert len(shards(out)) == 3  # the fourth has no row
    assert main([*command, "--shard-rows", "2"]) == 0  # there is nothing left to share out


def test_a_mistake_of_a_process_is_one_line(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures(tmp_path / "data")

    def elsewhere(
        encoder: ShardEncoder, numbers: Sequence[int], advance: Advance
    ) -> Iterator[Shard]:
        data.rename(tmp_path / "gone")
        return on_ray(encoder, numbers, advance)

    model = str(pipeline.tokenizer / "release")
    with pytest.raises(UserError, match="data does not exist"):
        encode_pictures(model, DataConfig((str(data),)), tmp_path / "out", engine=elsewhere)
