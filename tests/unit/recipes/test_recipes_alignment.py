"""Documents that come twice: which, with whose text, on any number of processes; and their cost."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from ddt_llama import distributed
from ddt_llama.config import UserError, override
from ddt_llama.language import TextTokenizer, Vocabulary
from ddt_llama.recipes import LanguageRecipe, recipe_named
from ddt_llama.recipes.cost import cost_of
from ddt_llama.recipes.language import Coder, document_stream
from ddt_llama.recipes.memory import passed, sizes_of
from ddt_llama.recipes.plan import Memory, Step, choices, plan
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig


@pytest.fixture(scope="module")
def tokenizer() -> TimestepTokenizer:
    torch.manual_seed(0)
    config = TimestepTokenizerConfig(
        image_size=32,
        num_tokens=4,
        quantizer=QuantizerConfig(codebook_size=16, code_dim=4),
        encoder=EncoderConfig(dim=16, depth=1, num_heads=2),
        decoder=DecoderConfig(dim=16, depth=1, num_heads=2),
    )
    return TimestepTokenizer(config).eval().requires_grad_(False)


TEXT = TextTokenizer.train(["a red circle above a blue square", "how many?"], 300)


class Row(NamedTuple):
    """A document of a batch: what is said before its answer, its pictures, its side."""

    said: str
    codes: tuple[int, ...]
    labels: tuple[int, ...]
    side: int


def guidance_free(**changes: Any) -> LanguageRecipe:
    small = {"train.batch": 24, "data.scenes": 50, "drop_text": 0.2, "slips": 0.5}
    recipe = override(recipe_named("guidance_free"), {**small, **changes})
    assert isinstance(recipe, LanguageRecipe)
    return recipe


def rows_of(tokenizer: TimestepTokenizer, recipe: LanguageRecipe, step: int) -> list[Row]:
    vocabulary = Vocabulary(TEXT.size, tokenizer.codebook_size, tokenizer.num_tokens)
    coder = Coder(tokenizer, torch.device("cpu"))
    batch = document_stream(recipe, coder, vocabulary, TEXT, 512)(step)
    assert batch.contrast is not None
    real = batch.attention_mask.bool()
    ids, labels, sides = (part[real] for part in (batch.ids, batch.labels, batch.contrast))
    cuts = [*(ids == vocabulary.bos).nonzero().flatten().tolist(), len(ids)]
    found = []
    for a, b in pairwise(cuts):
        (side,) = set(sides[a:b].tolist())
        said = TEXT.decode([i for i in ids[a:b].tolist() if i < TEXT.size])
        codes = ids[a:b][vocabulary.in_image(ids[a:b])]
        found.append(
            Row(said, tuple(codes.tolist()), tuple(labels[a:b][labels[a:b] >= 0].tolist()), side)
        )
    return found


def test_pictures_come_again_under_another_text(tokenizer: TimestepTokenizer) -> None:
    recipe = guidance_free(**{"alignment.kinds": ("draw", "edit")})
    rows = [row for step in range(3) for row in rows_of(tokenizer, recipe, step)]
    own, others = ([row for row in rows if row.side == side] for side in (1, -1))
    assert len(own) > 20
    for one, other in zip(own, others, strict=True):
        assert (one.codes, one.labels) == (other.codes, other.labels)
        assert one.said != other.said
    told = override(recipe, {"drop_text": 0.0})
    assert isinstance(told, LanguageRecipe)
    known = {row.said for step in range(3) for row in rows_of(tokenizer, told, step)}
    assert {row.said for row in others} <= known
    packed = override(recipe, {"pack": 300})
    assert isinstance(packed, LanguageRecipe)
    again = [row for step in range(3) for row in rows_of(tokenizer, packed, step)]
    assert sorted(again) == sorted(rows)
    # Without text there is nothing to contrast.
    assert all(row.said.strip() != "USER: ASSISTANT:" for row in (*own, *others))
    silent = [row for row in rows if row.said.strip() == "USER: ASSISTANT:"]
    assert silent
    assert {row.side for row in silent} == {0}


def test_only_the_kinds_that_are_to_be_aligned_come_twice(tokenizer: TimestepTokenizer) -> None:
    recipe = guidance_free(**{"alignment.kinds": ("draw",)})
    rows = rows_of(tokenizer, recipe, 0)
    assert {len(row.codes) for row in rows if row.side} == {4}
    assert {8, 4} <= {len(row.codes) for row in rows if row.side == 0}


def test_on_any_number_of_processes(
    tokenizer: TimestepTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = guidance_free(**{"alignment.kinds": ("draw", "edit")})

    def learned(processes: int) -> list[Row]:
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        found = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            found += rows_of(tokenizer, recipe, 5)
        return sorted(found)

    alone = learned(1)
    assert {row.side for row in alone} == {-1, 0, 1}
    for processes in (2, 3, 8):
        assert learned(processes) == alone


def test_equal_texts_are_not_contrasted(tokenizer: TimestepTokenizer, tmp_path: Path) -> None:
    for number, text in enumerate(["a red circle", "a blue square", "a blue square"]):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text)
    given = {"data.paths": (str(tmp_path),), "data.held_out": 0.0, "drop_text": 0.0}
    recipe = guidance_free(**given, **{"train.batch": 3, "mix.edit": 0.0})
    recipe = override(recipe, {f"mix.{kind}": 0.0 for kind in ("ask", "describe", "plan")})
    rows = rows_of(tokenizer, recipe, 0)
    said = [row.said for row in rows if row.side >= 0]
    assert len(said) == 3
    contrasted = [row for row in rows if row.side == -1]
    assert len(contrasted) == 2  # of the three that follow each other in a circle
    assert {row.said.split()[-2] for row in contrasted} == {"circle", "square"}


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.shard: given full, allowed with an alignment"):
        guidance_free(**{"train.shard": "full"})
    with pytest.raises(UserError, match="mix: no draw given, which are what is aligned"):
        guidance_free(**{"alignment.kinds": ("draw",), "mix.draw": 0.0})
    with pytest.raises(UserError, match=r"alignment\.beta: given 0"):
        guidance_free(**{"alignment.beta": "0"})
    with pytest.raises(UserError, match="costs are known for nano, small"):
        cost_of(guidance_free(start="models/other"))


def only_draws(**changes: Any) -> LanguageRecipe:
    kinds = {f"mix.{kind}": 0.0 for kind in ("edit", "ask", "describe", "plan")}
    return guidance_free(**{**kinds, "drop_text": 0.0, "alignment.kinds": ("draw",), **changes})


def test_it_costs_what_two_models_read_twice() -> None:
    recipe = only_draws()
    alone = override(recipe, {"alignment": None})
    assert isinstance(alone, LanguageRecipe)
    assert (recipe.twice, only_draws(drop_text=0.25).twice, alone.twice) == (1, 0.75, 0)
    found, plain = cost_of(recipe), cost_of(override(alone, {"name": "nano_instruct"}))
    # Forward and backward of one (3) and forward of the other (1), both twice.
    assert found.learn / plain.learn == pytest.approx(8 / 3)
    assert found.flops["draw an image"] == plain.flops["draw an image"] / 2
    parameters = sum(plain.parameters.values())
    assert found.memory["frozen copy"] == 4 * parameters
    one, other = sizes_of(recipe), sizes_of(alone)
    assert one.frozen == other.frozen + 4 * parameters + other.buffers


def test_its_pass_holds_what_twice_as_many_documents_hold() -> None:
    small = {"max_text": 8, "backbone.depth": 1}
    recipe, plain = only_draws(**small), only_draws(**small, alignment=None)
    held = [
        max(map(sum, passed(one, batch, kind="cpu", recompute="none", bf16=False).moments))
        for one, batch in ((recipe, 4), (plain, 8))
    ]
    assert held[1] <= held[0] < 1.1 * held[1]


def test_it_is_planned_whole_on_every_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "__init__", lambda step, *_, **__: setattr(step, "encoding", 0))
    monkeypatch.setattr(Step, "kept", lambda *_: 1.0)
    monkeypatch.setattr(Step, "memory", lambda *_: Memory(*[1.0] * len(Memory._fields)))
    monkeypatch.setattr(Step, "most", lambda *_: 8)
    found = plan(guidance_free(), 8, "h100")
    assert {row.choice for row in found.rows} == set(choices(1))
