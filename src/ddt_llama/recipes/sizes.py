"""DDT-LLaMA in three sizes of three trainings each; the paper's own size is in `paper`.

Names are SIZE_tokenizer, SIZE_pretrain and SIZE_instruct; each is carried out by the one loop. What
is written here are the differences from the defaults of the parts.
"""

from dataclasses import replace

from ddt_llama.diffusion import AtNoise
from ddt_llama.language import backbone
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.drafts import Mix
from ddt_llama.recipes.language import INSTRUCT, PRETRAIN, LanguageRecipe
from ddt_llama.recipes.tokenizer import TokenizerRecipe
from ddt_llama.tokenizer import TimestepTokenizerConfig
from ddt_llama.tokenizer.decoder import DecoderConfig
from ddt_llama.tokenizer.encoder import EncoderConfig
from ddt_llama.tokenizer.quantizer import QuantizerConfig
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import ENDS, OptimConfig
from ddt_llama.training.timestep import TimestepObjectiveConfig

# k(t) for few, small pictures: six tenths of the tokens by t = 0.2, all of them by t = 0.6.
EARLY_PIECES = (0.6, 0.3, 0.1, 0.0, 0.0)
FROM_OWN_ANSWERS = TimestepObjectiveConfig(
    density=AtNoise(0.5), hide_fine=0.2, own=0.7, commitment=0.1
)
TOKENIZER_MUON = OptimConfig(
    kind="muon", lr=1.5e-3, warmup=100, not_muon=(*ENDS, "*modulation*", "*timestep*")
)
# Rows of codes are rare: at the rate of the other weights noise soon fills them (experiments/0009).
LANGUAGE_MUON = OptimConfig(
    kind="muon",
    lr=3e-3,
    betas=(0.9, 0.99),
    weight_decay=0.05,
    warmup=100,
    multipliers={"*embed*": 0.033},
)
RUNS = "runs"  # where each stage leaves its run, and the next one looks for it


def nano_tokenizer() -> TokenizerRecipe:
    """About 5 M parameters at 64 px, for two CPU cores.

    What breaks the plateau at which tokens hold the background alone (experiments/0004): queries
    that start in place, open gates, Muon, and features that are not rounded at first. What makes
    several decoding steps as good as one (experiments/0005): tokens that stay visible until t is
    small, and training on the network's own answers.
    """
    return TokenizerRecipe(
        "nano_tokenizer",
        tokenizer=TimestepTokenizerConfig(
            num_tokens=64,
            pieces=EARLY_PIECES,
            language_order="raster",
            shift=3.0,
            quantizer=QuantizerConfig(
                codebook_size=16_384, code_dim=8, dead_share=0.03, rate=0.005
            ),
            encoder=EncoderConfig(dim=160, depth=3, num_heads=5),
            decoder=DecoderConfig(dim=160, depth=5, num_heads=5, gate_start=1.0),
        ),
        objective=replace(FROM_OWN_ANSWERS, round_from=400, round_until=900),
        train=TrainConfig(
            steps=5600,
            batch=64,
            sample_every=1000,
            prefetch=1,
            optim=replace(TOKENIZER_MUON, lr=1.8e-3),
        ),
    )


def nano_pretrain() -> LanguageRecipe:
    """About 8 M parameters, half of them rows of codes: captions and codes of nano.

    Which of several phrases is meant is learned in words, before codes and beside them, by heads
    that look back; captions of shapes are mostly complete descriptions (experiments/0020).
    """
    return LanguageRecipe(
        "nano_pretrain",
        "pretrain",
        tokenizer=f"{RUNS}/nano_tokenizer",
        backbone=backbone.nano(),
        look_back=True,
        mix=Mix(text_to_image=0.45, image_to_text=0.2, image_only=0.03, text_only=0.02, plan=0.3),
        text_weight=3.0,
        train=TrainConfig(
            steps=1000,
            batch=32,
            ema=0.99,
            sample_every=1000,
            prefetch=1,
            optim=replace(LANGUAGE_MUON, warmup=50, floor=1.0),
        ),
        data=DataConfig(scenes=200_000, grid=8, in_words=True),
    )


def nano_instruct() -> LanguageRecipe:
    """Stage 2 of nano.

    So short a training needs easy lessons (experiments/0012 to 0020): what is drawn stands on a
    grid, answers weigh more than codes, the model plans and looks in words before it draws, what
    can be learned from words alone is learned from them, and of edits what is learned last.
    In the shapes world `scripts/speedrun.sh` goes on from it with more edits.
    """
    recipe = second_stage(nano_pretrain(), "nano_instruct", steps=6000, lr=2.5e-3, decay_share=0.35)
    return replace(recipe, mix=Mix(draw=0.34, edit=0.24, ask=0.06, describe=0.14, plan=0.22))


def small_tokenizer() -> TokenizerRecipe:
    """About 30 M parameters at 64 px, for one GPU and minutes; what nano taught, in larger."""
    return TokenizerRecipe(
        "small_tokenizer",
        tokenizer=TimestepTokenizerConfig(
            patch=4,
            num_tokens=128,
            pieces=EARLY_PIECES,
            language_order="raster",
            shift=3.0,
            quantizer=QuantizerConfig(codebook_size=8192, code_dim=8, dead_share=0.03, rate=0.005),
            encoder=EncoderConfig(dim=320, depth=4, num_heads=5),
            decoder=DecoderConfig(dim=320, depth=6, num_heads=5, gate_start=1.0),
        ),
        objective=replace(FROM_OWN_ANSWERS, round_from=250, round_until=500),
        train=TrainConfig(
            steps=2000,
            batch=128,
            compile=True,
            sample_every=1000,
            prefetch=2,
            workers=8,
            optim=replace(TOKENIZER_MUON, warmup=200, decay_share=0.4),
        ),
        data=DataConfig(grid=8, even=True),
    )


def small_pretrain() -> LanguageRecipe:
    """About 30 M parameters over the small tokenizer."""
    nano = nano_pretrain()
    return replace(
        nano,
        name="small_pretrain",
        tokenizer=f"{RUNS}/small_tokenizer",
        backbone=backbone.small(),
        text_vocab=2048,
        pad_multiple=32,
        train=TrainConfig(
            steps=1000,
            batch=128,
            compile=True,
            sample_every=1000,
            prefetch=2,
            workers=8,
            optim=replace(LANGUAGE_MUON, lr=2e-3, floor=1.0),
        ),
        data=replace(nano.data, scenes=None, repeats=0.25, even=True),
    )


def small_instruct() -> LanguageRecipe:
    """Stage 2 of small, in one piece what nano learns in three (experiments/0022, 0029)."""
    recipe = second_stage(small_pretrain(), "small_instruct", steps=8000, lr=2e-3, decay_share=0.4)
    mix = Mix(draw=0.3, edit=0.34, ask=0.05, describe=0.13, plan=0.18)
    return replace(recipe, mix=mix, slips=0.25)


def base_tokenizer() -> TokenizerRecipe:
    """About 300 M parameters at 256 px on pixels, for one node; nano's choices in larger."""
    return TokenizerRecipe(
        "base_tokenizer",
        tokenizer=TimestepTokenizerConfig(
            image_size=256,
            patch=16,
            num_tokens=256,
            pieces=EARLY_PIECES,
            language_order="raster",
            shift=3.0,
            quantizer=QuantizerConfig(codebook_size=16_384, code_dim=16),
            encoder=EncoderConfig(dim=512, depth=12, num_heads=8),
            decoder=DecoderConfig(dim=768, depth=16, num_heads=12, gate_start=1.0),
        ),
        objective=FROM_OWN_ANSWERS,
        train=TrainConfig(
            steps=300_000,
            batch=32,
            compile=True,
            prefetch=2,
            ema=0.9999,
            optim=OptimConfig(lr=2e-4, warmup=2000),
        ),
        data=DataConfig(paths=("data/images",), cache_dir=None),
    )


def base_pretrain() -> LanguageRecipe:
    """About 350 M parameters over the base tokenizer."""
    return LanguageRecipe(
        "base_pretrain",
        "pretrain",
        tokenizer=f"{RUNS}/base_tokenizer",
        backbone=backbone.base(),
        mix=PRETRAIN,
        text_vocab=32_000,
        pack=2048,
        pad_multiple=64,
        train=TrainConfig(
            steps=200_000,
            batch=32,
            accumulate=4,
            compile=True,
            prefetch=2,
            ema=0.9999,
            optim=OptimConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, warmup=2000),
        ),
        data=DataConfig(paths=("data/images",)),
    )


def base_instruct() -> LanguageRecipe:
    """Stage 2 of base."""
    return second_stage(base_pretrain(), "base_instruct", steps=50_000, lr=1e-4)


def second_stage(
    first: LanguageRecipe, name: str, *, steps: int, lr: float, decay_share: float = 0.2
) -> LanguageRecipe:
    """Go on from a stage 1 with instructions, at a learning rate that falls to nothing."""
    optim = replace(first.train.optim, lr=lr, floor=0.0, decay_share=decay_share)
    return replace(
        first,
        name=name,
        stage="instruct",
        tokenizer="",
        start=f"{RUNS}/{first.name}",
        mix=INSTRUCT,
        train=replace(first.train, steps=steps, optim=optim),
    )
