"""The `trl.core` API of TRL 0.4 to 0.11: the same names and signatures, on top of `trl.functional`.

Masks here may be bool, integer or floating point; nonzero entries count. New code should use `trl.functional` directly.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl import legacy
from trl.functional import masked
from trl.functional.logprobs import entropy, token_logprobs, wide_dtype
from trl.import_utils import cache_keyword, is_npu_available, is_xpu_available

WANDB_PADDING = -1

__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "PPODecorators",
    "add_suffix",
    "average_torch_dicts",
    "build_bert_batch_from_txt",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "is_npu_available",
    "is_xpu_available",
    "listify_batch",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pad_to_size",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]

if not TYPE_CHECKING:  # type checkers go on refusing unknown names
    __getattr__ = legacy.lookup(__name__)


# Maths ---------------------------------------------------------------------------------------------------------------


def _counts(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def _floating(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.float()


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `values` where `mask` is not 0.

    Args:
        values: any shape.
        mask: bool or numbers, broadcastable to `values`.
        axis: dimensions to average over; all if None.

    Returns:
        A scalar, or a tensor reduced over `axis`; 0 where nothing counts.
    """
    return masked.masked_mean(_floating(values), _counts(mask), axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `values` where `mask` is not 0.

    Args:
        values: any shape.
        mask: bool or numbers, broadcastable to `values`.
        unbiased: whether to apply Bessel's correction.

    Returns:
        A scalar; 0 if fewer than two values count.
    """
    return masked.masked_var(_floating(values), _counts(mask), unbiased)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Whitens `values` with the mean and variance of those where `mask` is not 0.

    Args:
        values: any shape.
        mask: bool or numbers, broadcastable to `values`.
        shift_mean: True removes the mean, False keeps it.

    Returns:
        A tensor shaped like `values`. As in TRL 0.4.6, positions off the mask do not enter the moments but are scaled
        too.
    """
    values = _floating(values)
    mean, var, _ = masked.masked_moments(values, _counts(mask))
    white = (values - mean) * torch.rsqrt(var + 1e-8)
    return white if shift_mean else white + mean


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Whitens `values` of any shape to unit variance, and to zero mean unless `shift_mean` is False."""
    return masked_whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean)


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities of chosen tokens, or of the whole vocabulary.

    Args:
        logits: `[..., V]`, already shifted so that position i predicts `labels` at i.
        labels: `[...]` int64; may be None without `gather`.
        gather: False returns the log-probability of every token.

    Returns:
        `[...]`, or `[..., V]` without `gather`; in nats, at least float32.

    Raises:
        ValueError: if the shapes differ apart from the vocabulary dimension, or `gather` is asked for without labels.
    """
    if not gather:
        return torch.log_softmax(logits, dim=-1, dtype=wide_dtype(logits))
    if labels is None:
        raise ValueError("labels=None says no token to gather: give labels, or gather=False for the whole vocabulary")
    return token_logprobs(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """`[...]` entropy in nats of the full distribution softmax(logits), for logits `[..., V]`."""
    return entropy(logits)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """Clamps `x` between two bounds, numbers or tensors broadcastable to `x`; if they cross, the lower bound wins."""
    lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.maximum(torch.minimum(x, upper), lower)


# Statistics ----------------------------------------------------------------------------------------------------------


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Flattens nested dicts into one, joining the keys of each path with `sep`. Empty dicts disappear.

    Raises:
        ValueError: if a key contains `sep`.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"key {key!r} contains the separator {sep!r}")
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{path}": leaf for path, leaf in flatten_dict(value, sep).items()})
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Flattens and stacks, key by key, the tensors of several dicts with the same keys.

    Returns:
        One `[len(stats_dicts), longest]` tensor per key; shorter rows are right-padded with `WANDB_PADDING` (-1).

    Raises:
        ValueError: if there is no dict, or one lacks a key.
    """
    columns = _columns(stats_dicts)
    return {
        key: pad_sequence([x.flatten() for x in column], batch_first=True, padding_value=WANDB_PADDING)
        for key, column in columns.items()
    }


def average_torch_dicts(list_of_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Averages, key by key, the tensors of several dicts with the same keys and shapes.

    Raises:
        ValueError: if there is no dict, or one lacks a key.
    """
    return {
        key: torch.stack([_floating(x) for x in column]).mean(dim=0) for key, column in _columns(list_of_dicts).items()
    }


def _columns(dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    if not dicts:
        raise ValueError("expected at least one dict, got none")
    for i, d in enumerate(dicts):
        if missing := sorted(set(dicts[0]) - set(d)):
            raise ValueError(f"dict {i} lacks {missing}, which dict 0 has")
    return {key: [d[key] for d in dicts] for key in dicts[0]}


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Appends `suffix` to every key."""
    return {key + suffix: value for key, value in input_dict.items()}


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Converts tensors and arrays of shape `[]` or `[1]` to Python numbers; other values stay as they are."""
    return {
        key: value.item() if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) in ((), (1,)) else value
        for key, value in stats.items()
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Converts tensors to numpy arrays (bfloat16 as float32) and numbers to floats; other values stay as they are."""
    arrays: dict[str, Any] = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            arrays[key] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        elif isinstance(value, (int, float, np.number, np.bool_)):
            arrays[key] = float(value)
        else:
            arrays[key] = value
    return arrays


# Batches -------------------------------------------------------------------------------------------------------------


def pad_to_size(tensor: Tensor, size: int, dim: int = 1, padding: float = 50256) -> Tensor:
    """Pads dimension `dim` at its end with `padding` to length `size`.

    Raises:
        ValueError: if there is no such dimension, or it is longer than `size`; tensors are never truncated.
    """
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim={dim} is not a dimension of a tensor of shape {tuple(tensor.shape)}")
    padding_length = size - tensor.shape[dim]
    if padding_length < 0:
        raise ValueError(f"dimension {dim} of shape {tuple(tensor.shape)} is longer than size={size}")
    if padding_length == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = padding_length
    return torch.cat([tensor, tensor.new_full(shape, padding)], dim=dim)


def listify_batch(tensor: Tensor) -> list[Tensor]:
    """The rows of `tensor` `[B, ...]` as a list of `B` tensors."""
    return list(tensor.unbind(0))


def build_bert_batch_from_txt(
    text_list: Sequence[str], tokenizer: Any, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Encodes texts into one batch, padded on the right with 0.

    Args:
        text_list: `B` texts.
        tokenizer: anything with `encode(text) -> list of ids`.
        device: device of the result.

    Returns:
        `[B, T]` int64 tokens and `[B, T]` float32 attention mask, 1 on tokens and 0 on padding.

    Raises:
        ValueError: if `text_list` is empty.
    """
    if not text_list:
        raise ValueError("text_list is empty; expected at least one text")
    rows = [torch.tensor(tokenizer.encode(text), dtype=torch.int64) for text in text_list]
    tokens = pad_sequence(rows, batch_first=True, padding_value=0)
    attention = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_value=0.0)
    return tokens.to(device), attention.to(device)


# Randomness and memory -----------------------------------------------------------------------------------------------


def set_seed(seed: int) -> None:
    """Seeds the global generators of `random`, numpy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class LengthSampler:
    """Samples lengths uniformly from `[min_value, max_value)`.

    Draws from numpy's global generator; see `set_seed`.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        """Sets the range `[min_value, max_value)`.

        Raises:
            ValueError: if the range is empty.
        """
        self.values = list(range(min_value, max_value))
        if not self.values:
            raise ValueError(
                f"the range from min_value={min_value} to max_value={max_value} (exclusive) is empty: "
                "max_value must be larger than min_value"
            )

    def __call__(self) -> int:
        """Samples one length."""
        return int(np.random.choice(self.values))


class PPODecorators:
    """Empties the device's cache after a block or function: `with PPODecorators.empty_device_cache(True)`."""

    # Either is the default of both methods; never set by this library.
    optimize_cuda_cache = False
    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls, enabled: bool | None = None) -> Iterator[None]:
        """Collects garbage and empties the cache of CUDA, XPU or NPU on exit; a context manager and decorator.

        Args:
            enabled: False does nothing; None uses the class attributes `optimize_device_cache` and
                `optimize_cuda_cache`.
        """
        try:
            yield
        finally:
            if enabled or (enabled is None and (cls.optimize_device_cache or cls.optimize_cuda_cache)):
                # torch.npu exists once torch_npu is installed
                for device in (getattr(torch, name, None) for name in ("cuda", "xpu", "npu")):
                    if device is not None and device.is_available():
                        gc.collect()
                        device.empty_cache()

    empty_cuda_cache = empty_device_cache  # its name until TRL 0.6


# Sampling ------------------------------------------------------------------------------------------------------------


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Filters out unlikely tokens by top-k, then by top-p (nucleus) sampling.

    The token whose cumulative probability, most likely first, reaches `top_p` is kept (Holtzman et al. 2020).

    Args:
        logits: `[..., V]`.
        top_k: number of tokens to keep; 0 keeps all.
        top_p: probability mass to keep; 1 keeps all.
        filter_value: replaces the logits of removed tokens.
        min_tokens_to_keep: minimum number of tokens to keep.

    Returns:
        `[..., V]` filtered logits; a new tensor unless both filters are off.
    """
    vocabulary = logits.shape[-1]
    if top_k > 0:
        count = min(max(top_k, min_tokens_to_keep), vocabulary)
        threshold = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, filter_value)
    if top_p < 1.0:
        ordered, indices = logits.sort(dim=-1, descending=True)
        probs = torch.softmax(ordered.float(), dim=-1)
        tail = probs.cumsum(dim=-1) - probs >= top_p  # the tokens before this one already reach top_p
        tail[..., :min_tokens_to_keep] = False
        logits = logits.masked_fill(tail.scatter(-1, indices, tail), filter_value)
    return logits


def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Samples exactly `txt_len` tokens after each query at temperature 1, ignoring end-of-sequence tokens.

    Args:
        model: a decoder with or without a value head, in any mode; dropout is off during sampling.
        queries: `[B, Q]` int64 without padding.
        txt_len: number of tokens to sample.
        top_k: see `top_k_top_p_filtering`.
        top_p: see `top_k_top_p_filtering`.

    Returns:
        `[B, txt_len]` int64 responses, on the model's device.

    Raises:
        ValueError: if `queries` is not `[B, Q]` with Q ≥ 1, `txt_len` is negative, the model is an encoder-decoder, or
            the tokens do not fit into its context.
    """
    # Imported here because they need transformers, which the rest of this module does not.
    from trl.models.trunk import forward_parameters
    from trl.training.modes import eval_mode

    _check_room(model, queries, txt_len)
    tokens = queries.to(next(model.parameters()).device)
    keyword = cache_keyword(forward_parameters(model))
    cache = _empty_cache(model, keyword)
    cached_tokens = 0  # number of tokens in the cache
    with eval_mode(model), torch.no_grad():
        for _ in range(txt_len):
            inputs: dict[str, Any] = {"attention_mask": torch.ones_like(tokens)}
            if cache is not None:
                inputs |= {keyword: cache, "use_cache": True}
            output = model(input_ids=tokens[:, cached_tokens:], **inputs)
            logits = output[0] if isinstance(output, tuple) else output.logits
            probs = torch.softmax(top_k_top_p_filtering(logits[:, -1].float(), top_k, top_p), dim=-1)
            if cache is not None and cache.get_seq_length() != tokens.shape[1]:
                cache = None  # the model does not fill it: feed all tokens each time
            cached_tokens = 0 if cache is None else tokens.shape[1]
            tokens = torch.cat([tokens, torch.multinomial(probs, num_samples=1)], dim=1)
    return tokens[:, queries.shape[1] :]


def _check_room(model: nn.Module, queries: Tensor, txt_len: int) -> None:
    from trl.models.limits import context_length
    from trl.models.trunk import is_encoder_decoder

    if queries.dim() != 2 or queries.shape[1] == 0:
        raise ValueError(f"queries of shape {tuple(queries.shape)} must be [batch, length] with a length of at least 1")
    if txt_len < 0:
        raise ValueError(f"txt_len={txt_len} must be at least 0")
    if is_encoder_decoder(model):
        raise ValueError("respond_to_batch supports decoders only; use generate() for an encoder-decoder")
    context = context_length(model)
    positions = queries.shape[1] + txt_len - 1  # the last sampled token is never fed back
    if context is not None and positions > context:
        raise ValueError(
            f"queries of {queries.shape[1]} tokens and txt_len={txt_len} need {positions} positions, "
            f"but the model has {context}: shorten the queries or lower txt_len"
        )


def _empty_cache(model: nn.Module, keyword: str) -> Any:
    """An empty key-value cache, or None if the model does not accept one as `keyword` or cannot use one."""
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin

    from trl.models.trunk import accepts, base_language_model

    adapter = getattr(getattr(model, "pretrained_model", model), "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) or not accepts(model, keyword):
        return None  # prompt learning passes its learned prefix as the cache
    cache = DynamicCache(config=base_language_model(model).config)
    # A cache of recurrent states alone cannot report how many tokens it holds.
    return cache if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) else None
