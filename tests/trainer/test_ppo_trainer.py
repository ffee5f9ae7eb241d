"""What `step` and its neighbours do beyond the golden cases."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_tokenizer
from tests.trainer.conftest import weights_of
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.kernels.door import kernels_enabled
from trl.training import evaluator
from trl.types import Rollout


def moved(before: dict[str, torch.Tensor], trainer: PPOTrainer) -> set[str]:
    """Names of the weights that changed."""
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}


def test_a_good_token_becomes_likelier(make_trainer: Any) -> None:
    """The sign of it all: responses of word 7 score 1, of word 8 score -1."""
    trainer = make_trainer(init_kl_coef=0.0, learning_rate=3e-3)
    queries = [torch.tensor([5, 6])] * 4
    responses = [torch.tensor([7]), torch.tensor([8])] * 2
    gaps = []
    for _ in range(8):
        stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)] * 2)
        logprobs = stats["objective/logprobs"][:, 1]
        gaps.append(logprobs[0] - logprobs[1])
    assert gaps[-1] > gaps[0] + 0.5


def test_one_token_responses_and_a_batch_of_one(make_trainer: Any) -> None:
    trainer = make_trainer(batch_size=1, mini_batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = trainer.step([torch.tensor([5])], [torch.tensor([7])], [torch.tensor(1.0)])
    numbers = {k: v for k, v in stats.items() if isinstance(v, float)}
    assert all(np.isfinite(v) for v in numbers.values()), numbers
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("seq2seq", [False, True])
def test_padding_side_changes_nothing(seq2seq: bool, make_trainer: Any, make_batch: Any) -> None:
    results = []
    for side in ("left", "right"):
        trainer = make_trainer(seq2seq=seq2seq, tokenizer=tiny_tokenizer(side))
        stats = trainer.step(*make_batch(seq2seq=seq2seq))
        results.append((stats, weights_of(trainer)))
    (left, left_weights), (right, right_weights) = results
    for key in ("objective/kl_dist", "ppo/loss/total", "ppo/policy/entropy", "ppo/returns/mean", "ppo/grad_norm"):
        assert_close(left[key], right[key], 1e-4)
    for name, weight in left_weights.items():
        if not name.endswith("c_attn.bias"):  # the key's bias has no gradient but noise
            assert_close(weight, right_weights[name], 1e-4)


def test_scores_of_any_dtype_may_be_mixed(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, _ = make_batch()
    scores = [torch.tensor(1), torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.5]), torch.tensor(True)]
    assert_close(make_trainer().step(queries, responses, scores)["ppo/mean_scores"], 0.7)


def test_same_seed_same_numbers(make_trainer: Any, make_batch: Any) -> None:
    runs = []
    for _ in range(2):
        trainer = make_trainer(seed=3)
        runs.append([trainer.step(*make_batch(seed=s)) for s in range(2)])
    for a, b in zip(*runs, strict=True):
        for key in a:
            if "time/" not in key and "memory/" not in key:
                assert np.array_equal(a[key], b[key]), key


def test_token_rewards_add_to_the_score(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch()
    trainer = make_trainer(init_kl_coef=0.0, gamma=1.0, lam=1.0)
    seen: list[torch.Tensor] = []
    compute = trainer.compute_rewards
    trainer.compute_rewards = lambda *a, **k: seen.append(compute(*a, **k)[0]) or compute(*a, **k)
    token_rewards = [torch.arange(len(r)).float() for r in responses]
    trainer.step(queries, responses, scores, token_rewards=token_rewards)
    for row, query, response, score in zip(seen[0], queries, responses, scores, strict=True):
        start = len(query) - 1
        expected = torch.arange(len(response)).float()
        expected[-1] += score
        assert_close(row[start : start + len(response)], expected)
        assert row[:start].count_nonzero() == 0 and row[start + len(response) :].count_nonzero() == 0


def test_foreign_tokens_are_context_and_not_trained_on(make_trainer: Any) -> None:
    """With a mask, what a tool wrote takes no part in the KL; it does as part of the context."""
    query, response = torch.tensor([5, 6]), torch.tensor([7, 8, 9, 10])
    mask = torch.tensor([1, 0, 0, 1])
    trainer = make_trainer(batch_size=1, mini_batch_size=1, ppo_epochs=1)
    stats = trainer.step([query], [response], [torch.tensor(1.0)], response_masks=[mask])
    assert np.flatnonzero(stats["ppo/policy/advantages"]).tolist() == [1, 4]
    logprobs = torch.tensor(stats["objective/logprobs"][0])
    assert_close(stats["objective/entropy"], -(logprobs[1] + logprobs[4]))


def test_missing_eos_costs_a_penalty_whatever_the_stop_token(make_trainer: Any) -> None:
    trainer = make_trainer(missing_eos_penalty=2.0, stop_token_ids=[1, 9], init_kl_coef=0.0)
    shaped: list[torch.Tensor] = []
    compute = trainer.compute_rewards
    trainer.compute_rewards = lambda scores, *a, **k: shaped.append(scores) or compute(scores, *a, **k)
    responses = [torch.tensor(x) for x in ([4, 1], [4, 9], [4, 5], [9, 4])]
    stats = trainer.step([torch.tensor([5])] * 4, responses, [torch.tensor(1.0)] * 4)
    assert shaped[0].tolist() == [1.0, 1.0, -1.0, -1.0]
    assert stats["ppo/mean_scores"] == 1.0  # as they came


def test_stop_tokens_come_from_tokenizer_and_model(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.model.generation_config.eos_token_id = [4, 9]
    assert trainer._trl_stop_tokens() == (1, 4, 9)


def test_scores_are_scaled_by_running_moments_then_clipped(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True, score_clip=1.0)
    shaped: list[torch.Tensor] = []
    compute = trainer.compute_rewards
    trainer.compute_rewards = lambda scores, *a, **k: shaped.append(scores) or compute(scores, *a, **k)
    history: list[float] = []
    for values in ([1.0, 2.0, 3.0, 10.0], [0.0, 0.0, 5.0, 5.0]):
        queries, responses, _ = make_batch()
        trainer.step(queries, responses, [torch.tensor(v) for v in values])
        history += values
        expected = (np.array(values) - np.mean(history)) / np.std(history, ddof=1)
        assert_close(shaped[-1], np.clip(expected, -1, 1))


def test_whitened_rewards_have_unit_variance_and_the_mean_they_had(make_trainer: Any, make_batch: Any) -> None:
    rewards = []
    for whiten in (False, True):
        trainer = make_trainer(whiten_rewards=whiten)
        trainer.step(*make_batch())
        experience = trainer.last_experience
        rewards.append(experience.rewards[experience.rollout.mask].double().numpy())
    plain, white = rewards
    assert_close(white, (plain - plain.mean()) / plain.std(ddof=1) + plain.mean())
    assert abs(plain.std(ddof=1) - 1) > 0.1


def test_a_rollout_keeps_the_version_of_its_weights(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer()
    trainer.step(*make_batch())
    old = dataclasses.replace(trainer.last_experience.rollout, policy_version=7)
    trainer.step(scores=make_batch()[2], rollout=old)
    assert trainer.last_experience.rollout.policy_version == 7


def test_a_batch_that_is_prepared_and_not_learnt_from_changes_nothing(make_trainer: Any, make_batch: Any) -> None:
    """`step` is `learn(prepare(...))`: a batch that is dropped between the two leaves no trace in those after it."""
    results = []
    for drops in (False, True):
        trainer = make_trainer(use_score_scaling=True, use_score_norm=True, horizon=20)
        if drops:
            trainer.prepare(*make_batch(seed=7))
        stats = [trainer.step(*make_batch(seed=seed)) for seed in (1, 2)]
        assert trainer.last_experience.rollout.policy_version == 1  # of the weights after one step
        results.append(([s["ppo/loss/total"] for s in stats], trainer.kl_ctl.value, weights_of(trainer)))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(weight, results[1][2][name]) for name, weight in results[0][2].items())


def test_batches_that_are_learnt_later_count_as_if_alone(make_trainer: Any, make_batch: Any) -> None:
    """Prepared one after another and learnt in another order, each keeps the coefficient and the scores it came with."""
    trainer = make_trainer(use_score_scaling=True, horizon=20)
    batches = [make_batch(seed=seed) for seed in (1, 2)]
    coefficient = trainer.kl_ctl.value
    scores = np.array([float(score) for batch in batches for score in batch[2]])
    prepared = [trainer.prepare(*batch) for batch in batches]
    for _, responses, given in batches:  # the caller's own buffers, used for something else meanwhile
        for tensor in (*responses, *given):
            tensor.zero_()
    stats = [trainer.learn(one) for one in reversed(prepared)]
    assert trainer.kl_ctl.value != coefficient
    assert [s["objective/kl_coef"] for s in stats] == [coefficient] * 2
    assert_close([s["ppo/mean_scores"] for s in stats], [scores[4:].mean(), scores[:4].mean()])
    moments = trainer.score_moments
    assert_close([moments.count, moments.mean, moments.std], [len(scores), scores.mean(), scores.std(ddof=1)])


def test_layers_that_were_frozen_at_prepare_alone_learn(make_trainer: Any, make_batch: Any) -> None:
    """Passes begin above frozen layers, at the states that `prepare` found: those of other weights, or trained ones, won't do."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    below = [model.pretrained_model.transformer.wte, model.pretrained_model.transformer.wpe]
    below.append(model.pretrained_model.transformer.h[0])
    for module in below:
        module.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = make_trainer(model=model, optimizer=optimizer, ppo_epochs=1, mini_batch_size=4)
    batch = make_batch()
    prepared, kept = trainer.prepare(*batch), trainer.prepare(*batch)
    with torch.no_grad():
        below[-1].mlp.c_fc.weight.mul_(30)
        now, _, _, mask = trainer.batched_forward_pass(
            trainer.model, *batch[:2], trainer.prepare_model_inputs(*batch[:2])
        )
    drift = (kept.experience.old_logprobs - now)[mask.bool()].mean()
    assert abs(drift) > 1e-3
    assert_close(trainer.learn(prepared)["ppo/policy/policykl"], drift)
    prepared, before = trainer.prepare(*batch), weights_of(trainer)
    below[-1].requires_grad_(True)
    trainer.learn(prepared)
    assert not torch.equal(below[-1].mlp.c_fc.weight, before["pretrained_model.transformer.h.0.mlp.c_fc.weight"])


def test_settings_changed_between_prepare_and_learn_count(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer()
    prepared = trainer.prepare(*make_batch())
    before = weights_of(trainer)
    trainer.config.temperature = 0.5  # old log-probabilities at 1 and new ones at 0.5 would make a ratio
    with pytest.raises(ValueError, match=r"temperature=0\.5 was 1\.0 when the batch was prepared"):
        trainer.learn(prepared)
    trainer.config.temperature, trainer.config.learning_rate = 1.0, 0.0
    assert trainer.learn(prepared)["ppo/learning_rate"] == 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    trainer.config.mini_batch_size = 3
    with pytest.raises(ValueError, match="batch_size=4 is not a multiple of mini_batch_size=3"):
        trainer.learn(prepared)


def test_train_refuses_a_step_that_it_would_not_call(make_trainer: Any) -> None:
    class Own(PPOTrainer):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    of_the_instance = make_trainer()
    of_the_instance.step = lambda *args, **kwargs: None
    for trainer in (make_trainer(trainer_class=Own), of_the_instance):
        with pytest.raises(ValueError, match=r"overrides step, which train does not call: write your own loop"):
            trainer.train(["a"], reward=lambda prompts, completions: [1.0], steps=1)


def test_only_the_value_head_learns_during_warm_up(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(value_warmup_steps=1, max_grad_norm=1.0)
    before = weights_of(trainer)
    trainer.step(*make_batch())
    assert moved(before, trainer) == {"v_head.summary.weight", "v_head.summary.bias"}
    trainer.step(*make_batch())
    assert "pretrained_model.transformer.wte.weight" in moved(before, trainer)


def test_a_token_weighs_the_same_in_every_minibatch_of_a_batch(make_trainer: Any) -> None:
    """With one pass and SGD, "batch" over two minibatches of unequal lengths moves like one step over both."""
    queries = [torch.tensor([5, 6])] * 2
    responses = [torch.arange(7, 15), torch.tensor([9])]
    scores = [torch.tensor(1.0), torch.tensor(1.0)]
    norms = {}
    for denominator in ("minibatch", "batch"):
        trainer = make_trainer(
            batch_size=2, mini_batch_size=1, ppo_epochs=1, loss_denominator=denominator, vf_coef=1.0, init_kl_coef=0.0
        )
        seen: list[tuple[int, float]] = []
        from trl.algorithms import ppo
        from trl.training import setup

        experience_of: list[Any] = []
        original = setup.take

        def spy(batch: Any, rows: Any, columns: Any = None, original: Any = original, kept: Any = experience_of) -> Any:
            kept.append(batch)
            return original(batch, rows, columns)

        setup.take = spy  # type: ignore[assignment]
        try:
            trainer.step(queries, responses, scores)
        finally:
            setup.take = original
        for minibatch in ppo.ppo_minibatches(
            experience_of[0], size=1, epochs=1, generator=torch.Generator().manual_seed(0), denominator=denominator
        ):
            seen.append((int(minibatch.experience.rollout.mask.sum()), float(minibatch.denominator)))
        norms[denominator] = sorted(seen)
    assert norms == {"minibatch": [(1, 1.0), (8, 8.0)], "batch": [(1, 4.5), (8, 4.5)]}


@pytest.mark.parametrize("penalty", ["abs", "mse", "k3", "full"])
def test_other_kl_penalties_are_never_a_bonus(penalty: str, make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(kl_penalty=penalty)
    assert_close(trainer.step(*make_batch())["ppo/mean_non_score_reward"], 0.0)  # the policy is the reference
    stats = trainer.step(*make_batch(seed=1))
    assert stats["ppo/mean_non_score_reward"] < 0


def test_the_exact_kl_is_the_vocabulary_sum(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(kl_penalty="full", init_kl_coef=1.0, adap_kl_ctrl=False, temperature=0.7)
    trainer.step(*make_batch())
    queries, responses, scores = make_batch(seed=1)
    with torch.no_grad():
        total, tokens = 0.0, 0
        for query, response in zip(queries, responses, strict=True):
            ids = torch.cat([query, response])[None]
            p, q = (torch.log_softmax(m(ids)[0][0].double() / 0.7, -1) for m in (trainer.model, trainer.ref_model))
            kl = (p.exp() * (p - q)).sum(-1)[len(query) - 1 : -1]
            total, tokens = total + kl.sum().item(), tokens + len(kl)
    stats = trainer.step(queries, responses, scores)
    assert_close(stats["ppo/mean_non_score_reward"], -total / tokens)


def test_sampler_logprobs_weigh_the_loss(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch()
    plain, weighted = make_trainer(ppo_epochs=1), make_trainer(ppo_epochs=1, importance_cap=1.5)
    reference = plain.step(queries, responses, scores)
    width = plain.prepare_model_inputs(queries, responses)["input_ids"].shape[1] - 1
    assert width == reference["objective/logprobs"].shape[1]
    own = [
        torch.tensor(row[len(q) - 1 : len(q) - 1 + len(r)])
        for row, q, r in zip(reference["objective/logprobs"], queries, responses, strict=True)
    ]
    same = weighted.step(queries, responses, scores, sampler_logprobs=own)
    assert_close(same["objective/sampler_gap"], 0.0)
    assert_close(same["ppo/loss/policy"], reference["ppo/loss/policy"])
    far = make_trainer(ppo_epochs=1, importance_cap=1.5, mini_batch_size=4)
    near = make_trainer(ppo_epochs=1, mini_batch_size=4)
    base = near.step(queries, responses, scores)
    scaled = far.step(queries, responses, scores, sampler_logprobs=[x - 1.0 for x in own])
    assert_close(scaled["objective/sampler_gap"], 1.0)
    assert_close(scaled["ppo/loss/policy"], 1.5 * base["ppo/loss/policy"])  # e is capped at 1.5 on every token


def test_early_stopping_ends_a_batch(make_trainer: Any, make_batch: Any) -> None:
    lengths = {}
    for target_kl in (1e-9, 1e9):
        trainer = make_trainer(
            early_stopping=True, target_kl=target_kl, ppo_epochs=4, learning_rate=1e-2, mini_batch_size=4
        )
        stats = trainer.step(*make_batch())
        lengths[target_kl] = len(stats["ppo/policy/ratio"]) // np.prod(stats["objective/logprobs"].shape)
    assert lengths[1e9] == 4
    assert lengths[1e-9] < 4


def test_gradient_norm_is_clipped_once_and_logged_before(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(max_grad_norm=0.01, ppo_epochs=1, mini_batch_size=1, gradient_accumulation_steps=4)
    stats = trainer.step(*make_batch())
    left = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert stats["ppo/grad_norm"] > 0.011
    assert_close(left, 0.01, 1e-4)


@pytest.mark.parametrize("overridden", ["loss", "train_minibatch", "batched_forward_pass", "compute_rewards"])
def test_a_subclass_is_heard(overridden: str, make_trainer: Any, make_batch: Any) -> None:
    """Overriding a piece with itself changes nothing, and the piece is called."""
    calls: list[str] = []

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(overridden)
        return getattr(PPOTrainer, overridden)(self, *args, **kwargs)

    subclass = type("Mine", (PPOTrainer,), {overridden: wrapper})
    mine, plain = make_trainer(trainer_class=subclass), make_trainer()
    a, b = mine.step(*make_batch()), plain.step(*make_batch())
    assert calls
    for key in ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "objective/kl", "ppo/grad_norm"):
        assert_close(a[key], b[key], 1e-4)
    for name, weight in weights_of(plain).items():
        if not name.endswith("c_attn.bias"):
            assert_close(weights_of(mine)[name], weight, 1e-4)


def test_a_loss_of_ones_own_that_leaves_the_sampler_out_is_an_error(make_trainer: Any, make_batch: Any) -> None:
    class Mine(PPOTrainer):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            logprobs, vpreds = args[5], args[4]
            return logprobs.mean(), vpreds.mean(), {"policy/policykl": 0.0, "val/error": 0.0, "returns/var": 1.0}

    trainer = make_trainer(trainer_class=Mine)
    before, batch = weights_of(trainer), make_batch()
    seen = [torch.full((len(response),), -3.0) for response in batch[1]]
    with pytest.raises(RuntimeError, match=r"sampler_logprobs, but the loss of Mine ignores them"):
        trainer.step(*batch, sampler_logprobs=seen)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())
    trainer.step(*batch)


@pytest.mark.parametrize("overridden", ["loss", "train_minibatch", "batched_forward_pass"])
def test_a_subclass_hears_of_the_sampler_and_the_denominator(
    overridden: str, make_trainer: Any, make_batch: Any
) -> None:
    batch = make_batch()
    random = torch.Generator().manual_seed(1)
    seen = [-3 - 2 * torch.rand(len(response), generator=random) for response in batch[1]]
    own = type(
        "Mine", (PPOTrainer,), {overridden: lambda self, *a, **k: getattr(PPOTrainer, overridden)(self, *a, **k)}
    )
    gradients = []
    for kind, denominator in ((own, "batch"), (PPOTrainer, "batch"), (PPOTrainer, "minibatch")):
        trainer = make_trainer(trainer_class=kind, ppo_epochs=1, loss_denominator=denominator)
        trainer.step(*batch, sampler_logprobs=seen)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert_close(gradients[0], gradients[1], 1e-4)
    assert float((gradients[1] - gradients[2]).abs().max()) > 1e-2


def test_a_subclass_can_stop_early(make_trainer: Any, make_batch: Any) -> None:
    class Mine(PPOTrainer):
        def loss(self, *args: Any) -> Any:
            return super().loss(*args)

    trainer = make_trainer(
        trainer_class=Mine, early_stopping=True, target_kl=1e-9, learning_rate=1e-2, mini_batch_size=4
    )
    stats = trainer.step(*make_batch())
    assert len(stats["ppo/policy/ratio"]) < 4 * np.prod(stats["objective/logprobs"].shape)


def test_state_round_trips(make_trainer: Any, make_batch: Any) -> None:
    first = make_trainer(use_score_scaling=True)
    first.step(*make_batch())
    second = make_trainer(use_score_scaling=True, seed=9)
    second.load_state_dict(first.state_dict())
    assert second.kl_ctl.value == first.kl_ctl.value
    assert second.score_moments == first.score_moments and second.score_moments.count == 4
    assert torch.equal(
        torch.randperm(9, generator=first._trl_generator), torch.randperm(9, generator=second._trl_generator)
    )


def test_dropout_is_off_while_scoring_and_modes_are_kept(make_trainer: Any, make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(resid_pdrop=0.5, embd_pdrop=0.5))
    trainer = make_trainer(model=model, ppo_epochs=1)
    trainer.model.train()
    stats = trainer.step(*make_batch())
    assert_close(stats["objective/kl"], 0.0)  # policy and reference are the same model
    assert trainer.model.training and trainer.model.pretrained_model.training


def test_generate(make_trainer: Any) -> None:
    trainer = make_trainer()
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    greedy = {"do_sample": False, "max_new_tokens": 5}
    together = trainer.generate(queries, batch_size=2, **greedy)
    alone = [trainer.generate(q, **greedy) for q in queries]
    assert [a[0].tolist() for a in alone] == [t.tolist() for t in together]
    assert [t[: len(q)].tolist() for t, q in zip(together, queries, strict=True)] == [q.tolist() for q in queries]
    bare = trainer.generate(queries, return_prompt=False, **greedy)
    assert [b.tolist() for b in bare] == [t[len(q) :].tolist() for t, q in zip(together, queries, strict=True)]
    lengths = iter([2, 3])
    sampled = trainer.generate(
        queries,
        batch_size=1,
        return_prompt=False,
        length_sampler=lambda: next(lengths),
        do_sample=False,
        eos_token_id=-1,
    )
    assert [len(s) for s in sampled] == [2, 3]


@pytest.mark.filterwarnings("ignore:responses are sampled with")
@pytest.mark.parametrize("path", [{}, {"bad_words_ids": [[60]]}], ids=["own loop", "transformers"])
def test_processes_that_are_seeded_alike_draw_different_responses(
    path: dict[str, Any], make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "return_prompt": False} | path
    drawn = []
    for rank in (0, 1, 2, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self, rank=rank: rank))
        torch.manual_seed(3)
        drawn.append(trainer.generate(torch.tensor([5, 6, 7]), **sampling)[0].tolist())
    assert drawn[1] == drawn[3]  # each of its own, which the seed gives again
    assert len({tuple(response) for response in drawn}) == 3


def test_a_generated_stop_token_stays_and_a_prompts_does_not_cut(make_trainer: Any) -> None:
    trainer = make_trainer(tokenizer=tiny_tokenizer(pad=False))
    query = torch.tensor([1, 5, 1, 6])  # eos inside the prompt
    forced = trainer.generate(query, do_sample=False, max_new_tokens=4, forced_eos_token_id=1)[0]
    assert forced[:4].tolist() == query.tolist()
    assert forced[-1] == 1 and 1 not in forced[4:-1].tolist()


def test_reshaped_sampling_is_named_once(make_trainer: Any) -> None:
    trainer = make_trainer()
    query = torch.tensor([5, 6])
    with pytest.warns(UserWarning, match=r"min_length=4.*repetition_penalty|repetition_penalty=1.2.*min_length=4"):
        trainer.generate(query, do_sample=True, top_k=0, max_new_tokens=2, min_length=4, repetition_penalty=1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.generate(query, do_sample=True, top_k=0, max_new_tokens=2, min_length=4, repetition_penalty=1.2)
        trainer.generate(query, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=2)
        trainer.generate(query, do_sample=False, max_new_tokens=2)


def test_tensorboard_gets_numbers_and_an_escaped_table(tmp_path: Path, make_batch: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=4, log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    queries, responses, scores = make_batch()
    stats = trainer.step(queries, responses, scores)
    texts = {"query": ["<script>alert(1)</script>"] * 4, "response": ["a | b\nc"] * 4}
    trainer.log_stats(stats, texts, scores)
    with pytest.warns(UserWarning, match=r"no columns \['response'\]"):
        trainer.log_stats(stats, {"query": ["x"] * 4}, scores)
    trainer.accelerator.end_training()
    folder = next(tmp_path.rglob("events.out*")).parent
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"objective/kl", "env/reward_mean"} <= set(tags["scalars"])
    text = events.Tensors("game_log/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_save_and_the_card(tmp_path: Path, make_trainer: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer()
    trainer.save_pretrained(tmp_path / "a" / "model")
    folder = tmp_path / "a" / "model"
    again = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    assert torch.equal(again.v_head.summary.weight, trainer.model.v_head.summary.weight)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain.transformer.wte.weight, trainer.model.pretrained_model.transformer.wte.weight)
    assert len(AutoTokenizer.from_pretrained(folder)) == 61
    assert "AutoModelForCausalLMWithValueHead" in (folder / "README.md").read_text()


def test_the_best_model_is_pushed(make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"}, compare_steps=2)
    pushed: list[Any] = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: pushed.append(kwargs))
    queries, responses, _ = make_batch()
    for mean in (0.0, 9.0, 1.0, 9.0, 0.5, 9.0):  # looked at: 0.0, 1.0, 0.5
        trainer.step(queries, responses, [torch.tensor(mean)] * 4)
    assert pushed == [{"repo_id": "me/best"}] * 2


def test_a_hub_that_is_not_reached_costs_no_update(
    make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"})
    answers = iter([ConnectionError("no route to hf_abcdefghijklmnopqrstuvwxyzabcdef"), None, None])
    pushed: list[Any] = []

    def push(**kwargs: Any) -> None:
        if (error := next(answers)) is not None:
            raise error
        pushed.append(kwargs)

    monkeypatch.setattr(trainer, "push_to_hub", push)
    queries, responses, _ = make_batch()
    before = weights_of(trainer)
    for mean in (2.0, 1.0, 0.5):  # the first is not uploaded, so that the second is the best one that can be
        trainer.step(queries, responses, [torch.tensor(mean)] * 4)
    assert len(pushed) == 1 and trainer._trl_steps_done == 3
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    assert "the model of mean score 2 was not uploaded" in caplog.text and "hf_abc" not in caplog.text


def test_the_best_model_is_that_of_all_processes(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"})
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: None)
    monkeypatch.setattr(
        trainer, "_trl_reduce", lambda tensor: tensor + torch.tensor([30.0, 3.0])
    )  # another's sum and count
    of_this_process = SimpleNamespace(scores=torch.tensor([2.0, 9.0]), counted=torch.tensor([True, False]))
    trainer._trl_push_if_best(of_this_process)
    assert trainer._trl_highest_score == 32 / 4
    of_this_process.counted[0] = False  # all of this process's are left out
    trainer._trl_push_if_best(of_this_process)
    assert trainer._trl_highest_score == 30 / 3


def test_what_is_logged_of_rewards_that_step_has_not_seen_is_of_one_process(
    make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = make_trainer(), make_batch()
    stats = trainer.step(*batch)
    logged: list[Any] = []
    monkeypatch.setattr(trainer.accelerator, "log", lambda logs, step: logged.append(logs))
    monkeypatch.setattr(trainer, "is_distributed", True)
    texts = {"query": [""] * 4, "response": [""] * 4}
    trainer.log_stats(stats, texts, batch[2])
    with pytest.warns(UserWarning, match="other rewards than step's scores"):
        trainer.log_stats(stats, texts, [score + 1 for score in batch[2]])
    assert_close(logged[1]["env/reward_mean"], logged[0]["env/reward_mean"] + 1)


def test_shared_layers_stay_frozen(make_trainer: Any, make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = PPOTrainer(PPOConfig(batch_size=4), model, None, tiny_tokenizer(), num_shared_layers=1)
    before = weights_of(trainer)
    reference = {k: v.clone() for k, v in trainer.ref_model.state_dict().items()}
    trainer.step(*make_batch())
    changed = moved(before, trainer)
    assert changed and not any(".h.0." in name for name in changed)
    assert all(torch.equal(reference[k], v) for k, v in trainer.ref_model.state_dict().items())


def test_a_given_reference_wins_over_shared_layers(make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    reference = create_reference_model(model)
    with pytest.warns(UserWarning, match="num_shared_layers=1 is ignored"):
        trainer = PPOTrainer(PPOConfig(batch_size=4), model, reference, tiny_tokenizer(), num_shared_layers=1)
    assert trainer.ref_model is reference


@pytest.fixture
def fresh_accelerate() -> Any:
    """accelerate fixes the precision once a process; this lets one test have its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16_compute_keeps_float32_weights_and_losses(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(ppo_epochs=1, accelerator_kwargs={"mixed_precision": "bf16"}, mini_batch_size=4)
    stats = trainer.step(*make_batch())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    states = trainer.optimizer.optimizer.state.values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    assert stats["objective/logprobs"].dtype == np.float32
    assert_close(stats["ppo/policy/ratio"], np.ones_like(stats["ppo/policy/ratio"]), 0.05)
    assert all(np.isfinite(v) for v in stats.values() if isinstance(v, float))


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_layers_are_run_once_for_a_batch(
    make_batch: Any, monkeypatch: pytest.MonkeyPatch, kl_penalty: str, dtype: str
) -> None:
    queries, responses, scores = make_batch()
    found = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr(evaluator, "with_frozen_states", lambda policy, rollout, **more: rollout)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
        reference = create_reference_model(model, num_shared_layers=1)
        settings = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, "dtype": dtype, "ppo_epochs": 3}
        trainer = PPOTrainer(PPOConfig(**settings, kl_penalty=kl_penalty), model, reference, tiny_tokenizer())
        trainer.step(queries, responses, scores)  # with what is tried once
        seen: list[int] = []
        first = model.pretrained_model.transformer.h[0].attn
        handle = first.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0].shape[1]))
        stats = trainer.step(queries, responses, scores)
        handle.remove()
        tokens = sum(len(pair[0]) + len(pair[1]) for pair in zip(queries, responses, strict=True))
        whole = [n for n in seen if n != 5]  # without the trial's words
        assert trainer.last_experience is not None and type(trainer.last_experience.rollout) is Rollout
        if kernels_enabled():  # a pass is one packed row then
            assert (tokens <= sum(whole) < 1.2 * tokens) if once else sum(whole) >= 4 * tokens
        found.append((stats, weights_of(trainer)))
    (ours, weights), (plain, others) = found
    tolerance = 1e-5 if dtype == "float32" else 0.02
    for name in ("objective/kl", "ppo/loss/total", "ppo/policy/entropy", "ppo/val/mean"):
        assert ours[name] == pytest.approx(plain[name], abs=tolerance), name
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=tolerance)


@pytest.mark.usefixtures("fresh_accelerate")
def test_frozen_layers_under_mixed_precision_are_those_that_sampling_and_reference_see(make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_gpt2(initializer_range=0.3), summary_dropout_prob=0.0
    )
    reference = create_reference_model(model)
    create_reference_model(model, num_shared_layers=1)  # freezes the first layer; the other reference has its own
    config = PPOConfig(batch_size=4, mini_batch_size=2, accelerator_kwargs={"mixed_precision": "bf16"})
    trainer = PPOTrainer(config, model, reference, tiny_tokenizer())
    assert trainer.step(*make_batch())["objective/kl"] == 0
