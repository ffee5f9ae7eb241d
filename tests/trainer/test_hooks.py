"""Hooks of subclasses in the signatures of TRL 0.4 to 0.11, and the arguments that came with those releases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close
from tests.trainer.conftest import weights_of
from trl import PPOTrainer
from trl.trainer.hooks import in_either_order

QUERIES = [torch.tensor([5, 6]), torch.tensor([7, 8, 9]), torch.tensor([5, 6]), torch.tensor([4])]


def test_orders_of_arguments() -> None:
    names = ("old_logprobs", "values", "rewards", "logits", "vpreds", "logprobs", "mask", "advantages", "returns")

    class Trainer:
        @in_either_order
        def loss(self, old_logprobs, values, rewards, logits, vpreds, logprobs, mask, advantages=None, returns=None):  # type: ignore[no-untyped-def]
            return dict(
                zip(
                    names,
                    (old_logprobs, values, rewards, logits, vpreds, logprobs, mask, advantages, returns),
                    strict=True,
                )
            )

    older = Trainer().loss(*names[:7])
    assert older == dict(zip(names[:7], names[:7], strict=True)) | {"advantages": None, "returns": None}
    in_new_order = ("old_logprobs", "values", "logits", "vpreds", "logprobs", "mask", "advantages", "returns")
    newer = dict(zip(names, names, strict=True)) | {"rewards": None}
    assert Trainer().loss(*in_new_order) == newer
    assert Trainer().loss(*in_new_order[:6], advantages="advantages", returns="returns") == newer
    assert Trainer().loss(**newer) == newer


def test_an_override_of_the_loss_in_the_old_order_is_called_in_it(make_trainer: Any, make_batch: Any) -> None:
    seen = []

    class Old(PPOTrainer):
        def loss(self, old_logprobs, values, rewards, logits, vpreds, logprobs, mask):  # type: ignore[no-untyped-def]
            seen.append((rewards.shape, logits.dim(), mask.dtype))
            return super().loss(old_logprobs, values, rewards, logits, vpreds, logprobs, mask)

    make_trainer(trainer_class=Old, ppo_epochs=1).step(*make_batch())
    assert len(seen) == 2 and all(shape[0] == 2 and dim == 3 and dtype == torch.int64 for shape, dim, dtype in seen)


def test_advantages_of_the_whole_batch_are_white(make_trainer: Any, make_batch: Any) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class New(PPOTrainer):
        def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):  # type: ignore[no-untyped-def]
            seen.append((advantages, mask.bool()))
            return super().loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)

    make_trainer(trainer_class=New, ppo_epochs=1).step(*make_batch())
    counted = torch.cat([advantages[mask] for advantages, mask in seen])
    assert_close(counted.mean(), 0.0)
    assert_close(counted.var(), 1.0, tol=1e-4)
    assert abs(float(seen[0][0][seen[0][1]].mean())) > 1e-3  # not of each minibatch


def test_three_results_of_super_compute_rewards(make_trainer: Any, make_batch: Any) -> None:
    """The base returns two, as 0.4.6 did; an override that unpacks three gets the KL as well."""
    kls = []

    class Newer(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):  # type: ignore[no-untyped-def]
            rewards, penalty, kl = super().compute_rewards(scores, logprobs, ref_logprobs, masks)
            kls.append(kl)
            return rewards, penalty, kl

    trainer, plain = make_trainer(trainer_class=Newer), make_trainer()
    stats, expected = trainer.step(*make_batch()), plain.step(*make_batch())
    assert len(kls) == 1 and stats["ppo/loss/total"] == expected["ppo/loss/total"]
    queries, responses, scores = make_batch()
    with pytest.raises(ValueError, match="compute_rewards of Newer takes no token_rewards"):
        trainer.step(queries, responses, scores, token_rewards=[torch.zeros(len(r)) for r in responses])


def test_masks_come_back_from_the_safety_checker(make_trainer: Any, make_batch: Any) -> None:
    class Newer(PPOTrainer):
        def _step_safety_checker(self, batch_size, queries, responses, scores, masks=None):  # type: ignore[no-untyped-def]
            queries, responses, scores, masks = super()._step_safety_checker(
                batch_size, queries, responses, scores, masks
            )
            return queries, responses, scores, [torch.ones_like(r) for r in responses[:-1]] + [0 * responses[-1]]

    trainer = make_trainer(trainer_class=Newer)
    trainer.step(*make_batch())
    assert trainer.last_experience.counted.tolist() == [True, True, True, False]


def test_a_kl_of_ones_own_and_the_exact_one_do_not_go_together(make_trainer: Any, make_batch: Any) -> None:
    class Own(PPOTrainer):
        def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
            return super()._kl_penalty(logprob, ref_logprob)

    own, plain = make_trainer(trainer_class=Own), make_trainer()
    assert own.step(*make_batch())["ppo/loss/total"] == plain.step(*make_batch())["ppo/loss/total"]
    with pytest.raises(ValueError, match="_kl_penalty, which Own overrides"):
        make_trainer(trainer_class=Own, kl_penalty="full").step(*make_batch())


@pytest.mark.filterwarnings("ignore:objective/kl is")
@pytest.mark.parametrize("by_methods", [False, True])
def test_a_ratio_above_the_threshold_takes_no_step(make_trainer: Any, make_batch: Any, by_methods: bool) -> None:
    class Methods(PPOTrainer):
        def loss(self, *args: Any) -> Any:
            return super().loss(*args)

    kind = Methods if by_methods else PPOTrainer
    trainer = make_trainer(trainer_class=kind, ratio_threshold=1.5, ppo_epochs=1, learning_rate=1e-3)
    assert trainer.step(*make_batch())["ppo/skipped_updates"] == 0.0  # ratios of 1 at first, then near it
    prepared, before = trainer.prepare(*make_batch()), weights_of(trainer)
    prepared.experience.old_logprobs.sub_(1.0)  # as if every token were e times as likely now
    with pytest.warns(
        UserWarning, match=r"the mean probability ratio of a minibatch is 2\.7\d*, above ratio_threshold=1\.5"
    ):
        stats = trainer.learn(prepared)
    assert stats["ppo/skipped_updates"] == 1.0
    assert_close(stats["ppo/policy/mean_ratio"], torch.tensor(1.0).exp(), tol=1e-3)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.guards.consecutive_skips == 0  # by design: it ends no run


@pytest.mark.filterwarnings("ignore:objective/kl is")
@pytest.mark.parametrize("single", [False, True])
def test_responses_of_the_reference(make_trainer: Any, make_batch: Any, single: bool) -> None:
    trainer = make_trainer(learning_rate=0.1)
    asked = QUERIES[0] if single else QUERIES
    greedy = {"max_new_tokens": 4, "do_sample": False, "return_prompt": False}
    mine, theirs = trainer.generate(asked, generate_ref_response=True, **greedy)
    assert type(mine) is type(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    for _ in range(4):
        trainer.step(*make_batch())
    mine, theirs_later = trainer.generate(asked, generate_ref_response=True, **greedy)
    assert all(torch.equal(a, b) for a, b in zip(theirs, theirs_later, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(mine, theirs_later, strict=True))
    alone = trainer.generate(asked, **greedy)
    assert all(torch.equal(a, b) for a, b in zip(mine, alone, strict=True))


def test_batched_generation_of_0_5_has_no_model(make_trainer: Any) -> None:
    class Older(PPOTrainer):
        def _generate_batched(self, query_tensors, batch_size=4, **generation_kwargs):  # type: ignore[no-untyped-def]
            responses = super()._generate_batched(query_tensors, batch_size=batch_size, **generation_kwargs)
            return [response.flip(0) for response in responses]

    greedy = {"max_new_tokens": 3, "do_sample": False}
    backwards = make_trainer(trainer_class=Older).generate(QUERIES, **greedy)
    forwards = make_trainer().generate(QUERIES, remove_padding=True, pad_to_multiple_of=8, **greedy)
    assert [r.flip(0).tolist() for r in backwards] == [r.tolist() for r in forwards]
    with pytest.raises(ValueError, match="takes no model"):
        make_trainer(trainer_class=Older).generate(QUERIES, generate_ref_response=True, **greedy)
    with pytest.raises(ValueError, match="remove_padding=False"):
        make_trainer().generate(QUERIES, remove_padding=False, **greedy)


def test_a_collator_of_the_step_s_inputs(make_trainer: Any, make_batch: Any) -> None:
    from transformers import DataCollatorForLanguageModeling

    from tests.helpers import tiny_tokenizer

    given = []
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)

    class Fixed(PPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, training_data_collator=lambda rows: given.append(rows) or collator(rows))

    stats, expected = make_trainer(trainer_class=Fixed).step(*make_batch()), make_trainer().step(*make_batch())
    assert {"input_ids", "attention_mask"} == set(given[0][0]) and len(given[0]) == 4
    assert stats["ppo/loss/total"] == expected["ppo/loss/total"]


def test_an_override_that_is_never_called_is_refused(make_trainer: Any) -> None:
    class Framework(PPOTrainer):
        def _prepare_deepspeed(self, model: Any) -> Any:
            return model

    with pytest.raises(
        TypeError, match="Framework defines _prepare_deepspeed, which is never called here: configure DeepSpeed"
    ):
        make_trainer(trainer_class=Framework)


def test_final_advantages_reach_a_loss_of_any_order(make_trainer: Any, make_batch: Any) -> None:
    """An override of compute_advantages counts, however the loss beside it is written."""

    class Broken(PPOTrainer):
        def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> Any:
            values, advantages, returns = super().compute_advantages(values, rewards, mask)
            return values, advantages * torch.nan, returns

    class Anything(Broken):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().loss(*args, **kwargs)

    class Old(Broken):
        def train_minibatch(self, old_logprobs, values, rewards, logprobs, logits, vpreds, mask):  # type: ignore[no-untyped-def]
            return super().train_minibatch(old_logprobs, values, rewards, logprobs, logits, vpreds, mask)

    for kind in (Broken, Anything, Old):
        with pytest.warns(UserWarning, match="is skipped"):
            assert make_trainer(trainer_class=kind).step(*make_batch())["ppo/skipped_updates"] == 1.0


def test_new_orders_are_known_by_more_than_a_name(make_trainer: Any, make_batch: Any) -> None:
    class Eight(PPOTrainer):
        def loss(self, old_lp, v, logits, vpred, lp, mask, adv, ret):  # type: ignore[no-untyped-def]
            return super().loss(old_lp, v, logits, vpred, lp, mask, adv, ret)

    class Rest(PPOTrainer):
        def loss(self, old_logprobs, values, logits, *rest):  # type: ignore[no-untyped-def]
            assert logits.dim() == 3
            return super().loss(old_logprobs, values, logits, *rest)

    losses = [make_trainer(trainer_class=kind).step(*make_batch())["ppo/loss/total"] for kind in (Eight, Rest)]
    assert losses[0] == losses[1]


def test_names_that_a_client_gives_to_something_else(make_trainer: Any, make_batch: Any) -> None:
    class Agent(PPOTrainer):
        recipe = "lora"
        stats_prefix = "mine"

        def learn(self, batch: Any) -> None:
            raise AssertionError("a method of the client's own")

        prepare = compute = guards = algorithm = learn  # type: ignore[assignment]

    trainer, plain = make_trainer(trainer_class=Agent), make_trainer()
    trainer.score_moments = trainer.fingerprints = 5  # type: ignore[assignment]
    stats, expected = trainer.step(*make_batch()), plain.step(*make_batch())
    assert stats["ppo/loss/total"] == expected["ppo/loss/total"]
    assert plain.guards.consecutive_skips == 0 and plain.algorithm == {"name": "ppo"}


def test_errors_of_properties_are_their_own(make_trainer: Any) -> None:
    class Broken(PPOTrainer):
        @property
        def scale(self) -> Any:
            return self.config.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = make_trainer(trainer_class=Broken).scale
    with pytest.raises(AttributeError, match="PPOTrainer has no attribute push_to_hub_kwargs: use config"):
        _ = make_trainer().push_to_hub_kwargs
    trainer = make_trainer()
    assert trainer.running is trainer.running and list(trainer.model_params) and not trainer.is_using_text_environment
    with trainer.optional_peft_ctx():
        assert trainer.processing_class is trainer.tokenizer


def test_classes_beside_the_trainer_are_not_its_overrides(make_trainer: Any, make_batch: Any) -> None:
    from transformers import Trainer

    class Framework(PPOTrainer, Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            PPOTrainer.__init__(self, *args, **kwargs)
            self.args, self.state = None, None

    assert "ppo/loss/total" in make_trainer(trainer_class=Framework).step(*make_batch())


def test_the_exact_kl_reaches_an_old_override(make_trainer: Any, make_batch: Any) -> None:
    class Old(PPOTrainer):
        def compute_rewards(self, scores, logprobs, ref_logprobs, masks):  # type: ignore[no-untyped-def]
            return super().compute_rewards(scores, logprobs, ref_logprobs, masks)

    stats = [make_trainer(trainer_class=kind, kl_penalty="full") for kind in (Old, PPOTrainer)]
    losses = [trainer.step(*make_batch())["ppo/loss/total"] for trainer in stats]
    assert losses[0] == losses[1]
