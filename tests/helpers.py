"""Tiny models, a tiny tokenizer, and the one way in which tests compare numbers.

Nothing here is downloaded. Every model has the vocabulary of `tiny_tokenizer()`: 61 words `w0` ... `w60`, of which
`w0` pads, `w1` ends and `w2` begins a text; dropout is off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 61
PAD, EOS, BOS = 0, 1, 2


def assert_close(actual: Any, expected: Any, tol: float = 1e-5) -> None:
    """The single comparison of floating-point results: |actual - expected| <= tol * (1 + |expected|), NaN never equal.

    Args:
        actual: a tensor, or anything `torch.as_tensor` takes.
        expected: the same shape, from a source other than the code under test.
        tol: absolute near zero, relative for large values.
    """
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=tol, rtol=tol, check_device=False, msg=lambda text: text
    )


def poison(x: Tensor, mask: Tensor, value: float = float("nan")) -> Tensor:
    """A copy of `x` [B, S] with `value` wherever `mask` [B, S] is False: what must not be read."""
    return x.masked_fill(~mask.bool(), value)


def tiny_tokenizer(padding_side: str = "right", pad: bool = True) -> Any:
    """A word-level tokenizer of `w0` ... `w60`; `pad=False` leaves it without a pad token, as GPT-2's is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": f"w{EOS}", "bos_token": f"w{BOS}", "unk_token": "w3"}
    if pad:
        special["pad_token"] = f"w{PAD}"
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=padding_side, **special)


_SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "vocab_size": VOCABULARY}


def tiny_gpt2(seed: int = 0, **overrides: Any) -> Any:
    """A GPT-2 of 2 layers of width 16 (tied embeddings, absolute positions, 64 of them)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(_SPECIAL, n_layer=2, n_head=2, n_embd=16, n_positions=64)
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**(settings | overrides))).eval()


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """A Llama of 2 layers of width 16 (untied head, rotary positions, grouped keys)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(_SPECIAL, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16)
    settings |= {"intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def tiny_t5(seed: int = 0, **overrides: Any) -> Any:
    """A T5 of 2 + 2 layers of width 16 whose decoder starts with token 0."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    settings |= {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(**(settings | overrides))).eval()


def with_cache_called(keyword: str, model: Any) -> tuple[Any, list[Any]]:
    """A GPT-2 whose forward knows its key-value cache by this name alone, and the caches that it is given."""
    kind, seen = type(model), []

    def run(model: Any, tokens: Tensor, cache: Any, positions: Any, kwargs: dict[str, Any]) -> Any:
        assert not {"cache", "past_key_values"} & set(kwargs), f"a forward that takes {keyword} was given {set(kwargs)}"
        seen.append(cache)
        return kind.forward(model, tokens, cache, position_ids=positions, **kwargs)

    class Older(kind):
        def forward(self, input_ids: Any, past_key_values: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            return run(self, input_ids, past_key_values, position_ids, kwargs)

    class Newer(kind):
        def forward(self, input_ids: Any, cache: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
            return run(self, input_ids, cache, position_ids, kwargs)

    model.__class__ = {"past_key_values": Older, "cache": Newer}[keyword]
    return model, seen
