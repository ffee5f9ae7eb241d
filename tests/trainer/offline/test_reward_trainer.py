"""Reward models: TRL 0.4.6's contract, brute-force losses in float64, calibration, and what a reward model is used for."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.functional.oracles import f64
from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.trainer.offline.preferences import chat_tokenizer, poisoned, settings
from trl import AutoModelForCausalLMWithValueHead, RewardConfig, RewardTrainer
from trl.rewards import ClassifierReward
from trl.trainer import compute_accuracy
from trl.trainer.utils import RewardDataCollatorWithPadding

IDS = [([5, 6, 7, 8], [5, 6, 4]), ([9, 5], [9, 6, 7, 8]), ([4, 8, 9], [4, 8])]
ROWS = [
    {"prompt": f"w{c[0]}", "chosen": "".join(f" w{i}" for i in c[1:]), "rejected": "".join(f" w{i}" for i in r[1:])}
    for c, r in IDS
]
LOG_KEYS = {"accuracy", "margin", "min_reward", "mean_reward", "max_reward", "num_tokens"}


def classifier(make: Any = tiny_llama, labels: int = 1) -> Any:
    kind = {
        tiny_llama: transformers.LlamaForSequenceClassification,
        tiny_gpt2: transformers.GPT2ForSequenceClassification,
    }[make]
    config = copy.deepcopy(make().config)
    config.num_labels = labels
    torch.manual_seed(0)
    return kind(config)


def trainer(folder: Path, model: Any = None, **options: Any) -> Any:
    arguments = ("train_dataset", "eval_dataset", "peft_config", "optimizers", "compute_metrics", "data_collator")
    given = {name: options.pop(name) for name in arguments if name in options}
    tokenizer = options.pop("processing_class", None) or tiny_tokenizer()
    return RewardTrainer(
        classifier() if model is None else model,
        args=settings(RewardConfig, folder, **options),
        processing_class=tokenizer,
        **({"train_dataset": ROWS} | given),
    )


def reward(model: Any, ids: list[int]) -> Tensor:
    """[labels] of one text alone."""
    return model(input_ids=torch.tensor([ids])).logits[0]


# --- TRL 0.4.6's contract ---


def old_rows(names: tuple[str, ...] = ("chosen", "chosen", "rejected", "rejected")) -> Any:
    import datasets

    columns = {
        f"input_ids_{names[0]}": [[4, 5, 6], [5, 6], [4, 5, 6], [5, 6]],
        f"attention_mask_{names[1]}": [[1, 1, 1], [1, 0], [1, 1, 1], [1, 0]],
        f"input_ids_{names[2]}": [[4, 6], [5, 6, 4], [4, 6], [5, 6, 4]],
        f"attention_mask_{names[3]}": [[1, 1], [1, 1, 0], [1, 1], [1, 1, 1]],
    }
    return datasets.Dataset.from_dict(columns)


def old_arguments(folder: Path, **overrides: Any) -> Any:
    usual = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.5, "remove_unused_columns": False}
    return settings(transformers.TrainingArguments, folder, **(usual | overrides))


@pytest.mark.parametrize("lora", [False, True])
def test_tokenised_rows_as_in_0_4_6(lora: bool, tmp_path: Path) -> None:
    """Two labels, as an AutoModelForSequenceClassification has by default."""
    options = {}
    if lora:
        import peft

        options["peft_config"] = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], lora_dropout=0.1)
    it = RewardTrainer(
        model=classifier(labels=2),
        args=old_arguments(tmp_path),
        tokenizer=tiny_tokenizer(),
        train_dataset=old_rows(),
        eval_dataset=old_rows(),
        max_length=8,
        **options,
    )
    before = {name: p.detach().clone() for name, p in it.model.named_parameters()}
    it.train()
    assert it.state.log_history[-1]["train_loss"] is not None
    for name, parameter in it.model.named_parameters():
        trained = not lora or "lora_" in name or "modules_to_save" in name
        unseen = name.endswith("embed_tokens.weight")  # other rows than those of the batch stay
        assert unseen or torch.equal(before[name], parameter) != trained, name
    predictions = it.predict(old_rows()).predictions
    assert predictions.shape == (4, 2)
    assert_close(predictions.sum(axis=1), np.ones(4))
    it.save_model()
    assert (tmp_path / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()


def test_missing_columns(tmp_path: Path) -> None:
    rows = old_rows(("b", "c", "f", "g"))
    it = RewardTrainer(classifier(), old_arguments(tmp_path), tokenizer=tiny_tokenizer(), train_dataset=rows)
    with pytest.raises(
        ValueError,
        match=r"a row has the columns input_ids_b, .*: expected texts or chats in chosen and rejected, or token ids",
    ):
        it.train()
    args = old_arguments(tmp_path, remove_unused_columns=True)
    with pytest.warns(UserWarning, match="remove_unused_columns=True would remove"):
        it = RewardTrainer(classifier(), args, tokenizer=tiny_tokenizer(), train_dataset=old_rows())
    it.train()


def test_accuracy() -> None:
    evaluated = transformers.EvalPrediction(
        predictions=torch.tensor([[0.1, 0.9], [0.9, 0.1]]), label_ids=torch.tensor([0, 0])
    )
    assert compute_accuracy(evaluated) == {"accuracy": 0.5}
    tie = (np.array([[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]]), np.array([0, 0, 1]))
    assert_close(compute_accuracy(tie)["accuracy"], 2 / 3)


def test_old_collator() -> None:
    with pytest.raises(ValueError, match="without attention_mask_chosen, input_ids_rejected, attention_mask_rejected"):
        RewardDataCollatorWithPadding(tiny_tokenizer())([{"input_ids_chosen": [4]}])
    rows = [{name: column[i] for name, column in old_rows().to_dict().items()} | {"margin": i} for i in range(2)]
    batch = RewardDataCollatorWithPadding(tiny_tokenizer())(rows)
    assert batch["input_ids_chosen"].tolist() == [[4, 5, 6], [5, 6, PAD]]
    assert batch["attention_mask_rejected"].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert batch["margin"].tolist() == [0.0, 1.0] and batch["return_loss"] is True


# --- The loss ---


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("labels", [1, 2])
def test_loss_is_brute_force_in_float64(make: Any, labels: int, tmp_path: Path) -> None:
    model = classifier(make, labels).double()
    rows = [row | {"margin": 0.25 * i} for i, row in enumerate(ROWS)]
    it = trainer(tmp_path, model, train_dataset=rows, center_rewards_coefficient=0.1)
    expected = []
    for i, (good, bad) in enumerate(IDS):
        w, l = reward(model, good), reward(model, bad)  # noqa: E741
        expected.append((-torch.log(torch.sigmoid(w - l - 0.25 * i)) + 0.1 * (w + l) ** 2).mean())
    batch = it.data_collator(it.train_dataset)
    for side in ("left", "right"):
        assert_close(it.compute_loss(model, poisoned(batch, side)), torch.stack(expected).mean(), 1e-9)


def test_both_collators_give_the_same_loss(tmp_path: Path) -> None:
    model = classifier().double()
    it = trainer(tmp_path, model)
    old = []
    for good, bad in IDS:
        row = {"input_ids_chosen": good, "input_ids_rejected": bad}
        old.append(row | {name.replace("input_ids", "attention_mask"): [1] * len(ids) for name, ids in row.items()})
    expected = it.compute_loss(model, it.data_collator(it.train_dataset))
    for side in ("left", "right"):
        batch = RewardDataCollatorWithPadding(tiny_tokenizer(padding_side=side))(old)
        assert_close(it.compute_loss(model, batch), expected, 1e-9)


def test_a_step_is_the_gradient_by_hand_however_it_is_cut(tmp_path: Path) -> None:
    model = classifier()
    expected = copy.deepcopy(model)
    losses = [-torch.log(torch.sigmoid(reward(expected, good) - reward(expected, bad))) for good, bad in IDS]
    torch.stack(losses).mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
    trainer(tmp_path, model, optimizers=(optimizer, constant), **options).train()
    for name, parameter in expected.named_parameters():
        assert_close(before[name] - model.get_parameter(name), parameter.grad, 2e-6)


def test_metrics_by_hand(tmp_path: Path) -> None:
    model = classifier()
    it = trainer(tmp_path, model, eval_dataset=ROWS, per_device_eval_batch_size=3)
    with torch.no_grad():
        good = [float(reward(model, ids)) for ids, _ in IDS]
        bad = [float(reward(model, ids)) for _, ids in IDS]
    metrics = it.evaluate()
    gaps = [w - l for w, l in zip(good, bad, strict=True)]  # noqa: E741
    expected = {
        "accuracy": sum(gap > 0 for gap in gaps) / 3,
        "margin": sum(gaps) / 3,
        "min_reward": min(good + bad),
        "mean_reward": sum(good + bad) / 6,
        "max_reward": max(good + bad),
        "loss": sum(np.log(1 + np.exp(-gap)) for gap in gaps) / 3,
    }
    for name, number in expected.items():
        assert_close(metrics[f"eval_{name}"], number)
    assert "eval_expected_calibration_error" in metrics
    it.train()
    assert it.state.log_history[0].keys() >= LOG_KEYS


def test_metrics_of_a_client_s_own(tmp_path: Path) -> None:
    def worst(eval_pred: Any) -> dict[str, float]:
        return {"worst": float(eval_pred.predictions[:, 0].min())}

    metrics = trainer(tmp_path, eval_dataset=ROWS, compute_metrics=worst).evaluate()
    assert 0 < metrics["eval_worst"] < 1 and "eval_expected_calibration_error" not in metrics


# --- Data ---


def test_texts_and_chats(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    assert [(row["chosen_ids"].tolist(), row["rejected_ids"].tolist()) for row in it.train_dataset] == IDS
    ended = trainer(tmp_path, append_eos=True)
    assert ended.train_dataset[0]["chosen_ids"].tolist() == [*IDS[0][0], 1]
    chat = [{"role": "user", "content": "w5"}]
    answers = {
        name: [*chat, {"role": "assistant", "content": text}] for name, text in (("chosen", "w6"), ("rejected", "w7"))
    }
    (row,) = trainer(tmp_path, train_dataset=[answers], processing_class=chat_tokenizer()).train_dataset
    assert row["chosen_ids"].tolist() == [40, 5, 42, 41, 6, 42]


def test_long_rows_are_left_out(tmp_path: Path) -> None:
    assert len(trainer(tmp_path, max_length=3).train_dataset) == 1
    with pytest.raises(ValueError, match="each of the 3 rows of train_dataset is too long for max_length=1"):
        trainer(tmp_path, max_length=1)


def test_a_model_from_a_folder_has_one_output(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    it = RewardTrainer(str(tmp_path / "model"), settings(RewardConfig, tmp_path, max_steps=1), train_dataset=ROWS)
    assert it.model.config.num_labels == 1
    it.train()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM: a reward model is a sequence classifier"):
        trainer(tmp_path, tiny_llama())
    with pytest.raises(ValueError, match="chat_template_path='x' is not supported: set tokenizer"):
        settings(RewardConfig, tmp_path, chat_template_path="x")
    with pytest.raises(ValueError, match="pass either model or model_init"):
        RewardTrainer(args=settings(RewardConfig, tmp_path), train_dataset=ROWS, tokenizer=tiny_tokenizer())
    with pytest.raises(TypeError, match="max_len"):
        RewardTrainer(classifier(), train_dataset=ROWS, max_len=3)  # type: ignore[call-arg]


def test_a_model_that_is_made_on_demand(tmp_path: Path) -> None:
    args = settings(RewardConfig, tmp_path, max_steps=1)
    RewardTrainer(model_init=classifier, args=args, train_dataset=ROWS, tokenizer=tiny_tokenizer()).train()


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


# --- What a reward model is for ---


def test_it_learns_and_scores_texts_as_in_training(tmp_path: Path) -> None:
    """Trained, saved, loaded as a reward: the texts' scores are the rewards of the evaluation."""
    it = trainer(tmp_path, eval_dataset=ROWS, max_steps=15, learning_rate=3e-2)
    it.train()
    assert it.evaluate()["eval_accuracy"] == 1.0
    it.save_model(str(tmp_path / "reward"))
    loaded = ClassifierReward.from_pretrained(str(tmp_path / "reward"), label=0)
    good = loaded([row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS])
    bad = loaded([row["prompt"] for row in ROWS], [row["rejected"] for row in ROWS])
    probabilities = it.predict([*ROWS]).predictions[:, 0]
    assert_close(1 / (1 + np.exp(np.array(bad) - np.array(good))), probabilities)


def test_it_starts_a_critic() -> None:
    """On the reward model's trunk, the value after the last token is the reward."""
    model = classifier()
    trunk = tiny_llama()
    trunk.model.load_state_dict(model.model.state_dict())
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(trunk).eval()
    policy.v_head.start_from(model.score)
    for ids, _ in IDS:
        with torch.no_grad():
            _, _, values = policy(input_ids=torch.tensor([ids]))
            assert_close(values[0, -1], reward(model, ids)[0])
    with pytest.raises(ValueError, match=r"weight is \(2, 16\), but the value head's is \(1, 16\)"):
        policy.v_head.start_from(classifier(labels=2).score)


def test_calibration_is_that_of_the_gaps(tmp_path: Path) -> None:
    model = classifier()
    it = trainer(tmp_path, model, eval_dataset=ROWS)
    with torch.no_grad():
        gaps = f64([float(reward(model, good) - reward(model, bad)) for good, bad in IDS])
    sure = torch.sigmoid(gaps.abs())
    diagram = it.calibration(bins=1)  # a single bin: its mean and share
    assert_close(diagram.confidence, sure.mean()[None])
    assert_close(diagram.frequency, (gaps > 0).double().mean()[None])
    with pytest.raises(ValueError, match="calibration needs a data set"):
        trainer(tmp_path).calibration()


def test_a_new_score_layer_and_adapter_depend_on_the_seed_alone(tmp_path: Path) -> None:
    import peft

    tiny_llama().save_pretrained(tmp_path / "model")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])

    def weights(seed: int) -> Tensor:
        torch.rand(seed + 3)  # moves the generator
        args = settings(RewardConfig, tmp_path, seed=seed)
        it = RewardTrainer(
            str(tmp_path / "model"), args, None, ROWS, processing_class=tiny_tokenizer(), peft_config=lora
        )
        return torch.cat([p.detach().flatten() for p in it.model.parameters()])

    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("margin", [None, "much", float("nan"), True])
def test_a_margin_that_is_no_number_is_shown(margin: Any, tmp_path: Path) -> None:
    rows = [ROWS[0] | {"margin": 1.0}, ROWS[1] | {"margin": margin}]
    with pytest.raises(ValueError, match=r"train_dataset\[1\], column 'margin', is .*: expected a finite number"):
        trainer(tmp_path, train_dataset=rows)
