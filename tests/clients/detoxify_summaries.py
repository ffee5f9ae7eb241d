"""A course's notebook: a T5 under LoRA learns to write summaries that a classifier does not call hateful."""

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import GenerationConfig

from tests.clients.weights import finite, same, weights
from tests.helpers import tiny_t5, tiny_tokenizer
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import LengthSampler


def hate_pipe(texts, **kwargs):
    """Scores in the shape of a text-classification pipeline that returns those of all labels."""
    assert kwargs == {"top_k": None, "function_to_apply": "none", "batch_size": 8}
    rates = [text.split().count("w7") / max(1, len(text.split())) for text in texts]
    return [[{"label": "nothate", "score": 1 - rate}, {"label": "hate", "score": rate}] for rate in rates]


def evaluate(model, tokenizer, dialogues):
    """Mean hate of what a model makes of some dialogues."""
    scores = []
    for dialogue in dialogues:
        input_ids = tokenizer(dialogue, return_tensors="pt", padding=True).input_ids
        config = GenerationConfig(max_new_tokens=6, top_k=0, top_p=1.0, do_sample=True)
        response = model.generate(input_ids=input_ids, generation_config=config)
        text = tokenizer.decode(response[0], skip_special_tokens=True)
        scores.append(hate_pipe([text], top_k=None, function_to_apply="none", batch_size=8)[0][1]["score"])
    return sum(scores) / len(scores)


def main():
    tokenizer = tiny_tokenizer()
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["q", "v"], lora_dropout=0.05, task_type=TaskType.SEQ_2_SEQ_LM)
    peft_model = get_peft_model(tiny_t5(), lora)
    ppo_model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        peft_model, torch_dtype=torch.bfloat16, is_trainable=True
    )
    ref_model = create_reference_model(ppo_model)
    assert not any(parameter.requires_grad for parameter in ref_model.parameters())
    assert not ref_model.training
    trained, fixed = weights(ppo_model), weights(ref_model)
    assert any("lora" in name for name in fixed), "the reference has an adapter of its own"

    dialogues = [f"w{i} w{i + 1} w{i + 2}" for i in range(10, 26)]
    rows = [{"input_ids": tokenizer.encode(text), "query": text} for text in dialogues]
    dataset = Dataset.from_list(rows).with_format("torch")
    config = PPOConfig(model_name="tiny-t5", learning_rate=1e-2, ppo_epochs=1, mini_batch_size=4, batch_size=8)
    ppo_trainer = PPOTrainer(
        config=config,
        model=ppo_model,
        ref_model=ref_model,
        tokenizer=tokenizer,
        dataset=dataset,
        data_collator=lambda data: {key: [d[key] for d in data] for key in data[0]},
    )
    output_length_sampler = LengthSampler(3, 6)
    generation_kwargs = {"min_length": 5, "top_k": 0, "top_p": 1.0, "do_sample": True}
    assert 0 <= evaluate(ref_model, tokenizer, dialogues[:4]) <= 1
    for batch in ppo_trainer.dataloader:
        summary_tensors = []
        for prompt_tensor in batch["input_ids"]:
            generation_kwargs["max_new_tokens"] = output_length_sampler()
            summary = ppo_trainer.generate(prompt_tensor, **generation_kwargs)
            summary_tensors.append(summary.squeeze())
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in summary_tensors]
        pairs = [q + " " + r for q, r in zip(batch["query"], batch["response"])]
        outputs = hate_pipe(pairs, top_k=None, function_to_apply="none", batch_size=8)
        reward_tensors = [torch.tensor(output[0]["score"]) for output in outputs]
        stats = ppo_trainer.step(batch["input_ids"], summary_tensors, reward_tensors)
        ppo_trainer.log_stats(stats, batch, reward_tensors)
    finite(stats, "objective/kl", "ppo/returns/mean", "ppo/policy/advantages_mean")
    assert not same(trained, weights(ppo_model))
    assert same(fixed, weights(ref_model))
    assert 0 <= evaluate(ppo_model, tokenizer, dialogues[:4]) <= 1


if __name__ == "__main__":
    main()
