"""Supervised fine-tuning: the loss by brute force, packing like padding, TRL 0.4.6's contract and TRL 1's scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tests.trainer.offline.data import chat_tokenizer, chats, model_folder, pairs, quiet, texts
from trl import ConstantLengthDataset, DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer
from trl.trainer.offline.sft_trainer import supervised_rollout

ROOT = Path(__file__).parents[3]
MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def trainer_of(tmp_path: Path, rows: Any, model: Any = None, **settings: Any) -> Any:
    """A trainer of a tiny model; what SFTConfig does not have are arguments of the trainer."""
    names = ("eval_dataset", "peft_config", "data_collator", "formatting_func", "compute_metrics", "processing_class")
    more = {name: settings.pop(name) for name in names if name in settings}
    config = SFTConfig(str(tmp_path / "out"), **quiet(**settings))
    more = {"processing_class": chat_tokenizer()} | more
    return SFTTrainer(tiny_llama() if model is None else model, config, train_dataset=rows, **more)


def batch_of(trainer: Any, count: int | None = None) -> dict[str, Tensor]:
    data = trainer.train_dataset
    batch: dict[str, Tensor] = trainer.data_collator([data[i] for i in range(len(data) if count is None else count)])
    return batch


def loss_and_gradients(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}


def brute_force(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[float, float, float]:
    """Loss, entropy and accuracy in float64, one text at a time through all logits; `rows`: ids and counted positions."""
    wide = model.double().eval().requires_grad_(False)
    losses, entropies, hits = [], [], []
    for ids, counted in rows:
        logp = torch.log_softmax(wide(torch.tensor([ids])).logits[0], dim=-1)
        for place in counted:
            if place:
                row = logp[place - 1]
                losses.append(-float(row[ids[place]].detach()))
                entropies.append(-float((row.exp() * row).sum()))
                hits.append(float(row.argmax() == ids[place]))
    model.float()
    return sum(losses) / len(losses), sum(entropies) / len(entropies), sum(hits) / len(hits)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "max_length": 20}, {"padding_free": True, "max_length": None}]
)
def test_loss_and_metrics_agree_with_brute_force(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = pairs(5)
    trainer = trainer_of(tmp_path, rows, MODELS[kind](), **settings)
    tokenizer = tiny_tokenizer()
    counted = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [1]
        counted.append((ids, list(range(3, len(ids)))))  # a prompt has 3 words
    loss, entropy, accuracy = brute_force(MODELS[kind](), counted)
    assert_close(trainer.compute_loss(trainer.model, batch_of(trainer)), loss, tol=1e-5)
    means = trainer._trl_means("train" if trainer.model.training else "eval")
    assert_close(means["entropy"], entropy, tol=1e-5)
    assert_close(means["mean_token_accuracy"], accuracy, tol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_equals_padding(kind: str, strategy: str, tmp_path: Path) -> None:
    rows = texts(9)  # 55 tokens
    padded = trainer_of(tmp_path, rows, MODELS[kind]())
    packed = trainer_of(tmp_path, rows, MODELS[kind](), packing=True, packing_strategy=strategy, max_length=64)
    assert len(packed.train_dataset) == 1 and len(packed.train_dataset[0]["seq_lengths"]) == 9
    expected_loss, expected = loss_and_gradients(padded, batch_of(padded))
    loss, gradients = loss_and_gradients(packed, batch_of(packed))
    assert_close(loss, expected_loss, tol=1e-6)
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, tol=1e-5)


def test_sequences_of_a_packed_row_do_not_see_each_other(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [{"text": "w5 w6 w7"}, {"text": "w8 w9"}], packing=True, max_length=20)
    other = trainer_of(tmp_path, [{"text": "w5 w6 w7"}, {"text": "w40 w41"}], packing=True, max_length=20)
    first, second = (supervised_rollout(t.model, batch_of(t)) for t in (trainer, other))
    from trl.models.evaluate import evaluate

    a, b = (evaluate(trainer.model, rollout, values=False).logprobs[0] for rollout in (first, second))
    assert torch.equal(a, b)


def test_the_plain_path_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, texts(8), packing=True, max_length=30)
    expected = loss_and_gradients(trainer, batch_of(trainer))
    monkeypatch.setattr("trl.models.predictions.kernels_enabled", lambda: False)
    from trl.models import predictions

    assert not predictions.abilities(trainer.model).projects
    loss, gradients = loss_and_gradients(trainer, batch_of(trainer))
    assert_close(loss, expected[0], tol=1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], tol=1e-5)


def test_dft_weighs_each_token_by_its_probability(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [{"text": "w5 w6"}], loss_type="dft")
    logp = torch.log_softmax(trainer.model(torch.tensor([[5, 6, 1]])).logits[0], dim=-1)
    chosen = torch.stack([logp[0, 6], logp[1, 1]])
    assert_close(trainer.compute_loss(trainer.model, batch_of(trainer)), -(chosen * chosen.exp()).mean(), tol=1e-6)


# --- TRL 0.4.6 ---


def old_arguments(tmp_path: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(str(tmp_path / "old"), **quiet(per_device_train_batch_size=2, **settings))


DUMMY = Dataset.from_dict({"question": ["w5 w6 w7"] * 7, "answer": ["w8 w9"] * 7, "text": ["w5 w6 w7 w8 w9"] * 7})


def one(row: Any) -> str:
    return f"{row['question']} {row['answer']}"


def many(batch: Any) -> list[str]:
    return [f"{question} {answer}" for question, answer in zip(batch["question"], batch["answer"], strict=True)]


def test_0_4_6_runs_packed_and_unpacked(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "gpt2")
    data, held_out = (
        ConstantLengthDataset(
            chat_tokenizer(), DUMMY, dataset_text_field=None, formatting_func=one, seq_length=16, num_of_sequences=16
        )
        for _ in range(2)
    )
    arguments = old_arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer = SFTTrainer(model=folder, args=arguments, train_dataset=data, eval_dataset=held_out, packing=True)
    assert trainer.train_dataset.infinite  # max_steps
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0 and trainer.state.log_history[0]["eval_loss"] > 0
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "old" / "checkpoint-2").iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "old" / "checkpoint-2")
    for settings in (
        {"dataset_text_field": "text", "max_seq_length": 16, "num_of_sequences": 16, "packing": True},
        {"formatting_func": one, "max_seq_length": 16, "num_of_sequences": 16, "packing": True},
        {"formatting_func": many, "max_seq_length": 16},
        {"dataset_text_field": "text", "max_seq_length": 16},
    ):
        trainer = SFTTrainer(tiny_gpt2(), old_arguments(tmp_path), None, DUMMY, None, chat_tokenizer(), **settings)
        trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] > 0


def test_short_rows_are_trained_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataset_text_field": "text", "max_seq_length": 16, "tokenizer": chat_tokenizer()}
    trainer = SFTTrainer(tiny_gpt2(), old_arguments(tmp_path), train_dataset=DUMMY, **settings)
    assert [row["input_ids"] for row in trainer.train_dataset] == [[5, 6, 7, 8, 9, 1]] * 7


def test_0_4_6_epochs_end_the_data(tmp_path: Path) -> None:
    data = ConstantLengthDataset(chat_tokenizer(), DUMMY, formatting_func=one, seq_length=6, infinite=True)
    arguments = (
        old_arguments(tmp_path)
        if False
        else TrainingArguments(
            str(tmp_path), **(quiet() | {"max_steps": -1}), num_train_epochs=1, per_device_train_batch_size=2
        )
    )
    trainer = SFTTrainer(tiny_gpt2(), arguments, train_dataset=data, tokenizer=chat_tokenizer(), packing=True)
    assert not trainer.train_dataset.infinite
    trainer.train()
    assert trainer.state.global_step == 4  # 7 rows of 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing=True needs dataset_text_field or formatting_func"),
        (
            {"packing": False, "formatting_func": one, "dataset_text_field": None},
            "must return a list with a text for each row",
        ),
        ({"infinite": True, "dataset_text_field": "text"}, r"infinite are for SFTTrainer\(packing=True\)"),
        ({"peft_config": {"r": 2}}, r"peft_config must be a peft.PeftConfig, not dict"),
    ],
)
def test_0_4_6_value_errors(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        SFTTrainer(tiny_gpt2(), old_arguments(tmp_path), train_dataset=DUMMY, tokenizer=chat_tokenizer(), **settings)
    collator = DataCollatorForCompletionOnlyLM("w8", tokenizer=chat_tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="drop one"):
        SFTTrainer(tiny_gpt2(), old_arguments(tmp_path), collator, DUMMY, tokenizer=chat_tokenizer(), packing=True)


def test_0_4_6_with_an_adapter_and_a_completion_collator(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    trainer = SFTTrainer(
        model_folder(tmp_path / "model", "gpt2"),
        old_arguments(tmp_path, save_strategy="steps", save_steps=2),
        DataCollatorForCompletionOnlyLM("w8", tokenizer=chat_tokenizer(), mlm=False),
        DUMMY,
        peft_config=LoraConfig(
            r=2, lora_alpha=4, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", fan_in_fan_out=True
        ),
        dataset_text_field="text",
    )
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    files = {path.name for path in (tmp_path / "old" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files and "model.safetensors" not in files


# --- TRL 1 ---


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (texts(6), {}),
        (pairs(6), {"packing": True, "max_length": 24, "eval_packing": False}),
        (chats(6), {"assistant_only_loss": True}),
        (chats(6), {"padding_free": True, "max_length": None}),
        (pairs(6), {"completion_only_loss": False, "loss_type": "dft", "pad_to_multiple_of": 8}),
        (Dataset.from_list(texts(6)), {"dataset_num_proc": 2, "shuffle_dataset": True, "packing": True}),
    ],
)
def test_scripts_of_trl_1(rows: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, rows, eval_dataset=rows, logging_steps=1, eval_strategy="steps", eval_steps=2, **settings
    )
    trainer.train()
    train = [row for row in trainer.state.log_history if "loss" in row]
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate"} <= set(train[-1])
    assert train[1]["num_tokens"] > train[0]["num_tokens"] > 0
    (evaluated,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= set(evaluated)


def test_eval_loss_is_the_mean_over_tokens_not_over_batches(tmp_path: Path) -> None:
    rows = [{"text": "w5 w6"}, {"text": "w7 w8 w9 w40 w41 w42 w43"}]
    trainer = trainer_of(tmp_path, texts(2), eval_dataset=rows, per_device_eval_batch_size=1)
    got = trainer.evaluate()
    ids = [([5, 6, 1], [1, 2]), ([7, 8, 9, 40, 41, 42, 43, 1], list(range(1, 8)))]
    assert_close(got["eval_loss"], brute_force(tiny_llama(), ids)[0], tol=1e-5)
    assert_close(trainer.evaluate(rows[:1])["eval_loss"], brute_force(tiny_llama(), ids[:1])[0], tol=1e-5)
    both = trainer.evaluate({"a": rows[:1], "b": rows})
    assert_close(both["eval_a_loss"], brute_force(tiny_llama(), ids[:1])[0], tol=1e-5)
    assert set(trainer.predict(trainer.train_dataset).metrics) >= {"test_loss", "test_entropy"}


def test_metrics_of_ones_own_get_logits(tmp_path: Path) -> None:
    def count(prediction: Any) -> dict[str, float]:
        return {"shape": float(prediction.predictions.shape[-1])}

    trainer = trainer_of(tmp_path, texts(2), eval_dataset=texts(2), compute_metrics=count)
    assert trainer.evaluate()["eval_shape"] == 61
    packed = trainer_of(tmp_path, texts(2), eval_dataset=texts(2), compute_metrics=count, packing=True)
    with pytest.raises(ValueError, match="set eval_packing=False"):
        packed.evaluate()


def test_data_come_from_files_streams_and_functions(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts(6)))
    old = SFTTrainer(
        tiny_gpt2(),
        old_arguments(tmp_path),
        None,
        str(path),
        None,
        chat_tokenizer(),
        dataset_text_field="text",
        packing=True,
    )
    assert len(old.train_dataset) == 6
    for rows in (str(path), IterableDataset.from_generator(lambda: iter(texts(6)))):
        trainer = trainer_of(tmp_path, rows, max_steps=4, per_device_train_batch_size=4)
        trainer.train()
        assert trainer.state.global_step == 4
    trainer = trainer_of(tmp_path, DUMMY, formatting_func=one)
    assert trainer.train_dataset[0]["input_ids"] == [5, 6, 7, 8, 9, 1]
    with pytest.raises(ValueError, match="stream of unknown length: set max_steps"):
        trainer_of(tmp_path, IterableDataset.from_generator(lambda: iter(texts(6))), max_steps=-1)
    plain = trainer_of(tmp_path, [{"input_ids": [5, 6]}], dataset_kwargs={"skip_prepare_dataset": True})
    assert plain.train_dataset == [{"input_ids": [5, 6]}]


def test_a_bad_row_of_a_file_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [*texts(7), {"text": 12}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"train.jsonl:8 \(row 7\), column 'text', is 12 \(int\): .* dataset.filter"):
        trainer_of(tmp_path, str(path))
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\]\[0\] has the columns x"):
        trainer_of(tmp_path, texts(2), eval_dataset={"a": [{"x": "w5"}]})
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        trainer_of(tmp_path, pairs(2), max_length=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_offloading": True}, "activation_offloading=True is not supported"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 is not supported"),
        ({"loss_type": "chunked"}, "loss_type='chunked' must be one of nll, dft"),
        ({"packing_strategy": "ffd"}, "packing_strategy='ffd' must be one of"),
        ({"truncation_mode": "keep"}, "truncation_mode='keep' must be one of"),
        ({"packing": True, "max_length": None}, "packing=True needs max_length"),
        ({"packing": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 has no meaning"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs has add_special_tokens: only"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"eos_token": "<end>"}, "eos_token='<end>' is not in the tokenizer's vocabulary"),
        ({"chat_template_path": "nowhere.jinja"}, "chat_template_path='nowhere.jinja' does not exist"),
        ({"packing": True, "data_collator": list}, "drop data_collator"),
        ({"completion_only_loss": True, "formatting_func": one}, "completion_only_loss=True with formatting_func"),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, texts(2), **settings)
    with pytest.raises(TypeError, match="compute_loss_func"):
        SFTTrainer(tiny_llama(), train_dataset=texts(2), compute_loss_func=None)  # type: ignore[call-arg]


def test_a_chat_template_and_an_end_token_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}w44 {{ m.content }} {% endfor %}")
    trainer = trainer_of(tmp_path, chats(1), chat_template_path=str(template), eos_token="w9")
    assert trainer.train_dataset[0]["input_ids"][0] == 44 and trainer.model.config.eos_token_id == 9
    folder = model_folder(tmp_path / "other")
    bare = tiny_tokenizer()
    trainer = trainer_of(tmp_path, chats(1), chat_template_path=folder, processing_class=bare)
    assert trainer.train_dataset[0]["input_ids"][0] == 50


def test_an_encoder_decoder_learns_completions(tmp_path: Path) -> None:
    rows = pairs(4)
    trainer = trainer_of(tmp_path, rows, tiny_t5(), max_steps=30, learning_rate=0.01, logging_steps=30)
    batch = batch_of(trainer)
    expected = trainer.model(**batch).loss  # transformers' own
    assert_close(trainer.compute_loss(trainer.model, batch), expected, tol=1e-5)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before - 0.5
    with pytest.raises(ValueError, match="an encoder-decoder reads a prompt"):
        trainer_of(tmp_path, texts(2), tiny_t5())
    with pytest.raises(ValueError, match="for decoder-only models"):
        trainer_of(tmp_path, pairs(2), tiny_t5(), packing=True)


def test_batches_that_cannot_be_trained_on() -> None:
    tokens = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="but no labels"):
        supervised_rollout(tiny_llama(), {"input_ids": tokens})
    with pytest.raises(ValueError, match="labels differ from input_ids"):
        supervised_rollout(tiny_llama(), {"input_ids": tokens, "labels": torch.tensor([[5, 7]])})


# --- Resuming ---


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 16}])
def test_a_resumed_run_is_equal_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    def trainer(folder: str, **more: Any) -> Any:
        rows = texts(20)
        common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "bf16": False}
        return trainer_of(tmp_path / folder, rows, tiny_llama(attention_dropout=0.1), **common, **settings, **more)

    whole = trainer("whole")
    whole.train()
    stopped = trainer("stopped")
    stopped.train()
    resumed = trainer("stopped")  # as after a crash behind checkpoint 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "out" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    rows = [[r for r in t.state.log_history if "loss" in r] for t in (whole, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def start(folder: str, *arguments: str) -> subprocess.Popen[bytes]:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.trainer.offline.killed_sft", str(tmp_path / folder), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    assert start("whole").wait(timeout=240) == 0
    killed = start("killed")
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed/out/checkpoint-5").exists() and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()  # possibly in the middle of this save
    killed.wait()
    assert not (tmp_path / "killed/digest").exists()
    assert start("killed", "resume").wait(timeout=240) == 0
    assert (tmp_path / "killed/digest").read_text() == (tmp_path / "whole/digest").read_text()
