"""Key-value cache with spare capacity.

Replaces the layers of transformers' `DynamicCache` while responses are sampled, which copy all keys and values for every
token. Gain on two cores of an Intel Xeon with AMX, for appending one token in a layer of SmolLM2's shape: little at 16
rows of 48 tokens; at 64 rows 6 times as fast with 48 tokens and 16 times with 256 (`python bench/attention.py`). Off
with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from trl.kernels.door import kernels_enabled

_STEP = 16  # minimum number of tokens by which the buffer grows


class GrowingLayer(DynamicLayer):
    """Cache layer whose `keys` and `values` `[B, heads, n, head_dim]` are views of larger, zero-filled buffers.

    Buffers grow by a half, so that all copies together cost no more than a few times the last one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new tokens and returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            room = max(end + _STEP, end + end // 2)
            self._room = (self._enlarged(key_states, 0, room), self._enlarged(value_states, 1, room))
        keys, values = self._room
        keys[:, :, self._length : end] = key_states
        values[:, :, self._length : end] = value_states
        self._length = end
        self._show()
        return self.keys, self.values

    def _show(self) -> None:
        assert self._room is not None
        self.keys, self.values = (_part(whole, self._length) for whole in self._room)

    def _enlarged(self, like: Tensor, which: int, room: int) -> Tensor:
        larger = like.new_empty(*like.shape[:2], room, like.shape[3])
        if self._room is not None:
            larger[:, :, : self._length] = self._room[which][:, :, : self._length]
        larger[:, :, self._length :] = 0
        return larger

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices` [b]."""
        if self._room is None:
            return
        keys, values = (part[indices] for part in self._room)
        self._room = (keys, values)
        self._show()


def _part(whole: Tensor, tokens: int) -> Tensor:
    part = whole[:, :, :tokens]
    part._trl_room = whole  # type: ignore[attr-defined]
    return part


def whole_room(states: Tensor) -> Tensor:
    """Returns the buffer behind a `GrowingLayer`'s `states`, whose tail is zeros or stale entries; else `states`."""
    return getattr(states, "_trl_room", states)


def growing_cache(config: Any) -> DynamicCache:
    """Builds a `DynamicCache` whose plain layers are `GrowingLayer`s; with kernels off, `DynamicCache` as it is.

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
