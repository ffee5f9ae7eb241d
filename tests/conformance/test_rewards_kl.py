"""Rewards and the KL penalty: lines 11 to 18 of the list of what PPO codebases have got wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics

import pytest
import torch

from tests.functional.oracles import Ranks, f64, kept, ragged_mask, randn, softmax
from tests.helpers import assert_close
from trl.functional import (
    Moments,
    adaptive_kl_coef,
    exact_kl,
    gae,
    k1,
    k2,
    k3,
    masked_whiten,
    shape_rewards,
    update_moments,
)
from trl.trainer import AdaptiveKLController, FixedKLController
from trl.training.scores import ScoreSettings, shape_scores

pytestmark = pytest.mark.conformance

YES, NO = True, False


# --- 11, 12, 13: where a score goes -------------------------------------------------------------------------------


def test_11_the_score_lands_on_the_last_trainable_token() -> None:
    """Written as `rewards[:, -1] += score`, it lands on padding; as `rewards[length - 1]`, on a tool's last word."""
    mask = torch.tensor(
        [
            [YES, YES, YES, YES],  # fills the batch's width
            [YES, YES, NO, NO],  # shorter: padding behind it
            [NO, NO, YES, YES],  # a longer query, or padding on the left
            [YES, NO, YES, NO],  # the trajectory ends with an observation
        ]
    )
    rewards, _ = shape_rewards(f64([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 4).double(), mask, kl_coef=0.2)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_12_a_score_of_three_tenths_survives_integer_inputs(dtype: torch.dtype) -> None:
    """`torch.zeros_like(token_ids)` as the reward buffer turns every score of a classifier into 0."""
    whole = torch.ones(2, 3, dtype=dtype)
    extra = None if dtype == torch.bool else whole
    rewards, _ = shape_rewards(torch.tensor([0.3, -0.3]), whole.long(), whole.bool(), kl_coef=0.0, token_rewards=extra)
    added = 0.0 if extra is None else 1.0
    assert rewards.is_floating_point()
    assert_close(rewards, [[added, added, added + 0.3], [added, added, added - 0.3]])


def test_12_whole_number_scores_are_not_truncated_by_shaping() -> None:
    """Scores of 1, 2, 3 as integers have the standard deviation 1 and the mean 2, scaled and centred or not."""
    shaped, _ = shape_scores(
        torch.tensor([1, 2, 4]).float(),
        torch.ones(3).bool(),
        Moments(),
        ScoreSettings(scale=True, center=True),
    )
    spread = statistics.stdev([1, 2, 4])
    assert_close(shaped, [(x - 7 / 3) / spread for x in (1, 2, 4)])


def test_13_one_score_or_the_same_in_parts_gives_the_same_return() -> None:
    """Per-turn rewards that replace the score, or are added beside it twice, change what is learnt."""
    mask = torch.tensor([[YES, YES, NO, YES, YES, NO]])  # two turns of two tokens, a tool's word between them
    zero, values = torch.zeros(1, 6).double(), randn(1, 6)
    at_once = dict(scores=f64([1.5]), token_rewards=None)
    per_token = dict(scores=f64([0.0]), token_rewards=f64([[0.25, 0.5, 99.0, 0.25, 0.5, 99.0]]))
    per_turn = dict(scores=f64([0.0]), token_rewards=f64([[0.0, 1.0, 0.0, 0.0, 0.5, 0.0]]))
    mixed = dict(scores=f64([0.5]), token_rewards=f64([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]))
    for parts in (at_once, per_token, per_turn, mixed):
        rewards, _ = shape_rewards(parts["scores"], zero, mask, kl_coef=0.1, token_rewards=parts["token_rewards"])  # type: ignore[arg-type]
        _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
        assert_close(returns[0, 0], f64(1.5), tol=1e-12)  # the undiscounted return of the whole response


# --- 14, 15: estimates of the KL ----------------------------------------------------------------------------------

# A vocabulary of four words: expectations are sums over it, not averages of samples.
POLICY = f64([0.4, 1.1, -0.7, 0.2])
REFERENCE = f64([-0.3, 0.9, 0.5, -1.0])
P, Q = softmax(POLICY.tolist()), softmax(REFERENCE.tolist())
KL_P_Q = math.fsum(p * math.log(p / q) for p, q in zip(P, Q))


def test_14_k1_is_negative_for_some_tokens_and_right_on_average() -> None:
    """Clamped at 0, or replaced by its absolute value and still called KL, it is biased upwards."""
    logp, logq = f64(P).log(), f64(Q).log()
    estimates = k1(logp, logq)
    assert float(estimates.min()) < 0.0
    assert_close((f64(P) * estimates).sum(), f64(KL_P_Q), tol=1e-12)


def test_14_k3_is_never_negative_and_right_on_average() -> None:
    """With the ratio upside down (p / q for q / p) it is still non-negative, and estimates nothing."""
    logp, logq = f64(P).log(), f64(Q).log()
    estimates = k3(logp, logq)
    assert float(estimates.min()) >= 0.0
    assert_close((f64(P) * estimates).sum(), f64(KL_P_Q), tol=1e-12)


def test_14_the_exact_kl_is_the_oracle_of_the_estimates() -> None:
    """It is of policy and reference in this order: the other way round it is another number."""
    assert_close(exact_kl(POLICY, REFERENCE), f64(KL_P_Q), tol=1e-12)
    reverse = math.fsum(q * math.log(q / p) for p, q in zip(P, Q))
    assert abs(reverse - KL_P_Q) > 0.01
    assert_close(exact_kl(REFERENCE, POLICY), f64(reverse), tol=1e-12)


@pytest.mark.parametrize(
    ("estimate", "slope"),
    [
        # d KL(p || q) / d x_i = p_i (log p_i / q_i - KL);  d KL(q || p) / d x_i = p_i - q_i
        (k1, [0.0, 0.0, 0.0, 0.0]),
        (k2, [p * (math.log(p / q) - KL_P_Q) for p, q in zip(P, Q)]),
        (k3, [p - q for p, q in zip(P, Q)]),
    ],
)
def test_15_the_expected_gradient_of_an_estimate_is_not_that_of_the_kl(estimate: object, slope: list[float]) -> None:
    """k1 as a loss does nothing on average; k3 as a loss pulls along the other KL; only k2 follows KL(p || q).

    Tokens are sampled from the policy and held fixed, as in training: only the estimate is differentiated.
    """
    logits = POLICY.clone().requires_grad_()
    estimates = estimate(torch.log_softmax(logits, dim=-1), f64(Q).log())  # type: ignore[operator]
    (f64(P) * estimates).sum().backward()
    assert_close(logits.grad, f64(slope), tol=1e-12)


def test_15_kl_in_the_reward_is_detached() -> None:
    """Otherwise the advantage carries a second, unintended gradient into the policy."""
    logprobs = randn(2, 3).requires_grad_()
    scores = randn(2).requires_grad_()
    mask = ragged_mask([3, 2], 3)
    kl = k1(logprobs, randn(2, 3, seed=1))
    rewards, penalty = shape_rewards(scores, kl, mask, kl_coef=0.2, token_rewards=randn(2, 3, seed=2).requires_grad_())
    advantages, returns = gae(rewards, logprobs, mask, gamma=1.0, lam=0.95)
    for tensor in (rewards, penalty, advantages, returns):
        assert not tensor.requires_grad


# --- 16: the coefficient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.1, -0.15), (60.0, 0.2), (1e9, 0.2), (0.0, -0.2)])
def test_16_the_controller_clips_its_error(kl: float, error: float) -> None:
    """Unclipped, one batch with a KL of 60 multiplies the coefficient instead of nudging it."""
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(kl, 100)
    assert math.isclose(controller.value, 0.2 * (1 + error * 100 / 1000))


def test_16_the_controller_counts_episodes() -> None:
    """Counted in optimizer steps, or in the samples of one process, it reacts as many times too slowly."""
    once = adaptive_kl_coef(0.1, 100.0, target=6.0, horizon=10_000, episodes=512)
    assert math.isclose(once, 0.1 * (1 + 0.2 * 512 / 10_000))
    twice = 0.1
    for _ in range(2):
        twice = adaptive_kl_coef(twice, 100.0, target=6.0, horizon=10_000, episodes=256)
    assert math.isclose(twice, 0.1 * (1 + 0.2 * 256 / 10_000) ** 2)


@pytest.mark.parametrize("horizon", [1, 10, 64, 10_000])
@pytest.mark.parametrize("kl", [-1e3, 0.0, 3.0, 1e3, math.inf, math.nan])
def test_50_the_coefficient_is_never_negative(horizon: float, kl: float) -> None:
    """Negative, it pays the policy for leaving its reference."""
    controller = AdaptiveKLController(0.2, target=6.0, horizon=horizon)
    for _ in range(5):
        controller.update(kl, 64)
        assert controller.value > 0


def test_16_the_state_of_the_controller_is_in_a_checkpoint() -> None:
    """A resumed run that starts at `init_kl_coef` again throws the policy back to the reference, or lets it go."""
    straight = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    stopped = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    for kl in (9.0, 8.0):
        straight.update(kl, 64)
        stopped.update(kl, 64)
    resumed = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for controller in (straight, resumed):
        controller.update(2.0, 64)
    assert straight.value == resumed.value != 0.2
    fixed = FixedKLController(0.5)
    fixed.update(100.0, 64)
    again = FixedKLController(0.1)
    again.load_state_dict(fixed.state_dict())
    assert again.value == fixed.value == 0.5


# --- 17, 18: scaling and whitening --------------------------------------------------------------------------------


def test_17_running_moments_are_the_same_on_every_rank() -> None:
    """Each rank scaling by its own scores gives the same response different rewards on different ranks."""
    stream = [randn(6, seed=1) * 3 + 2, randn(6, seed=2) * 3 + 2]
    cuts = [1, 3, 2]
    settings = ScoreSettings(scale=True, center=True)

    def rank(i: int, reduce):  # type: ignore[no-untyped-def]
        moments, shaped = Moments(), torch.empty(0)
        for scores in stream:
            part = scores.split(cuts)[i]
            shaped, own = shape_scores(part, torch.ones_like(part).bool(), moments, settings, reduce)
            moments += own
        return shaped, moments

    results = Ranks(3).run(rank)
    assert len({moments for _, moments in results}) == 1
    seen = [x for scores in stream for x in scores.tolist()]
    mean, spread = statistics.fmean(seen), statistics.stdev(seen)
    expected = [(x - mean) / spread for x in stream[1].tolist()]
    assert_close(torch.cat([shaped for shaped, _ in results]), f64(expected), tol=1e-12)


def test_17_running_moments_are_the_same_after_a_resume() -> None:
    """Left out of the checkpoint, the first batches after a resume are scaled by their own spread."""
    first, second = randn(5, seed=1), randn(5, seed=2)
    straight = update_moments(update_moments(Moments(), first), second)
    saved = json.dumps(dataclasses.asdict(update_moments(Moments(), first)))
    assert update_moments(Moments(**json.loads(saved)), second) == straight


def test_17_the_spread_of_a_single_score_is_not_nan() -> None:
    """`scores.std()` of one number is NaN with Bessel's correction, and the run is over at its first step."""
    settings = ScoreSettings(scale=True, center=True)
    shaped, moments = shape_scores(torch.tensor([3.0]), torch.tensor([YES]), Moments(), settings)
    assert_close(shaped, [0.0])
    assert moments.std == 1.0
    shaped, _ = shape_scores(torch.tensor([3.0]), torch.tensor([YES]), Moments(), ScoreSettings(scale=True))
    assert_close(shaped, [3.0])


def test_18_scores_are_penalised_then_scaled_then_clipped() -> None:
    """In another order the clip bounds nothing, or the penalty escapes it; the order must not depend on the mood."""
    scores = [0.0, 2.0, 10.0]
    finished = torch.tensor([YES, NO, YES])
    settings = ScoreSettings(missing_eos_penalty=1.0, scale=True, center=True, clip=1.0)
    shaped, _ = shape_scores(torch.tensor(scores), finished, Moments(), settings)
    penalised = [0.0, 1.0, 10.0]
    mean, spread = statistics.fmean(penalised), statistics.stdev(penalised)
    assert_close(shaped, [(0.0 - mean) / spread, (1.0 - mean) / spread, 1.0])


def test_18_the_order_is_documented() -> None:
    from trl.training import scores

    text = " ".join((scores.__doc__ or "").split())
    assert text.index("penalty") < text.index("scaling") < text.index("clipping")


def test_18_whitened_rewards_keep_their_mean_and_advantages_lose_it() -> None:
    """Rewards shifted to a mean of 0 punish every response that is merely average."""
    values, mask = randn(4, 5) + 3, ragged_mask([5, 1, 3, 2], 5)
    before = statistics.fmean(kept(values, mask))
    rewards = kept(masked_whiten(values, mask, shift_mean=False), mask)
    advantages = kept(masked_whiten(values, mask), mask)
    assert_close(f64(statistics.fmean(rewards)), f64(before), tol=1e-9)
    assert_close(f64(statistics.fmean(advantages)), f64(0.0), tol=1e-9)
    for numbers in (rewards, advantages):
        assert_close(f64(statistics.stdev(numbers)), f64(1.0), tol=1e-6)


def test_14_the_mean_of_k1_over_whole_responses_is_their_kl() -> None:
    """Summed over a response's tokens it is the KL of the sequence: averaged, long responses would look tame.

    Two tokens over four words: the sixteen responses are enumerated, and the second token depends on the first.
    """
    second_p, second_q = [softmax(randn(4, seed=i).tolist()) for i in range(4)], softmax([0.1, 0.2, 0.3, 0.4])
    total, exact = 0.0, 0.0
    for a, b in itertools.product(range(4), repeat=2):
        p, q = P[a] * second_p[a][b], Q[a] * second_q[b]
        exact += p * math.log(p / q)
        per_token = k1(f64([P[a], second_p[a][b]]).log(), f64([Q[a], second_q[b]]).log())
        total += p * float(per_token.sum())
    assert_close(f64(total), f64(exact), tol=1e-12)
