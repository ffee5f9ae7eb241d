"""`python -m tests.kernels.one_step on off`: what a small model writes and what one step of it says, as a line of JSON for each.

And which of the kernels' traces it leaves: forwards set on instances of modules by anyone, attention functions that
transformers was given, parameters without a gradient of their own. Each value of the switch has a process of its own, forked
when the imports are done.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
from torch import nn

from tests.helpers import tiny_llama, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.kernels.door import SWITCH, kernels_enabled

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [40, 41, 42])]
RESPONSES = [torch.arange(20, 20 + length) for length in (14, 3, 9, 6)]


def stepped(dtype: str) -> dict[str, Any]:
    """Greedy responses, then the statistics of a step on given ones and the number of parameters without a `.grad`."""
    # Wide enough for every kernel to find its layers worthwhile; the first layer is shared, and so frozen.
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_llama(hidden_size=64, intermediate_size=96), summary_dropout_prob=0.0
    )
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-4, dtype=dtype)
    reference = create_reference_model(model, num_shared_layers=1)
    trainer = PPOTrainer(config, model, reference, tiny_tokenizer())
    written = trainer.generate(QUERIES, return_prompt=False, max_new_tokens=14, do_sample=False)
    stats = trainer.step(QUERIES, RESPONSES, [torch.tensor(s) for s in (1.0, -0.5, 0.3, 2.0)])
    numbers = {
        name: float(value)
        for name, value in stats.items()
        if isinstance(value, int | float) and "time/" not in name and "memory/" not in name
    }
    without = sum(p.requires_grad and p.grad is None for p in trainer.model.parameters())
    return {"stats": numbers, "responses": [response.tolist() for response in written], "without_gradient": without}


def report() -> None:
    warnings.simplefilter("ignore")
    replaced: set[str] = set()
    plain = nn.Module.__setattr__

    def watched(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward":
            replaced.add(type(value).__name__)
        plain(self, name, value)

    nn.Module.__setattr__ = watched  # type: ignore[method-assign,assignment]
    from transformers import AttentionInterface

    found: dict[str, Any] = {dtype: stepped(dtype) for dtype in ("float32", "bfloat16")}
    attention = sorted(name for name in AttentionInterface._global_mapping if name.startswith("trl"))
    print(json.dumps(found | {"replaced": sorted(replaced), "attention": attention}), flush=True)


def main() -> None:
    assert kernels_enabled.cache_info().currsize == 0, "an import has read the switch"
    for switch in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            os.environ[SWITCH] = switch
            report()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, switch


if __name__ == "__main__":
    main()
