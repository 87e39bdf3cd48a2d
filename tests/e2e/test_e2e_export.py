"""ddt export: one folder that other programs open, whose README.md runs as it stands."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_pipeline import Pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

import ddt_llama
from ddt_llama.cli import main
from ddt_llama.config import UserError
from ddt_llama.language import documents, plain, render

ROOT = Path(__file__).resolve().parents[2]


def refuse() -> str:
    raise UserError("no text is read as these ids")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "plain"
    assert main(["export", "nano", str(out), "--format", "hf"]) == 0
    return out


def test_the_example_draws_what_it_is_asked_for(nano: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(nano.parent)
    example = blocks(nano / "README.md")[0].replace('folder = "."', 'folder = "plain"')
    assert len(example.splitlines()) <= 30
    torch.manual_seed(0)
    exec(example, {})
    with Image.open("drawn.png") as picture:
        assert picture.size == (64, 64)
        assert "red circle" in ddt_llama.load("nano").describe(picture)


def test_the_page_shows_the_code_of_the_card(nano: Path):
    assert blocks(ROOT / "docs" / "export.md") == blocks(nano / "README.md")


class StandIn:
    """What the example asks of vLLM, which is not here, by transformers."""

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model)

    def generate(self, prompt: str, params: dict[str, Any]) -> list[Any]:
        given = self.tokenizer(prompt, return_tensors="pt")
        how = {"temperature": params.get("temperature", 1.0), "top_p": params.get("top_p", 1.0)}
        if "allowed_token_ids" in params:
            how["prefix_allowed_tokens_fn"] = lambda *_: params["allowed_token_ids"]
        length = params["max_tokens"]
        ids = self.model.generate(**given, do_sample=True, top_k=0, max_new_tokens=length, **how)
        ids = ids[0, given.input_ids.shape[1] :].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, text=text)])]


def test_the_code_for_vllm_draws_what_it_is_asked_for(nano: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(nano)
    code = blocks(nano / "README.md")[1]
    first, stop = map(int, re.findall(r"range\((\d+), (\d+)\)", code)[0])
    tokenizer = AutoTokenizer.from_pretrained(nano)
    names = tokenizer.convert_ids_to_tokens([first - 1, first, stop - 1])
    assert names == ["<|same|>", "<img_00000>", "<img_16383>"]
    assert len(tokenizer) == stop
    vllm = SimpleNamespace(LLM=StandIn, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    exec(code, {"__name__": "__main__"})
    with Image.open("drawn.png") as picture:
        assert "red circle" in ddt_llama.load("nano").describe(picture)
    Path("drawn.png").unlink()


def test_weights_and_codes_are_those_of_the_release(nano: Path, pipeline: Pipeline):
    ours = ddt_llama.load("nano")
    opened = AutoModelForCausalLM.from_pretrained(nano, dtype=torch.float32)
    for name, weight in ours.language.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight)
    images = ddt_llama.load(nano / "image_tokenizer")
    with Image.open(pipeline.picture) as picture:
        assert torch.equal(images.encode(picture), ours.encode(picture))
    assert images.settings == ours.settings
    assert images.history == ours.history


def test_a_pretrained_model_is_asked_in_its_own_way(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    command = ["export", str(pipeline.pretrain), "plain", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert main(command) == 0  # over an older export
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}
    page = Path("plain/README.md").read_text()
    ours = ddt_llama.load(pipeline.pretrain)
    assert ours.vocabulary is not None
    assert ours.text is not None
    tokenizer = AutoTokenizer.from_pretrained("plain")
    codes = [1, 2, 3, 4, 5, 6, 7, 0]
    shown = "".join(f"<img_{code:05d}>" for code in codes)
    shown = f"<|begin_image|>{shown}<|end_image|>"
    asked = {
        "draw": documents.text_to_image("WORDS", None),
        "describe": documents.image_to_text(codes, None),
    }
    for task, document in asked.items():
        (prompt,) = re.findall(rf'^{task} +"(.*)"$', page, re.MULTILINE)
        ids = tokenizer(prompt.replace("[IMAGE]", shown)).input_ids
        assert ids == render(document, ours.vocabulary, ours.text).ids
    with monkeypatch.context() as patched:  # what fails leaves the older one as it was
        patched.setattr(plain, "spell", lambda *_: refuse())
        assert main([*command[:-1], "float32"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}
    exec(blocks(Path("plain/README.md"))[0].replace('"."', '"plain"'), {})
    assert Path("drawn.png").is_file()
    assert json.loads(Path("plain/config.json").read_text())["dtype"] == "bfloat16"
