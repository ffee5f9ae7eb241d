"""Conformance 1, 33, 35, 38, 40, 44: what a right implementation does with models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tests.models.lora import lora, lora_config, stir
from tests.models.rollouts import make_rollout, pad
from trl.kernels.packed_attention import packed_mask
from trl.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    ValueHead,
    adapter_starts_at_zero,
    create_reference_model,
    evaluate,
    reference_mode,
)
from trl.models.predictions import may_pack
from trl.rollout import obstacle, sample
from trl.types import Rollout, Sampling

pytestmark = pytest.mark.conformance


def headed(trunk: Any) -> Any:
    auto = AutoModelForSeq2SeqLMWithValueHead if trunk.config.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    return auto.from_pretrained(trunk).eval()


def unpadded(trunk: Any, rollout: Rollout) -> Tensor:
    """Log-probabilities of the response tokens by the plain model, one sequence at a time, in float64."""
    found = []
    for row in range(len(rollout)):
        real = rollout.attention[row]
        tokens = rollout.tokens[row][real][None]
        kwargs = {"input_ids": tokens}
        if rollout.encoder_tokens is not None and rollout.encoder_attention is not None:
            queries = rollout.encoder_tokens[row][rollout.encoder_attention[row]][None]
            kwargs = {"input_ids": queries, "decoder_input_ids": tokens}
        logp = trunk(**kwargs).logits[0].double().log_softmax(-1)
        places = rollout.mask[row].nonzero()[:, 0] - int(real.nonzero()[0])
        found.append(logp[places].gather(-1, tokens[0, places + 1][:, None])[:, 0])
    return torch.cat(found)


# -- 1 -----------------------------------------------------------------------------------------------------------


def tiny_opt() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, vocab_size=61, word_embed_proj_dim=16, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config).eval()


def tiny_bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2, pad_token_id=PAD)
    return transformers.BloomForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_opt, tiny_bloom, tiny_llama, tiny_t5])
@torch.no_grad()
def test_01_left_and_right_padding_give_the_logprobs_and_values_of_no_padding(make: Any) -> None:
    trunk = make()
    model = headed(trunk)
    left, right = (make_rollout(side, seq2seq=model.is_encoder_decoder) for side in ("left", "right"))
    on_left, on_right = evaluate(model, left), evaluate(model, right)
    expected = unpadded(trunk, right)
    assert_close(on_left.logprobs[left.mask], expected)
    assert_close(on_right.logprobs[right.mask], expected)
    assert_close(on_left.values[left.mask], on_right.values[right.mask])


@torch.no_grad()
def test_01_positions_count_from_the_first_token() -> None:
    """GPT-2 without position ids is wrong by this much: the test would notice."""
    trunk, rollout = tiny_gpt2(), make_rollout("left")
    logits = trunk(rollout.tokens, attention_mask=rollout.attention.long()).logits[:, :-1]
    naive = logits.log_softmax(-1).gather(-1, rollout.tokens[:, 1:, None])[..., 0]
    assert (naive[rollout.mask] - unpadded(trunk, rollout)).abs().max() > 1e-3


# -- 33 ----------------------------------------------------------------------------------------------------------


def tied() -> Any:
    trunk = tiny_gpt2()
    assert trunk.lm_head.weight is trunk.transformer.wte.weight
    return trunk


def with_bias() -> Any:
    config = transformers.GPTJConfig(vocab_size=61, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64)
    trunk = transformers.GPTJForCausalLM(config).eval()
    torch.nn.init.normal_(trunk.lm_head.bias)
    return trunk


def soft_capped() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma2Config(
        **sizes, vocab_size=61, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5
    )
    trunk = transformers.Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(trunk.lm_head.weight)
    return trunk


def adapted() -> Any:
    trunk = lora(tiny_gpt2()).eval()
    stir(trunk)
    return trunk


@pytest.mark.parametrize("make", [tied, with_bias, soft_capped, adapted])
@pytest.mark.parametrize("response_only", [False, True])
def test_33_chunked_logprobs_entropy_and_gradients_equal_the_dense_path(make: Any, response_only: bool) -> None:
    model = headed(make())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (12, 50), generator=generator)  # 588 rows: three chunks
    mask = torch.ones(12, 49, dtype=torch.bool)
    mask[:, :5] = False
    rollout = Rollout(tokens=tokens, attention=torch.ones_like(tokens, dtype=torch.bool), mask=mask)
    weights = torch.rand(2, 12, 49, generator=generator)

    got = evaluate(model, rollout, entropy=True, temperature=0.7, response_only=response_only)
    (got.logprobs * weights[0] + got.entropy * weights[1])[mask].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model.pretrained_model(tokens).logits[:, :-1].double() / 0.7
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    (chosen * weights[0] + entropy * weights[1])[mask].sum().backward()

    assert_close(got.logprobs[mask], chosen[mask])
    assert_close(got.entropy[mask], entropy[mask])
    dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dense.keys()
    for name, gradient in dense.items():
        assert_close(gradients[name], gradient, 1e-4)  # sums over 588 rows in float32


# -- 35 ----------------------------------------------------------------------------------------------------------


def train(model: Any, rollout: Rollout, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        got = evaluate(model, rollout)
        (got.logprobs + got.values)[rollout.mask].sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_35_the_disabled_adapter_is_the_reference_if_it_started_at_zero_and_stays_so() -> None:
    rollout = make_rollout("left")
    start = evaluate(tiny_gpt2(), rollout).logprobs
    model = headed(lora(tiny_gpt2()))
    assert adapter_starts_at_zero(model)
    assert_close(evaluate(model, rollout).logprobs, start)
    train(model, rollout)
    assert (evaluate(model, rollout).logprobs - start)[rollout.mask].abs().max() > 0.01
    with reference_mode(model) as reference:
        assert_close(evaluate(reference, rollout).logprobs, start, 0)


def test_35_otherwise_a_frozen_copy_is_and_stays_so() -> None:
    rollout = make_rollout("left")
    model = headed(adapted())
    start = evaluate(model, rollout).logprobs.detach()
    assert not adapter_starts_at_zero(model)
    with reference_mode(model) as reference:  # what TRL 0.4.6 took: not the policy that training starts from
        assert (evaluate(reference, rollout).logprobs - start)[rollout.mask].abs().max() > 0.1
    reference = create_reference_model(model)
    train(model, rollout)
    assert_close(evaluate(reference, rollout).logprobs, start, 0)


@pytest.mark.parametrize("trained_before", [False, True])
def test_35_the_trainer_starts_at_kl_0_from_a_fresh_and_from_a_trained_adapter(trained_before: bool) -> None:
    from trl import PPOConfig, PPOTrainer

    trunk = lora(tiny_gpt2()).eval()
    if trained_before:
        stir(trunk)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(trunk, summary_dropout_prob=0.0)
    trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2, learning_rate=0.05), model, None, tiny_tokenizer())
    batch = ([torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8, 9]), torch.tensor([10, 11])])
    scores = [torch.tensor(1.0), torch.tensor(-1.0)]
    first, second = trainer.step(*batch, scores), trainer.step(*batch, scores)
    assert abs(float(first["objective/kl"])) < 1e-5
    assert abs(float(second["objective/kl"])) > 1e-3


# -- 38 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 768, 4096])
def test_38_the_value_head_starts_near_zero_in_float32_with_a_bias(width: int) -> None:
    class Config:
        hidden_size = width

    head = ValueHead(Config()).eval()
    assert head.summary.weight.dtype == head.summary.bias.dtype == torch.float32
    assert head.summary.weight.any()
    assert head.summary.bias.item() != 0
    normalised = torch.nn.functional.layer_norm(torch.randn(1000, width), (width,))
    assert head(normalised).abs().mean().item() < 0.3


def test_38_the_value_head_is_float32_in_a_half_precision_model() -> None:
    model = headed(tiny_gpt2()).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
    rollout = make_rollout("left")
    assert evaluate(model, rollout).values.dtype == torch.float32


def test_38_biases_do_not_decay() -> None:
    from trl import PPOConfig, PPOTrainer

    trainer = PPOTrainer(PPOConfig(batch_size=1, mini_batch_size=1), headed(tiny_gpt2()), None, tiny_tokenizer())
    decays = {id(p): group.get("weight_decay", 0) for group in trainer.optimizer.param_groups for p in group["params"]}
    biases = [p for name, p in trainer.model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all(decays[id(p)] == 0 for p in biases)


# -- 40 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_t5])
@pytest.mark.parametrize("shard", ["5KB", "5GB"])
def test_40_the_critic_round_trips_and_the_policy_loads_in_transformers(make: Any, shard: str, tmp_path: Path) -> None:
    model = headed(make())
    rollout = make_rollout("left", seq2seq=model.is_encoder_decoder)
    before = evaluate(model, rollout)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    after = evaluate(type(model).from_pretrained(tmp_path).eval(), rollout)
    assert_close(after.logprobs, before.logprobs, 0)
    assert_close(after.values, before.values, 0)
    plain, info = type(model).transformers_parent_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain) is type(model.pretrained_model)
    right = make_rollout("right", seq2seq=model.is_encoder_decoder)
    assert_close(before.logprobs[rollout.mask], unpadded(plain, right))


def test_40_with_an_adapter(tmp_path: Path) -> None:
    import peft

    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora_config()).eval()
    stir(model)
    rollout = make_rollout("left")
    before = evaluate(model, rollout)
    model.save_pretrained(tmp_path / "policy")
    after = evaluate(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy").eval(), rollout)
    assert_close(after.logprobs, before.logprobs)
    assert_close(after.values, before.values)
    trunk = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        plain = peft.PeftModel.from_pretrained(trunk, str(tmp_path / "policy")).eval()
    assert_close(evaluate(plain, rollout).logprobs, before.logprobs)


# -- 44 ----------------------------------------------------------------------------------------------------------

_WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 10},
    "Qwen2": {"sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1},
    "Phi3": {"sliding_window": 10, "original_max_position_embeddings": 64},
    "Gemma3": {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOss": {"sliding_window": 10, "num_local_experts": 4, "num_experts_per_tok": 2},
    # These put the window into their mask and pass none to their attention.
    "Qwen2Moe": {
        "sliding_window": 10, "use_sliding_window": True, "max_window_layers": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
    "Phimoe": {"sliding_window": 10, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Doge": {"sliding_window": 10, "keep_window_size": 10},
    "Llama4": {"attention_chunk_size": 10, "num_local_experts": 4, "intermediate_size_mlp": 24},
    "DeepseekV4": {
        "sliding_window": 10, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "index_topk": 10, "index_head_dim": 8, "index_n_heads": 2, "q_lora_rank": 8,
    },
    "GPTNeo": {"window_size": 10, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip


def windowed(name: str) -> Any:
    """A tiny model that looks back 10 tokens at most, in some layer; its matrices are large, so that what it sees shows."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": 61}
    config = getattr(transformers, f"{name}{'Text' if name in ('Gemma3', 'Llama4') else ''}Config")
    if name == "GPTNeo":
        sizes = {"hidden_size": 16, "max_position_embeddings": 64, "vocab_size": 61}
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**sizes, **special, **_WINDOWED[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", _WINDOWED)
@torch.no_grad()
def test_44_scoring_beyond_a_window_or_chunk_equals_scoring_each_sequence_alone(name: str, side: str) -> None:
    trunk = windowed(name)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 61, (n,), generator=generator) for n in (36, 8, 24)]
    tokens, attention = pad(rows, side)
    rollout = Rollout(tokens=tokens, attention=attention, mask=attention[:, 1:] & attention[:, :-1])
    expected = unpadded(trunk, rollout)
    assert_close(evaluate(trunk, rollout).logprobs[rollout.mask], expected, 1e-4)


@pytest.mark.parametrize("name", [name for name in _WINDOWED if name != "DeepseekV4"])  # which generate samples from
@torch.no_grad()
def test_44_sampling_beyond_a_window_or_chunk_sees_what_scoring_sees(name: str) -> None:
    trunk = windowed(name)
    queries = [torch.tensor(ids) for ids in ([5, 6, 7], list(range(8, 22)), [40])]
    uniforms = torch.rand(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert obstacle(trunk) is None
    got = sample(trunk, queries, sampling=Sampling(), limits=[30] * 3, uniforms=uniforms)
    for query, response, logprobs in zip(queries, got.responses, got.logprobs, strict=True):
        logp = trunk(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].log_softmax(-1)
        assert len(response) == 30
        assert_close(logprobs, logp.gather(-1, response[:, None])[:, 0], 1e-4)


@pytest.mark.kernel
def test_44_a_window_is_packed_and_a_chunk_is_not() -> None:
    assert all(may_pack(windowed(name)) for name in ("Mistral", "Qwen2Moe", "Phimoe"))
    assert not may_pack(windowed("Llama4"))
    with pytest.raises(NotImplementedError, match="chunks of 10"):
        packed_mask(local_size=10, config=windowed("Llama4").config)
