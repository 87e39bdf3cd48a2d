"""The language model's side: vocabulary, text, documents and backbone.

Images arrive here as integers only; this folder and `tokenizer` never import each other.
`backbone` is imported by its own name, because transformers takes seconds to import that texts and
documents need not wait for.
"""

from ddt_llama.language.batches import Batch, collate
from ddt_llama.language.documents import Document, Image, Sequence, Text, render
from ddt_llama.language.text import TextTokenizer
from ddt_llama.language.vocabulary import Vocabulary

__all__ = [
    "Batch",
    "Document",
    "Image",
    "Sequence",
    "Text",
    "TextTokenizer",
    "Vocabulary",
    "collate",
    "render",
]
