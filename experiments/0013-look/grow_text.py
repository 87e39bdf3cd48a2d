"""Give the text tokenizer of a release single ids for the words of the instruction layout.

A run that starts anew has them by itself. The new merges and ids stand behind all others, so every
other text keeps its ids; the rows of marks and codes move up, the new rows are the mean of those of
the letters they stand for.

    python experiments/0013-look/grow_text.py FROM TO
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ddt_llama.language import TextTokenizer, Vocabulary, backbone, documents
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.language import LanguageRecipe

source, target = map(Path, sys.argv[1:])
recipe = recipe_named("nano_instruct")
assert isinstance(recipe, LanguageRecipe)
model, vocabulary, text = backbone.load(source / "language")

described = json.loads((source / "language" / "tokenizer.json").read_text())
ids, merges = described["model"]["vocab"], described["model"]["merges"]
letters = Tokenizer.from_str(json.dumps(described))
new: list[str] = []
for phrase in (*documents.LAYOUT, documents.DESCRIBE, documents.PLAN):
    for word, _ in letters.pre_tokenizer.pre_tokenize_str(" " + phrase):
        while True:
            pieces = Tokenizer.from_str(json.dumps(described)).model.tokenize(word)
            if len(pieces) == 1:
                break
            first, second = pieces[0].value, pieces[1].value
            ids[first + second] = len(ids)
            merges.append([first, second])
            new.append(first + second)

grown_text = TextTokenizer(Tokenizer.from_str(json.dumps(described)))
grown = Vocabulary(grown_text.size, vocabulary.codebook_size, vocabulary.num_tokens)
table = model.get_input_embeddings().weight.detach()
rows = [
    table[[letters.token_to_id(letter) for letter in word]].mean(0, keepdim=True) for word in new
]
table = torch.cat([table[: text.size], *rows, table[text.size :]])
weights = {
    name: table if tensor.shape[0] == vocabulary.size else tensor
    for name, tensor in model.state_dict().items()
}
larger = backbone.build(recipe.backbone, grown)
larger.load_state_dict(weights)

shutil.copytree(source, target)
shutil.rmtree(target / "language")
backbone.save(target / "language", larger, grown, grown_text)
print(f"{target}: {len(new)} new ids, {grown.size} rows")
