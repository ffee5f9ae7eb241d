"""Subclasses of PPOTrainer as frameworks wrote them for TRL 0.4 to 0.11: each overrides one hook, with its signature then."""

import torch

from tests.clients.weights import same, weights
from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

QUERIES = [torch.tensor([3 + i, 4 + i, 5 + i]) for i in range(4)]
RESPONSES = [torch.tensor([20 + i, 30 + i, 40 + i, 1]) for i in range(4)]
SCORES = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)]


class MonteCarlo(PPOTrainer):
    def compute_advantages(self, values, rewards, mask):
        rewards = rewards * mask
        returns = rewards.flip(1).cumsum(1).flip(1)
        return values * mask, (returns - values) * mask, returns


class SteeperPenalty(PPOTrainer):
    def _kl_penalty(self, logprob, ref_logprob):
        return 10 * (logprob - ref_logprob).abs()


class RewardOnEveryToken(PPOTrainer):
    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        kls = (logprobs - ref_logprobs) * masks
        non_score_rewards = -self.kl_ctl.value * kls
        spread = torch.stack(list(scores)).unsqueeze(1) * masks / masks.sum(1, keepdim=True)
        return non_score_rewards + spread, non_score_rewards, kls


class ReversedLoss(PPOTrainer):
    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        policy_loss, value_loss, stats = super().loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        return -policy_loss, value_loss, stats


class ValueOnly(PPOTrainer):
    def train_minibatch(self, old_logprobs, values, logprobs, logits, vpreds, mask, advantages, returns):
        nothing = torch.zeros_like(advantages)
        return super().train_minibatch(old_logprobs, values, logprobs, logits, vpreds, mask, nothing, returns)


class OneEpoch(PPOTrainer):
    def _early_stop(self, policykl):
        assert policykl is not None
        return True


class NegatedScores(PPOTrainer):
    def _step_safety_checker(self, batch_size, queries, responses, scores, masks=None):
        queries, responses, scores, masks = super()._step_safety_checker(batch_size, queries, responses, scores, masks)
        return queries, responses, [-score for score in scores], masks


class NoValues(PPOTrainer):
    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
        logprobs, logits, values, masks = super().batched_forward_pass(
            model, queries, responses, model_inputs, return_logits, response_masks
        )
        return logprobs, logits, values * 0, masks


class Parrot(PPOTrainer):
    def _generate_batched(
        self,
        model,
        query_tensors,
        length_sampler=None,
        batch_size=4,
        return_prompt=True,
        pad_to_multiple_of=None,
        remove_padding=True,
        **generation_kwargs,
    ):
        return [query.flip(0) for query in query_tensors]


class RewardOnEveryTokenOf04(PPOTrainer):
    """Two values, as in 0.4 to 0.6."""

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        return RewardOnEveryToken.compute_rewards(self, scores, logprobs, ref_logprobs, masks)[:2]


class ReversedLossOf04(PPOTrainer):
    def loss(self, old_logprobs, values, rewards, logits, vpreds, logprobs, mask):
        policy_loss, value_loss, stats = super().loss(old_logprobs, values, rewards, logits, vpreds, logprobs, mask)
        return -policy_loss, value_loss, stats


class NoRewardOf04(PPOTrainer):
    def train_minibatch(self, old_logprobs, values, rewards, logprobs, logits, vpreds, mask):
        return super().train_minibatch(old_logprobs, values, rewards * 0, logprobs, logits, vpreds, mask)


class NegatedScoresOf04(PPOTrainer):
    """No masks, as in 0.4 to 0.6."""

    def _step_safety_checker(self, batch_size, queries, responses, scores):
        queries, responses, scores = super()._step_safety_checker(batch_size, queries, responses, scores)
        return queries, responses, [-score for score in scores]


class NoValuesOf04(PPOTrainer):
    """No response_masks, as in 0.4 to 0.6."""

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False):
        logprobs, logits, values, masks = super().batched_forward_pass(
            model, queries, responses, model_inputs, return_logits
        )
        return logprobs, logits, values * 0, masks


class ParrotOf05(PPOTrainer):
    """No model, as in 0.4 to 0.6; by position, as TRL's own tests called it."""

    def _generate_batched(
        self,
        query_tensors,
        length_sampler=None,
        batch_size=4,
        return_prompt=True,
        pad_to_multiple_of=None,
        remove_padding=True,
        **generation_kwargs,
    ):
        super()._generate_batched(
            query_tensors,
            length_sampler,
            batch_size,
            return_prompt,
            pad_to_multiple_of,
            remove_padding,
            **generation_kwargs,
        )
        return [query.flip(0) for query in query_tensors]


class WithHelpers(PPOTrainer):
    """Helpers of its own, under names that anyone would choose."""

    def _collate(self, rows):
        raise AssertionError("nobody but this class calls it")

    def _optimize(self):
        raise AssertionError("nobody but this class calls it")

    def _settings(self, name):
        raise AssertionError("nobody but this class calls it")


def make(kind, dataset=None, **settings):
    """A trainer of this class on a tiny model, whose reference is another one."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), v_head_init_strategy="normal")
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=1))
    settings = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-2} | settings
    return kind(PPOConfig(**settings), model, reference, tiny_tokenizer(), dataset)


def learnt(kind, **settings):
    """The weights after a step of a trainer of this class."""
    torch.manual_seed(0)
    trainer = make(kind, **settings)
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    assert "ppo/loss/total" in stats and "objective/kl" in stats
    return weights(trainer.model)


class Framework(MonteCarlo, SteeperPenalty, RewardOnEveryToken, ReversedLoss, NegatedScores, NoValues, WithHelpers):
    """All of it at once."""


def main():
    assert not same(learnt(Framework), learnt(PPOTrainer))


if __name__ == "__main__":
    main()
