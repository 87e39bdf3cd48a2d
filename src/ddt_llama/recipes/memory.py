"""What memory a step of a recipe takes, found without the memory: on tensors without contents.

One pass forward and backward of the true objective runs on torch's fake tensors, and every storage
that comes and goes is counted by what it is. So any network is counted by what autograd really
keeps. A GPU is stood for by a CPU with a GPU's choices (`_fake`), since no torch without CUDA can
differentiate tensors that say they are on one. What `train.compile` saves is not known here.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddt_llama.config import UserError
from ddt_llama.language import Batch, backbone, lora
from ddt_llama.layers import attention
from ddt_llama.recipes.cost import longest_document, tokenizer_of, vocabulary_of
from ddt_llama.recipes.language import CHUNK, LanguageRecipe
from ddt_llama.recipes.named import Recipe
from ddt_llama.tokenizer import quantizer
from ddt_llama.tokenizer.latents import VaeLatents
from ddt_llama.tokenizer.quantizer import keep_codes
from ddt_llama.training import language
from ddt_llama.training.muon import TOGETHER
from ddt_llama.training.optim import groups
from ddt_llama.training.sharding import Recompute, blocks_of, recompute_blocks

Kind = Literal["cpu", "cuda"]
# The VAE of SD3 (Esser et al. 2024), where the recipe's folder is not there to say.
SD3_VAE = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


class Sizes(NamedTuple):
    """Numbers that a training holds: parameters in blocks, of the largest block, outside of blocks.

    `trained` have gradients, `averaged` of them a moving average, `muon` one moment and the others
    two; `products` is what making these orthogonal takes. `buffers` and `frozen` (what stands
    beside the model, such as a VAE) are bytes.
    """

    blocks: int
    largest: int
    outside: int
    trained: int
    averaged: int
    muon: int
    products: int
    buffers: int
    frozen: int

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.blocks + self.outside


class Held(NamedTuple):
    """Bytes at one moment of a pass, beside weights and what an optimizer keeps.

    `copies` are those of weights in the precision of the products, `logits` what is as wide as the
    vocabulary; gradients are told apart by whether their weights are in a block.
    """

    activations: float = 0
    logits: float = 0
    copies: float = 0
    gradients: float = 0
    gradients_outside: float = 0


class Pass(NamedTuple):
    """The fullest moment of every part of a pass: up to each output, then to each gradient."""

    batch: int
    moments: tuple[Held, ...]


def sizes_of(recipe: Recipe) -> Sizes:
    """Count what a training of `recipe` holds, on the meta device."""
    model, beside = _model(recipe)
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    named = dict(model.named_parameters())
    members = groups(model, recipe.train.optim)
    matrices = [named[name] for one in members if one.muon for name in one.names]
    trained = sum(named[name].numel() for group in members for name in group.names)
    return Sizes(
        blocks=sum(of_blocks),
        largest=max(of_blocks, default=0),
        outside=sum(p.numel() for p in named.values()) - sum(of_blocks),
        trained=trained,
        averaged=trained if recipe.train.ema else 0,
        muon=sum(one.numel() for one in matrices),
        products=_products([tuple(one.flatten(1).shape) for one in matrices]),
        buffers=sum(b.nbytes for b in model.buffers()),
        frozen=sum(t.nbytes for one in beside for t in (*one.parameters(), *one.buffers())),
    )


def _products(shapes: Sequence[tuple[int, int]]) -> int:
    """Count the numbers that `orthogonal` of matrices holds at most, beside these.

    What is done, and of those at hand their stack, two of the next and two squares.
    """
    done = most = 0
    for (rows, columns), count in Counter(shapes).items():
        for start in range(0, count, TOGETHER):
            many, size = min(TOGETHER, count - start), rows * columns
            most = max(most, done + many * (3 * size + 2 * min(rows, columns) ** 2))
            done += many * size
    return most


def passed(recipe: Recipe, batch: int, *, kind: Kind, recompute: Recompute, bf16: bool) -> Pass:
    """Run one pass of `batch` pictures, or documents of the longest kind, without memory."""
    model, beside = _model(recipe)
    vocabulary: Any = None
    rows = length = 0
    if isinstance(recipe, LanguageRecipe):
        vocabulary = vocabulary_of(recipe)
        rows, length = vocabulary.size, longest_document(recipe, vocabulary)
    with _fake(kind, rows, bf16):
        for part in (model, *beside):
            _stand_in(part)
        if isinstance(recipe, LanguageRecipe):
            one = torch.zeros(documents_at_once(recipe, batch), length, dtype=torch.int64)
            data: Any = Batch(one, one, one, contrast=one if recipe.alignment else None)
            objective: Any = replace(recipe, pack=0).loss(vocabulary, beside[0])
        else:
            data = torch.zeros(batch, 3, model.image_size, model.image_size)
            objective = recipe.loss(data)
        before = getattr(objective, "before_step", None)
        # On a GPU a language model's does nothing.
        if before is not None and (not rows or kind == "cpu"):
            before(model, recipe.train.steps)
        model.train()
        recompute_blocks(model, recompute)
        with _Watch(model, rows, length - 2, beside) as watch:
            cache = recompute != "selective"  # as the loop has it
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=cache):
                loss, _ = objective(model, data, 0)
            watch.turn_page()
            loss.backward()
            watch.turn_page()
    return Pass(batch, tuple(watch.pages))


def documents_at_once(recipe: LanguageRecipe, batch: int) -> int:
    """Return the documents of a pass of `batch`, those that come twice counted so."""
    return math.ceil(batch * (1 + recipe.twice))


def encoding(recipe: LanguageRecipe, kind: Kind) -> int:
    """Return the bytes that encoding pictures takes beside a training, at its fullest moment."""
    tokenizer, vae = _tokenizer(tokenizer_of(recipe))
    with _fake(kind, 0, False):
        for part in (tokenizer, *vae):
            _stand_in(part)
        size = tokenizer.image_size
        images = torch.zeros(CHUNK[kind], 3, size, size)
        with _Watch(tokenizer, rows=0, last=0) as watch:
            tokenizer.encode(images)
            watch.turn_page()
    return images.nbytes + int(max(sum(page) for page in watch.pages))


def batches(recipe: Recipe) -> tuple[int, ...]:
    """Return batches between which, and beyond which, memory grows in straight lines on a GPU.

    Logits, and cosines with the codebook, are computed a part of the rows at a time: one sample,
    all of one part, a little more than two of them (each is held until the next is there), many.
    """
    if isinstance(recipe, LanguageRecipe):
        vocabulary = vocabulary_of(recipe)
        part, rows = _logits_at_once(vocabulary.size), longest_document(recipe, vocabulary) - 1
        rows = round((1 + recipe.twice) * rows)
    else:
        part, rows = quantizer.MOST_VECTORS, _model(recipe)[0].num_tokens
    one = max(1, part // rows)
    return tuple(sorted({1, one, 2 * one + 2, 16 * one}))


class _Watch(TorchDispatchMode):
    """Count the bytes of storages while they exist; say yes where data would have to be asked.

    `rows` of the vocabulary tell logits from other activations; `last` is the place of the last
    supervised id. A page is turned behind every part of the model, and with every gradient that a
    parameter gets.
    """

    def __init__(
        self, model: nn.Module, rows: int, last: int, beside: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.rows, self.last = rows, last
        self.pages: list[Held] = []
        self._now = dict.fromkeys(Held._fields, 0)
        self._fullest = Held()
        self._known: dict[int, tuple[str, int]] = {}
        self._weights = {id(p.untyped_storage()) for p in model.parameters()}
        kept = [one for part in (model, *beside) for one in (*part.parameters(), *part.buffers())]
        self._before = {id(one.untyped_storage()) for one in kept}
        inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad:
                name = "gradients" if id(parameter) in inside else "gradients_outside"
                parameter.register_post_accumulate_grad_hook(self._finished(name))
        for part in model.children():
            part.register_forward_hook(
                lambda *_: self.turn_page() if torch.is_grad_enabled() else None
            )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else self.last
        if function is aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._see(one, function is aten._to_copy.default and self._is_weight(args[0]))
        return result

    def turn_page(self) -> None:
        """Keep the fullest moment since the last page."""
        self.pages.append(self._fullest)
        self._fullest = Held(**self._now)

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._weights

    def _see(self, tensor: Tensor, copy: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._before or id(storage) in self._known:
            return
        wide = tensor.ndim == 2 and tensor.shape[1] == self.rows
        name = "copies" if copy else "logits" if wide else "activations"
        self._known[id(storage)] = name, storage.nbytes()
        weakref.finalize(storage, self._forget, id(storage))
        self._add(name, storage.nbytes())

    def _add(self, name: str, size: int) -> None:
        self._now[name] += size
        if sum(self._now.values()) > sum(self._fullest):
            self._fullest = Held(**self._now)

    def _forget(self, key: int) -> None:
        name, size = self._known.pop(key)
        self._now[name] -= size

    def _finished(self, name: str) -> Callable[[Tensor], None]:
        def finished(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = id(parameter.grad.untyped_storage())
            before, size = self._known[key]
            self._known[key] = name, size
            self._now[before] -= size
            self._add(name, size)
            self.turn_page()

        return finished


@contextlib.contextmanager
def _fake(kind: Kind, rows: int, bf16: bool) -> Iterator[None]:
    """Make tensors without contents, with the choices of a GPU where `kind` is one."""
    choices = [
        patch.object(attention, "attend_by_products", _fused),
        patch.object(quantizer, "VECTORS_AT_ONCE", {}),
        patch.object(language, "CPU_PARTS", 1),
        patch.object(language, "CPU_ROWS", _logits_at_once(rows)),
    ]
    if bf16:  # autocast of CUDA has norms in float32, that of a CPU has not
        choices += [
            patch.object(F, name, _in_float32(getattr(F, name)))
            for name in ("layer_norm", "group_norm")
        ]
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        for choice in choices if kind == "cuda" else ():
            stack.enter_context(choice)
        yield


def _logits_at_once(rows: int) -> int:
    return max(language.CPU_ROWS, language.GPU_LOGITS // max(1, rows))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def normed(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm(values.float(), *args, **kwargs)

    return normed


def _model(recipe: Recipe) -> tuple[Any, Sequence[nn.Module]]:
    """Return what is trained, and the frozen ones beside it, on the meta device."""
    if not isinstance(recipe, LanguageRecipe):
        return _tokenizer(recipe)
    vocabulary = vocabulary_of(recipe)
    model = backbone.build(recipe.backbone, vocabulary, device="meta")
    if recipe.lora is not None:
        lora.adapt(model, recipe.lora, vocabulary)
    tokenizer, vae = _tokenizer(tokenizer_of(recipe))
    before = (
        [backbone.build(recipe.backbone, vocabulary, device="meta")] if recipe.alignment else []
    )
    return model, tuple(part.requires_grad_(False) for part in (*before, tokenizer, *vae))


def _tokenizer(recipe: Any) -> tuple[Any, Sequence[nn.Module]]:
    with torch.device("meta"):
        model = recipe.build(begins=False)
        recipe.equip(model)
    if recipe.keep_codes:
        keep_codes(model)
    latents = getattr(model.config, "latents", None)
    if not isinstance(latents, VaeLatents):
        return model, ()
    space, vae = _latents(latents)
    model.config = replace(model.config, latents=space)
    return model, (vae,)


def _latents(latents: VaeLatents) -> tuple[VaeLatents, nn.Module]:
    """Return a space like `latents` whose VAE has no weights; SD3's where the folder is absent."""
    try:
        diffusers = import_module("diffusers")
    except ImportError:
        raise UserError("a VAE needs diffusers: pip install 'ddt-llama[vae]'") from None
    try:
        settings = latents.vae_config
    except UserError:
        settings = SD3_VAE
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(settings)
    vae.eval().requires_grad_(False)
    vae.to = lambda _: vae  # fake weights do not move
    space = replace(latents)
    # Where the space looks for what it has read once.
    vars(space).update(vae_config=settings, vae=vae)
    return space, vae


def _stand_in(model: nn.Module) -> None:
    """Put tensors without contents in place of those of the meta device; shared ones stay so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, known in own.items():
                if known is None:
                    continue
                if id(known) not in made:
                    empty = torch.empty_like(known.detach(), device="cpu")
                    is_parameter = isinstance(known, nn.Parameter)
                    made[id(known)] = (
                        nn.Parameter(empty, known.requires_grad) if is_parameter else empty
                    )
                own[name] = cast(Any, made[id(known)])
