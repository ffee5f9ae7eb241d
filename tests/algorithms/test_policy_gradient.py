"""Critic-free policy gradients: their loss, what it does not read, and how it is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, poison, tiny_gpt2
from trl.algorithms import KLPenalty, PolicyGradient, grpo, policy_gradient
from trl.functional import k3
from trl.functional.policy_gradients import group_normalised
from trl.models import evaluate
from trl.training.evaluator import Evaluated
from trl.training.setup import Setup
from trl.types import Evaluation, Experience, Rollout, Scored, take

B, Q, R = 6, 3, 5
LENGTHS = [5, 1, 3, 2, 5, 4]


def rollout() -> Rollout:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (B, Q + R), generator=random)
    attention = torch.arange(Q + R) < (Q + torch.tensor(LENGTHS))[:, None]
    mask = (attention & (torch.arange(Q + R) >= Q))[:, 1:]
    return Rollout(tokens=tokens, attention=attention, mask=mask, group=torch.tensor([0, 0, 0, 1, 1, 1]))


def scored(scores: list[float | None], token_rewards: Any = None) -> Scored:
    return Scored(
        scores=scores, components={}, token_rewards=token_rewards or [None] * B, seconds=[0.0] * B, errors=[None] * B
    )


def setup(policy: Any, **changes: Any) -> Setup:
    """Its reference says that every token is a little likelier; the policy is evaluated as it is."""

    def evaluated(rollout: Rollout) -> Evaluated:
        with torch.no_grad():
            now = evaluate(policy, rollout, values=False)
        return Evaluated(
            rollout=rollout,
            policy=Evaluation(logprobs=now.logprobs, values=None, entropy=None),
            ref_logprobs=now.logprobs + 0.1,
        )

    settings = dict(policy=policy, evaluate=evaluated, generator=torch.Generator().manual_seed(0), size=B)
    return Setup(**(settings | changes))


SCORES: list[float | None] = [1.0, 2.0, 3.0, 0.0, 0.0, 3.0]


def off_policy(experience: Experience) -> Experience:
    """The same, as if sampled from other weights: ratios differ from 1, some are clipped."""
    random = torch.Generator().manual_seed(1)
    shift = 0.3 * torch.randn(experience.old_logprobs.shape, generator=random)
    return replace(experience, old_logprobs=experience.old_logprobs + shift)


def test_loss_is_that_of_the_equation() -> None:
    """GRPO, equation 3, with loops and without a mask."""
    policy = tiny_gpt2()
    algorithm = grpo(clip_range=0.2, kl_coef=0.5).bind(setup(policy))
    experience = off_policy(algorithm.experience(rollout(), scored(SCORES)))
    (minibatch,) = algorithm.minibatches(experience)
    loss = algorithm.loss(experience)
    batch = rollout()
    logits = policy(input_ids=batch.tokens).logits.log_softmax(dim=-1)
    mean, std = {0: 2.0, 1: 1.0}, {0: 1.0, 1: 3.0**0.5}
    expected = torch.zeros(())
    for i in range(B):
        group = int(batch.group[i])
        advantage = (float(SCORES[i] or 0) - mean[group]) / (std[group] + 1e-4)
        terms = []
        for t in range(Q, Q + LENGTHS[i]):
            logprob = logits[i, t - 1, batch.tokens[i, t]]
            ratio = (logprob - experience.old_logprobs[i, t - 1]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            assert experience.ref_logprobs is not None
            gap = experience.ref_logprobs[i, t - 1] - logprob
            terms.append(surrogate - 0.5 * (gap.exp() - gap - 1))
        expected = expected - torch.stack(terms).mean() / B
    assert float(minibatch.denominator) == B
    assert_close(loss.objective / minibatch.denominator, expected)
    assert_close(loss.metrics["loss/total"].mean(), expected)
    wanted = torch.autograd.grad(expected, list(policy.parameters()))
    found = torch.autograd.grad(algorithm.loss(experience).objective / B, list(policy.parameters()))
    for gradient, other in zip(found, wanted, strict=True):
        assert_close(gradient, other)


@pytest.mark.parametrize("make", [grpo, lambda: policy_gradient(advantages=group_normalised)])
def test_what_stands_off_the_mask_is_not_read(make: Callable[[], PolicyGradient]) -> None:
    policy = tiny_gpt2()
    algorithm = make().bind(setup(policy))
    experience = off_policy(algorithm.experience(rollout(), scored(SCORES)))
    mask = experience.rollout.mask

    def poisoned(x: Tensor | None) -> Tensor | None:
        return None if x is None else poison(x, mask)

    bad = replace(
        experience,
        old_logprobs=poison(experience.old_logprobs, mask),
        ref_logprobs=poisoned(experience.ref_logprobs),
        rollout=replace(experience.rollout, sampler_logprobs=None),
    )
    parameters = list(policy.parameters())
    clean, dirty = algorithm.loss(experience), algorithm.loss(bad)
    assert_close(dirty.objective, clean.objective)
    for a, b in zip(
        torch.autograd.grad(dirty.objective, parameters), torch.autograd.grad(clean.objective, parameters), strict=True
    ):
        assert_close(a, b)


@pytest.mark.parametrize("make", [grpo, lambda: policy_gradient(advantages=group_normalised)])
def test_splitting_a_minibatch_changes_nothing(make: Callable[[], PolicyGradient]) -> None:
    algorithm = make().bind(setup(tiny_gpt2()))
    experience = off_policy(algorithm.experience(rollout(), scored(SCORES)))
    whole = algorithm.loss(experience)
    pieces = [algorithm.loss(take(experience, slice(i, i + 2))) for i in range(0, B, 2)]
    assert_close(torch.stack([piece.objective for piece in pieces]).sum(), whole.objective)
    for name, tally in whole.metrics.items():
        parts = pieces[0].metrics[name] + pieces[1].metrics[name] + pieces[2].metrics[name]
        assert_close(parts.mean(), tally.mean())


def test_a_sample_without_a_score_is_left_out_of_its_group_and_of_the_loss() -> None:
    algorithm = grpo().bind(setup(tiny_gpt2()))
    experience = algorithm.experience(rollout(), scored([1.0, None, 3.0, 0.0, 0.0, 3.0]))
    assert experience.counted.tolist() == [True, False, True, True, True, True]
    assert_close(experience.advantages[0, Q - 1], -1 / (2**0.5 + 1e-4))  # of 1 and 3 alone
    (minibatch,) = algorithm.minibatches(experience)
    assert float(minibatch.denominator) == B - 1
    with pytest.raises(ValueError, match="no response token counts on any process"):
        list(algorithm.minibatches(algorithm.experience(rollout(), scored([None] * B))))


def test_equal_scores_leave_the_kl_alone() -> None:
    algorithm = grpo(kl_coef=0.5).bind(setup(tiny_gpt2()))
    loss = algorithm.loss(algorithm.experience(rollout(), scored([2.0] * B)))
    assert_close(loss.metrics["loss/policy"].mean(), 0.0)
    assert_close(loss.metrics["loss/kl"].mean(), 0.5 * k3(torch.zeros(()), torch.tensor(0.1)))


@pytest.mark.parametrize("scores", [[1.0, *[None] * (B - 1)], [1.0, None, None, 2.0, None, None]], ids=["one", "two"])
def test_a_response_without_others_to_its_prompt_teaches_nothing_and_that_is_said(scores: list[float | None]) -> None:
    with pytest.warns(UserWarning, match="every response is the only one to its prompt"):
        experience = grpo().bind(setup(tiny_gpt2())).experience(rollout(), scored(scores))
    assert not experience.advantages.any()


def test_a_description_has_every_argument_that_a_choice_is_bound_to() -> None:
    described = [
        policy_gradient(advantages=partial(group_normalised, *bound)).settings["advantages"]
        for bound in ((), (1,), (2,))
    ]
    assert len(set(described)) == 3


def test_another_sampler_s_tokens_are_weighted() -> None:
    algorithm = policy_gradient(advantages=group_normalised, importance_cap=1.5).bind(setup(tiny_gpt2()))
    experience = algorithm.experience(rollout(), scored(SCORES))
    weights = {}
    for shift in (0.0, -0.2, -3.0):  # the sampler thought them less likely
        seen = replace(experience.rollout, sampler_logprobs=experience.old_logprobs + shift)
        weights[shift] = algorithm.loss(replace(experience, rollout=seen)).objective
    assert_close(weights[0.0], algorithm.loss(experience).objective)
    assert_close(weights[-0.2], weights[0.0] * torch.tensor(0.2).exp())
    assert_close(weights[-3.0], weights[0.0] * 1.5)


def test_rewards_of_tokens_are_refused() -> None:
    algorithm = grpo().bind(setup(tiny_gpt2()))
    with pytest.raises(ValueError, match="grpo learns from one score per response"):
        algorithm.experience(rollout(), scored(SCORES, [[0.5], *[None] * (B - 1)]))


def test_what_is_composed_says_whether_it_needs_a_reference() -> None:
    assert grpo().uses_reference and not grpo(kl_coef=0.0).uses_reference
    plain = policy_gradient(advantages=group_normalised)
    assert not plain.uses_reference and replace(plain, kl=KLPenalty(estimator=k3, coef=0.1)).uses_reference
