"""Give a language model from before the mark `same` a row for it, in front of those of the codes.

python experiments/0015-same/grow_same.py FROM TO
"""

import shutil
import sys
from pathlib import Path

import torch

from ddt_llama.checkpoint import load_tensors
from ddt_llama.language import TextTokenizer, Vocabulary, backbone
from ddt_llama.recipes import recipe_named
from ddt_llama.recipes.language import LanguageRecipe

source, target = map(Path, sys.argv[1:])
recipe = recipe_named("nano_instruct")
assert isinstance(recipe, LanguageRecipe)
vocabulary = Vocabulary.load(source / "language")
model = backbone.build(recipe.backbone, vocabulary, seed=15)
weights = {
    name: tensor.float()
    for name, tensor in load_tensors(source / "language" / "model.safetensors").items()
}
rows = "model.embed_tokens.weight"
new = model.get_input_embeddings().weight.detach()[vocabulary.same, None]
assert len(weights[rows]) == vocabulary.size - 1, "it has the row already"
parts = (weights[rows][: vocabulary.same], new, weights[rows][vocabulary.same :])
weights[rows] = weights["lm_head.weight"] = torch.cat(parts)
model.load_state_dict(weights)

shutil.copytree(source, target)
shutil.rmtree(target / "language")
backbone.save(target / "language", model, vocabulary, TextTokenizer.load(source / "language"))
print(f"{target}: {vocabulary.size} rows")
