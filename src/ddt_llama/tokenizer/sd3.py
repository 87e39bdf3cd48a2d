"""Start an MMDiT decoder from the image stream of a Stable Diffusion 3 transformer.

As Selftok does: the image stream comes from SD3, the token stream starts from scratch. The
decoder then answers what SD3 answers, so it goes with prediction "velocity", the straight path
and the latents of SD3's VAE. Source of the layout: diffusers, `SD3Transformer2DModel`.

Differs from SD3: the decoder's MLP has the exact GELU, SD3 its tanh form, because the exact one
is faster on CPUs; they differ by at most 5e-4 an activation.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear, silu

from ddt_llama.config import UserError
from ddt_llama.tokenizer.decoder import Decoder
from ddt_llama.tokenizer.diffusers_folder import open_weights, read_config

Read = Callable[[str], Tensor]

# One block of SD3's image stream: our name under blocks.N.image, theirs under transformer_blocks.N.
BLOCK = {
    "modulation": "norm1.linear",
    "out": "attn.to_out.0",
    "mlp.up": "ff.net.0.proj",
    "mlp.down": "ff.net.2",
}


@torch.no_grad()
def load_image_stream(decoder: Decoder, folder: str | Path) -> frozenset[str]:
    """Copy SD3's image stream into `decoder`; return the names of the parameters it filled.

    `folder` is the `transformer` folder of a local SD3 checkpoint. Filled are patches in and
    out, timestep embedding, final modulation and every block's image half; the table of patch
    positions is a buffer and becomes SD3's too. The names serve a smaller learning rate (Selftok:
    1e-5 for SD3's parts, 5e-5 for new ones). Raises UserError where the folder is none of SD3 or
    its sizes are not the decoder's.
    """
    folder = Path(folder)
    config = read_config(folder, "SD3Transformer2DModel")
    positions = decoder.get_buffer("positions")
    grid = math.isqrt(len(positions))
    check_sizes(folder, config, decoder, grid)
    read = open_weights(folder)
    own = dict(decoder.named_parameters())
    filled = set()
    for name, value in image_stream(read, decoder.config.depth):
        if own[name].shape != value.shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(value.shape)}, the decoder needs "
                f"{tuple(own[name].shape)}; use an unchanged SD3 checkpoint"
            )
        own[name].copy_(value)
        filled.add(name)
    positions.copy_(patch_positions(read, config["pos_embed_max_size"], grid))
    return frozenset(filled)


def check_sizes(folder: Path, config: dict, decoder: Decoder, grid: int) -> None:
    """Refuse an SD3 of another shape, naming every size that differs."""
    patch_dim = config["in_channels"] * config["patch_size"] ** 2
    out_channels = config.get("out_channels") or config["in_channels"]
    pairs = {
        "width": (config["num_attention_heads"] * config["attention_head_dim"], decoder.config.dim),
        "heads": (config["num_attention_heads"], decoder.config.num_heads),
        "blocks": (config["num_layers"], decoder.config.depth),
        "MLP ratio": (4, decoder.config.mlp_ratio),
        "numbers in a patch": (patch_dim, decoder.patch_in.in_features),
        "channels out": (out_channels, config["in_channels"]),
        "qk_norm": (config.get("qk_norm"), None),
        "dual attention blocks": (len(config.get("dual_attention_layers") or ()), 0),
    }
    wrong = [f"{name} {sd3} (decoder: {own})" for name, (sd3, own) in pairs.items() if sd3 != own]
    if grid > config["pos_embed_max_size"]:
        wrong.append(f"at most {config['pos_embed_max_size']} patches a side (decoder: {grid})")
    if wrong:
        raise UserError(
            f"{folder}: this SD3 has {', '.join(wrong)}; use SD3-medium with the paper recipe, "
            "or a decoder of these sizes"
        )


def image_stream(read: Read, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in our decoder, value) for every parameter that SD3's image stream fills."""
    yield "patch_in.weight", rearrange(read("pos_embed.proj.weight"), "d c p q -> d (p q c)")
    yield "patch_in.bias", read("pos_embed.proj.bias")
    embedder = "time_text_embed.timestep_embedder"
    yield from both("timestep.up", f"{embedder}.linear_1", read)
    yield "timestep.down.weight", read(f"{embedder}.linear_2.weight")
    # Without a prompt SD3 still adds the embedding of an empty one: a constant, so a bias.
    yield "timestep.down.bias", read(f"{embedder}.linear_2.bias").float() + empty_prompt(read)
    for block in range(depth):
        theirs = f"transformer_blocks.{block}"
        for kind in ("weight", "bias"):
            parts = [read(f"{theirs}.attn.to_{part}.{kind}") for part in "qkv"]
            yield f"blocks.{block}.image.qkv.{kind}", torch.cat(parts)
        for ours, name in BLOCK.items():
            yield from both(f"blocks.{block}.image.{ours}", f"{theirs}.{name}", read)
    for kind in ("weight", "bias"):
        scale, shift = read(f"norm_out.linear.{kind}").chunk(2)
        yield f"modulation_out.{kind}", torch.cat([shift, scale])
    yield from both("patch_out", "proj_out", read)


def both(ours: str, theirs: str, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield weight and bias of a linear map that both networks keep alike."""
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", read(f"{theirs}.{kind}")


def empty_prompt(read: Read) -> Tensor:
    """Return what SD3 adds to the timestep embedding for a pooled prompt of zeros."""
    embedder = "time_text_embed.text_embedder"
    hidden = silu(read(f"{embedder}.linear_1.bias").float())
    weight, bias = (read(f"{embedder}.linear_2.{kind}").float() for kind in ("weight", "bias"))
    return linear(hidden, weight, bias)


def patch_positions(read: Read, max_size: int, grid: int) -> Tensor:
    """Return SD3's position table for `grid` x `grid` patches: the middle of its largest one."""
    table = rearrange(read("pos_embed.pos_embed"), "1 (y x) d -> y x d", y=max_size)
    start = (max_size - grid) // 2
    return rearrange(table[start:, start:][:grid, :grid], "y x d -> (y x) d")
