"""Write a release as a plain folder of Hugging Face, for programs that know nothing of this one.

transformers and vLLM open its top level; `load` opens `image_tokenizer` in it, which turns image
tokens into pixels and back. Its README.md shows how to draw, and how prompts are written.
"""

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from ddt_llama.checkpoint import replaced
from ddt_llama.config import UserError, check_folder, replace_file, save_json
from ddt_llama.generation.model import Model
from ddt_llama.generation.release import find, load
from ddt_llama.language import backbone, documents, plain
from ddt_llama.language.documents import Document
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary

Dtype = Literal["float16", "bfloat16", "float32"]
IMAGES = "image_tokenizer"
PARTS = {  # of an exported folder, beside its weights
    "README.md",
    "config.json",
    "generation_config.json",
    IMAGES,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocabulary.json",
}
CARD = Template("""\
---
library_name: transformers
---

# $name

A language model over text and image tokens, written by `ddt export`. transformers (4.57 or newer)
and vLLM open it as it is; `image_tokenizer` turns image tokens into pixels and back, by ddt-llama.

An image is $num_tokens of the tokens `<img_00000>` to `$last`, between `<|begin_image|>` and
`<|end_image|>`.

## Draw

```python
import ddt_llama
from ddt_llama.data.images import to_pil
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this README is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
images = ddt_llama.load(f"{folder}/image_tokenizer")


def write(prompt, **options):
    given = tokenizer(prompt, return_tensors="pt").to(model.device)
    return model.generate(**given, do_sample=True, **options)[:, given.input_ids.shape[1] :]


words = "a red circle above a blue square"
${plan}first = tokenizer.convert_tokens_to_ids("<img_00000>")
empty = tokenizer("$empty", return_tensors="pt").to(model.device)
how = $how
ids = write(
    f"$draw",
    max_new_tokens=$num_tokens,
    suppress_tokens=list(range(first)),  # all but codes, which are the last ids
    **how,
    negative_prompt_ids=empty.input_ids,
)
codes = images.tokenizer.from_language(ids - first)  # column 0 the finest
to_pil(images.decode(codes, seeds=[0]))[0].save("drawn.png")
```

## Prompts

A call of the tokenizer puts `<|bos|>` before a prompt; an answer in words ends with `<|eos|>`. One
space stands before each text, none before an image token. [IMAGE] is an image, marks included.

```
$prompts
```

The tokens of a picture are `f"<img_{code:05d}>"` for each code of
`images.tokenizer.to_language(images.encode(picture))[0]`. In an edited image `<|same|>` stands for
the token that the source has at the same place.

## vLLM

vLLM knows no guidance: a temperature below the one tuned with it may do better.

```python
import ddt_llama
import torch
from ddt_llama.data.images import to_pil
from vllm import LLM, SamplingParams


def write(prompt, **options):
    return model.generate(prompt, SamplingParams(**options))[0].outputs[0]


if __name__ == "__main__":  # vLLM starts processes that read this file again
    model = LLM(model=".")  # where this README is
    words = "a red circle above a blue square"
${plan_vllm}    ids = write(
        f"$draw",
        max_tokens=$num_tokens,
        allowed_token_ids=list(range($first, $stop)),  # <img_00000> to $last
        temperature=$temperature,
    ).token_ids
    images = ddt_llama.load("image_tokenizer")
    codes = images.tokenizer.from_language(torch.tensor([ids]) - $first)
    to_pil(images.decode(codes, seeds=[0]))[0].save("drawn.png")
```
""")
PLANNED = Template("""\
plan = write(f"$prompt", max_new_tokens=96, top_k=0, top_p=0.9)
words = tokenizer.decode(plan[0], skip_special_tokens=True).strip()  # planned before drawn
""")
PLANNED_VLLM = Template("""\
    words = write(f"$prompt", max_tokens=96, top_p=0.9)
    words = words.text.strip()  # planned before drawn
""")


def export(name: str, folder: Path, dtype: Dtype, *, adapter: str | None = None) -> Path:
    """Write the model of that name (and an adapter, merged) to `folder`, and return the folder.

    Weights of the language model are stored in `dtype`; the image tokenizer's as they are.
    Raises UserError for an image tokenizer alone, for a text tokenizer that cannot be given image
    tokens, or where the folder is another thing.
    """
    check_place(folder)
    check_folder(folder)
    model = load(name, adapter=adapter, device="cpu")
    if model.vocabulary is None or model.text is None:
        raise UserError(
            f"model {name} is an image tokenizer without a language model; give a model with one, "
            "such as nano"
        )
    module: Any = model.language
    language = backbone.Language(module, model.vocabulary, model.text)
    with replaced(folder) as partial:
        tokenizer = plain.save(partial, language, getattr(torch, dtype))
        images = partial / IMAGES
        shutil.copytree(find(name) / "tokenizer", images / "tokenizer")
        save_json(images / "config.json", model.described())
        card = _card(model, model.vocabulary, model.text, tokenizer)
        replace_file(partial / "README.md", card.encode())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    return folder


def check_place(folder: Path) -> None:
    """Raise UserError where `folder` holds other things than an export, which would be lost."""
    inside = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    weights = {name for name in inside if name.startswith("model") and "safetensors" in name}
    if folder.is_file() or inside - weights - PARTS or (inside and IMAGES not in inside):
        raise UserError(f"{folder}: exists and is no exported model; choose another folder")


def _card(model: Model, vocabulary: Vocabulary, text: TextTokenizer, tokenizer: Tokenizer) -> str:
    """Return README.md; its prompts are what `render` lays out, spelled by the tokenizer."""
    settings = model.settings

    def spelled(document: Document) -> str:
        return plain.spell(tokenizer, documents.render(document, vocabulary, text).ids)

    codes = (0,) * vocabulary.num_tokens
    asked = _requests(model, codes)
    image = spelled(documents.image_only(codes)).removesuffix(plain.mark_name("eos"))
    prompts = {task: spelled(one).replace(image, "[IMAGE]") for task, one in asked.items()}
    in_words = {task: prompt.replace("WORDS", "{words}") for task, prompt in prompts.items()}

    def planned(lines: Template) -> str:
        return lines.substitute(prompt=in_words["plan"]) if settings.plan else ""

    how = {"temperature": settings.temperature, "top_k": settings.top_k or 0}
    how |= {"top_p": settings.top_p or 1.0, "guidance_scale": settings.guidance_scale}
    return CARD.substitute(
        name=model.name,
        num_tokens=vocabulary.num_tokens,
        first=vocabulary.code_offset,
        stop=vocabulary.size,
        last=plain.code_name(vocabulary.codebook_size - 1),
        plan=planned(PLANNED),
        plan_vllm=planned(PLANNED_VLLM),
        draw=in_words["draw"],
        empty=spelled(documents.without_text(asked["draw"])),
        how=json.dumps(how),
        temperature=settings.temperature,
        prompts="\n".join(f'{task:<8} "{prompt}"' for task, prompt in prompts.items()),
    )


def _requests(model: Model, codes: tuple[int, ...]) -> dict[str, Document]:
    """Return what a model can be asked for, with words in capitals in the places of texts."""
    if model.stage == "pretrain":
        return {
            "draw": documents.text_to_image("WORDS", None),
            "describe": documents.image_to_text(codes, None),
        }
    return {
        "draw": documents.draw("WORDS", None),
        "edit": documents.edit(codes, "INSTRUCTION", None),
        "ask": documents.ask(codes, "QUESTION", None),
        "describe": documents.describe(codes, None),
        "plan": documents.plan("WORDS", None),
    }
