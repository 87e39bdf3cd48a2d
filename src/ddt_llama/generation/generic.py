"""The same calls as `lean`, for any causal language model of transformers.

Runs the module's own forward over rows of their own lengths: slower, but correct for every
architecture of attention (Gemma's soft caps and sliding windows, scaled rotations, ...), and the
slow twin that the parity tests hold `lean` against.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ddt_llama.generation.rows import Prompts, Rows


class GenericDecoder:
    """Prompts and single-token steps through a transformers module."""

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

    def read(self, ids: Int[Tensor, "u p"], lengths: Sequence[int]) -> Prompts:
        """Read prompts that are padded at their ends; the contract of `LeanDecoder.read`."""
        cache = DynamicCache()  # keeps all, also where the module looks through a window
        ends, which = torch.tensor(lengths, device=self.device).unique(return_inverse=True)
        logits = self._forward(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            logits_to_keep=ends - 1,
        )
        read: list[Any] = cache.layers
        layers = [(one.keys.transpose(1, 2), one.values.transpose(1, 2)) for one in read]
        return Prompts(layers, lengths, logits[torch.arange(len(ids), device=self.device), which])

    def step(self, ids: Int[Tensor, " r"], rows: Rows) -> Float[Tensor, "r s"]:
        """Append one token to each row; the contract of `LeanDecoder.step`."""
        logits = self._forward(
            input_ids=ids[:, None],
            attention_mask=self._masks(rows),
            position_ids=rows.positions[: rows.count, None],
            past_key_values=Cache([_OfRows(rows, index) for index in range(len(rows.layers))]),
            logits_to_keep=1,
        )
        rows.grow()
        return logits[:, -1]

    def logits(self, states: Float[Tensor, "r s"], head: slice) -> Float[Tensor, "r v"]:
        """Return the logits of the vocabulary rows `head`."""
        return states[:, head].float()

    def _forward(self, **inputs: Any) -> Tensor:
        training = self.module.training
        self.module.eval()
        output = self.module(**inputs, use_cache=True)
        self.module.train(training)
        return output.logits

    def _masks(self, rows: Rows) -> Any:
        """Return where each row's next token looks, as transformers takes it for its layers."""
        window: Any = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        kinds = kinds or {"sliding_attention" if window else "full_attention"}
        behind = rows.behind(rows.count, rows.stop)
        dtype = next(self.module.parameters()).dtype
        masks = {}
        for kind in kinds:
            seen = (behind >= 0) & (behind < (window if kind == "sliding_attention" else torch.inf))
            blocked = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            masks[kind] = blocked.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


class _OfRows(CacheLayerMixin):
    """One layer of `Rows`, as a cache of transformers."""

    is_sliding = False

    def __init__(self, rows: Rows, index: int) -> None:
        super().__init__()
        self.rows, self.index, self.is_initialized = rows, index, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take one token a row and return all that rows hold, `r heads slots e`."""
        rows = self.rows
        places, stop = rows.places(rows.count), rows.stop
        held = []
        for slots, new in zip(rows.layers[self.index], (key_states, value_states), strict=True):
            slots.flatten(0, 1).index_copy_(0, places, new[:, :, 0])
            held.append(slots[: rows.count, :stop].transpose(1, 2))
        return held[0], held[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is room."""

    def get_seq_length(self) -> int:
        """Return the slots before the next token of the longest row."""
        return self.rows.stop - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots there are to look at, from the first on."""
        return self.rows.stop, 0

    def get_max_length(self) -> int:
        """Return the room of a row."""
        return self.rows.capacity
