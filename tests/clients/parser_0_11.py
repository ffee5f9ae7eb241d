"""A script for TRL 0.11: settings of script, PPO and model from one command line, with LoRA from `ModelConfig`."""

from dataclasses import dataclass, field
from typing import Optional

import torch
from transformers import AutoTokenizer, HfArgumentParser

import trl.assets
from tests.clients.weights import finite, same, weights
from trl import AutoModelForCausalLMWithValueHead, ModelConfig, PPOConfig, PPOTrainer, get_peft_config, set_seed
from trl.core import LengthSampler
from trl.import_utils import is_npu_available, is_xpu_available


@dataclass
class ScriptArguments:
    use_seq2seq: bool = field(default=False, metadata={"help": "whether to use an encoder-decoder"})
    target_modules: Optional[str] = field(default=None, metadata={"help": "layers under the adapter"})  # noqa: UP045


COMMAND_LINE = """
--model_name_or_path {model} --use_peft --lora_r 4 --lora_alpha 8 --lora_target_modules c_attn
--exp_name reviews --learning_rate 1e-2 --batch_size 4 --mini_batch_size 2 --ppo_epochs 2 --ratio_threshold 10.0
--remove_unused_columns False --dataset_num_proc 1 --tracker_project_name reviews
"""


def main():
    command = COMMAND_LINE.format(model=trl.assets.path("tiny-gpt2-reviews")).split()
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    args, ppo_config, model_config = parser.parse_args_into_dataclasses(args=command)
    assert not args.use_seq2seq
    assert (ppo_config.batch_size, ppo_config.ratio_threshold, ppo_config.learning_rate) == (4, 10.0, 1e-2)
    ppo_config.model_name = model_config.model_name_or_path
    set_seed(ppo_config.seed)

    tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        ppo_config.model_name,
        trust_remote_code=model_config.trust_remote_code,
        peft_config=get_peft_config(model_config),
    )
    before = weights(model)
    queries = [torch.tensor(tokenizer.encode(prompt)) for prompt in trl.assets.prompts()[:8]]

    def training_data_collator(rows):
        padded = tokenizer.pad(rows, return_tensors="pt")
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}

    ppo_trainer = PPOTrainer(ppo_config, model, None, tokenizer, training_data_collator=training_data_collator)
    device = ppo_trainer.accelerator.device
    if ppo_trainer.accelerator.num_processes == 1:
        device = "xpu:0" if is_xpu_available() else "npu:0" if is_npu_available() else ppo_trainer.current_device
    assert str(device).split(":")[0] in ("cpu", "cuda", "xpu", "npu")
    for start in (0, 4):
        batch = queries[start : start + 4]
        responses, ref_responses = ppo_trainer.generate(
            batch, return_prompt=False, generate_ref_response=True, length_sampler=LengthSampler(3, 6), do_sample=True
        )
        assert len(responses) == len(ref_responses) == 4
        rewards = [torch.tensor(float(len(set(r.tolist())))) for r in responses]
        stats = ppo_trainer.step(batch, responses, rewards)
    after = weights(model)
    assert not same(before, after)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora" not in name and "v_head" not in name)
    finite(stats, "objective/kl", "ppo/loss/total")


if __name__ == "__main__":
    main()
