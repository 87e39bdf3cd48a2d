"""The verbs that use a model: draw, edit, ask, describe, reconstruct."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ddt_llama.cli.kinds import Adapter, Model, Number, Weights, WholeNumber

if TYPE_CHECKING:
    import PIL.Image

    from ddt_llama.generation.settings import Options

Image = Annotated[Positional[Path], arg(metavar="IMAGE")]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    num: how many; several are written as NAME-1.png, NAME-2.png, ...
    """

    num: int = 1
    """How many pictures; several are written as NAME-1.png, NAME-2.png, ..."""
    seed: int = 0
    """Other seeds draw other pictures; the same seed draws the same picture again."""
    guidance_scale: Number = None
    """How closely to follow the words: 1 is the plain model, 3 is closer."""
    temperature: Number = None
    """Below 1 safer, above 1 more varied."""
    top_k: WholeNumber = None
    """Choose among the so many most likely codes only."""
    top_p: Number = None
    """Choose among the most likely codes of this joint probability only."""
    steps: WholeNumber = None
    """Denoising steps a picture; more is slower, 0 is one pass of the renderer, if there is one."""
    tries: WholeNumber = None
    """Draw again, so often at most, what the model itself does not read as it planned it."""
    plan: Literal["yes", "no"] | None = None
    """Write first, in words, what is to be drawn."""

    @property
    def options(self) -> "Options":
        """The part that the model's own settings stand in for where it is not given."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "steps": self.steps,
            "tries": self.tries,
            "plan": None if self.plan is None else self.plan == "yes",
        }

    def check(self, out: Path) -> None:
        """Raise UserError for numbers and places that cannot be, before a model is opened."""
        from ddt_llama.cli.places import check_file
        from ddt_llama.generation.settings import Settings, row_seeds

        check_file(out, ".png")
        row_seeds(self.seed, 1, self.num)
        Settings().changed(self.options)

    def write(self, pictures: "list[PIL.Image.Image]", out: Path) -> None:
        """Write the pictures and print where they are."""
        from ddt_llama.cli.places import numbered
        from ddt_llama.data.images import save_png

        for picture, path in zip(pictures, numbered(out, self.num), strict=True):
            print(save_png(picture, path))


def draw(
    model: Model,
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")],
    drawing: Annotated[Drawing, arg(name="")] = Drawing(),
    *,
    adapter: Adapter = None,
    weights: Weights = None,
    out: Path = Path("drawn.png"),
) -> None:
    """Draw pictures of a sentence.

    Example: ddt draw nano "a red circle above a blue square" --num 4 --out circle.png

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        prompt: What to draw, in quotes.
        drawing: How to draw.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
        out: Where to write, a .png file.
    """
    from ddt_llama.generation import load

    drawing.check(out)
    opened = load(model, adapter=adapter, weights=weights)
    pictures = opened.draw(prompt, num=drawing.num, seed=drawing.seed, **drawing.options)
    drawing.write(pictures, out)


def edit(
    model: Model,
    image: Image,
    instruction: Annotated[Positional[str], arg(metavar="INSTRUCTION")],
    drawing: Annotated[Drawing, arg(name="")] = Drawing(),
    *,
    adapter: Adapter = None,
    weights: Weights = None,
    out: Path = Path("edited.png"),
) -> None:
    """Change a picture as an instruction says.

    Example: ddt edit nano circle.png "make the circle green" --out green.png

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        image: The picture to change.
        instruction: What to change, in quotes.
        drawing: How to draw.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
        out: Where to write, a .png file.
    """
    from ddt_llama.generation import load

    drawing.check(out)
    pictures = load(model, adapter=adapter, weights=weights).edit(
        image, instruction, num=drawing.num, seed=drawing.seed, **drawing.options
    )
    drawing.write(pictures, out)


def ask(
    model: Model,
    image: Image,
    question: Annotated[Positional[str], arg(metavar="QUESTION")],
    *,
    adapter: Adapter = None,
    weights: Weights = None,
) -> None:
    """Answer a question about a picture.

    Example: ddt ask nano circle.png "how many circles are there?"

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        image: The picture to look at.
        question: What to ask, in quotes.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
    """
    from ddt_llama.generation import load

    print(load(model, adapter=adapter, weights=weights).ask(image, question))


def describe(
    model: Model, image: Image, *, adapter: Adapter = None, weights: Weights = None
) -> None:
    """Say what a picture shows.

    Example: ddt describe nano circle.png

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        image: The picture to look at.
        adapter: What LoRA has learned beside the model: a folder of ddt train lora, or a hub name.
        weights: Of the language model, while it writes: float32, bfloat16 or int8.
    """
    from ddt_llama.generation import load

    print(load(model, adapter=adapter, weights=weights).describe(image))


def reconstruct(
    model: Model,
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")],
    *,
    steps: WholeNumber = None,
    visible: WholeNumber = None,
    seed: int = 0,
    out: Path = Path("reconstructed"),
) -> None:
    """Turn pictures into codes and back.

    Writes every picture as it comes back, and sheet.png: a column a picture, the original above
    what its first 1, 4, 8, ... and all codes give, coarsest first.

    Example: ddt reconstruct nano cat.jpg dog.jpg --out back

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        images: One or more pictures.
        steps: Denoising steps a picture; 0 is one pass of the renderer, where there is one.
        visible: Use so many codes only, counted from the coarsest; leave out for all.
        seed: Of the noise that decoding starts from.
        out: The folder to write into.
    """
    from ddt_llama.cli.places import distinct_names
    from ddt_llama.config import UserError, check_folder
    from ddt_llama.data.images import save_png, to_pil
    from ddt_llama.generation import load
    from ddt_llama.generation.pictures import read_images
    from ddt_llama.generation.settings import row_seeds
    from ddt_llama.recipes.sheets import levels_sheet

    if not images:
        raise UserError("no image was given; give at least one file")
    check_folder(out)
    opened = load(model)
    settings = opened.settings.changed({"steps": steps})
    originals = read_images(list(images), opened.tokenizer.image_size)
    seeds = row_seeds(seed, len(images), 1)
    codes = opened.encode(originals)
    decoded = opened.decode(codes, seeds, steps=settings.steps, visible=visible)
    overview = levels_sheet(opened, originals, codes, seeds, settings.steps)
    for name, picture in zip(distinct_names(images), to_pil(decoded), strict=True):
        print(save_png(picture, out / f"{name}.png"))
    print(save_png(overview, out / "sheet.png"))
