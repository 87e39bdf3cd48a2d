"""What a recipe trains on, and the tokenizer's stream: steps to batches of images.

A data set is the word "shapes" (the embedded world, endless) or a path that `data.open_source`
opens; several are mixed by weight. Everything is a pure function of the recipe and the step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError, check_range
from ddt_llama.data.images import Fit
from ddt_llama.data.layouts import extent, has_split
from ddt_llama.data.samples import Sample
from ddt_llama.data.sources import ImageSource, Reading, open_source
from ddt_llama.data.stream import Indexed, Stream
from ddt_llama.runs import MAY_CHANGE
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Scene
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import Tokenizer
from ddt_llama.training.prefetch import TwoPart

SHAPES = "shapes"
HELD_OUT = 0.02  # of data without splits
ENDLESS = 2**40  # scenes; orders are computed, not stored
SAMPLE_SEED = 1_000_003  # of the scenes shown along the way; no recipe trains on this seed


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, the home of nobody
        return False


@dataclass(frozen=True)
class DataConfig:
    """Where pictures come from.

    `paths`: "shapes", or folders of images, WebDataset shards, Parquet files, data sets on disk;
    `weights` of the mixture, one a path (none: all alike). `scenes` bounds the shapes world to so
    many different pictures, whose codes a language run then computes once only (texts stay
    endless).
    `grid`: what a language model is to place itself (objects of scenes to draw, and those that
    edits add or move) stands in the middle of cells of a grid x grid canvas, what edits repaint or
    resize there or on a border, whichever is near; what it is given to edit or to read stands
    anywhere. Of the scenes that a tokenizer trains on every second one stands so, since these are
    the places that it will have to draw (experiments/0026).
    `even`: colours and shapes whose single object is held out are not rarer than others, but for
    that (experiments/0025).
    `in_words`: seven of eight documents of the shapes world that draw, edit or ask hold the
    complete description of what is drawn or asked about, so that a model may plan and look in
    words first (documents "plan"), and an answer that rests on several facts tells them before it.
    `repeats` is the share of plans of pictures that only repeat what is told, which is learned
    first; the others complete a caption.
    `caption_column` and `image_column` name columns of tables that are called otherwise than usual.
    `held_out` is the share of data without splits that training leaves for the samples shown along
    the way. Rows that cannot be used stop the run when they are more than 10 and than
    `broken_share`.
    """

    paths: tuple[str, ...] = (SHAPES,)
    weights: tuple[float, ...] = ()
    max_objects: int = 4
    scenes: int | None = None
    grid: int | None = None
    even: bool = False
    in_words: bool = False
    repeats: float = 0.5
    seed: int = 0
    caption_column: str | None = None
    image_column: str | None = None
    held_out: float = HELD_OUT
    fit: Fit = "crop"
    broken_share: float = field(default=0.05, metadata=MAY_CHANGE)
    cache_dir: str | None = field(default=None, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        """Refuse what cannot be a mixture."""
        if not self.paths:
            raise UserError(f"paths: give {SHAPES!r} or at least one path")
        if self.weights and len(self.weights) != len(self.paths):
            raise UserError(
                f"weights: given {len(self.weights)} for {len(self.paths)} paths; give one for each"
            )
        check_range(self, 1, 6, "max_objects")
        check_range(self, 1, math.inf, "scenes")
        check_range(self, 0, 1, "repeats", "broken_share")
        check_range(self, 4, 64, "grid")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each path."""
        return self.weights or (1.0,) * len(self.paths)

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(
            fit=self.fit,
            broken_share=self.broken_share,
            cache_dir=self.cache_dir,
            held_out=self.held_out,
        )

    def check(self) -> None:
        """Raise UserError where a path does not exist, before anything else is done."""
        for path in self.paths:
            if path != SHAPES and not any(mark in path for mark in "*?[") and not _exists(path):
                raise UserError(
                    f"data: {path} does not exist; give {SHAPES!r}, a folder of images, "
                    "WebDataset shards, Parquet files or a data set on disk"
                )

    def extents(self) -> dict[str, str]:
        """Say of each path on disk how much lies there."""
        return {path: extent(path) for path in self.paths if path != SHAPES}

    def unseen_split(self, path: str) -> str:
        """Return the split that training leaves alone, "train" where the data have no other."""
        found = (name for name in ("val", "test") if has_split(path, name, self.held_out))
        return next(found, "train")

    def measured_split(self, path: str) -> str:
        """Return the split to measure on: what training leaves alone, all where it leaves none."""
        unseen = self.unseen_split(path)
        return "all" if unseen == "train" else unseen

    def open_images(self, path: str, image_size: int, split: str = "train") -> ImageSource[Sample]:
        """Open the pictures at `path`, with captions where there are any."""
        return open_source(
            path,
            image_size=image_size,
            split=split,
            caption_column=self.caption_column,
            image_column=self.image_column,
            options=self.reading,
        )


@dataclass(frozen=True)
class Scenes:
    """The shapes world as scenes, to be rendered a batch at a time; every second on the `grid`."""

    source: ShapesSource
    length: int = ENDLESS
    grid: int | None = None

    def __len__(self) -> int:
        """Return the number of different scenes."""
        return self.length

    def __getitem__(self, index: int, /) -> Scene:
        """Return one scene."""
        source = replace(self.source, grid=self.grid) if index % 2 else self.source
        return source.scene(index)


@dataclass(frozen=True)
class FilePictures:
    """A source of files as pictures alone."""

    source: ImageSource[Sample]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    def __getitem__(self, index: int, /) -> Tensor:
        """Return one picture."""
        return self.source[index].image

    def batch(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the pictures of `indices`."""
        return [sample.image for sample in self.source.batch(indices)]


def image_stream(config: DataConfig, image_size: int, batch: int, device: torch.device) -> TwoPart:
    """Return step -> this process's share of `batch` images, (b, 3, h, w) in [-1, 1].

    Scenes are rendered on `device`, or by the processes that prepare batches.
    """

    def finished(contents: Sequence[Scene | Tensor] | Tensor) -> Float[Tensor, "b 3 h w"]:
        return images_of(contents, image_size, device)

    return TwoPart(partial(_contents, config, image_size, batch), finished)


def _contents(
    config: DataConfig, image_size: int, batch: int, rendered: bool
) -> Callable[[int], Sequence[Scene | Tensor] | Tensor]:
    """Return step -> scenes and pictures, as one tensor where `rendered`."""
    sources: list[Indexed[Scene | Tensor]] = []
    for path in config.paths:
        if path == SHAPES:
            sources.append(Scenes(shapes_source(config), config.scenes or ENDLESS, config.grid))
        else:
            sources.append(FilePictures(config.open_images(path, image_size)))
    stream = Stream(
        sources,
        batch,
        seed=config.seed,
        weights=config.shares,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    if not rendered:
        return stream
    return lambda step: images_of(stream(step), image_size, torch.device("cpu"))


def images_of(
    contents: Sequence[Scene | Tensor] | Tensor, size: int, device: torch.device
) -> Float[Tensor, "b 3 h w"]:
    """Return scenes, rendered, and pictures in their order as one tensor on `device`."""
    if isinstance(contents, Tensor):
        return contents.to(device)
    if contents and all(isinstance(one, Tensor) for one in contents):  # one transfer for all
        return torch.stack([one for one in contents if isinstance(one, Tensor)]).to(device)
    drawn = iter(render([one for one in contents if isinstance(one, Scene)], size, device))
    images = [next(drawn) if isinstance(one, Scene) else one.to(device) for one in contents]
    return torch.stack(images) if images else torch.empty(0, 3, size, size, device=device)


def pictures_of(samples: Sequence[Sample], tokenizer: Tokenizer) -> Float[Tensor, "b 3 h w"]:
    """Return the pictures of samples, on the CPU; of codes what the tokenizer makes of them."""
    images = torch.stack([sample.image for sample in samples])
    return images if images.ndim == 4 else tokenizer.decode(images).cpu()


def shapes_source(config: DataConfig) -> ShapesSource:
    """Return the scenes that this recipe trains on."""
    return ShapesSource(seed=config.seed, max_objects=config.max_objects, even=config.even)


def unseen_images(config: DataConfig, image_size: int, count: int) -> Float[Tensor, "b 3 h w"]:
    """Return `count` images to look at: held out of training wherever the data allow it."""
    each = -(-count // len(config.paths))
    found: list[Tensor] = []
    for path in config.paths:
        if path == SHAPES:
            found += unseen_scenes(config, image_size, each)
            continue
        split = config.unseen_split(path)
        source = config.open_images(path, image_size, split)
        found += [s.image for s in source.batch([i % len(source) for i in range(each)])]
    return torch.stack(found[:count])


def unseen_scenes(config: DataConfig, image_size: int, count: int) -> list[Tensor]:
    """Return renders of scenes that no training stream holds."""
    source = ShapesSource(seed=SAMPLE_SEED, max_objects=config.max_objects, split="heldout")
    return list(render([source.scene(index) for index in range(count)], image_size))
