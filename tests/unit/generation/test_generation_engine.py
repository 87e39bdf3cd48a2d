"""The rules of the decode engine: only codes in an image, only text in an answer, rows apart."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ddt_llama.config import UserError
from ddt_llama.generation.engine import Engine, decoder_of
from ddt_llama.generation.sampling import Sampling, TopK, choose, guide, uniforms
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


def draw(engine: Engine, rows: list[list[int]], seeds: list[int], **options: Any) -> Tensor:
    return engine.codes(
        rows, unconditional=[EMPTY] * len(rows), guidance_scale=3.0, seeds=seeds, **options
    )


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
    plain = engine.codes(rows, seeds=[1, 2, 3])
    one = engine.codes(rows, unconditional=[EMPTY] * 3, guidance_scale=1.0, seeds=[1, 2, 3])
    zero = engine.codes(rows, unconditional=[EMPTY] * 3, guidance_scale=0.0, seeds=[1, 2, 3])
    assert torch.equal(plain, one)
    assert torch.equal(zero, engine.codes([EMPTY] * 3, seeds=[1, 2, 3]))
    assert not torch.equal(plain, zero)


def test_an_answer_holds_only_known_text(engine: Engine) -> None:
    asked = Engine(engine.decoder, VOCABULARY, num_text=40)
    answers = asked.text(prompts(6), sampling=Sampling(temperature=3.0), seeds=list(range(6)))
    assert any(answers)
    assert all(0 <= token < 40 for answer in answers for token in answer)
    assert all(len(answer) <= 96 for answer in answers)


def test_an_answer_ends_at_the_end_mark_alone_and_in_company(engine: Engine) -> None:
    asked = Engine(engine.decoder, VOCABULARY, num_text=6)  # so few that the end comes up
    rows, options = prompts(6), {"sampling": Sampling(TopK(5), temperature=4.0), "max_tokens": 40}
    together = asked.text(rows, seeds=list(range(6)), **options)
    assert len({len(answer) for answer in together}) > 2
    assert min(map(len, together)) < 40
    for row, answer in enumerate(together):
        assert asked.text([rows[row]], seeds=[row], **options) == [answer]


def test_answers_are_greedy_unless_told_otherwise(engine: Engine) -> None:
    rows = prompts(3)
    assert engine.text(rows, max_tokens=9) == engine.text(rows, seeds=[7, 8, 9], max_tokens=9)


def test_prompts_answered_together_are_written_by_the_mean_of_their_log_probabilities(
    engine: Engine,
) -> None:
    rows, steps = prompts(6), 12
    answers = engine.text(rows, together=3, max_tokens=steps)
    assert len(answers) == 2
    ids = torch.arange(VOCABULARY.code_offset)
    impossible = (ids >= VOCABULARY.text_size) & (ids != VOCABULARY.eos)
    start = torch.zeros(1, dtype=torch.int64)
    for group, answer in zip((rows[:3], rows[3:]), answers, strict=True):
        written: list[int] = []
        while len(written) < steps and VOCABULARY.eos not in written:
            logs = []
            for row in group:  # the plain way: every prompt read anew for every token
                whole = torch.tensor([[*row, *written]])
                head = slice(0, VOCABULARY.code_offset)
                logits, _ = engine.decoder.prefill(whole, start, start, whole.shape[1], head)
                logs.append(logits[0].masked_fill(impossible, -torch.inf).log_softmax(0))
            written.append(int(torch.stack(logs).mean(0).argmax()))
        assert [one for one in written if one != VOCABULARY.eos] == answer
    same = engine.text([row for row in rows[:2] for _ in range(4)], together=4, max_tokens=steps)
    assert same == engine.text(rows[:2], max_tokens=steps)


def test_an_edit_takes_codes_of_its_source_where_it_writes_same() -> None:
    vocabulary = Vocabulary(text_size=300, codebook_size=4, num_tokens=16)
    engine, rows, seeds = untrained(vocabulary), prompts(4), [5, 6, 7, 8]
    sources = torch.randint(0, 4, (4, 16), generator=torch.Generator().manual_seed(1))
    codes = draw(engine, rows, seeds, sources=sources.tolist())
    start, head = torch.zeros(1, dtype=torch.int64), slice(vocabulary.same, vocabulary.size)
    marks = []
    for row, prompt in enumerate(rows):  # the plain way: everything read anew for every token
        written: list[int] = []
        chance = uniforms([seeds[row]], 16)
        for step in range(16):
            wholes = [torch.tensor([[*begin, *written]]) for begin in (prompt, EMPTY)]
            told, empty = (
                engine.decoder.prefill(whole, start, start, whole.shape[1], head)[0]
                for whole in wholes
            )
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
    alone = engine.text([[1] * 3], max_tokens=96)
    assert engine.text([[1] * 3, [1] * 32], max_tokens=96)[:1] == alone  # as it is alone
    with pytest.raises(UserError, match="33 tokens long; this model reads at most 32 and"):
        engine.text([[1] * 3, [1] * 33], max_tokens=96)


def test_an_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="no tokens"):
        engine.codes([[]], seeds=[0])
    with pytest.raises(UserError, match="no tokens"):
        engine.text([])
