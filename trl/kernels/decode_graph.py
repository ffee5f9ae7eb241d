"""Decoding steps of fixed shapes, which a CUDA graph replays: keys and values in place, and attention over all of them.

Replaces, while responses are sampled on a GPU, a forward pass whose thousand small kernels the processor launches one
by one: a step of a model below a few billion parameters takes the GPU less time than it takes Python to ask for it.
Once captured, a step is one launch. The weights are read where they are, so that optimizer steps need no new capture.
Gain on an H200, 64 rows of a model of Qwen2.5-0.5B's shape: 3.0 ms a token instead of 20 (`bench/gpu/bench.py`). Off
with `TRL_KERNELS=off`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from trl.kernels.door import chosen_attention
from trl.kernels.kv_cache import GrowingLayer

logger = logging.getLogger(__name__)

NAME = "trl_fixed_decoding"


class FixedLayer(DynamicLayer):
    """Cache layer of `capacity` tokens that writes new ones at a column held by a tensor.

    Args:
        keys: `[B, heads, n, D]`, the keys so far, which take the first `n` columns.
        values: the values so far, likewise.
        capacity: columns in all.
        column: int64 `[1]`, where the next token goes; the owner of the cache moves it on.
    """

    def __init__(self, keys: Tensor, values: Tensor, capacity: int, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (_widened(states, capacity) for states in (keys, values))
        self.column = column
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one new token per row; returns all columns, of which the mask excludes the unused."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


def _widened(states: Tensor, capacity: int) -> Tensor:
    wide = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    wide[:, :, : states.shape[2]] = states
    return wide


def fixed_cache(cache: DynamicCache, config: Any, capacity: int, column: Tensor) -> DynamicCache:
    """Copies a cache after its prefill into one of `FixedLayer`s.

    Args:
        cache: holds the keys and values of the queries.
        config: the decoder's configuration.
        capacity: columns of the new cache; a multiple of 8, as attention kernels want of a mask.
        column: int64 `[1]`, where the next token goes.

    Raises:
        ValueError: if a layer of the cache does not keep every token.
    """
    if unsupported := {
        type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, GrowingLayer)
    }:
        raise ValueError(f"cache layers of type {', '.join(sorted(unsupported))} have no fixed counterpart")
    fixed = DynamicCache(config=config)
    fixed.layers = [FixedLayer(layer.keys, layer.values, capacity, column) for layer in cache.layers]
    return fixed


def fixed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row, for transformers' `AttentionInterface`.

    Query heads that share a key head become queries of one head, so that keys and values are not repeated.

    Args:
        module: the attention layer.
        query: `[B, heads, 1, D]`.
        key: `[B, shared, capacity, D]`.
        value: `[B, shared, capacity, D]`.
        attention_mask: additive `[B, 1, 1, capacity]`.
        scaling: factor of the scores.
        options: other arguments of the interface.

    Returns:
        `[B, 1, heads, D]`, and None for the attention weights.

    Raises:
        ValueError: if the layer asks for a softcap, sinks or a position bias, or is not causal attention of one token.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unsupported or attention_mask is None or query.shape[2] != 1:
        raise ValueError(f"attention over a fixed cache does not support {', '.join(unsupported) or 'this layer'}")
    rows, heads, _, size = query.shape
    shared = key.shape[1]
    queries = query.reshape(rows, shared, heads // shared, size)
    mask = attention_mask.to(query.dtype).expand(rows, shared, heads // shared, -1)
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, 1, heads, -1), None


@contextmanager
def fixed_decoding(config: Any) -> Iterator[None]:
    """Selects `fixed_attention` for models that use `config` inside the `with` block."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionMaskInterface.register(NAME, sdpa_mask)
        AttentionInterface.register(NAME, fixed_attention)
    with chosen_attention(config, NAME):
        yield


class ReplayedStep:
    """Runs a function of fixed shapes: once as it is, to warm up, and from then on as a CUDA graph.

    The function reads and writes tensors that stay where they are, and must not wait for the device; its result is the
    same tensor at every replay. On a CPU it is called as it is. It is given to each call, so that nothing here refers
    back to what owns the graph: a graph that is collected while another is captured would end that capture.

    Args:
        device: where the function's tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._warm = device.type != "cuda"
        self._captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs the step; the next call overwrites the returned tensor."""
        if not self._warm:
            self._warm = True
            return self._on_side_stream(step)
        if self._captures and self._graph is None:
            self._capture(step)
        if self._graph is None or self._result is None:
            return step()
        self._graph.replay()
        return self._result

    def _capture(self, step: Callable[[], Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with _no_garbage_collection():
                self._result = self._on_side_stream(lambda: _captured(graph, step))
        except RuntimeError as error:
            self._captures = False
            logger.warning("sampling without a CUDA graph: capturing a decoding step failed: %s", error)
        else:
            self._graph = graph

    def _on_side_stream(self, work: Callable[[], Tensor]) -> Tensor:
        """Calls `work` on another stream, as warming up for a capture and the capture itself need."""
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = work()
            current.wait_stream(side)
        return result


def _captured(graph: torch.cuda.CUDAGraph, step: Callable[[], Tensor]) -> Tensor:
    # Not `torch.cuda.graph`, which gives all cached memory back to the driver first.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        return step()
    finally:
        graph.capture_end()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns off cycle collection in the `with` block, where destroying a CUDA graph would end a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raises RuntimeError inside the `with` block where the processor would wait for a GPU, which a graph cannot."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
