"""Draw, edit and describe: the one place where a trained model is used."""

from ddt_llama.generation.engine import Engine
from ddt_llama.generation.model import Model
from ddt_llama.generation.release import load
from ddt_llama.generation.sampling import Greedy, Sampling, TopK, TopP
from ddt_llama.generation.settings import Settings

__all__ = ["Engine", "Greedy", "Model", "Sampling", "Settings", "TopK", "TopP", "load"]
