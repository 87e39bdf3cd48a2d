"""The verb demo."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg


def demo(
    *,
    model: str = "nano",
    images: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    out: Path = Path("demo"),
) -> None:
    """Draw, rebuild, edit and answer, and show it all on one page.

    Example: ddt demo --images my_pictures

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        images: A folder of your own pictures to rebuild, too.
        out: The folder to write the page into.
    """
    from ddt_llama.cli.demonstration import demonstrate
    from ddt_llama.config import check_folder
    from ddt_llama.generation import load

    check_folder(out)
    print(demonstrate(lambda: load(model), images, out))
