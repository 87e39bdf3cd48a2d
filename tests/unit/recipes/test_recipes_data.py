"""Streams of images and documents: pure functions of the step, with the right contents."""

import json
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor

from ddt_llama import distributed
from ddt_llama.config import UserError, override
from ddt_llama.data.images import open_image
from ddt_llama.language import TextTokenizer, Vocabulary, collate, documents
from ddt_llama.language.documents import DESCRIBE, IGNORED, KINDS, PLAN, Kind
from ddt_llama.recipes import LanguageRecipe, Mix, language, recipe_named
from ddt_llama.recipes.data import DataConfig, Scenes, image_stream, unseen_images
from ddt_llama.recipes.drafts import (
    QUESTIONS_BESIDE_PLANS,
    QUESTIONS_OF_A_PLAN,
    Draft,
    Picture,
    ShapesDrafts,
    mixture,
    texts,
)
from ddt_llama.recipes.language import CHUNK, Coder, document_stream
from ddt_llama.shapes.captions import (
    caption_and_plan,
    description,
    related_pairs,
)
from ddt_llama.shapes.edits import edit
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import Scene
from ddt_llama.shapes.world import ShapesSource
from ddt_llama.tokenizer import TimestepTokenizer, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.prefetch import Batches

CPU = torch.device("cpu")
COLOURS = ["red", "lime", "blue", "yellow", "black", "gray"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six plain pictures; the first four have captions."""
    place = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(COLOURS):
        Pillow.new("RGB", (40, 30), colour).save(place / f"{number}.png")
        if number < 4:
            (place / f"{number}.txt").write_text(f"all {colour}")
    return place


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


def recipe_of(mix: Mix, **changes: object) -> LanguageRecipe:
    recipe = override(recipe_named("nano_pretrain"), {"train.batch": 12, **changes})
    assert isinstance(recipe, LanguageRecipe)
    return LanguageRecipe(**{**vars(recipe), "mix": mix})


def parts_of(tokenizer: TimestepTokenizer, recipe: LanguageRecipe):
    text = TextTokenizer.train(["a red circle", "how many?"], 300)
    vocabulary = Vocabulary(text.size, tokenizer.codebook_size, tokenizer.num_tokens)
    coder = Coder(tokenizer, CPU)
    return document_stream(recipe, coder, vocabulary, text, 512), vocabulary, text


def identical(one: Iterable[Tensor | None], other: Iterable[Tensor | None]) -> bool:
    """Say whether two batches agree in every part; documents a row have no positions."""
    pairs = list(zip(one, other, strict=True))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def test_images_are_a_pure_function_of_the_step() -> None:
    config = DataConfig(seed=5)
    first, again = (image_stream(config, 32, 6, CPU) for _ in range(2))
    late = again(3)
    assert torch.equal(first(3), late)
    assert late.shape == (6, 3, 32, 32)
    assert not torch.equal(first(3), first(4))
    assert not torch.equal(first(3), image_stream(DataConfig(seed=6), 32, 6, CPU)(3))


def test_a_mixture_has_its_shares(folder: Path) -> None:
    config = DataConfig(paths=("shapes", str(folder)), weights=(3, 1), held_out=0.0)
    images = image_stream(config, 32, 1000, CPU)(0)
    # Only the pictures of the folder have one colour all over.
    plain = (images.flatten(2).std(-1) == 0).all(-1)
    assert int(plain.sum()) == 250


def test_a_bounded_world_repeats_its_scenes() -> None:
    stream = image_stream(DataConfig(scenes=5), 32, 5, CPU)
    passes = [{image.numpy().tobytes() for image in stream(step)} for step in range(2)]
    assert len(passes[0]) == 5
    assert passes[0] == passes[1]


def test_every_second_scene_that_a_tokenizer_sees_stands_on_the_grid() -> None:
    scenes = Scenes(ShapesSource(seed=3), grid=8)
    assert scenes[4] == ShapesSource(seed=3).scene(4)
    assert scenes[5] == ShapesSource(seed=3, grid=8).scene(5)
    assert all(item.x * 8 % 1 == item.y * 8 % 1 == 0.5 for item in scenes[5].objects)
    config = DataConfig(seed=3, scenes=2, grid=8)
    seen = image_stream(config, 32, 2, CPU)(0)
    known = render([scenes[0], scenes[1]], 32)
    assert any(torch.equal(seen, known[list(order)]) for order in ((0, 1), (1, 0)))


def test_pictures_to_look_at_are_held_out(folder: Path) -> None:
    config = DataConfig(paths=(str(folder),), held_out=0.34)
    trained = image_stream(config, 32, 4, CPU)(0)
    shown = unseen_images(config, 32, 2)
    distances = (trained[:, None] - shown[None]).abs().flatten(2).amax(-1)
    assert float(distances.min()) > 0.1


def test_a_single_picture_trains_and_is_shown(tmp_path: Path) -> None:
    Pillow.new("RGB", (20, 20), "red").save(tmp_path / "one.png")
    config = DataConfig(paths=(str(tmp_path),))
    assert torch.equal(image_stream(config, 32, 2, CPU)(0)[0], unseen_images(config, 32, 1)[0])


def test_a_path_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        DataConfig(paths=("shapes", "nowhere")).check()


def test_codes_are_those_of_the_tokenizer_in_language_order(tokenizer: TimestepTokenizer) -> None:
    source = ShapesSource()
    scenes = [source.scene(index) for index in range(CHUNK["cpu"] + 3)]
    rows = Coder(tokenizer, CPU)([Picture(scene) for scene in scenes])
    codes = tokenizer.to_language(tokenizer.encode(render(scenes, 32)))
    assert torch.equal(rows, codes)


def test_known_pictures_are_encoded_once(tokenizer: TimestepTokenizer) -> None:
    coder = Coder(tokenizer, CPU)
    images = render([ShapesSource().scene(index) for index in range(3)], 32)
    first = coder([Picture(images[0], "a"), Picture(images[1], "b"), Picture(images[0], "a")])
    assert torch.equal(first[0], first[2])
    # The key, not the content, says what is known; without a key nothing is.
    again = coder([Picture(images[2], "b"), Picture(images[2])])
    assert torch.equal(again, torch.stack([first[1], coder_of(coder, images[2])]))


def test_pictures_of_one_name_have_codes_of_their_own(
    tokenizer: TimestepTokenizer, tmp_path: Path
) -> None:
    for number, colour in enumerate(("red", "blue")):
        Pillow.new("RGB", (32, 32), colour).save(tmp_path / "0.png")
        (tmp_path / "0.txt").write_text(f"all {colour}")
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in ("0.png", "0.txt"):
                archive.add(tmp_path / name, name)
    config = DataConfig(paths=(str(tmp_path / "*.tar"),), held_out=0.0, cache_dir=str(tmp_path))
    drafts = mixture(config, Mix(draw=1), 32, 2)(0)
    assert {draft.texts[0] for draft in drafts} == {"all red", "all blue"}
    pictures = [draft.pictures[0] for draft in drafts]
    coder = Coder(tokenizer, CPU)
    alone = [coder_of(coder, picture.content) for picture in pictures]
    assert torch.equal(coder(pictures), torch.stack(alone))


def test_codes_are_kept_while_there_is_room(
    tokenizer: TimestepTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "KNOWN_BYTES", 2 * (16 + language.ENTRY_BYTES))
    coder = Coder(tokenizer, CPU)
    images = render([ShapesSource().scene(index) for index in range(4)], 32)
    first = coder([Picture(image, number) for number, image in enumerate(images[:3])])
    swapped = coder([Picture(images[3], number) for number in range(3)])
    assert torch.equal(swapped, torch.stack([first[0], first[1], coder_of(coder, images[3])]))


def test_an_edit_keeps_codes_that_look_nearly_alike(tokenizer: TimestepTokenizer) -> None:
    coder = Coder(tokenizer, CPU)
    kept = tokenizer.quantizer.codebook.clone()
    angles = torch.tensor([0.0, 0.3, 0.34, 3.0])  # cosines with the first: 1, 0.955, 0.943, -0.99
    try:
        tokenizer.quantizer.codebook[:4] = 0
        tokenizer.quantizer.codebook[:4, 0] = angles.cos()
        tokenizer.quantizer.codebook[:4, 1] = angles.sin()
        after = coder.edited(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 1, 2, 3]]))
        assert after.tolist() == [[0, 0, 2, 3]]
    finally:
        tokenizer.quantizer.codebook.copy_(kept)


def test_the_answer_to_an_edit_says_same_where_the_codes_of_its_source_stay(
    tokenizer: TimestepTokenizer,
) -> None:
    recipe = recipe_of(Mix(edit=1), drop_text=0.0)
    stream, vocabulary, _ = parts_of(tokenizer, recipe)
    drafts = mixture(recipe.data, recipe.mix, 32, 12)(2)
    ids, labels, *_ = stream(2)
    coder = Coder(tokenizer, CPU)
    marks = 0
    for draft, row, targets in zip(drafts, ids, labels, strict=True):
        before, after = coder(draft.pictures)
        after = coder.edited(before, after)
        answer = row[targets != IGNORED][1:5]  # behind begin_image
        same = before == after
        wanted = vocabulary.to_ids(after).masked_fill(same, vocabulary.same)
        assert torch.equal(answer, wanted)
        marks += int(same.sum())
    assert 0 < marks < 48


def test_slips_change_what_is_read_and_not_what_is_to_be_drawn(
    tokenizer: TimestepTokenizer,
) -> None:
    plain, vocabulary, _ = parts_of(tokenizer, recipe_of(Mix(edit=1, ask=1)))
    slipping, _, _ = parts_of(tokenizer, recipe_of(Mix(edit=1, ask=1), slips=0.5))
    rows, slipped = 0, 0
    for step in range(8):
        ids, labels, _, kinds, *_ = plain(step)
        read, targets, *_ = slipping(step)
        assert torch.equal(labels, targets)
        for row in range(len(ids)):
            changed = vocabulary.is_code(labels[row]).nonzero().flatten()
            count = int((ids[row] != read[row]).sum())
            first = changed[:count]  # the first ones, at most half
            assert count <= -(-len(changed) // 2)
            assert (read[row, first] == vocabulary.same).all()
            assert torch.equal((ids[row] != read[row]).nonzero().flatten(), first)
            is_edit = KINDS[int(kinds[row, 0])] == "edit" and len(changed) > 0
            rows, slipped = rows + is_edit, slipped + (count > 0)
    assert 0.3 < slipped / rows < 0.7


def coder_of(coder: Coder, image: Scene | Tensor) -> Tensor:
    assert isinstance(image, Tensor)
    return coder.tokenizer.to_language(coder.tokenizer.encode(image[None]))[0]


def test_documents_are_a_pure_function_of_the_step(tokenizer: TimestepTokenizer) -> None:
    recipe = recipe_of(Mix(draw=1, edit=1, ask=1), **{"data.scenes": 50})
    first, _, _ = parts_of(tokenizer, recipe)
    again, _, _ = parts_of(tokenizer, recipe)
    early = [first(step) for step in range(6)]
    late = again(5)  # nothing is known yet, unlike in the first
    assert identical(early[5], late)
    assert not torch.equal(early[4][0][:, :9], early[5][0][:, :9])


def test_bounded_scenes_come_under_new_texts() -> None:
    drafts = ShapesDrafts("draw", ShapesSource(), scenes=3)
    same = [drafts[index] for index in range(1, 100, 3)]
    assert {draft.pictures for draft in same} == {drafts[1].pictures}
    assert len({draft.texts for draft in same}) > 5
    assert drafts[2].pictures != drafts[1].pictures
    edits = ShapesDrafts("edit", ShapesSource(), scenes=3)
    # The target is new each time, so it has no key under which its codes could be kept.
    assert [picture.key for picture in edits[4].pictures] == [("shapes", None, 1), None]


def test_on_a_grid_stands_what_the_model_places_and_nothing_else() -> None:
    def on_grid(kind: Kind, picture: int) -> bool:
        drafts = ShapesDrafts(kind, ShapesSource(), scenes=40, grid=8)
        scenes = [drafts[index].pictures[picture].content for index in range(40)]
        return all(
            (o.x * 8 % 1, o.y * 8 % 1) == (0.5, 0.5)
            for scene in scenes
            if isinstance(scene, Scene)
            for o in scene.objects
        )

    placed: tuple[Kind, ...] = ("draw", "text_to_image", "image_only")
    given: tuple[Kind, ...] = ("edit", "ask", "describe", "image_to_text")
    assert all(on_grid(kind, 0) for kind in placed)
    assert not any(on_grid(kind, 0) for kind in given)
    assert not on_grid("edit", 1)
    both = [ShapesDrafts(kind, ShapesSource(), 40, 8)[3].pictures[0] for kind in ("draw", "ask")]
    assert both[0].key != both[1].key


def test_in_words_most_documents_hold_a_description() -> None:
    source = ShapesSource()

    def texts_of(kind: Kind, index: int, in_words: bool) -> tuple[str, ...]:
        return ShapesDrafts(kind, source, grid=8, in_words=in_words)[index].texts

    for kind in ("draw", "edit", "ask"):
        plain = [texts_of(kind, index, False) for index in range(40)]
        told = [texts_of(kind, index, True) for index in range(40)]
        if kind == "ask":  # all of them answer behind a thought, where there is one
            assert sum(": " in answer for texts in told for answer in texts[1::2]) > 40
            told = [tuple(map(documents.conclusion, texts)) for texts in told]
            assert max(map(len, told)) == 2 + 2 * QUESTIONS_BESIDE_PLANS
            lengths = [len(texts) - 2 * (texts[0] == DESCRIBE) for texts in told]
            plain = [texts[:length] for texts, length in zip(plain, lengths, strict=True)]
        changed = [a != b for a, b in zip(plain, told, strict=True)]
        assert 30 <= sum(changed) <= 39
        for before, after, differs in zip(plain, told, changed, strict=True):
            if not differs:
                continue
            if kind == "ask":
                assert (after[0], *after[2:]) == (DESCRIBE, *before)
            assert any(" background" in text for text in after)
            if kind == "edit":
                assert after[0].startswith(f"{before[0]}; ")


def test_plans_tell_what_was_asked_for_and_edits_what_changes() -> None:
    drafts = ShapesDrafts("plan", ShapesSource(), grid=8, in_words=True)
    changes, related, reasoned, repeated = [0, 0], 0, 0, 0
    for index in range(60):
        draft = drafts[index]
        assert not draft.pictures
        texts = list(draft.texts)
        second = next(place for place, text in enumerate(texts) if text.startswith(PLAN))
        for half, part in enumerate((texts[:second], texts[second:])):
            asked, answer, *further = part
            asked, number = asked.removeprefix(f"{PLAN} "), 2 * index + half
            scenes = [ShapesSource(grid=8).scene(2 * number + one) for one in (0, 1)]
            # Of two scenes one about which there is something to learn.
            scene = next((one for one in scenes if related_pairs(one)), scenes[0])
            if answer.split()[0] in ("add", "remove", "change"):
                changes[half] += 1
                made = edit(scene, 0, number, max_objects=4, grid=8)
                assert made is not None
                assert asked == documents.to_change(description(scene), made.instruction)
                result = documents.changed(description(scene), answer)
                assert sorted(result.split(", ")) == sorted(description(made.target).split(", "))
                assert not further
                continue
            text, planned = caption_and_plan(scene, 0, number, hard=True)
            assert answer == planned
            assert asked in (text, planned)
            repeated += asked == planned
            related += bool(related_pairs(scene))
            assert further
            assert len(further) <= 2 * QUESTIONS_OF_A_PLAN
            reasoned += sum(": " in one for one in further[1::2])
    assert sum(changes) == 60  # one of two that follow each other
    assert 15 < changes[0] < 45
    assert 15 < repeated < 45  # every second tells at once what is to be planned
    assert related > 30  # of one scene in three there is a clear relation, of one in two of these
    assert reasoned > 150


def test_kinds_have_their_weights(tokenizer: TimestepTokenizer) -> None:
    mix = Mix(text_to_image=5, image_to_text=2, image_only=2, text_only=1)
    drafts = mixture(DataConfig(), mix, 32, 1000)(0)
    assert Counter(draft.kind for draft in drafts) == {
        "text_to_image": 500,
        "image_to_text": 200,
        "image_only": 200,
        "text_only": 100,
    }


def test_answers_only_are_learned_in_the_second_stage(tokenizer: TimestepTokenizer) -> None:
    stream, vocabulary, text = parts_of(tokenizer, recipe_of(Mix(draw=1, edit=1), drop_text=0.0))
    ids, labels, mask, kinds, *_ = stream(0)
    assert ids.shape == labels.shape == mask.shape
    assert set(kinds[:, 0].tolist()) == {KINDS.index("draw"), KINDS.index("edit")}
    learned = labels[labels != IGNORED]
    # [begin_image, four codes, end_image, eos] a document, and nothing else.
    assert len(learned) == len(ids) * 7
    assert learned.min() >= vocabulary.text_size
    assert text.decode(ids[0].tolist()).startswith("USER:")


@pytest.mark.parametrize(("share", "kind"), [(0.0, "draw"), (1.0, "draw"), (1.0, "edit")])
def test_text_is_dropped_and_images_are_kept(
    tokenizer: TimestepTokenizer, share: float, kind: str
) -> None:
    stream, vocabulary, text = parts_of(tokenizer, recipe_of(Mix(**{kind: 1.0}), drop_text=share))
    ids = stream(0)[0]
    said = [text.decode(row.tolist()) for row in ids]
    assert all(("USER: ASSISTANT:" in one) == (share == 1.0) for one in said), said
    images = 2 if kind == "edit" else 1
    assert ((ids == vocabulary.begin_image).sum(1) == images).all()


def test_about_one_text_in_ten_is_dropped(tokenizer: TimestepTokenizer) -> None:
    recipe = recipe_of(Mix(draw=1), **{"train.batch": 100, "data.scenes": 100})
    stream, _, text = parts_of(tokenizer, recipe)
    ids = torch.cat([stream(step)[0][:, :20] for step in range(8)])
    dropped = sum("USER: ASSISTANT:" in text.decode(row.tolist()) for row in ids)
    assert 50 <= dropped <= 110


def test_documents_are_those_rendered_with_their_codes(tokenizer: TimestepTokenizer) -> None:
    recipe = recipe_of(Mix(draw=1, edit=1, ask=1, describe=1, plan=1), **{"data.scenes": 50})
    stream, vocabulary, text = parts_of(tokenizer, recipe)
    coder = Coder(tokenizer, CPU)
    sequences = []
    for place, draft in enumerate(mixture(recipe.data, recipe.mix, 32, 12)(7)):
        codes = coder(draft.pictures)
        if draft.kind == "edit":
            codes[1:] = coder.edited(codes[:1], codes[1:])
        document = draft.document(codes.tolist())
        if document.kind in ("draw", "edit") and language._dropped(recipe, 7 * 12 + place):
            document = documents.without_text(document)
        sequences.append(
            documents.render(document, vocabulary, text, max_length=512, max_text=recipe.max_text)
        )
    plain = collate(sequences, vocabulary.pad)
    assert {one.kind for one in sequences} == {"draw", "edit", "ask", "describe", "plan"}
    assert identical(plain, stream(7))


@pytest.mark.parametrize("length", [0, 96, 300])
def test_two_integers_say_what_is_learned_on_any_number_of_processes(
    tokenizer: TimestepTokenizer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    mix = Mix(text_to_image=1, text_only=1, edit=1, ask=1)
    recipe = recipe_of(mix, pack=length, slips=0.5, **{"data.seed": 3, "data.scenes": 50})

    def learned(processes: int, step: int) -> list[tuple[list[int], list[int]]]:
        """Return every document of a step, in any order, with its targets."""
        found = []
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batch = parts_of(tokenizer, recipe)[0](step)
            assert (batch.positions is None) == (length == 0)
            real = batch.attention_mask.bool()
            ids, labels = batch.ids[real], batch.labels[real]
            starts = (ids == batch.ids[0, 0]).nonzero().flatten().tolist()  # bos
            cuts = list(pairwise([*starts, len(ids)]))
            found += [(ids[a:b].tolist(), labels[a:b].tolist()) for a, b in cuts]
        return sorted(found)

    alone = [learned(1, step) for step in (0, 5)]
    assert alone[0] != alone[1]
    assert [len(one) for one in alone] == [12, 12]
    for processes in (2, 3, 6):
        assert [learned(processes, step) for step in (0, 5)] == alone


def test_other_processes_prepare_the_same_batches(
    tokenizer: TimestepTokenizer, folder: Path
) -> None:
    data = {"data.paths": ("shapes", str(folder)), "data.held_out": 0.0}
    recipe = recipe_of(Mix(text_to_image=1, image_only=1, edit=1), **data)
    for stream in (parts_of(tokenizer, recipe)[0], image_stream(recipe.data, 32, 12, CPU)):
        with Batches(stream, CPU, ahead=1, workers=2) as batches:
            for number in range(3, 6):
                apart, here = batches.take(number), stream(number)
                assert identical(apart, here)
            assert len(multiprocessing.active_children()) == 2


def test_a_mistake_in_another_process_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    stream = image_stream(DataConfig(paths=(str(tmp_path),), held_out=0.0), 32, 2, CPU)
    with pytest.raises(UserError) as here:
        stream(0)
    with pytest.raises(UserError) as apart, Batches(stream, CPU, ahead=1, workers=1) as batches:
        batches.take(0)
    assert str(apart.value) == str(here.value)


def test_batches_are_padded_to_a_multiple(tokenizer: TimestepTokenizer) -> None:
    stream, _, _ = parts_of(tokenizer, recipe_of(Mix(text_to_image=1), pad_multiple=32))
    assert stream(0)[0].shape[1] % 32 == 0


def test_beside_shapes_captions_are_their_own_plans(folder: Path) -> None:
    mix = Mix(draw=1, plan=1)
    beside = DataConfig(paths=(str(folder), "shapes"), weights=(1, 0.001), held_out=0.0)
    drafts = [one for step in range(4) for one in mixture(beside, mix, 32, 12)(step)]
    plans = {one.texts for one in drafts if one.kind == "plan"}
    assert {("all red", "all red"), ("all blue", "all blue")} <= plans
    alone = DataConfig(paths=(str(folder),), held_out=0.0)
    kinds = {one.kind for step in range(4) for one in mixture(alone, mix, 32, 12)(step)}
    assert kinds == {"draw", "image_only"}


def test_beside_shapes_edits_tell_their_results_and_are_planned(tmp_path: Path) -> None:
    for number in range(40):
        for place, colour in (("src", "red"), ("tgt", "blue")):
            picture = Pillow.new("RGB", (32, 32), colour)
            picture.save(tmp_path / f"{number:02}.{place}.png")
        (tmp_path / f"{number:02}.txt").write_text("make it blue")
        captions = {"src_caption": "all red", "tgt_caption": "all blue"}
        (tmp_path / f"{number:02}.json").write_text(json.dumps(captions))

    def drafts(*paths: str) -> list[Draft]:
        config = DataConfig(paths=(str(tmp_path), *paths), held_out=0.0, in_words=True)
        stream = mixture(config, Mix(edit=1, plan=1), 32, 40)
        found = [one for step in range(4) for one in stream(step)]
        return [one for one in found if any("red" in t or "blue" in t for t in one.texts)]

    plan = ("all red; make it blue", "change all red to all blue")
    beside = [one for one in drafts("shapes") if "it blue" in one.texts[0]]
    edits = [one.texts[0] for one in beside if one.kind == "edit"]
    assert {one.texts for one in beside if one.kind == "plan"} == {plan}
    assert set(edits) == {"make it blue", "make it blue; all blue"}
    assert edits.count("make it blue") < len(edits) / 3
    assert {(one.kind, one.texts) for one in drafts()} == {("edit", ("make it blue",))}


def test_pictures_of_a_folder_become_documents(folder: Path) -> None:
    config = DataConfig(paths=(str(folder),), held_out=0.0)
    drafts = [one for step in range(2) for one in mixture(config, Mix(draw=1), 32, 6)(step)]
    known: dict[str, Draft] = {str(one.pictures[0].key): one for one in drafts}
    assert len(known) == 6
    for draft in known.values():
        number = int(Path(str(draft.pictures[0].key[1])).stem)
        content = draft.pictures[0].content
        assert isinstance(content, Tensor)
        assert torch.equal(content, open_image(folder / f"{number}.png", 32))
        # The two without a caption are images alone.
        expected = ("draw", (f"all {COLOURS[number]}",)) if number < 4 else ("image_only", ())
        assert (draft.kind, draft.texts) == expected


def test_data_that_lack_what_is_asked_for_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="none of the documents asked for"):
        mixture(DataConfig(paths=(str(folder),)), Mix(edit=1, ask=1), 32, 4)


def test_the_text_tokenizer_sees_every_kind_of_text(folder: Path) -> None:
    config = DataConfig(paths=("shapes", str(folder)), held_out=0.0)
    found = texts(config, 32, limit=200)
    assert "all red" in found
    learned = TextTokenizer.train(found)
    for phrase in (*documents.LAYOUT, documents.DESCRIBE, documents.PLAN):
        assert len(learned.encode(phrase)) <= len(phrase.split()) + 1  # words and a stop
    assert any(text.endswith(" yes") for text in found)  # a question with its answer
    assert any(text.startswith("make the ") for text in found)  # an instruction
    assert found == texts(config, 32, limit=200)


def test_three_of_five_edits_redraw_something_where_it_stands() -> None:
    drafts = ShapesDrafts("edit", ShapesSource())
    told = [drafts[index].texts[0] for index in range(300)]
    hard = ("make ", "paint ", "change ")  # recolour, resize and background begin so
    share = sum(text.startswith(hard) for text in told) / 300
    easy = ("remove", "delete", "take away", "add", "put", "move")
    assert all(text.startswith((*hard, *easy)) for text in told)
    assert 0.7 < share < 0.9  # those, and the half of the others that happen to be of these kinds
