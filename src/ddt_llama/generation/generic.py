"""The same two calls as `lean`, for any causal language model of transformers.

Runs the module's own forward over transformers' StaticCache: slower, but correct for every
architecture (Gemma's soft caps and sliding windows, scaled rotations, ...), and the slow twin that
the parity tests hold `lean` against.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass
class GenericCache:
    """transformers' cache, and which of its slots each row may read."""

    slots: Any
    open_slots: Int[Tensor, "r slots"]
    padding: Int[Tensor, " r"]
    used: int


class GenericDecoder:
    """Prefill and single-token steps through a transformers module."""

    def __init__(self, module: nn.Module) -> None:
        """Use `module` as it is; its weights are neither copied nor changed."""
        config: Any = module.config
        self.module = module
        self.config = config.get_text_config(decoder=True)
        self.max_positions: int = self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.module.parameters()).device

    def prefill(
        self,
        ids: Int[Tensor, "u p"],
        padding: Int[Tensor, " u"],
        rows: Int[Tensor, " r"],
        capacity: int,
        head: slice,
    ) -> tuple[Float[Tensor, "r v"], GenericCache]:
        """Read left-padded prompts; the contract of `LeanDecoder.prefill`."""
        from transformers.cache_utils import StaticCache

        slots = StaticCache(config=self.config, max_cache_len=capacity)
        places = torch.arange(capacity, device=self.device)
        open_slots = (places >= padding[rows, None]).long()
        cache = GenericCache(slots, open_slots, padding[rows], 0)
        return self._forward(ids[rows], cache, head), cache

    def step(
        self, ids: Int[Tensor, " r"], cache: GenericCache, head: slice
    ) -> Float[Tensor, "r v"]:
        """Append one token a row; the contract of `LeanDecoder.step`."""
        return self._forward(ids[:, None], cache, head)

    def _forward(self, ids: Tensor, cache: GenericCache, head: slice) -> Tensor:
        stop = cache.used + ids.shape[1]
        positions = torch.arange(cache.used, stop, device=self.device) - cache.padding[:, None]
        training = self.module.training
        self.module.eval()
        output = self.module(
            input_ids=ids,
            attention_mask=cache.open_slots[:, :stop],
            position_ids=positions.clamp(min=0),
            past_key_values=cache.slots,
            use_cache=True,
            logits_to_keep=1,
        )
        self.module.train(training)
        cache.used = stop
        return output.logits[:, -1, head].float()
