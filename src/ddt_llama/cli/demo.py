"""The verb demo."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ddt_llama.config import UserError


def demo(
    *,
    model: str = "nano",
    images: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
    out: Path = Path("demo"),
    open: bool = False,
) -> None:
    """Draw, rebuild, edit and answer, and show it all on one page; or try it in the browser.

    Example: ddt demo --images my_pictures

    Example: ddt demo --open

    Args:
        model: nano (comes with the program), a folder of ddt train or ddt publish, or a hub name.
        images: A folder of your own pictures to rebuild, too.
        out: The folder to write the page into.
        open: Write nothing: serve the model at this machine, and open its page in the browser.
    """
    if open:
        from ddt_llama.cli.serve import show

        if images is not None:
            raise UserError("--images: with --open pictures are sent in the page; give one of both")
        show(model)
        return
    from ddt_llama.cli.demonstration import demonstrate
    from ddt_llama.config import check_folder
    from ddt_llama.generation import load

    check_folder(out)
    print(demonstrate(lambda: load(model), images, out))
