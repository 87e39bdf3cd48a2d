"""A whole pipeline through the command line, small enough for seconds."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ddt_llama.cli import main

TOKENIZER = [
    "--tokenizer.num_tokens=8",
    "--tokenizer.quantizer.codebook_size=32",
    "--tokenizer.encoder.dim=32",
    "--tokenizer.encoder.depth=1",
    "--tokenizer.encoder.num_heads=2",
    "--tokenizer.decoder.dim=32",
    "--tokenizer.decoder.depth=1",
    "--tokenizer.decoder.num_heads=2",
    "--train.batch=4",
    "--train.prefetch=0",
    "--train.tensorboard=false",
]
LANGUAGE = [
    "--backbone.dim=32",
    "--backbone.depth=1",
    "--backbone.num_heads=2",
    "--backbone.num_kv_heads=2",
    "--backbone.mlp_dim=48",
    "--text_vocab=300",
    "--text_samples=200",
    "--train.batch=4",
    "--train.prefetch=0",
    "--train.tensorboard=false",
]


class Pipeline(NamedTuple):
    """The run folders of the three stages, and a picture."""

    tokenizer: Path
    pretrain: Path
    instruct: Path
    picture: Path


def train_all(place: Path, data: tuple[str, ...] = ()) -> Pipeline:
    """Train the three stages for three steps each."""
    runs = [place / name for name in ("tokenizer", "pretrain", "instruct")]
    given = ["--data", *data] if data else []
    commands = (
        ["nano_tokenizer", *TOKENIZER],
        ["nano_pretrain", "--tokenizer", str(runs[0]), *LANGUAGE],
        ["nano_instruct", "--start", str(runs[1]), *LANGUAGE],
    )
    for (recipe, *fields), run in zip(commands, runs, strict=True):
        assert main(["train", recipe, "--steps", "3", "--out", str(run), *given, *fields]) == 0
    picture = place / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    return Pipeline(*runs, picture)


def pictures(folder: Path) -> Path:
    """Make a folder of six captioned pictures."""
    folder.mkdir(parents=True)
    for number in range(6):
        Image.linear_gradient("L").rotate(60 * number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a plain picture number {number}")
    return folder
