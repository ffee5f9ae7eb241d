"""Rows of preferences, and log-probabilities by hand: a plain softmax over each sequence alone, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import EOS, PAD, tiny_tokenizer

# Prompt, chosen and rejected as token ids of `tiny_tokenizer`, of different lengths.
IDS = [([5, 6, 7], [8, 9, EOS], [4, EOS]), ([9], [5, EOS], [6, 7, 8, 9, EOS]), ([4, 8], [9, EOS], [9, 9, 5, EOS])]


def text(ids: list[int]) -> str:
    return "".join(f" w{i}" for i in ids if i != EOS)


ROWS = [{"prompt": text(p)[1:], "chosen": text(c), "rejected": text(r)} for p, c, r in IDS]


def settings(kind: Any, folder: Path, **overrides: Any) -> Any:
    plain = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    usual = {"save_strategy": "no", "logging_steps": 1, "max_steps": 2, "per_device_train_batch_size": 2}
    return kind(**(plain | usual | overrides))


def answer_logprob(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt), summed over its tokens; of a model with or without an encoder."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start + answer])).logits[0]
        first = 0
    else:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        first = len(prompt) - 1
    logprobs = logits[first : first + len(answer)].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(answer)[:, None]).sum()


@torch.no_grad()
def value(model: Any, prompt: list[int], answer: list[int]) -> float:
    """`answer_logprob` as a number."""
    return float(answer_logprob(model, prompt, answer))


def stirred(model: Any, seed: int = 5) -> Any:
    """A copy with other weights: a policy that has moved away from its reference."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return moved


def poisoned(batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """The batch padded on `side`, with token ids outside the vocabulary on its padding."""
    result = dict(batch)
    for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if name not in batch:
            continue
        real = batch[mask].bool()
        order = torch.argsort(real if side == "left" else ~real, dim=1, stable=True)
        names = [name, mask] + (["completion_mask"] if ("decoder_input_ids" in batch) == (name[0] == "d") else [])
        for moved in names:
            if moved in batch:
                result[moved] = batch[moved].gather(1, order)
        result[name] = result[name].masked_fill(~result[mask].bool(), 10**6)
    return result


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'w40 ' if m['role'] == 'user' else 'w41 ' }}{{ m['content'] }}{{ ' w42 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w41 ' }}{% endif %}"
)


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


assert PAD == 0
