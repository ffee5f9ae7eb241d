"""Critic-free policy gradients, composed of one pure function per choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

from trl.functional import importance_weights, masked_moments
from trl.functional.policy_gradients import clipped_surrogate, per_token, token_ratio
from trl.models import evaluate
from trl.training.scores import scores_of
from trl.training.setup import Setup, shuffled
from trl.types import Experience, Loss, Minibatch, Rollout, Scored, Tally

Advantages = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores `[B]`, group `[B]` and counted `[B]` to one advantage per sequence, `[B]`."""
Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Log-probabilities, old ones and mask, all `[B, S]`, to the probability ratio `[B, S]`."""
Surrogate = Callable[[Tensor, Tensor], Tensor]
"""Ratio and advantages `[B, S]` to the objective of each token `[B, S]`, to be maximised."""
Aggregate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Mask `[B, S]` to the weight of each token `[B, S]` and the sum of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLPenalty:
    """A KL penalty in the loss."""

    estimator: Callable[[Tensor, Tensor], Tensor]  # log-probabilities of policy and reference, per token
    coef: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Choices that define a critic-free algorithm; `policy_gradient` has the defaults."""

    name: str
    advantages: Advantages
    ratio: Ratio
    surrogate: Surrogate
    aggregate: Aggregate
    kl: KLPenalty | None
    importance_cap: float

    @property
    def uses_reference(self) -> bool:
        """Whether the KL to a reference is penalised."""
        return self.kl is not None

    @property
    def settings(self) -> dict[str, str]:
        """The choices in words, to tell runs apart."""
        return {f.name: _described(getattr(self, f.name)) for f in fields(self) if f.name != "name"}

    def bind(self, setup: Setup) -> CriticFree:
        """Returns the algorithm for a trainer's models."""
        return CriticFree(setup=setup, choices=self)


def policy_gradient(
    name: str = "policy_gradient",
    *,
    advantages: Advantages,
    ratio: Ratio = token_ratio,
    surrogate: Surrogate = clipped_surrogate,
    aggregate: Aggregate = per_token,
    kl: KLPenalty | None = None,
    importance_cap: float = 2.0,
) -> PolicyGradient:
    """Composes a critic-free policy gradient.

    Args:
        name: prefix of its statistics.
        advantages: one advantage per sequence, from the scores of its group.
        ratio: probability ratio of each token.
        surrogate: objective of each token.
        aggregate: weight of each token.
        kl: penalty in the loss; None needs no reference model.
        importance_cap: upper bound of the importance weights π_old / π_sampler, where the sampler's log-probabilities
            are given.
    """
    return PolicyGradient(
        name=name,
        advantages=advantages,
        ratio=ratio,
        surrogate=surrogate,
        aggregate=aggregate,
        kl=kl,
        importance_cap=importance_cap,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticFree:
    """A policy gradient bound to a trainer's models: one score per sequence, no critic, no whitening."""

    setup: Setup
    choices: PolicyGradient

    def experience(self, rollout: Rollout, scored: Scored) -> Experience:
        """Evaluates the rollout and compares the scores of each group.

        Raises:
            ValueError: if there are token rewards, which would be ignored.
        """
        rollout, scores, token_rewards = scores_of(rollout, scored)
        if token_rewards is not None:
            raise ValueError(f"{self.choices.name} learns from one score per response and cannot use token rewards")
        evaluated = self.setup.evaluate(rollout)
        counted = rollout.mask.any(dim=1)
        advantages = self.choices.advantages(scores, rollout.group, counted)  # [B]
        alone = len(rollout.group[counted].unique()) == int(counted.sum()) > 0
        if alone and not bool(advantages[counted].any()):
            warnings.warn(
                f"every response is the only one to its prompt, and {self.choices.name} gives it an advantage of 0: the policy learns "
                "nothing. Set PPOConfig.group_size, or repeat each query",
                stacklevel=5,
            )
        return Experience(
            rollout=evaluated.rollout,
            scores=scores,
            old_logprobs=evaluated.policy.logprobs,
            ref_logprobs=evaluated.ref_logprobs,
            entropy=evaluated.policy.entropy,
            advantages=advantages[:, None].expand(rollout.mask.shape).masked_fill(~rollout.mask, 0.0),
        )

    def minibatches(self, experience: Experience) -> Iterator[Minibatch[Experience]]:
        """Yields shuffled minibatches for every epoch; the denominator is the sum of the tokens' weights.

        Raises:
            ValueError: if no process has a counted token.
        """
        setup, empty = self.setup, True
        for part in shuffled(experience, size=setup.size, epochs=setup.epochs, generator=setup.generator):
            mask = part.rollout.mask
            denominator = setup.reduce(self.choices.aggregate(mask)[1].float())
            if denominator == 0:  # a step with zero gradients would still move the weights by their momentum
                continue
            empty = False
            mean, var, _ = masked_moments(part.advantages, mask, setup.reduce)
            means = {"policy/advantages_mean": mean, "policy/advantages_std": var.sqrt()}
            yield Minibatch(experience=part, denominator=denominator, means=means)
        if empty:
            raise ValueError("no response token counts on any process: the update would have no gradient")

    def loss(self, experience: Experience) -> Loss:
        """Loss of one microbatch: the negated surrogate objective plus the KL penalty."""
        setup, choices, rollout = self.setup, self.choices, experience.rollout
        mask = rollout.mask
        evaluation = evaluate(
            setup.policy, rollout, temperature=setup.temperature, entropy=True, values=False, response_only=True
        )
        assert evaluation.entropy is not None
        # Select before any function of these: the gradient of a value that is masked afterwards would be 0 * nan.
        logprobs = evaluation.logprobs.masked_fill(~mask, 0.0)
        old_logprobs = experience.old_logprobs.masked_fill(~mask, 0.0)
        ratio = choices.ratio(logprobs, old_logprobs, mask)
        surrogate = choices.surrogate(ratio, experience.advantages)
        clipped = surrogate.detach() < ratio.detach() * experience.advantages
        if rollout.sampler_logprobs is not None:
            surrogate = surrogate * importance_weights(
                old_logprobs, rollout.sampler_logprobs, mask, cap=choices.importance_cap
            )
        weights, weight_sum = choices.aggregate(mask)

        def weighted(values: Tensor) -> Tally:
            return Tally((weights * values.masked_fill(~mask, 0.0)).sum(), weight_sum)

        terms = {"loss/policy": weighted(-surrogate)}
        objective = terms["loss/policy"].sum
        if choices.kl is not None:
            assert experience.ref_logprobs is not None
            kl = choices.kl.estimator(logprobs, experience.ref_logprobs.masked_fill(~mask, 0.0))
            terms["loss/kl"] = weighted(choices.kl.coef * kl)
            objective = objective + terms["loss/kl"].sum
        drift = (logprobs - old_logprobs).detach()
        return Loss(
            objective=objective,
            metrics={
                **terms,
                "loss/total": Tally(objective, weight_sum),
                "policy/entropy": Tally.of(evaluation.entropy.detach(), mask),
                "policy/approxkl": Tally.of(0.5 * drift**2, mask),
                "policy/policykl": Tally.of(-drift, mask),
                "policy/mean_ratio": Tally.of(ratio.detach(), mask),
                "policy/clipfrac": Tally.of(clipped.float(), mask),
            },
            arrays={"policy/ratio": ratio.detach(), "policy/advantages": experience.advantages},
        )


def _described(choice: Any) -> str:
    """A function by its name, with the arguments that it is bound to."""
    if isinstance(choice, partial):
        arguments = [*map(repr, choice.args), *(f"{name}={value!r}" for name, value in choice.keywords.items())]
        return f"{_described(choice.func)}({', '.join(arguments)})"
    if isinstance(choice, KLPenalty):
        return f"{choice.coef:g} * {_described(choice.estimator)}"
    return getattr(choice, "__name__", None) or repr(choice)
