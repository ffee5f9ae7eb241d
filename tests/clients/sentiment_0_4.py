"""A sentiment script for TRL 0.4.6: prompts in a `datasets.Dataset`, a classifier's pipeline, one query at a time."""

import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline

import trl.assets
from tests.clients.weights import finite, same, weights
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler


def build_dataset(config, tokenizer):
    shortest, longest = 2, 6
    draw_length = LengthSampler(shortest, longest)

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: draw_length()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    reviews = Dataset.from_dict({"review": trl.assets.prompts()[:16]})
    reviews = reviews.map(tokenize, batched=False)
    reviews.set_format(type="torch")
    return reviews


def collator(samples):
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def main():
    config = PPOConfig(
        model_name=trl.assets.path("tiny-gpt2-reviews"),
        learning_rate=1e-3,
        batch_size=8,
        mini_batch_size=4,
        ppo_epochs=2,
    )
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    dataset = build_dataset(config, tokenizer)
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
    before, reference = weights(model), weights(ref_model)

    device = ppo_trainer.accelerator.device
    judge = pipeline("sentiment-analysis", model=trl.assets.path("tiny-bert-sentiment"), device=device)
    generation_kwargs = {
        "min_length": -1,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
        "pad_token_id": tokenizer.eos_token_id,
    }
    output_length_sampler = LengthSampler(4, 8)
    history = []
    for batch in ppo_trainer.dataloader:
        query_tensors = batch["input_ids"]
        response_tensors = []
        for query in query_tensors:
            gen_len = output_length_sampler()
            generation_kwargs["max_new_tokens"] = gen_len
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[len(query) :])
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
        texts = [q + r for q, r in zip(batch["query"], batch["response"])]
        outputs = judge(texts, top_k=None, function_to_apply="none", batch_size=8)
        positive = [next(o["score"] for o in output if o["label"] == "POSITIVE") for output in outputs]
        rewards = [torch.tensor(score) for score in positive]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        history.append(stats)

    assert len(history) == 2
    assert not same(before, weights(model))
    assert same(reference, weights(ref_model)), "the reference is not trained"
    finite(history[-1], "objective/kl", "ppo/loss/total", "ppo/mean_scores", "ppo/returns/mean")
    assert history[0]["objective/kl"] < 1e-3 < abs(history[1]["objective/kl"])


if __name__ == "__main__":
    main()
