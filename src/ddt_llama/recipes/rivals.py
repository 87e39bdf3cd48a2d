"""Other ways to make images a language, each matched to the DDT recipe of its size.

Matched are bits an image, parameters, and FLOPs of training on an image (`ddt recipes NAME` prints
them); data, batch, steps and optimizer are the same (Muon is no handicap for the rival:
experiments/0028). The language side is that of the DDT recipes: `ddt publish runs/spatial_nano
runs/spatial_nano-codes --bits 8`, then `ddt train nano_pretrain --tokenizer
runs/spatial_nano-codes --out runs/spatial_nano_pretrain`. `TOKENS=spatial scripts/speedrun.sh` does
all of what the bundled nano had, in the same order.
"""

from dataclasses import replace

from ddt_llama.recipes.sizes import base_tokenizer, nano_tokenizer, small_tokenizer
from ddt_llama.recipes.tokenizer import SpatialRecipe, TokenizerRecipe
from ddt_llama.tokenizer import SpatialTokenizerConfig
from ddt_llama.training.spatial import SpatialObjectiveConfig


def spatial_nano() -> SpatialRecipe:
    """A VQ-VAE of nano's size: 8 x 8 codes of 16,384, for two CPU cores."""
    rival = nano_tokenizer()
    network = SpatialTokenizerConfig(
        widths=(16, 32, 64, 216),
        blocks=(0, 0, 1, 3),
        quantizer=rival.tokenizer.quantizer,
    )
    return _beside(rival, "spatial_nano", network)


def spatial_small() -> SpatialRecipe:
    """A VQ-VAE of small's size: 16 x 16 codes, so few (91) that a picture has as many bits.

    A language model writes twice as many codes as small's: matched is the tokenizer.
    """
    rival = small_tokenizer()
    network = SpatialTokenizerConfig(
        widths=(24, 80, 424),
        blocks=(0, 1, 4),
        quantizer=replace(rival.tokenizer.quantizer, codebook_size=91),
    )
    return _beside(rival, "spatial_small", network)


def spatial_base() -> SpatialRecipe:
    """A VQ-VAE of base's size: 16 x 16 codes of 16,384 for 256 px."""
    rival = base_tokenizer()
    network = SpatialTokenizerConfig(
        image_size=256,
        widths=(48, 96, 128, 384, 1536),
        blocks=(0, 1, 1, 1, 4),
        quantizer=rival.tokenizer.quantizer,
    )
    return _beside(rival, "spatial_base", network)


def _beside(rival: TokenizerRecipe, name: str, network: SpatialTokenizerConfig) -> SpatialRecipe:
    """Return a spatial recipe that is trained as `rival` is."""
    objective = SpatialObjectiveConfig(
        commitment=rival.objective.commitment,
        round_from=rival.objective.round_from,
        round_until=rival.objective.round_until,
    )
    return SpatialRecipe(
        name,
        rival=rival.name,
        tokenizer=network,
        objective=objective,
        train=rival.train,
        data=rival.data,
    )
