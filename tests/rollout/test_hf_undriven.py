"""Sampling with transformers' generate: what a query is answered with does not depend on the queries beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.helpers import BOS, EOS, PAD, VOCABULARY, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
QUERIES = [torch.tensor(row) for row in ([5], [6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19, 20])]


def tiny_rwkv() -> Any:
    """Takes no notice of an attention mask, and mixes up the rows of a batch where it goes on with their states."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "attention_hidden_size": 16}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(**_SPECIAL, **sizes))


def tiny_recurrent_gemma() -> Any:
    """Goes on with the state of the sequence before where a query is of one token."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RecurrentGemmaConfig(**_SPECIAL, **sizes, lru_width=16, attention_window_size=6)
    return transformers.RecurrentGemmaForCausalLM(config)


def tiny_bart_decoder() -> Any:
    """Counts positions from the first column, be it padding or not."""
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "dropout": 0.0}
    config = transformers.BartConfig(**_SPECIAL, **sizes, max_position_embeddings=64, forced_eos_token_id=None)
    return transformers.BartForCausalLM(config)


@pytest.mark.parametrize("sampled_lengths", [False, True])
@pytest.mark.parametrize("make", [tiny_rwkv, tiny_recurrent_gemma, tiny_bart_decoder])
def test_greedy_responses_are_the_likeliest_of_the_plain_model(make: Any, sampled_lengths: bool) -> None:
    torch.manual_seed(0)
    plain = make().eval()
    for parameter in plain.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=max(4, parameter.shape[-1]) ** -0.5)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain)
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), model, tokenizer=tiny_tokenizer())
    lengths = iter([9, 4, 6]).__next__ if sampled_lengths else None
    responses = trainer.generate(
        QUERIES, lengths, batch_size=2, max_new_tokens=8, do_sample=False, eos_token_id=-1, return_prompt=False
    )
    assert [len(response) for response in responses] == ([9, 9, 4, 4, 6] if sampled_lengths else [8] * 5)
    again = trainer.generate(QUERIES[:1], max_new_tokens=8, do_sample=False, eos_token_id=-1, return_prompt=False)
    for query, response in zip([*QUERIES, QUERIES[0]], [*responses, *again], strict=True):
        with torch.no_grad():
            logits = plain(input_ids=torch.cat([query, response])[None], use_cache=False).logits[0]
        assert response.tolist() == logits[len(query) - 1 : -1].argmax(dim=-1).tolist()
