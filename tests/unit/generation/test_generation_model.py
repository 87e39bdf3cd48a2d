"""Model and release folders, with a tokenizer simple enough to know every code by hand."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from ddt_llama.config import UserError, save_json
from ddt_llama.generation import Model, Settings, load, release
from ddt_llama.generation.batch import write
from ddt_llama.generation.engine import Answer, Codes, Engine, Task
from ddt_llama.generation.generic import GenericDecoder
from ddt_llama.generation.lean import LeanDecoder
from ddt_llama.generation.pictures import SHIFTS, read_images, views
from ddt_llama.generation.sampling import Sampling, TopK
from ddt_llama.generation.settings import plan_seed, retry_seed
from ddt_llama.generation.tries import likeness
from ddt_llama.language import backbone, documents
from ddt_llama.language.backbone import BackboneConfig
from ddt_llama.language.documents import (
    Document,
    ask,
    describe,
    draw,
    edit,
    image_to_text,
    plan,
    render,
    without_text,
)
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary

SIZE = 16
NUM_TOKENS = 4


class QuarterTokenizer:
    """Code = brightness (0..63) of a quarter of the image; the language order is reversed."""

    num_tokens = NUM_TOKENS
    codebook_size = 64
    image_size = SIZE
    refines = prefixes = True
    renders = False

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def encode(self, images: Tensor) -> Tensor:
        quarters = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), SIZE // 2)
        return ((quarters.flatten(1) + 1) * 31.5).round().long()

    def decode(
        self,
        codes: Tensor,
        *,
        steps: int = 8,
        visible: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        self.calls.append({"steps": steps, "visible": visible, "seed": seed})
        grey = codes.view(-1, 1, 2, 2).float() / 31.5 - 1
        return grey.repeat(1, 3, 1, 1).repeat_interleave(8, -1).repeat_interleave(8, -2)

    def code_vectors(self) -> Tensor:
        return torch.eye(self.codebook_size)

    def to_language(self, codes: Tensor) -> Tensor:
        return codes.flip(1)

    def from_language(self, codes: Tensor) -> Tensor:
        return codes.flip(1)

    def fingerprint(self) -> str:
        return "stand-in"

    def save(self, folder: Path, *, dtype: object = None) -> None:
        save_json(folder / "config.json", {"type": "quarter"})


VOCABULARY = Vocabulary(text_size=260, codebook_size=64, num_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(["a red circle", "blue squares are left of a ring"], 260)


def language(family: Any = "llama", seed: int = 0) -> Any:
    config = BackboneConfig(
        family,
        dim=32,
        depth=2,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=48,
        max_positions=256,
        init_std=0.3,
    )
    return backbone.build(config, VOCABULARY, seed=seed).eval()


@pytest.fixture(scope="module")
def model(text: TextTokenizer) -> Model:
    return Model(QuarterTokenizer(), language(), VOCABULARY, text, name="quarters")


def image(code: int) -> Tensor:
    return torch.full((3, SIZE, SIZE), code / 31.5 - 1)


def same(a: PIL.Image.Image, b: PIL.Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_images_come_prompt_by_prompt_and_each_is_that_of_its_own_seed(model: Model) -> None:
    pictures = model.draw(["a red circle", "a ring"], num=3, seed=7)
    assert len(pictures) == 6
    assert pictures[0].size == (SIZE, SIZE)
    for place, (prompt, seed) in enumerate(
        (p, s) for p in ("a red circle", "a ring") for s in (7, 8, 9)
    ):
        assert same(model.draw(prompt, seed=seed)[0], pictures[place])
    assert not same(pictures[0], pictures[1])
    codes = model.draw_codes(["a red circle", "a ring"], num=3, seed=[7, 107])
    assert torch.equal(codes[:3], model.draw_codes("a red circle", num=3, seed=7))
    assert torch.equal(codes[3:], model.draw_codes("a ring", num=3, seed=107))


def test_batches_may_be_of_any_size(text: TextTokenizer) -> None:
    model = Model(QuarterTokenizer(), language(), VOCABULARY, text)
    whole = model.draw_codes(["a red circle", "a ring"], num=3)
    model.batch_size = 2
    assert torch.equal(model.draw_codes(["a red circle", "a ring"], num=3), whole)
    assert len(model.draw(["a red circle", "a ring"], num=3)) == 6
    calls = model.tokenizer.calls
    assert [call["seed"] for call in calls] == [[0, 1], [2, 0], [1, 2]]


def test_prompts_and_twins_are_the_documents_of_training(
    model: Model, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def write(_: Engine, tasks: Sequence[Task], most: int) -> list[Tensor]:
        seen.extend(tasks)
        return [torch.tensor([1, 2, 3, 4] if isinstance(one, Codes) else [65]) for one in tasks]

    def ids(document: Document) -> tuple[int, ...]:
        return tuple(render(document, VOCABULARY, text).ids)

    monkeypatch.setattr("ddt_llama.generation.model.write", write)
    drawn = model.draw_codes("a ring", guidance_scale=2.0, top_k=5, temperature=0.5, seed=3)
    assert drawn.tolist() == [[4, 3, 2, 1]]  # back from the language order
    request = draw("a ring", None)
    first = seen[0]
    assert (first.prompt, first.unconditional) == (ids(request), ids(without_text(request)))
    assert (first.guidance_scale, first.seed, first.source) == (2.0, 3, None)
    assert first.sampling == Sampling(TopK(5), 0.5)
    source = torch.stack([image(10)])
    source[:, :, :8, :8] = image(20)[:, :8, :8]
    model.edit_codes(source, "make it red")
    request = edit([10, 10, 10, 20], "make it red", None)
    changed = seen[1]
    assert (changed.prompt, changed.unconditional) == (ids(request), ids(without_text(request)))
    assert (changed.sampling.temperature, changed.source) == (1.0, (10, 10, 10, 20))
    tuned = replace(model.settings, edit_temperature=0.25, edit_guidance_scale=1.5)
    monkeypatch.setattr(model, "settings", tuned)
    model.edit_codes(source, "make it red", guidance_scale=2.0)
    assert (seen[2].sampling.temperature, seen[2].guidance_scale) == (0.25, 2.0)
    model.draw_codes("a ring")
    assert seen[3].sampling.temperature == 1.0
    model.ask(image(9), "how many?")
    assert seen[4] == Answer((ids(ask([9] * 4, "how many?", None)),))


def test_words_come_first_where_the_release_says_so(
    model: Model, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    drawn: list[list[int]] = []

    def write(_: Engine, tasks: Sequence[Task], most: int) -> list[Tensor]:
        if isinstance(tasks[0], Codes):
            drawn.extend(list(prompt) for task in tasks for prompt in task.prompts[:1])
            return [torch.tensor([1, 2, 3, 4])] * len(tasks)
        asked.extend(list(prompt) for task in tasks for prompt in task.prompts)
        first = text.decode(list(tasks[0].prompts[0]))
        verb = "change answer 1 0 to" if "redder" in first else "answer"
        told = [f"{verb} {len(asked)} {task.seed}" for task in tasks]
        return [torch.tensor(text.encode(one)) for one in told]

    def ids(document: Document) -> list[int]:
        return render(document, VOCABULARY, text).ids

    monkeypatch.setattr("ddt_llama.generation.model.write", write)
    monkeypatch.setattr(model, "settings", Settings(plan=True, edit_plan=True, look=True))
    model.draw_codes("a ring", num=2, seed=5)
    assert asked == [ids(plan("a ring", None))] * 2
    # Each by its own seed, which is not that of its picture.
    assert drawn == [ids(draw(f"answer 2 {plan_seed(seed)}", None)) for seed in (5, 6)]
    asked.clear(), drawn.clear()
    row = [9] * 4
    model.edit_codes(image(9), "redder", seed=7)
    change = plan(documents.to_change("answer 1 0", "redder"), None)
    assert asked == [ids(describe(row, None)), ids(change)]
    assert drawn == [ids(edit(row, documents.with_result("redder", f"2 {plan_seed(7)}"), None))]
    asked.clear()
    assert model.ask(image(9), "how many?") == "answer 2 0"
    turns = ask(row, documents.DESCRIBE, "answer 1 0", [("how many?", None)])
    assert asked == [ids(describe(row, None)), ids(turns)]
    asked.clear()
    assert len(model.ask_many(image(9), ["how many?", "which?"])) == 2
    assert asked[0] == ids(describe(row, None))  # looked at once for both
    assert len(asked) == 3
    asked.clear()
    model.settings = replace(model.settings, views=3)  # three views of a picture, one answer
    assert model.describe(image(9)) == "answer 3 0"
    assert asked == [ids(describe(row, None))] * 3
    asked.clear()
    model.ask(image(9), "how many?")
    model.edit_codes(image(9), "redder", seed=7)
    assert [asked.count(ids(describe(row, None))), len(asked)] == [6, 8]
    asked.clear()
    assert model.plan(["a ring", "a star"], seed=3) == [f"answer 2 {plan_seed(3)}"] * 2
    model.draw_codes("a ring", plan=False)
    assert drawn[-1] == ids(draw("a ring", None))
    monkeypatch.setattr(model, "stage", "pretrain")
    with pytest.raises(UserError, match="cannot plan"):
        model.draw_codes("a ring")


def test_lists_are_alike_in_any_order() -> None:
    planned = "star top, ring left, white background"
    assert likeness("ring left, star top, white background", planned) == 1
    turned = likeness("star left, ring top, white background", planned)
    other = likeness("two squares", planned)
    assert 1 > turned > other


def test_what_is_read_otherwise_than_planned_is_drawn_again_and_the_likest_kept(
    model: Model, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is read in the picture of each seed's attempts 0, 1 and 2.
    readings = {
        5: ["a ring", "", ""],
        6: ["a", "red ring", "a red ring"],
        7: ["a", "a big", "ring"],
    }
    plans = dict(
        zip(map(plan_seed, readings), ["a ring", "a red ring", "a big red ring"], strict=True)
    )
    tries: list[list[int]] = []
    shown = {
        retry_seed(seed, attempt): (10 * seed + attempt, words)
        for seed, all_words in readings.items()
        for attempt, words in enumerate(all_words)
    }
    read = {code % 64: words for code, words in shown.values()}

    def written(task: Task) -> Tensor:
        if isinstance(task, Codes):
            return torch.tensor([shown[task.seed][0] % 64] * 4)
        assert len(task.prompts) == 1  # a try is read by its own codes
        codes = [i - VOCABULARY.code_offset for i in task.prompts[0]]
        codes = [code for code in codes if code >= 0]
        return torch.tensor(text.encode(read[codes[0]] if codes else plans[task.seed]))

    def write(_: Engine, tasks: Sequence[Task], most: int) -> list[Tensor]:
        if isinstance(tasks[0], Codes):
            tries.append([task.seed for task in tasks if isinstance(task, Codes)])
        return [written(task) for task in tasks]

    monkeypatch.setattr("ddt_llama.generation.model.write", write)
    monkeypatch.setattr(model, "settings", Settings(plan=True, tries=3))
    kept = model.draw_codes("what", num=3, seed=5)
    assert kept[:, 0].tolist() == [50, 62, 71 % 64]
    assert tries == [
        [5, 6, 7],
        [retry_seed(s, 1) for s in (6, 7)],
        [retry_seed(s, 2) for s in (6, 7)],
    ]
    assert not {plan_seed(seed) for seed in readings} & {seed for own in tries for seed in own}
    tries.clear()
    assert model.draw_codes("what", num=3, seed=5, tries=1)[:, 0].tolist() == [50, 60, 70 % 64]
    assert tries == [[5, 6, 7]]
    with pytest.raises(UserError, match="tries is 0"):
        model.draw_codes("what", tries=0)


def test_a_pretrained_model_draws_and_describes_in_the_words_of_stage_one(
    text: TextTokenizer,
) -> None:
    model = Model(QuarterTokenizer(), language(), VOCABULARY, text, stage="pretrain", name="p")
    assert len(model.draw("a ring")) == 1
    assert model.engine is not None
    asked = render(image_to_text([9] * 4, None), VOCABULARY, text).ids
    expected = write(model.engine, [Answer((tuple(asked),))])
    assert model.describe(image(9)) == text.decode(expected[0].tolist()).strip()
    for call in (lambda: model.ask(image(9), "what?"), lambda: model.edit(image(9), "redder")):
        with pytest.raises(UserError, match="pretrained only"):
            call()


def test_answers_are_the_same_alone_and_together(model: Model) -> None:
    images = torch.stack([image(5), image(40), image(60)])
    together = model.ask_many(images, ["what?", "how many rings?", "is it blue?"])
    assert together[1] == model.ask(image(40), "how many rings?")
    assert model.ask_many(image(5), ["what?", "how?"])[0] == together[0]
    assert model.describe_many(images)[2] == model.describe(image(60))


def test_one_image_or_one_instruction_serves_for_all(model: Model) -> None:
    pair = model.edit_codes([image(5), image(40)], "make it red", seed=3)
    assert torch.equal(pair[1:], model.edit_codes(image(40), ["make it red"], seed=3))
    assert len(model.edit(image(5), ["make it red", "add a ring"], num=2)) == 4
    with pytest.raises(UserError, match="3 images for 2 texts"):
        model.edit([image(1)] * 3, ["one", "two"])


def test_images_may_be_files_bytes_pil_images_or_tensors(model: Model, tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(np.full((40, 60, 3), 130, dtype=np.uint8))
    path = tmp_path / "grey.png"
    picture.save(path)
    expected = [[round(130 / 255 * 63)] * 4]
    for given in (path, str(path), path.read_bytes(), picture, picture.convert("CMYK")):
        assert model.encode(given).tolist() == expected
    assert model.encode([path, picture, image(32)]).shape == (3, 4)
    assert same(model.reconstruct(image(32))[0], model.reconstruct(torch.stack([image(32)]))[0])


def test_reconstruction_passes_steps_and_visible_on(text: TextTokenizer) -> None:
    model = Model(QuarterTokenizer(), settings=Settings(steps=5), name="only-tokenizer")
    images = [image(8), image(50)]
    again = model.reconstruct(images, visible=2, seed=4)
    assert abs(int(np.asarray(again[1])[0, 0, 0]) - round(50 / 63 * 255)) <= 1
    model.reconstruct(images, steps=3)
    assert [(c["steps"], c["visible"], c["seed"]) for c in model.tokenizer.calls] == [
        (5, 2, [4, 4]),
        (3, None, [0, 0]),
    ]
    with pytest.raises(UserError, match="only-tokenizer is an image tokenizer without"):
        model.draw("a ring")
    with pytest.raises(UserError, match="without a language model"):
        model.ask(image(8), "what?")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": 1e39}, "guidance_scale is 1e"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 3, "top_p": 0.5}, "both given"),
        ({"num": 0}, "num is 0"),
        ({"num": 10_001}, "num is 10001"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 2**63 - 1, "num": 2}, "seed is 9223372036854775807"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(
    model: Model, options: dict[str, Any], told: str
) -> None:
    for call in (
        lambda: model.draw("a ring", **options),
        lambda: model.draw_codes("a ring", **options),
        lambda: model.edit(image(3), "redder", **options),
    ):
        with pytest.raises(UserError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_empty_long_and_foreign_prompts(model: Model) -> None:
    for empty in ("", "  \n", ["a ring", ""], []):
        with pytest.raises(UserError, match=r"empty|no prompt"):
            model.draw(empty)
    with pytest.raises(UserError, match="empty"):
        model.ask(image(1), " ")
    with pytest.raises(UserError, match=r"tokens long; this model reads at most 252"):
        model.draw("word " * 10_000)
    assert len(model.draw(["دائرة حمراء", "a 🔴 on blue", "红色的圆"])) == 3


def test_views_are_shifted_by_a_pixel_and_repeat_the_edge() -> None:
    pictures = torch.rand(2, 3, 6, 5)
    shown = views(pictures, len(SHIFTS)).unflatten(0, (2, len(SHIFTS)))
    assert torch.equal(shown[:, 0], pictures)
    for place, (right, down) in enumerate(SHIFTS):
        moved = pictures.roll((down, right), (2, 3))
        inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        assert torch.equal(shown[:, place][inside], moved[inside])
    assert torch.equal(shown[:, SHIFTS.index((1, 0))][..., 0], pictures[..., 0])
    for count in (0, len(SHIFTS) + 1):
        with pytest.raises(UserError, match=f"views is {count}"):
            Settings(views=count)


def test_wrong_image_tensors_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match=r"reads \(3, 16, 16\)"):
        model.reconstruct(torch.zeros(3, 8, 8))
    with pytest.raises(UserError, match="outside"):
        model.reconstruct(image(3) * 255)
    with pytest.raises(UserError, match="outside"):
        model.reconstruct(torch.full((1, 3, SIZE, SIZE), float("nan")))
    for nothing in ([], torch.zeros(0, 3, SIZE, SIZE)):
        with pytest.raises(UserError, match="no image"):
            model.reconstruct(nothing)


def test_a_pil_image_is_turned_upright_as_its_file_is(tmp_path: Path) -> None:
    tall = PIL.Image.new("RGB", (SIZE, SIZE), "red")
    tall.paste("blue", (0, 0, SIZE, SIZE // 2))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    tall.save(tmp_path / "x.png", exif=exif)
    from_file = read_images(tmp_path / "x.png", SIZE)
    assert torch.equal(read_images(PIL.Image.open(tmp_path / "x.png"), SIZE), from_file)
    assert not torch.equal(read_images(tall, SIZE), from_file)


def test_parts_of_different_models_are_refused(text: TextTokenizer) -> None:
    other = Vocabulary(text_size=260, codebook_size=32, num_tokens=NUM_TOKENS)
    with pytest.raises(UserError, match=r"codebook_size 64.* 32; take both from the same"):
        Model(QuarterTokenizer(), None, other, text)
    fewer = Vocabulary(text_size=text.size - 1, codebook_size=64, num_tokens=NUM_TOKENS)
    with pytest.raises(UserError, match=r"text tokenizer has .* ids, .* take both from the same"):
        Model(QuarterTokenizer(), None, fewer, text)


@pytest.fixture
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "_open_tokenizer", lambda folder, device: QuarterTokenizer())


@pytest.mark.usefixtures("quarters")
@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
def test_a_saved_model_is_loaded_whole(tmp_path: Path, text: TextTokenizer, family: str) -> None:
    settings = Settings(guidance_scale=2.0, temperature=0.9, top_k=20, steps=4)
    module = language(family)
    model = Model(QuarterTokenizer(), module, VOCABULARY, text, settings=settings, name="fresh")
    model.save(tmp_path / "release")
    loaded = load(tmp_path / "release", device="cpu")
    assert (loaded.name, loaded.stage, loaded.settings) == ("fresh", "instruct", settings)
    assert loaded.engine is not None
    fast = isinstance(loaded.engine.decoder, LeanDecoder)
    assert fast == (family != "gemma")
    assert fast or isinstance(loaded.engine.decoder, GenericDecoder)
    assert torch.equal(loaded.draw_codes("a ring", num=4), model.draw_codes("a ring", num=4))
    assert loaded.describe(image(9)) == model.describe(image(9))
    for name, weight in module.state_dict().items():
        assert torch.equal(loaded.language.state_dict()[name], weight)


@pytest.mark.usefixtures("quarters")
def test_a_release_may_be_a_tokenizer_alone_and_halved(tmp_path: Path, text: TextTokenizer) -> None:
    Model(QuarterTokenizer(), name="bare").save(tmp_path / "bare")
    assert load(tmp_path / "bare").name == "bare"
    with pytest.raises(UserError, match="without a language model"):
        load(tmp_path / "bare").draw("a ring")
    with pytest.raises(UserError, match="device 'abacus' is not available"):
        load(tmp_path / "bare", device="abacus")
    model = Model(QuarterTokenizer(), language(), VOCABULARY, text)
    model.save(tmp_path / "half", bits=16)
    loaded = load(tmp_path / "half", device="cpu")
    assert loaded.engine is not None
    assert isinstance(loaded.engine.decoder, LeanDecoder)
    assert loaded.engine.decoder.embedding.dtype == torch.float32
    assert len(loaded.draw("a ring")) == 1


@pytest.mark.usefixtures("quarters")
def test_broken_releases_are_named(tmp_path: Path, text: TextTokenizer) -> None:
    folder = tmp_path / "release"
    Model(QuarterTokenizer(), language(), VOCABULARY, text).save(folder)
    weights = folder / "language" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(folder)
    other = Vocabulary(text_size=261, codebook_size=64, num_tokens=NUM_TOKENS)
    weights.write_bytes(whole)
    other.save(folder / "language")
    with pytest.raises(UserError, match="same model"):
        load(folder)
    VOCABULARY.save(folder / "language")
    config = json.loads((folder / "language" / "config.json").read_text())
    save_json(folder / "language" / "config.json", {**config, "num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"another model's .*layers\.2"):
        load(folder)


@pytest.mark.usefixtures("quarters")
def test_the_description_of_a_release_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load(tmp_path)
    good = {"format": "ddt-llama", "version": 2, "name": "x"}
    for wrong, told in (
        ({"format": "other"}, "not a release of ddt-llama"),
        ({"version": 1}, "release version 1, this program reads 2; train or fetch it again"),
        ({"version": 3}, "release version 3, this program reads 2; update ddt-llama"),
        ({"stage": "third"}, "stage 'third'"),
        ({"generation": {"steps": -1}}, "steps is -1"),
        ({"generation": {"stepz": 3}}, "stepz"),
    ):
        save_json(tmp_path / "config.json", {**good, **wrong})
        with pytest.raises(UserError, match=told):
            load(tmp_path)


def test_unknown_names_are_answered_with_what_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"unknown model 'nanno': allowed are .*release folder"):
        load("nanno")
    monkeypatch.setattr(release, "_bundled", lambda: tmp_path / "nano")
    monkeypatch.setattr(release, "_small", lambda: tmp_path / "small")
    with pytest.raises(UserError, match=r"'nano' is not here .*speedrun\.sh"):
        load("nano")
    with pytest.raises(UserError, match=r"'small' is not here .*SIZE=small"):
        load("small")


@pytest.mark.usefixtures("quarters")
def test_hub_names_are_fetched_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    Model(QuarterTokenizer(), name="bare").save(tmp_path)
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        if name == "no/such":
            raise OSError("404 Client Error.\nRepository not found")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("someone/model@v2").name == "bare"
    assert asked[0][:2] == ("someone/model", "v2")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked[0][2])
    with pytest.raises(
        UserError, match=r"not found on the hub .*404 Client Error. Repository"
    ) as e:
        load("no/such")
    assert "\n" not in str(e.value)


def test_options_given_replace_the_stored_ones() -> None:
    stored = Settings(guidance_scale=2.0, top_k=20)
    assert stored.changed({"top_p": 0.9}) == Settings(guidance_scale=2.0, top_p=0.9)
    assert stored.changed({"steps": None, "guidance_scale": 4.0}) == Settings(4.0, top_k=20)
    assert stored.for_edits() == stored
    assert replace(stored, edit_plan=True).for_edits().plan
    assert not replace(stored, plan=True).for_edits().plan
    edits = replace(stored, edit_temperature=0.5).for_edits()
    assert edits == replace(stored, temperature=0.5)
    with pytest.raises(UserError, match="guidance_scale is -1"):
        Settings(edit_guidance_scale=-1.0)
