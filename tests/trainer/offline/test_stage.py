"""What the offline stages share: settings, model and tokenizer from arguments, gradients and steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from tests.helpers import EOS, PAD, assert_close, tiny_llama, tiny_tokenizer
from tests.trainer.offline.data import model_folder, quiet, texts
from trl.trainer.offline.sft_config import SFTConfig
from trl.trainer.offline.sft_trainer import SFTTrainer
from trl.trainer.offline.stage import (
    load_stage_model,
    name_of,
    set_eos_token,
    set_recomputation,
    stage_tokenizer,
    with_adapter,
)
from trl.trainer.offline.stage_config import StageConfig
from trl.trainer.offline.stage_run import last_whole_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=True is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"fp16": True, "bf16": True}, "set only one of them"),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs=.* is not supported",
        ),
    ],
)
def test_unsupported_settings_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({}, "auto"), ({"bf16": True}, "bfloat16"), ({"bf16": False}, "float32")],
)
def test_bf16_is_carried_out_here(settings: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    config = StageConfig(str(tmp_path), use_cpu=True, **settings)
    assert config.compute_dtype == dtype and config.mixed_precision == "no" and config.bf16 == settings.get("bf16")


def test_training_arguments_keep_their_values(tmp_path: Path) -> None:
    plain = TrainingArguments(str(tmp_path), learning_rate=0.25, logging_steps=7, use_cpu=True)
    config = SFTConfig.from_arguments(plain, output_dir="other")
    assert (config.learning_rate, config.logging_steps, config.output_dir) == (0.25, 7, str(tmp_path))
    assert config.compute_dtype == "float32" and config.max_length == 1024
    assert SFTConfig.from_arguments(config, output_dir="") is config
    assert SFTConfig.from_arguments(None, output_dir="somewhere").output_dir == "somewhere"
    with pytest.raises(ValueError, match="args is a StageConfig: expected a SFTConfig or"):
        SFTConfig.from_arguments(StageConfig(str(tmp_path)), output_dir="")


def test_models_come_from_folders_in_float32_and_without_pickles(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    config = SFTConfig(str(tmp_path), model_init_kwargs='{"dtype": "bfloat16"}')
    assert load_stage_model(folder, AutoModelForCausalLM, SFTConfig(str(tmp_path))).dtype == torch.float32
    assert load_stage_model(folder, AutoModelForCausalLM, config).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"model_init_kwargs=.* are for a model given as an id"):
        load_stage_model(tiny_llama(), AutoModelForCausalLM, config)
    with pytest.raises(ValueError, match="model is a Linear"):
        load_stage_model(torch.nn.Linear(2, 2), AutoModelForCausalLM, SFTConfig(str(tmp_path)))
    torch.save(tiny_llama().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a pickle, but no model.safetensors"):
        load_stage_model(folder, AutoModelForCausalLM, SFTConfig(str(tmp_path)))
    assert name_of("org/name/", "SFT") == "name-SFT" and name_of(tiny_llama(), "SFT") == "model-SFT"


def test_the_tokenizer_is_the_models_and_pads_with_its_end(tmp_path: Path) -> None:
    config = SFTConfig(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "model"))
    assert stage_tokenizer(None, None, model, config).pad_token_id == PAD
    assert stage_tokenizer(None, tiny_tokenizer(pad=False), model, config).pad_token_id == EOS
    config.pad_token = "w7"
    assert stage_tokenizer(tiny_tokenizer(), None, model, config).pad_token_id == 7
    assert stage_tokenizer(tiny_tokenizer(), None, model, config, eos_token="w8").eos_token_id == 8
    assert model.config.eos_token_id == 8 and model.generation_config.eos_token_id == [8, EOS]
    set_eos_token(model, 8)
    assert model.generation_config.eos_token_id == [8, EOS]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((tiny_tokenizer(), tiny_tokenizer()), {}, "two names of one argument"),
        ((None, None), {}, "does not say which folder or hub id"),
        (("gpt2", None), {}, "processing_class is a str"),
        ((tiny_tokenizer(), None), {"pad_token": "<pad>"}, "pad_token='<pad>' is not in the tokenizer's vocabulary"),
    ],
)
def test_bad_tokenizers(arguments: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        stage_tokenizer(*arguments, tiny_llama(), SFTConfig(str(tmp_path), **settings))


def test_adapters() -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = with_adapter(tiny_llama(), config)
    assert {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert with_adapter(adapted, None) is adapted
    with pytest.raises(ValueError, match="has an adapter already"):
        with_adapter(adapted, config)
    with pytest.raises(ValueError, match=r"peft_config must be a peft.PeftConfig, not dict"):
        with_adapter(tiny_llama(), {"r": 2})


def trained(tmp_path: Path, resume: bool | str | None = None, **settings: Any) -> Any:
    config = SFTConfig(str(tmp_path), **quiet(learning_rate=0.05, max_grad_norm=0.5, logging_steps=1, **settings))
    trainer = SFTTrainer(tiny_llama(), config, train_dataset=texts(16), processing_class=tiny_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bfloat16_steps_follow_those_in_float32(accumulation: int, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    wide, narrow = trained(tmp_path, bf16=False, **settings), trained(tmp_path, bf16=True, **settings)
    assert weights(narrow).dtype == torch.float32
    # Adam's first steps have the size of the learning rate, whatever the gradient's: signs decide.
    assert cosine(weights(wide) - start, weights(narrow) - start) > 0.97
    first, second = (trainer.state.log_history[0] for trainer in (wide, narrow))
    for name in ("loss", "grad_norm", "entropy"):
        assert abs(first[name] - second[name]) < 0.01 * first[name]
    assert abs(wide.state.log_history[1]["loss"] - narrow.state.log_history[1]["loss"]) < 0.02


def test_recomputed_activations_change_no_number(tmp_path: Path) -> None:
    plain, recomputed = trained(tmp_path, gradient_checkpointing=False), trained(tmp_path)
    assert torch.equal(weights(plain), weights(recomputed))
    forwards = ["forward" in vars(t.model.model.layers[0]) for t in (plain, recomputed)]
    assert forwards == [False, True]


def test_models_that_cannot_recompute_keep_activations_unless_asked(tmp_path: Path) -> None:
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    set_recomputation(model, SFTConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="gradient_checkpointing=True: LlamaForCausalLM does not support"):
        set_recomputation(model, SFTConfig(str(tmp_path), gradient_checkpointing=True))


def test_accumulation_changes_no_number_but_rounding(tmp_path: Path) -> None:
    whole = trained(tmp_path, per_device_train_batch_size=4)
    parts = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for row, other in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert abs(row[name] - other[name]) < 1e-4 * abs(row[name]) + 1e-6


def test_the_last_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"epoch"'), (13, None), (3, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="no checkpoint that was saved to its end"):
        trained(tmp_path / "empty", resume=True)


def test_auto_resumes_or_begins_anew(tmp_path: Path) -> None:
    assert last_whole_checkpoint(str(tmp_path / "none")) is None
    settings = {"save_strategy": "steps", "save_steps": 1}
    new = trained(tmp_path / "new", resume="auto", **settings)
    whole = trained(tmp_path / "whole", **settings)
    names = ("loss", "grad_norm", "step")
    assert [[row.get(name) for name in names] for row in new.state.log_history[:2]] == [
        [row.get(name) for name in names] for row in whole.state.log_history[:2]
    ]
    last = new.state.global_step
    again = trained(tmp_path / "new", resume="auto", **settings)  # finished before: nothing is left to train
    assert again.state.global_step == last and again.state.log_history[0] == new.state.log_history[0]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = str(ROOT / "tests/trainer/offline/ranks_sft.py")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    found = []
    for folder, start, rows in (("one", [], "4"), ("two", launch, "2")):
        (tmp_path / folder).mkdir()
        command = [sys.executable, *start, script, str(tmp_path / folder), rows]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240)
        found.append(json.loads((tmp_path / folder / "rows.json").read_text()))
    for row, other in zip(*found, strict=True):
        assert_close([row[name] for name in sorted(row)], [other[name] for name in sorted(row)], tol=1e-4)
