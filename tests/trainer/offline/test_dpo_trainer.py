"""DPO through the trainer itself: brute-force losses in float64, gradients by hand, references, resuming, arguments."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functional.oracles import f64
from tests.helpers import EOS, assert_close, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tests.trainer.offline.preferences import (
    IDS,
    ROWS,
    answer_logprob,
    chat_tokenizer,
    poisoned,
    settings,
    stirred,
    value,
)
from trl import DPOConfig, DPOTrainer
from trl.models.adapters import attach_adapter
from trl.trainer.offline.pair_losses import LOSSES

KEYS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
}


def trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    arguments = ("ref_model", "train_dataset", "eval_dataset", "peft_config", "optimizers", "data_collator")
    given = {name: options.pop(name) for name in arguments if name in options}
    tokenizer = options.pop("processing_class", None) or tiny_tokenizer()
    return DPOTrainer(
        tiny_llama() if model is None else model,
        args=settings(DPOConfig, folder, **options),
        processing_class=tokenizer,
        **({"train_dataset": ROWS} | given),
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, n: int, m: int) -> Tensor:  # noqa: E741
    """The losses of the papers for one pair, β = 0.3, ε = 0.1, γ = 0.5, as one would write them down."""
    beta, logsigmoid = 0.3, torch.nn.functional.logsigmoid
    if name == "sigmoid":
        return -logsigmoid(beta * ((w - rw) - (l - rl)))
    if name == "sigmoid_norm":
        return -logsigmoid(beta * ((w - rw) / n - (l - rl) / m))
    if name == "robust":
        x = beta * ((w - rw) - (l - rl))
        return (-0.9 * logsigmoid(x) + 0.1 * logsigmoid(-x)) / 0.8
    if name == "hinge":
        return torch.relu(1 - beta * ((w - rw) - (l - rl)))
    if name == "ipo":
        return ((w - rw) / n - (l - rl) / m - 1 / (2 * beta)) ** 2
    if name == "apo_zero":
        return 1 - torch.sigmoid(beta * (w - rw)) + torch.sigmoid(beta * (l - rl))
    if name == "apo_down":
        return torch.sigmoid(beta * (w - rw)) + 1 - torch.sigmoid(beta * ((w - rw) - (l - rl)))
    if name == "simpo":
        return -logsigmoid(beta * (w / n - l / m) - 0.5)
    assert name == "odds_ratio"
    p, q = (w / n).exp(), (l / m).exp()
    return -logsigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))


def hand_loss(name: str, policy: Any, reference: Any, rows: Any = IDS) -> Tensor:
    losses, chosen, tokens = [], 0.0, 0
    for prompt, good, bad in rows:
        w, l = answer_logprob(policy, prompt, good), answer_logprob(policy, prompt, bad)  # noqa: E741
        with torch.no_grad():
            rw, rl = answer_logprob(reference, prompt, good), answer_logprob(reference, prompt, bad)
        chosen, tokens = chosen - w, tokens + len(good)
        if name != "sft":
            losses.append(by_hand(name, w, l, rw, rl, len(good), len(bad)))
    return chosen / tokens if name == "sft" else torch.stack(losses).mean()  # type: ignore[return-value]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5])
def test_losses_are_brute_force_in_float64(make: Any, tmp_path: Path) -> None:
    """Every loss, padding on either side, anything on the padding."""
    reference = make().double()
    policy = stirred(reference)
    it = trainer(tmp_path, policy, ref_model=reference, beta=0.3, simpo_gamma=0.5, precompute_ref_log_probs=False)
    batch = it.data_collator(it.train_dataset)
    for name in LOSSES:
        it.args.loss_type, it.args.label_smoothing = [name], 0.1 if name == "robust" else 0.0
        expected = hand_loss(name, policy, reference)
        for side in ("left", "right"):
            assert_close(it.compute_loss(policy, poisoned(batch, side)), expected, 1e-9)


def test_several_losses_are_added_with_their_weights(tmp_path: Path) -> None:
    reference = tiny_llama().double()
    policy = stirred(reference)
    options = {"loss_type": ["sft", "odds_ratio", "sigmoid"], "loss_weights": [1.0, 0.2, 0.5], "beta": 0.3}
    it = trainer(tmp_path, policy, ref_model=reference, **options)
    expected = sum(
        weight * hand_loss(name, policy, reference)
        for name, weight in zip(options["loss_type"], options["loss_weights"], strict=True)  # type: ignore[call-overload]
    )
    assert_close(it.compute_loss(policy, it.data_collator(it.train_dataset)), expected, 1e-6)  # float32 reference


def test_conservative_dpo(tmp_path: Path) -> None:
    reference = tiny_llama().double()
    policy = stirred(reference)
    it = trainer(tmp_path, policy, ref_model=reference, label_smoothing=0.2, precompute_ref_log_probs=False)
    expected = []
    for prompt, good, bad in IDS:
        w, l, rw, rl = (  # noqa: E741
            value(model, prompt, answer) for model in (policy, reference) for answer in (good, bad)
        )
        x = 0.1 * ((w - rw) - (l - rl))
        expected.append(-0.8 * math.log(sigma(x)) - 0.2 * math.log(sigma(-x)))
    assert_close(it.compute_loss(policy, it.data_collator(it.train_dataset)), f64(sum(expected) / 3), 1e-9)


def test_a_step_is_the_gradient_by_hand_however_it_is_cut(tmp_path: Path) -> None:
    """Three rows as batches of two and one: the mean over three, not the mean of two means."""
    reference = tiny_llama()
    policy = stirred(reference)
    expected = copy.deepcopy(policy)
    (hand_loss("sigmoid", expected, reference)).backward()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    it = trainer(
        tmp_path,
        policy,
        ref_model=reference,
        optimizers=(optimizer, constant),
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        beta=0.3,
    )
    it.train()
    for name, parameter in expected.named_parameters():
        assert_close(before[name] - policy.get_parameter(name), parameter.grad, 2e-6)


# --- The reference ---


def first_row(it: Any) -> dict[str, Any]:
    it.train()
    return it.state.log_history[1]  # after one step, the policy is no longer its reference


def test_every_way_to_the_reference_gives_the_same_run(tmp_path: Path) -> None:
    cached = trainer(tmp_path, learning_rate=1e-2)
    copied = trainer(tmp_path, learning_rate=1e-2, precompute_ref_log_probs=False)
    given = trainer(tmp_path, learning_rate=1e-2, ref_model=tiny_llama())
    assert cached.ref_model is None and cached.caches_reference
    assert copied.ref_model is not copied.model and not copied.caches_reference
    assert not any(p.requires_grad for p in copied.ref_model.parameters())
    first, *others = [first_row(it) for it in (cached, copied, given)]
    assert first["rewards/margins"] != 0
    for row in others:
        assert row.keys() == first.keys()
        assert_close([row[key] for key in sorted(row)], [first[key] for key in sorted(row)], 1e-5)


def test_an_adapter_s_base_is_its_reference(tmp_path: Path) -> None:
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    off = trainer(tmp_path, peft_config=lora, learning_rate=1e-2)
    once = trainer(tmp_path, peft_config=lora, learning_rate=1e-2, precompute_ref_log_probs=True)
    assert off.ref_model is None and not off.caches_reference
    assert once.ref_model is None and once.caches_reference
    row, other = first_row(off), first_row(once)
    assert row["rewards/margins"] != 0
    for key in KEYS:
        assert_close(row[key], other[key], 1e-5)
    trained = {name for name, p in off.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_a_trained_adapter_is_compared_with_itself_as_it_was(tmp_path: Path) -> None:
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for once in (None, False):
        it = trainer(tmp_path, attach_adapter(tiny_llama(), lora), precompute_ref_log_probs=once, max_steps=1)
        it.train()
        assert_close(it.state.log_history[0]["loss"], math.log(2))


def test_data_sets_that_come_later(tmp_path: Path) -> None:
    it = trainer(tmp_path, eval_dataset={"a": ROWS, "b": ROWS[:1]})
    assert it.evaluate([*ROWS])["eval_rewards/chosen"] == 0  # the policy is still its reference
    it.train()
    assert {"eval_a_loss", "eval_b_rewards/margins"} <= it.evaluate().keys()
    with pytest.raises(ValueError, match=r"eval_dataset was not given to the constructor.*pass a ref_model"):
        it.evaluate([*ROWS])
    with_model = trainer(tmp_path, ref_model=tiny_llama())
    with_model.train()
    assert with_model.evaluate([*ROWS])["eval_rewards/chosen"] != 0


def test_columns_that_a_data_set_has_already_are_the_reference(tmp_path: Path) -> None:
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    model = tiny_llama()
    it = trainer(tmp_path, model, train_dataset=rows)
    assert it.train_dataset[0]["ref_chosen_logps"] == -1.0
    it.train()
    expected = [0.1 * (value(tiny_llama(), prompt, good) + 1.0) for prompt, good, _ in (IDS[i] for i in range(3))]
    assert min(expected) - 0.1 < it.state.log_history[0]["rewards/chosen"] < max(expected) + 0.1


def test_losses_without_a_reference_keep_none(tmp_path: Path) -> None:
    for options in ({"loss_type": "simpo"}, {"loss_type": ["sft", "odds_ratio"]}, {"reference_free": True}):
        it = trainer(tmp_path, precompute_ref_log_probs=False, **options)
        assert it.ref_model is None and "ref_chosen_logps" not in it.train_dataset[0]
        it.train()
        assert it.state.log_history[0]["rewards/chosen"] < 0


def test_a_collator_that_drops_the_reference(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    batch = it.data_collator(it.train_dataset)
    del batch["ref_chosen_logps"]
    with pytest.raises(ValueError, match="data_collator leaves out ref_chosen_logps"):
        it.compute_loss(it.model, batch)


# --- Metrics ---


def test_metrics_by_hand(tmp_path: Path) -> None:
    reference = tiny_llama()
    policy = stirred(reference)
    it = trainer(tmp_path, policy, ref_model=reference, eval_dataset=ROWS, per_device_eval_batch_size=2, beta=0.3)
    metrics = it.evaluate()
    chosen, rejected, logps, means = [], [], [], []
    for prompt, good, bad in IDS:
        w, l, rw, rl = (  # noqa: E741
            value(model, prompt, answer) for model in (policy, reference) for answer in (good, bad)
        )
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt + good])).logits[0]
        chosen.append(0.3 * (w - rw))
        rejected.append(0.3 * (l - rl))
        logps.append(w)
        means += logits[len(prompt) - 1 : -1].mean(-1).tolist()
    right = [a > b for a, b in zip(chosen, rejected, strict=True)]
    expected = {
        "rewards/chosen": sum(chosen) / 3,
        "rewards/rejected": sum(rejected) / 3,
        "rewards/margins": (sum(chosen) - sum(rejected)) / 3,
        "rewards/accuracies": sum(right) / 3,
        "logps/chosen": sum(logps) / 3,
        "logits/chosen": sum(means) / len(means),
        "loss": float(hand_loss("sigmoid", policy, reference).detach()),
    }
    for name, number in expected.items():
        assert_close(metrics[f"eval_{name}"], number)
    assert {f"eval_{key}" for key in KEYS} <= metrics.keys()
    assert it.predict([*ROWS]).predictions.shape == (3, 2)


def test_rows_of_the_log(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    it.train()
    row = it.state.log_history[0]
    assert KEYS | {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch"} <= row.keys()
    assert_close(row["loss"], math.log(2))
    assert row["rewards/margins"] == 0 and row["rewards/accuracies"] == 0


# --- Data ---


def test_tokens_of_plain_rows(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    got = [
        tuple(row[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in it.train_dataset
    ]
    assert got == IDS


def test_chats_are_rendered_and_get_no_further_end(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "w5"}],
            "chosen": [{"role": "assistant", "content": "w6 w7"}],
            "rejected": [{"role": "assistant", "content": "w8"}],
        }
    ]
    implicit = [{name: rows[0]["prompt"] + rows[0][name] for name in ("chosen", "rejected")}]
    for data in (rows, implicit):
        it = trainer(tmp_path, train_dataset=data, processing_class=chat_tokenizer(), per_device_train_batch_size=1)
        (row,) = it.train_dataset
        assert row["prompt_ids"].tolist() == [40, 5, 42, 41]
        assert row["chosen_ids"].tolist() == [6, 7, 42] and row["rejected_ids"].tolist() == [8, 42]


def test_lengths(tmp_path: Path) -> None:
    it = trainer(tmp_path, max_length=5, max_prompt_length=2, truncation_mode="keep_end")
    assert it.train_dataset[0]["prompt_ids"].tolist() == [6, 7]
    assert it.train_dataset[1]["rejected_ids"].tolist() == [6, 7, 8, 9, EOS]
    assert it.train_dataset[1]["prompt_ids"].tolist() == []


def test_a_bad_row_is_shown(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "w5", "chosen": 7, "rejected": "w6"}]
    with pytest.raises(ValueError, match=r"train_dataset\[3\], column .chosen., is 7 .*expected a text"):
        trainer(tmp_path, train_dataset=rows)


def test_a_model_and_rows_from_files(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    it = DPOTrainer(
        str(tmp_path / "model"), args=settings(DPOConfig, tmp_path / "out", max_steps=1), train_dataset=str(data)
    )
    it.train()
    it.save_model()
    assert (tmp_path / "out/model.safetensors").exists()


# --- Resuming ---


def test_resumed_is_as_if_it_never_stopped(tmp_path: Path) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "half/checkpoint-2")
    resumed = trainer(tmp_path / "half", **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    rows = [[row for row in it.state.log_history if "loss" in row][2:] for it in (whole, resumed)]
    assert rows[0] == rows[1]


# --- Arguments ---


def test_arguments_of_older_releases(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    it = DPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args=settings(TrainingArguments, tmp_path, remove_unused_columns=False),
        beta=0.25,
        loss_type="hinge",
        max_length=6,
        max_prompt_length=2,
        train_dataset=ROWS,
        tokenizer=tiny_tokenizer(),
        label_pad_token_id=-100,
        padding_value=0,
        truncation_mode="keep_end",
        is_encoder_decoder=False,
    )
    assert (it.args.beta, it.args.loss_type, it.args.max_length) == (0.25, ["hinge"], 6)
    it.train()
    assert_close(it.state.log_history[0]["loss"], 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "aot"}, "loss_type='aot' is a loss of TRL that is not supported"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "has 1 weights, but .* has 2 losses"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing=0.1 does not change loss_type"),
        ({"beta": 0.0}, "beta=0.0 must be > 0"),
        ({"sync_ref_model": True}, "sync_ref_model=True is not supported"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type='js_divergence' is not supported"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 is not supported"),
        ({"use_weighting": True}, "use_weighting=True is not supported"),
        ({"padding_free": True}, "padding_free=True is not supported: rows are packed"),
        ({"rpo_alpha": 1.0}, "rpo_alpha=1.0 is not supported: add 'sft' to loss_type"),
        ({"generate_during_eval": True}, "generate_during_eval=True is not supported"),
        ({"activation_offloading": True}, "activation_offloading=True is not supported"),
        ({"max_length": 0}, "max_length=0 must be positive"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode='keep_middle' must be keep_start or keep_end"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(DPOConfig, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"betta": 0.1}, TypeError, "unexpected argument 'betta'"),
        ({"beta": 0.3}, ValueError, r"beta=0.3 contradicts DPOConfig\(beta=0.2\)"),
        ({"model_init": lambda: None}, ValueError, "model_init=.* is not supported"),
        ({"ref_model": "some/id"}, ValueError, "ref_model='some/id': pass a model other than the policy"),
        (
            {"processing_class": tiny_tokenizer(), "tokenizer": tiny_tokenizer()},
            ValueError,
            "two names of one argument",
        ),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], error: Any, message: str, tmp_path: Path) -> None:
    given = {"processing_class": tiny_tokenizer(), "train_dataset": ROWS} | options
    with pytest.raises(error, match=message):
        DPOTrainer(tiny_llama(), args=settings(DPOConfig, tmp_path, beta=0.2), **given)


def test_models_that_are_refused(tmp_path: Path) -> None:
    import transformers

    from trl import AutoModelForCausalLMWithValueHead

    with pytest.raises(ValueError, match="whose value head would not be trained: pass model"):
        trainer(tmp_path, AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama()))
    with pytest.raises(ValueError, match="LlamaModel, which has no language-model head"):
        trainer(tmp_path, transformers.LlamaModel(tiny_llama().config))
    same = tiny_llama()
    with pytest.raises(ValueError, match="pass a model other than the policy"):
        trainer(tmp_path, same, ref_model=same)
    with pytest.raises(ValueError, match="is_encoder_decoder=True"):
        trainer(tmp_path, is_encoder_decoder=True)


def test_settings_on_the_command_line(tmp_path: Path) -> None:
    from transformers import HfArgumentParser

    words = (
        f"--output_dir {tmp_path} --loss_type sigmoid sft --loss_weights 1 0.5 --truncation_mode keep_end --beta 0.2"
    )
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(words.split())
    assert (args.loss_type, args.weights, args.truncation_mode, args.beta) == (
        ["sigmoid", "sft"],
        [1, 0.5],
        "keep_end",
        0.2,
    )
