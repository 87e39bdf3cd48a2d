"""The texts that belong to a scene: captions, a description, questions with answers, and edits.

This module is the door to them; the wordings live in `captions`, `questions` and `edits`.
"""

from ddt_llama.shapes.captions import caption, description
from ddt_llama.shapes.edits import Edit, edit
from ddt_llama.shapes.questions import Question, question

__all__ = ["Edit", "Question", "caption", "description", "edit", "question"]
