"""Load on `ddt serve`: many clients at once, some that go away, some that send nonsense.

Starts a server on this machine, sends it drawings, edits and questions by OpenAI's client, and
draws and answers each alone afterwards, or so many of them, by the same model without a server.
Ends with 1 where an error came that was not intended, an answer is not the one computed alone, or
memory grew, of which fewer than 200 answered requests say nothing.

    python scripts/load_test.py --clients 64 --requests 500 --json load.json
    python scripts/load_test.py --requests 4000 --check 40        # memory of a long load
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import numpy as np
import openai
import PIL.Image
import psutil

from ddt_llama.data.images import save_png
from ddt_llama.generation import Model, load
from ddt_llama.shapes.render import render
from ddt_llama.shapes.scene import sample_scene

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLACES = ("at the top left", "at the bottom right", "in the middle", "at the top", "on the left")
QUESTIONS = ("how many shapes are there?", "what colour is the background?", "is there a circle?")
PICTURES = 24  # different ones
LEFT_OUT = 0.4  # share of the requests after which memory counts
GROWTH = 1.02, 16e6  # times and bytes more that memory may have in the second half of the others
JUDGED = 200  # requests; before so many, memory is that of works that had not occurred yet
SHOWN = 100  # samples of memory in the figures


@dataclass
class Wish:
    """One request, and what became of it."""

    kind: str  # draw, edit, ask
    prompt: str
    picture: bytes | None
    options: dict[str, Any]
    streams: bool = False
    number: int = 1
    leaves_after: float | None = None
    malformed: int | None = None
    seconds: float = 0.0
    outcome: str = ""
    answer: Any = None


@dataclass
class Memory:
    """Resident bytes of a process, while requests are answered."""

    process: psutil.Process
    answered: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Note what it is now."""
        self.answered.append(self.process.memory_info().rss)


def wishes(count: int, seed: int) -> list[Wish]:
    """Return a mixture of requests; a tenth will be cancelled, a tenth is malformed."""
    chance = random.Random(seed)
    pictures = []
    for image in render([sample_scene(seed, i) for i in range(PICTURES)], 64):
        content = io.BytesIO()
        pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        PIL.Image.fromarray(pixels).save(content, format="PNG")
        pictures.append(content.getvalue())
    made = []
    for place in range(count):
        kind = chance.choice(("draw", "draw", "edit", "ask"))
        thing = f"{chance.choice(COLOURS)} {chance.choice(SHAPES)}"
        prompt = {
            "draw": f"a {thing} {chance.choice(PLACES)}",
            "edit": f"add a {thing} {chance.choice(PLACES)}",
            "ask": chance.choice(QUESTIONS),
        }[kind]
        options: dict[str, Any] = {"seed": chance.randrange(2**31)}
        if kind != "ask" and chance.random() < 0.3:
            options |= chance.choice(
                ({"guidance_scale": 2.5}, {"top_k": 50}, {"top_p": 0.9}, {"steps": 3})
            )
        wish = Wish(kind, prompt, chance.choice(pictures), options)
        wish.streams = kind != "ask" and chance.random() < 0.2
        wish.number = chance.choice((1, 1, 1, 2)) if kind == "draw" else 1
        if place % 10 == 3:
            wish.leaves_after = chance.uniform(0.0, 1.0)
        if place % 10 == 7:
            wish.malformed = chance.randrange(len(NONSENSE))
        made.append(wish)
    return made


# What is sent, and the status that is the right answer.
NONSENSE: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("images/generations", {"content": b"{"}, 400),
    ("images/generations", {"json": {"prompt": "a ring", "n": 99}}, 400),
    ("images/generations", {"json": {"prompt": "a ring", "model": "other"}}, 404),
    ("images/generations", {"json": {"prompt": "word " * 790}}, 400),
    ("images/generations", {"content": b"x" * 17_000_000}, 413),
    ("images/generations", {"data": {"prompt": "a ring"}}, 415),
    ("images/edits", {"data": {"prompt": "b"}, "files": {"image": b"no picture"}}, 400),
    ("chat/completions", {"json": {"messages": [{"role": "user", "content": "hello"}]}}, 400),
    ("chat/completions", {"json": {"messages": "hello"}}, 400),
    ("nothing/here", {"json": {}}, 404),
)


def url_of(data: bytes) -> str:
    """Return a picture as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def sent(wish: Wish, client: openai.AsyncOpenAI, raw: httpx2.AsyncClient) -> None:
    """Send one request and keep its answer."""
    if wish.malformed is not None:
        path, body, status = NONSENSE[wish.malformed]
        headers = {"Content-Type": "application/json"} if "content" in body else {}
        answer = await raw.post(path, headers=headers, **body)
        assert "error" in answer.json()
        wish.outcome = "refused" if answer.status_code == status else f"{answer.status_code}"
        return
    if wish.kind == "ask":
        content = [
            {"type": "text", "text": wish.prompt},
            {"type": "image_url", "image_url": {"url": url_of(wish.picture or b"")}},
        ]
        messages: Any = [{"role": "user", "content": content}]
        told = await client.chat.completions.create(model="nano", messages=messages)
        wish.answer = told.choices[0].message.content
    else:
        given: dict[str, Any] = {"prompt": wish.prompt, "extra_body": wish.options}
        make = client.images.generate
        if wish.kind == "edit":
            given["image"], make = wish.picture, client.images.edit
        if wish.streams:
            shown = await make(n=wish.number, stream=True, partial_images=2, **given)
            events = [event async for event in shown]
            done = [event for event in events if event.type.endswith(".completed")]
            wish.answer = [event.b64_json for event in done]
        else:
            made = await make(n=wish.number, **given)
            wish.answer = [one.b64_json for one in made.data]
    wish.outcome = "answered"


async def tended(wish: Wish, client: openai.AsyncOpenAI, raw: httpx2.AsyncClient) -> None:
    """Send one request, going away where it is to be cancelled."""
    begun = time.monotonic()
    try:
        await asyncio.wait_for(sent(wish, client, raw), wish.leaves_after)
    except TimeoutError:
        wish.outcome = "cancelled"
    except Exception as error:
        wish.outcome = f"{type(error).__name__}: {error}"
    wish.seconds = time.monotonic() - begun


async def load_on(address: str, asked: list[Wish], clients: int, memory: Memory) -> float:
    """Send all requests, `clients` at a time, and return the seconds that took."""
    waiting = list(reversed(asked))
    pool = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client() -> None:
        while waiting:
            wish = waiting.pop()
            await tended(wish, ours, raw)
            memory.look()

    async with (
        httpx2.AsyncClient(limits=pool, timeout=600) as plain,
        httpx2.AsyncClient(base_url=f"{address}/v1/", limits=pool, timeout=600) as raw,
    ):
        base = f"{address}/v1"
        ours = openai.AsyncOpenAI(base_url=base, api_key="-", max_retries=0, http_client=plain)
        begun = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.monotonic() - begun


def alone(model: Model, wish: Wish) -> Any:
    """Return what the model makes of a request without a server."""
    options = {name: value for name, value in wish.options.items() if name != "seed"}
    if wish.kind == "ask":
        return model.ask(wish.picture or b"", wish.prompt)
    if wish.kind == "edit":
        return model.edit(wish.picture or b"", wish.prompt, seed=wish.options["seed"], **options)
    return model.draw(wish.prompt, num=wish.number, seed=wish.options["seed"], **options)


def equal(answer: Any, own: Any) -> bool:
    """Return whether an answer of the server's is the model's own, to the pixel."""
    if isinstance(own, str):
        return answer == own
    shown = [PIL.Image.open(io.BytesIO(base64.b64decode(one))) for one in answer]
    return len(shown) == len(own) and all(
        np.array_equal(np.asarray(one), np.asarray(other))
        for one, other in zip(shown, own, strict=True)
    )


def figures_of(address: str) -> dict[str, float]:
    """Return the server's own figures."""
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("ddt_")]
    return {name: float(value) for name, value in pairs}


def grown(resident: Sequence[int]) -> tuple[float, float]:
    """Return the usual memory of both halves of a load, in bytes, its beginning left out.

    Medians: a single wave of large pictures is no growth, and none hides it.
    """
    counted = resident[int(len(resident) * LEFT_OUT) :]
    half = len(counted) // 2
    return median(counted[:half]), median(counted[half:])


def flat(early: float, late: float) -> bool:
    """Return whether memory stayed where it was."""
    return late < early * GROWTH[0] + GROWTH[1]


def served(given: argparse.Namespace, asked: list[Wish]) -> dict[str, Any]:
    """Start a server, send it all requests, stop it; return what that took."""
    command = [sys.executable, "-m", "ddt_llama", "serve", given.model, "--port", "0"]
    with subprocess.Popen(
        [*command, *given.server.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            memory = Memory(psutil.Process(server.pid))
            before = sum(memory.process.cpu_times()[:2])
            seconds = asyncio.run(load_on(address, asked, given.clients, memory))
            cpu = sum(memory.process.cpu_times()[:2]) - before
            time.sleep(0.5)
            figures = figures_of(address)
        finally:
            server.terminate()
        stopped = server.wait(60)
    early, late = grown(memory.answered)
    steps = max(1.0, figures["ddt_batch_size_count"])
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "memory_early_mb": round(early / 1e6),
        "memory_late_mb": round(late / 1e6),
        "memory_most_mb": round(max(memory.answered) / 1e6),
        "memory_mb": [round(one / 1e6) for one in thinned(memory.answered)],
        "flat": flat(early, late) if len(memory.answered) >= JUDGED else None,
        "rows_left": figures["ddt_batch_rows"] + figures["ddt_requests_active"],
        "exit": stopped,
        "mean_batch": round(figures["ddt_batch_size_sum"] / steps, 1),
        "tokens": figures["ddt_tokens_total"],
        "seconds_of_work": {
            name.partition('"')[2].partition('"')[0]: round(value, 2)
            for name, value in figures.items()
            if name.startswith("ddt_work_seconds_total")
        },
    }


def thinned(values: Sequence[int]) -> Sequence[int]:
    """Return at most some hundred of many values, at even distances."""
    return values[:: -(-len(values) // SHOWN)]


def compared(given: argparse.Namespace, answered: list[Wish]) -> dict[str, Any]:
    """Compute answers alone, without a server; return what that took, and how many differ."""
    model = load(given.model)
    first = Wish("draw", "a red circle", None, {"seed": 0})
    alone(model, first)  # what is first is slower
    begun, begun_cpu = time.monotonic(), time.process_time()
    own = [alone(model, wish) for wish in answered]
    seconds, cpu = time.monotonic() - begun, time.process_time() - begun_cpu
    wrong = [(w, made) for w, made in zip(answered, own, strict=True) if not equal(w.answer, made)]
    for number, (wish, made) in enumerate(wrong):
        print("not equal:", wish.kind, wish.prompt, wish.options, wish.number, file=sys.stderr)
        if given.wrong and wish.kind != "ask":
            given.wrong.mkdir(exist_ok=True, parents=True)
            data = base64.b64decode(wish.answer[0])
            save_png(PIL.Image.open(io.BytesIO(data)), given.wrong / f"{number}-served.png")
            save_png(made[0], given.wrong / f"{number}-alone.png")
    return {
        "checked": len(answered),
        "not_equal": len(wrong),
        "seconds_one_by_one": round(seconds, 2),
        "cpu_seconds_one_by_one": round(cpu, 2),
    }


def main() -> int:
    """Put load on a server and check what it answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--check", type=int, help="answers that are computed alone; without it all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", default="", help="further options of ddt serve")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wrong", type=Path, help="a folder for pictures that are not equal")
    given = parser.parse_args()
    asked = wishes(given.requests, given.seed)
    together = served(given, asked)
    answered = [wish for wish in asked if wish.outcome == "answered"]
    count = len(answered) if given.check is None else min(given.check, len(answered))
    one_by_one = compared(given, [answered[i * len(answered) // count] for i in range(count)])
    told = Counter(wish.outcome for wish in asked)
    strange = {name: n for name, n in told.items() if name not in OUTCOMES}
    latencies = quantiles([wish.seconds for wish in answered], n=20)
    # One by one all that were answered would have taken so much longer than those computed.
    alone_seconds = one_by_one["seconds_one_by_one"] * len(answered) / max(1, count)
    result = {
        "clients": given.clients,
        "requests": len(asked),
        **{name: told[name] for name in OUTCOMES},
        "strange": strange,
        **one_by_one,
        "times_as_fast": round(alone_seconds / together["seconds"], 2),
        "latency_median_s": round(latencies[9], 2),
        "latency_95_s": round(latencies[18], 2),
        **together,
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = strange or one_by_one["not_equal"] or together["rows_left"] or together["exit"]
    return int(bool(wrong or together["flat"] is False))


OUTCOMES = ("answered", "cancelled", "refused")

if __name__ == "__main__":
    sys.exit(main())
