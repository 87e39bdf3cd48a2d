"""The verbs that measure models and encode data: evaluate, compare, probe, encode."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ddt_llama.cli.kinds import Fields, Model, Weights, WholeNumber


def evaluate(
    model: Model,
    *,
    suite: str,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    data: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None,
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    weights: Weights = None,
    fields: Fields = None,
) -> None:
    """Measure a model, with 95 % intervals.

    Suite reconstruction: how well pictures survive encoding and decoding. Suite shapes: drawing,
    editing and questions on held-out scenes. Suite text: how well captions are known. Any field of
    a suite can be changed: --prompts 20. How fast a model is: ddt bench.

    Example: ddt evaluate nano --suite shapes --json shapes.json

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        suite: reconstruction, shapes or text.
        json: Write the figures to this file, too.
        data: For reconstruction: pictures in place of scenes.
        split: Which of them; "val" of data without splits is the share that training leaves out.
            Without it their split "val" or "test", or all of them if they have neither.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
    """
    from ddt_llama.cli.places import check_file
    from ddt_llama.evaluation.result import print_figures, write_figures
    from ddt_llama.evaluation.suites import evaluate as measure
    from ddt_llama.evaluation.suites import suite_named
    from ddt_llama.generation import load
    from ddt_llama.recipes.data import HELD_OUT

    # As in training, where a split is asked for; else all pictures of undivided data are measured.
    given, own = data_fields(fields, data, HELD_OUT if split else 0.0)
    chosen = suite_named(suite, own)
    if json is not None:
        check_file(json, ".json")
    opened = load(model, weights=weights)
    source = None
    if data is not None:
        config = replace(given, paths=(data,))
        config.check()
        part = split or config.measured_split(data)
        source = config.open_images(data, opened.tokenizer.image_size, part)
        print(f"{data}: split {part}, {len(source)} pictures")
        if not split and part == "all":
            print("pictures of a training may be among them; --split val takes those it left out")
    figures = measure(opened, chosen, source)
    print_figures(figures, f"{opened.name}: {suite}")
    if json is not None:
        write_figures(json, figures)
        print(json)


def compare(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL...", help_behavior_hint="")],
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    data: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None,
    quick: FlagCreatePairsOff[bool] = False,
    fields: Fields = None,
) -> None:
    """Measure models on the same scenes, prompts and captions, side by side.

    Writes a page (index.html, pictures first) and a table (README.md). The same command started
    again goes on where it stopped. Publish models before: guidance and temperature are then tuned
    for each. Any field of a suite can be changed: --shapes.prompts 20.

    All this is of the shapes world; give --data, and they rebuild your pictures, too: those of
    split "val" or "test", or all where the data have none. Pictures that training left out are
    --data.held-out 0.02 of such data.

    Example: ddt compare nano models/spatial_nano --out compare

    Args:
        models: One or more: nano (comes with the program), folders of ddt train or ddt publish, or
            hub names.
        out: The folder to write into, compare unless given (compare-quick of a quick run). One
            folder holds one set of models and settings.
        data: Pictures of your own: a folder, WebDataset shards, Parquet files, a data set on disk.
        quick: A run of minutes that proves that everything works, and nothing else.
    """
    from ddt_llama.config import override
    from ddt_llama.probes.compare import ComparisonPlan
    from ddt_llama.probes.compare import compare as measure

    plan = ComparisonPlan().quick() if quick else ComparisonPlan()
    given, own = data_fields(fields, data)
    if data is not None:
        plan = replace(plan, data=replace(given, paths=(data,)))
    folder = out if out is not None else Path("compare-quick" if quick else "compare")
    measure(opened(models), folder, override(plan, own))
    print(f"{(folder / 'README.md').read_text()}\n{folder / 'index.html'}")


def data_fields(
    fields: Mapping[str, str] | None, data: str | None, held_out: float = 0.0
) -> tuple[Any, dict[str, str]]:
    """Return what the fields "data.*" make of the settings of `data`, and the other fields.

    `held_out` is what undivided data give to "val" unless a field says so. Raises UserError for
    such fields where no data are given.
    """
    from ddt_llama.config import UserError, override
    from ddt_llama.recipes.data import DataConfig

    own = {name: value for name, value in (fields or {}).items() if name.startswith("data.")}
    changes = {name.removeprefix("data."): value for name, value in own.items()}
    rest = {name: value for name, value in (fields or {}).items() if name not in own}
    if own and data is None:
        raise UserError(f"{next(iter(own))}: no data are given; add --data PATH, or leave it out")
    return override(DataConfig(held_out=held_out), changes), rest


def opened(models: Sequence[str]) -> list[Any]:
    """Open models; those of one recipe, and so of one name, are told apart by their folders."""
    from ddt_llama.generation import load

    loaded = [load(model) for model in models]
    for other in (
        lambda source: Path(source).resolve().name,
        lambda source: source.replace("/", "-"),
    ):
        names = [one.name for one in loaded]
        for one, source in zip(loaded, models, strict=True):
            if names.count(one.name) > 1:
                one.name = other(source.strip("/"))
    for one in loaded:  # names become those of files
        one.name = one.name.replace("/", "-")
    return loaded


def probe(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL...", help_behavior_hint="")],
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None,
    quick: FlagCreatePairsOff[bool] = False,
    fields: Fields = None,
) -> None:
    """Put a claim of the paper to the test on one or more models.

    shuffle: what do other orders of the tokens cost a language model? entropy: does the next token
    become more certain along the sequence? prefix: what do the first tokens hold? swap: do tokens
    of two pictures make a blend or a collage? synergy: do codes beside it help a language model
    with text? length: how many tokens should an image have? ablate: which choices in the tokenizer
    matter? scaling: how does loss fall with size and data? Writes figures, plots, pictures and a
    verdict. The same command started again goes on where it stopped.

    shuffle, entropy, prefix and swap take tokenizers alone, too. synergy needs one model with a
    language model, scaling needs it of all. length and ablate train tokenizers like the given one
    anew, and want tokens tied to timesteps and a language model. prefix and swap take minutes, the
    others hours on two CPU cores.

    Settings can be changed: --seeds 0,1 (all), --levels 16 (prefix, swap), --passes 1 (scaling),
    --course.train.steps 2000 (the others). config.json of a started probe lists all of them under
    "plan".

    Example: ddt probe shuffle nano runs/spatial_nano

    Args:
        name: shuffle, entropy, prefix, swap, synergy, length, ablate or scaling.
        models: One or more: nano (comes with the program), folders of ddt train or ddt publish, or
            hub names.
        out: The folder to write into, probes/NAME unless given (probes/NAME-quick of a quick run).
            One folder holds one set of models and settings.
        quick: A run of minutes that proves that everything works, and nothing else.
    """
    from ddt_llama.evaluation.result import print_figures
    from ddt_llama.probes.named import carry_out, check_name

    check_name(name)
    folder = out if out is not None else Path("probes") / (f"{name}-quick" if quick else name)
    outcome = carry_out(name, opened(models), folder, quick, fields)
    print_figures(outcome.figures, name)
    print(f"{outcome.verdict}\n{folder / 'README.md'}")


def encode(
    model: Model,
    data: Annotated[Positional[str], arg(metavar="DATA")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    *,
    split: str = "all",
    batch: WholeNumber = None,
    shard_rows: int = 10_000,
    engine: Literal["local", "ray"] = "local",
    fields: Fields = None,
) -> None:
    """Write the codes of a data set of pictures, with their texts: language models train on them.

    OUT gets Parquet shards and a manifest, which lists what could not be used, and why. The same
    command started again goes on where it stopped. Fields of the data can be changed as in
    training: --data.image-column photo.

    Example: ddt encode nano my_pictures codes
    Then: ddt train nano_pretrain --tokenizer nano --data codes

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        data: A folder of pictures, WebDataset shards, Parquet files, a data set on disk.
        out: The folder to write into.
        split: Which split of the data; "all" takes everything.
        batch: Rows encoded at once, 16 on a CPU and 256 on a GPU unless given.
        shard_rows: Rows of the data that make one shard.
        engine: local, or ray: on all machines of the Ray cluster at RAY_ADDRESS, or all cores of
            this one.
    """
    from ddt_llama.config import UserError
    from ddt_llama.data.codes import MANIFEST
    from ddt_llama.recipes.cluster import on_ray
    from ddt_llama.recipes.encode import encode_pictures, in_this_process

    config, unknown = data_fields(fields, data)
    if unknown:
        raise UserError(
            f"unknown option --{next(iter(unknown))}; allowed are --split, --batch, --shard-rows, "
            "--engine and fields of the data such as --data.image-column; see ddt encode --help"
        )
    done = encode_pictures(
        model,
        replace(config, paths=(data,)),
        out,
        split=split,
        batch=batch,
        shard_rows=shard_rows,
        engine=on_ray if engine == "ray" else in_this_process,
    )
    skipped = f", {done.skipped} skipped ({out / MANIFEST} says why)" if done.skipped else ""
    print(f"{out}: codes of {done.rows} rows{skipped}")
    if done.fresh:
        print(f"{done.fresh / done.seconds:,.0f} rows/s")
