"""The rules of the decode engine: only codes in an image, only text in an answer, rows apart."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ddt_llama.config import UserError
from ddt_llama.generation.batch import Batch, write
from ddt_llama.generation.engine import Answer, Codes, Engine, Task, decoder_of
from ddt_llama.generation.kernels import layout_for
from ddt_llama.generation.sampling import Sampling, TopK, TopP, choose, guide, uniforms
from ddt_llama.language.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=300, codebook_size=256, num_tokens=16)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return untrained(VOCABULARY)


def untrained(vocabulary: Vocabulary) -> Engine:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 if weight.ndim > 1 else 1.0)
    return Engine(decoder_of(model), vocabulary)


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths, the same for the same place."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        torch.randint(0, 300, (3 + 5 * (i % 4),), generator=generator).tolist()
        for i in range(count)
    ]
    return [[VOCABULARY.bos, *row, VOCABULARY.begin_image] for row in rows]


EMPTY = [VOCABULARY.bos, VOCABULARY.begin_image]


def last(engine: Engine, ids: Tensor, head: slice) -> Tensor:
    """Return the logits behind one text, read from nothing."""
    return engine.decoder.logits(engine.decoder.read(ids, [ids.shape[1]]).states, head)


def draw(
    engine: Engine,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    scale: float = 3.0,
    sources: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return the codes of an image behind each prompt, guided."""
    there = [None] * len(rows) if sources is None else [tuple(one) for one in sources]
    tasks = [
        Codes(tuple(row), tuple(EMPTY), scale, seed=seed, source=source)
        for row, seed, source in zip(rows, seeds, there, strict=True)
    ]
    return torch.stack(write(engine, tasks))


def answers(
    engine: Engine, rows: Sequence[Sequence[int]], together: int = 1, **options: Any
) -> list[list[int]]:
    """Return the answer to each `together` prompts; row i has the seed i."""
    prompts = [tuple(row) for row in rows]
    grouped = [tuple(prompts[i : i + together]) for i in range(0, len(prompts), together)]
    tasks = [Answer(each, seed=seed, **options) for seed, each in enumerate(grouped)]
    return [ids.tolist() for ids in write(engine, tasks)]


def test_an_image_is_exactly_num_tokens_codes(engine: Engine) -> None:
    codes = draw(engine, prompts(5), [1, 2, 3, 4, 5])
    assert codes.shape == (5, 16)
    assert codes.dtype == torch.int64
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 256
    assert len(codes.unique()) > 20  # not the same token again and again


def test_an_image_does_not_depend_on_its_company(engine: Engine) -> None:
    rows, seeds = prompts(8), [11 * i for i in range(8)]
    together = draw(engine, rows, seeds)
    for row in range(8):
        alone = draw(engine, rows[row : row + 1], seeds[row : row + 1])
        assert torch.equal(alone[0], together[row])
    backwards = draw(engine, rows[::-1], seeds[::-1])
    assert torch.equal(backwards.flip(0), together)


def test_the_seed_decides_and_the_prompt_decides(engine: Engine) -> None:
    rows = prompts(2)
    first = draw(engine, [rows[0], rows[0], rows[1]], [1, 2, 1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert torch.equal(draw(engine, [rows[0]], [2])[0], first[1])


def test_guidance_at_one_reads_no_second_row_and_at_zero_forgets_the_prompt(engine: Engine) -> None:
    rows = prompts(3)
    seeds = [1, 2, 3]
    plain = torch.stack(
        write(engine, [Codes(tuple(r), seed=s) for r, s in zip(rows, seeds, strict=True)])
    )
    one, zero = draw(engine, rows, seeds, scale=1.0), draw(engine, rows, seeds, scale=0.0)
    assert len(Codes((1,), (2,), 1.0).prompts) == 1 < len(Codes((1,), (2,), 0.0).prompts)
    assert torch.equal(plain, one)
    assert torch.equal(zero, draw(engine, [EMPTY] * 3, seeds, scale=1.0))
    assert not torch.equal(plain, zero)


def test_an_answer_holds_only_known_text(engine: Engine) -> None:
    asked = Engine(engine.decoder, VOCABULARY, num_text=40)
    told = answers(asked, prompts(6), sampling=Sampling(temperature=3.0))
    assert any(told)
    assert all(0 <= token < 40 for answer in told for token in answer)
    assert all(len(answer) <= 96 for answer in told)


def test_an_answer_ends_at_the_end_mark_alone_and_in_company(engine: Engine) -> None:
    asked = Engine(engine.decoder, VOCABULARY, num_text=6)  # so few that the end comes up
    rows, sampling = prompts(6), Sampling(TopK(5), temperature=4.0)
    together = answers(asked, rows, sampling=sampling, most=40)
    assert len({len(answer) for answer in together}) > 2
    assert min(map(len, together)) < 40
    for row, answer in enumerate(together):
        alone = write(asked, [Answer((tuple(rows[row]),), sampling, seed=row, most=40)])
        assert alone[0].tolist() == answer


def test_answers_are_greedy_unless_told_otherwise(engine: Engine) -> None:
    rows = prompts(3)
    others = write(
        engine, [Answer((tuple(row),), seed=9 + i, most=9) for i, row in enumerate(rows)]
    )
    assert answers(engine, rows, most=9) == [ids.tolist() for ids in others]


def test_prompts_answered_together_are_written_by_the_mean_of_their_log_probabilities(
    engine: Engine,
) -> None:
    rows, steps = prompts(6), 12
    told = answers(engine, rows, together=3, most=steps)
    assert len(told) == 2
    ids = torch.arange(VOCABULARY.code_offset)
    impossible = (ids >= VOCABULARY.text_size) & (ids != VOCABULARY.eos)
    for group, answer in zip((rows[:3], rows[3:]), told, strict=True):
        written: list[int] = []
        while len(written) < steps and VOCABULARY.eos not in written:
            logs = []
            for row in group:  # the plain way: every prompt read anew for every token
                whole = torch.tensor([[*row, *written]])
                logits = last(engine, whole, slice(0, VOCABULARY.code_offset))
                logs.append(logits[0].masked_fill(impossible, -torch.inf).log_softmax(0))
            written.append(int(torch.stack(logs).mean(0).argmax()))
        assert [one for one in written if one != VOCABULARY.eos] == answer
    same = answers(engine, [row for row in rows[:2] for _ in range(4)], together=4, most=steps)
    assert same == answers(engine, rows[:2], most=steps)


def test_an_edit_takes_codes_of_its_source_where_it_writes_same() -> None:
    vocabulary = Vocabulary(text_size=300, codebook_size=4, num_tokens=16)
    engine, rows, seeds = untrained(vocabulary), prompts(4), [5, 6, 7, 8]
    sources = torch.randint(0, 4, (4, 16), generator=torch.Generator().manual_seed(1))
    codes = draw(engine, rows, seeds, sources=sources.tolist())
    head = slice(vocabulary.same, vocabulary.size)
    marks = []
    for row, prompt in enumerate(rows):  # the plain way: everything read anew for every token
        written: list[int] = []
        chance = uniforms([seeds[row]], 16)
        for step in range(16):
            wholes = [torch.tensor([[*begin, *written]]) for begin in (prompt, EMPTY)]
            told, empty = (last(engine, whole, head) for whole in wholes)
            drawn = choose(guide(told, empty, 3.0), Sampling(), chance[step])
            written.append(int(drawn) + vocabulary.same)
        marks.append(torch.tensor(written) == vocabulary.same)
        own = torch.tensor(written) - vocabulary.code_offset
        assert torch.equal(codes[row], torch.where(marks[-1], sources[row], own))
    assert 0 < int(torch.stack(marks).sum()) < 64


def test_codes_are_plain_tensors_that_training_may_read(engine: Engine) -> None:
    assert not draw(engine, prompts(1), [1]).is_inference()


def test_a_prompt_longer_than_the_context_is_refused(engine: Engine) -> None:
    fits = [VOCABULARY.bos, *[1] * 110, VOCABULARY.begin_image]
    assert draw(engine, [fits], [0]).shape == (1, 16)
    with pytest.raises(UserError, match=r"113 tokens long; this model reads at most 112"):
        draw(engine, [[VOCABULARY.bos, *fits]], [0])
    alone = answers(engine, [[1] * 3])
    assert answers(engine, [[1] * 3, [1] * 32])[:1] == alone  # as it is alone
    with pytest.raises(UserError, match="33 tokens long; this model reads at most 32 and"):
        answers(engine, [[1] * 3, [1] * 33])


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    for task in (Codes(()), Answer(()), Answer(((),))):
        with pytest.raises(UserError, match="no tokens"):
            write(engine, [task])
    assert write(engine, []) == []


def mixed() -> list[Task]:
    """Tasks of all kinds: images guided and not, edits, answers to one prompt and to three."""
    rows, source = [tuple(row) for row in prompts(8)], (1, 2, 3, 4) * 4
    return [
        Codes(rows[0], tuple(EMPTY), 3.0, seed=1),
        Answer((rows[1],), Sampling(TopK(9), 2.0), seed=5, most=7),
        Codes(rows[2], seed=3),
        Codes(rows[3], (VOCABULARY.bos, 5), 1.5, Sampling(TopP(0.8)), seed=4, source=source),
        Answer(tuple(rows[4:7]), seed=6, most=12),
        Codes(rows[7], tuple(EMPTY), 2.0, Sampling(temperature=0.5), seed=7),
    ]


def test_answers_that_join_and_leave_at_any_step_are_those_written_alone(engine: Engine) -> None:
    tasks = mixed()
    alone = [write(engine, [task])[0] for task in tasks]
    for start in range(3):  # who begins, and who joins how late
        batch = Batch(engine, engine.rows(7, 64))
        waiting, places, results = [*range(start, 6), *range(start)], {}, {}
        for step in range(200):
            if step % 3 == 0:
                fit = min(1, batch.fitting([tasks[place] for place in waiting]))
                tickets = batch.join([tasks[place] for place in waiting[:fit]])
                places |= dict(zip(tickets, waiting, strict=False))
                del waiting[:fit]
            results |= {places[ticket]: ids for ticket, ids in batch.step()}
        assert len(batch) == 0
        assert batch.room == 7
        for place, ids in enumerate(alone):
            assert torch.equal(results[place], ids), f"task {place}, start {start}"


def test_who_goes_away_leaves_its_rows_and_disturbs_nobody(engine: Engine) -> None:
    tasks = mixed()
    alone = [write(engine, [task])[0] for task in tasks]
    batch = Batch(engine, engine.rows(11, 64))
    tickets = batch.join(tasks)
    assert batch.room == 0
    for _ in range(3):
        assert batch.step() == []
    assert torch.equal(batch.so_far(tickets[0]), alone[0][:3])
    assert torch.equal(batch.so_far(tickets[3]), alone[3][:3])
    batch.leave(tickets[0])
    batch.leave(tickets[4])
    assert batch.room == 5  # two and three rows
    left = {}
    while batch:
        left |= dict(batch.step())
    assert set(left) == {tickets[place] for place in (1, 2, 3, 5)}
    for place in (1, 2, 3, 5):
        assert torch.equal(left[tickets[place]], alone[place])


def test_company_changes_no_bit_of_a_row_where_products_are_packed(engine: Engine) -> None:
    if layout_for(torch.zeros(8, 8)) != "packed":
        pytest.skip("products of this CPU depend on the number of rows in their last bits")
    rows = [*prompts(20), *prompts(20)]
    company = Batch(engine, engine.rows(40, 64))
    company.join([Codes(tuple(row), seed=seed) for seed, row in enumerate(rows)])
    alone = Batch(engine, engine.rows(1, 40))
    alone.join([Codes(tuple(rows[3]), seed=3)])
    for _ in range(15):
        company.step(), alone.step()
        assert company._states is not None
        assert alone._states is not None
        assert torch.equal(company._states[3], alone._states[0])


def test_the_prompt_that_guidance_compares_with_is_read_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, read = Engine(engine.decoder, VOCABULARY), []
    plain = engine.decoder.read

    def watched(ids: Tensor, lengths: Sequence[int]) -> Any:
        read.append([row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)])
        return plain(ids, lengths)

    monkeypatch.setattr(engine.decoder, "read", watched)
    rows = prompts(2)
    first, second = draw(fresh, rows[:1], [1]), draw(fresh, rows[1:], [2])
    assert read == [[rows[0], EMPTY], [rows[1]]]
    assert torch.equal(torch.cat([first, second]), draw(engine, rows, [1, 2]))
