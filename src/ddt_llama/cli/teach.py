"""The verbs that train, and give away what was trained: recipes, train, report, publish, export."""

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ddt_llama.cli.kinds import Adapter, Fields, Model, Number, WholeNumber


def recipes(name: Annotated[Positional[str | None], arg(metavar="NAME")] = None) -> None:
    """List the recipes, or show all fields, the size and the cost of one.

    Example: ddt recipes nano_tokenizer

    Args:
        name: The recipe to show; leave out for the list.
    """
    from ddt_llama.config import show
    from ddt_llama.recipes.named import NAMES, first_sentence, recipe_named

    if name is None:
        width = max(len(known) for known in NAMES)
        print("\n".join(f"{known:<{width}}  {first_sentence(known)}" for known in NAMES))
        print("\nddt recipes NAME shows one; ddt train NAME trains it.")
        return
    recipe = recipe_named(name)
    from ddt_llama.recipes.cost import cost_of

    print(f"{first_sentence(name)}\n\n{show(recipe)}\n\n{cost_of(recipe)}")


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    *,
    data: Annotated[tuple[str, ...] | None, arg(metavar="PATH ...", help_behavior_hint="")] = None,
    steps: WholeNumber = None,
    minutes: Number = None,
    out: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None,
    fields: Fields = None,
) -> int:
    """Train a recipe, or go on with a training that was stopped.

    The same command started again continues where it stopped. Three trainings make a model:
    SIZE_tokenizer (or spatial_SIZE, its rival), then SIZE_pretrain with --tokenizer FOLDER, then
    SIZE_instruct with --start FOLDER. lora teaches a model that is there your own pictures,
    guidance_free to draw without guidance; SIZE_renderer, with --start FOLDER, adds a decoder of
    one pass to it (--steps 0 uses it).

    Any field that `ddt recipes RECIPE` shows can be changed: --train.batch 64.

    Example: ddt train nano_tokenizer --data my_pictures --minutes 30

    Args:
        recipe: The name of a recipe; `ddt recipes` lists them.
        data: Folders of pictures, WebDataset shards, Parquet files; "shapes" is the built-in world.
        steps: How many updates in all.
        minutes: Stop after so many minutes; the same command goes on later.
        out: The run folder; runs/RECIPE unless given.
    """
    from ddt_llama.config import override
    from ddt_llama.recipes.named import recipe_named
    from ddt_llama.recipes.sizes import RUNS

    chosen = recipe_named(recipe)
    changes: dict[str, Any] = dict(fields or {})
    for name, value in (("data.paths", data), ("train.steps", steps), ("train.minutes", minutes)):
        if value is not None:
            changes[name] = list(value) if isinstance(value, tuple) else value
    chosen = override(chosen, changes)
    folder = out if out is not None else Path(RUNS, recipe)
    from ddt_llama.cli.training import train_and_tell

    return train_and_tell(chosen, folder)


def report(run: Annotated[Positional[Path], arg(metavar="RUN")]) -> None:
    """Write one page about a training: samples, curves, figures, configuration.

    Example: ddt report runs/nano_tokenizer

    Args:
        run: The folder of the training.
    """
    from ddt_llama.config import check_folder
    from ddt_llama.reports.report import report as write

    check_folder(run)
    print(write(run))


def publish(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    bits: Literal[16, 8] = 16,
    adapter: FlagCreatePairsOff[bool] = False,
) -> None:
    """Make of a training the folder that others load: settings tuned, weights in few bits.

    Decoding steps are chosen on pictures that training left alone. Of a model of the shapes world
    guidance, temperature and whether words come first are chosen, too, on prompts and edits that
    no evaluation uses (minutes).

    Example: ddt publish runs/nano_instruct models/mine --bits 8

    Args:
        run: The folder of the training.
        out: The folder to write.
        name: What the model is called; the name of the folder unless given.
        bits: How many each weight is stored in; those of an adapter in 16.
        adapter: Write what LoRA has learned alone, to be used beside the model that it began with.
    """
    from ddt_llama.config import check_folder
    from ddt_llama.recipes.publish import publish as write

    check_folder(out)
    write(run, out, name or out.name, bits, adapter=adapter)


def export(
    model: Model,
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    adapter: Adapter = None,
    format: Literal["hf"] = "hf",
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> None:
    """Write a model as a plain Hugging Face folder, which transformers and vLLM open.

    Image tokens are text to it: <img_00017>. OUT/README.md shows how to draw with transformers, and
    how prompts are written; OUT/image_tokenizer turns image tokens into pixels and back.

    Example: ddt export nano models/plain --format hf

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        out: The folder to write.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        format: hf is that of transformers.
        dtype: How weights are stored; float16 keeps those of ddt publish as they are.
    """
    from ddt_llama.recipes.export import export as write

    write(model, out, dtype, adapter=adapter)
