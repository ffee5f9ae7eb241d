"""Token sampling: top-k, top-p and min-p filtering, and inverse-CDF draws.

Each filter is a threshold on the logits, so the sampling distribution depends on the logits alone and can be recomputed
when a response is scored. Words with equal logits are kept or removed together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.functional.logprobs import BITS
from trl.types import Sampling

_BLOCK_WORDS = 512  # words that share one partial sum
_HEAD_WORDS = 1024  # number of most likely words to search for the nucleus threshold first


def sampling_logits(logits: Tensor, sampling: Sampling, length: int) -> Tensor:
    """Turns a model's logits into those of the sampling distribution.

    Args:
        logits: `[B, V]` in any float dtype.
        sampling: the distribution, and its stop tokens.
        length: tokens of the response before this one; stop tokens are excluded below `sampling.least_tokens`.

    Returns:
        `[B, V]` float32 logits.
    """
    if sampling.temperature != 1.0 and not sampling.greedy:
        logits = logits.float() / sampling.temperature
    logits = logits.float()
    if length < sampling.least_tokens and sampling.stops:
        logits = logits.index_fill(-1, torch.tensor(sampling.stops, device=logits.device), -math.inf)
    if sampling.greedy:
        return logits
    return cut_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)


def cut_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Sets the logits of excluded words to -inf, applying top-k, then top-p, then min-p.

    Args:
        logits: `[..., V]` float32 or float64, already divided by the temperature.
        top_k: keep the `top_k` most likely words; 0 keeps all.
        top_p: then keep the smallest set of most likely words whose probability reaches `top_p` (Holtzman et al. 2020,
            arXiv:1904.09751); 1 keeps all.
        min_p: then keep words at least `min_p` times as likely as the most likely one (Nguyen et al. 2024,
            arXiv:2407.01082); 0 keeps all.

    Returns:
        `[..., V]` logits, `logits` itself if every filter is off. At least one word is always kept.

    Raises:
        ValueError: if a setting is out of range.
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in [0, 1]")
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p < 1:
        logits = logits.masked_fill(logits < _nucleus_edge(logits, top_p), -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def _nucleus_edge(logits: Tensor, top_p: float) -> Tensor:
    """`[..., 1]` logit of the least likely word of the nucleus."""
    total = logits.logsumexp(dim=-1, keepdim=True)

    def likeliest(count: int) -> tuple[Tensor, Tensor]:
        ordered = logits.topk(count, dim=-1).values
        return ordered, _running_sum((ordered - total).exp().double())

    # Sorting the whole vocabulary is slow, and the nucleus rarely exceeds _HEAD words.
    ordered, reached = likeliest(min(_HEAD_WORDS, logits.shape[-1]))
    if not bool((reached[..., -1] >= top_p).all()):
        ordered, reached = likeliest(logits.shape[-1])
    # A word is in the nucleus if the words before it do not reach top_p.
    size = (reached < top_p).sum(dim=-1, keepdim=True).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, size)


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Samples one word per row by inverting the CDF at a uniform random number.

    This needs one random number per row; exponential races need one per word, which at a vocabulary of 50,000 is most
    of a CPU decoding step. The same uniform gives the same word whatever the rest of the batch.

    Args:
        logits: `[B, V]` float32 or float64; -inf excludes a word.
        uniforms: `[B]` float64 in [0, 1).

    Returns:
        `[B]` int64 tokens, and `[B]` their log-probabilities under softmax(logits) in the logits' dtype: NaN for a row
        whose logits are not finite.
    """
    rows, vocabulary = logits.shape
    largest = logits.amax(dim=-1, keepdim=True)
    blocks = -(-vocabulary // _BLOCK_WORDS)
    weights = logits.new_empty(rows, blocks * _BLOCK_WORDS)
    weights[:, vocabulary:] = 0
    torch.sub(logits, largest, out=weights[:, :vocabulary]).mul_(BITS).exp2_()
    weights = weights.view(rows, blocks, _BLOCK_WORDS)
    sums = weights.sum(dim=-1).double()
    reached = _running_sum(sums)
    total = reached[:, -1:]
    # Keep rounding from pushing the target past the last word with non-zero probability.
    target = torch.minimum(uniforms[:, None].double() * total, total * (1 - 1e-15))
    block = torch.searchsorted(reached, target, right=True).clamp(max=blocks - 1)
    remainder = target - (reached - sums).gather(-1, block)
    within = weights.gather(1, block[..., None].expand(-1, -1, _BLOCK_WORDS)).squeeze(1).double()
    within = _running_sum(within)
    remainder = torch.minimum(remainder.clamp(min=0.0), within[:, -1:] * (1 - 1e-15))
    word = (block * _BLOCK_WORDS + torch.searchsorted(within, remainder, right=True)).clamp(max=vocabulary - 1)
    logprobs = logits.gather(-1, word) - largest - total.log().to(logits.dtype)
    return word.squeeze(-1), logprobs.squeeze(-1)


def _running_sum(x: Tensor) -> Tensor:
    """Cumulative sum of float64 `[..., n]`, also in torch's deterministic mode, which has no `cumsum` on a GPU."""
    deterministic = x.is_cuda and torch.are_deterministic_algorithms_enabled()
    return _sum_by_products(x) if deterministic else x.cumsum(dim=-1)


def _sum_by_products(x: Tensor) -> Tensor:
    """Cumulative sum of `[..., n]` as products with triangular matrices, block by block."""
    count = x.shape[-1]
    size = min(count, _BLOCK_WORDS)
    blocks = F.pad(x, (0, -count % size)).unflatten(-1, (-1, size))
    within = blocks @ torch.ones(size, size, dtype=x.dtype, device=x.device).triu()
    if blocks.shape[-2] > 1:
        sums = within[..., -1]
        within = within + (_sum_by_products(sums) - sums)[..., None]
    return within.flatten(-2)[..., :count]
