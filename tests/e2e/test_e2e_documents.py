"""Every command that a document or a help text shows is one that exists."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from ddt_llama.cli import OWN_OPTIONS, VERBS, bound, split_fields
from ddt_llama.config import override
from ddt_llama.evaluation.suites import suite_named
from ddt_llama.recipes import recipe_named

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/*.sh")]
# A command on a line of its own, in a code span, or as the example of a verb.
SHOWN = re.compile(r"(?:^|`|Example: )(ddt [a-z][^`\n]*)", re.MULTILINE)
TARGETS = re.compile(r"(?:^|`)make ([a-z]+)", re.MULTILINE)


def commands() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    texts += [verb.__doc__ or "" for verb in VERBS.values()]
    found = {
        command.partition("  #")[0].strip() for text in texts for command in SHOWN.findall(text)
    }
    return sorted(one for one in found if "..." not in one and "$" not in one)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= len(VERBS)


@pytest.mark.parametrize("command", commands())
def test_a_command_shown_can_be_typed(command: str) -> None:
    _, verb, *rest = shlex.split(command)
    fields: dict[str, str] = {}
    if verb in OWN_OPTIONS:
        rest, fields = split_fields(rest, OWN_OPTIONS[verb])
    assert verb in VERBS
    if not rest or "--help" in rest:
        return
    action = bound(tyro.cli, verb, rest)
    names = [word for word in rest if not word.startswith("-")]
    if verb == "train" and names[0].islower():
        override(recipe_named(names[0]), fields)
    if verb == "recipes" and names and names[0].islower():
        recipe_named(names[0])
    if verb == "evaluate":
        suite_named(action.keywords["suite"], fields)


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "drawn.png").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_experiments_and_files_named_are_there() -> None:
    """In documents and in the source: experiments/0001 and docs/house.md lead somewhere."""
    places = [*DOCUMENTS, *ROOT.glob("experiments/*/*.md"), *ROOT.glob("src/**/*.py")]
    known = [path.name for path in (ROOT / "experiments").iterdir()]
    for path in places:
        text = path.read_text(encoding="utf-8")
        for number in re.findall(r"experiments/(\d{4})", text):
            assert any(name.startswith(number) for name in known), (path, number)
        for name in re.findall(r"`((?:docs|launch|scripts|tests)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).is_file(), (path, name)


def test_targets_shown_are_in_the_makefile() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(TARGETS.findall(text)) <= rules
