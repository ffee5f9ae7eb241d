"""Fused decode-time forward for Llama, Mistral, Qwen2 and GPT-2 layers.

At one token per row, dispatching an operation takes about as long as running it. Here, matrix products with the same
input are merged, elementwise operations are fused into the preceding product, before its result is rounded, and queries
and keys are rotated together. The decoding self-check (`trl.rollout.engine.obstacle`) runs through these layers too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation

from trl.import_utils import cache_keyword
from trl.kernels.decode_attention import NAME, decoding_attention
from trl.kernels.joined_products import Joined, Part, can_be_joined, is_free, part_of


class QuickLayer:
    """Replacement for a decoder layer's `forward` in passes with a cache; not differentiable.

    Args:
        layer: a decoder layer of the architecture that the subclass handles.
        rows: approximate number of sequences.
    """

    # `reads`: linear layers, grouped by shared input. `beside`: the other submodules, attention first, with their class
    # name minus the architecture prefix.
    reads: tuple[tuple[str, ...], ...]
    beside: ClassVar[Mapping[str, str]]

    def __init__(self, layer: Any, rows: int) -> None:
        self.layer = layer
        self.plain: Callable[..., Tensor] = layer.forward
        self.names = tuple(inspect.signature(layer.forward).parameters)[1:]  # parameters after the hidden states
        self.cache_keyword = cache_keyword(self.names)
        self.products = [Joined(parts, rows) for parts in self.parts(layer) or ()]
        self.attention = layer.get_submodule(next(iter(self.beside)))

    @classmethod
    def knows(cls, layer: Any) -> bool:
        """Whether `layer` is unmodified and all its products are supported."""
        make = type(layer).__name__.removesuffix("DecoderLayer").removesuffix("Block")
        parts = {name: layer.get_submodule(name) for name in cls.beside}
        as_made = all(
            type(part) is nn.LayerNorm
            if kind == "LayerNorm"
            else (type(part).__module__, type(part).__name__) == (type(layer).__module__, make + kind)
            for part, kind in zip(parts.values(), cls.beside.values(), strict=True)
        )
        return (
            as_made
            and "forward" not in vars(layer)
            and all(is_free(module) for module in layer.modules())
            and next(iter(parts.values())).config._attn_implementation in ("sdpa", NAME)
            and cls.parts(layer) is not None
        )

    @classmethod
    def parts(cls, layer: Any) -> list[list[Part]] | None:
        """Returns the linear layers grouped by shared input; None if one of them is unsupported."""
        found = [[part_of(layer.get_submodule(name)) for name in names] for names in cls.reads]
        known = [[part for part in parts if part is not None] for parts in found]
        whole = all(
            len(parts) == len(names) and can_be_joined(parts) for parts, names in zip(known, cls.reads, strict=True)
        )
        return known if whole else None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = hidden_states.dtype == self.products[0].dtype and not self.layer.training
        found = None
        if known:  # bind by name: transformers releases differ in which arguments are positional, and in what order
            given = dict(zip(self.names, args, strict=False)) | kwargs
            found = self.pass_through(hidden_states, given.pop(self.cache_keyword, None), **given)
        return self.plain(hidden_states, *args, **kwargs) if found is None else found

    def pass_through(self, hidden: Tensor, cache: Any, **kwargs: Any) -> Tensor | None:
        """Runs the fused layer on `[B, n, H]`, same shape out; None if these arguments need the plain layer."""
        raise NotImplementedError


class _Gated(QuickLayer):
    """Llama-style layer: RMSNorm, rotary embeddings and a gated MLP."""

    reads = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
    )
    beside: ClassVar = {
        "self_attn": "Attention",
        "mlp": "MLP",
        "input_layernorm": "RMSNorm",
        "post_attention_layernorm": "RMSNorm",
    }

    @classmethod
    def knows(cls, layer: Any) -> bool:
        return super().knows(layer) and type(layer.mlp.act_fn) in (SiLUActivation, nn.SiLU)

    def pass_through(
        self,
        hidden: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        size = self.attention.head_dim
        if cache is None or position_embeddings is None or position_embeddings[0].shape[-1] != size:
            return None
        read, write, gate, up, down = self.products
        heads, shared = (width // size for width in read.sizes[:2])
        by_head = read(_normed(hidden, self.layer.input_layernorm)).unflatten(-1, (-1, size))
        turned = _rotated(by_head[:, :, : heads + shared], *position_embeddings)
        query, key = turned.transpose(1, 2).split((heads, shared), dim=1)
        value = by_head[:, :, heads + shared :].transpose(1, 2)
        hidden = write(_attended(self.attention, query, key, value, attention_mask, cache), added=hidden)
        normed = _normed(hidden, self.layer.post_attention_layernorm)
        return down(up(normed, times=gate(normed, activation="silu")), added=hidden)


class _GPT2(QuickLayer):
    """GPT-2 layer: LayerNorm, and queries, keys and values already in one product."""

    reads = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
    beside: ClassVar = {"attn": "Attention", "mlp": "MLP", "ln_1": "LayerNorm", "ln_2": "LayerNorm"}

    @classmethod
    def knows(cls, layer: Any) -> bool:
        tanh = (NewGELUActivation, GELUTanh)
        return super().knows(layer) and type(layer.mlp.act) in tanh and not hasattr(layer, "crossattention")

    def pass_through(
        self,
        hidden: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        if cache is None or encoder_hidden_states is not None:
            return None
        read, write, up, down = self.products
        by_head = read(self.layer.ln_1(hidden)).unflatten(-1, (3, self.attention.num_heads, self.attention.head_dim))
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        hidden = write(_attended(self.attention, query, key, value, attention_mask, cache), added=hidden)
        return down(up(self.layer.ln_2(hidden), activation="gelu_tanh"), added=hidden)


_MAKES: dict[tuple[str, str], type[QuickLayer]] = {
    ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"): _Gated,
    ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"): _Gated,
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"): _Gated,
    ("transformers.models.gpt2.modeling_gpt2", "GPT2Block"): _GPT2,
}


def quick_make(layer: Any) -> type[QuickLayer] | None:
    """Returns the `QuickLayer` subclass for a layer; None for an unsupported architecture or a modified layer."""
    make = _MAKES.get((type(layer).__module__, type(layer).__name__))
    return make if make is not None and make.knows(layer) else None


def _attended(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Appends new keys and values to the cache and attends: `[B, heads, n, D]` inputs to `[B, n, heads * D]`."""
    key, value = cache.update(key, value, attention.layer_idx)
    return decoding_attention(attention, query, key, value, mask, scaling=attention.scaling)[0].flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[B, n, heads, D]` by angles `[B, n, D]`, pairing its halves (RoPE, Su et al. 2021, arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def _normed(x: Tensor, norm: Any) -> Tensor:
    """Applies RMSNorm to `[..., H]` (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return nn.functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
