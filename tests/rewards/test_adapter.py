"""`AdapterReward`: batches, positions, the end of a response, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from trl import AutoModelForCausalLMWithValueHead as Causal
from trl import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.rewards import AdapterReward, Sample, as_reward

pytest.importorskip("peft")
from tests.models.lora import lora_config

ROWS = [((5, 6), (7, 8, 9)), ((5,), (6,)), ((10, 11, 12), (13, 14, 15, 16)), ((20,), (21, 1)), ((20,), (21,))]
SAMPLES = [Sample(prompt="", completion="", prompt_ids=p, completion_ids=c, columns={}) for p, c in ROWS]


def scorer(make: Any = tiny_llama, labels: int = 1, **config: Any) -> Any:
    """A value-head model whose reward adapter is random."""
    model = Causal.from_pretrained(make(), peft_config=lora_config(**config))
    torch.manual_seed(5)
    model.pretrained_model.add_adapter("reward", lora_config(init_lora_weights=False, **config))
    model.reward_adapter_name, model.reward_score = "reward", nn.Linear(16, labels, bias=False)
    return model


LLAMA = {"target_modules": ["q_proj"], "fan_in_fan_out": False}


@pytest.mark.parametrize(("make", "config"), [(tiny_llama, LLAMA), (tiny_gpt2, {})])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_text_alone(make: Any, config: dict[str, Any], batch_size: int) -> None:
    model = scorer(make, labels=2, **config)
    expected = [model.compute_reward_score(torch.tensor([[*p, *c]]))[0, -1, 1] for p, c in ROWS]
    scores = AdapterReward(model, label=1, batch_size=batch_size)(SAMPLES)
    assert_close(scores, torch.stack(expected))
    assert len(set(scores)) == len(scores)


def test_an_end_token_is_left_out_on_request() -> None:
    model = scorer(**LLAMA)
    kept, dropped = (AdapterReward(model, eos_token_id=eos)(SAMPLES) for eos in (None, 1))
    assert kept[3] != kept[4]
    assert_close(dropped[3], kept[4])
    assert_close([dropped[i] for i in (0, 1, 2, 4)], [kept[i] for i in (0, 1, 2, 4)])


def test_it_is_a_reward() -> None:
    model = scorer(**LLAMA)
    scored = as_reward({"rm": AdapterReward(model), "length": lambda completions: [1.0] * len(completions)}).score(
        SAMPLES
    )
    assert_close(scored.scores, [score + 1 for score in AdapterReward(model)(SAMPLES)])
    assert set(scored.components) == {"rm", "length"}


def test_what_is_refused() -> None:
    model = scorer(**LLAMA)
    with pytest.raises(ValueError, match=r"model \(AutoModelForCausalLMWithValueHead\) has no reward adapter: load it"):
        AdapterReward(Causal.from_pretrained(tiny_llama()))
    with pytest.raises(ValueError, match="label=1 is not an output of the score head, which has 1"):
        AdapterReward(model, label=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        AdapterReward(model, batch_size=0)
    with pytest.raises(ValueError, match="sample 0 has no tokens"):
        AdapterReward(model)([Sample(prompt="", completion="", prompt_ids=(), completion_ids=(), columns={})])
    t5 = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q"], "fan_in_fan_out": False}
    seq2seq = Seq2Seq.from_pretrained(tiny_t5(), peft_config=lora_config(**t5))
    seq2seq.reward_score = nn.Linear(16, 1)
    with pytest.raises(ValueError, match="an encoder-decoder does not"):
        AdapterReward(seq2seq)
