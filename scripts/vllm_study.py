"""Does vLLM write from an exported folder what our engine writes from the release?

Where vLLM and this package are installed side by side. The suite `shapes` is run twice, one try a
picture, without guidance, each picture seen in one view, for vLLM puts no two prompts together.
First our engine and vLLM write everything, the likeliest token each time, and what they write is
compared: plans, pictures, edits, descriptions and answers, each from the same prompt, which vLLM
gets in words. Then vLLM alone draws, edits and answers, at the temperature given, and is judged. No
request has a seed of its own: vLLM 0.32 on a CPU fails where it reads such a prompt in parts.

    ddt export nano models/plain --format hf
    python scripts/vllm_study.py nano models/plain --dtype float32 --out figures-float32.json
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

from ddt_llama.config import save_json
from ddt_llama.evaluation.intervals import flat
from ddt_llama.evaluation.shapes_suite import ShapesSuite
from ddt_llama.generation import load
from ddt_llama.generation.engine import Codes, Engine, Task
from ddt_llama.generation.sampling import GREEDY, Greedy, TopK, TopP
from ddt_llama.language import plain

SUITE = ShapesSuite(temperature=0.4, batch_size=256)


class Stock(Engine):
    """The tasks of our engine, given to vLLM as texts."""

    def __init__(self, own: Engine, folder: Path, llm: Any) -> None:
        super().__init__(own.decoder, own.vocabulary, own.num_text)
        self.llm = llm
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens, self.seconds = 0, 0.0

    def write(self, tasks: Sequence[Task], together: int = 32) -> list[Tensor]:
        """Carry tasks out, all side by side."""
        ids = [list(task.prompts[0]) for task in tasks]
        prompts = [plain.spell(self.tokenizer.backend_tokenizer, row) for row in ids]
        begun = time.perf_counter()
        how = [self.params(task) for task in tasks]
        answers = self.llm.generate(prompts, how, use_tqdm=False)
        self.seconds += time.perf_counter() - begun
        assert [list(answer.prompt_token_ids) for answer in answers] == ids
        return [self.written(*pair) for pair in zip(tasks, answers, strict=True)]

    def params(self, task: Task) -> Any:
        """Return how a task is sampled, and what it may write."""
        method, fields = task.sampling.method, {}
        if isinstance(task, Codes):
            head = self.head(task)
            fields["allowed_token_ids"] = list(range(head.start, head.stop))
        if isinstance(method, TopP):
            fields["top_p"] = method.p
        if isinstance(method, TopK):
            fields["top_k"] = method.k
        temperature = 0.0 if isinstance(method, Greedy) else task.sampling.temperature
        most = self.steps(task)
        return SamplingParams(max_tokens=most, temperature=temperature, **fields)

    def written(self, task: Task, answer: Any) -> Tensor:
        """Return what our engine would: codes, or the ids of a text without its end."""
        ids = list(answer.outputs[0].token_ids)
        self.tokens += len(ids)
        if isinstance(task, Codes):
            names = self.tokenizer.convert_ids_to_tokens(ids)
            assert answer.outputs[0].text == "".join(names)
        elif ids[-1] == self.vocabulary.eos:
            del ids[-1]
        return self.finish(task, torch.tensor(ids, dtype=torch.int64))


class Both(Engine):
    """Our engine, the likeliest token each time, beside vLLM, which is told the same."""

    def __init__(self, own: Engine, stock: Stock) -> None:
        super().__init__(own.decoder, own.vocabulary, own.num_text)
        self.stock = stock
        self.compared: dict[str, list[int | None]] = defaultdict(list)

    def write(self, tasks: Sequence[Task], together: int = 32) -> list[Tensor]:
        """Return what our engine writes."""
        likeliest: list[Task] = [replace(task, sampling=GREEDY) for task in tasks]
        ours = super().write(likeliest, together)
        theirs = self.stock.write(likeliest)
        for task, *pair in zip(tasks, ours, theirs, strict=True):
            edits = isinstance(task, Codes) and task.source is not None
            kind = "edit" if edits else "draw" if isinstance(task, Codes) else "text"
            self.compared[kind].append(parting(*pair))
        return ours


def parting(one: Tensor, other: Tensor) -> int | None:
    """Return where two rows are first different, None where they are the same."""
    if torch.equal(one, other):
        return None
    shorter = min(len(one), len(other))
    places = (one[:shorter] != other[:shorter]).nonzero()
    return int(places[0]) if len(places) else shorter


def told(places: Sequence[int | None]) -> dict[str, Any]:
    """Return how many rows there were, how many were the same, and where the others part."""
    apart = sorted(place for place in places if place is not None)
    return {"rows": len(places), "same": len(places) - len(apart), "part_at": apart}


def main(
    name: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    out: Path,
    dtype: str = "auto",
    judged: bool = True,
    suite: ShapesSuite = SUITE,
) -> None:
    """Compare and score the release NAME and FOLDER, its export.

    Args:
        name: of the release.
        folder: of its export.
        out: the file to be written.
        dtype: of vLLM; "auto" is that of the folder.
        judged: whether vLLM is judged by what it writes alone, too.
        suite: how much is asked; for the comparison, one picture a prompt.
    """
    model = load(name, device="cpu")
    assert model.engine is not None
    alone = {"guidance_scale": 1.0, "edit_guidance_scale": 1.0, "views": 1, "tries": 1}
    model.settings = replace(model.settings, **alone)
    stock = Stock(model.engine, folder, LLM(model=str(folder), dtype=dtype))
    both = Both(model.engine, stock)
    model.engine = both
    replace(suite, images=1).run(model)
    streams = {kind: told(places) for kind, places in both.compared.items()}
    figures: dict[str, Any] = {"streams": streams}
    save_json(out, figures)
    if judged:
        model.engine, stock.tokens, stock.seconds = stock, 0, 0.0
        figures["scores"] = flat(suite.run(model))
        figures["tokens_a_second"] = stock.tokens / stock.seconds
        save_json(out, figures)


if __name__ == "__main__":
    tyro.cli(main)
