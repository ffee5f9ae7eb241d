"""Decoding in steps of fixed shapes: the same tokens and log-probabilities as step by step. A GPU replays them as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.zoo import DRIVEN, Architecture, sharp
from trl.kernels.decode_graph import fixed_attention
from trl.kernels.kv_cache import growing_cache
from trl.rollout import sample
from trl.rollout.fixed_decoder import FixedDecoder
from trl.rollout.local import Sampled
from trl.rollout.self_check import fixed_steps_obstacle
from trl.types import Sampling

pytestmark = pytest.mark.kernel
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [8, 9, 10, 11, 12], [40])]
LIMITS = [16, 9, 3, 12, 16]


@pytest.fixture
def drops_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a decoder drop any number of finished rows; lists how many it kept each time."""
    kept: list[int] = []
    keep = FixedDecoder.keep

    def watched(self: FixedDecoder, rows: Tensor) -> None:
        kept.append(len(rows))
        keep(self, rows)

    monkeypatch.setattr(FixedDecoder, "least_dropped_rows", 1)
    monkeypatch.setattr(FixedDecoder, "keep", watched)
    return kept


def both(model: Any, device: str, sampling: Sampling, **options: Any) -> list[Sampled]:
    model = model.to(device)
    uniforms = torch.rand(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [
        sample(model, QUERIES, sampling=sampling, limits=LIMITS, uniforms=uniforms, fixed_steps=fixed, **options)
        for fixed in (False, True)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", [a for a in DRIVEN if not a.encoder_decoder], ids=lambda a: a.name)
def test_the_same_responses(architecture: Architecture, device: str, drops_rows: list[int]) -> None:
    model = sharp(architecture).to(device)
    if (reason := fixed_steps_obstacle(model)) is not None:
        assert type(model).__name__ in reason  # its own reason, and it decodes step by step
        return
    plain, fixed = both(model, device, Sampling(greedy=True, stops=(11, 12)))
    assert [r.tolist() for r in fixed.responses] == [r.tolist() for r in plain.responses]
    assert drops_rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_the_same_draws_and_logprobs(build: Any, device: str, drops_rows: list[int]) -> None:
    plain, fixed = both(build(), device, Sampling(stops=tuple(range(20, 30)), temperature=0.7, least_tokens=2))
    for one, other in zip(plain.responses, fixed.responses, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain.logprobs, fixed.logprobs, strict=True):
        assert_close(one, other, tol=1e-5)
    assert drops_rows


def test_most_architectures_can() -> None:
    able = {a.name for a in DRIVEN if not a.encoder_decoder and fixed_steps_obstacle(sharp(a)) is None}
    assert {"GPT-2", "GPT-NeoX", "Llama", "Granite"} <= able, sorted(able)


def test_attention_names_what_it_does_not_support() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="does not support softcap"):
        fixed_attention(None, x, x, x, torch.zeros(1, 1, 1, 1), softcap=30.0)
    with pytest.raises(ValueError, match="does not support this layer"):
        fixed_attention(None, x, x, x, None)


def test_reasons() -> None:
    assert "is an encoder-decoder" in str(fixed_steps_obstacle(tiny_t5()))
    eager = tiny_llama(attn_implementation="eager")
    assert "runs attention 'eager'" in str(fixed_steps_obstacle(eager))


def test_a_window_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    assert type(growing_cache(config).layers[0]).__name__ == "DynamicSlidingWindowLayer"
    assert "have no fixed counterpart" in str(fixed_steps_obstacle(MistralForCausalLM(config).eval()))
