"""The whole step: lines 21 to 43 of the list of what PPO codebases have got wrong, as far as they concern a system."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from tests.conformance.setting import (
    RESPONSE_LENGTHS,
    gradients_of,
    language_model,
    make_batch,
    make_trainer,
    on_responses,
    plain_entropies,
    plain_logprobs,
    scalars,
    weights_of,
    with_value_head,
)
from tests.functional import oracles
from tests.functional.oracles import Ranks, f64
from tests.helpers import assert_close, poison, tiny_tokenizer
from trl.algorithms.ppo import PPOSettings, ppo_loss, ppo_minibatches
from trl.models import create_reference_model, evaluate
from trl.training.loop import UpdateMetrics, Updater, optimize
from trl.types import ActorCritic, Evaluation, Rollout, Tally, identity, take

pytestmark = pytest.mark.conformance

CUTS = [(8, 1), (1, 8), (2, 4), (4, 2)]


# --- 12: through the public face ----------------------------------------------------------------------------------


def test_12_integer_scores_reach_the_rewards_as_numbers() -> None:
    """A score of 1 given as an integer must not make the KL penalty beside it an integer."""
    outcomes = []
    for dtype in (torch.float32, torch.int64):
        trainer = make_trainer(reference=with_value_head(language_model(seed=1)))
        queries, responses, _ = make_batch()
        outcomes.append(scalars(trainer.step(queries, responses, [torch.tensor(i % 3, dtype=dtype) for i in range(8)])))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["ppo/mean_scores"] == 7 / 8


def test_13_a_score_and_the_same_in_token_rewards_train_alike() -> None:
    """With γ = λ = 1 only the sum from here on counts; a score added twice, or on another token, would show."""
    outcomes = []
    for at_once in (True, False):
        trainer = make_trainer(init_kl_coef=0.0, lam=1.0, sgd=True)
        queries, responses, scores = make_batch()
        last = [
            torch.zeros(len(r)).index_fill(0, torch.tensor([len(r) - 1]), float(s)) for r, s in zip(responses, scores)
        ]
        if at_once:
            stats = trainer.step(queries, responses, scores)
        else:
            stats = trainer.step(queries, responses, [torch.tensor(0.0)] * 8, token_rewards=last)
        outcomes.append((stats["ppo/returns/mean"], weights_of(trainer)))
    assert outcomes[0][0] == outcomes[1][0]
    for name, weight in outcomes[0][1].items():
        assert torch.equal(weight, outcomes[1][1][name]), name


# --- 16: the coefficient, in a run --------------------------------------------------------------------------------


def test_16_the_trainer_feeds_the_controller_with_the_episodes_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequences, not tokens or optimizer steps; of every process, not of this one."""
    trainer = make_trainer(ppo_epochs=3, mini_batch_size=2, horizon=100.0, target=6.0, learning_rate=1e-6)
    stats = trainer.step(*make_batch())
    assert stats["objective/kl_coef"] == 0.2  # the coefficient that was in force
    assert math.isclose(trainer.kl_ctl.value, 0.2 * (1 - 0.2 * 8 / 100))  # policy = reference: KL 0, error clipped
    calls = []
    monkeypatch.setattr(trainer.kl_ctl, "update", lambda current, n_steps: calls.append(n_steps))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 4))
    monkeypatch.setattr(trainer, "_trl_reduce", lambda tensor: 4 * tensor)  # four processes with the same batch
    trainer.step(*make_batch())
    assert calls == [32]


def test_16_17_a_resumed_trainer_has_the_coefficient_and_the_moments_of_the_old_one() -> None:
    """Forgotten, the run restarts at `init_kl_coef` and scales its first scores by their own spread."""
    settings = dict(use_score_scaling=True, use_score_norm=True, horizon=50.0)
    straight = make_trainer(**settings)
    straight.step(*make_batch(seed=1))
    saved = copy.deepcopy([part.state_dict() for part in (straight, straight.model, straight.optimizer)])
    assert straight.kl_ctl.value != 0.2
    straight_on = scalars(straight.step(*make_batch(seed=2)))
    resumed = make_trainer(**settings)
    for part, state in zip((resumed, resumed.model, resumed.optimizer), saved):
        part.load_state_dict(state)
    assert scalars(resumed.step(*make_batch(seed=2))) == straight_on


# --- 18: order, through the public face ---------------------------------------------------------------------------


def test_18_scores_are_clipped_before_rewards_are_whitened_and_keep_their_mean() -> None:
    """Policy = reference, so that rewards are scores alone; λ = 1, so that returns are rewards. Worked out in Python."""
    queries, responses, _ = make_batch()
    scores = [3.0, -0.5, 0.1, -7.0, 0.4, 0.9, -0.2, 20.0]
    trainer = make_trainer(score_clip=1.0, whiten_rewards=True, lam=1.0)
    stats = trainer.step(queries, responses, [torch.tensor(s) for s in scores])
    clipped = [min(max(s, -1.0), 1.0) for s in scores]
    rewards = [[0.0] * (len(r) - 1) + [c] for r, c in zip(responses, clipped)]
    flat = [x for row in rewards for x in row]
    mean, spread = statistics.fmean(flat), statistics.stdev(flat)
    white = [[(x - mean) / spread + mean for x in row] for row in rewards]
    returns = [sum(row[t:]) for row in white for t in range(len(row))]
    assert_close(stats["ppo/returns/mean"], statistics.fmean(returns))
    assert_close(stats["ppo/returns/var"], statistics.variance(returns))
    assert_close(stats["ppo/policy/advantages_mean"], 0.0)


# --- 20, 21: holes and padding in a whole step --------------------------------------------------------------------


def test_20_a_tools_output_is_context_and_is_not_trained_on() -> None:
    """Returns are those of the policy's own tokens, and what the tool said gets no gradient through its logprobs."""
    queries, responses, scores = make_batch(4)
    masks = [torch.ones(len(r), dtype=torch.int64) for r in responses]
    masks[0][2], masks[2][3:5], masks[2][7] = 0, 0, 0  # inside, inside and at the very end
    trainer = make_trainer(batch_size=4, mini_batch_size=4, init_kl_coef=0.0, lam=1.0)
    stats = trainer.step(queries, responses, scores, response_masks=masks)
    own = [int(m.sum()) for m in masks]
    assert_close(stats["ppo/returns/mean"], sum(n * float(s) for n, s in zip(own, scores)) / sum(own))
    kept = torch.cat(masks).bool()
    assert_close(
        stats["objective/entropy"],
        -float(on_responses(stats["objective/logprobs"], queries, responses)[kept].sum()) / 4,
    )
    assert int((torch.as_tensor(stats["ppo/policy/advantages"]) != 0).sum()) == sum(own)


@pytest.mark.parametrize("filling", [float("nan"), 1e9])
@pytest.mark.parametrize("extras", [{}, {"whiten_rewards": True, "kl_penalty": "k3", "dual_clip": 3.0}])
def test_21_what_models_say_about_padding_never_matters(
    filling: float, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN and 1e9 stand wherever the mask is off, in everything that policy and reference return, at every forward pass.

    Not a metric, not a gradient, not a weight may move by a bit.
    """

    def poisoned(model: Any, rollout: Rollout, **settings: Any) -> Evaluation:
        result = evaluate(model, rollout, **settings)
        filled = {
            name: poison(array, rollout.mask, filling)
            for name in ("logprobs", "values", "entropy")
            if (array := getattr(result, name)) is not None
        }
        return replace(result, **filled)

    outcomes = []
    for dirty in (False, True):
        if dirty:
            for place in ("trl.algorithms.ppo.evaluate", "trl.training.batched.evaluate"):
                monkeypatch.setattr(place, poisoned)
        trainer = make_trainer(
            reference=with_value_head(language_model(seed=1)),
            mini_batch_size=2,
            gradient_accumulation_steps=2,
            **extras,
        )
        queries, responses, scores = make_batch()
        stats = trainer.step(queries, responses, scores)
        if dirty:  # the poison did arrive
            assert not bool((torch.as_tensor(stats["objective/logprobs"]).abs() < 1e8).all())
        per_token = [
            on_responses(stats[f"objective/{name}"], queries, responses) for name in ("logprobs", "ref_logprobs")
        ]
        outcomes.append((scalars(stats), per_token, gradients_of(trainer), weights_of(trainer)))
    clean, hurt = outcomes
    assert clean[0] == hurt[0]
    assert all(torch.equal(one, other) for one, other in zip(clean[1], hurt[1]))
    for one, other in zip(clean[2:], hurt[2:]):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("side", ["right", "left"])
def test_21_what_padding_holds_never_matters(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word that stands on padding has an embedding a billion times too large: nobody may have looked at it.

    Attention hides a key by a large negative number, so that this filling must be finite; NaN is in the test above.
    """
    outcomes = []
    for scale in (1.0, 1e9):
        model = with_value_head(language_model("llama"))
        with torch.no_grad():
            model.pretrained_model.model.embed_tokens.weight[0] = scale
        trainer = make_trainer(
            model=model,
            reference=create_reference_model(model),
            tokenizer=tiny_tokenizer(side),
            mini_batch_size=4,
            sgd=True,
        )
        stats = trainer.step(*make_batch())
        weights = weights_of(trainer)
        padding = weights["pretrained_model.model.embed_tokens.weight"][0].clone()
        assert bool((padding == scale).all())  # no gradient has moved it
        weights["pretrained_model.model.embed_tokens.weight"][0] = 0.0
        outcomes.append((scalars(stats), weights))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(weight, outcomes[1][1][name]) for name, weight in outcomes[0][1].items())


def test_24_a_step_bootstraps_nothing_whatever_the_critic_says_behind_the_end() -> None:
    """One token, worth 1, valued v: its advantage is 1 - v whatever the value of the state after it; γ = 0.5 would
    let any leak through.
    """
    trainer = make_trainer(batch_size=1, mini_batch_size=1, gamma=0.5, init_kl_coef=0.0, learning_rate=0.0)
    stats = trainer.step([torch.tensor([5, 6, 7])], [torch.tensor([9])], [torch.tensor(1.0)])
    assert_close(stats["ppo/returns/mean"], 1.0)
    value = stats["ppo/val/mean"]
    assert abs(value) > 0.01
    assert_close(stats["ppo/val/error"], (1.0 - value) ** 2)


# --- 25: the first look -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(8, 1), (1, 8), (2, 1)])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_25_before_the_first_update_the_ratio_is_one_and_the_kl_zero(architecture: str, cut: tuple[int, int]) -> None:
    """Dropout in one of two passes, another padding, another dtype or temperature: the ratio's spread says so at once."""
    trainer = make_trainer(
        model=with_value_head(language_model(architecture)),
        mini_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        learning_rate=0.0,
        temperature=0.7,
    )
    stats = trainer.step(*make_batch(start_token=0 if architecture == "t5" else None))
    ratio, advantages = (torch.as_tensor(stats[f"ppo/policy/{name}"]) for name in ("ratio", "advantages"))
    assert_close(ratio[advantages != 0], torch.ones(sum(RESPONSE_LENGTHS)))
    assert_close(stats["ppo/policy/approxkl"], 0.0, tol=1e-9)
    assert_close(stats["ppo/policy/policykl"], 0.0, tol=1e-6)
    assert stats["ppo/policy/clipfrac"] == 0.0
    assert_close(stats["ppo/loss/policy"], 0.0)  # whitened advantages times one


# --- 28, 29: one gradient, clipped once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "denominator"), [("gpt2", "minibatch"), ("gpt2", "batch"), ("t5", "minibatch")]
)
def test_28_micro_batching_and_accumulation_change_nothing(architecture: str, denominator: str) -> None:
    """Responses of 1 to 8 tokens. A mean per forward pass, averaged, weighs a token of a short response eight times as
    much as one of a long response; whitening per forward pass changes the advantages themselves.
    """
    found = []
    for mini, accumulation in CUTS:
        trainer = make_trainer(
            model=with_value_head(language_model(architecture)),
            mini_batch_size=mini,
            gradient_accumulation_steps=accumulation,
            loss_denominator=denominator,
            learning_rate=0.1,
            sgd=True,
        )
        stats = trainer.step(*make_batch(start_token=0 if architecture == "t5" else None))
        found.append((gradients_of(trainer), weights_of(trainer), scalars(stats)))
    gradients, weights, numbers = found[0]
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0.01
    for other_gradients, other_weights, other_numbers in found[1:]:
        for name, gradient in gradients.items():
            assert_close(other_gradients[name] / largest, gradient / largest, tol=3e-6)
        for name, weight in weights.items():
            assert_close(other_weights[name], weight)
        for name, number in numbers.items():
            assert_close(other_numbers[name], number)


def test_28_the_gradient_is_that_of_the_mean_over_all_tokens() -> None:
    """Against an oracle that knows no batches: plain transformers on one sequence at a time, float64, loss by hand."""
    trainer = make_trainer(mini_batch_size=2, gradient_accumulation_steps=4, sgd=True, init_kl_coef=0.0, vf_coef=0.3)
    queries, responses, scores = make_batch()
    oracle = with_value_head(language_model()).double()
    trainer.step(queries, responses, scores)

    logprobs, values = [], []
    for query, response in zip(queries, responses):
        logits, _, value = oracle(input_ids=torch.cat([query, response])[None])
        logp = torch.log_softmax(logits[0, len(query) - 1 : -1], dim=-1)
        logprobs.append(logp.gather(1, response[:, None])[:, 0])
        values.append(value[0, len(query) - 1 : -1])
    advantages, returns = [], []
    for value, score in zip(values, scores):
        rewards = f64([[0.0] * (len(value) - 1) + [float(score)]])
        a, r = oracles.gae(rewards, value[None].detach(), torch.ones(1, len(value)).bool(), 1.0, 0.95)
        advantages += a[0]
        returns += r[0]
    mean, spread = statistics.fmean(advantages), math.sqrt(statistics.variance(advantages) + 1e-8)
    white = f64([(a - mean) / spread for a in advantages])
    now, critic = torch.cat(logprobs), torch.cat(values)
    # At the first look the ratio is 1 and the value is the old one: nothing is clipped.
    loss = (-(now - now.detach()).exp() * white).mean() + 0.3 * (0.5 * (critic - f64(returns)) ** 2).mean()
    loss.backward()
    expected = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    found = gradients_of(trainer)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(found[name] / largest, gradient / largest, tol=1e-5)


def test_28_the_batch_denominator_weighs_every_token_of_the_batch_alike() -> None:
    """Two minibatches of 1 and 8 tokens: a mean over each would give the single token eight times the weight."""
    lengths = [1, 8]
    queries = [torch.tensor([5, 6, 7])] * 2
    responses = [torch.arange(10, 10 + n) for n in lengths]
    slopes: dict[str, list[float]] = {}
    for denominator in ("minibatch", "batch"):
        seen = slopes[denominator] = []
        trainer = make_trainer(
            batch_size=2,
            mini_batch_size=1,
            loss_denominator=denominator,
            init_kl_coef=0.0,
            learning_rate=0.0,
            sgd=True,
        )
        bias = trainer.model.v_head.summary.bias
        trainer.optimizer.optimizer.register_step_pre_hook(
            lambda *_, seen=seen, bias=bias: seen.append(float(bias.grad))
        )
        trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(1.0)])
    ratios = [batch / minibatch for batch, minibatch in zip(slopes["batch"], slopes["minibatch"])]
    # One optimizer step divides by its own tokens n or by their mean 4.5: the factor is n / 4.5.
    assert sorted(round(r, 4) for r in ratios) == [round(1 / 4.5, 4), round(8 / 4.5, 4)]


def test_29_gradients_are_clipped_once_after_accumulation_and_the_norm_before_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clipped at each backward pass, the accumulated gradient is a sum of shortened vectors that points elsewhere, and a
    norm measured after clipping says nothing.
    """
    free = make_trainer(mini_batch_size=2, gradient_accumulation_steps=4, learning_rate=1.0, sgd=True)
    before = weights_of(free)
    stats = free.step(*make_batch())
    gradients = gradients_of(free)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
    assert_close(stats["ppo/grad_norm"], norm)

    limit = norm / 7
    clipped = make_trainer(
        mini_batch_size=2, gradient_accumulation_steps=4, learning_rate=1.0, sgd=True, max_grad_norm=limit
    )
    calls = []
    original = clipped.accelerator.clip_grad_norm_
    monkeypatch.setattr(
        clipped.accelerator,
        "clip_grad_norm_",
        lambda *args, **kw: calls.append(args) or original(*args, **kw),
    )
    stats = clipped.step(*make_batch())
    assert len(calls) == 1  # for four backward passes
    assert_close(stats["ppo/grad_norm"], norm)
    for name, gradient in gradients_of(clipped).items():
        assert_close(gradient * 7, gradients[name])
    for name, weight in weights_of(clipped).items():
        if name in gradients:
            assert_close(before[name] - weight, gradients[name] / 7)


# --- 30: another sampler ------------------------------------------------------------------------------------------


def test_30_the_samplers_logprobs_weigh_the_loss_and_leave_the_ratio_alone() -> None:
    """π / π_old stays 1 at the first look, although the sampler was another; the gap between the two is a metric."""
    queries, responses, scores = make_batch()
    policy = language_model()
    gaps = [torch.linspace(-0.4, 0.9, len(r)) for r in responses]
    sampler = [plain_logprobs(policy, q, r).float() - gap for q, r, gap in zip(queries, responses, gaps)]
    settings = dict(learning_rate=0.0, importance_cap=2.0, vf_coef=0.0)
    plain = make_trainer(**settings)
    plain_stats = plain.step(queries, responses, scores)
    trainer = make_trainer(**settings)
    stats = trainer.step(queries, responses, scores, sampler_logprobs=sampler)
    assert_close(stats["objective/sampler_gap"], float(torch.cat(gaps).abs().mean()))
    ratio, advantages = (torch.as_tensor(stats[f"ppo/policy/{name}"]) for name in ("ratio", "advantages"))
    assert_close(ratio[advantages != 0], torch.ones(sum(RESPONSE_LENGTHS)))
    assert torch.equal(advantages, torch.as_tensor(plain_stats["ppo/policy/advantages"]))
    rows = advantages.view(8, -1)  # in the order of the minibatch, which the seed decides
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    terms = []
    for place, i in enumerate(order):
        first = len(queries[i]) - 1
        own = rows[place, first : first + len(responses[i])].tolist()
        terms += [-min(math.exp(gap), 2.0) * a for gap, a in zip(gaps[i].tolist(), own)]
    assert_close(stats["ppo/loss/policy"], statistics.fmean(terms))


# --- 36, 37: precision and the optimizer --------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its mixed precision in a state that all accelerators of a process share."""

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


def test_36_a_bf16_trunk_keeps_float32_for_what_is_summed_and_for_the_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-softmax in bf16 has two digits: at 50,000 words its errors are larger than the ratios PPO clips."""
    # Unpacked, so that the trunk computes the very numbers that the oracle's pass through it does.
    monkeypatch.setattr(import_module("trl.models.evaluate"), "may_pack", lambda model: False)
    trunk = language_model("llama").bfloat16()
    model = with_value_head(trunk)
    assert model.v_head.summary.weight.dtype == torch.float32
    assert next(trunk.parameters()).dtype == torch.bfloat16
    query, response = torch.tensor([5, 6, 7]), torch.tensor([9, 8, 4, 3])
    tokens = torch.cat([query, response])[None]
    mask = torch.tensor([[False, False, True, True, True, True]])
    rollout = Rollout(tokens=tokens, attention=torch.ones_like(tokens).bool(), mask=mask)
    result = evaluate(model, rollout, entropy=True)
    assert result.values is not None and result.entropy is not None
    assert result.logprobs.dtype == result.values.dtype == result.entropy.dtype == torch.float32
    assert Tally.of(result.logprobs, mask).mean().dtype == torch.float32
    # Oracle: float64 on the very logits that the bf16 trunk gives.
    assert_close(result.logprobs[mask], plain_logprobs(trunk, query, response))
    assert_close(result.entropy[mask], plain_entropies(trunk, query, response))
    with torch.no_grad():
        logits = trunk(input_ids=tokens).logits[0, 2:-1]
    rough = torch.log_softmax(logits, dim=-1).gather(1, response[:, None])[:, 0]
    assert float((rough.double() - plain_logprobs(trunk, query, response)).abs().max()) > 1e-3  # what is avoided


def test_36_a_step_with_a_bf16_trunk_has_float32_statistics_and_a_float32_critic() -> None:
    model = with_value_head(language_model("llama").bfloat16())
    trainer = make_trainer(model=model)
    seen = []
    model.v_head.summary.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    )
    stats = trainer.step(*make_batch())
    assert set(seen) == {(torch.float32, torch.float32)}
    for name in ("objective/logprobs", "objective/ref_logprobs", "ppo/policy/ratio", "ppo/policy/advantages"):
        assert str(stats[name].dtype) == "float32", name
    assert all(math.isfinite(value) for value in scalars(stats).values())
    assert model.v_head.summary.weight.dtype == torch.float32


@pytest.mark.usefixtures("fresh_accelerate")
def test_36_mixed_precision_keeps_float32_master_weights_and_optimizer_moments() -> None:
    """Weights held in bf16 swallow steps of 1e-5: the next number above 0.02 is 0.00012 away."""
    trainer = make_trainer(learning_rate=1e-6, accelerator_kwargs={"mixed_precision": "bf16"})
    trunk, seen = trainer.model.pretrained_model, []
    trunk.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    head = trainer.model.v_head.summary
    head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    before = weights_of(trainer)
    stats = trainer.step(*make_batch())
    assert torch.bfloat16 in seen  # the trunk did compute in bf16
    assert {entry for entry in seen if isinstance(entry, tuple)} == {(torch.float32, torch.float32)}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    for state in trainer.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    moved = [float((weight - before[name]).abs().max()) for name, weight in weights_of(trainer).items()]
    assert 0 < max(moved) < 1e-5
    assert all(math.isfinite(value) for value in scalars(stats).values())
    assert_close(stats["objective/kl"], 0.0)


def _tensorflow_adam(gradients: list[float], lr: float, epsilon: Any) -> float:
    """TensorFlow's update rule for one number that starts at 0; `epsilon(t)` is its ε̂ at step t."""
    theta = m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta -= lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + epsilon(t))
    return theta


def _torch_adam(gradients: list[float], lr: float, eps: float) -> float:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=lr, eps=eps)
    for g in gradients:
        theta.grad = f64(g)
        optimizer.step()
    return theta.item()


def test_37_the_two_places_of_adams_epsilon() -> None:
    """The original ran on TensorFlow with ε̂ = 1e-5 outside of the bias correction: ported as `eps=1e-5`, or as torch's
    default, the first steps with small gradients are many times as long.
    """
    gradients = [1e-5 * x for x in (1.0, -0.3, 2.0, 0.7, -1.5, 0.1)]
    correction = lambda t: math.sqrt(1 - 0.999**t)  # noqa: E731
    # TensorFlow's rule with an epsilon that shrinks the other way is PyTorch's, step for step ...
    assert math.isclose(
        _torch_adam(gradients, 1e-3, 1e-5), _tensorflow_adam(gradients, 1e-3, lambda t: 1e-5 * correction(t))
    )
    # ... and at a given step, ε̂ acts like PyTorch's ε̂ / sqrt(1 - β₂ᵗ).
    first = [1e-5]
    assert math.isclose(
        _tensorflow_adam(first, 1e-3, lambda t: 1e-5), _torch_adam(first, 1e-3, 1e-5 / math.sqrt(0.001))
    )
    # So much for why it matters: the first step is sixteen times as long, or thirty with the default epsilon.
    original = abs(_tensorflow_adam(first, 1e-3, lambda t: 1e-5))
    assert round(abs(_torch_adam(first, 1e-3, 1e-5)) / original) == 16
    assert round(abs(_torch_adam(first, 1e-3, 1e-8)) / original) == 33


def test_37_the_default_optimizer_is_what_the_documents_say() -> None:
    trainer = make_trainer(learning_rate=3e-4)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adam)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.9, 0.999), 1e-8, 0)
    stats = trainer.step(*make_batch())
    assert stats["ppo/learning_rate"] == 3e-4
    assert trainer.optimizer.param_groups[0]["lr"] == 3e-4  # constant unless a scheduler is handed in


def test_37_epsilon_and_schedule_are_documented_against_the_original() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8").split())
    _, _, section = text.partition("## The optimizer, against the original")
    for word in (
        "TensorFlow",
        "epsilon",
        "ε̂ / √(1 − β₂ᵗ)",
        "1e-5",
        "1e-8",
        "linearly to 0",
        "constant",
        "lr_scheduler",
    ):
        assert word in section, word
    # The figures it gives for ε̂ = 1e-5, worked out again.
    for steps, figure in ((1, "3.2e-4"), (100, "3.2e-5")):
        assert f"{1e-5 / math.sqrt(1 - 0.999**steps):.1e}".replace("e-0", "e-") == figure
        assert figure in section


# --- 41: ranks in step --------------------------------------------------------------------------------------------


class _OneOfTwo:
    """What the loop asks of accelerate, for a rank that is a thread: gradients stay apart, counts do not."""

    num_processes, scaler = 2, None

    def no_sync(self, model: nn.Module) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self) -> None:
        pass


def _experience(rows: slice = slice(None), shift: float = 0.0) -> ActorCritic:
    """Rows of a batch of eight ragged sequences; `shift` moves the old logprobs away from the policy's."""
    width, generator = 5, torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (8, width + 1), generator=generator)
    mask = torch.arange(width)[None] >= torch.tensor([0, 3, 1, 4, 4, 2, 4, 0])[:, None]
    rollout = Rollout(tokens=tokens, attention=torch.ones_like(tokens).bool(), mask=mask)
    with torch.no_grad():
        old = evaluate(with_value_head(language_model()), rollout)
    assert old.values is not None
    whole = ActorCritic(
        rollout=rollout,
        scores=torch.zeros(8),
        old_logprobs=old.logprobs + shift,
        ref_logprobs=old.logprobs,
        old_values=old.values,
        rewards=torch.zeros(8, width),
        non_score_reward=torch.zeros(8, width),
        advantages=torch.randn(8, width, generator=generator),
        returns=torch.randn(8, width, generator=generator),
    )
    return take(whole, rows)


def _optimised(
    model: nn.Module, experience: ActorCritic, size: int, reduce: Any = identity, epochs: int = 1, **settings: Any
) -> tuple[dict[str, Tensor], list[UpdateMetrics]]:
    """The last gradient and the history of passes over an experience at a learning rate of 0."""
    updater = Updater(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), accelerator=_OneOfTwo())
    order = torch.Generator().manual_seed(0)
    history = optimize(
        ppo_minibatches(experience, size=size, epochs=epochs, generator=order, reduce=reduce),
        ppo_loss(model, PPOSettings()),
        updater,
        microbatch_size=2,
        reduce=reduce,
        **settings,
    )
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, history


def test_28_the_number_of_processes_changes_nothing() -> None:
    """Each rank dividing by its own tokens, then averaging, weighs the tokens of the emptier rank more: 13 and 6 here.

    Two ranks are two threads that meet in every sum; the data-parallel wrapper's average is taken by hand.
    """
    models = [with_value_head(language_model()) for _ in range(3)]
    parts = [_experience(), _experience(slice(0, 4)), _experience(slice(4, 8))]
    whole, metrics = _optimised(models[0], parts[0], size=8)
    halves = Ranks(2).run(lambda i, reduce: _optimised(models[1 + i], parts[1 + i], size=4, reduce=reduce))
    assert halves[0][1][0].means == halves[1][1][0].means
    for name, mean in metrics[0].means.items():
        assert_close(halves[0][1][0].means[name], mean)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        averaged = (halves[0][0][name] + halves[1][0][name]) / 2
        # One process asked accelerate for two processes' worth as well: both sides carry the factor once.
        assert_close(averaged / largest, gradient / largest / 2, tol=3e-6)


def test_41_early_stopping_is_decided_by_all_ranks_together() -> None:
    """One rank that stops alone leaves the others waiting in an all-reduce. Left to themselves these two would disagree:
    one policy has not moved, the other has moved by 0.3 at each token. A sum that only one rank asks for breaks the test.
    """
    models = [with_value_head(language_model()) for _ in range(2)]
    parts = [_experience(slice(4 * i, 4 * i + 4), shift=0.3 * i) for i in range(2)]

    def rank(i: int, reduce: Any) -> list[float]:
        stop = lambda metrics: metrics.means["policy/policykl"] > 0.05  # noqa: E731
        _, history = _optimised(models[i], parts[i], size=2, reduce=reduce, epochs=3, stop=stop)
        return [metrics.means["policy/policykl"] for metrics in history]

    first, second = Ranks(2).run(rank)
    assert first == second  # as many steps, decided on the same numbers
    assert len(first) == 1
    assert 0.05 < first[0] < 0.25  # neither rank's own, 0 and 0.3


# --- 43: entropy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_43_entropy_is_that_of_the_full_distribution_and_the_other_number_has_another_name(
    temperature: float,
) -> None:
    """The mean negative logprob of the sampled tokens estimates it on fresh samples only: after the first update, or for
    someone else's tokens, it is another number, and it can move the other way.
    """
    queries, responses, scores = make_batch()
    trainer = make_trainer(temperature=temperature, mini_batch_size=4, gradient_accumulation_steps=2, learning_rate=0.0)
    stats = trainer.step(queries, responses, scores)
    model = language_model()
    entropies = [plain_entropies(model, q, r, temperature) for q, r in zip(queries, responses)]
    surprises = [-plain_logprobs(model, q, r, temperature) for q, r in zip(queries, responses)]
    assert min(float(e.min()) for e in entropies) > 0
    assert_close(stats["ppo/policy/entropy"], float(torch.cat(entropies).mean()))  # per token
    assert_close(stats["objective/full_entropy"], statistics.fmean(float(e.sum()) for e in entropies))  # per response
    assert_close(stats["objective/entropy"], statistics.fmean(float(s.sum()) for s in surprises))
    assert abs(stats["objective/entropy"] - stats["objective/full_entropy"]) > 1.0
    assert 0 <= stats["ppo/policy/entropy"] <= math.log(61)


def test_25_dropout_off_or_on_the_old_policy_is_looked_at_without_it() -> None:
    """Old logprobs drawn through dropout are those of a random other network; two looks would then differ."""
    looks = []
    for seed in (1, 2):
        model = with_value_head(language_model(resid_pdrop=0.5, attn_pdrop=0.5))
        trainer = make_trainer(model=model)
        model.train()
        torch.manual_seed(seed)
        queries, responses, scores = make_batch()
        stats = trainer.step(queries, responses, scores)
        assert model.training and model.pretrained_model.training
        looks.append(on_responses(stats["objective/logprobs"], queries, responses))
    assert torch.equal(looks[0], looks[1])
    expected = torch.cat([plain_logprobs(language_model(), q, r) for q, r in zip(*make_batch()[:2])])
    assert_close(looks[0], expected)


def test_45_the_reference_is_looked_at_without_dropout_whatever_mode_it_is_in() -> None:
    """With dropout, the KL of two identical models is noise around something else than 0."""
    model = with_value_head(language_model(resid_pdrop=0.5, attn_pdrop=0.5))
    reference = create_reference_model(model).train()
    trainer = make_trainer(model=model, reference=reference)
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    assert reference.training and reference.pretrained_model.training
    expected = torch.cat([plain_logprobs(language_model(), q, r) for q, r in zip(queries, responses)])
    assert_close(on_responses(stats["objective/ref_logprobs"], queries, responses), expected)
    assert stats["objective/kl"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_51_weights_that_the_optimizer_does_not_hold_add_nothing_to_the_gradient(dtype: str) -> None:
    """Never cleared, their gradients grow from step to step, and clipping shrinks the others until nothing is learnt."""

    def norms_and_gradients(frozen: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = with_value_head(language_model())
        model.pretrained_model.requires_grad_(not frozen)
        optimizer = torch.optim.SGD(model.v_head.parameters(), lr=0.0)
        trainer = make_trainer(model=model, optimizer=optimizer, max_grad_norm=0.1, dtype=dtype)
        norms = [trainer.step(*make_batch())["ppo/grad_norm"] for _ in range(3)]
        return norms, gradients_of(trainer)

    norms, gradients = norms_and_gradients(frozen=False)
    expected_norms, expected_gradients = norms_and_gradients(frozen=True)
    assert_close(norms, [norms[0]] * 3)
    assert_close(norms, expected_norms)
    assert norms[0] > 0.1  # so that clipping acts
    assert list(gradients) == list(expected_gradients) == ["v_head.summary.weight", "v_head.summary.bias"]
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name])


def test_28_cutting_padding_off_changes_nothing() -> None:
    """A rollout with columns of padding on both sides, and the same without: the tokens' numbers agree."""
    model = with_value_head(language_model())
    tokens = torch.randint(3, 60, (2, 4), generator=torch.Generator().manual_seed(0))
    bare = Rollout(tokens=tokens, attention=torch.ones(2, 4).bool(), mask=torch.tensor([[False, True, True]] * 2))
    pad = torch.zeros(2, 3, dtype=torch.int64)
    wide = Rollout(
        tokens=torch.cat([pad, tokens, pad], dim=1),
        attention=torch.cat([pad, torch.ones_like(tokens), pad], dim=1).bool(),
        mask=torch.tensor([[False] * 4 + [True] * 2 + [False] * 3] * 2),
    )
    narrow = take(wide, slice(None), slice(3, 7))
    with torch.no_grad():
        results = [(evaluate(model, rollout, entropy=True), rollout.mask) for rollout in (bare, wide, narrow)]
    for (one, mask), (other, other_mask) in itertools.pairwise(results):
        for name in ("logprobs", "values", "entropy"):
            assert_close(getattr(one, name)[mask], getattr(other, name)[other_mask])
