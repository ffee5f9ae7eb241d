"""PPO with policy, reference, reward and value on one frozen base: what is trained, the KL, and resuming."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
import transformers

from tests.helpers import assert_close, tiny_gpt2, tiny_tokenizer
from tests.models.lora import lora, lora_config, stir
from tests.trainer.managed import bits, recorded, run
from trl import AutoModelForCausalLMWithValueHead as Causal
from trl import PPOConfig, PPOTrainer, create_reference_model
from trl.rewards import AdapterReward

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two SFT adapters and a reward adapter, as earlier stages leave them."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_gpt2(**DROPOUT).save_pretrained(root / "base")
    for name, seed in (("sft", 11), ("other", 12)):
        model = lora(transformers.AutoModelForCausalLM.from_pretrained(root / "base"))
        stir(model, seed)
        model.save_pretrained(root / name, save_embedding_layers=False)
    trunk = transformers.GPT2ForSequenceClassification(tiny_gpt2(num_labels=1).config)
    classifier = lora(trunk, task_type="SEQ_CLS", init_lora_weights=False)
    classifier.save_pretrained(root / "reward", save_embedding_layers=False)
    return root


def build(folders: Path, reference: str | None = "sft", ref_model: Any = None, **settings: Any) -> PPOTrainer:
    torch.manual_seed(0)
    arguments = {} if reference is None else {"reference_adapter": folders / reference}
    model = Causal.from_pretrained(
        folders / "sft", is_trainable=True, reward_adapter=folders / "reward", **arguments
    ).train()
    defaults = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-2, "seed": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no dataset is given")
        return PPOTrainer(PPOConfig(**(defaults | settings)), model, ref_model, tiny_tokenizer())


def frozen(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}


def test_a_run_trains_the_policy_alone(folders: Path, tmp_path: Path) -> None:
    trainer = build(folders)
    assert trainer.ref_model is None
    before = frozen(trainer)
    moving = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(("lora_" in name and ".default." in name) or "v_head" in name for name in moving)
    result = run(trainer, reward=AdapterReward(trainer.model), run_dir=tmp_path / "run", save_every=1)
    assert result.steps == 3
    rows, samples = recorded(tmp_path / "run")
    assert rows[0]["reward/AdapterReward/mean"] == rows[0]["score/mean"]
    after = frozen(trainer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(not torch.equal(p, moving[n]) for n, p in trainer.model.named_parameters() if n in moving)
    assert trainer.model.pretrained_model.active_adapters == ["default"]

    # The scores are those of the reward model on its own.
    judge = Causal.from_pretrained(folders / "base", peft_config=lora_config(), reward_adapter=folders / "reward")
    compared = 0
    for sample in samples[0]:
        prompt, completion = ([int(word[1:]) for word in sample[part].split()] for part in ("prompt", "completion"))
        if len(completion) == sample["length"]:  # no special token among them
            assert_close(sample["score"], judge.compute_reward_score(torch.tensor([prompt + completion]))[0, -1, 0])
            compared += 1
    assert compared > 0


def test_the_kl_is_to_the_reference_adapter(folders: Path) -> None:
    trainer = build(folders)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.5)
    queries, responses = [torch.tensor([5, 6]), torch.tensor([7, 8])], [torch.tensor([10, 11, 12])] * 2
    trainer.config.batch_size = 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "objective/kl is")
        trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(0.0)])
    experience = trainer.last_experience
    assert experience is not None
    sft = Causal.from_pretrained(folders / "sft").eval()
    tokens = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
    logprobs = sft(tokens)[0].log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert_close(experience.ref_logprobs[:, 1:], logprobs[:, 1:])
    assert float(experience.kl.abs().max()) > 0.1


def test_a_copy_of_the_model_gives_the_same_numbers(folders: Path) -> None:
    rows = []
    for reference in ("sft", None):
        trainer = build(folders, reference)
        assert (trainer.ref_model is None) == (reference == "sft")
        run(trainer, reward=AdapterReward(trainer.model))
        rows.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert rows[0].keys() == rows[1].keys()
    for name, parameter in rows[0].items():
        assert_close(parameter, rows[1][name], 1e-4)


def test_a_resumed_run_ends_on_the_same_bits(folders: Path, tmp_path: Path) -> None:
    whole = build(folders)
    run(whole, reward=AdapterReward(whole.model), steps=4, run_dir=tmp_path / "whole")
    first = build(folders)
    run(first, reward=AdapterReward(first.model), steps=2, run_dir=tmp_path / "parts")
    second = build(folders)
    run(second, reward=AdapterReward(second.model), steps=4, run_dir=tmp_path / "parts", resume=True)
    assert bits(second) == bits(whole)
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")


def test_another_reference_adapter_is_another_run(folders: Path, tmp_path: Path) -> None:
    build(folders).save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"the base model has other weights in .*lora_[AB]\.reference"):
        build(folders, "other").load_checkpoint(tmp_path)
    assert build(folders).load_checkpoint(tmp_path) is not None


def test_two_references_are_refused(folders: Path) -> None:
    model = create_reference_model(Causal.from_pretrained(folders / "base"))
    with pytest.raises(ValueError, match="ref_model and the reference adapter 'reference' are two references"):
        build(folders, ref_model=model)


def test_the_base_is_kept_in_bfloat16_and_the_reward_adapter_scores_on_it(folders: Path) -> None:
    """One copy of the base in the compute dtype, for policy, reference and reward."""
    trainer = build(folders, dtype="bfloat16")
    exact = build(folders, dtype="float32")
    dtypes = {p.dtype for name, p in trainer.model.named_parameters() if "lora_" not in name and "pretrained" in name}
    assert torch.bfloat16 in dtypes
    tokens = torch.tensor([[5, 6, 7, 8]])
    scores, expected = (t.model.compute_reward_score(tokens) for t in (trainer, exact))
    assert scores.dtype == torch.float32
    assert_close(scores, expected, 0.03)
    run(trainer, reward=AdapterReward(trainer.model))
