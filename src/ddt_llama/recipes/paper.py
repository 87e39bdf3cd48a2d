"""The papers' own sizes: DDT-LLaMA's tokenizer and language models, and Selftok's tokenizers.

Each starts from what its paper starts from, in local folders: `models/sd3` (Stable Diffusion 3
medium, as diffusers saves it), `models/llama-3-8b` and `models/gemma-2-2b` (as transformers saves
them). Nothing is fetched. Where no number was found, ours is a choice: `docs/paper-to-code.md`. A
language model learns the codes of any of the tokenizers (`--tokenizer RUN`).
"""

from dataclasses import replace

from ddt_llama.diffusion import Uniform
from ddt_llama.language import backbone
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.language import PRETRAIN, LanguageRecipe
from ddt_llama.recipes.sizes import RUNS, second_stage
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.tokenizer import SELFTOK_PIECES, TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.latents import VaeLatents
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig
from ddt_llama.training.timestep import TimestepObjectiveConfig

SD3 = "models/sd3"
# What `load_image_stream` fills, by names of a tokenizer's parameters.
SD3_PARTS = (
    "decoder.patch_*",
    "decoder.timestep.*",
    "decoder.modulation_out.*",
    "decoder.blocks.*.image.*",
)


def paper_tokenizer() -> TokenizerRecipe:
    """DDT-LLaMA's tokenizer: 256 px, latents of SD3's VAE, 480 tokens, an SD3-medium decoder.

    The paper's: T, codebook, linear k(t), clean prediction, straight path, joint stream. Not found:
    the size of the encoder (here Selftok's token stream), the optimizer (here Selftok's), the
    weight of the commitment, batch and steps. Other than the paper: a tenth of the draws sees no
    token, for guidance, and a language model reads coarse to fine (`--tokenizer.language-order
    fine_to_coarse` is the paper's).
    """
    return TokenizerRecipe(
        "paper_tokenizer",
        tokenizer=TimestepTokenizerConfig(
            image_size=256,
            latents=VaeLatents(f"{SD3}/vae"),
            channels=16,
            downsample=8,
            patch=2,
            num_tokens=480,
            quantizer=QuantizerConfig(codebook_size=65_536, code_dim=16),
            encoder=EncoderConfig(dim=512, depth=16, num_heads=8, queries="normal"),
            decoder=DecoderConfig(
                dim=1536, depth=24, num_heads=24, token_stream="joint", positions="normal"
            ),
        ),
        objective=TimestepObjectiveConfig(draws=1, density=Uniform()),
        train=TrainConfig(
            steps=500_000,
            batch=16,
            compile=True,
            prefetch=2,
            ema=0.9999,
            optim=OptimConfig(lr=5e-5, betas=(0.9, 0.99), warmup=2000),
        ),
        data=DataConfig(paths=("data/imagenet",)),
    )


def selftok_tokenizer_512() -> TokenizerRecipe:
    """Selftok's tokenizer of 512 tokens: velocity, k(t) in pieces, a decoder started from SD3.

    Its code's: latents, patch, T, k(t), codebook (size, moving average, dead codes), commitment 1,
    gradients by 1 / P(visible), uniform t, a tenth of the draws without tokens, AdamW at 5e-5 and
    at 1e-5 for what comes from SD3. Other than its code: the encoder's image stream is as wide as
    its token stream (there 64), and a token's place is a learned query (there it modulates every
    block); no entropy term, no LayerNorm behind the quantizer; weights 1 / P of mean 1 (there of
    about 2, so that `--objective.commitment 0.5` weighs a commitment as there). Not found: batch
    and steps. Without SD3: `--image-stream none --train.optim.multipliers {}`.
    """
    return _selftok("selftok_tokenizer_512", num_tokens=512)


def selftok_tokenizer_1024() -> TokenizerRecipe:
    """Selftok's tokenizer of 1,024 tokens: twice as many in every piece of k(t).

    That the pieces scale, and that all else is as with 512, is an assumption.
    """
    return _selftok("selftok_tokenizer_1024", num_tokens=1024)


def paper_pretrain() -> LanguageRecipe:
    """LLaMA-3-8B over 65,536 codes, grown from the checkpoint in models/llama-3-8b.

    `--start FOLDER` takes any other causal LM, `--start none` random weights of this size. The
    paper's: backbone, one vocabulary, one loss, a tenth of text alone. A choice: the mixture of the
    rest (Selftok's kinds of sequence), optimizer, batch and steps.
    """
    return LanguageRecipe(
        "paper_pretrain",
        "pretrain",
        tokenizer=f"{RUNS}/paper_tokenizer",
        start="models/llama-3-8b",
        backbone=backbone.paper(),
        mix=PRETRAIN,
        text_vocab=128_256,
        pack=4096,
        pad_multiple=128,
        train=TrainConfig(
            steps=400_000,
            batch=8,
            accumulate=4,
            compile=True,
            prefetch=2,
            ema=0.0,
            optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, warmup=2000),
        ),
        data=DataConfig(paths=("data/pairs",)),
    )


def paper_instruct() -> LanguageRecipe:
    """Stage 2 of paper."""
    return second_stage(paper_pretrain(), "paper_instruct", steps=50_000, lr=2e-5)


def paper_gemma_pretrain() -> LanguageRecipe:
    """Gemma-2-2B over 65,536 codes, grown from the checkpoint in models/gemma-2-2b.

    As `paper_pretrain`. Grown, it stays a Gemma 2 throughout: windows of 4,096 in every other
    layer, soft caps in attention and head, one table for embedding and head.
    """
    return replace(
        paper_pretrain(),
        name="paper_gemma_pretrain",
        start="models/gemma-2-2b",
        backbone=backbone.BackboneConfig(
            family="gemma",
            dim=2304,
            depth=26,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            mlp_dim=9216,
            max_positions=8192,
            norm_eps=1e-6,
        ),
        text_vocab=256_000,
    )


def paper_gemma_instruct() -> LanguageRecipe:
    """Stage 2 of paper_gemma."""
    return second_stage(paper_gemma_pretrain(), "paper_gemma_instruct", steps=50_000, lr=2e-5)


def _selftok(name: str, num_tokens: int) -> TokenizerRecipe:
    paper = paper_tokenizer()
    network, optim = paper.tokenizer, paper.train.optim
    return replace(
        paper,
        name=name,
        image_stream=f"{SD3}/transformer",
        tokenizer=replace(
            network,
            num_tokens=num_tokens,
            pieces=SELFTOK_PIECES,
            prediction="velocity",
            quantizer=replace(network.quantizer, codebook_size=32_768),
        ),
        objective=replace(paper.objective, balance=True, commitment=1.0),
        train=replace(paper.train, optim=replace(optim, multipliers=dict.fromkeys(SD3_PARTS, 0.2))),
    )
