"""Fine-tuning: a model that is there learns one's own pictures, or to draw without guidance."""

from ddt_llama.language import backbone
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.drafts import Mix
from ddt_llama.recipes.language import INSTRUCT, LanguageRecipe
from ddt_llama.training.alignment import AlignmentConfig
from ddt_llama.training.loop import TrainConfig
from ddt_llama.training.optim import OptimConfig


def lora() -> LanguageRecipe:
    """LoRA on nano, or on any model with --start, from one's own captions, edits or questions.

    What the data hold is what is learned: of captions drawing and describing, of edits editing,
    too. A causal language model from elsewhere needs --tokenizer and --lora.rows true.
    """
    return LanguageRecipe(
        "lora",
        "instruct",
        start="nano",
        backbone=backbone.nano(),
        mix=INSTRUCT,
        text_weight=3.0,
        lora=LoraConfig(),
        train=TrainConfig(
            steps=1000,
            batch=32,
            ema=0.99,
            sample_every=500,
            prefetch=1,
            optim=OptimConfig(lr=5e-3, betas=(0.9, 0.99), warmup=50, decay_share=0.5),
        ),
        data=DataConfig(paths=("data/images",)),
    )


def guidance_free() -> LanguageRecipe:
    """Teach nano, or any model with --start, to draw without guidance, at half the cost of a code.

    Condition contrastive alignment of drawings, the next token of all else, so that nothing is
    forgotten (experiments/0054). `ddt publish` tunes the temperature at guidance 1.
    """
    return LanguageRecipe(
        "guidance_free",
        "instruct",
        start="nano",
        backbone=backbone.nano(),
        mix=Mix(draw=0.5, edit=0.2, ask=0.04, describe=0.12, plan=0.14),
        slips=0.25,
        text_weight=3.0,
        alignment=AlignmentConfig(),
        train=TrainConfig(
            steps=60,
            batch=32,
            ema=0.95,
            sample_every=60,
            prefetch=1,
            optim=OptimConfig(lr=3e-5, betas=(0.9, 0.99), warmup=10, decay_share=0.5),
        ),
        data=DataConfig(seed=3, scenes=200_000, grid=8, in_words=True, repeats=0.125),
    )
