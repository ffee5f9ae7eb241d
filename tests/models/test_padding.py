"""Models that see padding or look ahead: the numbers of each sequence alone, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers import BOS, EOS, PAD, VOCABULARY, assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.rollouts import make_rollout
from tests.models.zoo import ZOO
from trl.kernels.door import kernels_enabled
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import create_reference_model, evaluate, evaluate_exact_kl
from trl.models.limits import context_length
from trl.models.padding import ignores_padding
from trl.models.predictions import abilities
from trl.types import Rollout

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": PAD, "eos_token_id": EOS,
    "bos_token_id": BOS, "max_position_embeddings": 64,
}  # fmt: skip


def _made(model: str, config: Any) -> Any:
    return _stirred(getattr(transformers, model)(config).eval())


def _stirred(made: Any) -> Any:
    torch.manual_seed(0)
    for parameter in made.parameters():  # far from an initialization, where nothing depends on anything
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=max(4, parameter.shape[-1]) ** -0.5)
    return made


def tiny_recurrent_gemma() -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k != "max_position_embeddings"}
    config = transformers.RecurrentGemmaConfig(
        **sizes | {"num_hidden_layers": 3}, lru_width=16, attention_window_size=8
    )
    return _made("RecurrentGemmaForCausalLM", config)


def tiny_llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **_SIZES, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=4
    )
    return _made("Llama4ForCausalLM", config)


def tiny_modernbert() -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    return _made("ModernBertDecoderForCausalLM", transformers.ModernBertDecoderConfig(**sizes, local_attention=8))


def tiny_bert(is_decoder: bool) -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    config = transformers.BertConfig(**sizes, is_decoder=is_decoder, hidden_dropout_prob=0.0)
    return _made("BertLMHeadModel", config)


class SeesPadding(transformers.LlamaForCausalLM):
    """Its logits depend on how many columns a batch has."""

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(input_ids, *args, **kwargs)
        output.logits = output.logits * (1 + torch.arange(VOCABULARY) * input_ids.shape[1] / 1000)
        return output


def tiny_seeing_padding() -> Any:
    return _made_seeing(tiny_llama())


def _made_seeing(model: Any) -> Any:
    torch.manual_seed(0)
    seeing = SeesPadding(model.config).eval()
    seeing.load_state_dict(model.state_dict())
    return seeing


def _alone(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S]` log-probabilities, values and entropies by plain passes over each sequence, 0 off the mask."""
    found = [torch.zeros(rollout.mask.shape) for _ in range(3)]
    plain = model.pretrained_model
    for row, (tokens, attention) in enumerate(zip(rollout.tokens, rollout.attention, strict=True)):
        columns = attention.nonzero().squeeze(1)
        output = plain(input_ids=tokens[columns][None], use_cache=False, output_hidden_states=True)
        softmax = output.logits[0].float().log_softmax(dim=-1)[:-1]
        found[0][row, columns[:-1]] = softmax.gather(1, tokens[columns[1:], None]).squeeze(1)
        found[1][row, columns[:-1]] = model.v_head(output.hidden_states[-1]).squeeze(-1)[0, :-1]
        found[2][row, columns[:-1]] = -(softmax.exp() * softmax).sum(dim=-1)
    return tuple(x.masked_fill(~rollout.mask, 0.0) for x in found)  # type: ignore[return-value]


def _wrap(model: Any) -> Any:
    return Causal.from_pretrained(model, summary_dropout_prob=0.0).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny_recurrent_gemma, tiny_llama4, tiny_modernbert, tiny_seeing_padding])
@torch.no_grad()
def test_numbers_are_those_of_each_sequence_alone(make: Callable[[], Any], side: str) -> None:
    model, rollout = _wrap(make()), make_rollout(side)
    expected = _alone(model, rollout)
    for response_only in (False, True):
        got = evaluate(model, rollout, entropy=True, response_only=response_only)
        for numbers, right in zip((got.logprobs, got.values, got.entropy), expected, strict=True):
            assert numbers is not None
            assert_close(numbers.masked_fill(~rollout.mask, 0.0), right)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_sees_padding_is_read_by_lengths(side: str, caplog: pytest.LogCaptureFixture) -> None:
    model, other = _wrap(tiny_seeing_padding()), _wrap(_made_seeing(tiny_llama(seed=1)))
    with caplog.at_level(logging.INFO):
        assert not ignores_padding(model)
        assert ignores_padding(_wrap(tiny_llama()))
    assert "SeesPadding: only sequences of equal length share a pass: padding changes the logits by" in caplog.text
    rollout = make_rollout(side)
    with torch.no_grad():
        logits = evaluate(model, rollout, return_logits=True).logits
        kl = evaluate_exact_kl(model, lambda: nullcontext(other), rollout)
    assert logits is not None
    for row, (tokens, attention) in enumerate(zip(rollout.tokens, rollout.attention, strict=True)):
        columns = attention.nonzero().squeeze(1)
        with torch.no_grad():
            p, q = (x.pretrained_model(input_ids=tokens[columns][None]).logits[0, :-1] for x in (model, other))
        assert_close(logits[row, columns[:-1]], p)
        exact = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        assert_close(kl[row, columns[:-1]], exact)
    got = evaluate(model, rollout)
    assert got.values is not None
    (got.logprobs + got.values)[rollout.mask].sum().backward()
    gradient = model.pretrained_model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    expected = _alone(model, rollout)
    (expected[0] + expected[1])[rollout.mask].sum().backward()
    assert_close(gradient, model.pretrained_model.model.embed_tokens.weight.grad)


def test_a_decoder_that_looks_ahead_is_refused() -> None:
    rollout = make_rollout("right")
    with pytest.raises(ValueError, match=r"BertLMHeadModel: logits depend on later tokens.*is_decoder=True"):
        evaluate(_wrap(tiny_bert(False)), rollout)
    model = _wrap(tiny_bert(True))
    with torch.no_grad():
        got, expected = evaluate(model, rollout), _alone(model, rollout)
    assert_close(got.logprobs.masked_fill(~rollout.mask, 0.0), expected[0])


def test_an_encoder_decoder_that_looks_ahead_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert ignores_padding(_stirred(tiny_t5()))
    assert not caplog.text
    (prophetnet,) = (architecture for architecture in ZOO if architecture.name == "ProphetNet")
    ignores_padding(_stirred(prophetnet.build()))
    assert "ProphetNetForConditionalGeneration: logits depend on later tokens" in caplog.text


@pytest.mark.parametrize(("kind", "told"), [("Roberta", True), ("Electra", False)])
def test_positions_that_a_model_counts_in_another_way_are_told(
    kind: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {k: v for k, v in _SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    config = getattr(transformers, f"{kind}Config")(**sizes, is_decoder=True)
    assert ignores_padding(_made(f"{kind}ForCausalLM", config))
    assert (f"{kind}ForCausalLM: positions are counted from 0" in caplog.text) == told


def test_what_was_tried_leaves_no_trace() -> None:
    model = _wrap(tiny_gpt2(attn_pdrop=0.5)).train()
    assert ignores_padding(model)  # with dropout, it would not seem to
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_llama4_shares_its_first_layers() -> None:
    model = _wrap(tiny_llama4())
    reference = create_reference_model(model, num_shared_layers=1)
    assert reference.pretrained_model.model.layers[0].self_attn.q_proj.weight is (
        model.pretrained_model.model.layers[0].self_attn.q_proj.weight
    )
    assert abilities(model).projects == kernels_enabled()


def test_longrope_ends_where_its_frequencies_change() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0],
    }  # fmt: skip
    sizes = _SIZES | {"original_max_position_embeddings": 16, "rope_parameters": rope}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
    assert context_length(model) == 16
    assert context_length(tiny_llama()) == 64
