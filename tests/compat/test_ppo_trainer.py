"""What scripts written for TRL 0.4–0.11 do with PPOTrainer, held to what they got.

Numbers marked "0.4.6" were observed on the released package. That whole steps give its statistics and weights is
shown under tests/parity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trl
from tests.compat.test_names_and_signatures import FACTS
from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    PreTrainedModelWrapper,
    create_reference_model,
)
from trl.core import LengthSampler

QUERIES = [torch.tensor([3, 4, 5]), torch.tensor([4, 5]), torch.tensor([9, 8, 7, 6]), torch.tensor([12])]
RESPONSES = [torch.tensor([6, 7, 8]), torch.tensor([5, 6]), torch.tensor([10, 11]), torch.tensor([13, 14, 15, 16])]
SCORES = [torch.tensor(s) for s in (1.0, -0.5, 0.25, 2.0)]
# An encoder-decoder's response begins with the decoder's start token.
DECODED = [torch.cat([torch.tensor([0]), r]) for r in RESPONSES]


def policy(build: Callable[..., Any] = tiny_gpt2, **settings: Any) -> PreTrainedModelWrapper:
    """A value-head model without dropout."""
    kind = AutoModelForSeq2SeqLMWithValueHead if build is tiny_t5 else AutoModelForCausalLMWithValueHead
    return kind.from_pretrained(build(**settings), summary_dropout_prob=0.0)


def settings(**changes: Any) -> PPOConfig:
    return PPOConfig(**({"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3} | changes))


def trainer(
    config: PPOConfig | None = None, model: Any = None, ref_model: Any = None, tokenizer: Any = None, **kwargs: Any
) -> PPOTrainer:
    """A trainer on a tiny GPT-2, made without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PPOTrainer(config or settings(), model or policy(), ref_model, tokenizer or tiny_tokenizer(), **kwargs)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestConstructor:
    def test_arguments_by_position(self) -> None:
        model, reference, tokenizer, dataset = policy(), policy(), tiny_tokenizer(), Numbers(8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        made = PPOTrainer(settings(), model, reference, tokenizer, dataset, optimizer, list, None, scheduler)
        assert made.model is model
        assert made.ref_model is reference
        assert made.tokenizer is tokenizer
        assert made.dataset is dataset
        assert made.optimizer.optimizer is optimizer
        assert made.lr_scheduler.scheduler is scheduler
        assert isinstance(next(iter(made.dataloader)), list)  # the collator's doing

    def test_attributes(self) -> None:
        config = settings()
        made = trainer(config)
        assert made.config is config
        assert made.dataset is None
        with pytest.warns(UserWarning, match="(?i)no dataset"):
            assert made.dataloader is None
        assert made.lr_scheduler is None
        assert made.is_encoder_decoder is False
        assert made.is_peft_model is False
        assert made.is_distributed is False
        assert made.current_step == 0
        assert torch.device(made.current_device) == made.accelerator.device
        assert made.kl_ctl.value == config.init_kl_coef
        assert callable(made.data_collator)
        assert isinstance(made.optimizer.optimizer, torch.optim.Adam)
        assert made.optimizer.param_groups[0]["lr"] == 1e-3

    def test_kl_controller_follows_the_config(self) -> None:
        assert isinstance(trainer(settings(adap_kl_ctrl=True)).kl_ctl, trl.AdaptiveKLController)
        assert isinstance(trainer(settings(adap_kl_ctrl=False)).kl_ctl, trl.FixedKLController)

    def test_reference_is_made_where_none_is_given(self) -> None:
        made = trainer()
        assert isinstance(made.ref_model, PreTrainedModelWrapper)
        assert made.ref_model is not made.model
        assert not any(p.requires_grad for p in made.ref_model.parameters())

    def test_shared_layers_are_frozen_in_both(self) -> None:
        model = policy()
        made = trainer(model=model, num_shared_layers=1)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert any(".h.0." in name for name in frozen)
        assert not any(".h.1." in name or "v_head" in name for name in frozen)
        shared = made.ref_model.pretrained_model.transformer.h[0].attn.c_attn.weight
        assert shared is model.pretrained_model.transformer.h[0].attn.c_attn.weight

    def test_warns_without_a_dataset_where_batches_are_asked_for(self) -> None:
        made = PPOTrainer(settings(), policy(), policy(), tiny_tokenizer())
        with pytest.warns(UserWarning, match="(?i)no dataset") as caught:
            assert made.dataloader is None
        assert caught[0].filename == __file__

    def test_warns_of_a_reference_and_shared_layers(self) -> None:
        with pytest.warns(UserWarning, match="num_shared_layers"):
            PPOTrainer(settings(), policy(), policy(), tiny_tokenizer(), Numbers(8), num_shared_layers=1)

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("config", {"batch_size": 4}),
            ("model", "gpt2"),
            ("model", tiny_gpt2()),
            ("ref_model", "gpt2"),
            ("ref_model", tiny_gpt2()),
            ("tokenizer", "gpt2"),
            ("tokenizer", None),
            ("dataset", "imdb"),
            ("dataset", [1, 2, 3]),
            ("optimizer", "adam"),
            ("lr_scheduler", "linear"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_wrong_types(self, name: str, wrong: Any) -> None:
        good = {"config": settings(), "model": policy(), "ref_model": None, "tokenizer": tiny_tokenizer()}
        with pytest.raises(ValueError, match=name):
            PPOTrainer(**(good | {name: wrong}))

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
    def test_no_reference_for_a_peft_model(self) -> None:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=lora)
        made = trainer(model=model)
        assert made.is_peft_model is True
        assert made.ref_model is None
        before = weights(model)
        stats = made.step(QUERIES, RESPONSES, SCORES)
        assert_close(stats["objective/kl"], 0.0, tol=1e-4)  # adapter at zero: the policy is its own reference
        changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
        assert changed
        assert all("lora_" in name or "v_head" in name for name in changed)

    def test_settings_that_drop_samples_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"batch_size=5.*mini_batch_size=2"):
            settings(batch_size=5)


class Numbers(torch.utils.data.Dataset):
    """0 ... n - 1."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def columns(examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The data collator of every TRL example."""
    return {key: [example[key] for example in examples] for key in examples[0]}


class TestDataloader:
    def test_shuffles_and_drops_the_last(self) -> None:
        loader = trainer(dataset=Numbers(42), data_collator=list).dataloader
        epochs = [[number for batch in loader for number in batch] for _ in range(2)]
        assert len(loader) == 10
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == 40
            assert epoch != sorted(epoch)
        assert epochs[0] != epochs[1]

    @pytest.mark.parametrize("drop", [True, False])
    def test_columns_nobody_names(self, drop: bool) -> None:
        datasets = pytest.importorskip("datasets")
        rows = {"input_ids": [[i] for i in range(8)], "query": ["q"] * 8, "response": ["r"] * 8, "label": [0] * 8}
        data = datasets.Dataset.from_dict(rows | {"review": ["long"] * 8})
        made = trainer(settings(remove_unused_columns=drop), dataset=data, data_collator=columns)
        batch = next(iter(made.dataloader))
        assert set(batch) == set(rows) | (set() if drop else {"review"})
        assert len(batch["query"]) == 4

    def test_a_loader_of_ones_own(self) -> None:
        made = trainer()
        batches = list(made.prepare_dataloader(Numbers(9), list))
        assert [len(batch) for batch in batches] == [4, 4]

    def test_less_than_one_batch(self) -> None:
        with pytest.raises(ValueError, match=r"3 examples.*batch_size=4"):
            trainer(dataset=Numbers(3))


class TestConfigStaysLive:
    def test_batch_size(self) -> None:
        made = trainer()
        made.config.batch_size = 2
        made.step(QUERIES[:2], RESPONSES[:2], SCORES[:2])
        with pytest.raises(ValueError, match="2"):
            made.step(QUERIES, RESPONSES, SCORES)

    def test_epochs_and_mini_batches(self) -> None:
        made = trainer()
        taken: list[int] = []
        made.optimizer.optimizer.register_step_post_hook(lambda *args: taken.append(1))
        made.step(QUERIES, RESPONSES, SCORES)
        assert len(taken) == 2 * 2
        made.config.ppo_epochs, made.config.mini_batch_size = 3, 1
        made.step(QUERIES, RESPONSES, SCORES)
        assert len(taken) == 4 + 3 * 4
        made.config.gradient_accumulation_steps = 4
        made.step(QUERIES, RESPONSES, SCORES)
        assert len(taken) == 4 + 12 + 3

    def test_value_coefficient(self) -> None:
        made = trainer(settings(vf_coef=0.3))
        arguments = {name: x[:1] for name, x in LOSS.items()}
        before = made.loss(**arguments)[1]
        made.config.vf_coef = 0.6
        assert_close(made.loss(**arguments)[1], 2 * before)

    def test_a_bad_value_is_found_at_the_next_call(self) -> None:
        made = trainer()
        made.config.mini_batch_size = 3
        before = weights(made.model)
        with pytest.raises(ValueError, match="mini_batch_size=3"):
            made.step(QUERIES, RESPONSES, SCORES)
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())


class TestTokenizer:
    def test_pad_token_may_be_missing(self) -> None:
        made = trainer(tokenizer=tiny_tokenizer(pad=False))
        stats = made.step(QUERIES, RESPONSES, SCORES)
        assert np.isfinite(stats["ppo/loss/total"])

    def test_pad_token_may_come_later(self) -> None:
        tokenizer = tiny_tokenizer(pad=False)
        made = trainer(tokenizer=tokenizer)
        tokenizer.pad_token = "w0"
        ids = made.prepare_model_inputs(QUERIES[:2], RESPONSES[:2])["input_ids"]
        assert ids.tolist() == [[3, 4, 5, 6, 7, 8], [4, 5, 5, 6, 0, 0]]

    def test_which_token_pads_changes_nothing(self) -> None:
        stats = [trainer(tokenizer=tiny_tokenizer(pad=pad)).step(QUERIES, RESPONSES, SCORES) for pad in (True, False)]
        for name in ("ppo/loss/total", "objective/kl", "ppo/returns/mean"):
            assert_close(stats[0][name], stats[1][name])


class TestModelInputs:
    def test_decoder(self) -> None:
        inputs = trainer().prepare_model_inputs(QUERIES[:2], RESPONSES[:2])
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8], [4, 5, 5, 6, 0, 0]]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]

    def test_decoder_padded_on_the_left(self) -> None:
        made = trainer(tokenizer=tiny_tokenizer(padding_side="left"))
        inputs = made.prepare_model_inputs(QUERIES[:2], RESPONSES[:2])
        assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8], [0, 0, 4, 5, 5, 6]]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]

    def test_encoder_decoder(self) -> None:
        made = trainer(model=policy(tiny_t5))
        assert made.is_encoder_decoder is True
        inputs = made.prepare_model_inputs(QUERIES[:2], DECODED[:2])
        assert inputs["input_ids"].tolist() == [[3, 4, 5], [4, 5, 0]]
        assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert inputs["decoder_input_ids"].tolist() == [[0, 6, 7, 8], [0, 5, 6, 0]]
        assert inputs["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def evaluated(made: PPOTrainer, queries: list[Tensor], responses: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Logprobs and values of each response, off the padding."""
    inputs = made.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, logits, values, masks = made.batched_forward_pass(made.model, queries, responses, inputs)
    assert logits is None
    counted = [mask.bool() for mask in masks]
    return [x[m] for x, m in zip(logprobs, counted, strict=True)], [x[m] for x, m in zip(values, counted, strict=True)]


class TestBatchedForwardPass:
    def test_shapes_and_mask(self) -> None:
        made = trainer()
        inputs = made.prepare_model_inputs(QUERIES[:2], RESPONSES[:2])
        made.config.batch_size = 2
        result = made.batched_forward_pass(made.model, QUERIES[:2], RESPONSES[:2], inputs, return_logits=True)
        logprobs, logits, values, masks = result
        assert logprobs.shape == values.shape == masks.shape == (2, 5)
        assert logits.shape == (2, 5, 61)
        assert masks.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
        expected = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
        assert_close(logprobs[masks.bool()], expected[masks.bool()])

    @pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_mini_batches_and_padding_change_nothing(self, build: Callable[..., Any], side: str) -> None:
        responses = DECODED if build is tiny_t5 else RESPONSES
        made = trainer(model=policy(build, initializer_range=0.3) if build is not tiny_t5 else policy(build))
        made.model.eval()
        alone = [evaluated(made, [q], [r]) for q, r in zip(QUERIES, responses, strict=True)]
        made.tokenizer.padding_side = side
        for size in (1, 2, 4):
            made.config.mini_batch_size = size
            logprobs, values = evaluated(made, QUERIES, responses)
            for row, (one_logprobs, one_values) in enumerate(alone):
                assert len(logprobs[row]) == len(RESPONSES[row])
                assert_close(logprobs[row], one_logprobs[0], tol=1e-4)
                assert_close(values[row], one_values[0], tol=1e-4)

    def test_gradients_flow(self) -> None:
        made = trainer()
        inputs = made.prepare_model_inputs(QUERIES, RESPONSES)
        logprobs, _, values, _ = made.batched_forward_pass(made.model, QUERIES, RESPONSES, inputs)
        assert logprobs.requires_grad
        assert values.requires_grad


class TestRewards:
    @pytest.mark.parametrize("as_list", [True, False])
    def test_score_on_the_last_token_minus_the_kl(self, as_list: bool) -> None:
        made = trainer(settings(init_kl_coef=0.2))
        scores: Any = [torch.tensor(2.0), torch.tensor(-1.0)] if as_list else torch.tensor([2.0, -1.0])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        rewards, non_score = made.compute_rewards(scores, LOSS["old_logprobs"], LOSS["logprobs"], mask)
        assert_close(rewards[0], [0.08, -0.02, 1.92])  # 0.4.6
        assert_close(rewards[1, :2], [0.0, -0.98])
        assert_close(non_score[0], [0.08, -0.02, -0.08])
        assert_close(non_score[1, :2], [0.0, 0.02])


LOSS = {
    "old_logprobs": torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -1.5, -3.0]]),
    "values": torch.tensor([[0.1, 0.4, -0.3], [0.2, 0.0, 0.5]]),
    "rewards": torch.tensor([[0.0, 0.0, 1.0], [-0.1, 0.5, 0.0]]),
    "logits": torch.linspace(-1, 1, 24).view(2, 3, 4) ** 3,
    "vpreds": torch.tensor([[0.5, 0.45, -0.2], [0.1, 0.6, 0.3]]),
    "logprobs": torch.tensor([[-0.6, -2.1, -0.9], [-0.7, -1.4, -2.5]]),
    "mask": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
}


class TestLoss:
    """Arguments and results as TRL 0.4.6 gave them at gamma 0.9, lambda 0.8, vf_coef 0.3."""

    def made(self) -> PPOTrainer:
        return trainer(settings(gamma=0.9, lam=0.8, vf_coef=0.3))

    def test_floats_for_a_mask(self) -> None:
        policy_loss, value_loss, stats = self.made().loss(**LOSS)
        assert_close(policy_loss, 0.11365866661071777)
        assert_close(value_loss, 0.04996554180979729)
        expected = {
            "loss/policy": 0.11365866661071777,
            "loss/value": 0.16655179858207703,
            "loss/total": 0.16362421214580536,
            "policy/entropy": 1.38019859790802,
            "policy/approxkl": 0.03399999439716339,
            "policy/policykl": 0.0,
            "policy/clipfrac": 0.0,
            "policy/advantages_mean": 0.0,
            "returns/mean": 0.5955039858818054,
            "returns/var": 0.07305129617452621,
            "val/vpred": 0.28999999165534973,
            "val/error": 0.3049820065498352,
            "val/clipfrac": 0.4,
            "val/mean": 0.07999999821186066,
            "val/var": 0.06700000166893005,
        }
        for name, value in expected.items():
            assert_close(torch.as_tensor(stats[name]).float(), value)
        counted = LOSS["mask"].bool()
        whitened = [
            -0.13568365573883057,
            -0.5290948152542114,
            1.6635912656784058,
            -0.965935468673706,
            -0.03287757188081741,
        ]
        assert_close(stats["policy/advantages"][counted], whitened)
        ratio = [1.4918246269226074, 0.9048374891281128, 0.6703200340270996, 1.0, 1.1051709651947021]
        assert_close(stats["policy/ratio"][counted], ratio)

    def test_statistics_are_flat_and_complete(self) -> None:
        stats = self.made().loss(**LOSS)[2]
        facts = FACTS["loss_statistics"]
        assert set(facts["scalars"]) | set(facts["arrays"]) <= set(stats)
        assert all(torch.as_tensor(stats[name]).numel() == 1 for name in facts["scalars"])
        assert all(stats[name].shape == (2, 3) for name in facts["arrays"])
        assert not any(torch.as_tensor(x).requires_grad for x in stats.values())

    def test_logits_of_two_dimensions(self) -> None:
        arguments = {name: x[:1] for name, x in LOSS.items()} | {"logits": torch.tensor([[0.0, 1.0, 2.0]])}
        policy_loss, value_loss, stats = self.made().loss(**arguments)
        assert_close(policy_loss, 0.16741152107715607)
        assert_close(value_loss, 0.07749591767787933)
        assert_close(stats["policy/entropy"], 0.8323955535888672)
        assert_close(stats["policy/policykl"], 0.03333330154418945)
        assert_close(torch.as_tensor(stats["val/clipfrac"]).float(), 1 / 3)
        assert_close(stats["policy/advantages"], [[-0.40085726976394653, -0.7373800277709961, 1.1382372379302979]])

    def test_gradients_reach_logprobs_and_values(self) -> None:
        arguments = LOSS | {name: LOSS[name].clone().requires_grad_() for name in ("logprobs", "vpreds")}
        policy_loss, value_loss, _ = self.made().loss(**arguments)
        (policy_loss + value_loss).backward()
        for name in ("logprobs", "vpreds"):
            assert bool((arguments[name].grad != 0).any())
            assert_close(arguments[name].grad[1, 2], 0.0)  # off the mask

    def test_train_minibatch_takes_one_step(self) -> None:
        made = trainer(settings(max_grad_norm=0.5))
        inputs = made.prepare_model_inputs(QUERIES, RESPONSES)
        with torch.no_grad():
            old, _, values, mask = made.batched_forward_pass(made.model, QUERIES, RESPONSES, inputs)
            rewards, _ = made.compute_rewards(SCORES, old, old, mask)
        new, logits, vpreds, _ = made.batched_forward_pass(made.model, QUERIES, RESPONSES, inputs, return_logits=True)
        before = weights(made.model)
        stats = made.train_minibatch(old, values, rewards, new, logits, vpreds, mask)
        assert set(FACTS["loss_statistics"]["scalars"]) <= set(stats)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())


class TestStep:
    def test_statistics(self) -> None:
        made = trainer()
        stats = made.step(QUERIES, RESPONSES, SCORES)
        facts = FACTS["statistics"]
        assert set(facts["scalars"]) | set(facts["arrays"]) <= set(stats)
        for name in facts["scalars"]:
            assert isinstance(stats[name], float), name
            assert np.isfinite(stats[name]), name
        shapes = {"[batch]": (4,), "[batch, tokens]": (4, 5)}
        for name, shape in facts["arrays"].items():
            assert isinstance(stats[name], np.ndarray), name
            assert stats[name].ndim == 1 if shape == "[flat]" else stats[name].shape == shapes[shape], name

    def test_statistics_of_the_batch(self) -> None:
        stats = trainer(settings(init_kl_coef=0.3)).step(QUERIES, RESPONSES, SCORES)
        assert stats["tokens/queries_dist"].tolist() == [3, 2, 4, 1]
        assert stats["tokens/responses_dist"].tolist() == [3, 2, 2, 4]
        assert_close(stats["tokens/queries_len_mean"], 2.5)
        assert_close(stats["tokens/responses_len_mean"], 2.75)
        assert_close(stats["tokens/queries_len_std"], (5 / 3) ** 0.5)
        assert_close(stats["tokens/responses_len_std"], (2.75 / 3) ** 0.5)
        assert_close(stats["ppo/mean_scores"], 0.6875)
        assert_close(stats["ppo/std_scores"], float(np.std([1.0, -0.5, 0.25, 2.0], ddof=1)))
        assert_close(stats["objective/kl_coef"], 0.3)  # the one in force, not the next
        assert_close(stats["objective/kl"], 0.0, tol=1e-4)  # policy and reference are still the same
        assert_close(stats["objective/kl_dist"].sum(), 0.0, tol=1e-4)

    def test_weights_change_and_the_reference_does_not(self) -> None:
        made = trainer()
        before, reference = weights(made.model), weights(made.ref_model)
        made.step(QUERIES, RESPONSES, SCORES)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())
        assert all(torch.equal(tensor, reference[name]) for name, tensor in weights(made.ref_model).items())

    def test_encoder_decoder(self) -> None:
        made = trainer(model=policy(tiny_t5))
        stats = made.step(QUERIES, DECODED, SCORES)
        assert np.isfinite(stats["ppo/loss/total"])
        assert set(FACTS["statistics"]["scalars"]) <= set(stats)

    def test_scores_with_and_without_a_dimension(self) -> None:
        flat = trainer().step(QUERIES, RESPONSES, SCORES)
        one = trainer().step(QUERIES, RESPONSES, [s.reshape(1) for s in SCORES])
        for name in ("ppo/mean_scores", "ppo/std_scores", "ppo/loss/total", "ppo/returns/mean"):
            assert_close(one[name], flat[name])

    def test_checker_returns_the_lists(self) -> None:
        made = trainer()
        checked = made._step_safety_checker(4, QUERIES, RESPONSES, [s.reshape(1) for s in SCORES])
        assert [type(part) for part in checked] == [list] * 3
        for part, given in zip(checked, (QUERIES, RESPONSES, SCORES), strict=True):
            assert [x.tolist() for x in part] == [x.tolist() for x in given]

    @pytest.mark.parametrize(
        ("position", "wrong", "message"),
        [
            (0, QUERIES[:3], "queries"),
            (1, RESPONSES[:3], "responses"),
            (2, SCORES[:3], "scores"),
            (0, [*QUERIES, QUERIES[0]], "queries"),
            (0, tuple(QUERIES), "queries.*list"),
            (0, torch.zeros(4, 3, dtype=torch.int64), "queries.*list"),
            (1, [r.tolist() for r in RESPONSES], "responses.*tensor"),
            (2, [1.0, 2.0, 3.0, 4.0], "scores.*tensor"),
            (2, [*SCORES[:3], torch.ones(1, 1)], "scores"),
            (2, [*SCORES[:3], torch.ones(2)], "scores"),
            (2, [*SCORES[:3], torch.tensor(float("nan"))], "scores.*nan"),
            (1, [*RESPONSES[:3], torch.zeros(0, dtype=torch.int64)], "responses.*empty"),
            (1, [*RESPONSES[:3], torch.ones(1, 2, dtype=torch.int64)], "responses"),
            (1, [*RESPONSES[:3], torch.tensor([0.5])], "responses"),
            (0, [*QUERIES[:3], torch.tensor([61])], "queries.*61"),
            (0, [*QUERIES[:3], torch.ones(64, dtype=torch.int64)], "64"),
        ],
    )
    def test_bad_arguments_leave_the_weights_alone(self, position: int, wrong: Any, message: str) -> None:
        made = trainer()
        before = weights(made.model)
        arguments: list[Any] = [QUERIES, RESPONSES, SCORES]
        arguments[position] = wrong
        with pytest.raises(ValueError, match=message):
            made.step(*arguments)
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())

    def test_gradients_stay_and_are_clipped(self) -> None:
        made = trainer(settings(max_grad_norm=0.01, ppo_epochs=1))
        made.step(QUERIES, RESPONSES, SCORES)
        gradients = [p.grad for p in made.model.parameters() if p.requires_grad]
        assert all(g is not None for g in gradients)
        assert_close(torch.stack([g.norm() for g in gradients]).norm(), 0.01, tol=1e-4)

    def test_learning_rate_is_the_optimizers_current_one(self) -> None:
        model = policy()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        made = trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler)
        seen = [made.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"] for _ in range(3)]
        assert_close(seen, [1e-3, 5e-4, 2.5e-4], tol=1e-9)

    def test_adaptive_coefficient_moves_and_a_fixed_one_does_not(self) -> None:
        adaptive, fixed = trainer(settings()), trainer(settings(adap_kl_ctrl=False))
        for made in (adaptive, fixed):
            made.step(QUERIES, RESPONSES, SCORES)
        # A KL of 0 is as far below the target of 6 as counts: 4 samples at an error of -0.2.
        assert_close(adaptive.kl_ctl.value, 0.2 * (1 - 0.2 * 4 / 10000), tol=1e-9)
        assert fixed.kl_ctl.value == 0.2

    def test_early_stopping_ends_the_epochs(self) -> None:
        taken = []
        for stop in (False, True):
            config = settings(ppo_epochs=8, learning_rate=0.05, early_stopping=stop, target_kl=1e-4)
            made = trainer(config)
            steps: list[int] = []
            made.optimizer.optimizer.register_step_post_hook(lambda *args, steps=steps: steps.append(1))
            made.step(QUERIES, RESPONSES, SCORES)
            taken.append(len(steps))
        assert taken[0] == 16
        assert taken[1] < 16

    def test_same_seed_same_run(self) -> None:
        runs = [trainer(settings(mini_batch_size=1)) for _ in range(2)]
        stats = [[made.step(QUERIES, RESPONSES, SCORES) for _ in range(2)][-1] for made in runs]
        assert stats[0]["ppo/loss/total"] == stats[1]["ppo/loss/total"]
        assert all(
            torch.equal(a, b) for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True)
        )


class TestGenerate:
    def test_one_query(self) -> None:
        made = trainer()
        out = made.generate(QUERIES[0], max_new_tokens=5, do_sample=False, eos_token_id=-1)
        assert out.shape == (1, 8)
        assert out[0, :3].tolist() == [3, 4, 5]
        alone = made.generate(QUERIES[0], return_prompt=False, max_new_tokens=5, do_sample=False, eos_token_id=-1)
        assert alone.tolist() == out[:, 3:].tolist()

    @pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batched_equals_one_by_one(self, build: Callable[..., Any], side: str) -> None:
        model = policy(build) if build is tiny_t5 else policy(build, initializer_range=0.5)
        made = trainer(model=model, tokenizer=tiny_tokenizer(padding_side=side))
        greedy = {"max_new_tokens": 6, "do_sample": False}
        for return_prompt in (True, False):
            batched = made.generate(QUERIES, batch_size=3, return_prompt=return_prompt, **greedy)
            alone = made.generate(QUERIES, batch_size=1, return_prompt=return_prompt, **greedy)
            single = [made.generate(q, return_prompt=return_prompt, **greedy).squeeze(0) for q in QUERIES]
            assert isinstance(batched, list)
            assert [x.tolist() for x in batched] == [x.tolist() for x in alone] == [x.tolist() for x in single]
            assert all(x.dim() == 1 for x in batched)
        assert made.tokenizer.padding_side == side

    def test_prompt_stands_before_the_response_of_a_decoder(self) -> None:
        made = trainer()
        greedy = {"max_new_tokens": 4, "do_sample": False}
        whole, responses = (made.generate(QUERIES, return_prompt=p, **greedy) for p in (True, False))
        for query, both, response in zip(QUERIES, whole, responses, strict=True):
            assert both.tolist() == query.tolist() + response.tolist()

    def test_response_of_an_encoder_decoder_begins_with_its_start_token(self) -> None:
        made = trainer(model=policy(tiny_t5))
        responses = made.generate(QUERIES, max_new_tokens=4, do_sample=False)
        assert all(int(r[0]) == 0 for r in responses)
        made.step(QUERIES, responses, SCORES)

    def test_the_usual_settings_warn_of_nothing(self) -> None:
        made = trainer()
        usual = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1, "eos_token_id": -1}
        for response in made.generate(QUERIES, return_prompt=False, length_sampler=LengthSampler(4, 6), **usual):
            assert len(response) in (4, 5)
        response = made.generate(QUERIES[0], max_new_tokens=7, **usual)
        assert response.shape == (1, 10)

    def test_lengths_come_from_the_sampler(self) -> None:
        made = trainer()
        lengths = iter([2, 5, 3, 4])
        settings = {"do_sample": False, "eos_token_id": -1}
        out = made.generate(QUERIES, lambda: next(lengths), 1, False, **settings)
        assert [len(r) for r in out] == [2, 5, 3, 4]

    def test_a_stop_token_ends_the_response_and_stays_in_it(self) -> None:
        made = trainer(model=policy(initializer_range=0.5))
        greedy = {"max_new_tokens": 6, "do_sample": False, "return_prompt": False}
        free = [r.tolist() for r in made.generate(QUERIES, eos_token_id=-1, **greedy)]
        stop = free[0][2]
        for response, unstopped in zip(made.generate(QUERIES, eos_token_id=stop, **greedy), free, strict=True):
            end = unstopped.index(stop) + 1 if stop in unstopped else len(unstopped)
            assert response.tolist() == unstopped[:end]

    def test_mode_of_the_model_is_kept(self) -> None:
        made = trainer()
        made.model.train()
        made.generate(QUERIES, max_new_tokens=2, do_sample=False)
        assert made.model.training

    @pytest.mark.parametrize("wrong", [torch.zeros(2, 3, dtype=torch.int64), [QUERIES[0][None]], [[3, 4]], "w3"])
    def test_what_is_no_query(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="query_tensor"):
            trainer().generate(wrong, max_new_tokens=2)


BATCH = {"query": ["w3", "w4", "w5", "w6"], "response": ["a | b", "c\nd", "<e>", "f"]}


class TestLogging:
    def logged(self, made: PPOTrainer, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        monkeypatch.setattr(made.accelerator, "log", lambda values, **kwargs: seen.update(values))
        made.log_stats(*arguments)
        return seen

    @pytest.mark.parametrize("rewards", [SCORES, [s.reshape(1) for s in SCORES], torch.stack(SCORES)])
    def test_log_stats_adds_the_rewards(self, rewards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.logged(trainer(), monkeypatch, {"objective/kl": 1.5}, BATCH, rewards)
        assert seen["objective/kl"] == 1.5
        assert_close(seen["env/reward_mean"], 0.6875)
        assert_close(seen["env/reward_std"], float(np.std([1.0, -0.5, 0.25, 2.0], ddof=1)))
        assert np.asarray(seen["env/reward_dist"]).tolist() == [1.0, -0.5, 0.25, 2.0]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        config = settings(
            log_with="tensorboard",
            tracker_project_name="reviews",
            tracker_kwargs={"tensorboard": {"flush_secs": 5}},
            project_kwargs={"logging_dir": str(tmp_path)},
            accelerator_kwargs={"step_scheduler_with_optimizer": False},
        )
        made = trainer(config)
        assert made.accelerator.step_scheduler_with_optimizer is False
        for _ in range(2):
            made.log_stats(made.step(QUERIES, RESPONSES, SCORES), BATCH, SCORES)
        made.accelerator.end_training()
        events = EventAccumulator(str(tmp_path / "reviews")).Reload()
        assert {"objective/kl", "ppo/loss/total", "env/reward_mean", "ppo/learning_rate"} <= set(
            events.Tags()["scalars"]
        )
        assert len(events.Scalars("objective/kl")) == 2


class TestSaving:
    def test_model_tokenizer_and_card(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        made = trainer()
        made.step(QUERIES, RESPONSES, SCORES)
        made.save_pretrained(str(tmp_path / "run"))
        assert "PPO" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8").upper()
        again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "run"))
        for (name, mine), (other, theirs) in zip(weights(made.model).items(), weights(again).items(), strict=True):
            assert name == other
            assert torch.equal(mine, theirs), name
        plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "run"))
        head = made.model.pretrained_model.transformer.h[0].mlp.c_fc.weight
        assert torch.equal(plain.transformer.h[0].mlp.c_fc.weight, head)
        assert AutoTokenizer.from_pretrained(str(tmp_path / "run")).eos_token == "w1"

    def test_model_card_has_a_title(self, tmp_path: Path) -> None:
        trainer().create_model_card(str(tmp_path), model_name="Kind reviews")
        assert "# Kind reviews" in (tmp_path / "README.md").read_text(encoding="utf-8")


class TestSubclasses:
    def test_an_overridden_reward_is_heard(self) -> None:
        class Doubled(PPOTrainer):
            def compute_rewards(self, scores: Any, *args: Any, **kwargs: Any) -> Any:
                return super().compute_rewards([2 * s for s in scores], *args, **kwargs)

        plain = trainer(settings(gamma=1.0, lam=1.0, init_kl_coef=0.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            doubled = Doubled(settings(gamma=1.0, lam=1.0, init_kl_coef=0.0), policy(), None, tiny_tokenizer())
        returns = [made.step(QUERIES, RESPONSES, SCORES)["ppo/returns/mean"] for made in (plain, doubled)]
        assert_close(returns[1], 2 * returns[0])

    def test_an_overridden_loss_is_heard(self) -> None:
        class Still(PPOTrainer):
            def loss(self, *args: Any, **kwargs: Any) -> Any:
                policy_loss, value_loss, stats = super().loss(*args, **kwargs)
                return 0 * policy_loss, 0 * value_loss, stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = Still(settings(), policy(), None, tiny_tokenizer())
        before = weights(made.model)
        made.step(QUERIES, RESPONSES, SCORES)
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(made.model).items())


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first example, word for word, in a directory that holds a GPT-2 folder named gpt2."""
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    example = """
import torch
from transformers import AutoTokenizer
from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead, create_reference_model
from trl.core import respond_to_batch
model = AutoModelForCausalLMWithValueHead.from_pretrained('gpt2')
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained('gpt2')
ppo_config = PPOConfig(batch_size=1)
query_txt = "This morning I went to the "
query_tensor = tokenizer.encode(query_txt, return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor)
ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)
reward = [torch.tensor(1.0)]
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
"""
    names: dict[str, Any] = {}
    exec(example, names)
    before = create_reference_model(policy())  # the folder's weights
    after = names["model"].pretrained_model
    assert names["response_tensor"].shape == (1, 20)
    assert any(
        not torch.equal(p, q) for p, q in zip(after.parameters(), before.pretrained_model.parameters(), strict=True)
    )
    assert_close(names["train_stats"]["ppo/mean_scores"], 1.0)
    assert names["train_stats"]["tokens/responses_len_mean"] == 20
    assert np.isfinite(names["train_stats"]["ppo/loss/total"])
