"""One tiny model per supported architecture, built from its configuration: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.helpers import BOS, EOS, PAD

VOCABULARY = 64
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# Spellings of "two layers of width 16 with two heads".
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_LLAMA_8 = _LLAMA | {"head_dim": 8}
# Heads and their width differ between layers.
_GEMMA_4: dict[str, Any] = _LLAMA_8 | {
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": PAD,
}
_NO_BOS = {"bos_token_id": None}


@dataclass(frozen=True)
class Architecture:
    """How to build it, and what is known to be different about it."""

    name: str
    model: str  # class of transformers
    config: str  # class of transformers
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoder_decoder: bool = False
    notes: str = ""  # stands in the table of docs/models.md

    def build(self, seed: int = 0) -> Any:
        """The model, in evaluation mode, on the CPU, in float32."""
        import transformers

        config: Callable[..., Any] = getattr(transformers, self.config)
        torch.manual_seed(seed)
        return getattr(transformers, self.model)(config(**(_TOKENS | dict(self.settings)))).eval()


def _decoder(name: str, stem: str, settings: Mapping[str, Any], model: str = "", notes: str = "") -> Architecture:
    return Architecture(name, model or f"{stem}ForCausalLM", f"{stem}Config", settings, False, notes)


def _seq2seq(name: str, stem: str, settings: Mapping[str, Any], model: str = "", notes: str = "") -> Architecture:
    model = model or f"{stem}ForConditionalGeneration"
    return Architecture(name, model, f"{stem}Config", settings, True, notes)


ZOO = (
    _decoder("GPT-2", "GPT2", _GPT, "GPT2LMHeadModel"),
    _decoder("GPT-J", "GPTJ", _GPT | {"rotary_dim": 4}),
    _decoder(
        "GPT-Neo",
        "GPTNeo",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "window_size": 4,
        },
    ),
    _decoder("GPT-NeoX", "GPTNeoX", {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    _decoder("OPT", "OPT", _LLAMA | {"ffn_dim": 24, "word_embed_proj_dim": 12}),
    _decoder("BLOOM", "Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    _decoder("CodeGen", "CodeGen", _GPT | {"n_head": 4, "rotary_dim": 4}),
    _decoder("Llama", "Llama", _LLAMA),
    _decoder("Mistral", "Mistral", _LLAMA_8 | {"sliding_window": 6}),
    _decoder("Qwen2", "Qwen2", _LLAMA),
    _decoder("Qwen3", "Qwen3", _LLAMA_8),
    _decoder("Gemma 2", "Gemma2", _LLAMA_8 | {"query_pre_attn_scalar": 8, "sliding_window": 6}),
    _decoder("Gemma 3 (text)", "Gemma3Text", _LLAMA_8 | {"sliding_window": 6}, "Gemma3ForCausalLM"),
    _decoder("Gemma 4 (text)", "Gemma4Text", _GEMMA_4, "Gemma4ForCausalLM"),
    _decoder(
        "Gemma 4 E (text)",
        "Gemma4Text",
        _GEMMA_4 | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _GEMMA_4["layer_types"] * 2},
        "Gemma4ForCausalLM",
    ),
    _decoder("Phi-3", "Phi3", _LLAMA | {"original_max_position_embeddings": 64}),
    _decoder("OLMo 2", "Olmo2", _LLAMA),
    _decoder("Falcon", "Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    _decoder("StableLM", "StableLm", _LLAMA),
    _decoder("GPT-OSS", "GptOss", _LLAMA_8 | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    _decoder("Mixtral", "Mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    _decoder(
        "Qwen3-MoE",
        "Qwen3Moe",
        _LLAMA_8 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    _decoder("Cohere", "Cohere", _LLAMA),
    _decoder("Granite", "Granite", _LLAMA | {"logits_scaling": 8.0}),
    _decoder(
        "Laguna",
        "Laguna",
        _LLAMA_8
        | {"num_attention_heads_per_layer": [2, 4], "layer_types": ["full_attention", "sliding_attention"]}
        | {"sliding_window": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
    _decoder("MPT", "Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    _decoder(
        "Llama 4 (text)",
        "Llama4Text",
        _LLAMA_8 | {"intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": 6},
        "Llama4ForCausalLM",
    ),
    _decoder(
        "ModernBERT decoder",
        "ModernBertDecoder",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"local_attention": 8},
    ),
    _decoder(
        "DeepSeek-V2",
        "DeepseekV2",
        _LLAMA
        | {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1},
    ),
    _decoder("Mamba", "Mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}),
    _decoder(
        "Falcon-Mamba",
        "FalconMamba",
        {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4},
    ),
    _seq2seq("T5", "T5", _T5 | _NO_BOS),
    _seq2seq("mT5", "MT5", _T5 | _NO_BOS | {"feed_forward_proj": "gated-gelu"}),
    _seq2seq("FLAN-T5", "T5", _T5 | _NO_BOS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    _seq2seq("BART", "Bart", _BART),
    _seq2seq("mBART", "MBart", _BART),
    _seq2seq("Pegasus", "Pegasus", _BART),
    _seq2seq("Pegasus-X", "PegasusX", _BART | {"block_size": 8, "num_global_tokens": 2}),
    _seq2seq("BigBird-Pegasus", "BigBirdPegasus", _BART | {"attention_type": "original_full"}),
    _seq2seq("Blenderbot", "Blenderbot", _BART),
    _seq2seq("Blenderbot-small", "BlenderbotSmall", _BART),
    _seq2seq(
        "FSMT",
        "FSMT",
        _BART | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]},
    ),
    _seq2seq(
        "LED",
        "LED",
        _BART | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        notes="global attention is not trained (see Limits)",
    ),
    _seq2seq("LongT5", "LongT5", _T5 | _NO_BOS | {"local_radius": 4, "global_block_size": 4}),
    _seq2seq("M2M100", "M2M100", _BART),
    _seq2seq("Marian", "Marian", _BART | {"decoder_vocab_size": VOCABULARY}, "MarianMTModel"),
    _seq2seq("MVP", "Mvp", _BART),
    _seq2seq("PLBart", "PLBart", _BART),
    _seq2seq(
        "ProphetNet",
        "ProphetNet",
        {
            "hidden_size": 16,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "num_decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "decoder_start_token_id": BOS,
            "ngram": 2,
        },
    ),
    _seq2seq(
        "Switch Transformers",
        "SwitchTransformers",
        _T5
        | _NO_BOS
        | {"num_experts": 2, "expert_capacity": 64, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        notes="expert capacity (see Limits)",
    ),
)

# Those that our own decoding loop drives: neither state space models nor one whose predictions see later tokens.
DRIVEN = [a for a in ZOO if "Mamba" not in a.name and a.name != "ProphetNet"]

# The most used ones, and one for each way of building a model that no other has: they run in `make test`.
EVERYDAY = {
    "GPT-2", "GPT-NeoX", "OPT", "BLOOM", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 3 (text)", "Gemma 4 (text)", "Phi-3",
    "Mixtral", "DeepSeek-V2", "Mamba", "T5", "BART",
}  # fmt: skip


def everyday(architectures: Iterable[Architecture]) -> list[Any]:
    """Parameters of a test: the architectures in `EVERYDAY`, and the others for `make slow`."""
    return [pytest.param(a, id=a.name, marks=() if a.name in EVERYDAY else pytest.mark.slow) for a in architectures]


def sharp(architecture: Architecture) -> Any:
    """The model with larger matrices: at its initial size attention is nearly uniform, and hides a wrong position."""
    model = architecture.build()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model
