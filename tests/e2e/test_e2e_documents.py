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


def test_targets_shown_are_in_the_makefile() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(TARGETS.findall(text)) <= rules
