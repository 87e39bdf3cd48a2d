"""The command `ddt`: one function a verb, everything heavy imported inside it.

`main` is the border to the user: a mistake is one line on standard error and exit code 2, Ctrl-C is
130, and a traceback is a bug.
"""

import contextlib
import difflib
import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ddt_llama.cli import bench, demo, measure, plan, serve, teach, use
from ddt_llama.config import UserError

VERBS: dict[str, Callable[..., int | None]] = {
    "demo": demo.demo,
    "draw": use.draw,
    "edit": use.edit,
    "ask": use.ask,
    "describe": use.describe,
    "reconstruct": use.reconstruct,
    "serve": serve.serve,
    "recipes": teach.recipes,
    "plan": plan.plan,
    "train": teach.train,
    "report": teach.report,
    "publish": teach.publish,
    "export": teach.export,
    "encode": measure.encode,
    "evaluate": measure.evaluate,
    "compare": measure.compare,
    "probe": measure.probe,
    "bench": bench.bench,
}
# Verbs that pass the options they do not know on, as fields of a recipe, a suite or a plan.
OWN_OPTIONS = {
    "train": ("--data", "--steps", "--minutes", "--out"),
    "plan": ("--gpus", "--gpu", "--images", "--utilisation", "--price", "--codes", "--json"),
    "evaluate": ("--suite", "--json", "--data", "--split", "--weights"),
    "encode": ("--split", "--batch", "--shard-rows", "--engine"),
    "compare": ("--out", "--data", "--quick"),
    "probe": ("--out", "--quick"),
}
ABOUT = """Images as a language that a LLaMA can speak: draw, edit, describe and train.

Start with: ddt demo. Every verb explains itself: ddt draw --help."""
MODELS = (
    "MODEL is nano (comes with the program), a folder of ddt train or ddt publish, or a hub name."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line and return its exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 141
    except OSError as error:  # names that are too long, folders that may not be looked into
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from ddt_llama import __version__

        print(f"ddt-llama {__version__}")
        return 0
    import tyro

    # One line a percent, where standard error is no terminal.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # transformers imports torchao where it is; both complain of parts that are not used here.
    for complaining in ("torchao", "torch.utils._pytree"):
        logging.getLogger(complaining).setLevel(logging.ERROR)
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 2)
        names = [*near, *(name for name in VERBS if name not in near)]
        raise UserError(f"unknown verb {verb!r}; the verbs are: {', '.join(names)}; see ddt --help")
    if verb in OWN_OPTIONS:
        rest, fields = split_fields(rest, OWN_OPTIONS[verb])
        action = functools.partial(bound(tyro.cli, verb, rest), fields=fields)
    else:
        action = bound(tyro.cli, verb, rest)
    return action() or 0


def overview() -> str:
    """Return what `ddt --help` says: a line a verb."""
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {(f.__doc__ or '').splitlines()[0]}" for verb, f in VERBS.items()]
    return "\n".join(["usage: ddt VERB ...", "", ABOUT, "", *lines, "", MODELS])


def bound(
    cli: Callable[..., Any], verb: str, arguments: list[str]
) -> "functools.partial[int | None]":
    """Return the verb bound to its arguments; UserError, in one line, where those are wrong."""
    function = VERBS[verb]

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> "functools.partial[int | None]":
        return functools.partial(function, *args, **kwargs)

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return cli(bind, prog=f"ddt {verb}", args=arguments)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(f"{one_line(told.getvalue())}; see ddt {verb} --help") from None


def one_line(panel: str) -> str:
    """Return the first part of one of tyro's framed messages as one line."""
    # Where the terminal has no box characters, the frame is a title between two rules of hyphens.
    lines = [line.strip(" │") for line in panel.splitlines()]
    blank = ["" if set(line) <= set("─-╭╮╰╯") else line for line in lines]
    parts = " ".join(line or "\n" for line in blank[1:]).split("\n")
    told = [" ".join(part.split()) for part in parts if part.strip()]
    return told[0] if told else "wrong arguments"


def split_fields(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part `--any.field value` and `--any.field=value` from the verb's own arguments.

    A field without a value is switched on. Hyphens in field names stand for underscores.
    """
    kept: list[str] = []
    fields: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option in (*own, "--help"):
            kept.append(argument)
            continue
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        fields[option.removeprefix("--").replace("-", "_")] = value
    return kept, fields
