"""Recorded steps: the codes of plain ones; and a loop that never waits for the device."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddt_llama.config import UserError
from ddt_llama.generation import graphs, kernels, load, release
from ddt_llama.generation.batch import LOOKED, Batch, write
from ddt_llama.generation.engine import Answer, Codes, Engine, Task
from ddt_llama.generation.graphs import Graphs
from ddt_llama.generation.lean import LeanDecoder
from ddt_llama.generation.rows import Rows
from ddt_llama.generation.sampling import Sampling, TopK, TopP
from ddt_llama.language.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=95, codebook_size=64, num_tokens=24)
TWIN = (VOCABULARY.bos, VOCABULARY.begin_image)


def decoder_on(device: str) -> LeanDecoder:
    """Build a random decoder; on "meta" its weights, and all it computes, have no contents."""
    config = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    widths = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    shapes = {f"self_attn.{name}": shape for name, shape in widths.items()}
    shapes |= {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    shapes |= {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
    named = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    named |= {"embed_tokens": (VOCABULARY.size, 32), "norm": (32,)}
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"model.{name}.weight": (0.4 * torch.randn(shape, generator=generator)).to(device)
        for name, shape in named.items()
    }
    return LeanDecoder(config, weights)


def tasks() -> list[Task]:
    """Images of several prompts, guided and not, drawn by several rules."""
    rules = (Sampling(), Sampling(TopK(9), 2.0), Sampling(TopP(0.8)))
    begun: list[Task] = []
    for seed in range(7):
        prompt = (VOCABULARY.bos, *range(1, 2 + 5 * seed), VOCABULARY.begin_image)
        twin = TWIN if seed % 3 else None
        begun.append(Codes(prompt, twin, 2.0, rules[seed % 3], seed=seed))
    return begun


def drawn(decoder: LeanDecoder, change: Callable[[int, Batch, list[int]], None]) -> dict[int, Any]:
    """Write tasks that join one every third step; `change` may do more before each step."""
    engine, waiting, tickets, results = Engine(decoder, VOCABULARY), tasks(), [], {}
    batch = Batch(engine, engine.rows(11, 300))
    for step in range(120):
        if step % 3 == 0 and batch.fitting(waiting[:1]):
            tickets += batch.join([waiting.pop(0)])
        change(step, batch, tickets)
        results |= dict(batch.step())
    assert len(batch) == 0
    return results


class Remembered:
    """What captures where there is no GPU: the function itself, called again, and a count."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        static = step().clone()

        def replay() -> Tensor:
            self.replayed += 1
            return static.copy_(step())  # the memory of a recording is written again and again

        return replay


def leaves_early(step: int, batch: Batch, tickets: list[int]) -> None:
    if step == 14:
        batch.leave(tickets[1])


def test_recorded_steps_write_the_codes_of_plain_ones() -> None:
    decoder, remembered = decoder_on("cpu"), Remembered()
    expected = drawn(decoder, leaves_early)
    decoder.graphs = Graphs(remembered)
    told = drawn(decoder, leaves_early)
    assert told.keys() == expected.keys()
    assert len(told) == 6
    for ticket, codes in expected.items():
        assert torch.equal(told[ticket], codes)
    assert len(torch.stack(list(told.values())).unique()) > 20
    assert remembered.captured <= 5 < 30 < remembered.replayed  # widths 1, 2, 4, 8 and 11


def test_the_next_drawings_use_what_is_recorded() -> None:
    decoder, remembered = decoder_on("cpu"), Remembered()
    expected = write(Engine(decoder, VOCABULARY), tasks()[:5], together=4)
    decoder.graphs = Graphs(remembered)
    engine = Engine(decoder, VOCABULARY)
    for _ in range(2):
        for told, codes in zip(write(engine, tasks()[:5], together=4), expected, strict=True):
            assert torch.equal(told, codes)
        captured = remembered.captured
        write(engine, tasks()[:1])  # fewer rows, fewer slots
        assert captured <= remembered.captured <= captured + 1
    assert captured == remembered.captured
    write(engine, tasks())  # more rows than there are
    assert remembered.captured > captured


def test_a_recording_belongs_to_its_rows_its_width_and_its_slots() -> None:
    decoder, remembered = decoder_on("cpu"), Remembered()
    decoder.graphs = Graphs(remembered)
    ids = torch.tensor([[*range(1, 8)]])
    rows = Rows(6, 300, torch.device("cpu"))
    for count, captured in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (6, 4)):  # 1, 2, 4, all
        rows.put(decoder.read(ids, [7]), [0])
        assert rows.count == count
        decoder.step(torch.ones(count, dtype=torch.int64), rows)
        assert remembered.captured == captured
    states = decoder.step(torch.ones(6, dtype=torch.int64), rows)
    before = states.clone()
    while max(rows.lengths) < graphs.LOOK:
        decoder.step(torch.ones(6, dtype=torch.int64), rows)
    assert torch.equal(states, before)  # who holds states need not know of recordings
    assert remembered.captured == 4
    decoder.step(torch.ones(6, dtype=torch.int64), rows)
    assert remembered.captured == 5
    gone = weakref.ref(rows)
    del rows
    gc.collect()
    assert gone() is None


def test_free_rows_stay_in_their_own_room() -> None:
    """The last row has written all when it goes: its next place would be outside of all rows."""
    decoder = decoder_on("cpu")
    rows = Rows(4, 32, torch.device("cpu"))
    prompts = decoder.read(torch.ones(1, 30, dtype=torch.int64), [30])
    rows.put(prompts, [0, 0, 0, 0])
    for _ in range(2):
        decoder.step(torch.tensor([1, 2, 3, 4]), rows)
    assert rows.drop(3) == 3
    assert rows.drop(0) == 2
    assert rows.positions[rows.count :].tolist() == [0, 0]
    assert rows.places(4)[rows.count :].tolist() == [64, 96]


class NoUploads(TorchFunctionMode):
    """Fails where the host makes a tensor of its own: on a GPU it waits for the copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), "an upload"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_waits_for_the_device_while_codes_are_written(recorded: bool) -> None:
    """Tensors without contents fail where a value is asked for: item, tolist, bool, nonzero."""
    decoder = decoder_on("meta")
    if recorded:
        decoder.graphs = Graphs(Remembered())
    engine = Engine(decoder, VOCABULARY)
    batch = Batch(engine, engine.rows(11, 64))
    batch.join(tasks()[:6])
    batch.step()
    with NoUploads():
        for _ in range(VOCABULARY.num_tokens - 2):
            assert batch.step() == []
    assert len(batch.step()) == 6


def test_the_end_of_an_answer_is_looked_for_every_few_steps() -> None:
    engine = Engine(decoder_on("meta"), VOCABULARY)
    batch = Batch(engine, engine.rows(4, 64))
    batch.join([Answer((TWIN,), seed=1), Answer((TWIN, TWIN), seed=2)])
    batch.step()
    with NoUploads():
        for _ in range(LOOKED - 2):
            batch.step()
    with pytest.raises(NotImplementedError):
        batch.step()


class Compiled:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> LeanDecoder:
    """A decoder with torch's own products and norms, which a GPU has."""
    monkeypatch.setattr(kernels, "_on_cpu", lambda _: False)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # not to be compiled, too
    torch.compiler.reset()
    return decoder_on("cpu")


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_compiled_at_first_serves_all_steps_and_layers(
    bare: LeanDecoder, recorded: bool
) -> None:
    expected, compiled = drawn(bare, leaves_early), Compiled()
    bare.compile(compiled)
    at_first = compiled.count
    assert 2 <= at_first <= 4  # one row or more, and what varies is learnt: not one a layer
    if recorded:
        bare.graphs = Graphs(Remembered())
    told = drawn(bare, leaves_early)
    assert compiled.count == at_first
    assert told.keys() == expected.keys()
    assert all(torch.equal(told[ticket], codes) for ticket, codes in expected.items())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own compiler
def test_the_compiler_that_torch_has_writes_the_same_codes(bare: LeanDecoder) -> None:
    expected = drawn(bare, leaves_early)
    plain = bare._stepped
    bare.compile()
    assert bare._stepped is not plain
    told = drawn(bare, leaves_early)
    assert all(torch.equal(told[ticket], codes) for ticket, codes in expected.items())


def test_a_compiler_that_fails_is_told_of_in_one_line(bare: LeanDecoder) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no compiler\nin sight")

    told = r"^compile: torch could not \(.*no compiler in sight.*C\+\+"
    with pytest.raises(UserError, match=told):
        bare.compile(fails)


def test_steps_are_compiled_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^compile: for GPUs, and this is a cpu; leave it out$"):
        load("nano", device="cpu", compile=True)
    compiled: list[LeanDecoder] = []
    open_decoder, opens = release.open_decoder, release._open_tokenizer
    cpu = torch.device("cpu")
    monkeypatch.setattr(release, "_place", lambda _: torch.device("cuda"))
    monkeypatch.setattr(release, "open_decoder", lambda *a: open_decoder(*a[:2], cpu, *a[3:]))
    monkeypatch.setattr(release, "_open_tokenizer", lambda folder, _: opens(folder, cpu))
    monkeypatch.setattr(LeanDecoder, "compile", lambda self: compiled.append(self))
    load("nano")
    assert compiled == []
    opened = load("nano", compile=True)
    assert opened.engine is not None
    assert compiled == [opened.engine.decoder]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that compiles")
def test_a_gpu_records_what_is_compiled() -> None:
    decoder = decoder_on("cuda")
    expected = drawn(decoder, leaves_early)
    decoder.compile()
    told = drawn(decoder, leaves_early)
    pairs = [(told[ticket], codes) for ticket, codes in expected.items()]
    assert sum(float((one == other).float().mean()) for one, other in pairs) > 0.9 * len(pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that records")
def test_a_gpu_writes_the_same_codes_from_recordings() -> None:
    decoder = decoder_on("cuda")
    assert decoder.graphs is not None
    told = drawn(decoder, leaves_early)
    decoder.graphs = None
    expected = drawn(decoder, leaves_early)
    assert told.keys() == expected.keys()
    assert all(torch.equal(told[ticket], codes) for ticket, codes in expected.items())
