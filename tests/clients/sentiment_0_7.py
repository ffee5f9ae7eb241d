"""A sentiment script for TRL 0.7: experiment names in the config, the reference's responses beside the policy's."""

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import trl.assets
from tests.clients.weights import finite, same, weights
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler


def settings(**cache):
    return PPOConfig(
        exp_name="reviews",
        model_name=trl.assets.path("tiny-gpt2-reviews"),
        query_dataset="imdb",
        reward_model="sentiment-analysis:lvwerra/distilbert-imdb",
        learning_rate=1e-3,
        log_with=None,
        batch_size=8,
        mini_batch_size=4,
        gradient_accumulation_steps=1,
        ppo_epochs=2,
        early_stopping=False,
        target_kl=6.0,
        kl_penalty="kl",
        seed=0,
        use_score_scaling=True,
        use_score_norm=True,
        score_clip=None,
        **cache,
    )


def loudness(texts):
    return [float(sum(c in "!?." for c in text)) for text in texts]


def train(config):
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    rows = [{"input_ids": tokenizer.encode(p)[:6], "query": p} for p in trl.assets.prompts()[:16]]
    dataset = Dataset.from_list(rows).with_format("torch")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    before = weights(model)
    ppo_trainer = PPOTrainer(
        config,
        model,
        create_reference_model(model),
        tokenizer,
        dataset=dataset,
        data_collator=lambda data: {key: [d[key] for d in data] for key in data[0]},
    )
    assert config.global_batch_size == config.batch_size * config.world_size
    assert config.backward_batch_size == config.mini_batch_size * config.gradient_accumulation_steps
    assert config.is_encoder_decoder is False and config.is_peft_model is False

    generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
    generation_kwargs["pad_token_id"] = tokenizer.eos_token_id
    for batch in ppo_trainer.dataloader:
        response_tensors, ref_response_tensors = ppo_trainer.generate(
            batch["input_ids"],
            return_prompt=False,
            generate_ref_response=True,
            length_sampler=LengthSampler(4, 8),
            **generation_kwargs,
        )
        batch["response"] = tokenizer.batch_decode(response_tensors)
        batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors)
        assert len(ref_response_tensors) == len(response_tensors) == config.batch_size
        rewards = [torch.tensor(score) for score in loudness(batch["response"])]
        batch["ref_rewards"] = [torch.tensor(score) for score in loudness(batch["ref_response"])]
        stats = ppo_trainer.step(batch["input_ids"], response_tensors, rewards)
        columns = ["query", "response", "ref_response", "ref_rewards"]
        ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=columns)
    assert not same(before, weights(model))
    finite(stats, "objective/kl", "ppo/loss/total", "ppo/mean_scores")


def main():
    train(settings(optimize_device_cache=True))
    train(settings(optimize_cuda_cache=True))  # its name until 0.7


if __name__ == "__main__":
    main()
