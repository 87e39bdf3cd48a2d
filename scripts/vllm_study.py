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
from ddt_llama.generation import Model, load
from ddt_llama.generation.engine import Codes, Task
from ddt_llama.generation.sampling import GREEDY, Greedy, TopK, TopP
from ddt_llama.generation.work import Work, Write
from ddt_llama.language import plain

SUITE = ShapesSuite(temperature=0.4, batch_size=256)


class Stock(Model):
    """A model whose words and pictures vLLM writes, from prompts in words."""

    def __init__(self, own: Model, folder: Path, llm: Any) -> None:
        alone = {"guidance_scale": 1.0, "edit_guidance_scale": 1.0, "views": 1, "tries": 1}
        settings = replace(own.settings, **alone)
        parts = (own.tokenizer, None, own.vocabulary, own.text)
        super().__init__(*parts, engine=own.engine, settings=settings, name=own.name)
        self.llm = llm
        self.names = AutoTokenizer.from_pretrained(folder)
        self.tokens, self.seconds = 0, 0.0

    def perform(self, work: Work) -> Any:
        """Do one piece of work."""
        return self.write(work.tasks) if isinstance(work, Write) else super().perform(work)

    def write(self, tasks: Sequence[Task]) -> list[Tensor]:
        """Carry tasks out, all side by side."""
        ids = [list(task.prompts[0]) for task in tasks]
        prompts = [plain.spell(self.names.backend_tokenizer, row) for row in ids]
        how = [self.params(task) for task in tasks]
        begun = time.perf_counter()
        answers = self.llm.generate(prompts, how, use_tqdm=False)
        self.seconds += time.perf_counter() - begun
        assert [list(answer.prompt_token_ids) for answer in answers] == ids
        return [self.written(*pair) for pair in zip(tasks, answers, strict=True)]

    def params(self, task: Task) -> Any:
        """Return how a task is sampled, and what it may write."""
        assert self.engine is not None
        method, fields = task.sampling.method, {}
        if isinstance(task, Codes):
            head = self.engine.head(task)
            fields["allowed_token_ids"] = list(range(head.start, head.stop))
        if isinstance(method, TopP):
            fields["top_p"] = method.p
        if isinstance(method, TopK):
            fields["top_k"] = method.k
        temperature = 0.0 if isinstance(method, Greedy) else task.sampling.temperature
        return SamplingParams(max_tokens=self.engine.steps(task), temperature=temperature, **fields)

    def written(self, task: Task, answer: Any) -> Tensor:
        """Return what our engine would: codes, or the ids of a text without its end."""
        assert self.engine is not None
        ids = list(answer.outputs[0].token_ids)
        self.tokens += len(ids)
        if isinstance(task, Codes):
            assert answer.outputs[0].text == "".join(self.names.convert_ids_to_tokens(ids))
        elif ids[-1] == self.engine.vocabulary.eos:
            del ids[-1]
        return self.engine.finish(task, torch.tensor(ids, dtype=torch.int64))


class Both(Stock):
    """Our engine, the likeliest token each time, beside vLLM, which is told the same."""

    def __init__(self, own: Model, folder: Path, llm: Any) -> None:
        super().__init__(own, folder, llm)
        self.compared: dict[str, list[int | None]] = defaultdict(list)

    def perform(self, work: Work) -> Any:
        """Do one piece of work; what is written is what our engine writes."""
        if not isinstance(work, Write):
            return super().perform(work)
        likeliest: list[Task] = [replace(task, sampling=GREEDY) for task in work.tasks]
        ours = Model.perform(self, Write(likeliest))
        for task, *pair in zip(likeliest, ours, self.write(likeliest), strict=True):
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
    own, llm = load(name, device="cpu"), LLM(model=str(folder), dtype=dtype)
    both = Both(own, folder, llm)
    replace(suite, images=1).run(both)
    streams = {kind: told(places) for kind, places in both.compared.items()}
    figures: dict[str, Any] = {"streams": streams}
    save_json(out, figures)
    if judged:
        stock = Stock(own, folder, llm)
        figures["scores"] = flat(suite.run(stock))
        figures["tokens_a_second"] = stock.tokens / stock.seconds
        save_json(out, figures)


if __name__ == "__main__":
    tyro.cli(main)
