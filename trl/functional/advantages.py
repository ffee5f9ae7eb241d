"""Per-token rewards from scores and KL, and advantages from rewards (GAE)."""

from __future__ import annotations

import torch
from torch import Tensor


def last_true(mask: Tensor) -> Tensor:
    """`[B]` index of the last True column of each row of `mask` `[B, S]`; -1 if a row has none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).amax(dim=1) if mask.shape[1] else columns.new_full((len(mask),), -1)


def shape_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, token_rewards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token rewards: KL penalty plus the score on the last response token (Ziegler et al. 2019, eq. 2).

    Args:
        scores: `[B]` one number per sequence.
        kl: `[B, S]` per-token KL, in nats.
        mask: `[B, S]` bool.
        kl_coef: weight of the KL.
        token_rewards: `[B, S]` extra per-token rewards, added to the rest.

    Returns:
        `[B, S]` rewards and the `[B, S]` KL penalty (-kl_coef · kl), both detached, floating point, and 0 off the mask.
        The score of a row without a counted token is dropped.
    """
    dtype = kl.dtype if kl.is_floating_point() else torch.float32
    penalty = (-kl_coef * kl.detach()).to(dtype).masked_fill(~mask, 0.0)
    rewards = penalty.clone()
    if token_rewards is not None:
        rewards += token_rewards.detach().to(dtype).masked_fill(~mask, 0.0)
    last = last_true(mask)
    rows_with_tokens = (last >= 0).nonzero().squeeze(-1)
    rewards[rows_with_tokens, last[rows_with_tokens]] += scores.detach().to(dtype)[rows_with_tokens]
    return rewards, penalty


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards over the counted tokens.

    Positions off the mask (padding, or tool output inside a response) are skipped, as if the counted tokens were
    adjacent.

    Args:
        rewards: `[B, S]`.
        values: `[B, S]` value of the state before each token.
        mask: `[B, S]` bool.
        gamma: discount in [0, 1].
        lam: λ in [0, 1]: 0 gives the one-step TD error, 1 gives reward-to-go minus value.
        bootstrap: `[B]` value after the last counted token, for truncated responses; 0 if None.

    Returns:
        `[B, S]` advantages and `[B, S]` returns (advantages + values), detached, 0 off the mask.
    """
    device = values.device
    # A loop over columns of a few numbers: on a GPU it takes several times as long.
    rewards, values, mask = rewards.detach().cpu(), values.detach().cpu(), mask.cpu()
    bootstrap = None if bootstrap is None else bootstrap.cpu()
    next_value = values.new_zeros(len(values)) if bootstrap is None else bootstrap.detach().to(values.dtype)
    running = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for s in reversed(range(values.shape[1])):
        counted = mask[:, s]
        delta = rewards[:, s] + gamma * next_value - values[:, s]
        running = torch.where(counted, delta + gamma * lam * running, running)
        next_value = torch.where(counted, values[:, s], next_value)
        advantages[:, s] = running
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages.to(device), (advantages + values).masked_fill(~mask, 0.0).to(device)
