"""Every mistake that a user can make: one clear line, exit code 2, and nothing half-written."""

import importlib.util
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipeline import LANGUAGE, TOKENIZER, Pipeline

from ddt_llama.cli import VERBS, main, one_line, split_fields


class Bench:
    """A folder with what a case needs; says afterwards whether anything was written."""

    def __init__(self, pipeline: Pipeline, place: Path) -> None:
        self.place = place
        self.model, self.tokenizer = str(pipeline.instruct), str(pipeline.tokenizer)
        self.pretrain = str(pipeline.pretrain)
        self.picture = str(pipeline.picture)
        self.out = str(place / "out.png")

    def path(self, name: str) -> str:
        return str(self.place / name)

    def copy(self, run: str, name: str) -> Path:
        """Return a copy of a run's release, to be harmed."""
        return Path(shutil.copytree(Path(run) / "release", self.place / name))


@pytest.fixture
def bench(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)  # what has no --out would be written here
    return Bench(pipeline, tmp_path)


def files_under(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def refused(bench: Bench, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Run a command that must fail and return its one line."""
    before = files_under(bench.place)
    capsys.readouterr()
    assert main(list(command)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 1000
    assert "Traceback" not in said.err
    assert files_under(bench.place) == before
    return said.err


# What is typed (fields in braces are filled in) and what the line must say.
TYPED = {
    "unknown verb": ("drew nano x", "unknown verb 'drew'; the verbs are: draw"),
    "unknown recipe": ("train nano_tokeniser", "the recipes are: nano_tokenizer"),
    "unknown recipe shown": ("recipes paper", "the recipes are: nano_"),
    "unknown field": ("train nano_tokenizer --train.lr 1", "fields of train are: steps"),
    "unknown option": ("draw {model} x --nmu 3", "--nmu"),
    "wrong value of a field": ("train nano_tokenizer --train.batch many", "train.batch"),
    "wrong value of an option": ("draw {model} x --num many", "--num"),
    "missing argument": ("draw {model}", "PROMPT"),
    "unknown model": (
        "draw nanno x",
        "unknown model 'nanno': allowed are nano, small, a release folder or a hub name",
    ),
    "unknown suite": ("evaluate {model} --suite shape", "the suites are: reconstruction, shapes"),
    "unknown probe": (
        "probe shufle {model} --out {out}",
        "the probes are: shuffle, entropy, prefix",
    ),
    "nothing held out of a probe": (
        "probe shuffle {model} --held-out 0 --out {out}",
        "held_out: given 0 of 20000 pictures",
    ),
    "more held out than there is": (
        "probe shuffle {model} --pictures 10 --out {out}",
        "held_out: given 512 of 10 pictures",
    ),
    "one picture to swap with itself": ("probe swap {model} --scenes 1 --out {out}", "2 or more"),
    "a seed that no lesson takes": (
        "probe shuffle {model} --course.train.seed 1 --out {out}",
        "a probe takes its own: --seeds",
    ),
    "no groups": ("train spatial_nano --tokenizer.groups 0", "groups: given 0, allowed is 1"),
    "odd critic": (
        "train spatial_nano --objective.critic-widths 32,60",
        "multiples of 8",
    ),
    "no spread of weights": (
        "train nano_pretrain --tokenizer {model} --backbone.init-std 0",
        "init_std: given 0",
    ),
    "nothing to learn by": ("train lora --lora.rank 0", "lora.rank: given 0, allowed is 1 or more"),
    "a layer that is not there": (
        "train lora --start {model} --data {pictures} --lora.targets attn",
        "given 'attn', allowed for a llama model are attention, down_proj",
    ),
    "nothing to learn beside": ("train lora --start none", "give --start MODEL"),
    "no adapter there": ("draw {model} x --adapter {pictures}", "has no adapter_config.json"),
    "no room for an edit": (
        "train nano_pretrain --tokenizer {model} --backbone.max-positions 64",
        "given 64; a document of kind",
    ),
    "an option of other verbs": (
        "encode {model} {picture} {out} --num 3",
        "unknown option --num; allowed are --split, --batch, --shard-rows, --engine and fields",
    ),
    "fields of no data": (
        "evaluate {model} --suite reconstruction --data.fit pad",
        "data.fit: no data are given; add --data PATH",
    ),
    "no such data to compare on": (
        "compare {model} --data nowhere --out {out}",
        "nowhere does not exist",
    ),
    "no model to probe": ("probe shuffle --out {out}", "no model was given"),
    "one model twice": ("probe shuffle {model} {model} --out {out}", "two models are named"),
    "probe into a folder of other things": (
        "probe shuffle {model} --out {pictures}",
        "exists and is no probe",
    ),
    "a probe of text without text": ("probe synergy {tokenizer} --out {out}", "needs text"),
    "another one": ("probe scaling {model} {tokenizer} --out {out}", "needs text"),
    "a tokenizer for other programs": ("export {tokenizer} {out}", "give a model with one"),
    "exporting into a folder of other things": (
        "export {model} {pictures}",
        "exists and is no exported model",
    ),
    "a format of no program": ("export {model} {out} --format gguf", "--format"),
    "nothing to compare": ("compare --out {out}", "no model was given"),
    "comparing into a folder of other things": (
        "compare {model} --out {pictures}",
        "exists and is no",
    ),
    "text without a language model": ("evaluate {tokenizer} --suite text", "language model"),
    "unknown field of a suite": ("evaluate {model} --suite shapes --promts 3", "prompts"),
    "no question": ("ask {model} {picture} ''", "the question is empty"),
    "empty prompt": ("draw {model} '' --out {out}", "the prompt is empty"),
    "blank prompt": ("draw {model} '  ' --out {out}", "the prompt is empty"),
    "steps = 0": ("draw {model} x --steps 0 --out {out}", "steps is 0"),
    "steps = 0 again": ("reconstruct {model} {picture} --steps 0 --out {out}", "steps is 0"),
    "guidance < 0": ("draw {model} x --guidance-scale -1 --out {out}", "guidance_scale is -1.0"),
    "guidance nan": ("draw {model} x --guidance-scale nan --out {out}", "guidance_scale is nan"),
    "seed < 0": ("draw {model} x --seed -1 --out {out}", "seed is -1"),
    "seed too large": ("draw {model} x --seed 9223372036854775808 --out {out}", "seed is 92233"),
    "seed of a rebuild": ("reconstruct {model} {picture} --seed -1 --out {out}", "seed is -1"),
    "no picture asked for": ("draw {model} x --num 0 --out {out}", "num is 0"),
    "temperature 0": ("draw {model} x --temperature 0 --out {out}", "temperature is 0"),
    "top_k 0": ("draw {model} x --top-k 0 --out {out}", "top_k is 0"),
    "too many visible": ("reconstruct {model} {picture} --visible 99 --out {out}", "visible is 99"),
    "no image": ("reconstruct {model} --out {out}", "no image was given"),
    "absent image": ("describe {model} nothing.png", "no such file"),
    "output of another kind": ("draw {model} x --out {out}.bmp", "names that end in .png"),
    "output under a file": ("draw {model} x --out {picture}/drawn.png", "is a file"),
    "folder as output": ("draw {model} x --out {folder}.png", "is a folder"),
    "run under a file": ("train nano_tokenizer --out {picture}/run", "is a file"),
    "json under a file": (
        "evaluate {model} --suite shapes --json {picture}/figures.json",
        "is a file",
    ),
    "page under a file": ("demo --model {model} --out {picture}/demo", "is a file"),
    "codes into pictures": ("encode {model} {pictures} {pictures}", "holds other things"),
    "shards of no row": ("encode {model} {pictures} {out} --shard-rows 0", "shard_rows: given 0"),
    "batches of no row": ("encode {model} {pictures} {out} --batch 0", "batch: given 0"),
    "drawing without language": ("draw {tokenizer} x --out {out}", "without a language model"),
    "editing before instructions": ("edit {pretrain} {picture} x --out {out}", "cannot edit"),
    "asking before instructions": ("ask {pretrain} {picture} x", "cannot ask"),
    "absent data": ("train nano_tokenizer --data nowhere --out {out}", "nowhere does not exist"),
    "absent tokenizer": (
        "train nano_pretrain --tokenizer nowhere --out {out}",
        "nowhere is no run or release",
    ),
    "absent start": ("train nano_instruct --start nowhere --out {out}", "nowhere is no run"),
    "no start": ("train nano_instruct --start none --out {out}", "start"),
    "absent run": ("report nowhere", "no metrics.jsonl"),
    "absent pictures": ("demo --model {model} --images nowhere --out {out}", "is no folder"),
    "seed of a training": (
        "train nano_tokenizer --train.seed 18446744073709551616 --out {out}",
        "seed: given 18446744073709551616",
    ),
    "seed of a suite": (
        "evaluate {model} --suite reconstruction --seed 18446744073709551616",
        "seed is 18446744073709551616",
    ),
    "seed of another suite": ("evaluate {model} --suite shapes --seed -1", "seed is -1"),
    "empty instruction": ("edit {model} {picture} '' --out {out}", "the instruction is empty"),
    "edit in no steps": ("edit {model} {picture} x --steps 0 --out {out}", "steps is 0"),
    "edit against guidance": (
        "edit {model} {picture} x --guidance-scale -1 --out {out}",
        "guidance_scale is -1.0",
    ),
    "edit with a seed < 0": ("edit {model} {picture} x --seed -1 --out {out}", "seed is -1"),
    "edit under a file": ("edit {model} {picture} x --out {picture}/a.png", "is a file"),
    "rebuild under a file": ("reconstruct {model} {picture} --out {picture}/a", "is a file"),
    "codes under a file": ("encode {model} {folder} {picture}/codes", "is a file"),
    "a split that is not there": (
        "evaluate {model} --suite reconstruction --data {pictures} --split test",
        "not divided into splits",
    ),
    "no steps of training": ("train nano_tokenizer --steps 0 --out {out}", "steps: given 0"),
    "a suite in no steps": ("evaluate {model} --suite shapes --steps 0", "steps is 0"),
    "a suite of pictures against guidance": (
        "evaluate {model} --suite reconstruction --guidance-scale -1",
        "guidance_scale is -1.0",
    ),
    "a suite against guidance": (
        "evaluate {model} --suite shapes --guidance-scale -1",
        "guidance_scale is -1.0",
    ),
    "minutes in words": ("train nano_tokenizer --minutes ten", "--minutes"),
}


@pytest.mark.parametrize("case", TYPED)
def test_mistakes_in_what_is_typed(
    case: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    typed, expected = TYPED[case]
    (bench.place / "folder.png").mkdir()
    (bench.place / "pictures").mkdir()
    shutil.copy(bench.picture, bench.place / "pictures")
    known = {**vars(bench), **{name: bench.path(name) for name in ("folder", "pictures")}}
    command = [part.replace("''", "").strip("'") for part in _split(typed)]
    assert expected in refused(bench, capsys, *(part.format(**known) for part in command))


def _split(typed: str) -> list[str]:
    """Split at blanks, keeping the blanks of a quoted part."""
    parts = typed.replace("'  '", "'\0'").split(" ")
    return [part.replace("\0", "  ") for part in parts]


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header promises a size; there are no pixels behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.fixture(params=["short.jpg", "huge.png", "pixel.png", "text.png", "empty.png"])
def broken(request: pytest.FixtureRequest, bench: Bench) -> tuple[Path, str]:
    """A picture that is none, and what must be said of it."""
    path = bench.place / request.param
    kind = path.stem
    if kind == "short":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:800])
    elif kind == "pixel":
        Image.new("RGB", (1, 1)).save(path)
    else:
        path.write_bytes({"huge": png(30_000, 30_000), "text": b"hello", "empty": b""}[kind])
    told = {"huge": "too large", "pixel": "too small", "empty": "empty file"}
    return path, told.get(kind, path.name)


@pytest.mark.parametrize("verb", ["describe", "ask", "edit", "reconstruct"])
def test_broken_pictures_are_named(
    verb: str, broken: tuple[Path, str], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path, told = broken
    words = {"ask": ["what?"], "edit": ["make it red"]}.get(verb, [])
    places = {"edit": ["--out", bench.out], "reconstruct": [bench.picture, "--out", bench.out]}
    line = refused(bench, capsys, verb, bench.model, str(path), *words, *places.get(verb, []))
    assert told in line
    assert path.name in line


@pytest.mark.parametrize("command", ["train", "encode", "demo"])
def test_a_folder_without_pictures(
    command: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench.place / "papers"
    folder.mkdir()
    (folder / "letter.doc").write_text("no picture")
    commands = {
        "train": ["train", "nano_tokenizer", "--data", str(folder), "--out", bench.path("run")],
        "encode": ["encode", bench.model, str(folder), bench.path("codes")],
        "demo": ["demo", "--model", bench.model, "--images", str(folder), "--out", bench.out],
    }
    assert str(folder) in refused(bench, capsys, *commands[command])


@pytest.mark.parametrize("verb", ["train", "demo"])
def test_a_folder_of_broken_pictures(
    verb: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench.place / "broken"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff nothing")
    if verb == "train":
        run = bench.path("run")
        command = ["train", "nano_tokenizer", "--data", str(folder), "--out", run]
        assert "cannot be used" in refused(bench, capsys, *command)
        return
    before = files_under(bench.place)
    arguments = ["demo", "--model", bench.model, "--images", str(folder), "--out", bench.out]
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: images: none of 4")
    assert files_under(bench.place) == before


def test_a_prompt_of_ten_thousand_words(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(bench, capsys, "draw", bench.model, "red " * 10_000, "--out", bench.out)
    assert "shorten the prompt" in line


def test_an_instruction_and_a_question_of_ten_thousand_words(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "red " * 10_000
    for command in (["edit", "--out", bench.out], ["ask"]):
        verb, *rest = command
        line = refused(bench, capsys, verb, bench.model, bench.picture, words, *rest)
        assert "shorten the prompt" in line


def test_a_place_that_refuses(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is played."""

    def refuse(path: object, mode: int, **_: object) -> bool:
        return not mode & os.W_OK

    monkeypatch.setattr(os, "access", refuse)
    (bench.place / "pictures").mkdir()
    shutil.copy(bench.picture, bench.place / "pictures")
    for command in (
        ["draw", bench.model, "x", "--out", bench.out],
        ["edit", bench.model, bench.picture, "x", "--out", bench.out],
        ["reconstruct", bench.model, bench.picture, "--out", bench.path("rebuilt")],
        ["encode", bench.model, bench.path("pictures"), bench.path("codes")],
        ["evaluate", bench.model, "--suite", "shapes", "--json", bench.path("a.json")],
        ["train", "nano_tokenizer", "--out", bench.path("run"), *TOKENIZER],
        ["demo", "--model", bench.model, "--out", bench.path("demo")],
        ["publish", bench.model, bench.path("mine")],
        ["export", bench.model, bench.path("plain")],
        ["report", bench.path("pictures")],
        ["probe", "swap", bench.model, "--out", bench.path("probe")],
        ["compare", bench.model, "--out", bench.path("side-by-side")],
    ):
        assert "cannot be written" in refused(bench, capsys, *command)


def test_tensorboard_that_is_not_there_is_named_before_training(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    command = ["train", "nano_tokenizer", "--out", bench.path("run"), *TOKENIZER]
    command.remove("--train.tensorboard=false")
    assert "--train.tensorboard false" in refused(bench, capsys, *command)


@pytest.mark.parametrize("part", ["tokenizer", "language"])
@pytest.mark.parametrize("harm", ["cut", "other", "gone"])
def test_harmed_weights_are_named(
    part: str, harm: str, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bench.copy(bench.model, "model")
    weights = model / part / "model.safetensors"
    if harm == "gone":
        weights.unlink()
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2] if harm == "cut" else b"GIF89a" * 99)
    assert str(model / part) in refused(bench, capsys, "draw", str(model), "x", "--out", bench.out)


def test_weights_of_another_model(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model = bench.copy(bench.model, "model")
    config = model / "tokenizer" / "config.json"
    described = json.loads(config.read_text())
    described["encoder"]["depth"] = 2
    config.write_text(json.dumps(described))
    line = refused(bench, capsys, "reconstruct", str(model), bench.picture, "--out", bench.out)
    assert "does not fit this model" in line


def test_a_checkpoint_of_another_recipe(
    bench: Bench, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(pipeline.tokenizer, bench.place / "run"))
    command = ["train", "nano_tokenizer", "--steps", "9", "--out", str(run), *TOKENIZER]
    line = refused(bench, capsys, *command, "--tokenizer.num_tokens=16")
    assert "another recipe: tokenizer.num_tokens was 8, now 16" in line
    other = ["train", "nano_pretrain", "--tokenizer", bench.tokenizer, "--out", str(run)]
    assert "another recipe" in refused(bench, capsys, *other, *LANGUAGE)


def test_codes_of_another_tokenizer(
    bench: Bench, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bench.place / "other"
    fields = [*TOKENIZER, "--tokenizer.num_tokens=4", "--steps", "1", "--out", str(other)]
    assert main(["train", "nano_tokenizer", *fields]) == 0
    command = ["train", "nano_instruct", "--start", str(pipeline.pretrain), *LANGUAGE]
    command += ["--tokenizer", str(other), "--out", bench.path("run")]
    assert "take both from the same run" in refused(bench, capsys, *command)


def test_a_folder_that_is_no_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    letters = bench.place / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("kept")
    command = ["train", "nano_tokenizer", "--out", str(letters), *TOKENIZER]
    assert "not empty and not a run" in refused(bench, capsys, *command)


def test_data_without_the_documents_asked_for(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bench.place / "plain"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    command = ["train", "nano_instruct", "--start", bench.pretrain, "--data", str(folder)]
    only = ["--mix.draw=0", "--mix.describe=0", "--out", bench.path("run"), *LANGUAGE]
    assert "gives none of the documents asked for" in refused(bench, capsys, *command, *only)


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: str) -> None:
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "describe", interrupted)
    assert main(["describe", "--model", "x"]) == 130


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"Example: ddt {verb}" in capsys.readouterr().out


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "paper_instruct" in capsys.readouterr().out
    assert main(["recipes", "base_tokenizer"]) == 0
    said = capsys.readouterr().out
    assert "tokenizer.num_tokens " in said
    assert "FLOPs, encode an image" in said
    assert "memory, weights" in said


def test_fields_are_parted_from_options() -> None:
    kept, fields = split_fields(
        [
            "name",
            "--data",
            "a",
            "b",
            "--train.compile",
            "--train.bf16=no",
            "--out",
            "x",
            "--a-b",
            "-1",
        ],
        ("--data", "--out"),
    )
    assert kept == ["name", "--data", "a", "b", "--out", "x"]
    assert fields == {"train.compile": "true", "train.bf16": "no", "a_b": "-1"}


def test_a_panel_becomes_a_line() -> None:
    panel = "╭─ X ───╮\n│ Missing │\n│    this │\n│ ─────── │\n│ more    │\n╰─────────╯\n"
    assert one_line(panel) == "Missing this"
    plain = "  X\n  -----\n  Missing\n  --this\n  -----\n  more\n"
    assert one_line(plain) == "Missing --this"
    assert one_line("") == "wrong arguments"
