"""The verb plan: what a training would take, told before it is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ddt_llama.cli.kinds import Fields, Number, WholeNumber

if TYPE_CHECKING:
    from rich.table import Table

    from ddt_llama.recipes.plan import Plan

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "average": "average of the weights",
    "buffers": "codebook and tables",
    "copies": "weights in bfloat16 or gathered",
    "activations": "activations",
    "logits": "logits",
    "update": "Muon's products",
    "beside": "frozen, and pictures encoded",
    "total": "in all",
    "host": "in the memory of its CPU",
}


@dataclass(frozen=True)
class Assumed:
    """What a plan cannot know.

    Args:
        utilisation: The share of an accelerator's peak that training reaches.
        price: Of an hour of one accelerator, in any currency; without it only hours are told.
        codes: The data hold codes (ddt encode), so that no pictures are encoded beside.
    """

    utilisation: float = 0.4
    price: Number = None
    codes: FlagCreatePairsOff[bool] = False


def plan(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    *,
    gpus: int,
    gpu: Annotated[str, arg(metavar="h200|h100|a100|910b", help_behavior_hint="")],
    images: WholeNumber = None,
    assumed: Annotated[Assumed, arg(name="")] = Assumed(),
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    fields: Fields = None,
) -> None:
    """Say what a training would need: memory of every part, what fits, hours, cost.

    For each way to spread it over processes (train.shard, train.offload, train.recompute). Nothing
    is trained and no data are read. Fields of the recipe can be changed as in ddt train.

    Example: ddt plan paper_pretrain --gpus 512 --gpu 910b --images 200000000

    Args:
        recipe: The name of a recipe; `ddt recipes` lists them.
        gpus: How many accelerators, in machines of eight.
        gpu: Which: h200, h100, a100 or 910b.
        images: Pictures or documents to learn from; those of all the recipe's steps unless given.
        json: Write everything to this file, too.
    """
    from rich.console import Console

    from ddt_llama.cli.places import check_file
    from ddt_llama.config import override, save_json
    from ddt_llama.recipes.named import recipe_named
    from ddt_llama.recipes.plan import plan as made

    if json is not None:
        check_file(json, ".json")
    chosen = override(recipe_named(recipe), dict(fields or {}))
    found = made(chosen, gpus, gpu, samples=images, **vars(assumed))
    print(overview(found, chosen.train.recompute))
    Console().print(parts(found, chosen.train.recompute))
    print()
    Console().print(choices(found))
    print(advice(found, chosen.train.samples_a_step))
    if recipe.startswith(("paper_", "selftok_")):
        print(published(assumed.utilisation))
    if json is not None:
        save_json(json, found.to_dict())
        print(json)


def overview(plan: "Plan", recompute: str) -> str:
    """Return size, FLOPs, and what is assumed."""
    from ddt_llama.hardware import ACCELERATORS
    from ddt_llama.recipes.formulas import quantity
    from ddt_llama.recipes.plan import USABLE

    one, total = ACCELERATORS[plan.gpu], sum(plan.parameters.values())
    of = ", ".join(f"{name} {quantity(count)}" for name, count in plan.parameters.items())
    learn = plan.learn * plan.samples
    of_length = f" of {plan.longest} ids (the longest)" if plan.longest else ""
    return (
        f"{plan.recipe} on {plan.gpus} x {plan.gpu}\n"
        f"parameters: {quantity(total)} ({of})\n"
        f"FLOPs: {quantity(plan.learn)} a {plan.unit}, x {plan.samples:,} = {learn:.3g}\n"
        f"assumed: {plan.utilisation:.0%} of {one.flops / 1e12:,.0f} TFLOPs/s are reached, "
        f"{USABLE:.0%} of {one.memory / 1e9:,.0f} GB can be used\n\n"
        f"GB of a rank with {plan.micro_batch} {plan.unit}s{of_length} a pass, "
        f"recompute {recompute}"
    )


def parts(plan: "Plan", recompute: str) -> "Table":
    """Return the memory of a rank by part, a column for each way to spread it."""
    from rich.table import Table

    rows = [row for row in plan.rows if row.choice.recompute == recompute]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("shard")
    for row in rows:
        table.add_column(row.choice.name, justify="right")
    for name, told in PARTS.items():
        values = [getattr(row.memory, name) for row in rows]
        if any(values):
            table.add_row(told, *(gigabytes(value) if value else "" for value in values))
    return table


def choices(plan: "Plan") -> "Table":
    """Return what follows from every choice."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("shard")
    table.add_column("recompute")
    costs = [] if plan.price is None else ["cost"]
    for name in ("GB", "largest micro-batch", "hours", "GPU hours", *costs):
        table.add_column(name, justify="right")
    for row in plan.rows:
        cost = plan.cost(row)
        table.add_row(
            row.choice.name,
            row.choice.recompute,
            gigabytes(row.memory.total),
            f"{row.most:,}" if row.most else "does not fit",
            f"{row.hours:,.1f}",
            f"{plan.gpus * row.hours:,.0f}",
            *([] if cost is None else [f"{cost:,.0f}"]),
        )
    return table


def advice(plan: "Plan", samples_a_step: int) -> str:
    """Return the options of the best choice, with a batch that it has room for."""
    row = plan.best
    passes = -(-samples_a_step // (plan.gpus * row.most))
    size = -(-samples_a_step // (plan.gpus * passes))
    options = [f"--train.shard {row.choice.shard}", f"--train.recompute {row.choice.recompute}"]
    options += ["--train.offload true"] if row.choice.offload else []
    options += [f"--train.batch {size * plan.gpus}", f"--train.accumulate {passes}"]
    taken = size * plan.gpus * passes
    more = "" if taken == samples_a_step else f" ({taken} samples a step, not {samples_a_step})"
    return f"\nfits: {' '.join(options)}{more}"


def published(utilisation: float) -> str:
    """Return how the same formulas see the published trainings."""
    from ddt_llama.recipes.plan import ASSUMED, PUBLISHED, flops_offered, learning_of

    lines = [f"\npublished trainings by the same formulas, accelerators assumed to be {ASSUMED}"]
    for run in PUBLISHED:
        offered, learn = flops_offered(run), learning_of(run)
        could = utilisation * offered / learn
        lines.append(
            f"{run.name}: {run.gpus} in {run.hours:,.0f} hours can do {offered:.3g} FLOPs; "
            f"{run.recipe} takes {learn:.3g} a sample: at {utilisation:.0%} {could:.3g} samples"
        )
        if run.samples is None:
            lines[-1] += "; how many there were is not published"
        else:
            share = run.samples * learn / offered
            lines[-1] += (
                f", the {run.samples:,} told of {could / run.samples:.1f} times; each of them once "
                f"is a utilisation of {share:.1%}"
            )
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    """Return bytes as GB, three figures of them.

    >>> gigabytes(123_456_789)
    '0.123'
    """
    value = size / 1e9
    return f"{value:.3f}" if value < 1 else f"{value:,.{max(0, 3 - len(str(int(value))))}f}"
