"""The forward pass of LLaMA-like language models, stripped to what generation needs.

Same weights and same numbers as transformers' modules (parity tests), without their Python cost:
fused projections, preallocated rows, and a head cut to the ids that may be drawn. Reads weights by
name from a module or straight from a release folder, so that drawing with the bundled model never
imports transformers. What `obstacle` names goes the way of `generic`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ddt_llama.config import UserError
from ddt_llama.generation import graphs
from ddt_llama.generation.kernels import Product, RmsNorm
from ddt_llama.generation.precision import Int8Linear
from ddt_llama.generation.rows import VECTOR, Layers, Prompts, Rows

Linear = Product | Int8Linear
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class _Layer:
    """Weights of one block; a fused projection is one matrix product instead of two or three."""

    attention_norm: RmsNorm
    qkv: Linear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    out: Linear
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear


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

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, int8: bool = False
    ) -> None:
        """Fuse `weights` (a state dict) described by `config` (the dict of a config.json).

        `int8`: those of products become integers.
        """
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
        self._linear = Int8Linear if int8 else Product
        self._heads: dict[tuple[int, int], Linear] = {}
        self.final_norm = RmsNorm(weights["model.norm.weight"].detach(), eps)
        self.layers = [
            _fuse(weights, f"model.layers.{index}.", eps, self._linear)
            for index in range(config["num_hidden_layers"])
        ]
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self._frequencies = (1.0 / (_rope(config)["rope_theta"] ** powers)).to(self.device)
        self.graphs = graphs.on(self.device)
        self._stepped = self._through

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding.device

    @property
    def product_bytes(self) -> int:
        """The bytes of weights that products read for a token, with the cuts of the head so far."""
        inner = [(one.qkv, one.out, one.gate_up, one.down) for one in self.layers]
        return sum(one.bytes for one in [*self._heads.values(), *chain(*inner)])

    @torch.inference_mode()
    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch compile what a step does in a layer, so that its small operations become few.

        Done once for all layers, for one row and for more, of any number of slots: those below
        teach torch what varies. Reading, of ever other lengths, stays as it is. Raises UserError
        where it cannot be done.
        """
        self._stepped = torch.compile(self._through, backend=backend)
        prompt = self.read(torch.zeros(1, 1, dtype=torch.int64, device=self.device), [1])
        try:
            for most in (2, 3):
                rows = Rows(most, VECTOR * most, self.device)
                rows.put(prompt, [0] * most)
                for width in (1, most):
                    self._step(rows.given[:width], rows, width, rows.capacity)
        except Exception as error:  # of torch's compiler, of Triton or of the C++ compiler
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"compile: torch could not ({reason}); it needs a C++ compiler, and on a GPU "
                "Triton: install them, or leave it out (a server: TORCHDYNAMO_DISABLE=1)"
            ) from None

    def read(self, ids: Int[Tensor, "u p"], lengths: Sequence[int]) -> Prompts:
        """Read prompts that are padded at their ends, to be put into rows as often as needed."""
        count, length = ids.shape
        places = torch.arange(length, device=self.device)
        mask = _blocked(places <= places[:, None], self.embedding.dtype)
        turn = self._rotation(places.expand(count, -1))
        x = F.embedding(ids, self.embedding)
        layers: Layers = []
        for layer in self.layers:
            x, keys, values = self._through(layer, x, turn, mask)
            layers.append((keys, values))
        ends = torch.tensor(lengths, device=self.device) - 1
        states = self.final_norm(x)[torch.arange(count, device=self.device), ends]
        return Prompts(layers, lengths, states)

    def step(self, ids: Int[Tensor, " r"], rows: Rows) -> Float[Tensor, "r s"]:
        """Append one token to each row and return the states that the next ones are drawn from."""
        if self.graphs is None:
            states = self._step(ids, rows, rows.count, rows.stop)
        else:
            states = self.graphs(self._step, ids, rows)
        rows.grow()
        return states

    def _step(
        self, ids: Int[Tensor, " r"], rows: Rows, width: int, stop: int
    ) -> Float[Tensor, "r s"]:
        """Write the keys and values of one token for each of the first `width` rows."""
        places = rows.places(width)
        mask = _blocked(rows.behind(width, stop) >= 0, self.embedding.dtype)[:, None, None, :]
        turn = self._rotation(rows.positions[:width, None])
        x = F.embedding(ids[:, None], self.embedding)
        for layer, slots in zip(self.layers, rows.layers, strict=True):
            x, *_ = self._stepped(layer, x, turn, mask, slots, places)
        return self.final_norm(x)[:, 0]

    def logits(self, states: Float[Tensor, "r s"], head: slice) -> Float[Tensor, "r v"]:
        """Return the logits of the vocabulary rows `head`; each cut is laid out once."""
        key = (head.start, head.stop)
        if key not in self._heads:
            self._heads[key] = self._linear(self.head[head], None)
        return self._heads[key](states).float()

    def _through(
        self,
        layer: _Layer,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor,
        slots: tuple[Tensor, Tensor] | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run `r n dim` through a layer; also return the keys and values that were looked at.

        Without `slots` those are the tokens' own. Otherwise these go to their `places` there, and
        as many rows and slots as `mask` has are looked at.
        """
        q, keys, values = self._turned(layer, layer.attention_norm(x), *turn)
        if slots is not None and places is not None:
            for held, new in zip(slots, (keys, values), strict=True):
                held.flatten(0, 1).index_copy_(0, places, new[:, 0])
            keys, values = (held[: mask.shape[0], : mask.shape[-1]] for held in slots)
        x = x + layer.out(self._attend(q, keys, values, mask))
        gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up), keys, values

    def _turned(
        self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys (both turned by their positions) and values, `r n heads e`."""
        heads = layer.qkv(x).unflatten(-1, (-1, self.head_dim))
        turned = self.num_heads + self.num_kv_heads
        qk, v = heads[:, :, :turned], heads[:, :, turned:]
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk[:, :, : self.num_heads], qk[:, :, self.num_heads :]
            qk = torch.cat((layer.query_norm(q), layer.key_norm(k)), dim=2)
        qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
        return qk[:, :, : self.num_heads], qk[:, :, self.num_heads :], v

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        count, groups = q.shape[1], self.num_heads // self.num_kv_heads
        # Query heads that share a key head become further queries of it: no key is ever repeated.
        q = q.unflatten(2, (self.num_kv_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if count > 1 and groups > 1:
            mask = mask.repeat(groups, 1)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, keys, values, mask)
        return mixed.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4).flatten(2)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of positions, for every head alike.

        rotate_half(x) = (-x2, x1) is x rolled by half a head, with the sign moved into the sine.
        """
        angles = positions[..., None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embedding.dtype
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_type, wherever this version of transformers wrote them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _fuse(
    weights: Mapping[str, Tensor], prefix: str, eps: float, linear: Callable[..., Linear]
) -> _Layer:
    """Concatenate the projections of one layer that read the same input."""

    def find(name: str) -> Tensor | None:
        tensor = weights.get(f"{prefix}{name}")
        return None if tensor is None else tensor.detach()

    def product(*names: str) -> Linear:
        parts = [weights[f"{prefix}{name}.weight"].detach() for name in names]
        biases = [bias for name in names if (bias := find(f"{name}.bias")) is not None]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        return linear(weight, torch.cat(biases) if biases else None)

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
