"""What the paper's recipes start from, tiny, in the very formats in which it is published.

diffusers and transformers write the weights; config.json of the language models is worded as in
their publications (older than what transformers writes today), text tokenizers are of their kinds.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

CAPTIONS = (
    "a red circle above a blue square",
    "two green stars on a white background",
    "a photograph of a harbour at dawn, fishing boats in front",
    "ein roter Kreis über einem Quadrat",
    "the quick brown fox jumps over the lazy dog",
    "a cat with sunglasses, painted in oil",
)
# LLaMA 3 cuts text by this before its merges.
LLAMA_3_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_pairs(folder: Path) -> Path:
    """Write pictures with captions beside them."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        rotated = Image.linear_gradient("L").rotate(60 * number)
        other = Image.radial_gradient("L")
        Image.merge("RGB", (rotated, other, rotated)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def save_vae(folder: Path, **changes: Any) -> Path:
    """Write a VAE as SD3's: 16 channels, 8 pixels a cell, shift and scale, no maps around z."""
    import diffusers

    torch.manual_seed(0)
    fields = {
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    diffusers.AutoencoderKL(**{**fields, **changes}).save_pretrained(folder)
    return folder


def save_sd3(folder: Path, shard: str = "10GB", **changes: Any) -> Path:
    """Write a transformer as SD3-medium's, of 2 blocks and width 32, in half precision."""
    import diffusers

    torch.manual_seed(0)
    fields = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 192,
    }
    model = diffusers.SD3Transformer2DModel(**{**fields, **changes}).half()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_llama_3(folder: Path, scaled: bool = False) -> Path:
    """Write a checkpoint as LLaMA-3-8B's, or as LLaMA 3.1's with scaled rotations."""
    text = llama_3_text()
    folder.mkdir(parents=True)
    text.save(str(folder / "tokenizer.json"))
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_type": "llama3",
    }
    described = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": text.token_to_id("<|begin_of_text|>"),
        "eos_token_id": text.token_to_id("<|end_of_text|>"),
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling if scaled else None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "vocab_size": text.get_vocab_size(),
    }
    marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    _write(folder, described, LlamaConfig, torch.bfloat16, marks)
    return folder


def save_gemma_2(folder: Path, window: int = 64) -> Path:
    """Write a checkpoint as Gemma-2-2B's: heads wider than dim / heads, windows, soft caps."""
    text = gemma_2_text()
    folder.mkdir(parents=True)
    text.save(str(folder / "tokenizer.json"))
    described = {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 36,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": window,
        "torch_dtype": "float32",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": text.get_vocab_size(),
    }
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(folder, described, Gemma2Config, torch.float32, marks)
    return folder


def _write(folder: Path, described: dict, kind: Any, dtype: torch.dtype, marks: dict) -> None:
    """Write weights in several shards, then config.json as it was published."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**described)).to(dtype)
    with torch.no_grad():  # far from its start, or everything would be nearly alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "config.json").write_text(json.dumps(described, indent=2))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(named, indent=2))


def llama_3_text() -> Tokenizer:
    """Train a byte-level BPE with LLaMA 3's cuts; its special ids come last."""
    text = Tokenizer(models.BPE(ignore_merges=True))
    text.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _train(text, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet), CAPTIONS)
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(4)]
    text.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *reserved, "<|eot_id|>"])
    start = "<|begin_of_text|>"
    text.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, text.token_to_id(start))]
    )
    return text


def gemma_2_text() -> Tokenizer:
    """Train a BPE as SentencePiece makes it for Gemma: ▁ for a space, unknown letters as bytes."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    _train(learned, trainers.BpeTrainer(vocab_size=90), CAPTIONS[:3])
    found = json.loads(learned.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *found["vocab"]]
    text = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in found["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    text.normalizer = normalizers.Replace(" ", "▁")
    text.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    text.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    text.add_special_tokens([AddedToken(name, special=True) for name in special])
    text.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return text


def _train(text: Tokenizer, trainer: Any, texts: Iterable[str]) -> None:
    trainer.show_progress = False
    text.train_from_iterator(texts, trainer)
