"""Process reward models: brute-force losses in float64, metrics by hand, data, resuming, and the model as a reward of PPO."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.rewards.test_steps import classifier
from tests.trainer.offline.preferences import settings
from tests.trainer.offline.test_stage_card import base
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, PRMConfig, PRMTrainer
from trl.rewards import StepReward
from trl.trainer import compute_accuracy

SEPARATOR = "w9"
ROWS: list[dict[str, Any]] = [
    {"prompt": "w5 w6", "completions": ["w4", "w8 w7", "w5"], "labels": [True, True, False]},
    {"prompt": "w7", "completions": ["w8 w8"], "labels": [0.25]},
    {"prompt": "w4 w4 w4", "completions": ["w6", "w5"], "labels": [0, 1]},
]
# Tokens up to the end of each step, and its label.
STEPS = [
    ([5, 6, 4, 9], 1.0), ([5, 6, 4, 9, 8, 7, 9], 1.0), ([5, 6, 4, 9, 8, 7, 9, 5, 9], 0.0),
    ([7, 8, 8, 9], 0.25),
    ([4, 4, 4, 6, 9], 0.0), ([4, 4, 4, 6, 9, 5, 9], 1.0),
]  # fmt: skip


def trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    arguments = ("train_dataset", "eval_dataset", "peft_config", "optimizers", "compute_metrics", "data_collator")
    given = {name: options.pop(name) for name in arguments if name in options}
    tokenizer = options.pop("processing_class", None) or tiny_tokenizer()
    return PRMTrainer(
        classifier() if model is None else model,
        args=settings(PRMConfig, folder, **({"step_separator": SEPARATOR} | options)),
        processing_class=tokenizer,
        **({"train_dataset": ROWS} | given),
    )


def logit(model: Any, ids: list[int]) -> Tensor:
    """Log-odds that the step that ends `ids` is right, by a pass without padding."""
    last = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return last[-1] - last[0] if len(last) == 2 else last[0]


def hand_loss(model: Any, ids: list[int], label: float) -> Tensor:
    p = 1 / (1 + torch.exp(-logit(model, ids)))
    return -label * torch.log(p) - (1 - label) * torch.log(1 - p)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labels", [1, 2])
def test_loss_is_brute_force_in_float64(make: Any, labels: int, tmp_path: Path) -> None:
    model = classifier(labels, make).double()
    it = trainer(tmp_path, model)
    expected = torch.stack([hand_loss(model, ids, label) for ids, label in STEPS]).mean()
    batch = it.data_collator(it.train_dataset)
    assert_close(it.compute_loss(model, batch), expected, 1e-9)
    left = torch.argsort(batch["attention_mask"], dim=1, stable=True)
    padded = {name: values.gather(1, left) for name, values in batch.items()}
    padded["input_ids"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, 10**6)
    assert_close(it.compute_loss(model, padded), expected, 1e-9)


def test_a_step_is_the_gradient_by_hand_however_it_is_cut(tmp_path: Path) -> None:
    """The mean is over the six steps of both batches, not over rows or batches."""
    model = classifier()
    expected = copy.deepcopy(model)
    torch.stack([hand_loss(expected, ids, label) for ids, label in STEPS]).mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
    trainer(tmp_path, model, optimizers=(optimizer, constant), **options).train()
    for name, parameter in expected.named_parameters():
        assert_close(before[name] - model.get_parameter(name), parameter.grad, 2e-6)


def test_metrics_by_hand(tmp_path: Path) -> None:
    model = classifier()
    it = trainer(tmp_path, model, eval_dataset=ROWS, per_device_eval_batch_size=2)
    with torch.no_grad():
        logits = [float(logit(model, ids)) for ids, _ in STEPS]
        losses = [float(hand_loss(model, ids, label)) for ids, label in STEPS]
    hits = [(z > 0) == (label > 0.5) for z, (_, label) in zip(logits, STEPS, strict=True)]
    right = [label > 0.5 for _, label in STEPS]
    metrics = it.evaluate()
    assert_close(metrics["eval_loss"], sum(losses) / 6)
    assert_close(metrics["eval_accuracy"], sum(hits) / 6)
    assert_close(metrics["eval_accuracy/right"], sum(h for h, r in zip(hits, right, strict=True) if r) / 3)
    assert_close(metrics["eval_accuracy/wrong"], sum(h for h, r in zip(hits, right, strict=True) if not r) / 3)
    predicted = it.predict(ROWS)
    chances = [1 / (1 + math.exp(-z)) for z in logits]
    assert_close(predicted.predictions[0, :, 1], chances[:3])
    assert_close(predicted.predictions[2, :2, 0], [1 - p for p in chances[4:]])
    assert (predicted.predictions[1, 1:] == -100).all() and predicted.predictions.shape == (3, 3, 2)
    assert_close(predicted.label_ids, np.array([[1, 1, 0], [0.25, -100, -100], [0, 1, -100]]))
    assert_close(compute_accuracy(predicted)["accuracy"], sum(hits) / 6)
    own = trainer(tmp_path, model, eval_dataset=ROWS, compute_metrics=lambda e: {"least": float(e.label_ids.min())})
    assert own.evaluate()["eval_least"] == -100
    it.train()
    assert it.state.log_history[0].keys() >= {"accuracy", "loss"}
    assert it.state.log_history[1]["num_tokens"] == 9 + 4 + 7  # both batches of the epoch


def test_rows_as_tokens(tmp_path: Path) -> None:
    it = trainer(tmp_path, max_prompt_length=2, max_length=5)
    assert [row["input_ids"].tolist() for row in it.train_dataset] == [[5, 6, 4, 9, 8], [7, 8, 8, 9], [4, 4, 6, 9, 5]]
    assert [row["labels"].tolist()[3] for row in it.train_dataset] == [1.0, 0.25, 0.0]
    with pytest.raises(ValueError, match="each of the 3 rows of train_dataset is too long for max_length=2"):
        trainer(tmp_path, max_length=2)
    last = trainer(tmp_path, train_on_last_step_only=True, eval_dataset=ROWS)
    assert [int((row["labels"] >= 0).sum()) for row in last.train_dataset] == [1, 1, 1]
    assert [int((row["labels"] >= 0).sum()) for row in last.eval_dataset] == [3, 1, 2]


def test_tokenised_rows_and_transformers_collator(tmp_path: Path) -> None:
    """As TRL 1's users have them: integer labels, -100 where a token ends no step."""
    model = classifier().double()
    rows = [{"input_ids": [5, 6, 4, 9], "labels": [-100, -100, -100, 1]}, {"input_ids": [7, 8], "labels": [-100, 0]}]
    expected = (hand_loss(model, [5, 6, 4, 9], 1.0) + hand_loss(model, [7, 8], 0.0)) / 2
    for side in ("left", "right"):
        tokenizer = tiny_tokenizer(padding_side=side)
        collator = transformers.DataCollatorForTokenClassification(tokenizer)
        it = trainer(tmp_path, model, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
        assert_close(it.compute_loss(model, collator(rows)), expected, 1e-9)
    trainer(tmp_path, train_dataset=rows).train()


def test_sources_of_rows(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    expected = [row["input_ids"].tolist() for row in trainer(tmp_path).train_dataset]
    hard = [row | {"labels": [float(label) for label in row["labels"]]} for row in ROWS]
    for source in (path, str(path), datasets.Dataset.from_list(hard), iter(ROWS)):
        assert [row["input_ids"].tolist() for row in trainer(tmp_path, train_dataset=source).train_dataset] == expected


def test_a_separator_inside_a_step_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, train_dataset=[ROWS[0], ROWS[1] | {"completions": ["w8 w9 w8"]}])
    assert "1 of 2 rows have a step with the separator 'w9' inside" in caplog.text and "train_dataset[1]" in caplog.text


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="LlamaForCausalLM with 2 outputs: a process reward model is a token classifier"
    ):
        trainer(tmp_path, tiny_llama())
    with pytest.raises(ValueError, match="LlamaForTokenClassification with 3 outputs"):
        trainer(tmp_path, classifier(3))
    with pytest.raises(ValueError, match="step_separator='' separates nothing"):
        settings(PRMConfig, tmp_path, step_separator="")
    with pytest.raises(ValueError, match="max_prompt_length=0 must be positive"):
        settings(PRMConfig, tmp_path, max_prompt_length=0)
    with pytest.raises(ValueError, match="pass either model or model_init"):
        PRMTrainer(args=settings(PRMConfig, tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"train_dataset\[1\] has 1 completions and 0 labels"):
        trainer(tmp_path, train_dataset=[ROWS[0], ROWS[1] | {"labels": []}])


def test_models_from_folders_functions_and_with_adapters(tmp_path: Path) -> None:
    import peft

    args = settings(PRMConfig, tmp_path, max_steps=1)
    it = PRMTrainer(base(tmp_path / "base"), args, train_dataset=ROWS)
    assert it.model.config.num_labels == 2
    it.train()
    PRMTrainer(model_init=classifier, args=args, train_dataset=ROWS, processing_class=tiny_tokenizer()).train()
    lora = peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["q_proj"])
    adapted = trainer(tmp_path, peft_config=lora)
    names = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in names) and any(
        "score" in name for name in names
    )
    adapted.train()


def test_resumed_is_as_if_it_never_stopped(tmp_path: Path) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "half/checkpoint-2")
    resumed = trainer(tmp_path / "half", **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


# --- What a process reward model is for ---


def learned(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer that has learnt that steps of the words w52 to w59 are right, and its rows."""
    words = [f"w{i}" for i in (*range(4, 9), *range(40, 50), *range(52, 60))]
    rows: list[dict[str, Any]] = []
    for i in range(46):
        steps = [words[(7 * i + 5 * k) % 23] for k in range(1 + i % 3)]
        rows.append({"prompt": f"w{5 + i % 3}", "completions": steps, "labels": [step in words[15:] for step in steps]})
    it = trainer(folder, train_dataset=rows, eval_dataset=rows, max_steps=80, learning_rate=1e-2)
    it.train()
    return it, rows


def test_it_learns_and_scores_steps_as_in_training(tmp_path: Path) -> None:
    """Trained, saved with its card, and loaded as a reward."""
    it, rows = learned(tmp_path)
    assert it.evaluate()["eval_accuracy"] == 1.0
    it.save_model(str(tmp_path / "prm"))
    loaded = StepReward.from_pretrained(str(tmp_path / "prm"))
    assert loaded.separator == SEPARATOR
    found = loaded.steps([row["prompt"] for row in rows], [row["completions"] for row in rows])
    predictions = it.predict([*rows]).predictions[:, :, 1]
    assert_close(np.concatenate(found), predictions[predictions >= 0])
    card = (tmp_path / "prm" / "README.md").read_text()
    assert "A process reward model" in card and "token-classification" in card
    assert "StepReward.from_pretrained(source)" in card


def test_ppo_climbs_a_process_reward(tmp_path: Path) -> None:
    """In a managed run, the token that ends a step gets the step's score."""
    reward = StepReward(learned(tmp_path)[0].model, tiny_tokenizer())
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama())
    config = PPOConfig(batch_size=32, mini_batch_size=32, learning_rate=2e-2, init_kl_coef=0.0, seed=1)
    it = PPOTrainer(config, policy, tokenizer=tiny_tokenizer())
    generation = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": PAD}
    prompts = ["w5", "w6", "w7", "w5"] * 8
    it.train(prompts, reward=reward, steps=12, generation=generation, run_dir=tmp_path / "run")
    means = [row["reward/StepReward/mean"] for row in read_rows(tmp_path / "run")]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.3


def read_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
