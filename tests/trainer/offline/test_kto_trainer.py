"""KTO through the trainer itself: brute-force loss and baseline in float64, metrics, order of the data, arguments."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.functional.oracles import f64
from tests.helpers import EOS, assert_close, tiny_llama, tiny_t5, tiny_tokenizer
from tests.trainer.offline.preferences import answer_logprob, poisoned, settings, stirred, text, value
from trl import KTOConfig, KTOTrainer

IDS = [([5, 6, 7], [8, 9, EOS], True), ([9], [5, EOS], False), ([4, 8], [9, 9, 5, EOS], True), ([7], [4, EOS], False)]
ROWS = [{"prompt": text(p)[1:], "completion": text(c), "label": label} for p, c, label in IDS]


def trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    arguments = ("ref_model", "train_dataset", "eval_dataset", "peft_config")
    given = {name: options.pop(name) for name in arguments if name in options}
    return KTOTrainer(
        tiny_llama() if model is None else model,
        args=settings(KTOConfig, folder, **options),
        processing_class=tiny_tokenizer(),
        **({"train_dataset": ROWS} | given),
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def hand_kto(policy: Any, reference: Any, rows: Any, *, beta: float, good: float, bad: float) -> tuple[float, float]:
    """Loss and baseline of one batch, whose mismatched responses are those of the row before."""

    def ratio(prompt: list[int], answer: list[int]) -> float:
        return value(policy, prompt, answer) - value(reference, prompt, answer)

    z = max(0.0, sum(ratio(prompt, rows[i - 1][1]) for i, (prompt, _, _) in enumerate(rows)) / len(rows))
    losses = []
    for prompt, answer, label in rows:
        gain = beta * (ratio(prompt, answer) - z)
        losses.append(good * (1 - sigma(gain)) if label else bad * (1 - sigma(-gain)))
    return sum(losses) / len(losses), z


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("seed", [5, 9])
def test_loss_and_baseline_are_brute_force_in_float64(make: Any, seed: int, tmp_path: Path) -> None:
    reference = make().double()
    policy = stirred(reference, seed)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    it = trainer(
        tmp_path,
        policy,
        ref_model=reference,
        beta=0.3,
        per_device_train_batch_size=4,
        precompute_ref_log_probs=False,
        **weights,
    )
    batch = it.data_collator(it.train_dataset)
    expected, z = hand_kto(policy, reference, IDS, beta=0.3, good=1.5, bad=0.75)
    for side in ("left", "right"):
        assert_close(it.compute_loss(policy, poisoned(batch, side)), f64(expected), 1e-9)
    it._trl_tallies["train"].clear()
    it.compute_loss(policy.eval(), batch)
    assert_close(it._trl_means("eval")["kl"], z, 1e-6)


def test_baselines_differ_between_the_seeds() -> None:
    """One of the two policies above has a positive baseline, or the clamp would be all that is tested."""
    reference = tiny_llama().double()
    baselines = [hand_kto(stirred(reference, s), reference, IDS, beta=0.3, good=1, bad=1)[1] for s in (5, 9)]
    assert max(baselines) > 0


def test_gradient_by_hand(tmp_path: Path) -> None:
    """The baseline is a constant: its gradient is not part of the loss's."""
    reference = tiny_llama().double()
    policy = stirred(reference)
    it = trainer(
        tmp_path, policy, ref_model=reference, per_device_train_batch_size=4, precompute_ref_log_probs=False, beta=0.3
    )
    it.compute_loss(policy, it.data_collator(it.train_dataset)).backward()
    got = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    _, z = hand_kto(policy, reference, IDS, beta=0.3, good=1, bad=1)
    losses = []
    for prompt, answer, label in IDS:
        with torch.no_grad():
            base = answer_logprob(reference, prompt, answer)
        gain = 0.3 * (answer_logprob(policy, prompt, answer) - base - z)
        losses.append(1 - torch.sigmoid(gain if label else -gain))
    torch.stack(losses).mean().backward()
    for name, parameter in policy.named_parameters():
        assert_close(got[name], parameter.grad, 1e-9)


def test_apo_zero_has_no_baseline(tmp_path: Path) -> None:
    reference = tiny_llama().double()
    policy = stirred(reference)
    options = {"loss_type": "apo_zero_unpaired", "beta": 0.3, "precompute_ref_log_probs": False}
    it = trainer(tmp_path, policy, ref_model=reference, per_device_train_batch_size=1, **options)
    expected = []
    for prompt, answer, label in IDS:
        x = 0.3 * (value(policy, prompt, answer) - value(reference, prompt, answer))
        expected.append(1 - sigma(x) if label else sigma(x))
    assert "KL_completion_ids" not in it.train_dataset[0]
    assert_close(it.compute_loss(policy, it.data_collator(it.train_dataset)), f64(sum(expected) / 4), 1e-9)


def test_prompts_are_paired_within_their_batch(tmp_path: Path) -> None:
    """Batches of two, and a last one of one row, which takes the response before it."""
    it = trainer(tmp_path, train_dataset=[*ROWS, ROWS[0]], per_device_train_batch_size=2)
    own = [row["completion_ids"].tolist() for row in it.train_dataset]
    mismatched = [row["KL_completion_ids"].tolist() for row in it.train_dataset]
    assert mismatched == [own[1], own[0], own[3], own[2], own[3]]


def test_references_agree_and_metrics_are_those_of_the_labels(tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path, learning_rate=1e-2),
        trainer(tmp_path, learning_rate=1e-2, precompute_ref_log_probs=False),
    ]
    for it in runs:
        it.train()
    cached, copied = [it.state.log_history[1] for it in runs]
    names = {*("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")}
    names |= {"kl", "entropy", "logits/chosen", "logits/rejected", "loss", "num_tokens"}
    assert names <= cached.keys()
    for name in names:
        assert_close(cached[name], copied[name])
    assert_close(cached["rewards/margins"], cached["rewards/chosen"] - cached["rewards/rejected"])
    assert runs[0].ref_model is None


def test_metrics_by_hand(tmp_path: Path) -> None:
    reference = tiny_llama()
    policy = stirred(reference)
    it = trainer(tmp_path, policy, ref_model=reference, eval_dataset=ROWS, beta=0.3, per_device_eval_batch_size=4)
    metrics = it.evaluate()
    logps = [value(policy, p, a) for p, a, _ in IDS]
    rewards = [0.3 * (w - value(reference, p, a)) for w, (p, a, _) in zip(logps, IDS, strict=True)]
    assert_close(metrics["eval_rewards/chosen"], (rewards[0] + rewards[2]) / 2)
    assert_close(metrics["eval_rewards/rejected"], (rewards[1] + rewards[3]) / 2)
    assert_close(metrics["eval_logps/rejected"], (logps[1] + logps[3]) / 2)


def test_a_batch_with_one_label_only(tmp_path: Path) -> None:
    it = trainer(tmp_path, train_dataset=[ROWS[0], ROWS[2], ROWS[1], ROWS[3]])
    it.train()
    first, second = it.state.log_history[:2]
    assert "rewards/rejected" not in first and "rewards/margins" not in first
    assert "rewards/chosen" not in second and "rewards/rejected" in second


def test_preference_rows_become_two(tmp_path: Path) -> None:
    it = trainer(tmp_path, train_dataset=[{"prompt": "w5", "chosen": " w6", "rejected": " w7 w8"}])
    assert [(row["completion_ids"].tolist(), row["label"]) for row in it.train_dataset] == [
        ([6, EOS], True),
        ([7, 8, EOS], False),
    ]


def test_unbalanced_labels_are_named_with_the_weights_that_balance_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, train_dataset=[*ROWS, ROWS[0], ROWS[0]])
    assert (
        "4 desirable and 2 undesirable" in caplog.text
        and "set desirable_weight=0.5, or undesirable_weight=2" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, train_dataset=[*ROWS, ROWS[0], ROWS[0]], desirable_weight=0.5)
    assert "desirable" not in caplog.text


def test_resumed_is_as_if_it_never_stopped(tmp_path: Path) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "half/checkpoint-2")
    resumed = trainer(tmp_path / "half", **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "bco"}, "loss_type='bco' must be one of kto, apo_zero_unpaired"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1: KTO estimates the KL"),
        (
            {"train_sampling_strategy": "random"},
            "train_sampling_strategy='random': the pairs .* shuffle the data beforehand",
        ),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0 must be >= 0"),
        ({"sync_ref_model": True}, "sync_ref_model=True is not supported"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(KTOConfig, tmp_path, **options)


def test_plain_training_arguments(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    args = settings(TrainingArguments, tmp_path, max_steps=1)
    it = KTOTrainer(
        tiny_llama(), args=args, train_dataset=ROWS, tokenizer=tiny_tokenizer(), beta=0.2, desirable_weight=1.25
    )
    assert (it.args.beta, it.args.desirable_weight, it.args.train_sampling_strategy) == (0.2, 1.25, "sequential")
    it.train()


def test_one_row_has_no_neighbour(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset has one row"):
        trainer(tmp_path, train_dataset=ROWS[:1])
