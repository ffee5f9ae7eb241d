"""Legal but odd use of the trainer: the numbers are right, or an error says why not."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor
from transformers import AutoTokenizer
from transformers.optimization import Adafactor

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.models.lora import lora
from tests.trainer.managed import PROMPTS
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, assets
from trl.kernels.door import kernels_enabled
from trl.models import abilities, create_reference_model, evaluate
from trl.trackers import read_completions, read_metrics
from trl.types import Rollout


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(first: PPOTrainer, second: PPOTrainer) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights(first).values(), weights(second).values(), strict=True))


# accelerate's own accumulation -------------------------------------------------------------------------------------------


@pytest.fixture
def plainly_trained(make_trainer: Any, make_batch: Any) -> PPOTrainer:
    trainer = make_trainer()
    trainer.step(*make_batch())
    return trainer


def test_a_launchers_accumulation_divides_no_gradient(
    make_trainer: Any, make_batch: Any, plainly_trained: PPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as `accelerate launch` sets it
    trainer = make_trainer()
    assert trainer.accelerator.gradient_accumulation_steps == 4
    trainer.step(*make_batch())
    assert same(trainer, plainly_trained)
    monkeypatch.undo()
    Accelerator()  # the state is the process's


@pytest.mark.parametrize("own", [False, True], ids=["step", "train_minibatch"])
def test_another_accelerators_accumulation_drops_no_step(own: bool, make_trainer: Any, make_batch: Any) -> None:
    class Own(PPOTrainer):
        def train_minibatch(self, *args: Any, **kwargs: Any) -> Any:
            return super().train_minibatch(*args, **kwargs)

    kind = Own if own else PPOTrainer
    GradientState._reset_state()  # a test that was interrupted within an epoch leaves its data loader there
    trainer, expected = make_trainer(trainer_class=kind), make_trainer(trainer_class=kind)
    expected.step(*make_batch())
    other = Accelerator(gradient_accumulation_steps=4)
    try:
        with other.accumulate(torch.nn.Linear(1, 1)):
            assert not trainer.accelerator.sync_gradients
            trainer.step(*make_batch())
            assert not other.sync_gradients
            assert other.gradient_accumulation_steps == 4
    finally:
        other.sync_gradients, other.gradient_accumulation_steps = True, 1
    assert same(trainer, expected)


def test_a_plugin_for_accumulation_is_refused() -> None:
    with pytest.raises(ValueError, match="not gradient_accumulation_plugin in accelerator_kwargs"):
        PPOConfig(batch_size=4, accelerator_kwargs={"gradient_accumulation_plugin": object()})


# Models ------------------------------------------------------------------------------------------------------------------


def test_a_reference_that_would_learn_with_the_model_is_refused(make_batch: Any) -> None:
    base = tiny_gpt2()
    model, other = (AutoModelForCausalLMWithValueHead.from_pretrained(base) for _ in range(2))
    config = PPOConfig(batch_size=4)
    for reference in (model, other):
        with pytest.raises(ValueError, match="ref_model shares 28 trained parameters with the model"):
            PPOTrainer(config, model, reference, tiny_tokenizer())
    shared = create_reference_model(model, num_shared_layers=1)  # frozen in both
    PPOTrainer(config, model, shared, tiny_tokenizer())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))], ids=["copy", "pickle"]
)
def test_a_copied_trainer_learns_what_the_original_would(
    how: Any, dtype: str, make_trainer: Any, make_batch: Any
) -> None:
    GradientState._reset_state()  # of accelerate: a loader that an earlier test left in the middle cannot be pickled
    original = make_trainer(dtype=dtype)
    original.step(*make_batch())
    twin, before = how(original), weights(original)
    twin.step(*make_batch(seed=1))
    assert all(torch.equal(p, before[name]) for name, p in weights(original).items())
    original.step(*make_batch(seed=1))
    assert same(twin, original)


def _sum_of_logprobs(model: Any, tokens: list[int]) -> float:
    """By plain transformers, one pass without padding."""
    with torch.no_grad():
        logits = model.pretrained_model(input_ids=torch.tensor([tokens])).logits[0]
    return sum(float(torch.log_softmax(logits[i], dim=-1)[token]) for i, token in enumerate(tokens[1:]))


@pytest.mark.parametrize("change", ["lora", "hook"])
def test_an_output_embedding_that_changes_after_it_was_tried(change: str) -> None:
    base, tokens = tiny_llama(), [4, 9, 17, 33]
    rollout = Rollout(
        tokens=torch.tensor([tokens]),
        attention=torch.ones(1, 4, dtype=torch.bool),
        mask=torch.ones(1, 3, dtype=torch.bool),
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    assert abilities(model).projects == kernels_enabled()
    assert_close(evaluate(model, rollout).logprobs.sum(), _sum_of_logprobs(model, tokens))
    before = _sum_of_logprobs(model, tokens)
    if change == "lora":
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=adapter)
    else:
        model.pretrained_model.lm_head.register_forward_hook(lambda module, args, out: out * 3)
    assert abs(_sum_of_logprobs(model, tokens) - before) > 1e-3
    assert_close(evaluate(model.eval(), rollout).logprobs.sum(), _sum_of_logprobs(model, tokens))


def test_weights_that_the_optimizer_does_not_know_are_named_once(make_trainer: Any, make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    layer = model.pretrained_model.transformer.h[0]
    layer.requires_grad_(False)
    trainer = make_trainer(model=model)
    trainer.step(*make_batch())
    layer.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"12 parameters, such as .*h\.0\..* its optimizer does not hold them"):
        trainer.step(*make_batch(seed=1))
    trainer.step(*make_batch(seed=2))  # a second warning would be an error


def test_an_optimizer_that_wants_a_closure_is_refused(make_trainer: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        make_trainer(model=model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_that_makes_its_own_learning_rate(make_trainer: Any, make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    trainer = make_trainer(model=model, optimizer=Adafactor(model.parameters()))  # relative_step, lr=None
    before = weights(trainer)
    assert math.isnan(trainer.step(*make_batch())["ppo/learning_rate"])
    assert not torch.equal(weights(trainer)["v_head.summary.weight"], before["v_head.summary.weight"])


@pytest.mark.parametrize(("dtype", "underflows"), [(torch.float16, True), (torch.bfloat16, False)])
def test_what_narrow_weights_do_to_adam_is_told(
    dtype: torch.dtype, underflows: bool, make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(model=AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2().to(dtype)))
    assert f"the trained weights are {dtype}" in caplog.text
    assert ("second moment underflows to 0" in caplog.text) == underflows


# Methods ------------------------------------------------------------------------------------------------------------------


def test_masks_of_an_own_forward_pass_are_heard(make_trainer: Any, make_batch: Any) -> None:
    class FirstTokenOff(PPOTrainer):
        def batched_forward_pass(self, *args: Any, **kwargs: Any) -> Any:
            logprobs, logits, values, masks = super().batched_forward_pass(*args, **kwargs)
            return logprobs, logits, values, masks * (masks.cumsum(dim=1) > 1)

    queries, responses, scores = make_batch()
    off = [torch.tensor([0] + [1] * (len(r) - 1)) for r in responses]
    own, told = make_trainer(trainer_class=FirstTokenOff), make_trainer()
    heard, expected = own.step(queries, responses, scores), told.step(queries, responses, scores, response_masks=off)
    for name in ("objective/kl", "objective/entropy", "ppo/mean_non_score_reward", "ppo/returns/mean", "ppo/grad_norm"):
        assert_close(heard[name], expected[name])
    for p, q in zip(weights(own).values(), weights(told).values(), strict=True):
        assert_close(p, q, 1e-4)

    ends = [torch.tensor([1] * (len(r) - 1) + [0]) for r in responses]
    both = [a * b for a, b in zip(off, ends, strict=True)]
    heard = make_trainer(trainer_class=FirstTokenOff).step(queries, responses, scores, response_masks=ends)
    expected = make_trainer().step(queries, responses, scores, response_masks=both)
    assert_close(heard["objective/entropy"], expected["objective/entropy"])


def test_a_method_that_is_replaced_on_the_trainer_itself_is_heard(make_trainer: Any, make_batch: Any) -> None:
    trainer, calls = make_trainer(), []
    theirs = trainer.loss

    def loss(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return theirs(*args, **kwargs)

    trainer.loss = loss
    trainer.step(*make_batch())
    assert len(calls) == 8  # 4 samples, 2 at a time, 4 epochs


def test_model_inputs_with_other_tokens_are_refused(make_trainer: Any, make_batch: Any) -> None:
    class Longer(PPOTrainer):
        def prepare_model_inputs(self, queries: Any, responses: Any) -> Any:
            return super().prepare_model_inputs([torch.cat([q[:1], q]) for q in queries], responses)

    class Wider(PPOTrainer):
        def prepare_model_inputs(self, queries: Any, responses: Any) -> Any:
            inputs = super().prepare_model_inputs(queries, responses)
            return inputs | {"token_type_ids": inputs["input_ids"]}

    with pytest.raises(ValueError, match="row 0 of the model inputs has 6 tokens, but its query and response give 5"):
        make_trainer(trainer_class=Longer).step(*make_batch())
    with pytest.raises(ValueError, match="returned token_type_ids, which forward passes do not read"):
        make_trainer(trainer_class=Wider).step(*make_batch())


# Arguments ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_rewards", torch.tensor([1e39], dtype=torch.float64), "not finite in float32"),
        ("token_rewards", torch.tensor([1j]), "has dtype torch.complex64; expected real numbers"),
        ("sampler_logprobs", torch.tensor([0.7]), "0.7; log-probabilities must be at most 0"),
    ],
)
def test_numbers_per_token_that_cannot_be_meant(
    name: str, value: Tensor, message: str, make_trainer: Any, make_batch: Any
) -> None:
    trainer, (queries, responses, scores) = make_trainer(), make_batch()
    before = weights(trainer)
    with pytest.raises(ValueError, match=rf"{name}\[0\].*{message}"):
        trainer.step(queries, responses, scores, **{name: [value.expand(len(r)) for r in responses]})
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer).items())


def test_complex_scores_are_refused(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch()
    with pytest.raises(ValueError, match=r"scores\[0\] is .*j\): scores must be real"):
        make_trainer().step(queries, responses, [s + 1j for s in scores])


def test_a_start_token_that_was_cut_off_is_told(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch(seq2seq=True)
    with pytest.warns(UserWarning, match="4 of 4 responses do not begin with the decoder's start token 0"):
        make_trainer(seq2seq=True).step(queries, [r[1:] for r in responses], scores)


def test_a_denominator_below_one_is_used_as_it_is(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch()
    masks = [torch.zeros(len(r)) for r in responses]
    masks[0][:2] = 1  # 2 tokens in 4 optimizer steps: 1/2 on average
    norms = {}
    for denominator in ("minibatch", "batch"):
        trainer = make_trainer(mini_batch_size=1, ppo_epochs=1, loss_denominator=denominator)
        norms[denominator] = trainer.step(queries, responses, scores, response_masks=masks)["ppo/grad_norm"]
    assert_close(norms["batch"], 4 * norms["minibatch"])


def test_statistics_are_float32_whatever_the_default_is(make_trainer: Any, make_batch: Any) -> None:
    expected = make_trainer().step(*make_batch())
    trainer, batch = make_trainer(), make_batch()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = trainer.step(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("ppo/policy/entropy", "ppo/loss/value", "ppo/returns/var", "ppo/val/vpred", "ppo/grad_norm"):
        assert_close(found[name], expected[name])


def test_what_ends_a_response_in_a_managed_run_is_no_missing_end(make_trainer: Any) -> None:
    trainer = make_trainer(missing_eos_penalty=100.0, init_kl_coef=0.0)
    ends = list(range(3, 60))
    generation = {"max_new_tokens": 40, "eos_token_id": ends}
    trainer.train(
        PROMPTS, reward=lambda completions: [0.0] * len(completions), steps=1, generation=generation, progress=False
    )
    experience = trainer.last_experience
    last = [
        int(tokens[attention][-1]) for tokens, attention in zip(experience.rollout.tokens, experience.rollout.attention)
    ]
    assert set(last) <= set(ends), "a chance of 1e-50 of one that does not end"
    assert experience.scores.tolist() == [0.0] * 4
    assert trainer.config.stop_token_ids is None


@pytest.mark.parametrize("form", [["l"], "l"])
def test_a_response_that_a_stop_string_ended_is_finished(form: Any, tmp_path: Path) -> None:
    folder = assets.path("tiny-gpt2-reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    config = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1)
    arguments: dict[str, Any] = {
        "reward": lambda completions: [float("l" in text) for text in completions],
        "steps": 1,
        "generation": {"max_new_tokens": 3, "stop_strings": form},
        "eval_prompts": ["The film", "One", "Two"],
        "progress": False,
    }
    PPOTrainer(config, model, None, tokenizer).train(["This movie"], run_dir=tmp_path, **arguments)
    ended = {(bool(one["score"]), one["finish_reason"]) for one in read_completions(tmp_path, 1)}
    assert ended == {(True, "stop"), (False, "length")}
    (row,) = read_metrics(tmp_path)
    assert row["eval/finished"] == row["eval/score_mean"]
    priced = PPOTrainer(replace(config, missing_eos_penalty=1.0), model, None, tokenizer)
    with pytest.raises(ValueError, match=r"missing_eos_penalty=1 .* stop_strings=\('l',\)"):
        priced.train(["This movie"], **arguments)


def test_optimizer_steps_of_one_token_each_are_told(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch()
    responses = [r[:1] for r in responses]
    with pytest.warns(
        UserWarning, match="every optimizer step trains on a single token, whose whitened advantage is 0"
    ):
        make_trainer(mini_batch_size=1).step(queries, responses, scores)
    make_trainer(mini_batch_size=2).step(queries, responses, scores)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_an_adapter_that_takes_no_part_is_refused(state: str, make_trainer: Any, make_batch: Any) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(lora(tiny_gpt2()), summary_dropout_prob=0.0)
    trainer, adapted = make_trainer(model=model), model.pretrained_model
    trainer.step(*make_batch())
    adapted.base_model.disable_adapter_layers() if state == "disabled" else adapted.merge_adapter()
    with pytest.raises(ValueError, match=rf"the adapter of .*c_attn is {state} and would get no gradient"):
        trainer.step(*make_batch())
    adapted.base_model.enable_adapter_layers() if state == "disabled" else adapted.unmerge_adapter()
    before = weights(trainer)
    trainer.step(*make_batch())
    assert any(not torch.equal(p, before[name]) for name, p in weights(trainer).items() if "lora_B" in name)


def test_layers_to_share_with_an_adapters_reference_are_told_to_be_ignored() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(lora(tiny_gpt2()))
    with pytest.warns(UserWarning, match="num_shared_layers=1 is ignored"):
        PPOTrainer(PPOConfig(batch_size=4), model, None, tiny_tokenizer(), num_shared_layers=1)
