"""Key-value cache with spare capacity.

Replaces the layers of transformers' `DynamicCache` while responses are sampled, which copy all keys and values for
every token. Gain on two cores of an Intel Xeon with AMX, for appending one token in a layer of SmolLM2's shape: little
at 16 rows of 48 tokens; at 64 rows 6 times as fast with 48 tokens and 16 times with 256 (`python bench/attention.py`).
Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from trl.kernels.door import kernels_enabled

_MIN_GROWTH = 16  # minimum number of tokens by which the buffer grows


class GrowingLayer(DynamicLayer):
    """Cache layer whose `keys` and `values` `[B, heads, n, head_dim]` are views of larger, zero-filled buffers.

    Buffers grow by a half, so that all copies together cost no more than a few times the last one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens and returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            capacity = max(end + _MIN_GROWTH, end + end // 2)
            self._buffers = (self._grown(key_states, 0, capacity), self._grown(value_states, 1, capacity))
        keys, values = self._buffers
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        self._length = end
        self._update_views()
        return self.keys, self.values

    def _update_views(self) -> None:
        assert self._buffers is not None
        self.keys, self.values = (_view(buffer, self._length) for buffer in self._buffers)

    def _grown(self, like: Tensor, index: int, capacity: int) -> Tensor:
        grown = like.new_empty(*like.shape[:2], capacity, like.shape[3])
        if self._buffers is not None:
            grown[:, :, : self._length] = self._buffers[index][:, :, : self._length]
        grown[:, :, self._length :] = 0
        return grown

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices` [b]."""
        if self._buffers is None:
            return
        keys, values = (buffer[indices] for buffer in self._buffers)
        self._buffers = (keys, values)
        self._update_views()


def _view(buffer: Tensor, tokens: int) -> Tensor:
    view = buffer[:, :, :tokens]
    view._trl_buffer = buffer  # type: ignore[attr-defined]
    return view


def full_buffer(states: Tensor) -> Tensor:
    """Returns the buffer behind a `GrowingLayer`'s `states`, whose tail is zeros or stale entries; else `states`."""
    return getattr(states, "_trl_buffer", states)


def numbers_per_token(cache: Cache) -> int:
    """Returns how many numbers each token of a row takes in a cache that a forward pass filled: keys and values of all layers.

    Layers that have other layers' keys and values hold none.
    """
    states = [states for layer in cache.layers if layer.keys is not None for states in (layer.keys, layer.values)]
    return sum(tensor.shape[1] * tensor.shape[3] for tensor in states)


def growing_cache(config: Any) -> DynamicCache:
    """Builds a `DynamicCache` whose plain layers are `GrowingLayer`s; with kernels off, an unchanged `DynamicCache`.

    Layers of other types (sliding window, recurrent state) are not changed.

    Args:
        config: the decoder's configuration, which determines the layer types.
    """
    cache = DynamicCache(config=config)
    if not kernels_enabled():
        return cache
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not cache.layers:
        cache.layer_class_to_replicate = GrowingLayer
    return cache
