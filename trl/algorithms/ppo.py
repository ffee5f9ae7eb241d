"""PPO: experience, minibatches and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trl.functional import Moments, gae, importance_weights, masked_moments, masked_whiten, policy_loss, value_loss
from trl.models import evaluate
from trl.protocols import LossFn, Reduce
from trl.training.scores import ScoreSettings, ends_with, scores_of, shape_scores
from trl.training.setup import Denominator, Setup, shuffled
from trl.types import ActorCritic, Loss, Minibatch, Rollout, Scored, Tally, identity


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """Hyperparameters of the PPO loss."""

    clip_range: float = 0.2  # ε, clips the ratio to [1 - ε, 1 + ε]
    value_clip_range: float = 0.2  # maximum distance of the clipped value from the old value
    value_coef: float = 0.1  # weight of the value loss
    dual_clip: float | None = None  # bounds the loss by -c · A where the advantage A is negative
    importance_cap: float = 2.0  # upper bound of the importance weights π_old / π_sampler
    temperature: float = 1.0  # sampling temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """How scores become advantages."""

    gamma: float = 1.0  # discount
    lam: float = 0.95  # λ of generalised advantage estimation
    whiten: bool = False  # scale rewards to unit variance, keeping their mean
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    moments: Moments = field(default_factory=Moments)  # running moments of earlier scores
    stops: Sequence[int] = ()  # tokens that end a response


@dataclass(frozen=True, slots=True, kw_only=True)
class PPO:
    """Proximal policy optimisation (Schulman et al. 2017) on one score per response and a KL penalty.

    `rewards` maps shaped scores `[B]`, the log-probabilities of policy and reference and the mask (int64), all
    `[B, S]`, and the keywords `kl` and `token_rewards` to per-token rewards and their KL penalty, both `[B, S]`.
    """

    setup: Setup
    rewards: Callable[..., tuple[Tensor, Tensor]]
    shaping: RewardSettings = field(default_factory=RewardSettings)
    advantages: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    """Maps values, rewards and mask (int64) to values, final advantages and returns, all `[B, S]`. None: generalised
    advantage estimation, whitened in each minibatch."""
    settings: PPOSettings = field(default_factory=PPOSettings)

    def experience(self, rollout: Rollout, scored: Scored) -> ActorCritic:
        """Evaluates policy and reference, turns scores into rewards, and rewards into advantages."""
        shaping, reduce = self.shaping, self.setup.reduce
        rollout, scores, token_rewards = scores_of(rollout, scored)
        evaluated = self.setup.evaluate(rollout)
        rollout, policy, ref_logprobs = evaluated.rollout, evaluated.policy, evaluated.ref_logprobs
        assert policy.values is not None and ref_logprobs is not None
        shaped, moments = shape_scores(
            scores.to(policy.logprobs),
            ends_with(rollout, shaping.stops),
            shaping.moments,
            shaping.scores,
            reduce,
            rollout.mask.any(dim=1),
        )
        per_token = {"kl": evaluated.exact_kl, "token_rewards": token_rewards}
        rewards, penalty = self.rewards(
            shaped,
            policy.logprobs,
            ref_logprobs,
            rollout.mask.long(),
            **{name: values for name, values in per_token.items() if values is not None},
        )
        values = policy.values
        if self.advantages is not None:
            values, advantages, returns = self.advantages(values, rewards, rollout.mask.long())
        else:
            if shaping.whiten:
                rewards = masked_whiten(rewards, rollout.mask, shift_mean=False, reduce=reduce)
            advantages, returns = gae(rewards, values, rollout.mask, gamma=shaping.gamma, lam=shaping.lam)
        return ActorCritic(
            rollout=rollout,
            scores=scores,
            old_logprobs=policy.logprobs,
            ref_logprobs=ref_logprobs,
            entropy=policy.entropy,
            old_values=values,
            rewards=rewards,
            non_score_reward=penalty,
            advantages=advantages,
            returns=returns,
            score_moments=moments,
        )

    def minibatches(self, experience: ActorCritic) -> Iterator[Minibatch[ActorCritic]]:
        """Shuffled minibatches with whitened advantages, for every epoch."""
        setup = self.setup
        return ppo_minibatches(
            experience,
            size=setup.size,
            epochs=setup.epochs,
            generator=setup.generator,
            denominator=setup.denominator,
            whiten=self.advantages is None,
            reduce=setup.reduce,
        )

    def loss(self, experience: ActorCritic) -> Loss:
        """Policy and value loss of one microbatch."""
        return ppo_loss(self.setup.policy, self.settings)(experience)


def ppo_terms(
    logprobs: Tensor,
    values: Tensor,
    entropy: Tensor,
    *,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    settings: PPOSettings,
    weights: Tensor | None = None,
) -> Loss:
    """Policy loss + value_coef · value loss of one microbatch, with its metrics.

    All arrays are `[B, S]`. `advantages` are used as given (whitened or not); `weights` are as in `policy_loss`.
    """
    policy = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_range=settings.clip_range,
        dual_clip=settings.dual_clip,
        weights=weights,
    )
    value = value_loss(values, old_values, returns, mask, clip_range=settings.value_clip_range)
    drift = (logprobs - old_logprobs).detach()
    total = Tally(policy.loss.sum + settings.value_coef * value.loss.sum, policy.loss.count)
    return Loss(
        objective=total.sum,
        metrics={
            "loss/policy": policy.loss,
            "loss/value": value.loss,
            "loss/total": total,
            "policy/entropy": Tally.of(entropy.detach(), mask),
            "policy/approxkl": Tally.of(0.5 * drift**2, mask),
            "policy/policykl": Tally.of(-drift, mask),
            "policy/clipfrac": policy.clipped,
            "policy/mean_ratio": Tally.of(policy.ratio, mask),
            "val/vpred": Tally.of(values.detach(), mask),
            "val/error": value.error,
            "val/clipfrac": value.clipped,
        },
        arrays={"policy/ratio": policy.ratio, "policy/advantages": advantages.detach()},
    )


def ppo_loss(policy: nn.Module, settings: PPOSettings) -> LossFn[ActorCritic]:
    """Returns the PPO loss function of `policy`: one forward pass, then `ppo_terms`."""

    def loss(experience: ActorCritic) -> Loss:
        rollout = experience.rollout
        evaluation = evaluate(policy, rollout, temperature=settings.temperature, entropy=True, response_only=True)
        assert evaluation.values is not None and evaluation.entropy is not None
        weights = None
        if rollout.sampler_logprobs is not None:
            weights = importance_weights(
                experience.old_logprobs, rollout.sampler_logprobs, rollout.mask, cap=settings.importance_cap
            )
        return ppo_terms(
            evaluation.logprobs,
            evaluation.values,
            evaluation.entropy,
            old_logprobs=experience.old_logprobs,
            old_values=experience.old_values,
            advantages=experience.advantages,
            returns=experience.returns,
            mask=rollout.mask,
            settings=settings,
            weights=weights,
        )

    return loss


def ppo_minibatches(
    experience: ActorCritic,
    *,
    size: int,
    epochs: int,
    generator: torch.Generator,
    denominator: Denominator = "minibatch",
    whiten: bool = True,
    reduce: Reduce = identity,
) -> Iterator[Minibatch[ActorCritic]]:
    """Yields shuffled minibatches of `size` sequences for `epochs` passes, with whitened advantages.

    Advantages are whitened over the whole minibatch across all processes. A minibatch with no counted token on any
    process is skipped: a step with zero gradients would still move the weights by their momentum.

    Args:
        experience: `B` sequences, a multiple of `size`.
        size: sequences per optimizer step on this process.
        epochs: passes over the experience, each in a new random order.
        generator: source of the random orders.
        denominator: "minibatch" divides by the minibatch's counted tokens, weighting every minibatch equally; "batch"
            divides by the mean count over all minibatches, weighting every token equally.
        whiten: False leaves the advantages as they are.
        reduce: sums a tensor over all processes.

    Raises:
        ValueError: if no process has a counted token.
    """
    batch_mask = experience.rollout.mask
    all_tokens, empty_rows = reduce(torch.stack([batch_mask.sum(), (~batch_mask.any(dim=1)).sum()]).float())
    if all_tokens == 0:
        raise ValueError("no response token counts on any process: the update would have no gradient")
    mean_tokens, any_empty = all_tokens * size / len(experience), bool(empty_rows > 0)
    for part in shuffled(experience, size=size, epochs=epochs, generator=generator):
        mask = part.rollout.mask
        counted_tokens = mean_tokens if denominator == "batch" and not any_empty else reduce(mask.sum().float())
        if any_empty and counted_tokens == 0:
            continue
        whitened = masked_whiten(part.advantages, mask, reduce=reduce) if whiten else part.advantages
        yield Minibatch(
            experience=replace(part, advantages=whitened),
            denominator=mean_tokens if denominator == "batch" else counted_tokens,
            means=experience_statistics(
                advantages=whitened, returns=part.returns, values=part.old_values, mask=mask, reduce=reduce
            ),
        )


def experience_statistics(
    *, advantages: Tensor, returns: Tensor, values: Tensor, mask: Tensor, reduce: Reduce = identity
) -> dict[str, Tensor]:
    """Means and variances of a minibatch's advantages, returns and values over all processes; arrays are `[B, S]`."""
    return_mean, return_var, _ = masked_moments(returns, mask, reduce)
    value_mean, value_var, _ = masked_moments(values, mask, reduce)
    return {
        "policy/advantages_mean": masked_moments(advantages, mask, reduce)[0],
        "returns/mean": return_mean,
        "returns/var": return_var,
        "val/mean": value_mean,
        "val/var": value_var,
    }
