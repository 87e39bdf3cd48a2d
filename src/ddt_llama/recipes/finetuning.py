"""Fine-tuning: a model that is there learns one's own pictures."""

from ddt_llama.language import backbone
from ddt_llama.language.lora import LoraConfig
from ddt_llama.recipes.data import DataConfig
from ddt_llama.recipes.language import INSTRUCT, LanguageRecipe
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
