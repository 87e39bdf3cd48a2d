"""How pictures are drawn unless the caller says otherwise: stored in a release, checked here.

Every number that a user may give to `draw` and `edit` passes through `Settings` or `row_seeds`,
every text through `given_texts`, so the limits and their messages have one home.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ddt_llama.config import UserError, from_dict
from ddt_llama.generation.pictures import SHIFTS
from ddt_llama.generation.sampling import Sampling, TopK, TopP

MAX_IMAGES = 10_000
MAX_STEPS = 10_000
MAX_TRIES = 100
MAX_GUIDANCE = 1e6
SEED_LIMIT = 2**63


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments."""

    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    steps: int | None
    plan: bool | None
    tries: int | None


def check_guidance(scale: float) -> None:
    """Raise UserError for a guidance scale that is none."""
    if not 0.0 <= scale <= MAX_GUIDANCE:
        raise UserError(
            f"guidance_scale is {scale}; it must lie in 0 to {MAX_GUIDANCE:g} "
            "(1 is no guidance, 3 is usual)"
        )


@dataclass(frozen=True)
class Settings:
    """The "generation" section of a release's config.json.

    guidance_scale: 0 ignores the prompt, 1 is the plain model, more follows it more closely.
    steps: denoising steps of the image tokenizer's decoder; 0 is its renderer, if it has one: one
    pass, without noise. 3.0, 1.0, no top_k, no top_p is the public recipe of Selftok; a release
    carries what was tuned for it. edit_guidance_scale, edit_temperature: of edits, None as of
    drawings. An edit is mostly a copy and wants less chance.
    plan, edit_plan: the model first writes a description of the picture that is asked for, and
    draws from that. look: it describes a picture before it answers. All need a model trained to.
    views: a picture is described by so many views of it together, each shifted by a pixel.
    tries: where a picture was planned, the model describes what it drew, and draws again while that
    is not what it planned, so often at most; the likest is kept.
    """

    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    steps: int = 8
    edit_guidance_scale: float | None = None
    edit_temperature: float | None = None
    plan: bool = False
    edit_plan: bool = False
    look: bool = False
    views: int = 1
    tries: int = 1

    def __post_init__(self) -> None:
        """Raise UserError for a value out of range."""
        for scale in (self.guidance_scale, self.edit_guidance_scale):
            if scale is not None:
                check_guidance(scale)
        if not 0 <= self.steps <= MAX_STEPS:
            raise UserError(
                f"steps is {self.steps}; it must be a whole number from 0 to {MAX_STEPS} "
                "(8 is usual, 0 the renderer of a model that has one)"
            )
        if not 1 <= self.tries <= MAX_TRIES:
            raise UserError(
                f"tries is {self.tries}; it must be a whole number from 1 to {MAX_TRIES} "
                "(1 draws once, without a look at it)"
            )
        if not 1 <= self.views <= len(SHIFTS):
            raise UserError(
                f"views is {self.views}; it must be a whole number from 1 to {len(SHIFTS)}"
            )
        if self.top_k is not None and self.top_p is not None:
            raise UserError(
                f"top_k {self.top_k} and top_p {self.top_p} were both given; give one of them"
            )
        self.sampling()
        if self.edit_temperature is not None:
            Sampling(temperature=self.edit_temperature)

    def for_edits(self) -> "Settings":
        """Return these settings with those of edits in the place of those of drawings."""
        scale, temperature = self.edit_guidance_scale, self.edit_temperature
        return dataclasses.replace(
            self,
            guidance_scale=self.guidance_scale if scale is None else scale,
            temperature=self.temperature if temperature is None else temperature,
            plan=self.edit_plan,
            edit_guidance_scale=None,
            edit_temperature=None,
        )

    def sampling(self) -> Sampling:
        """Return method and temperature as values."""
        if self.top_k is not None:
            return Sampling(TopK(self.top_k), self.temperature)
        return Sampling(TopP(1.0 if self.top_p is None else self.top_p), self.temperature)

    def changed(self, options: Mapping[str, Any]) -> "Settings":
        """Return these settings with the given options in their place; None keeps the stored one.

        A given top_k replaces a stored top_p and the reverse. Raises UserError for an unknown
        option, a wrong type or a value out of range.
        """
        given = {name: value for name, value in options.items() if value is not None}
        stored = dataclasses.asdict(self)
        if "top_k" in given:
            stored["top_p"] = None
        if "top_p" in given:
            stored["top_k"] = None
        return from_dict(Settings, {**stored, **given})


def given_texts(texts: str | Sequence[str], what: str) -> list[str]:
    """Return prompts, questions or instructions as a list; refuse none, and empty ones."""
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise UserError(f"no {what} was given; give at least one")
    for text in given:
        if not isinstance(text, str):
            raise UserError(f"a {what} is {type(text).__name__}; it must be text")
        if not text.strip():
            raise UserError(f"the {what} is empty; write what you want, such as 'a red circle'")
    return given


def row_seeds(seed: int | Sequence[int], prompts: int, num: int) -> list[int]:
    """Return the seeds of `prompts` x `num` images, prompt by prompt: seed, seed + 1, ...

    With one seed all prompts share it, so that an image depends on its prompt and its own seed and
    not on its place in a list; a sequence gives each prompt its own first seed.
    """
    _whole("num", num, 1, MAX_IMAGES)
    seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts; give one seed, or one a prompt")
    for first in seeds:
        _whole("seed", first, 0, SEED_LIMIT - num)
    return [first + index for first in seeds for index in range(num)]


def retry_seed(seed: int, attempt: int) -> int:
    """Return the seed of a further attempt at a picture, far from those of other pictures."""
    return (seed + attempt * 0x9E37_79B9_7F4A_7C15) % SEED_LIMIT


def plan_seed(seed: int) -> int:
    """Return the seed of a picture's plan, which no attempt at the picture shares."""
    return retry_seed(seed, MAX_TRIES)


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
