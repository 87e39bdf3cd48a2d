"""The language model for other programs: marks and codes are tokens that a text can spell.

Beside `backbone`, in whose folders a tokenizer knows text alone. `<|begin_image|>` or `<img_00017>`
in a prompt are read as the ids of `Vocabulary`, and transformers or vLLM write them so.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors

from ddt_llama.config import UserError, load_json, replace_file, save_json
from ddt_llama.language import backbone
from ddt_llama.language.text import TOKENIZER_FILE, TextTokenizer
from ddt_llama.language.vocabulary import MARKS, Vocabulary

TOLD = ("bos", "eos", "pad")  # marks that transformers knows, and leaves out of what it shows


def mark_name(mark: str) -> str:
    """Return the text that stands for a mark.

    >>> mark_name("begin_image")
    '<|begin_image|>'
    """
    return f"<|{mark}|>"


def code_name(code: int) -> str:
    """Return the text that stands for a code.

    >>> code_name(17)
    '<img_00017>'
    """
    return f"<img_{code:05d}>"


def save(
    folder: str | os.PathLike[str], language: backbone.Language, dtype: torch.dtype
) -> Tokenizer:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` open; return its tokenizer.

    Raises UserError for a text tokenizer that cannot be given image tokens.
    """
    folder = Path(folder)
    model, vocabulary, text = language
    tokenizer = named(text, vocabulary)
    backbone.save(folder, model, vocabulary, text, dtype=dtype)
    replace_file(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=False).encode())
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{f"{mark}_token": mark_name(mark) for mark in TOLD},
    }
    save_json(folder / "tokenizer_config.json", described)
    save_json(folder / "config.json", _in_older_words(load_json(folder / "config.json")))
    return tokenizer


def named(text: TextTokenizer, vocabulary: Vocabulary) -> Tokenizer:
    """Return the text tokenizer with marks and codes, each at its own id; bos comes before a text.

    It adds no space by itself: one stands before each text of a prompt, as `TextTokenizer` puts it
    there. A text can spell marks and codes, and no special token of the checkpoint.
    Raises UserError for a tokenizer without a table of ids, or with a token of the same name.
    """
    described = json.loads(text.to_json())
    model, added = described["model"], described["added_tokens"]
    if not isinstance(model["vocab"], dict):
        raise UserError(
            f"a text tokenizer of kind {model['type']} cannot be given image tokens; allowed are "
            "those with a table of ids, such as BPE"
        )
    marks = {mark_name(mark): getattr(vocabulary, mark) for mark in MARKS}
    ids = vocabulary.ids_of(range(vocabulary.codebook_size))
    codes = {code_name(code): index for code, index in enumerate(ids)}
    # What is in the table keeps its id; the library numbers all other tokens by itself.
    table = model["vocab"] | {token["content"]: token["id"] for token in added}
    for token in added:
        if token["special"] and token["content"] in marks:
            del table[token["content"]]
    padded = set(range(vocabulary.text_size)) - set(table.values())
    new = marks | codes | {mark_name(f"unused_{index}"): index for index in padded}
    if taken := min(table.keys() & new.keys(), default=None):
        raise UserError(
            f"the text tokenizer has a token {taken} already; give a model grown from a checkpoint "
            "without image tokens"
        )
    model["vocab"] = table | new
    described["added_tokens"] = [token for token in added if not token["special"]]
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        described[part] = _without_spaces(described[part])
    tokenizer = Tokenizer.from_str(json.dumps(described))
    told = [mark_name(mark) for mark in TOLD]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in told])
    spelled = [name for name in (*marks, *codes) if name not in told]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in spelled])
    bos = mark_name("bos")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary.bos)]
    )
    return tokenizer


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text that a tokenizer of `named` reads as `ids`, which start with bos.

    Raises UserError where it reads that text as others.
    """
    text = tokenizer.decode(ids[1:], skip_special_tokens=False)
    if tokenizer.encode(text).ids != list(ids):
        raise UserError(
            f"the text tokenizer does not read {text[:40]!r} as the ids that the model was trained "
            "with; this model works with ddt-llama alone"
        )
    return text


def _without_spaces(part: Any) -> Any:
    """Leave out of a part of a tokenizer.json what adds a space to a text or takes it away."""
    if isinstance(part, list):
        return [kept for one in part if (kept := _without_spaces(one)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") in ("Prepend", "Strip"):
        return None
    never = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {name: never.get(name, _without_spaces(value)) for name, value in part.items()}


def _in_older_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add what transformers 4 reads in the place of `rope_parameters`, which it does not know."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # no rotary positions, or others in every kind of layer
        return dict(config)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaled = scaling.get("rope_type", "default") != "default"
    return {
        **config,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if scaled else None,
    }
