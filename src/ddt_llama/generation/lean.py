"""The forward pass of LLaMA-like language models, stripped to what generation needs.

Same weights and same numbers as transformers' modules (parity tests), without their Python cost:
fused projections, rotation tables, one preallocated cache, and a head cut to the rows that may be
drawn. Reads weights by name from a module or straight from a release folder, so that drawing with
the bundled model never imports transformers. What `obstacle` names goes the way of `generic`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ddt_llama.generation.kernels import Product, RmsNorm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class LeanCache:
    """Keys and values of every layer, `[layer, 0 or 1, row, head, slot, dim]`, filled up to `used`.

    Rows are left-padded: slot s of row r holds position s - padding[r]. `blocked` is 0 or -inf a
    slot, None when no row is padded.
    """

    slots: Float[Tensor, "layers 2 r heads slots dim"]
    padding: Int[Tensor, " r"]
    blocked: Float[Tensor, "r 1 1 slots"] | None
    cos: Float[Tensor, "positions dim"]
    sin: Float[Tensor, "positions dim"]
    used: int = 0


@dataclass(frozen=True)
class _Layer:
    """Weights of one block; a fused projection is one matrix product instead of two or three."""

    attention_norm: RmsNorm
    qkv: Product
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    out: Product
    mlp_norm: RmsNorm
    gate_up: Product
    down: Product


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Name what in a Hugging Face config `LeanDecoder` cannot run; None if there is nothing."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"model_type {family}"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act {config['hidden_act']}"
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        return f"layer_types {sorted(set(config['layer_types']))}"
    if config.get("use_sliding_window", family == "mistral") and config.get("sliding_window"):
        return f"sliding_window {config['sliding_window']}"
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" in older files
    if kind != "default":
        return f"rope_type {kind}"
    if "rope_theta" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rope_parameters {rope}"
    return None


class LeanDecoder:
    """Prefill and single-token steps over weights in the naming of transformers' LLaMA."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Fuse `weights` (a state dict) described by `config` (the dict of a config.json)."""
        if (reason := obstacle(config)) is not None:
            raise ValueError(f"no lean path for {reason}")
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config.get("num_key_value_heads") or self.num_heads
        dim: int = config["hidden_size"]
        self.head_dim: int = config.get("head_dim") or dim // self.num_heads
        eps: float = config["rms_norm_eps"]
        self.max_positions: int = config["max_position_embeddings"]
        self.embedding = weights["model.embed_tokens.weight"].detach()
        self.head = weights.get("lm_head.weight", self.embedding).detach()
        if config.get("tie_word_embeddings", False):
            self.head = self.embedding
        self._heads: dict[tuple[int, int], Product] = {}
        self.final_norm = RmsNorm(weights["model.norm.weight"].detach(), eps)
        self.layers = [
            _fuse(weights, f"model.layers.{index}.", eps)
            for index in range(config["num_hidden_layers"])
        ]
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self._frequencies = (1.0 / (_rope(config)["rope_theta"] ** powers)).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding.device

    def prefill(
        self,
        ids: Int[Tensor, "u p"],
        padding: Int[Tensor, " u"],
        rows: Int[Tensor, " r"],
        capacity: int,
        head: slice,
    ) -> tuple[Float[Tensor, "r v"], LeanCache]:
        """Read left-padded prompts and make room for `capacity` tokens a row.

        Row i of the cache continues prompt `rows[i]`, so that a prompt shared by many rows (the
        empty one of guidance, several images of one prompt) is read once. Returns the logits of
        the vocabulary rows `head` after each prompt.
        """
        num_prompts, length = ids.shape
        cos, sin = self._rotation(capacity)
        places = torch.arange(length, device=self.device)
        seen = (places[None, :] <= places[:, None]) & (places >= padding[:, None])[:, None, :]
        seen |= torch.eye(length, dtype=torch.bool, device=self.device)  # no row without a key
        mask = _blocked(seen, self.embedding.dtype)[:, None]
        shape = (len(self.layers), 2, num_prompts, self.num_kv_heads, length, self.head_dim)
        prompts = LeanCache(self.embedding.new_empty(shape), padding, None, cos, sin)
        hidden = self._forward(ids, prompts, mask)[:, -1].index_select(0, rows)
        slots = self.embedding.new_empty((*shape[:2], len(rows), shape[3], capacity, shape[5]))
        slots[..., :length, :] = prompts.slots.index_select(2, rows)
        blocked = None
        if bool(padding.any()):
            open_slots = torch.arange(capacity, device=self.device) >= padding[rows, None]
            blocked = _blocked(open_slots, self.embedding.dtype)[:, None, None, :]
        cache = LeanCache(slots, padding[rows], blocked, cos, sin, used=length)
        return self._head(head)(hidden).float(), cache

    def step(self, ids: Int[Tensor, " r"], cache: LeanCache, head: slice) -> Float[Tensor, "r v"]:
        """Append one token a row and return the next logits of the vocabulary rows `head`."""
        mask = None if cache.blocked is None else cache.blocked[..., : cache.used + 1]
        hidden = self._forward(ids[:, None], cache, mask)[:, -1]
        return self._head(head)(hidden).float()

    def _forward(self, ids: Tensor, cache: LeanCache, mask: Tensor | None) -> Tensor:
        """Run `r n` new tokens through all layers, fill the cache and return `r n dim`."""
        start, stop = cache.used, cache.used + ids.shape[1]
        positions = torch.arange(start, stop, device=self.device) - cache.padding[:, None]
        positions = positions.clamp_(min=0)
        rotation = cache.cos[positions][:, :, None], cache.sin[positions][:, :, None]
        x = F.embedding(ids, self.embedding)
        for index, layer in enumerate(self.layers):
            keys, values = cache.slots[index].unbind(0)
            normed = layer.attention_norm(x)
            x = x + self._attend(layer, normed, rotation, keys, values, start, mask)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        cache.used = stop
        return self.final_norm(x)

    def _attend(
        self,
        layer: _Layer,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        start: int,
        mask: Tensor | None,
    ) -> Tensor:
        rows, count, _ = x.shape
        stop, groups = start + count, self.num_heads // self.num_kv_heads
        heads = layer.qkv(x).view(rows, count, -1, self.head_dim)
        turned = self.num_heads + self.num_kv_heads
        qk, v = heads[:, :, :turned], heads[:, :, turned:]
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk[:, :, : self.num_heads], qk[:, :, self.num_heads :]
            qk = torch.cat((layer.query_norm(q), layer.key_norm(k)), dim=2)
        cos, sin = rotation
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        keys[:, :, start:stop] = qk[:, :, self.num_heads :].transpose(1, 2)
        values[:, :, start:stop] = v.transpose(1, 2)
        # Query heads that share a key head become further queries of it: no key is ever repeated.
        q = qk[:, :, : self.num_heads].unflatten(2, (self.num_kv_heads, groups))
        q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        if mask is not None and count > 1 and groups > 1:
            mask = mask.repeat(1, 1, groups, 1)
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :stop], values[:, :, :stop], mask)
        mixed = mixed.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).flatten(2)
        return layer.out(mixed)

    def _head(self, rows: slice) -> Product:
        """Return the head cut to the vocabulary rows that may be drawn; made once per cut."""
        key = (rows.start, rows.stop)
        if key not in self._heads:
            self._heads[key] = Product(self.head[rows], None)
        return self._heads[key]

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of `length` positions.

        rotate_half(x) = (-x2, x1) is x rolled by half a head, with the sign moved into the sine.
        """
        angles = torch.arange(length, device=self.device)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embedding.dtype
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_type, wherever this version of transformers wrote them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _fuse(weights: Mapping[str, Tensor], prefix: str, eps: float) -> _Layer:
    """Concatenate the projections of one layer that read the same input."""

    def find(name: str) -> Tensor | None:
        tensor = weights.get(f"{prefix}{name}")
        return None if tensor is None else tensor.detach()

    def product(*names: str) -> Product:
        parts = [weights[f"{prefix}{name}.weight"].detach() for name in names]
        biases = [bias for name in names if (bias := find(f"{name}.bias")) is not None]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        return Product(weight, torch.cat(biases) if biases else None)

    def norm(name: str) -> RmsNorm | None:
        scale = find(f"{name}.weight")
        return None if scale is None else RmsNorm(scale, eps)

    return _Layer(
        attention_norm=RmsNorm(weights[f"{prefix}input_layernorm.weight"].detach(), eps),
        qkv=product("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        query_norm=norm("self_attn.q_norm"),
        key_norm=norm("self_attn.k_norm"),
        out=product("self_attn.o_proj"),
        mlp_norm=RmsNorm(weights[f"{prefix}post_attention_layernorm.weight"].detach(), eps),
        gate_up=product("mlp.gate_proj", "mlp.up_proj"),
        down=product("mlp.down_proj"),
    )


def _blocked(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into the additive one that attention takes without a copy a layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
