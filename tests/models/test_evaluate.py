"""evaluate(): the numbers of a plain softmax over each sequence alone, however the batch is padded or wrapped."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora, stir
from tests.models.rollouts import make_rollout
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.models import evaluate, predictions, reference_mode
from trl.models.padding import ignores_padding
from trl.types import Rollout


def tiny_bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2, pad_token_id=PAD)
    return transformers.BloomForCausalLM(config).eval()


def tiny_falcon_alibi() -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, alibi=True)).eval()


def tiny_opt() -> Any:
    sizes = {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.0)
    return transformers.OPTForCausalLM(config).eval()


def tiny_mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def tiny_bart() -> Any:
    sizes = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = transformers.BartConfig(**sizes, **heads, max_position_embeddings=64, pad_token_id=PAD)
    return transformers.BartForConditionalGeneration(config).eval()


DECODERS = [tiny_gpt2, tiny_llama, tiny_opt, tiny_bloom, tiny_falcon_alibi, tiny_mamba]
SEQ2SEQ = [tiny_t5, tiny_bart]


def wrap(trunk: Any) -> Any:
    return (Seq2Seq if trunk.config.is_encoder_decoder else Causal).from_pretrained(trunk).eval()


def alone(model: Any, rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    """float64 log-softmax [t, V] and values [t] of one unpadded sequence: the oracle."""
    tokens = rollout.tokens[row][rollout.attention[row]][None]
    kwargs = {"input_ids": tokens}
    if rollout.encoder_tokens is not None and rollout.encoder_attention is not None:
        queries = rollout.encoder_tokens[row][rollout.encoder_attention[row]][None]
        kwargs = {"input_ids": queries, "decoder_input_ids": tokens}
    output = model.pretrained_model(**kwargs, output_hidden_states=True)
    hidden = (output.decoder_hidden_states if "decoder_input_ids" in kwargs else output.hidden_states)[-1]
    values = hidden.double() @ model.v_head.summary.weight.double()[0] + model.v_head.summary.bias.double()
    return output.logits[0].double().log_softmax(-1), values[0]


def rows(rollout: Rollout) -> Iterator[tuple[int, Tensor]]:
    """Row and the number that each masked column has within its unpadded sequence."""
    for row in range(len(rollout)):
        first = int(rollout.attention[row].nonzero()[0])
        yield row, rollout.mask[row].nonzero()[:, 0] - first


@pytest.mark.parametrize("make", DECODERS + SEQ2SEQ)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("response_only", [False, True])
def test_every_row_is_as_if_it_were_alone(make: Any, side: str, response_only: bool) -> None:
    model = wrap(make())
    rollout = make_rollout(side, seq2seq=model.is_encoder_decoder)
    with torch.no_grad():
        got = evaluate(model, rollout, entropy=True, return_logits=True, response_only=response_only)
        for row, places in rows(rollout):
            logp, values = alone(model, rollout, row)
            mask = rollout.mask[row]
            tokens = rollout.tokens[row][1:][mask]
            assert_close(got.logprobs[row][mask], logp[places].gather(-1, tokens[:, None])[:, 0])
            assert_close(got.values[row][mask], values[places])
            assert_close(got.entropy[row][mask], -(logp.exp() * logp).sum(-1)[places])
            assert_close(got.logits[row][mask].log_softmax(-1), logp[places])
    for array in (got.logprobs, got.values, got.entropy):
        assert array.shape == rollout.mask.shape
        assert array.dtype == torch.float32


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bloom, tiny_t5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_on_padding_is_never_read(make: Any, side: str) -> None:
    model = wrap(make())
    clean = make_rollout(side, seq2seq=model.is_encoder_decoder)
    dirty = replace(clean, tokens=clean.tokens.masked_fill(~clean.attention, 10**6))
    if clean.encoder_tokens is not None and clean.encoder_attention is not None:
        dirty = replace(dirty, encoder_tokens=clean.encoder_tokens.masked_fill(~clean.encoder_attention, -100))
    expected, got = evaluate(model, clean), evaluate(model, dirty)
    assert_close(got.logprobs[clean.mask], expected.logprobs[clean.mask])
    assert_close(got.values[clean.mask], expected.values[clean.mask])


@pytest.mark.parametrize("make", DECODERS + SEQ2SEQ)
def test_gradients_are_those_of_the_dense_path(make: Any) -> None:
    model = wrap(make())
    rollout = make_rollout("left", seq2seq=model.is_encoder_decoder)
    got = evaluate(model, rollout, entropy=True, response_only=True)
    weights = torch.rand(rollout.mask.shape)
    total = ((got.logprobs + 0.5 * got.entropy + 2 * got.values) * weights)[rollout.mask].sum()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, places in rows(rollout):
        logp, values = alone(model, rollout, row)
        mask = rollout.mask[row]
        chosen = logp[places].gather(-1, rollout.tokens[row][1:][mask][:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)[places]
        ((chosen + 0.5 * entropy + 2 * values[places]) * weights[row][mask]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad, 1e-4)


@pytest.mark.kernel
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bloom, tiny_t5])  # packed, padded, an encoder-decoder
def test_what_fills_a_size_up_is_not_seen(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    sizes: list[int] = []
    module = import_module("trl.models.evaluate")
    for more in (0, 13):
        monkeypatch.setattr(module, "bucket_size", lambda n, more=more: sizes.append(n + more) or n + more)
        torch.manual_seed(0)
        model = wrap(make())
        rollout = make_rollout("left", seq2seq=model.is_encoder_decoder)
        got = evaluate(model, rollout, entropy=True, response_only=True)
        (got.logprobs.sum() + got.entropy.sum() + got.values.square().sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([got.logprobs, got.values, got.entropy, *gradients])
    assert len(set(sizes)) > 1
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.kernel
def test_rows_of_near_lengths_are_products_of_one_shape() -> None:
    model = wrap(tiny_gpt2())
    shapes: list[tuple[int, ...]] = []
    model.pretrained_model.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    predictions.abilities(model)  # tries the model once
    ignores_padding(model)  # so does this
    shapes.clear()
    for length in (33, 34):
        tokens = torch.arange(length)[None]
        attention = torch.ones_like(tokens, dtype=torch.bool)
        evaluate(model, Rollout(tokens=tokens, attention=attention, mask=attention[:, 1:]))
    assert shapes[0][:2] == (1, 34)
    assert shapes[1] == shapes[0]


def test_temperature_divides_the_logits() -> None:
    model, rollout = wrap(tiny_gpt2()), make_rollout("left")
    got = evaluate(model, rollout, temperature=0.5, entropy=True)
    row, places = next(rows(rollout))
    logp = (2 * alone(model, rollout, row)[0][places]).log_softmax(-1)
    mask = rollout.mask[row]
    assert_close(got.logprobs[row][mask], logp.gather(-1, rollout.tokens[row][1:][mask][:, None])[:, 0])
    assert_close(got.entropy[row][mask], -(logp.exp() * logp).sum(-1))


class Widths:
    """How many columns went through the language-model head."""

    def __init__(self, trunk: Any) -> None:
        self.seen: list[int] = []
        trunk.get_output_embeddings().register_forward_hook(lambda m, a, out: self.seen.append(out.shape[1]))


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_most_likely_tokens_are_told(side: str, projects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not projects:
        plain = predictions.Abilities(False, False)
        monkeypatch.setattr(import_module("trl.models.evaluate"), "abilities", lambda model: plain)
    model, rollout = tiny_llama(), make_rollout(side)
    best = evaluate(model, rollout, return_logits=True).logits
    assert best is not None
    tokens = rollout.tokens.clone()
    tokens[:, 1:][rollout.mask] = best.argmax(dim=-1)[rollout.mask]  # the last of each stays most likely; others change
    changed = replace(rollout, tokens=tokens)
    got = evaluate(model, changed, top1=True, response_only=True).top1
    logits = evaluate(model, changed, return_logits=True).logits
    assert got is not None and logits is not None
    assert torch.equal(got[rollout.mask], (logits.argmax(dim=-1) == tokens[:, 1:])[rollout.mask])
    assert got[rollout.mask].any() and not got[~rollout.mask].any()
    assert evaluate(model, changed).top1 is None


@pytest.mark.kernel
def test_only_the_response_goes_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, rollout = tiny_gpt2(), make_rollout("left")
    rows: list[int] = []
    project = predictions.projected_predictions

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden))
        return project(hidden, *args, **kwargs)

    monkeypatch.setattr(predictions, "projected_predictions", counted)
    got = evaluate(trunk, rollout, response_only=True)
    assert rows == [int(rollout.mask.sum())]
    assert not got.logprobs[~rollout.mask].any()
    evaluate(trunk, rollout)
    assert rows[1] == int((rollout.attention.sum(1) - 1).sum())


def test_only_the_response_span_goes_through_the_head_where_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("trl.models.evaluate"), "abilities", lambda model: predictions.Abilities(False, False)
    )
    trunk = tiny_gpt2()
    ignores_padding(trunk)  # tries the model once
    widths, rollout = Widths(trunk), make_rollout("right")
    span = rollout.mask.any(0).nonzero()[:, 0]
    got = evaluate(trunk, rollout, response_only=True)
    assert widths.seen == [int(span[-1] - span[0]) + 1]
    outside = torch.ones_like(rollout.mask)
    outside[:, span[0] : span[-1] + 1] = False
    assert not got.logprobs[outside].any()
    evaluate(trunk, rollout)
    assert widths.seen[1] == rollout.mask.shape[1]


def test_model_that_keeps_a_number_of_logits_only() -> None:
    class Old(transformers.GPT2LMHeadModel):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, logits_to_keep: int = 0
        ) -> Any:
            assert isinstance(logits_to_keep, int)
            return super().forward(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep
            )

    trunk = Old(tiny_gpt2().config).eval()
    trunk.load_state_dict(tiny_gpt2().state_dict())
    rollout = make_rollout("left")
    for response_only in (False, True):
        got = evaluate(trunk, rollout, response_only=response_only)
        expected = evaluate(tiny_gpt2(), rollout, response_only=response_only)
        counted = rollout.mask if response_only else rollout.attention[:, :-1] & rollout.attention[:, 1:]
        assert_close(got.logprobs[counted], expected.logprobs[counted])


def test_a_mask_without_a_response_token() -> None:
    rollout = make_rollout("right")
    rollout = replace(rollout, mask=torch.zeros_like(rollout.mask))
    got = evaluate(wrap(tiny_gpt2()), rollout, response_only=True)
    assert got.logprobs.shape == rollout.mask.shape
    got.logprobs.sum().backward()  # every rank must be able to


def test_plain_models_have_no_values() -> None:
    rollout = make_rollout("left")
    trunk = tiny_gpt2()
    plain, headed = evaluate(trunk, rollout), evaluate(wrap(trunk), rollout, values=False)
    assert plain.values is None
    assert headed.values is None
    assert plain.entropy is None
    assert plain.logits is None
    assert_close(plain.logprobs, headed.logprobs)


def test_adapters() -> None:
    rollout = make_rollout("left")
    adapted = lora(tiny_gpt2()).eval()
    stir(adapted)
    model = Causal.from_pretrained(adapted).eval()
    got = evaluate(model, rollout, response_only=True)
    assert_close(got.logprobs, evaluate(adapted, rollout, response_only=True).logprobs)
    with reference_mode(model) as reference:
        expected = evaluate(tiny_gpt2(), rollout).logprobs
        assert_close(evaluate(reference, rollout, values=False).logprobs, expected)
        assert_close(evaluate(adapted, rollout).logprobs, expected)
    assert (got.logprobs - expected)[rollout.mask].abs().max() > 0.01


def test_caches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = tiny_gpt2()
    trunk.config.use_cache = True
    predictions.abilities(trunk)
    ignores_padding(trunk)
    seen: list[Any] = []
    trunk.transformer.register_forward_hook(lambda m, a, out: seen.append(out.get("cache", out.get("past_key_values"))))
    evaluate(wrap(trunk), make_rollout("left"))
    assert seen == [None]


class LargestFloat32(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_half_precision_logits_are_never_whole_in_float32() -> None:
    vocabulary = 4096
    model = Causal.from_pretrained(tiny_gpt2(vocab_size=vocabulary).bfloat16())
    tokens = torch.randint(3, vocabulary, (16, 60))
    rollout = Rollout(
        tokens=tokens, attention=torch.ones_like(tokens, dtype=torch.bool), mask=torch.ones(16, 59, dtype=torch.bool)
    )
    with LargestFloat32() as watch:
        got = evaluate(model, rollout, entropy=True)
        (got.logprobs.sum() + got.values.sum()).backward()
    assert got.logprobs.dtype == got.values.dtype == torch.float32
    assert 0 < watch.largest <= 256 * vocabulary < 16 * 59 * vocabulary / 3


def test_half_precision_is_close_to_float32() -> None:
    rollout = make_rollout("left")
    exact = evaluate(wrap(tiny_gpt2()), rollout)
    half = evaluate(wrap(tiny_gpt2().bfloat16()), rollout)
    assert_close(half.logprobs[rollout.mask], exact.logprobs[rollout.mask], 0.02)


def test_wrapped_for_several_processes() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for trunk in (tiny_gpt2(), tiny_t5()):
            model = wrap(trunk)
            calls: list[int] = []
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            rollout = make_rollout("left", seq2seq=model.is_encoder_decoder)
            got, expected = (
                evaluate(parallel, rollout, response_only=True),
                evaluate(model, rollout, response_only=True),
            )
            assert_close(got.logprobs, expected.logprobs)
            assert_close(got.values, expected.values)
            assert calls == [1], "gradients are averaged only if the wrapper itself is called"
            (got.logprobs.sum() + got.values.sum()).backward()
    finally:
        dist.destroy_process_group()


def test_rollouts_that_do_not_fit() -> None:
    rollout = make_rollout("left")
    with pytest.raises(ValueError, match="mask one fewer"):
        evaluate(wrap(tiny_gpt2()), replace(rollout, mask=rollout.attention))
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration is an encoder-decoder and needs the rollout's encoder_tokens"
    ):
        evaluate(wrap(tiny_t5()), rollout)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not an encoder-decoder"):
        evaluate(wrap(tiny_gpt2()), make_rollout("left", seq2seq=True))
    with pytest.raises(ValueError, match="temperature=0"):
        evaluate(wrap(tiny_gpt2()), rollout, temperature=0.0)


@pytest.mark.parametrize("how", ["subclass", "instance", "narrow", "four"])
def test_a_forward_of_a_client_s_own_is_what_is_evaluated(how: str) -> None:
    """Its logits count, however the library would have read the model under it."""

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.logits / 0.5, None, self.v_head(output.hidden_states[-1]).squeeze(-1)

    def narrow(self: Any, input_ids: Any, attention_mask: Any = None) -> Any:
        return forward(self, input_ids, attention_mask)

    def four(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits, loss, values = Causal.forward(self, *args, **kwargs)
        return logits / 0.5, loss, values, None

    chosen = {"subclass": forward, "instance": forward, "narrow": narrow, "four": four}[how]
    if how == "instance":
        model = Causal.from_pretrained(tiny_gpt2()).eval()
        model.forward = types.MethodType(chosen, model)
    else:
        model = type("Own", (Causal,), {"forward": chosen}).from_pretrained(tiny_gpt2()).eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 5, 6, 7]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    rollout = Rollout(tokens=tokens, attention=attention, mask=attention[:, :-1] & attention[:, 1:])
    found = evaluate(model, rollout, response_only=True)
    for row, start in ((0, 0), (1, 2)):
        alone = tokens[row : row + 1, start:]
        logits = model.pretrained_model(alone).logits / 0.5
        expected = logits.log_softmax(-1)[0, :-1].gather(1, alone[0, 1:, None]).squeeze(1)
        assert_close(found.logprobs[row, start:], expected)


@pytest.mark.parametrize("make", DECODERS + SEQ2SEQ)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mean_logits(make: Any, side: str) -> None:
    model = make()
    rollout = make_rollout(side, seq2seq=model.config.is_encoder_decoder)
    with torch.no_grad():
        expected = evaluate(model, rollout, return_logits=True).logits.double().mean(dim=-1)
    got = evaluate(model, rollout, response_only=True, mean_logits=True).mean_logits
    assert got is not None and not got.requires_grad
    assert_close(got[rollout.mask], expected[rollout.mask])
