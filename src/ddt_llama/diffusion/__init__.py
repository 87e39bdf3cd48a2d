"""Paths between data and noise, densities of t, and the sampler; no images and no tokens here."""

from ddt_llama.diffusion.paths import Cosine, DiscreteDDPM, Path, Prediction, Straight
from ddt_llama.diffusion.samplers import sample
from ddt_llama.diffusion.timesteps import AtNoise, Density, LogitNormal, Uniform, step_times

__all__ = [
    "AtNoise",
    "Cosine",
    "Density",
    "DiscreteDDPM",
    "LogitNormal",
    "Path",
    "Prediction",
    "Straight",
    "Uniform",
    "sample",
    "step_times",
]
