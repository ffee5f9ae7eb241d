"""One base model under two adapters: LoRA for the policy, and a frozen one with a score head as its reward model."""

import tempfile

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.clients.weights import finite, same, weights
from tests.helpers import tiny_llama, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def train_reward_adapter(base, folder):
    """A reward model as another script left it: an adapter and `score`."""
    torch.manual_seed(1)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=TaskType.SEQ_CLS, init_lora_weights=False)
    get_peft_model(classifier, settings).save_pretrained(folder)


def main():
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as rewards:
        tiny_llama().save_pretrained(base)
        train_reward_adapter(base, rewards)
        torch.manual_seed(0)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            base,
            device_map={"": "cpu"},
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            reward_adapter=rewards,
        )
    tokenizer = tiny_tokenizer()
    before = weights(model)
    config = PPOConfig(model_name="tiny", learning_rate=1e-2, batch_size=4, mini_batch_size=2, ppo_epochs=2)
    ppo_trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)
    queries = [torch.tensor([10 + i, 11 + i, 12 + i]) for i in range(4)]
    for _ in range(2):
        responses = ppo_trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True)
        texts = [torch.cat(pair) for pair in zip(queries, responses)]
        inputs = tokenizer.pad({"input_ids": texts}, padding=True, return_tensors="pt").to(ppo_trainer.current_device)
        raw_rewards = ppo_trainer.accelerator.unwrap_model(ppo_trainer.model).compute_reward_score(**inputs)
        assert raw_rewards.shape == (*inputs["input_ids"].shape, 1)
        scores = [raw_rewards[i, -1, 0] for i in range(len(raw_rewards))]
        stats = ppo_trainer.step(queries, responses, scores)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora" in name or "v_head" in name for name in moved)
    assert not any("reward" in name for name in moved)
    assert not same(before, after)
    finite(stats, "objective/kl", "ppo/loss/total", "ppo/mean_scores")


if __name__ == "__main__":
    main()
