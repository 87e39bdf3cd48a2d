"""Layers shared by the image tokenizers: attention, positions, stream halves of MMDiT blocks."""

from ddt_llama.layers.attention import attend, merge_heads, split_heads
from ddt_llama.layers.blocks import MLP, Modulation, Stream, TimestepEmbedding, modulate
from ddt_llama.layers.positions import grid_positions, sincos

__all__ = [
    "MLP",
    "Modulation",
    "Stream",
    "TimestepEmbedding",
    "attend",
    "grid_positions",
    "merge_heads",
    "modulate",
    "sincos",
    "split_heads",
]
