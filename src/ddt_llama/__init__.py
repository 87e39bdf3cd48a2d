"""ddt-llama: images as a language that a LLaMA can speak."""
